"""Items with equal codes (collisions): counted, refused, told apart by one more code, or moved to a free ID.

The paper says nothing of them. A policy is applied to a whole catalogue, or to new items beside existing ones, whose
codes then stay as they are.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

COLLISION_POLICIES = ("nearest_free", "suffix", "share", "error")
ROWS_AT_ONCE = 2**18  # whose residuals are held


def prefix_ranks(codes: np.ndarray) -> np.ndarray:
    """Int64 (N, L): the rank of each row's first 1, 2, ... L codes among the distinct ones, in lexicographic order."""
    ranks = np.empty(codes.shape, dtype=np.int64)
    rank = np.zeros(len(codes), dtype=np.int64)
    for level in range(codes.shape[1]):
        # Ranks instead of products of all K, which overflow int64 for many large levels.
        rank = np.unique(rank * (int(codes[:, level].max(initial=0)) + 1) + codes[:, level], return_inverse=True)[1]
        ranks[:, level] = rank
    return ranks


def collision_summary(codes: np.ndarray) -> tuple[float, int]:
    """Share of the items whose ID is not theirs alone, and the largest number of items with one ID."""
    largest = [int(column.max(initial=0)) for column in codes.T]
    if math.prod(code + 1 for code in largest) < 2**63:
        ids = np.zeros(len(codes), dtype=np.int64)
        for code, column in zip(largest, codes.T, strict=True):
            ids *= code + 1
            ids += column
    else:
        ids = prefix_ranks(codes)[:, -1]
    ids.sort()
    counts = np.diff(np.flatnonzero(np.diff(ids, prepend=ids[0] - 1)), append=len(ids))
    return float(counts[counts > 1].sum() / len(codes)), int(counts.max())


