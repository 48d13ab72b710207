"""Tokenizer between item ids and semantic-ID tokens (OneRec sections 3.1 and 3.2, figure 2).

An item is L code tokens, `<a_12><b_7><c_200>`: the letter is the level of the residual quantization, the number the
code within it.
Token ids: `<pad>` 0, `<eos>` 1, `<bos>` 2, `<sep>` 3, `<unk>` 4, then the codes of level 0, of level 1, and so on.
The layout of the two sequences of the model is defined here and nowhere else:

- history (encoder): `a b c <sep> a b c <sep> a b c`, oldest item first, LEFT padded;
- session (decoder labels): `a b c <bos> a b c <bos> a b c`. Shifted right with `<bos>` as the start token it gives
  the decoder's input `<bos> a b c <bos> a b c`, that is `<bos>` before every item (eq 3).

An item may have several semantic IDs, each with codes of its own: the levels of all of them follow one another, in the
vocabulary and in `codes`. With two, an item of a history is `a b c d e f`, and a session is written in one ID, in
`a b c` or in `d e f` throughout; the decoder's input then has `<bos_1>` in place of `<bos>` for the second ID.
An ID's number counts from 0.

"Catalogue index" means the row of an item in the catalogue, 0..N-1. Item ids, integers or strings, keep their type.
New items are appended, removed ones keep their place: an item's index and its semantic ID never change.
"""

import hashlib
import itertools
import json
import os
import string
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BatchEncoding, TokenizersBackend
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from .configuration_onerec import (
    BOS_TOKEN_ID,
    NUM_SPECIAL_TOKENS,
    PAD_TOKEN_ID,
    SEP_TOKEN_ID,
    SPECIAL_TOKENS,
    vocabulary_size,
)
from .item_index import ItemIdLookup, SemanticIdLookup, as_item_ids, item_id_array, read_item_index, write_item_index
from .readable_checkpoints import readable_checkpoint
from .renamed_arguments import renamed_arguments
from .semantic_ids.refit import added_items, displaced_items, refit_reasons
from .staged_files import staged_files

IGNORE_INDEX = -100
ITEMS_AT_ONCE = 65_536  # in passes over the catalogue that make copies

VOCAB_FILES_NAMES = {
    "tokenizer_file": "tokenizer.json",
    "item_index_file": "item_index.parquet",
    "codebooks_file": "codebooks.safetensors",
    "quantizer_file": "quantizer.json",
    "semantic_id_report_file": "semantic_id_report.json",
}


def code_token(level: int, code: int) -> str:
    """Text of one code token: `code_token(1, 7)` is `<b_7>`."""
    return f"<{string.ascii_lowercase[level]}_{code}>"


def _bos_tokens(num_semantic_ids: int) -> list[str]:
    """Those of the IDs after the first, whose BOS is the special token."""
    return [f"<bos_{number}>" for number in range(1, num_semantic_ids)]


