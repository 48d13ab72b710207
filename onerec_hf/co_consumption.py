"""Who consumed what together: the matrix of users and items, the items' similarities by it, and their associations
within a window.

A history is an array of catalogue indices in time order, oldest first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse
from tqdm.auto import tqdm

_ITEMS_AT_ONCE = 1024
# Pairs that are counted at once: 256 MB, and as much again while they are sorted.
PAIRS_AT_ONCE = 2**25
PLACES_AT_ONCE = 2**21  # whose pairs are looked at, but not sorted
# Associations of all items that are kept at most (1.6 GB); a catalogue of N items has 2**27 / N of an item, which is
# more than there can be in one of 11,585 items or fewer.
ASSOCIATIONS = 2**27


def flatten_histories(histories: Sequence[np.ndarray], num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and catalogue indices of ragged histories, as two int64 arrays of their total length.

    Raises:
        ValueError: an index is outside 0..num_items-1; names the first such history.
    """
    lengths = np.fromiter((len(history) for history in histories), dtype=np.int64, count=len(histories))
    rows = np.repeat(np.arange(len(histories)), lengths)
    if not len(rows):
        return rows, np.zeros(0, dtype=np.int64)
    items = np.concatenate([np.asarray(history, dtype=np.int64) for history in histories])
    illegal = (items < 0) | (items >= num_items)
    if illegal.any():
        first = int(illegal.argmax())
        raise ValueError(
            f"history {rows[first]} holds the catalogue index {items[first]}, outside 0..{num_items - 1}: "
            "map item ids to rows of the items table first"
        )
    return rows, items


def interaction_matrix(
    histories: Sequence[np.ndarray], num_items: int, half_life: float | None = None
) -> sparse.csr_array:
    """Which user consumed which item, as (B, N).

    An entry is 1, or with a half-life .5 ** (number of later items / half_life) at the item's latest occurrence.

    Raises:
        ValueError: no interactions at all, or an index outside the catalogue.
    """
    rows, items = flatten_histories(histories, num_items)
    if not len(rows):
        raise ValueError("the histories hold no interaction")
    ends = np.cumsum([len(history) for history in histories])
    order = np.lexsort((np.arange(len(rows)), items, rows))
    latest = np.ones(len(rows), dtype=bool)
    latest[:-1] = (np.diff(rows[order]) != 0) | (np.diff(items[order]) != 0)
    kept = order[latest]
    values = np.ones(len(kept), dtype=np.float32)
    if half_life is not None:
        values = 0.5 ** ((ends[rows[kept]] - 1 - kept) / half_life).astype(np.float32)
    return sparse.csr_array((values, (rows[kept], items[kept])), shape=(len(histories), num_items))


def item_similarities(
    histories: Sequence[np.ndarray], num_items: int, neighbours: int, shrinkage: float
) -> sparse.csr_array:
    """Each item's `neighbours` most similar others (N, N), by the cosine of co-consumption, shrunk towards 0 for rare
    items: similarity(i, j) = users(i, j) / (sqrt(users(i) * users(j)) + shrinkage).

    In a row the most similar item stands first, the one of lower index where two are alike.

    Raises:
        ValueError: no interactions at all, or an index outside the catalogue.
    """
    consumed = interaction_matrix(histories, num_items)
    norms = np.sqrt(consumed.sum(axis=0))
    by_item = consumed.T.tocsr()
    # An item's users have consumed at most so many items together, which popular items have many of.
    most = by_item @ np.diff(consumed.indptr).astype(np.float64)
    blocks = []
    for start, end in tqdm(_blocks(most, PAIRS_AT_ONCE, _ITEMS_AT_ONCE), desc="item neighbours", leave=False):
        counts = (by_item[start:end] @ consumed).tocoo()
        row, column = counts.row, counts.col
        other = row + start != column
        row, column, together = row[other], column[other], counts.data[other]
        similarity = together / (norms[row + start] * norms[column] + shrinkage)
        order = np.lexsort((column, -similarity, row))
        row, column, similarity = row[order], column[order], similarity[order]
        kept = np.arange(len(row)) - np.searchsorted(row, row) < neighbours
        bounds = np.searchsorted(row[kept], np.arange(counts.shape[0] + 1))
        entries = similarity[kept].astype(np.float32), column[kept], bounds
        blocks.append(sparse.csr_array(entries, shape=(counts.shape[0], num_items)))
    return sparse.vstack(blocks, format="csr")


