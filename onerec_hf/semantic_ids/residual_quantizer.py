"""Semantic IDs by residual quantization (OneRec section 3.1).

r^1 = e; s^l = argmin_k ||r^l - c_k^l||^2; r^(l+1) = r^l - c^l_(s^l). The codebook of each level is the centroids of a
balanced K-means of that level's residuals. The paper says nothing of collisions (items with equal codes): here they
are counted, reported and handled by a policy.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from tqdm.auto import tqdm

from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans, as_points, nearest_centroid

COLLISION_POLICIES = ("nearest_free", "suffix", "share", "error")
CODE_ASSIGNMENTS = ("nearest", "balanced")


@dataclass
class SemanticIds:
    """Codes of N items: codes int64 array [N, L], codebooks [K_l, d] of the quantized levels, K_l of all L levels."""

    codes: np.ndarray
    codebooks: list[torch.Tensor]
    codebook_sizes: tuple[int, ...]
    report: dict


class ResidualQuantizer:
    """Fits L codebooks on item embeddings and gives every item L codes.

    Args:
        codebook_sizes: K_l, one per level; the paper has 3 levels of 8192.
        assignment: of the balanced K-means, see [`BalancedKMeans`].
        code_assignment: "nearest": an item's code is the nearest centroid, as in the paper; items that come later are
            encoded the same way, but the codes in use are less even than the clusters.
            "balanced": an item's code is its balanced cluster, so that every code of a level has equally many items.
        collision_policy: what happens to items with equal codes.
            "nearest_free": where items that share a prefix (all codes but the last) collide, the prefix's last codes
            are matched to its items one to one at the least total distance; items for which a prefix has no code left
            go to the next-nearest prefix with room.
            "suffix": one more level is added, which counts the items with equal codes. "share": they keep the same
            ID. "error": ValueError. All but "share" make item and ID one to one.
        max_iterations, seed: of the K-means of each level; level l uses seed + l.
    """

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        assignment: str = "transport",
        code_assignment: str = "nearest",
        collision_policy: str = "nearest_free",
        max_iterations: int = 50,
        seed: int = 0,
        device: str | torch.device = "cpu",
        show_progress: bool = False,
    ):
        if not codebook_sizes or min(codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes must be positive integers, got {list(codebook_sizes)}")
        if code_assignment not in CODE_ASSIGNMENTS:
            raise ValueError(f"code_assignment must be one of {', '.join(CODE_ASSIGNMENTS)}, got {code_assignment!r}")
        if collision_policy not in COLLISION_POLICIES:
            raise ValueError(
                f"collision_policy must be one of {', '.join(COLLISION_POLICIES)}, got {collision_policy!r}"
            )
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.assignment = assignment
        self.code_assignment = code_assignment
        self.collision_policy = collision_policy
        self.max_iterations = max_iterations
        self.seed = seed
        self.device = device
        self.show_progress = show_progress
        self.codebooks: list[torch.Tensor] = []

    @classmethod
    def from_codebooks(cls, codebooks: Sequence[torch.Tensor]) -> "ResidualQuantizer":
        """Quantizer with frozen codebooks, to encode new items."""
        quantizer = cls([len(codebook) for codebook in codebooks])
        quantizer.codebooks = [torch.as_tensor(codebook, dtype=torch.float32) for codebook in codebooks]
        return quantizer

    def fit(self, embeddings) -> SemanticIds:
        """Codebooks and codes of item embeddings [N, d] (array or tensor), row = catalogue index.

        Raises:
            ValueError: NaN in a row, all rows equal, a codebook larger than the catalogue, fewer IDs than items, or a
                collision under the policy "error".
        """
        x = as_points(embeddings, device=self.device)
        largest = max(self.codebook_sizes)
        if largest > len(x):
            raise ValueError(
                f"codebook_sizes {list(self.codebook_sizes)}: {largest} codes for a catalogue of {len(x)} items; "
                f"choose at most {len(x)} codes per level"
            )
        if (x == x[0]).all():
            raise ValueError(
                f"all {len(x)} embeddings are equal: there is nothing to quantize. Check the source of the embeddings"
            )
        one_to_one = self.collision_policy in ("nearest_free", "error")
        if one_to_one and np.prod([float(size) for size in self.codebook_sizes]) < len(x):
            raise ValueError(
                f"codebook_sizes {list(self.codebook_sizes)} give fewer IDs than there are items ({len(x)}); "
                "choose larger codebooks or more levels"
            )
        residual, codebooks, codes = x, [], []
        levels = tqdm(self.codebook_sizes, desc="quantization levels", disable=not self.show_progress)
        for level, size in enumerate(levels):
            kmeans = BalancedKMeans(
                size, self.assignment, self.max_iterations, seed=self.seed + level, show_progress=self.show_progress
            ).fit(residual)
            labels = (
                kmeans.labels if self.code_assignment == "balanced" else nearest_centroid(residual, kmeans.centroids)
            )
            codebooks.append(kmeans.centroids)
            codes.append(labels)
            residual = residual - kmeans.centroids[labels]
        self.codebooks = [codebook.cpu() for codebook in codebooks]
        initial = torch.stack(codes, dim=1).cpu().numpy()
        x = x.cpu()

        final, sizes = initial, self.codebook_sizes
        if self.collision_policy == "error":
            _raise_on_collision(initial)
        elif self.collision_policy == "suffix":
            suffix = _rank_among_equals(initial)
            final = np.concatenate([initial, suffix[:, None]], axis=1)
            sizes = (*sizes, int(suffix.max()) + 1)
        elif self.collision_policy == "nearest_free":
            final = self._move_to_free_codes(x, initial)
        report = {
            "assignment": self.assignment,
            "code_assignment": self.code_assignment,
            "collision_policy": self.collision_policy,
            **quantization_report(x, final, self.codebooks, sizes),
            "collision_rate_before_policy": _collisions(initial)[0],
            "max_items_per_id_before_policy": _collisions(initial)[1],
            "moved_items": int((final[:, : initial.shape[1]] != initial).any(1).sum()),
        }
        return SemanticIds(final, self.codebooks, sizes, report)

    def encode(self, embeddings) -> np.ndarray:
        """Codes [N, L] of embeddings by the nearest centroids of the codebooks; collisions are left as they are."""
        self._require_codebooks()
        residual = as_points(embeddings)
        if residual.shape[1] != self.codebooks[0].shape[1]:
            raise ValueError(
                f"embeddings have {residual.shape[1]} dimensions, the codebooks {self.codebooks[0].shape[1]}"
            )
        codes = []
        for codebook in self.codebooks:
            codes.append(nearest_centroid(residual, codebook))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=1).numpy()

    def decode(self, codes) -> torch.Tensor:
        """Embeddings [N, d] that codes [N, L] stand for: the sum of the centroids."""
        self._require_codebooks()
        return _reconstruct(np.asarray(codes), self.codebooks)

    def _require_codebooks(self) -> None:
        if not self.codebooks:
            raise ValueError(
                "this ResidualQuantizer has no codebooks yet; call fit(embeddings) or from_codebooks(...)"
            )

    def _move_to_free_codes(self, x: torch.Tensor, codes: np.ndarray) -> np.ndarray:
        codes = codes.copy()
        last = len(self.codebook_sizes) - 1
        last_residual = x - _reconstruct(codes[:, :last], self.codebooks[:last]) if last else x
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for item, prefix in enumerate(map(tuple, codes[:, :last].tolist())):
            groups[prefix].append(item)

        overflow: list[int] = []
        taken: dict[tuple[int, ...], set[int]] = {}
        for prefix, items in groups.items():
            if len(np.unique(codes[items, last])) < len(items):
                distances = torch.cdist(last_residual[items], self.codebooks[last]).square().numpy()
                kept, new_codes = linear_sum_assignment(distances)
                codes[np.asarray(items)[kept], last] = new_codes
                left_out = set(range(len(items))) - set(kept.tolist())
                overflow.extend(items[i] for i in sorted(left_out))
                items = [items[i] for i in kept]
            taken[prefix] = set(codes[items, last].tolist())

        if overflow:
            # Items under every prefix of every length, so that a full branch is passed over without being searched.
            load: dict[tuple[int, ...], int] = defaultdict(int)
            for prefix, used in taken.items():
                for depth in range(last + 1):
                    load[prefix[:depth]] += len(used)
            for item in overflow:
                prefix, residual = next(self._open_prefixes(x[item], (), load))
                distances = (self.codebooks[last] - residual).square().sum(1)
                used = taken.setdefault(prefix, set())
                if used:
                    distances[list(used)] = float("inf")
                code = int(distances.argmin())
                used.add(code)
                codes[item] = (*prefix, code)
                for depth in range(last + 1):
                    load[prefix[:depth]] += 1
        return codes

    def _open_prefixes(
        self, residual: torch.Tensor, prefix: tuple[int, ...], load: dict
    ) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Prefixes with a free last code, each with the residual that is left, nearest code first at every level."""
        depth = len(prefix)
        room = int(np.prod(self.codebook_sizes[depth:], dtype=object))
        if load.get(prefix, 0) >= room:
            return
        if depth == len(self.codebook_sizes) - 1:
            yield prefix, residual
            return
        codebook = self.codebooks[depth]
        for code in (codebook - residual).square().sum(1).argsort(stable=True).tolist():
            yield from self._open_prefixes(residual - codebook[code], (*prefix, code), load)


