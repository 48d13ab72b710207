"""Residual K-means (OneRec section 3.1): the codebook of a level is the centroids of that level's residuals.

With balanced K-means (Algorithm 1) every centroid stands for equally many items; plain K-means is the usual one.
"""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans, nearest_centroid
from onerec_hf.semantic_ids.quantizer import Quantizer
from onerec_hf.typed_arguments import typed_arguments

CODE_ASSIGNMENTS = ("nearest", "balanced")


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

    The other arguments are those of [`Quantizer`].
    """

    setting_names = (*Quantizer.setting_names, "assignment", "code_assignment", "max_iterations")

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        assignment: str = "transport",
        code_assignment: str = "nearest",
        max_iterations: int = 50,
        **settings,
    ):
        super().__init__(codebook_sizes, **settings)
        if code_assignment not in CODE_ASSIGNMENTS:
            raise ValueError(f"code_assignment must be one of {', '.join(CODE_ASSIGNMENTS)}, got {code_assignment!r}")
        if code_assignment == "balanced" and assignment == "nearest":
            raise ValueError(
                "code_assignment 'balanced' needs a balanced assignment ('transport' or 'greedy'), not plain K-means"
            )
        self.assignment, self.code_assignment, self.max_iterations = assignment, code_assignment, max_iterations

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
            kmeans = BalancedKMeans(
                size, self.assignment, self.max_iterations, seed=self.seed + level, show_progress=self.show_progress
            ).fit(x)
            balanced = self.code_assignment == "balanced"
            codes.append(kmeans.labels if balanced else nearest_centroid(x, kmeans.centroids))
            self.codebooks.append(kmeans.centroids)
            x = x - kmeans.centroids[codes[-1]]
        return torch.stack(codes, dim=1)