def _blocks(sizes: np.ndarray, size: int, items: int) -> list[tuple[int, int]]:
    """Consecutive items [start, end): one or more, `items` at most, whose `sizes` (N,) add up to `size` at most."""
    before = np.concatenate([[0], np.cumsum(sizes)])
    blocks, start = [], 0
    while start < len(sizes):
        end = int(np.searchsorted(before, before[start] + size, side="right")) - 1
        end = max(start + 1, min(end, start + items))
        blocks.append((start, end))
        start = end
    return blocks


def item_associations(
    users: np.ndarray,
    items: np.ndarray,
    num_items: int,
    window: int,
    negatives: float = 1.0,
    context_smoothing: float = 0.75,
    per_item: int | None = None,
) -> sparse.csr_matrix:
    """Shifted positive PMI of items that stand at most `window` places apart in a history, float64 (N, N).

    With counts n_ij an entry is max(0, log(n_ij n / (n_i n_j^a)) - log(negatives)), a = `context_smoothing` (the
    smoothed counts are rescaled to sum to n). The pairs of a few items at a time are counted, so that memory goes by
    the interactions and by what is kept.

    Args:
        users, items: int (T,) of the histories, one after the other, and of the catalogue index at each place.
        per_item: entries of a row that are kept, the largest ones; by default 2**27 / N. Counts are of all pairs.
    """
    per_item = per_item or max(1, ASSOCIATIONS // num_items)
    order = np.argsort(items, kind="stable").astype(np.int32 if len(items) < 2**31 else np.int64)
    places = np.bincount(items, minlength=num_items)
    first = np.concatenate([[0], np.cumsum(places)])

    def partners(own: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of the places `own`, those with a partner at each distance, and the partners."""
        for distance in range(1, window + 1):
            for step in (-distance, distance):
                other = own + step
                inside = (other >= 0) & (other < len(items))
                here, other = own[inside], other[inside]
                pairs = (users[here] == users[other]) & (items[here] != items[other])
                yield here[pairs], other[pairs]

    item_counts = np.zeros(num_items)
    for start in range(0, len(items), PLACES_AT_ONCE):
        own = np.arange(start, min(start + PLACES_AT_ONCE, len(items)))
        for here, _ in partners(own):
            item_counts += np.bincount(items[here], minlength=num_items)
    total = item_counts.sum()
    context_counts = item_counts**context_smoothing
    context_counts *= total / context_counts.sum()
    values, columns, lengths = [], [], []
    blocks = _blocks(places * 2 * window, PAIRS_AT_ONCE, num_items)
    for start, end in tqdm(blocks, desc="item associations", leave=False, disable=len(blocks) < 3):
        own = order[first[start] : first[end]].astype(np.int64)
        pairs = np.concatenate([(items[here] - start) * num_items + items[other] for here, other in partners(own)])
        pairs.sort()
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))
        counts = np.diff(starts, append=len(pairs))
        row, column = np.divmod(pairs[starts], num_items)
        pmi = np.log(counts * total / (item_counts[row + start] * context_counts[column])) - math.log(negatives)
        kept = np.flatnonzero(pmi > 0)
        row, column, pmi = row[kept], column[kept], pmi[kept]
        found = np.bincount(row, minlength=end - start)
        if found.max() > per_item:
            largest = np.lexsort((column, -pmi, row))
            rank = np.arange(len(row)) - np.repeat(np.cumsum(found) - found, found)
            chosen = np.sort(largest[rank < per_item])
            row, column, pmi = row[chosen], column[chosen], pmi[chosen]
            found = np.minimum(found, per_item)
        values.append(pmi)
        columns.append(column.astype(np.int32))
        lengths.append(found)
    bounds = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    entries = np.concatenate(values), np.concatenate(columns), bounds
    return sparse.csr_matrix(entries, shape=(num_items, num_items))
