"""Residual K-means (OneRec section 3.1): the codebook of a level is the centroids of that level's residuals.

With balanced K-means (Algorithm 1) every centroid stands for equally many items; plain K-means is the usual one.
"""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans, Residuals, nearest_centroid
from onerec_hf.semantic_ids.quantizer import Quantizer
from onerec_hf.typed_arguments import typed_arguments

CODE_ASSIGNMENTS = ("nearest", "balanced")
# Of a larger catalogue the K-means is fitted on a sample: of this many items, or of so many for each code if that is
# more.
FITTED_ITEMS = 2**18
FITTED_ITEMS_PER_CODE = 64


@typed_arguments
class ResidualQuantizer(Quantizer):
    """Residual K-means with L codebooks; the quantizer types "balanced_rkmeans" and "rkmeans".

    Args:
        assignment: of the K-means, see [`BalancedKMeans`]: "transport" and "greedy" are balanced, "nearest" is plain
            K-means.
        code_assignment: "nearest": an item's code is the nearest centroid, as in the paper; items that come later are
            encoded the same way, but the codes in use are less even than the clusters.
            "balanced": an item's code is its balanced cluster, so that every code of a level has equally many items.
        max_iterations: of the K-means of each level; level l uses seed + l.
        fitted_items: how many items, drawn by seed, the K-means of each level is fitted on; all of them get codes, and
            with balanced codes every code of a level still has as many items as any other, or one more. By default all
            of a catalogue of up to 2**18 items, of a larger one 64 for each code of the level, and at least 2**18.

    Codes are given in blocks of items, with residuals computed again for each: float32 embeddings that are mapped from
    a file, such as `numpy.load(path, mmap_mode="r")`, are never held whole.

    The other arguments are those of [`Quantizer`].
    """

    setting_names = (*Quantizer.setting_names, "assignment", "code_assignment", "max_iterations", "fitted_items")

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        assignment: str = "transport",
        code_assignment: str = "nearest",
        max_iterations: int = 50,
        fitted_items: int | None = None,
        **settings,
    ):
        super().__init__(codebook_sizes, **settings)
        if code_assignment not in CODE_ASSIGNMENTS:
            raise ValueError(f"code_assignment must be one of {', '.join(CODE_ASSIGNMENTS)}, got {code_assignment!r}")
        if code_assignment == "balanced" and assignment == "nearest":
            raise ValueError(
                "code_assignment 'balanced' needs a balanced assignment ('transport' or 'greedy'), not plain K-means"
            )
        if fitted_items is not None and fitted_items < max(self.codebook_sizes):
            raise ValueError(
                f"fitted_items must be at least the largest of codebook_sizes, {max(self.codebook_sizes)}, got "
                f"{fitted_items}"
            )
        self.assignment, self.code_assignment, self.max_iterations = assignment, code_assignment, max_iterations
        self.fitted_items = fitted_items

    @property
    def quantizer_type(self) -> str:
        return "rkmeans" if self.assignment == "nearest" else "balanced_rkmeans"

    @classmethod
    def from_codebooks(cls, codebooks: Sequence[torch.Tensor], **settings) -> "ResidualQuantizer":
        """Quantizer with frozen codebooks, to encode new items."""
        quantizer = cls([len(codebook) for codebook in codebooks], **settings)
        quantizer.codebooks = [torch.as_tensor(codebook, dtype=torch.float32) for codebook in codebooks]
        quantizer.embedding_dim = quantizer.codebooks[0].shape[1]
        return quantizer

    def _fit_codebooks(self, x: torch.Tensor) -> torch.Tensor:
        self.codebooks, codes = [], []
        levels = tqdm(self.codebook_sizes, desc="quantization levels", disable=not self.show_progress)
        for level, size in enumerate(levels):
            residuals = Residuals(x, self.codebooks, codes)
            seed, fitted = self.seed + level, self._num_fitted(len(x), size)
            kmeans = BalancedKMeans(
                size, self.assignment, self.max_iterations, seed=seed, show_progress=self.show_progress
            )
            if fitted < len(x):
                drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:fitted]
                kmeans.fit(residuals[drawn.sort().values.to(x.device)])
            else:
                kmeans.fit(residuals[:])
            if self.code_assignment == "nearest":
                codes.append(nearest_centroid(residuals, kmeans.centroids))
            else:
                codes.append(kmeans.labels if fitted == len(x) else kmeans.assign(residuals))
            self.codebooks.append(kmeans.centroids)
        return torch.stack(codes, dim=1)

    def _num_fitted(self, num_items: int, codebook_size: int) -> int:
        asked = self.fitted_items or max(FITTED_ITEMS, FITTED_ITEMS_PER_CODE * codebook_size)
        return min(num_items, asked)

    def _fit_report(self, num_items: int) -> dict[str, int]:
        return {"fitted_items": self._num_fitted(num_items, max(self.codebook_sizes))}

    @property
    def codes_are_nearest(self) -> bool:
        return self.code_assignment == "nearest"
