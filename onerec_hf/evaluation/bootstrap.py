"""Percentile bootstrap over users: intervals of means, of ratios of means and of changes on the same users.

Whatever is compared is resampled by the same draws of users, so that a change between two policies is paired.
"""

from __future__ import annotations

import numpy as np

CONFIDENCE, RESAMPLES = 0.95, 1000
_DRAWS_AT_ONCE = 4_000_000


def resampled_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means (R, ...) over R resamples of the users, drawn with replacement; NaN where a resample holds no value.

    Args:
        values: (B, ...) a user's values in each row; NaN is left out of its mean.
        seed: the same seed draws the same users for all arrays of B rows.

    Raises:
        ValueError: there is no user.
    """
    values = np.asarray(values, dtype=np.float64)
    if not values.ndim or not len(values):
        raise ValueError(f"a bootstrap needs one row a user, got the shape {values.shape}")
    flat = values.reshape(len(values), -1)
    known = ~np.isnan(flat)
    present = np.where(known, flat, 0.0)
    generator, num_users, means = np.random.default_rng(seed), len(values), []
    rows = max(1, _DRAWS_AT_ONCE // num_users)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = generator.integers(num_users, size=(size, num_users)) + np.arange(size)[:, None] * num_users
        counts = np.bincount(drawn.ravel(), minlength=size * num_users).reshape(size, num_users).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((counts @ present) / (counts @ known))
    return np.concatenate(means).reshape(resamples, *values.shape[1:])


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """The ends of the middle 95% of resampled figures (R,)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_interval(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean.

    Args:
        values: (B,) one value a user; NaN is left out.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).all():
        raise ValueError(f"a bootstrap needs one value a user, got the shape {values.shape}")
    return percentile_interval(resampled_means(values, resamples, seed))


def relative_change(
    before: np.ndarray, after: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """mean(after) / mean(before) - 1 and its paired 95% bootstrap interval; NaN throughout where the mean before is 0.

    Args:
        before, after: (B,) the same users' values under two policies; NaN is left out.

    Raises:
        ValueError: the numbers of users differ, or there is none.
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"a paired change needs the same users twice, got {before.shape} and {after.shape}")
    if not np.nanmean(before):
        return float("nan"), (float("nan"), float("nan"))
    draws = resampled_means(np.column_stack([before, after]), resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = draws[:, 1] / draws[:, 0] - 1
    return float(np.nanmean(after) / np.nanmean(before) - 1), percentile_interval(ratios[np.isfinite(ratios)])


def coverage_change(
    before: np.ndarray, after: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Relative change of the number of different items that all users' lists hold, and its paired interval.

    A resample has fewer different users and so fewer items than the whole, of lists that differ from user to user more
    than of others: the resamples give the interval its width, the change of all users its place.

    Args:
        before, after: (B, k) catalogue indices by user, -1 for nothing.

    Raises:
        ValueError: the numbers of users differ, or there is none, or nothing was ranked before.
    """
    before, after = np.asarray(before), np.asarray(after)
    if len(before) != len(after) or not len(before):
        raise ValueError(f"a paired change needs the same users twice, got {len(before)} and {len(after)}")
    num_items = int(max(before.max(), after.max())) + 1

    def covered(lists: np.ndarray, users: np.ndarray | slice) -> int:
        seen = np.zeros(num_items + 1, dtype=bool)  # the last place takes the -1
        seen[lists[users]] = True
        return int(seen[:-1].sum())

    everyone = slice(None)
    if not covered(before, everyone):
        raise ValueError("nothing was ranked before: there is no coverage to compare with")
    generator = np.random.default_rng(seed)
    draws = [generator.integers(len(before), size=len(before)) for _ in range(resamples)]
    ratios = np.array([covered(after, users) / covered(before, users) - 1 for users in draws])
    change = covered(after, everyone) / covered(before, everyone) - 1
    return change, percentile_interval(ratios - ratios.mean() + change)