def _build_backend(codebook_sizes: Sequence[int], num_semantic_ids: int) -> Tokenizer:
    vocabulary = list(SPECIAL_TOKENS)
    for level, size in enumerate(codebook_sizes):
        vocabulary.extend(code_token(level, code) for code in range(size))
    vocabulary.extend(_bos_tokens(num_semantic_ids))
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"<[^<>]*>"), "isolated")]
    )
    backend.decoder = decoders.Fuse()
    special = [*SPECIAL_TOKENS, *_bos_tokens(num_semantic_ids)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def _check_backend(backend: Tokenizer, codebook_sizes: Sequence[int], num_semantic_ids: int) -> None:
    expected = vocabulary_size(codebook_sizes, num_semantic_ids)
    last_token = [code_token(len(codebook_sizes) - 1, codebook_sizes[-1] - 1), *_bos_tokens(num_semantic_ids)][-1]
    if (
        backend.get_vocab_size(with_added_tokens=False) != expected
        or backend.token_to_id(last_token) != expected - 1
        or any(backend.token_to_id(token) != i for i, token in enumerate(SPECIAL_TOKENS))
    ):
        raise ValueError(
            f"tokenizer.json does not hold the {expected} tokens of codebook_sizes {list(codebook_sizes)}: it belongs "
            "to another tokenizer; save or download the tokenizer again"
        )


def _checked_codebooks(codebooks: Sequence, codebook_sizes: Sequence[int]) -> list[torch.Tensor]:
    codebooks = [torch.as_tensor(codebook, dtype=torch.float32).contiguous() for codebook in codebooks]
    for level, codebook in enumerate(codebooks):
        if codebook.ndim != 2 or level >= len(codebook_sizes) or codebook.shape[0] != codebook_sizes[level]:
            raise ValueError(
                f"codebooks[{level}] has shape {tuple(codebook.shape)}, which does not fit codebook_sizes "
                f"{list(codebook_sizes)}"
            )
    return codebooks


def _ids_of_rows(item_ids: Iterable, embeddings) -> pa.Array:
    ids = as_item_ids(item_ids)
    if len(ids) != len(embeddings):
        raise ValueError(f"{len(ids)} item_ids but {len(embeddings)} embeddings; one row per item is needed")
    return ids


def _code_dtype(codebook_sizes: Sequence[int]) -> np.dtype:
    """Smallest integer type of the codes among those that torch has all operations for."""
    largest = max(codebook_sizes) - 1
    return next(np.dtype(kind) for kind in (np.uint8, np.int16, np.int32, np.int64) if largest <= np.iinfo(kind).max)


def _load_quantizer(quantizer_path: str):
    """The quantizer whose files lie in the folder of this one, or None where the package is not installed."""
    try:
        # Absolute and late, so that this file works alone as a Hub repository's code, without the package.
        from onerec_hf.semantic_ids import load_quantizer
    except ImportError:
        return None
    return load_quantizer(Path(quantizer_path).parent)


def _with_defaults(items, embeddings, quantizer) -> tuple:
    """What [`OneRecTokenizer.fit`] fits where it is not given all of it."""
    try:
        # As in _load_quantizer.
        from onerec_hf.data import as_feed
        from onerec_hf.item_embeddings import embed_items
        from onerec_hf.semantic_ids import codebook_sizes_for, make_quantizer
    except ImportError as error:
        raise ImportError("Fitting a tokenizer needs the package: pip install onerec_hf") from error
    if embeddings is None:
        feed = as_feed(items)
        items, embeddings = feed.items["item_id"], embed_items(feed)[0]
    return items, embeddings, quantizer or make_quantizer("balanced_rkmeans", codebook_sizes_for(len(embeddings)))


def _read_codebooks(path: str) -> list[torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            levels = itertools.takewhile(file.keys().__contains__, map("level_{}".format, itertools.count()))
            return [file.get_tensor(name) for name in levels]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as codebooks ({error}); save it again") from error


class OneRecTokenizer(TokenizersBackend):
    """Item ids <-> semantic-ID tokens, with the item index and the codebooks it was built from.

    Build one with [`OneRecTokenizer.fit`] or [`OneRecTokenizer.from_semantic_ids`]; `save_pretrained`, `push_to_hub`
    and `AutoTokenizer.from_pretrained` carry `tokenizer.json`, `item_index.parquet` (item_id, one code column per
    level and removed, in catalogue order), `codebooks.safetensors` (`level_0`, ... (K_l, d), and what else the
    quantizer has), `quantizer.json` where there is a quantizer, and `semantic_id_report.json`.

    A catalogue changes without a refit: [`add_items`] appends items with codes of the frozen quantizer,
    [`remove_items`] takes items out of generation. Build the [`ItemTrie`] again after either.

    Args:
        codebook_sizes: K_l, number of codes of each of the L levels; of several IDs those of all, one ID's after the
            other's.
        item_ids: N integers or N strings, in catalogue order.
        codes: integers (N, levels), codes[i, l] in [0, K_l), with a column for each of `codebook_sizes`.
        codebooks: centroids (K_l, d) of each quantized level. May have fewer levels than `codebook_sizes`: a last
            level that only tells items with equal codes apart ("suffix") has no centroids.
        report: JSON-able quality report of the semantic IDs.
        tokenizer_object: backend that was read from `tokenizer.json`; built from `codebook_sizes` when None.
        quantizer: the fitted `onerec_hf.semantic_ids.Quantizer` of the codes, which gives new items theirs; its
            codebooks take the place of `codebooks`.
        removed: bool (N,), items that are not to be generated; none by default.
        num_semantic_ids: C, semantic IDs of every item, 1 by default; a quantizer has its own number.

    Attributes:
        item_ids: (N,) int64 or StringDType.
        codes: (N, C L) of the smallest integer type: uint8, int16 ...
        removed: (N,) bool.
        codebook_sizes, codebooks, quantizer, report: as given; the quantizer may be None.
        num_items, num_semantic_ids, num_levels: N, removed ones included, C, and the L of one ID.
        tokens_per_item: L + 1, the codes of one ID and one separator.
        level_offsets: token id of code 0 of each of the C L levels.
        semantic_id_fingerprint: another one for every other catalogue, code or removed item.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        codebook_sizes: Sequence[int] | None = None,
        item_ids: Iterable | None = None,
        codes: np.ndarray | None = None,
        codebooks: Sequence[torch.Tensor] | None = None,
        report: Mapping | None = None,
        tokenizer_object: Tokenizer | None = None,
        semantic_id_fingerprint: str | None = None,
        quantizer=None,
        removed: np.ndarray | None = None,
        num_semantic_ids: int = 1,
        **kwargs,
    ):
        if codebook_sizes is None or item_ids is None or codes is None:
            raise ValueError(
                "OneRecTokenizer needs codebook_sizes, item_ids and codes; use OneRecTokenizer.fit(...), "
                "OneRecTokenizer.from_semantic_ids(...) or OneRecTokenizer.from_pretrained(DIR)"
            )
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        if not 0 < len(self.codebook_sizes) <= len(string.ascii_lowercase) or min(self.codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes must be 1 to 26 positive integers, got {list(codebook_sizes)}")
        self.num_semantic_ids = num_semantic_ids if quantizer is None else quantizer.num_semantic_ids
        if self.num_semantic_ids < 1 or len(self.codebook_sizes) % self.num_semantic_ids:
            raise ValueError(
                f"codebook_sizes {list(codebook_sizes)} must hold as many levels for each of num_semantic_ids "
                f"({self.num_semantic_ids})"
            )
        self.num_levels = len(self.codebook_sizes) // self.num_semantic_ids
        self.tokens_per_item = self.num_levels + 1
        self.level_offsets = tuple(itertools.accumulate(self.codebook_sizes[:-1], initial=NUM_SPECIAL_TOKENS))
        self.quantizer = quantizer
        if quantizer is not None and tuple(quantizer.id_sizes) != self.codebook_sizes:
            own, given = list(self.codebook_sizes), list(quantizer.id_sizes)
            raise ValueError(f"codebook_sizes are {own}, those of the quantizer's IDs {given}")
        codebooks = codebooks if quantizer is None else quantizer.codebooks
        self.codebooks = _checked_codebooks(codebooks or [], self.codebook_sizes)
        self.report = dict(report or {})
        item_ids = item_id_array(as_item_ids(item_ids))
        self._set_items(item_ids, codes, np.zeros(len(item_ids), dtype=bool) if removed is None else removed)
        if semantic_id_fingerprint is not None and semantic_id_fingerprint != self.semantic_id_fingerprint:
            raise ValueError(
                "item_index.parquet or codebooks.safetensors do not belong to this tokenizer_config.json: their "
                "content has another fingerprint. Files of two tokenizers are mixed; save or download "
                "the tokenizer again"
            )
        if tokenizer_object is None:
            tokenizer_object = _build_backend(self.codebook_sizes, self.num_semantic_ids)
        _check_backend(tokenizer_object, self.codebook_sizes, self.num_semantic_ids)
        if self.num_semantic_ids > 1:
            kwargs["num_semantic_ids"] = self.num_semantic_ids
        for name, token in zip(("pad", "eos", "bos", "sep", "unk"), SPECIAL_TOKENS, strict=True):
            kwargs.setdefault(f"{name}_token", token)
        # The latest behaviours are the ones to keep, in text as in encode_histories.
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("truncation_side", "left")
        super().__init__(
            tokenizer_object=tokenizer_object,
            codebook_sizes=list(self.codebook_sizes),
            semantic_id_fingerprint=self.semantic_id_fingerprint,
            quantizer_type=None if quantizer is None else quantizer.quantizer_type,
            **kwargs,
        )

    @classmethod
    def from_semantic_ids(
        cls,
        item_ids: Iterable,
        codes: np.ndarray,
        codebooks: Sequence[torch.Tensor] | None = None,
        report: Mapping | None = None,
        codebook_sizes: Sequence[int] | None = None,
        quantizer=None,
        num_semantic_ids: int = 1,
    ) -> "OneRecTokenizer":
        """Tokenizer of items whose codes are known; arguments as in the class.

        `codebook_sizes` come from `quantizer` or `codebooks` when None. Without a quantizer no items can be added.

        Raises:
            ValueError: duplicate or missing ids, a code out of range, shapes that do not fit.
        """
        if codebook_sizes is None:
            if quantizer is not None:
                codebook_sizes = quantizer.id_sizes
            elif codebooks:
                codebook_sizes = [len(codebook) for codebook in codebooks]
            else:
                raise ValueError("from_semantic_ids needs codebooks, codebook_sizes or a quantizer")
        given = {"quantizer": quantizer, "num_semantic_ids": num_semantic_ids}
        return cls(codebook_sizes, item_ids, codes, codebooks, report, **given)

    @classmethod
    @renamed_arguments(item_ids="items")
    def fit(cls, items, embeddings=None, quantizer=None) -> "OneRecTokenizer":
        """Fits a quantizer on item embeddings, and builds the tokenizer of its semantic IDs.

        >>> from onerec_hf import SimulatedFeed
        >>> feed = SimulatedFeed.generate(users=40, items=160).feed()
        >>> tokenizer = OneRecTokenizer.fit(feed)
        >>> tokenizer.num_items, tokenizer.codebook_sizes
        (160, (16, 16, 16))
        >>> tokenizer.decode(tokenizer.item_token_ids[0])  # doctest: +ELLIPSIS
        '<a_...><b_...><c_...>'

        Args:
            items: N item ids, in the order of the catalogue. Without embeddings a [`Feed`], or a log that
                [`feed_from_log`] reads by its default names, of whose items [`embed_items`] makes them.
            embeddings: (N, d). Those of a large catalogue may be mapped from a file, by `numpy.load(path,
                mmap_mode="r")` of a .npy file or `safetensors.torch.load_file`: in float32 they are read in blocks and
                never held whole.
            quantizer: An unfitted `onerec_hf.semantic_ids.Quantizer`; by default balanced residual K-means of three
                levels, with as many codes as the catalogue needs.

        Raises:
            ValueError: ids that do not go with the embeddings, or what the quantizer or the reader of logs refuses.
        """
        if embeddings is None or quantizer is None:
            items, embeddings, quantizer = _with_defaults(items, embeddings, quantizer)
        item_ids = _ids_of_rows(items, embeddings)
        result = quantizer.fit(embeddings)
        return cls(result.codebook_sizes, item_ids, result.codes, report=result.report, quantizer=result.quantizer)

    def _set_items(self, item_ids: np.ndarray, codes: np.ndarray, removed: np.ndarray) -> None:
        """Takes over a catalogue, or raises ValueError and leaves everything as it was."""
        codes, removed = np.asarray(codes), np.asarray(removed)
        if len(item_ids) == 0:
            raise ValueError("item_ids is empty: a tokenizer needs at least one item")
        levels = len(self.codebook_sizes)
        if codes.shape != (len(item_ids), levels) or codes.dtype.kind not in "iu":
            raise ValueError(
                f"codes must be integers of shape [{len(item_ids)}, {levels}] (items, levels), "
                f"got {codes.dtype} of shape {list(codes.shape)}"
            )
        out_of_range = (codes < 0) | (codes >= np.asarray(self.codebook_sizes))
        if out_of_range.any():
            row, level = np.argwhere(out_of_range)[0]
            raise ValueError(
                f"codes row {row} (item {item_ids[row : row + 1].tolist()[0]!r}): code {codes[row, level]} of level "
                f"{level} is outside [0, {self.codebook_sizes[level]})"
            )
        if removed.dtype != bool or removed.shape != (len(item_ids),):
            raise ValueError(
                f"removed must be bool of shape [{len(item_ids)}], got {removed.dtype} of shape {list(removed.shape)}"
            )
        self._id_lookup = ItemIdLookup(item_ids)
        self.item_ids = item_ids
        self.codes = codes.astype(_code_dtype(self.codebook_sizes))
        self._set_removed(removed)

    def _set_removed(self, removed: np.ndarray) -> None:
        if removed.all():
            raise ValueError("all items would be removed: nothing would be left to generate")
        self.removed = removed
        # Of items with one ID the first that may be generated is the one it stands for.
        # By their first level and the one after their last: each ID alone, and all of an item's together.
        spans = [self.levels_of(number) for number in range(self.num_semantic_ids)]
        bounds = dict.fromkeys((span.start, span.stop) for span in (*spans, slice(0, len(self.codebook_sizes))))
        self._semantic_id_lookups = {
            (start, stop): SemanticIdLookup(self.codes[:, start:stop], self.codebook_sizes[start:stop], last=removed)
            for start, stop in bounds
        }
        self.semantic_id_fingerprint = self._compute_fingerprint()

    def _compute_fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        integers = self.item_ids.dtype == np.int64
        several = [self.num_semantic_ids] if self.num_semantic_ids > 1 else []
        digest.update(json.dumps(["int64" if integers else "object", self.codebook_sizes, *several]).encode())
        self._update_by_items(digest, self.num_items)
        for codebook in self.codebooks:
            digest.update(codebook.numpy().astype("<f4").tobytes())
        if self.removed.any():
            digest.update(np.packbits(self.removed).tobytes())
        return digest.hexdigest()

    def _update_by_items(self, digest, num_items: int) -> None:
        """By the ids and codes of the first items."""
        parts = [slice(start, min(start + ITEMS_AT_ONCE, num_items)) for start in range(0, num_items, ITEMS_AT_ONCE)]
        for part in parts:
            ids = self.item_ids[part]
            if self.item_ids.dtype == np.int64:
                digest.update(ids.astype("<i8").tobytes())
            else:
                digest.update(("\0" if part.start else "").encode() + "\0".join(ids.tolist()).encode())
        for part in parts:
            digest.update(self.codes[part].astype("<i8").tobytes())

    def catalogue_fingerprint(self, num_items: int | None = None) -> str:
        """What tells one fit from another: of the first `num_items` items (all of them by default) and their codes,
        which stay as they are when items are added or removed."""
        num_items = self.num_items if num_items is None else num_items
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self.codebook_sizes, self.num_semantic_ids]).encode())
        self._update_by_items(digest, num_items)
        return f"{num_items}-{digest.hexdigest()}"

    def require_trained_with(self, config) -> None:
        """Refuses a model that was trained on the items and semantic IDs of another fit, to which each code would be
        another item.

        Args:
            config: The model's [`OneRecConfig`].

        Raises:
            ValueError: its `catalogue_fingerprint` is not of this tokenizer's first items.
        """
        trained = config.catalogue_fingerprint
        if trained is None:
            return
        num_items = int(trained.partition("-")[0])
        if num_items > self.num_items or self.catalogue_fingerprint(num_items) != trained:
            raise ValueError(
                f"The model was trained on other items or semantic IDs than this tokenizer's, of {self.num_items} "
                f"items: load the tokenizer that was saved with it, of {num_items} items, to which new ones may have "
                "been added, or train the model anew."
            )

    def tie(self, config) -> None:
        """Lets a model's configuration say that it is trained on this catalogue, unless it says what it was trained
        on; see [`require_trained_with`].

        Raises:
            ValueError: it was trained on another catalogue, or has other codes.
        """
        self.require_trained_with(config)
        if list(config.codebook_sizes) != list(self.codebook_sizes):
            raise ValueError(
                f"The model's codebook_sizes are {list(config.codebook_sizes)} and the tokenizer's "
                f"{list(self.codebook_sizes)}: make the model's configuration with codebook_sizes="
                "tokenizer.codebook_sizes."
            )
        if config.catalogue_fingerprint is None:
            config.catalogue_fingerprint = self.catalogue_fingerprint()

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def generatable(self) -> np.ndarray:
        """Items that may be generated, bool (N,): those that are not removed."""
        return ~self.removed

    def levels_of(self, id_number: int) -> slice:
        """Places of one ID's levels among those of all IDs.

        Raises:
            ValueError: there is no such ID.
        """
        if not 0 <= id_number < self.num_semantic_ids:
            raise ValueError(f"id_number {id_number} is outside [0, {self.num_semantic_ids})")
        return slice(id_number * self.num_levels, (id_number + 1) * self.num_levels)

    @property
    def item_token_ids(self) -> torch.LongTensor:
        """Code token ids of every item, (N, C L), computed at each access."""
        return torch.from_numpy(self._token_ids(slice(None)))

    @property
    def semantic_id_token_ids(self) -> torch.LongTensor:
        """Token ids of all semantic IDs of all items, (N C, L), computed at each access."""
        return self.item_token_ids.view(-1, self.num_levels)

    def _token_ids(self, indices) -> np.ndarray:
        return self.codes[indices] + np.asarray(self.level_offsets)

    # A catalogue that changes

    def add_items(self, item_ids: Iterable, embeddings) -> np.ndarray:
        """Appends new items, with codes of the frozen quantizer beside the IDs that are taken.

        No existing catalogue index or semantic ID changes, and no token is added: models trained with this tokenizer
        stay valid, and generate the new items once the trie is built again. Warns when a refit is due
        ([`refit_reasons`]).

        Args:
            item_ids: M new ids of the catalogue's type.
            embeddings: M rows in the space of the fitted embeddings, (M, d).

        Returns:
            Catalogue indices of the new items, int64 (M,).

        Raises:
            ValueError: the tokenizer has no quantizer; an id is in the catalogue or given twice; an embedding of wrong
                width, NaN or infinite (names the row); the collision policy finds no ID. Nothing is added then.
        """
        if self.quantizer is None:
            raise ValueError(
                "this tokenizer holds no quantizer to give new items their codes: build it with "
                "OneRecTokenizer.fit(...) or from_semantic_ids(..., quantizer=...), and load it where onerec_hf is "
                "installed"
            )
        new = _ids_of_rows(item_ids, embeddings)
        if len(new) == 0:
            return np.zeros(0, dtype=np.int64)
        known = np.flatnonzero(self._id_lookup.find(new) >= 0)
        if len(known):
            row = int(known[0])
            raise ValueError(
                f"item_ids row {row}: {new[row].as_py()!r} is in the catalogue and keeps its semantic ID; drop it, or "
                "call restore_items if it was removed"
            )
        new_ids = item_id_array(new)
        ItemIdLookup(new_ids)  # names the rows of a duplicate as they were given
        width = self.quantizer.embedding_dim
        if isinstance(embeddings, (list, tuple)):
            for row, own in enumerate(map(len, embeddings)):
                if own != width:
                    raise ValueError(f"embeddings row {row} has {own} dimensions, the quantizer was fitted on {width}")
        placed = self.quantizer.place(embeddings, self.codes.astype(np.int64))
        nearest, errors = self.quantizer.encode(embeddings), self.quantizer.quantization_error(embeddings)
        displaced = displaced_items(self.quantizer, nearest, placed, self._item_with_any_id)
        first = self.num_items
        self._set_items(
            np.concatenate([self.item_ids, new_ids]),
            np.concatenate([self.codes, placed]),
            np.concatenate([self.removed, np.zeros(len(new_ids), dtype=bool)]),
        )
        self.report["added_items"] = added_items(self.report, errors, displaced)
        reasons = self.refit_reasons()
        if reasons:
            warnings.warn(f"the semantic IDs should be fitted again: {'; '.join(reasons)}", stacklevel=2)
        return np.arange(first, self.num_items)

    def remove_items(self, item_ids: Iterable) -> None:
        """Takes items out of generation. They keep their catalogue index and semantic ID and are encoded in histories.

        Raises:
            ValueError: an id is not in the catalogue, or no item would be left; nothing is removed then.
        """
        removed = self.removed.copy()
        removed[self.item_index(item_ids)] = True
        self._set_removed(removed)

    def restore_items(self, item_ids: Iterable) -> None:
        """Brings removed items back into generation, with the semantic IDs they had."""
        removed = self.removed.copy()
        removed[self.item_index(item_ids)] = False
        self._set_removed(removed)

    def refit_reasons(self) -> list[str]:
        """Why the semantic IDs should be fitted again, by what was added and removed since; empty if they need not be.

        [`semantic_ids.refit`] says when; `report["added_items"]` has the figures.
        """
        codes = self.codes[self.generatable, : len(self.codebooks)]
        return refit_reasons(self.report, codes, self.quantizer)

    # Items

    @renamed_arguments(unknown="unknown_items")
    def item_index(self, item_ids: Iterable, unknown_items: str = "error") -> np.ndarray:
        """Catalogue indices of item ids.

        Args:
            item_ids: M item ids of the catalogue's type.
            unknown_items: "error" raises for an id that is not in the catalogue, "skip" gives it the index -1.

        Returns:
            int64 array (M,).

        Raises:
            ValueError: names the first unknown id and its position.
        """
        if unknown_items not in ("error", "skip"):
            raise ValueError(f'unknown_items must be "error" or "skip", got {unknown_items!r}')
        wanted = as_item_ids(item_ids)
        indices = self._id_lookup.find(wanted)
        if unknown_items == "error" and (indices < 0).any():
            position = int(np.flatnonzero(indices < 0)[0])
            raise ValueError(
                f"item id {wanted[position].as_py()!r} (position {position}) is not in the catalogue of "
                f"{self.num_items} items; drop it or pass unknown_items='skip'"
            )
        return indices

    def codes_to_index(self, codes, id_number: int = 0) -> np.ndarray:
        """Catalogue indices (...) of code tuples (..., L) of the ID of this number; -1 where no item has these codes.

        Where several items share the codes, the first that is not removed is given; `items_of_semantic_id` has all.
        """
        codes = np.asarray(codes, dtype=np.int64)
        if codes.shape[-1] != self.num_levels:
            raise ValueError(
                f"codes must have {self.num_levels} levels in the last dimension, got shape {codes.shape}"
            )
        return self._lookup(id_number).first(codes)

    def _lookup(self, id_number: int) -> SemanticIdLookup:
        levels = self.levels_of(id_number)
        return self._semantic_id_lookups[levels.start, levels.stop]

    def _item_with_any_id(self, codes: np.ndarray) -> np.ndarray:
        """Catalogue indices (M,) of an item that has one of the C IDs of codes (M, C L), -1 where none has."""
        of_ids = codes.reshape(len(codes), self.num_semantic_ids, self.num_levels)
        found = [self._lookup(number).first(of_ids[:, number]) for number in range(self.num_semantic_ids)]
        return np.max(found, axis=0)

    def semantic_id(self, item_id: int | str, id_number: int = 0) -> str:
        """Text of an item's semantic ID of this number, such as `<a_12><b_7><c_200>`."""
        levels = self.levels_of(id_number)
        codes = self.codes[self.item_index([item_id])[0], levels]
        return "".join(code_token(level, code) for level, code in enumerate(codes.tolist(), start=levels.start))

    def items_of_semantic_id(self, semantic_id: str | Sequence[int], id_number: int = 0) -> list[int | str]:
        """Ids of all the items whose semantic ID of this number is the one given, as text or as a tuple of L codes,
        removed ones last."""
        offsets = np.asarray(self.level_offsets[self.levels_of(id_number)])
        if isinstance(semantic_id, str):
            token_ids = self(semantic_id, add_special_tokens=False)["input_ids"]
            semantic_id = np.asarray(token_ids, dtype=np.int64)
            semantic_id = semantic_id - offsets if len(token_ids) == len(offsets) else semantic_id
        if len(semantic_id) != self.num_levels:
            raise ValueError(f"a semantic ID of this tokenizer has {self.num_levels} codes, got {len(semantic_id)}")
        found = self._lookup(id_number).all(np.asarray(semantic_id, dtype=np.int64))
        return self.item_ids[found].tolist()

    # Sequences

    def _flatten(
        self,
        sequences: Sequence[Sequence],
        name: str,
        max_items: int | None,
        catalogue_indices: bool,
        unknown_items: str = "error",
        latest: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The first or `latest` items of B sequences in one row: catalogue indices, sequences and places, counted from
        the first or last item; and the number of them in each sequence, (B,)."""
        if max_items is not None and max_items < 1:
            raise ValueError(f"max_items must be at least 1, got {max_items}")
        for row, sequence in enumerate(sequences):
            if sequence is None or isinstance(sequence, (str, bytes)):
                raise ValueError(f"{name}[{row}] must be a list of items, got {sequence!r}.")
        lengths = np.fromiter((len(sequence) for sequence in sequences), dtype=np.int64, count=len(sequences))
        non_empty = [sequence for sequence in sequences if len(sequence)]
        if non_empty and all(isinstance(sequence, np.ndarray) for sequence in non_empty):
            flat = np.concatenate(non_empty)
        else:
            flat = list(itertools.chain.from_iterable(non_empty))
        rows = np.repeat(np.arange(len(lengths)), lengths)
        if catalogue_indices:
            indices = np.asarray(flat, dtype=np.int64)
            wrong = np.flatnonzero((indices < 0) | (indices >= self.num_items))
            if len(wrong):
                raise ValueError(
                    f"{name}[{rows[wrong[0]]}]: {indices[wrong[0]]} is not a catalogue index in [0, {self.num_items})"
                )
        else:
            flat = as_item_ids(flat)
            indices = self.item_index(flat, unknown_items="skip")
            wrong = np.flatnonzero(indices < 0)
            if len(wrong) and unknown_items == "error":
                raise ValueError(
                    f"{name}[{rows[wrong[0]]}] holds item id {flat[int(wrong[0])].as_py()!r}, which is not in the "
                    f"catalogue of {self.num_items} items; drop it or pass unknown_items='skip'"
                )
            indices, rows = np.delete(indices, wrong), np.delete(rows, wrong)
            lengths = np.bincount(rows, minlength=len(lengths))
        places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        if latest:
            places = lengths[rows] - 1 - places
        if max_items is not None:
            kept = places < max_items
            indices, rows, places, lengths = indices[kept], rows[kept], places[kept], np.minimum(lengths, max_items)
        return indices, rows, places, lengths

    @renamed_arguments(unknown="unknown_items")
    def encode_histories(
        self,
        histories: Sequence[Sequence],
        max_items: int | None = None,
        unknown_items: str = "error",
        catalogue_indices: bool = False,
    ) -> BatchEncoding:
        """Encoder input of B histories.

        Args:
            histories: B sequences of item ids, oldest first.
            max_items: keeps the latest `max_items` of each history (n of the paper: 256); None keeps all.
            unknown_items: "error" raises for an id outside the catalogue, "skip" leaves it out.
            catalogue_indices: the histories hold catalogue indices, not item ids.

        Returns:
            `input_ids` and `attention_mask`, LongTensors (B, T), T = longest * (C L + 1) - 1, left padded with
            `<pad>` and 0. An item is the codes of all its IDs. An empty history is the single token `<sep>`, so that
            attention always has a place to go.

        Raises:
            ValueError: names the history and the first unknown id.
        """
        indices, rows, from_end, lengths = self._flatten(
            histories, "histories", max_items, catalogue_indices, unknown_items, latest=True
        )
        longest = max(int(lengths.max(initial=0)), 1)
        width = len(self.codebook_sizes) + 1
        tokens = np.full((len(lengths) * longest, width), PAD_TOKEN_ID, dtype=np.int64)
        items = np.full((len(indices), width), SEP_TOKEN_ID, dtype=np.int64)
        items[:, :-1] = self._token_ids(indices)
        tokens[(rows + 1) * longest - 1 - from_end] = items
        # The separator after the last item is cut off; an empty history keeps one in the last place.
        tokens = tokens.reshape(len(lengths), longest * width)[:, :-1]
        tokens[lengths == 0, -1] = SEP_TOKEN_ID
        input_ids = torch.from_numpy(np.ascontiguousarray(tokens))
        return BatchEncoding({"input_ids": input_ids, "attention_mask": (input_ids != PAD_TOKEN_ID).long()})

    def encode_sessions(
        self,
        sessions: Sequence[Sequence],
        max_items: int | None = None,
        catalogue_indices: bool = False,
        id_numbers: int | np.ndarray = 0,
    ) -> torch.Tensor:
        """Decoder labels of B sessions.

        Args:
            sessions: B sequences of item ids, first shown first; none may be empty.
            max_items: keeps the first `max_items` of each session (m of the paper: 5); None keeps all.
            catalogue_indices: the sessions hold catalogue indices, not item ids.
            id_numbers: of the ID that all sessions, or (B,) each of them, are written in.

        Returns:
            LongTensor (B, longest * (L + 1) - 1): `a b c <bos> a b c ...`, right padded with -100.

        Raises:
            ValueError: an empty session, or an unknown id; names the session.
        """
        indices, rows, positions, lengths = self._flatten(sessions, "sessions", max_items, catalogue_indices)
        if (lengths == 0).any():
            raise ValueError(f"sessions[{lengths.argmin()}] is empty; a target session needs at least one item")
        longest = max(int(lengths.max(initial=0)), 1)
        labels = np.full((len(lengths), longest, self.tokens_per_item), IGNORE_INDEX, dtype=np.int64)
        number = np.broadcast_to(id_numbers, len(lengths))
        if len(number) and not 0 <= number.min() <= number.max() < self.num_semantic_ids:
            raise ValueError(f"id_numbers must lie in [0, {self.num_semantic_ids}), got {id_numbers}")
        of_ids = self._token_ids(indices).reshape(len(indices), self.num_semantic_ids, self.num_levels)
        labels[rows, positions, :-1] = of_ids[np.arange(len(indices)), number[rows]]
        has_next = positions + 1 < lengths[rows]
        labels[rows[has_next], positions[has_next], -1] = BOS_TOKEN_ID
        labels = labels.reshape(len(lengths), longest * self.tokens_per_item)[:, :-1]
        return torch.from_numpy(np.ascontiguousarray(labels))

    def decode_sessions(self, token_ids, illegal: str = "error") -> list[list[int | str | None]]:
        """Item ids of B token sequences; special tokens and -100 are passed over.

        Args:
            token_ids: LongTensor (B, T) or B lists of token ids: generated sequences, labels or encoded histories.
            illegal: what happens to codes that name no item (not L codes in the order of the levels, or codes that no
                item has): "error" raises, "none" puts None in the item's place. With several IDs an item is the codes
                of one of them, or of all.

        Returns:
            B lists of item ids. Items that share a semantic ID decode to the first of them that is not removed.
        """
        if illegal not in ("error", "none"):
            raise ValueError(f'illegal must be "error" or "none", got {illegal!r}')
        if isinstance(token_ids, torch.Tensor):
            token_ids = token_ids.cpu().numpy()
        arrays = [np.asarray(row, dtype=np.int64) for row in token_ids]
        flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
        rows = np.repeat(np.arange(len(arrays)), [len(array) for array in arrays])
        if (flat >= self.vocab_size).any():
            raise ValueError(f"token id {flat.max()} is outside the vocabulary of {self.vocab_size} tokens")

        # An item starts at a code of level 0, after a special token and at the start of a row.
        is_code = (flat >= NUM_SPECIAL_TOKENS) & (flat < NUM_SPECIAL_TOKENS + sum(self.codebook_sizes))
        positions = np.flatnonzero(is_code)
        tokens, rows = flat[positions], rows[positions]
        levels = np.searchsorted(self.level_offsets, tokens, side="right") - 1
        starts = levels == 0
        starts[:1] = True
        starts[1:] |= (np.diff(positions) > 1) | (np.diff(rows) > 0)
        first = np.flatnonzero(starts)
        sizes = np.diff(np.append(first, len(tokens)))
        group = np.cumsum(starts) - 1
        in_order = levels - levels[first][group] == np.arange(len(tokens)) - first[group]
        in_order = np.bincount(group, ~in_order, minlength=len(first)) == 0
        items = np.full(len(first), -1, dtype=np.int64)
        for span, lookup in self._semantic_id_lookups.items():
            offsets = np.asarray(self.level_offsets[span[0] : span[1]])
            legal = in_order & (sizes == len(offsets)) & (levels[first] == span[0])
            items[legal] = lookup.first(tokens[legal[group]].reshape(-1, len(offsets)) - offsets)

        if illegal == "error" and (items < 0).any():
            wrong = int(np.flatnonzero(items < 0)[0])
            text = "".join(self.convert_ids_to_tokens(tokens[group == wrong].tolist()))
            raise ValueError(
                f"token_ids[{rows[first[wrong]]}] holds {text}, which is not an item's semantic ID; generate with the "
                "trie of real items, or pass illegal='none'"
            )
        ids = self.item_ids[items].tolist()
        for position in np.flatnonzero(items < 0):
            ids[position] = None
        bounds = np.searchsorted(rows[first], np.arange(len(arrays) + 1))
        return [ids[start:end] for start, end in itertools.pairwise(bounds)]

    # Files

    def save_pretrained(self, save_directory, legacy_format=None, filename_prefix=None, push_to_hub=False, **kwargs):
        """Saves the tokenizer, its item index, quantizer and report; each file appears whole or not at all.

        A kill between two files leaves a mixture of the old and the new tokenizer, which `from_pretrained` refuses.
        """
        target = Path(save_directory)
        hub_arguments = {key: kwargs.pop(key) for key in list(kwargs) if push_to_hub and key != "save_jinja_files"}
        # tokenizer_config.json holds the fingerprint of the other files.
        last = (f"{filename_prefix}-" if filename_prefix else "") + TOKENIZER_CONFIG_FILE
        with staged_files(target, last) as staging:
            super().save_pretrained(staging, legacy_format, filename_prefix, push_to_hub=False, **kwargs)
            names = sorted(os.listdir(staging))
            if self.quantizer is None:
                # Of a former tokenizer.
                (target / self._file_name("quantizer_file", filename_prefix)).unlink(missing_ok=True)
        if push_to_hub:
            self.push_to_hub(hub_arguments.pop("repo_id", target.resolve().name), **hub_arguments)
        return tuple(str(target / name) for name in names)

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return file_names + self.save_vocabulary(save_directory, filename_prefix)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes item_index.parquet, the quantizer's files and semantic_id_report.json."""
        directory = Path(save_directory)
        paths = {
            key: directory / self._file_name(f"{key}_file", filename_prefix)
            for key in ("item_index", "codebooks", "quantizer", "semantic_id_report")
        }
        write_item_index(paths["item_index"], self.item_ids, self.codes, self.removed)
        if self.quantizer is None:
            del paths["quantizer"]
            levels = {f"level_{level}": codebook for level, codebook in enumerate(self.codebooks)}
            save_file(levels, paths["codebooks"], {"format": "pt"})
        else:
            self.quantizer.save_pretrained(directory)
            for key in ("codebooks", "quantizer"):
                os.replace(directory / VOCAB_FILES_NAMES[f"{key}_file"], paths[key])
        paths["semantic_id_report"].write_text(json.dumps(self.report, indent=2) + "\n", encoding="utf-8")
        return tuple(str(path) for path in paths.values())

    @staticmethod
    def _file_name(key: str, filename_prefix: str | None) -> str:
        return (f"{filename_prefix}-" if filename_prefix else "") + VOCAB_FILES_NAMES[key]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "OneRecTokenizer":
        """The tokenizer that `save_pretrained` or `push_to_hub` wrote; a broken or foreign file is a ValueError."""
        with readable_checkpoint(pretrained_model_name_or_path):
            try:
                return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"tokenizer_config.json or config.json of {pretrained_model_name_or_path} is not valid JSON "
                    f"({error}); save or download it again"
                ) from error

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files, pretrained_model_name_or_path, *args, **kwargs):
        for key, name in cls.vocab_files_names.items():
            if resolved_vocab_files.get(key) is None and key != "quantizer_file":
                remedy = "Save it with OneRecTokenizer.save_pretrained"
                if not Path(pretrained_model_name_or_path).is_dir():  # offline a part of it may be in the cache
                    remedy += f", or with a network get all of it by `hf download {pretrained_model_name_or_path}`"
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds no {name}: it is not a complete OneRecTokenizer. {remedy}"
                )
        for path in filter(None, resolved_vocab_files.values()):
            if Path(path).suffix == ".json":
                try:
                    json.loads(Path(path).read_text(encoding="utf-8"))
                except ValueError as error:
                    raise ValueError(f"{path} is not valid JSON ({error}); save or download it again") from error
        tokenizer = super()._from_pretrained(resolved_vocab_files, pretrained_model_name_or_path, *args, **kwargs)
        # Arrow would keep what reading the item index took, half as much again as the tokenizer itself.
        pa.default_memory_pool().release_unused()
        return tokenizer

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        """Replaces the paths of the saved files by what they hold; called by `from_pretrained`."""
        if "codebook_sizes" not in kwargs:
            raise ValueError(
                "tokenizer_config.json is missing or has no codebook_sizes: these are not the files of a "
                "OneRecTokenizer"
            )
        keys = ("tokenizer", "item_index", "codebooks", "quantizer", "semantic_id_report")
        paths = {key: kwargs.pop(f"{key}_file", None) for key in keys}
        if kwargs.pop("quantizer_type", None) is not None and paths["quantizer"] is None:
            raise ValueError(
                f"{kwargs['name_or_path']} holds no {VOCAB_FILES_NAMES['quantizer_file']}, which its "
                "tokenizer_config.json speaks of; save or download the tokenizer again"
            )
        sizes = kwargs["codebook_sizes"]
        kwargs["item_ids"], kwargs["codes"], kwargs["removed"] = read_item_index(paths["item_index"], len(sizes))
        kwargs["quantizer"] = None if paths["quantizer"] is None else _load_quantizer(paths["quantizer"])
        if kwargs["quantizer"] is None:
            kwargs["codebooks"] = _read_codebooks(paths["codebooks"])
            found = [len(codebook) for codebook in kwargs["codebooks"]]
        else:
            found = list(kwargs["quantizer"].id_sizes)
        if found != sizes[: len(found)]:
            raise ValueError(
                f"{paths['codebooks']} holds codebooks of {found} codes, tokenizer_config.json speaks of {sizes}: it "
                "belongs to another tokenizer; save or download the tokenizer again"
            )
        try:
            kwargs["tokenizer_object"] = Tokenizer.from_file(paths["tokenizer"])
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{paths['tokenizer']} cannot be read as a tokenizer ({error}); save it again") from error
        kwargs["report"] = json.loads(Path(paths["semantic_id_report"]).read_text(encoding="utf-8"))
        if not isinstance(kwargs["report"], dict):
            raise ValueError(f"{paths['semantic_id_report']} holds no JSON object; save or download it again")
        return kwargs
