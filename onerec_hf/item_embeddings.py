"""Item embeddings from text, behaviour and features, and their fusion.

OneRec (section 3.1) starts from multimodal embeddings aligned with real user-item behaviour. Here each source gives
`(embeddings, present)`: a float32 array (N, d) with one row per item of the catalogue, and a bool array (N,) that is
False where the source knows nothing of an item (its row is zero). [`fuse_embeddings`] makes of them one vector for
every item.

Nothing here may see the test period: histories passed to [`behaviour_embeddings`] end before the split.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import randomized_svd
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from .co_consumption import item_associations
from .data import Feed
from .data.schema import canonical_lists
from .large_truncated_svd import large_truncated_svd

ITEMS_AT_ONCE = 2**18  # that are fused in double precision
SVD_ROWS = 2**18  # see _truncated_svd
NORMALISATIONS = ("whiten", "l2")


def embed_items(
    feed: Feed,
    content_weight: float = 1.0,
    text_weight: float = 1.0,
    text_encoder: str | None = None,
    behaviour_weight: float = 1.0,
    behaviour_dim: int = 64,
    feature_weight: float = 1.0,
    feature_dim: int = 32,
    embedding_normalisation: str = "l2",
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of a feed's items from all that the feed has of them, each source by its weight; 0 leaves it out.

    >>> from onerec_hf import SimulatedFeed
    >>> embeddings, content = embed_items(SimulatedFeed.generate(users=40, items=160).feed(), behaviour_dim=16)
    >>> embeddings.shape, content.shape  # 32 of the items' own, 16 of behaviour, and the duration
    ((160, 49), (160, 33))

    Args:
        feed: whose interactions are those that may be fitted.
        content_weight: of the items' own embedding column.
        text_weight: of their text column.
        text_encoder: Hub id or folder of an AutoModel that encodes the text; by default TF-IDF of its words.
        behaviour_weight, behaviour_dim: of co-occurrence, [`behaviour_embeddings`].
        feature_weight, feature_dim: of their other columns, [`feature_embeddings`].
        embedding_normalisation: as `normalisation` of [`fuse_embeddings`].

    Returns:
        float32 (N, D) in the order of the catalogue, of all sources, and of all but the behaviour (N, 0 columns where
        there is nothing else).

    Raises:
        ValueError: if there is no source at all.
    """
    sources, behaviour = [], None
    if content_weight and feed.embedding_column:
        given = np.stack(feed.items[feed.embedding_column].to_numpy()).astype(np.float32, copy=False)
        sources.append((given, np.ones(len(given), dtype=bool), content_weight))
    if text_encoder and feed.text_column is None:
        raise ValueError(f"text_encoder is given, but the items of {feed.name} have no text column.")
    if text_weight and feed.text_column is not None:
        texts = feed.items[feed.text_column].tolist()
        embeddings, present = text_embeddings(texts, text_encoder) if text_encoder else term_embeddings(texts)
        if present.any():  # titles that share no word say nothing
            sources.append((embeddings, present, text_weight))
    if behaviour_weight:
        embedded = behaviour_embeddings(feed.positive_histories(), len(feed.items), dim=behaviour_dim)
        behaviour = (*embedded, behaviour_weight)
        sources.append(behaviour)
    columns = (feed.categorical_columns, feed.multi_categorical_columns, feed.numeric_columns)
    if feature_weight and any(columns):
        sources.append((*feature_embeddings(feed.items, *columns, dim=feature_dim), feature_weight))
    if not sources:
        raise ValueError(
            f"The items of {feed.name} have no embedding: give one of content_weight (with an embedding column), "
            "text_weight (with a text column), behaviour_weight or feature_weight (with feature columns)."
        )
    fused = fuse_embeddings(sources, normalisation=embedding_normalisation)
    content = [source for source in sources if source is not behaviour]
    if not content:
        return fused, np.zeros((len(fused), 0), dtype=np.float32)
    return fused, fuse_embeddings(content, normalisation=embedding_normalisation)


