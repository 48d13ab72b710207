"""Who consumed what together: the matrix of users and items, and the items' similarities by it.

A history is an array of catalogue indices in time order, oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from tqdm.auto import tqdm

_ITEMS_AT_ONCE = 1024


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
    blocks = []
    for start in tqdm(range(0, num_items, _ITEMS_AT_ONCE), desc="item neighbours", leave=False):
        counts = (by_item[start : start + _ITEMS_AT_ONCE] @ consumed).tocoo()
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
