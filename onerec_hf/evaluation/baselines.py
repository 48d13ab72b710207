"""Classical baselines: popularity, item-based nearest neighbours and EASE.

All baselines share one interface: `fit` on histories, `score` the whole catalogue for a history, `rank` under the
same exclusion rule as every other method. A history is an array of catalogue indices in time order, oldest first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg
from tqdm.auto import tqdm

from ..co_consumption import interaction_matrix, item_similarities
from ..free_memory import free_memory
from ..typed_arguments import typed_arguments
from .ranking_metrics import rank_items

RANKING_BYTES = 2**31  # of memory, when a catalogue is so large that a usual batch of users would need more
USERS_AT_ONCE = 512


class CatalogueTooLargeError(ValueError):
    """A baseline would need more memory for its catalogue than is free."""


class Baseline(ABC):
    """A recommender that scores the whole catalogue from a history of catalogue indices."""

    num_items: int

    @abstractmethod
    def fit(self, histories: Sequence[np.ndarray], num_items: int) -> Baseline:
        """Fit on every user's history before the evaluation period, over a catalogue of N items, and return self.

        Raises:
            ValueError: no interactions, an index outside the catalogue, or a catalogue too large for the memory.
        """

    def fitting_bytes(self, num_items: int) -> int:
        """Memory that `fit` needs [bytes], as far as it grows faster than the catalogue."""
        return 0

    def require_memory(self, num_items: int) -> None:
        """Raises CatalogueTooLargeError where a catalogue of N items cannot be fitted in the memory that is free."""
        needed, free = self.fitting_bytes(num_items), free_memory()
        if needed > free:
            raise CatalogueTooLargeError(
                f"{type(self).__name__} needs {needed / 2**30:,.1f} GiB of memory for a catalogue of {num_items:,} "
                f"items, and {free / 2**30:,.1f} GiB are free: leave it out, or fit it on a larger machine"
            )

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Numbers that `fit` has found and `score` reads."""

    @abstractmethod
    def score(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        """Scores of the whole catalogue, higher is better: (B, N)."""

    def rank(
        self, histories: Sequence[np.ndarray], k: int, exclude_consumed: bool = True, batch_size: int | None = None
    ) -> np.ndarray:
        """Each history's ranking of the catalogue, (B, k) catalogue indices, best first, -1 for nothing.

        Args:
            histories: B of them, untruncated.
            exclude_consumed: leave out the items of the history.
            batch_size: users scored at a time; memory is about 30 * batch_size * N bytes. None: 512, or as many as
                take 2 GiB where the catalogue is so large that these are fewer.
        """
        return self.rank_with_scores(histories, k, exclude_consumed, batch_size)[0]

    def rank_with_scores(
        self, histories: Sequence[np.ndarray], k: int, exclude_consumed: bool = True, batch_size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `rank`, and the ranked items' scores, (B, k), -inf where there is no item."""
        ranked = np.full((len(histories), k), -1, dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        if batch_size is None:
            batch_size = max(1, min(USERS_AT_ONCE, RANKING_BYTES // (30 * self.num_items)))
        starts = range(0, len(histories), batch_size)
        for start in tqdm(starts, desc=f"rank by {type(self).__name__}", leave=False):
            batch = histories[start : start + batch_size]
            every = self.score(batch)
            found = rank_items(every, batch if exclude_consumed else None, k).cpu()
            found_scores = every.cpu().gather(1, found.clamp(min=0)).masked_fill(found < 0, -torch.inf)
            ranked[start : start + len(batch)], scores[start : start + len(batch)] = found, found_scores
        return ranked, scores


class Popularity(Baseline):
    """The number of users who consumed an item, the same for everybody."""

    def fit(self, histories: Sequence[np.ndarray], num_items: int) -> Popularity:
        self.num_items = num_items
        self.counts = torch.from_numpy(interaction_matrix(histories, num_items).sum(axis=0)).float()
        return self

    @property
    def num_parameters(self) -> int:
        return len(self.counts)

    def score(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        return self.counts.expand(len(histories), -1)


@typed_arguments
@dataclass(eq=False)
class ItemKNN(Baseline):
    """Item-based nearest neighbours: an item's score is the sum of its [`item_similarities`] to the items of the
    history.

    >>> histories = [np.array([0, 1]), np.array([0, 1, 2]), np.array([2, 3])]
    >>> ItemKNN().fit(histories, num_items=4).rank([np.array([0]), np.array([3])], k=1).tolist()
    [[1], [2]]

    Args:
        neighbours, shrinkage: similarities kept for each item of the history, and what is added to their denominator.
        half_life: number of later items after which an item of the history counts half; None: all count alike.
    """

    neighbours: int = 500
    shrinkage: float = 5.0
    half_life: float | None = 10.0

    def fit(self, histories: Sequence[np.ndarray], num_items: int) -> ItemKNN:
        self.num_items = num_items
        self.similarity = item_similarities(histories, num_items, self.neighbours, self.shrinkage)
        return self

    @property
    def num_parameters(self) -> int:
        return self.similarity.nnz

    def score(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        weights = interaction_matrix(histories, self.num_items, self.half_life)
        return torch.from_numpy((weights @ self.similarity).toarray())


@typed_arguments
@dataclass(eq=False)
class EASE(Baseline):
    """Embarrassingly shallow autoencoder (Steck, 2019): the closed-form ridge regression of each item on all others.

    B = I - P / diag(P) with P = (X^T X + regularization * I)^-1, diagonal 0; scores are X B. Fitting holds two N x N
    float64 matrices (16 N^2 bytes) and takes N^3 operations: half a minute at 10,000 items, out of reach at
    100,000. Where memory is short `fit` raises at once.

    >>> histories = [np.array([0, 1]), np.array([0, 1, 2]), np.array([2, 3])]
    >>> EASE(regularization=1.0).fit(histories, num_items=4).rank([np.array([0]), np.array([3])], k=1).tolist()
    [[1], [2]]

    Args:
        regularization: ridge penalty lambda.
        half_life: number of later items after which an item of the history counts half when scoring; None: all alike.
    """

    regularization: float = 300.0
    half_life: float | None = 10.0

    def fitting_bytes(self, num_items: int) -> int:
        return 16 * num_items**2

    def fit(self, histories: Sequence[np.ndarray], num_items: int) -> EASE:
        if self.regularization <= 0:
            raise ValueError(f"regularization must be positive, got {self.regularization}")
        self.require_memory(num_items)
        self.num_items = num_items
        consumed = interaction_matrix(histories, num_items).astype(np.float64)
        gram = (consumed.T @ consumed).toarray(order="F")
        gram[np.diag_indices(num_items)] += self.regularization
        # The matrix is positive definite: a Cholesky inverse in place needs half the work and memory of a general one.
        factor, failed = linalg.lapack.dpotrf(gram, lower=1, overwrite_a=1)
        if failed:
            raise ValueError(f"EASE's matrix is singular at regularization {self.regularization}: raise it")
        precision, _ = linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
        lower = np.tril(precision, -1)
        diagonal = np.diag(precision).copy()
        del precision, factor, gram
        lower += lower.T
        lower /= -diagonal
        self.weights = torch.from_numpy(np.ascontiguousarray(lower, dtype=np.float32))
        return self

    @property
    def num_parameters(self) -> int:
        return self.num_items * (self.num_items - 1)  # without the diagonal, which is 0

    def score(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(interaction_matrix(histories, self.num_items, self.half_life) @ self.weights.numpy())
