"""How good a reward model's estimates are: ranking, group ranking, log-loss and calibration, by objective."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from ..figure_style import ACCENT, INK, MUTED, OTHERS, set_title, styled_axes

CALIBRATION_BINS = 10


def above_median(labels: np.ndarray) -> np.ndarray:
    """Which of S labels count as positive in an AUC: those above the median, so that few of many zeros are any at all
    against none; where the median is the largest label, those that have it."""
    median = np.median(labels)
    return labels > median if labels.max() > median else labels == median


def group_auc(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean of the AUCs within the groups that have both classes, weighted by their sizes; None without any."""
    _, groups = np.unique(groups, return_inverse=True)
    # Ranks within a group, ties shared: all groups at once.
    order = np.lexsort((scores, groups))
    scores, positive, groups = scores[order], positive[order], groups[order]
    opens = np.r_[True, (np.diff(groups) != 0) | (np.diff(scores) != 0)]
    tie = np.cumsum(opens) - 1
    first = np.flatnonzero(opens)
    last = np.r_[first[1:], len(scores)] - 1
    rank = ((first + last) / 2)[tie] - np.flatnonzero(np.diff(groups, prepend=-1))[groups] + 1
    size = np.bincount(groups)
    positives = np.bincount(groups, positive)
    with np.errstate(invalid="ignore", divide="ignore"):
        wins = np.bincount(groups, rank * positive) - positives * (positives + 1) / 2
        auc = wins / (positives * (size - positives))
    both = (positives > 0) & (positives < size)
    return float(np.average(auc[both], weights=size[both])) if both.any() else None


def calibration_bins(estimate: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Mean estimate, mean label and size `(3, bins)` of ten bins of equal size by estimate."""
    bins = np.array_split(np.argsort(estimate, kind="stable"), min(CALIBRATION_BINS, len(label)))
    return np.array([(estimate[rows].mean(), label[rows].mean(), len(rows)) for rows in bins]).T


def objective_metrics(
    probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str], users: np.ndarray | None = None
) -> dict[str, float | int]:
    """Quality of the estimates of each objective over its known labels.

    For each objective the figures of "reward_models" in metrics.json (`reporting.metrics_schema`), the median as in
    [`above_median`]. One that is undefined (no known label, all labels equal) is left out.

    Args:
        probabilities: (S, O) estimates for S sessions.
        labels: (S, O) labels in [0, 1], NaN where unknown.
        names: Names of the O objectives.
        users: (S,) whose session it is, for `x_gauc`.
    """
    metrics: dict[str, float | int] = {}
    for index, objective in enumerate(names):
        known = ~np.isnan(labels[:, index])
        if not known.any():
            continue
        label = labels[known, index].astype(np.float64)
        estimate = probabilities[known, index].astype(np.float64).clip(1e-7, 1 - 1e-7)
        base = float(np.clip(label.mean(), 1e-7, 1 - 1e-7))
        if label.min() < label.max():
            positive = above_median(label)
            metrics[f"{objective}_auc"] = float(roc_auc_score(positive, estimate))
            grouped = None if users is None else group_auc(estimate, positive, users[known])
            if grouped is not None:
                metrics[f"{objective}_gauc"] = grouped
        for name, answer, of in (("log_loss", estimate, label), ("base_log_loss", base, label.mean())):
            metrics[f"{objective}_{name}"] = float(-(of * np.log(answer) + (1 - of) * np.log(1 - answer)).mean())
        estimated, observed, size = calibration_bins(estimate, label)
        metrics[f"{objective}_calibration_error"] = float(np.average(np.abs(estimated - observed), weights=size))
        metrics[f"{objective}_label_mean"] = float(label.mean())
        metrics[f"{objective}_estimate_mean"] = float(estimate.mean())
        metrics[f"{objective}_labels"] = int(known.sum())
    return metrics


def reliability_plot(probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Writes a PNG with a panel for each objective: the mean label against the mean estimate in ten bins of equal
    size, beside the diagonal of perfect calibration, and the calibration error. Arguments as [`objective_metrics`]."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.1 * rows), layout="constrained")
    axes = styled_axes(figure, rows, columns).ravel()
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for index, (axis, objective) in enumerate(zip(axes, names, strict=False)):
        known = ~np.isnan(labels[:, index])
        set_title(axis, objective)
        axis.set_xlabel("estimate", color=MUTED, fontsize=8.5)
        axis.set_ylabel("observed", color=MUTED, fontsize=8.5)
        if not known.any():
            axis.text(0.5, 0.5, "no known label", transform=axis.transAxes, ha="center", color=MUTED)
            continue
        estimated, observed, size = calibration_bins(
            probabilities[known, index].astype(np.float64), labels[known, index].astype(np.float64)
        )
        top = max(estimated.max(), observed.max()) * 1.05 or 1.0
        # Two standard errors of a mean of numbers in [0, 1], at most.
        error = 2 * np.sqrt(observed * (1 - observed) / size)
        axis.plot([0, top], [0, top], color=OTHERS, linewidth=1, zorder=1)
        axis.errorbar(estimated, observed, error, color=ACCENT, marker="o", markersize=3.5, linewidth=1.2, capsize=2)
        axis.set(xlim=(0, top), ylim=(0, max(top, float((observed + error).max()) * 1.02)))
        gap = np.average(np.abs(estimated - observed), weights=size)
        axis.text(0.05, 0.9, f"error {gap:.4f}", transform=axis.transAxes, color=INK, fontsize=8.5)
    figure.savefig(path, format="png", dpi=120)
