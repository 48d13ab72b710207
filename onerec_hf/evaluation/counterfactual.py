"""What the real log says of another policy: self-normalised inverse propensity and doubly robust estimates.

The log shows what the logging policy mu chose, x -> a with propensity mu(a | x), and the feedback r. A target policy
pi would have earned E_mu[w r] with w = pi(a | x) / mu(a | x).

- SNIPS (Swaminathan and Joachims 2015): sum w r / sum w.
- Doubly robust (Dudik et al. 2011), its correction self-normalised: mean of E_(a ~ pi) q(x, a), plus
  sum w (r - q(x, a)) / sum w, with a model q of the feedback: right where the propensities or the model are.

Weights are cut at a limit, which trades variance for a bias towards the logging policy. A log with exposures that
were drawn by known chances tells their propensities (the column `propensity`), and these exposures alone are then
weighed. A production log seldom has any. Propensities are then estimated by the items' smoothed shares of the week of
exposures before, the same for all users: where the logging policy was personal, the weights miss that. A mean weight
far from 1, its value under the true propensities, says so, and the effective sample size, (sum w)^2 / sum w^2, how
much of the log bears on the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ..staged_files import staged_file
from .bootstrap import percentile_interval, resampled_means

SMOOTHING = 1.0
MIN_EFFECTIVE_SAMPLES = 100
MEAN_WEIGHTS = (0.5, 2.0)  # outside of them the propensities are too wrong to weigh by


def exposure_shares(items: np.ndarray, num_items: int, smoothing: float = SMOOTHING) -> np.ndarray:
    """Estimated propensity (N,) of each item: its share of the exposures, each item's count raised by
    `smoothing`, so that no propensity is 0."""
    counts = np.bincount(np.asarray(items), minlength=num_items).astype(np.float64) + smoothing
    return counts / counts.sum()


@dataclass
class PolicyOnLog:
    """A target policy on the logged exposures of U users, up to K each.

    Args:
        log_probs: (U, K) log pi(a | x) of what was shown; NaN where nothing was.
        expected: by objective (U,) E_(a ~ pi) q(x, a).
    """

    log_probs: np.ndarray
    expected: Mapping[str, np.ndarray]

    def save(self, path: Path) -> None:
        """Writes one .safetensors file, whole or not at all."""
        with staged_file(path) as partial:
            save_file({"log_probs": self.log_probs, **self.expected}, partial)

    @classmethod
    def load(cls, path: Path) -> PolicyOnLog:
        expected = load_file(path)
        return cls(expected.pop("log_probs"), expected)


@dataclass
class LoggedFeedback:
    """What U users were shown, up to K exposures each, and what they did about it.

    Args:
        propensities: (U, K), of what was shown; NaN where nothing was.
        labels: by objective (U, K), feedback in [0, 1]; NaN where nothing was shown or the feedback is unknown.
        predicted: by objective (U, K), q(x, a) of what was shown.
        clip: largest weight.
        known_propensities: whether the propensities are those by which the exposures were drawn, and not estimated.
    """

    propensities: np.ndarray
    labels: Mapping[str, np.ndarray]
    predicted: Mapping[str, np.ndarray]
    clip: float
    known_propensities: bool = False

    def weights(self, policy: PolicyOnLog) -> np.ndarray:
        """w (U, K), cut at `clip`; NaN where nothing was shown."""
        return np.minimum(np.exp(policy.log_probs) / self.propensities, self.clip)

    def estimates(self, policy: PolicyOnLog, seed: PolicyOnLog | None = None) -> dict[str, Any]:
        """What the policy would earn by objective, with 95% bootstrap intervals over users.

        Args:
            policy: what is estimated.
            seed: the policy to compare with, on the same log.

        Returns:
            `on_log` of metrics.json (`reporting.metrics_schema`); the differences are there with `seed`.

        Raises:
            ValueError: if no logged item has a probability under the policy.
        """
        weights = self.weights(policy)
        shown = ~np.isnan(self.propensities)
        total, squares = np.nansum(weights), np.nansum(weights**2)
        if not total:
            raise ValueError("The policy gives no logged exposure any probability: there is nothing to estimate from.")
        effective, mean_weight = float(total**2 / squares), float(total / shown.sum())
        result: dict[str, Any] = {
            "exposures": int(shown.sum()),
            "known_propensities": self.known_propensities,
            "effective_sample_size": effective,
            "mean_weight": mean_weight,
            "clipped_share": float((weights[shown] >= self.clip).mean()),
            "conclusive": effective >= MIN_EFFECTIVE_SAMPLES and MEAN_WEIGHTS[0] <= mean_weight <= MEAN_WEIGHTS[1],
            "heads": {},
        }
        for objective, labels in self.labels.items():
            if np.isnan(labels).all():
                continue
            value, draws = self._estimates(objective, policy)
            entry: dict[str, Any] = {"logged": float(np.nanmean(labels))}
            former = None if seed is None else self._estimates(objective, seed)
            for name in value:
                entry[name] = value[name]
                entry[f"{name}_interval"] = list(percentile_interval(draws[name]))
                if former is not None:
                    entry[f"{name}_difference"] = value[name] - former[0][name]
                    entry[f"{name}_difference_interval"] = list(percentile_interval(draws[name] - former[1][name]))
            result["heads"][objective] = entry
        return result

    def _estimates(self, objective: str, policy: PolicyOnLog) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Both estimates, and their resamples (R,)."""
        labels = self.labels[objective]
        known = ~np.isnan(labels)
        weights = np.where(known, self.weights(policy), 0.0)
        labels, predicted = np.where(known, labels, 0.0), np.where(known, self.predicted[objective], 0.0)
        expected = known.sum(1) * np.nan_to_num(policy.expected[objective])
        earned, residual = (weights * labels).sum(1), (weights * (labels - predicted)).sum(1)
        sums = np.column_stack([earned, weights.sum(1), residual, expected, known.sum(1)])

        def estimate(means: np.ndarray) -> dict[str, np.ndarray]:
            earned, weight, residual, expected, count = np.moveaxis(means, -1, 0)
            return {"snips": earned / weight, "doubly_robust": expected / count + residual / weight}

        with np.errstate(divide="ignore", invalid="ignore"):
            value = {name: float(figure) for name, figure in estimate(sums.mean(0)).items()}
            return value, estimate(resampled_means(sums))
