"""Item-level ranking over the full catalogue, and measures of generated sessions.

Everything here counts *items*, never semantic IDs: where several items share an ID, metrics over IDs are inflated.
Catalogue indices are rows of the items table, 0..N-1; -1 means "nothing here".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..co_consumption import flatten_histories
from .bootstrap import bootstrap_interval

COVERAGE_CUTOFF = 10
_SESSIONS_PER_BATCH = 16_384


def rank_items(
    scores: torch.Tensor, excluded: Sequence[np.ndarray] | torch.Tensor | np.ndarray | None, k: int
) -> torch.Tensor:
    """Each user's ranking of the catalogue, (B, k) catalogue indices, best first, filled up with -1.

    Equal scores are ordered by catalogue index, so that the result does not depend on the device or on the batch.

    Args:
        scores: (B, N) compared in float32; -inf is never ranked.
        excluded: items that may not be ranked: B arrays of catalogue indices, a bool mask (B, N), or None.

    Raises:
        ValueError: a score is NaN, or shapes do not fit.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [users, items], got the shape {tuple(scores.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    num_users, num_items = scores.shape
    scores = scores.detach().float()
    nan_rows = torch.isnan(scores).any(dim=1).nonzero()
    if len(nan_rows):
        raise ValueError(f"scores row {int(nan_rows[0])} holds NaN: the model that scored it has diverged")
    forbidden = torch.isneginf(scores)
    if excluded is not None:
        forbidden = forbidden | _exclusion_mask(excluded, num_users, num_items).to(scores.device)

    # A float32's bits, with the order of negative numbers turned round, sort as integers; the index below them
    # breaks ties. Adding zero makes -0.0 equal to 0.0.
    bits = (scores + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (ordered << 31) + torch.arange(num_items - 1, -1, -1, device=scores.device)
    keys.masked_fill_(forbidden, torch.iinfo(torch.int64).min)
    width = min(k, num_items)
    ranked = keys.topk(width, dim=1).indices
    ranked = ranked.masked_fill(forbidden.gather(1, ranked), -1)
    return torch.nn.functional.pad(ranked, (0, k - width), value=-1)


def _exclusion_mask(
    excluded: Sequence[np.ndarray] | torch.Tensor | np.ndarray, num_users: int, num_items: int
) -> torch.Tensor:
    if isinstance(excluded, (torch.Tensor, np.ndarray)) and excluded.ndim == 2:
        mask, shape = torch.as_tensor(excluded), (num_users, num_items)
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(f"an exclusion mask must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
        return mask
    if len(excluded) != num_users:
        raise ValueError(f"{len(excluded)} lists of excluded items for {num_users} users")
    mask = torch.zeros(num_users, num_items, dtype=torch.bool)
    if num_users:
        rows, items = flatten_histories(excluded, num_items)
        mask[torch.from_numpy(rows), torch.from_numpy(items)] = True
    return mask


def user_metrics(
    ranked: np.ndarray, targets: np.ndarray, cutoffs: Sequence[int] = (5, 10, 50)
) -> dict[str, np.ndarray]:
    """For each cutoff c "recall@c" (0 or 1) and "ndcg@c" (1 / log2(1 + rank) of the target) of each user, (B,).

    Args:
        ranked: (B, k) catalogue indices, best first, -1 for nothing.
        targets: (B,) each user's next item, the only relevant one.
        cutoffs: list lengths; k must reach the longest.

    Raises:
        ValueError: no users, shapes that do not fit, or an item ranked twice for a user.
    """
    ranked, targets = np.asarray(ranked), np.asarray(targets)
    if ranked.ndim != 2 or targets.shape != ranked.shape[:1]:
        raise ValueError(f"ranked {ranked.shape} must be [users, k] and targets {targets.shape} [users]")
    if not len(ranked):
        raise ValueError("there is no user to evaluate")
    if ranked.shape[1] < max(cutoffs):
        raise ValueError(
            f"{ranked.shape[1]} ranked items do not reach the cutoff {max(cutoffs)}: rank more, or fill up with -1"
        )
    if (targets < 0).any():
        raise ValueError(f"targets row {int((targets < 0).argmax())} is not a catalogue index")
    ordered = np.sort(ranked, axis=1)
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if repeated.any():
        raise ValueError(f"ranked row {int(repeated.argmax())} ranks an item twice")

    hits = ranked == targets[:, None]
    found = hits.any(axis=1)
    position = hits.argmax(axis=1)
    metrics = {}
    for cutoff in cutoffs:
        hit = found & (position < cutoff)
        metrics[f"recall@{cutoff}"] = hit.astype(np.float64)
        metrics[f"ndcg@{cutoff}"] = np.where(hit, 1.0 / np.log2(position + 2.0), 0.0)
    return metrics


def ranking_metrics(
    ranked: np.ndarray,
    targets: np.ndarray,
    num_items: int,
    cutoffs: Sequence[int] = (5, 10, 50),
    interval_resamples: int = 0,
) -> dict[str, float | list[float]]:
    """Means of [`user_metrics`] over users, and "coverage": the share of the catalogue that is in the top 10 of at
    least one user. It depends on the number of users: compare it only over the same users.

    Args:
        ranked, targets, cutoffs: as for [`user_metrics`].
        num_items: size N of the catalogue.
        interval_resamples: with more than 0, every metric but coverage gets "<metric>_interval", the ends of its
            95% bootstrap interval over users.

    Raises:
        ValueError: as [`user_metrics`], or an index beyond the catalogue.
    """
    by_user = user_metrics(ranked, targets, cutoffs)
    ranked = np.asarray(ranked)
    largest = max(int(ranked.max()), int(np.max(targets)))
    if largest >= num_items:
        raise ValueError(f"catalogue index {largest} is beyond the catalogue's {num_items} items")
    metrics: dict[str, float | list[float]] = {name: float(values.mean()) for name, values in by_user.items()}
    if interval_resamples:
        for name, values in by_user.items():
            metrics[f"{name}_interval"] = list(bootstrap_interval(values, resamples=interval_resamples))
    top = ranked[:, :COVERAGE_CUTOFF]
    metrics["coverage"] = len(np.unique(top[top >= 0])) / num_items
    return metrics


def intra_session_diversity(sessions: np.ndarray | torch.Tensor, item_embeddings: np.ndarray | torch.Tensor) -> float:
    """Mean pairwise cosine distance (0 same direction, 1 orthogonal, 2 opposite) of the items of a session, over the
    sessions with at least two items; NaN where there is none.

    Args:
        sessions: (..., m) catalogue indices, -1 for nothing. An item that repeats counts with distance 0.
        item_embeddings: (N, D).

    Raises:
        ValueError: an embedding of a session's item is zero or not finite.
    """
    sessions = torch.as_tensor(sessions)
    sessions = sessions.reshape(-1, sessions.shape[-1])
    sessions = sessions[(sessions >= 0).sum(dim=1) >= 2]
    if not len(sessions):
        return float("nan")
    embeddings = torch.as_tensor(item_embeddings, device=sessions.device).float()
    norms = embeddings.norm(dim=1)
    used = torch.zeros(len(embeddings), dtype=torch.bool, device=sessions.device)
    used[sessions[sessions >= 0]] = True
    unusable = (used & ~((norms > 0) & norms.isfinite())).nonzero()
    if len(unusable):
        raise ValueError(f"item_embeddings row {int(unusable[0])} is zero or not finite: it has no direction")
    directions = embeddings / norms[:, None].clamp_min(torch.finfo(torch.float32).tiny)

    total = 0.0
    for batch in sessions.split(_SESSIONS_PER_BATCH):
        present = batch >= 0
        vectors = directions[batch.clamp_min(0)] * present[..., None]
        count = present.sum(dim=1)
        # The square of a sum of unit vectors is their number plus twice the sum of the pairs' cosines.
        similarity = (vectors.sum(dim=1).square().sum(dim=1) - count) / (count * (count - 1))
        total += float((1 - similarity).double().sum())
    return total / len(sessions)


def duplicate_rate(sessions: np.ndarray | torch.Tensor) -> float:
    """Share of sessions (..., m) in which an item occurs more than once; 0 where no session has any item."""
    sessions = np.asarray(sessions)
    sessions = sessions.reshape(-1, sessions.shape[-1])
    sessions = sessions[(sessions >= 0).any(axis=1)]
    if not len(sessions):
        return 0.0
    ordered = np.sort(sessions, axis=1)
    return float(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1).mean())


def illegal_rate(generated_codes: np.ndarray | torch.Tensor, legal_codes: np.ndarray | torch.Tensor) -> float:
    """Share of generated items whose code sequence belongs to no item of the catalogue; 0 where there is none.

    Args:
        generated_codes: (..., L) one row for each generated item; a token that is not a code of its level must be
            given as a value that no legal code has, such as -1.
        legal_codes: (N, L) the codes of the catalogue's items; or, as the generated ones, their tokens.

    Raises:
        ValueError: the numbers of levels differ.
    """
    legal = np.asarray(legal_codes)
    generated = np.asarray(generated_codes)
    if legal.ndim != 2 or generated.shape[-1] != legal.shape[1]:
        raise ValueError(f"generated codes {generated.shape} and legal codes {legal.shape} differ in levels")
    generated = generated.reshape(-1, legal.shape[1])
    if not len(generated):
        return 0.0
    row = np.unique(np.concatenate([legal, generated]), axis=0, return_inverse=True)[1].reshape(-1)
    return float(1 - np.isin(row[len(legal) :], row[: len(legal)]).mean())
