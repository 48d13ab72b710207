"""When semantic IDs should be fitted again, judged by the items that were added and removed since."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# See `refit_reasons`.
REFIT_ERROR_RATIO = 1.5
REFIT_DISPLACED_SHARE = 0.2
REFIT_PERPLEXITY_RATIO = 0.8
REFIT_MIN_ITEMS = 100


def displaced_items(
    quantizer, nearest: np.ndarray, placed: np.ndarray, index_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Whether new items found the ID of their nearest codes taken, bool (M,).

    Args:
        quantizer: the one that placed them.
        nearest: (M, quantized levels) nearest codes.
        placed: (M, L) codes that they were given.
        index_of: catalogue indices of codes before they were added, -1 where no item has them.
    """
    if placed.shape[1] > nearest.shape[1]:
        return placed[:, -1] > 0
    if quantizer.collision_policy == "share":
        return index_of(nearest) >= 0
    return (placed != nearest).any(1)


def added_items(report: Mapping[str, Any], errors, displaced: np.ndarray) -> dict[str, float]:
    """`report["added_items"]` after M more items: their number, mean `quantization_error` and share `displaced`.

    Args:
        errors: (M,) squared error of the nearest codes.
        displaced: (M,) of [`displaced_items`].
    """
    before = report.get("added_items", {"items": 0, "quantization_error": 0.0, "displaced": 0.0})
    total = before["items"] + len(displaced)
    sums = {"quantization_error": float(errors.sum()), "displaced": float(displaced.sum())}
    return {"items": total} | {name: (before[name] * before["items"] + new) / total for name, new in sums.items()}


def refit_reasons(report: Mapping[str, Any], codes: np.ndarray, quantizer=None) -> list[str]:
    """Why the semantic IDs should be fitted again; empty if they need not be.

    A refit is due when, of at least 100 added items, the mean squared error of their nearest codes is over 1.5 times
    the fitted items', or the share that found its ID taken exceeds the fitted items' by over 0.2; or when the codes of
    a quantized level have less than 0.8 times the perplexity they were fitted with.

    Args:
        report: quality report of the fitted IDs, with [`added_items`] if there are any.
        codes: (N, quantized levels) of the items that may be generated.
        quantizer: knows the fitted items' error; without one the codes' perplexity alone is judged.
    """
    reasons = []
    added = report.get("added_items", {"items": 0})
    if quantizer is not None and added["items"] >= REFIT_MIN_ITEMS:
        error, fitted_error = added["quantization_error"], quantizer.fitted_error
        if fitted_error is not None and error > REFIT_ERROR_RATIO * fitted_error:
            reasons.append(
                f"the {added['items']} added items have a quantization error of {error:.3g}, the fitted ones "
                f"{fitted_error:.3g}"
            )
        fitted_share = report.get("collision_rate_before_policy", 0.0)
        if added["displaced"] > fitted_share + REFIT_DISPLACED_SHARE:
            reasons.append(
                f"{added['displaced']:.0%} of the added items found their ID taken, {fitted_share:.0%} of the fitted "
                "ones"
            )
    for level, (column, fitted) in enumerate(zip(codes.T, report.get("levels", []), strict=False)):
        counts = np.bincount(column)
        shares = counts[counts > 0] / counts.sum()
        perplexity = float(np.exp2(-(shares * np.log2(shares)).sum()))
        if perplexity < REFIT_PERPLEXITY_RATIO * fitted["perplexity"]:
            reasons.append(
                f"the codes of level {level} have a perplexity of {perplexity:.1f}, {fitted['perplexity']:.1f} when "
                "fitted"
            )
    return reasons