def text_embeddings(
    texts: Sequence[str | None],
    model_name_or_path: str,
    batch_size: int = 64,
    max_length: int = 128,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean-pooled last hidden states of a text encoder.

    Args:
        texts: N texts; None, NaN and blank ones count as missing.
        model_name_or_path: any checkpoint of `AutoModel`; of an encoder-decoder the encoder is used.
        max_length: tokens per text, the rest is cut off.
        device: where the encoder runs; a GPU if there is one when None.

    Returns:
        Embeddings float32 (N, hidden size), present bool (N,).

    Raises:
        ValueError: no text at all; the encoder gives NaN, with the row.
    """
    texts, present = _known_texts(texts)
    if not present.any():
        raise ValueError(f"none of the {len(texts)} texts holds anything; check the text column")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModel.from_pretrained(model_name_or_path, dtype=dtype)
    encoder = (model.get_encoder() if model.config.is_encoder_decoder else model).to(device).eval()

    rows = np.flatnonzero(present)
    # Texts of like length share a batch, so that little is spent on padding.
    rows = rows[np.argsort([-len(texts[row]) for row in rows], kind="stable")]
    embeddings = None
    for start in tqdm(range(0, len(rows), batch_size), desc="text embeddings", disable=not show_progress):
        batch = rows[start : start + batch_size]
        inputs = tokenizer(
            [texts[row] for row in batch], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            hidden = encoder(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None].float()
        pooled = ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy()
        if embeddings is None:
            embeddings = np.zeros((len(texts), pooled.shape[1]), dtype=np.float32)
        embeddings[batch] = pooled
    _require_finite(embeddings, present, f"text embeddings of {model_name_or_path}")
    return embeddings, present


def term_embeddings(
    texts: Sequence[str | None], dim: int = 128, min_count: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Latent semantic analysis: TF-IDF of the words and truncated SVD; needs no model and takes seconds.

    Args:
        texts: N texts; None, NaN and blank ones count as missing.
        min_count: words of fewer texts say nothing about likeness and are left out.

    Returns:
        Embeddings float32 (N, at most dim), present bool (N,); False where a text has no such word.
    """
    texts, _ = _known_texts(texts)
    split = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").build_analyzer()
    counts = Counter(word for text in texts for word in set(split(text)))
    words = sorted(word for word, count in counts.items() if count >= min_count)
    if not words:
        return np.zeros((len(texts), 1), dtype=np.float32), np.zeros(len(texts), dtype=bool)
    weights = TfidfVectorizer(analyzer=split, vocabulary=words, sublinear_tf=True).fit_transform(texts)
    present = np.diff(weights.indptr) > 0
    embeddings = _truncated_svd(weights, min(dim, *weights.shape), power=1.0, seed=seed)
    embeddings[~present] = 0
    return embeddings, present


def _known_texts(texts: Sequence[str | None]) -> tuple[list[str], np.ndarray]:
    """Texts, empty where there is none, and which of them hold anything."""
    texts = ["" if text is None or text != text else str(text).strip() for text in texts]
    return texts, np.array([bool(text) for text in texts], dtype=bool)


def pairs_in_window(
    histories: Sequence[np.ndarray], num_items: int, window: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Different items at most `window` places apart in a history, as often as they occur: for each distance, the
    catalogue indices of the earlier ones and of the later ones.

    Args:
        histories: per user an array of catalogue indices, in order of time.
        num_items: N, size of the catalogue.

    Raises:
        ValueError: an index outside [0, N), with the history; no pair anywhere.
    """
    users, items, window = _windowed_histories(histories, num_items, window)
    for distance in range(1, window + 1):
        pairs = (users[distance:] == users[:-distance]) & (items[distance:] != items[:-distance])
        yield items[:-distance][pairs], items[distance:][pairs]


def _windowed_histories(
    histories: Sequence[np.ndarray], num_items: int, window: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Histories one after the other, as numbers of the users and catalogue indices, int (T,), and the window in which
    there can be pairs. Raises the errors of [`pairs_in_window`]."""
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    items = np.concatenate([np.zeros(0, dtype=np.int64), *histories]).astype(np.int64, copy=False)
    users = np.repeat(np.arange(len(histories), dtype=np.int32), lengths)
    wrong = np.flatnonzero((items < 0) | (items >= num_items))
    if len(wrong):
        raise ValueError(
            f"histories[{users[wrong[0]]}] holds {items[wrong[0]]}, which is not a catalogue index in [0, {num_items})"
        )
    # Where a history has two items, two that differ follow one another.
    if window < 1 or not ((users[1:] == users[:-1]) & (items[1:] != items[:-1])).any():
        raise ValueError(
            f"no two different items lie within {window} places in any of the {len(histories)} histories; users with "
            "at least two positive behaviours are needed"
        )
    return users, items, min(window, int(lengths.max()) - 1)


def behaviour_embeddings(
    histories: Sequence[np.ndarray],
    num_items: int,
    dim: int = 64,
    window: int = 10,
    negatives: float = 1.0,
    context_smoothing: float = 0.75,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Item embeddings from co-occurrence: shifted positive PMI ([`item_associations`]) and truncated SVD.

    Two items co-occur when they stand at most `window` places apart in a user's positive history; items are the rows
    of U sqrt(S). Of an item the 2**27 / N largest associations are kept, which is all of them in any catalogue of up
    to 11,585 items, and 134 in one of a million.

    Arguments and errors as of [`pairs_in_window`].

    Returns:
        Embeddings float32 (N, min(dim, N)), present bool (N,); False where an item has no positive association.
    """
    users, items, window = _windowed_histories(histories, num_items, window)
    matrix = item_associations(users, items, num_items, window, negatives, context_smoothing)
    embeddings = _truncated_svd(matrix, min(dim, num_items), power=0.5, seed=seed)
    present = np.diff(matrix.indptr) > 0
    embeddings[~present] = 0
    return embeddings, present


def feature_embeddings(
    items: pd.DataFrame,
    categorical_columns: Sequence[str] = (),
    multi_categorical_columns: Sequence[str] = (),
    numeric_columns: Sequence[str] = (),
    dim: int = 64,
    min_count: int = 2,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Item embeddings from categorical and numeric columns.

    A categorical value is one column, weighted by log(N / count); values of fewer than `min_count` items say nothing
    about likeness and are left out. A numeric column is standardised, after log(1 + x) where it is never negative
    and its skewness is above 1; an unknown number counts as the mean. Every input column weighs the same. More than
    `dim` columns are projected by truncated SVD.

    Args:
        items: one row per item of the catalogue.
        categorical_columns: one value each, of any type.
        multi_categorical_columns: a list of values, or text as [`canonical_lists`] reads it.

    Returns:
        Embeddings float32 (N, at most dim), present bool (N,); False where an item has no known value in any
        column, or only rare ones.

    Raises:
        ValueError: a column that is not there, a numeric column that is not numeric or holds infinity (with the row),
            no column that tells items apart.
    """
    columns = [*categorical_columns, *multi_categorical_columns, *numeric_columns]
    for column in columns:
        if column not in items.columns:
            raise ValueError(f"items have no column {column!r}; the columns are {list(items.columns)}")
    known, blocks = [], []
    for column in (*categorical_columns, *multi_categorical_columns):
        values = items[column].reset_index(drop=True)
        values = canonical_lists(values, column, "items").explode() if column in multi_categorical_columns else values
        values = values.dropna().astype(str)
        values = values[values != ""]
        known.append(np.isin(np.arange(len(items)), values.index))
        blocks.append(_categorical_block(values, len(items), min_count))
    for column in numeric_columns:
        values = _numbers(items[column])
        known.append(~np.isnan(values))
        blocks.append(_numeric_block(values))
    present = np.any(known, axis=0)
    # Each input column's block has a mean squared row norm of 1.
    blocks = [block * math.sqrt(len(items) / block.power(2).sum()) for block in blocks if block.nnz]
    if not blocks:
        raise ValueError(
            f"no column of {columns} tells items apart (each value has fewer than {min_count} items, or all items are "
            "the same)"
        )
    matrix = sp.hstack(blocks, format="csr")
    if matrix.shape[1] <= dim:
        embeddings = matrix.toarray().astype(np.float32)
    else:
        embeddings = _truncated_svd(matrix, min(dim, len(items)), power=1.0, seed=seed)
    embeddings[~present] = 0
    # An item with rare values only is known by name but not by likeness.
    return embeddings, present & embeddings.any(axis=1)


def fuse_embeddings(sources: Sequence[tuple[np.ndarray, np.ndarray, float]], normalisation: str = "l2") -> np.ndarray:
    """One vector per item from several sources: each normalised, weighted, and concatenated.

    Args:
        sources: (embeddings (N, d_s), present bool (N,), weight) of each source.
        normalisation: "whiten": centred, decorrelated and scaled so that all its directions have the same variance and
            a row has a mean squared norm of 1; "l2": rows of unit length. On a real feed log with behaviour and
            features, l2 gave more even codes, fewer collisions and codes that predict the next item's better.

    Returns:
        float32 (N, sum of d_s). Whitening leaves out directions without variance. Where a source does not know an
        item, its part is predicted from the other sources by ridge regression over the items that have it; an item
        that no source knows gets the vector of the item nearest to the mean.

    Raises:
        ValueError: NaN or infinity in a known row, named; sources of different lengths; a source that knows no item.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}")
    if not sources:
        raise ValueError("fuse_embeddings needs at least one source")
    num_items = len(sources[0][0])
    blocks = [slice(start, start + ITEMS_AT_ONCE) for start in range(0, num_items, ITEMS_AT_ONCE)]
    parts = []
    for number, (embeddings, present, weight) in enumerate(sources):
        name = f"source {number}"
        embeddings, present = np.asarray(embeddings), np.asarray(present, dtype=bool)
        if embeddings.ndim != 2 or len(embeddings) != num_items or present.shape != (num_items,):
            raise ValueError(
                f"{name}: embeddings of shape {embeddings.shape} and present of shape {present.shape}, expected "
                f"[{num_items}, d] and [{num_items}]"
            )
        if not present.any() or weight <= 0:
            raise ValueError(f"{name} has weight {weight} and knows {present.sum()} items; leave it out")
        parts.append(_Part(embeddings, present, weight, name, normalisation, blocks))

    bounds = np.cumsum([0, *(part.width for part in parts)])
    fused = np.empty((num_items, bounds[-1]), dtype=np.float32)
    for number, part in enumerate(parts):
        columns = slice(bounds[number], bounds[number + 1])
        others = [other for other in parts if other is not part]
        predict = None if part.present.all() else _ridge_prediction(part, others, blocks)
        for rows in blocks:
            own = part[rows]
            if predict is not None:
                own = np.where(part.present[rows, None], own, predict(rows))
            fused[rows, columns] = own
    known = np.any([part.present for part in parts], axis=0)
    if not known.all():
        # The mean itself may be zero, which has no direction to compare items by.
        mean = sum(fused[rows][known[rows]].sum(0) for rows in blocks) / known.sum()
        distances = [np.square(fused[rows][known[rows]] - mean).sum(1) for rows in blocks]
        fused[~known] = fused[np.flatnonzero(known)[np.concatenate(distances).argmin()]]
    return fused


class _Part:
    """A source as it is fused, normalised and weighted: `part[rows]` is float64, zero where the source knows nothing,
    and computed again at each access.

    Args:
        blocks: the rows that are looked at together.
    """

    def __init__(self, embeddings, present, weight: float, name: str, normalisation: str, blocks: list[slice]):
        self.embeddings, self.present, self.weight = embeddings, present, weight
        _require_finite(embeddings, present, name)
        self.whitening: tuple[np.ndarray, np.ndarray] | None = None
        self.width = embeddings.shape[1]
        if normalisation == "whiten":
            self.whitening = self._whitening(name, blocks)
            self.width = self.whitening[1].shape[1]

    def _known(self, rows: slice) -> np.ndarray:
        return np.where(self.present[rows, None], np.asarray(self.embeddings[rows], dtype=np.float64), 0.0)

    def _whitening(self, name: str, blocks: list[slice]) -> tuple[np.ndarray, np.ndarray]:
        """Mean (d,) of the known rows, and the directions (d, width) in which they vary, scaled."""
        count = self.present.sum()
        mean = sum(self._known(rows)[self.present[rows]].sum(0) for rows in blocks) / count
        gram = 0.0
        for rows in blocks:
            centred, present = self._known(rows) - mean, self.present[rows]
            gram = gram + centred[present].T @ centred[present]
        variances, directions = np.linalg.eigh(gram / count)
        kept = variances > 1e-6 * variances[-1]
        if variances[-1] <= 0:
            raise ValueError(f"{name}: all embeddings are equal, which tells no items apart; leave this source out")
        return mean, directions[:, kept] / np.sqrt(variances[kept] * kept.sum())

    def __getitem__(self, rows: slice) -> np.ndarray:
        part = self._known(rows)
        if self.whitening is None:
            return self.weight * (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12))
        mean, directions = self.whitening
        return self.weight * np.where(self.present[rows, None], (part - mean) @ directions, 0.0)


def _require_finite(embeddings: np.ndarray, present: np.ndarray, name: str) -> None:
    starts = range(0, len(embeddings), ITEMS_AT_ONCE)
    finite = [np.isfinite(embeddings[start : start + ITEMS_AT_ONCE]).all(1) for start in starts]
    broken = np.flatnonzero(present & ~np.concatenate(finite))
    if len(broken):
        raise ValueError(
            f"{name}: row {broken[0]} holds NaN or infinity ({len(broken)} rows in all); repair the "
            "embedding or mark the item as not present"
        )


def _truncated_svd(matrix: sp.csr_matrix, dim: int, power: float, seed: int) -> np.ndarray:
    """U S^power of the `dim` largest singular values, float32 (N, dim).

    Of a matrix of more than 2**18 rows or columns it is found in single precision and in place, as the dense matrices
    of the usual way would be several times the result."""
    if max(matrix.shape) > SVD_ROWS:
        return large_truncated_svd(matrix, dim, power, seed)
    left, singular_values, _ = randomized_svd(matrix, dim, n_iter=4, random_state=seed)
    return (left * singular_values**power).astype(np.float32)


def _categorical_block(values: pd.Series, num_items: int, min_count: int) -> sp.csr_matrix:
    """One column per value of at least `min_count` items, log(N / count) where an item has it; `values` are text by
    row of the item, which may have several."""
    codes, _ = pd.factorize(values)
    pairs = np.unique(np.stack([values.index.to_numpy(), codes], axis=1), axis=0)
    counts = np.bincount(pairs[:, 1]) if len(pairs) else np.zeros(0, dtype=np.int64)
    weights = np.where(counts >= min_count, np.log(num_items / np.maximum(counts, 1)), 0.0)
    entries = (weights[pairs[:, 1]], (pairs[:, 0], pairs[:, 1]))
    block = sp.csr_matrix(entries, shape=(num_items, len(counts)), dtype=np.float64)
    return block[:, np.flatnonzero(weights > 0)]


def _numbers(column: pd.Series) -> np.ndarray:
    if not pd.api.types.is_numeric_dtype(column):
        raise ValueError(f"column {column.name!r} is {column.dtype}, not numeric; cast it or make it categorical")
    values = column.to_numpy(dtype=np.float64, na_value=np.nan).copy()
    if np.isinf(values).any():
        row = np.flatnonzero(np.isinf(values))[0]
        raise ValueError(f"column {column.name!r} row {row} is infinite; repair or drop it")
    return values


def _numeric_block(values: np.ndarray) -> sp.csr_matrix:
    """Standardised values, those of a skewed column after log(1 + x); empty where they tell no items apart."""
    known = ~np.isnan(values)
    if known.any() and values[known].min() >= 0 and pd.Series(values[known]).skew() > 1:
        values = np.log1p(values)
    if not known.any() or not np.nanstd(values) > 0:
        return sp.csr_matrix((len(values), 0))
    return sp.csr_matrix(np.where(known, (values - np.nanmean(values)) / np.nanstd(values), 0.0)[:, None])


def _ridge_prediction(part: _Part, others: Sequence[_Part], blocks: list[slice]) -> Callable[[slice], np.ndarray]:
    """Linear prediction of a part's rows from the other parts and from which of these are known."""

    def inputs(rows: slice) -> np.ndarray:
        columns = [np.ones((len(part.present[rows]), 1))]
        for other in others:
            columns += [other.present[rows, None].astype(np.float64), other[rows]]
        return np.concatenate(columns, axis=1)

    mean = sum(part[rows][part.present[rows]].sum(0) for rows in blocks) / part.present.sum()
    gram, products = 0.0, 0.0
    for rows in blocks:
        fitted = part.present[rows]
        x = inputs(rows)[fitted]
        gram = gram + x.T @ x
        products = products + x.T @ (part[rows][fitted] - mean)
    penalty = 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = np.linalg.solve(gram + penalty, products)
    return lambda rows: inputs(rows) @ weights + mean


def in_earlier_space(earlier: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Embeddings of a catalogue that has grown, `(N, D)`, in the space of those that its first M items had.

    Embeddings of behaviour, text and features are fitted to a log: fitted again to a longer one, their directions are
    others. Those of the new items are mapped by what maps the first M items to what they were, by least squares.

    Args:
        earlier: (M, D), which are kept as they are.
        now: (N, E), N at least M, in any other space.
    """
    design = np.c_[now, np.ones(len(now))].astype(np.float64)
    mapping = np.linalg.lstsq(design[: len(earlier)], earlier.astype(np.float64), rcond=None)[0]
    return np.concatenate([earlier, (design[len(earlier) :] @ mapping).astype(earlier.dtype)])