def rank_among_equals(codes: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each set of rows with equal codes, in the order of the rows: int64 (N,)."""
    group = prefix_ranks(codes)[:, -1]
    counts = np.bincount(group)
    ranks = np.empty(len(codes), dtype=np.int64)
    ranks[np.argsort(group, kind="stable")] = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def raise_on_collision(codes: np.ndarray, num_existing: int = 0) -> None:
    """ValueError that names two rows with equal codes, if there are any; the first rows may be existing items."""
    ranks = rank_among_equals(codes)
    ranks[:num_existing] = 0
    if not ranks.any():
        return
    second = int(np.flatnonzero(ranks)[0])
    first = int(np.flatnonzero((codes == codes[second]).all(1))[0])
    rows = f"items of rows {first} and {second}"
    if num_existing:
        other = f"row {first - num_existing}" if first >= num_existing else f"the existing item {first}"
        rows = f"new items: row {second - num_existing} and {other}"
    raise ValueError(
        f"{rows} have the same codes {tuple(codes[second].tolist())}, and {int((ranks > 0).sum())} items in all "
        f"collide; choose larger codebooks, more levels, or another collision_policy than 'error': "
        f"{', '.join(COLLISION_POLICIES[:3])}"
    )


def require_enough_ids(codebook_sizes: Sequence[int], num_items: int) -> None:
    """ValueError if items cannot each have an ID of their own."""
    if math.prod(codebook_sizes) < num_items:
        raise ValueError(
            f"codebook_sizes {list(codebook_sizes)} give fewer IDs than there are items ({num_items}); choose larger "
            "codebooks or more levels"
        )


def move_to_free_ids(
    latents: torch.Tensor, codes: np.ndarray, codebooks: Sequence[torch.Tensor], existing_codes: np.ndarray
) -> np.ndarray:
    """Codes (N, L) with which no two items share an ID, moved from `codes` as little as the collisions demand.

    Where items with a common prefix (all codes but the last) collide, the prefix's free last codes are matched to its
    items one to one at the least total distance, so that of two items with one ID the one moves that loses less. Items
    for which a prefix has no code left go to the nearest prefix with room. Only prefixes with a collision are visited.

    Args:
        latents: what the codebooks quantize, (N, d).
        codes: int64 (N, L), the codes wanted.
        codebooks: L tensors (K_l, d).
        existing_codes: int64 (M, L), IDs that are taken and stay.

    Raises:
        ValueError: more items than IDs.
    """
    num_existing, last = len(existing_codes), len(codebooks) - 1
    sizes = [len(codebook) for codebook in codebooks]
    codes = np.concatenate([existing_codes, codes])
    require_enough_ids(sizes, len(codes))
    ranks = prefix_ranks(codes)
    id_rank = ranks[:, last]
    prefix_rank = ranks[:, last - 1] if last else np.zeros(len(codes), dtype=np.int64)
    collides = np.bincount(id_rank)[id_rank] > 1
    collides[:num_existing] = False
    if not collides.any():
        return codes[num_existing:]
    contested = np.zeros(prefix_rank.max() + 1, dtype=bool)
    contested[prefix_rank[collides]] = True
    rows = np.flatnonzero(contested[prefix_rank])
    rows = rows[np.argsort(prefix_rank[rows], kind="stable")]
    bounds = np.flatnonzero(np.diff(prefix_rank[rows], prepend=-1, append=-1))
    del ranks, id_rank, prefix_rank, collides
    last_codebook = codebooks[last].cpu().numpy()
    codebook_norms = np.square(last_codebook).sum(1)

    overflow: list[int] = []
    first, residuals = 0, np.zeros((0, latents.shape[1]), dtype=np.float32)
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if end > first + len(residuals):
            # Of as many whole prefixes as there is room for, or of one.
            until = max(end, bounds[np.searchsorted(bounds, start + ROWS_AT_ONCE, side="right") - 1])
            first, residuals = start, np.zeros((until - start, latents.shape[1]), dtype=np.float32)
            here = rows[start:until]
            own = here[here >= num_existing] - num_existing
            residuals[here >= num_existing] = _residuals(latents, codes[num_existing:], codebooks[:last], own)
        group = rows[start:end]
        moves = group >= num_existing
        free = np.ones(sizes[last], dtype=bool)
        free[codes[group[~moves], last]] = False
        free = np.flatnonzero(free)
        group, residual = group[moves], residuals[start - first : end - first][moves]
        distances = np.square(residual).sum(1)[:, None] + codebook_norms[free] - 2 * residual @ last_codebook[free].T
        kept, places = _least_total(distances)
        codes[group[kept], last] = free[places]
        overflow.extend(np.delete(group, kept).tolist())
    if overflow:
        _move_to_open_prefixes(latents, codes, [codebook.cpu() for codebook in codebooks], overflow, num_existing)
    return codes[num_existing:]


def _residuals(latents: torch.Tensor, codes: np.ndarray, codebooks, rows: np.ndarray) -> np.ndarray:
    residuals = latents[torch.from_numpy(rows).to(latents.device)]
    for level, codebook in enumerate(codebooks):
        residuals -= codebook.to(latents.device)[torch.from_numpy(codes[rows, level]).to(latents.device)]
    return residuals.cpu().numpy()


def _least_total(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the one-to-one matching of the smaller side at the least total distance."""
    rows, columns = distances.shape
    if rows * rows < columns:
        # A best matching needs no more than each row's `rows` nearest columns.
        nearest = np.unique(np.argpartition(distances, rows - 1, axis=1)[:, :rows])
        kept, places = linear_sum_assignment(distances[:, nearest])
        return kept, nearest[places]
    return linear_sum_assignment(distances)


def _move_to_open_prefixes(
    latents: torch.Tensor, codes: np.ndarray, codebooks: Sequence[torch.Tensor], overflow: list[int], num_existing: int
) -> None:
    """Gives each row of `overflow` the nearest free code of the nearest prefix with room; in place."""
    last = len(codebooks) - 1
    placed = np.ones(len(codes), dtype=bool)
    placed[overflow] = False
    load = _PrefixLoads(codes[placed])
    taken: dict[tuple[int, ...], set[int]] = {}
    for row in overflow:
        prefix, residual = next(_open_prefixes(latents[row - num_existing].cpu(), (), codebooks, load))
        if prefix not in taken:
            taken[prefix] = set(load.last_codes(prefix).tolist())
        distances = (codebooks[last] - residual).square().sum(1)
        if taken[prefix]:
            distances[list(taken[prefix])] = float("inf")
        code = int(distances.argmin())
        taken[prefix].add(code)
        codes[row] = (*prefix, code)
        load.add(prefix)


class _PrefixLoads:
    """Items under every prefix of every length, so that a full branch is passed over without being searched: found by
    binary search among the sorted codes (N, L), and counted for what is added later."""

    def __init__(self, codes: np.ndarray):
        order = np.lexsort(codes.T[::-1])
        self.columns = [column[order] for column in codes.T]
        self.added: Counter[tuple[int, ...]] = Counter()

    def _range(self, prefix: tuple[int, ...]) -> tuple[int, int]:
        start, end = 0, len(self.columns[0])
        for column, code in zip(self.columns, prefix, strict=False):
            inside = column[start:end]
            start, end = start + np.searchsorted(inside, code), start + np.searchsorted(inside, code, side="right")
        return int(start), int(end)

    def __getitem__(self, prefix: tuple[int, ...]) -> int:
        start, end = self._range(prefix)
        return end - start + self.added[prefix]

    def last_codes(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Last codes of the sorted items under a prefix of all codes but the last."""
        return self.columns[-1][slice(*self._range(prefix))]

    def add(self, prefix: tuple[int, ...]) -> None:
        """One more item under a prefix of all codes but the last."""
        self.added.update(prefix[:depth] for depth in range(len(prefix) + 1))


def _open_prefixes(
    residual: torch.Tensor, prefix: tuple[int, ...], codebooks: Sequence[torch.Tensor], load: _PrefixLoads
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Prefixes with a free last code, each with the residual that is left, nearest code first at every level."""
    depth = len(prefix)
    if load[prefix] >= math.prod(len(codebook) for codebook in codebooks[depth:]):
        return
    if depth == len(codebooks) - 1:
        yield prefix, residual
        return
    for code in (codebooks[depth] - residual).square().sum(1).argsort(stable=True).tolist():
        yield from _open_prefixes(residual - codebooks[depth][code], (*prefix, code), codebooks, load)