def _reconstruct(codes: np.ndarray, codebooks: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(codebook[torch.from_numpy(codes[:, level])] for level, codebook in enumerate(codebooks))


def _collisions(codes: np.ndarray) -> tuple[float, int]:
    """Share of the items whose ID is not theirs alone, and the largest number of items with one ID."""
    _, counts = np.unique(codes, axis=0, return_counts=True)
    return float(counts[counts > 1].sum() / len(codes)), int(counts.max())


def _rank_among_equals(codes: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each set of rows with equal codes, in catalogue order."""
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    ranks = np.empty(len(codes), dtype=np.int64)
    ranks[order] = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def _raise_on_collision(codes: np.ndarray) -> None:
    ranks = _rank_among_equals(codes)
    if ranks.max() > 0:
        second = int(np.flatnonzero(ranks)[0])
        first = int(np.flatnonzero((codes == codes[second]).all(1))[0])
        raise ValueError(
            f"items of rows {first} and {second} have the same codes {tuple(codes[second].tolist())}, and "
            f"{int((ranks > 0).sum())} items in all collide; choose larger codebooks, more levels, or another "
            f"collision_policy than 'error': {', '.join(COLLISION_POLICIES[:3])}"
        )


def quantization_report(
    embeddings, codes: np.ndarray, codebooks: Sequence[torch.Tensor], codebook_sizes: Sequence[int]
) -> dict:
    """JSON-able quality report of codes [N, L] for embeddings [N, d].

    Per level: codes (K_l), used, use (used / K_l), entropy_bits and perplexity (2 ** entropy) of the code frequencies,
    min_size and max_size (items per code), and for quantized levels reconstruction_error: the squared error that is
    left after this level, as a share of the embeddings' variance. Over all levels: num_items, reconstruction_error,
    collision_rate (share of the items whose ID is not theirs alone) and max_items_per_id.
    """
    x = as_points(embeddings)
    codes = np.asarray(codes)
    variance = float((x - x.mean(0)).square().sum(dtype=torch.float64))
    levels = []
    for level, size in enumerate(codebook_sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        shares = counts[counts > 0] / len(codes)
        entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
        summary = {
            "codes": int(size),
            "used": int((counts > 0).sum()),
            "use": float((counts > 0).mean()),
            "entropy_bits": entropy,
            "perplexity": 2.0**entropy,
            "min_size": int(counts.min()),
            "max_size": int(counts.max()),
        }
        if level < len(codebooks):
            error = x - _reconstruct(codes, codebooks[: level + 1])
            summary["reconstruction_error"] = float(error.square().sum(dtype=torch.float64)) / variance
        levels.append(summary)
    collision_rate, max_items_per_id = _collisions(codes)
    return {
        "num_items": len(codes),
        "codebook_sizes": [int(size) for size in codebook_sizes],
        "levels": levels,
        "reconstruction_error": levels[len(codebooks) - 1]["reconstruction_error"],
        "collision_rate": collision_rate,
        "max_items_per_id": max_items_per_id,
    }
