"""One policy's results by user, their summary, and the change from another policy on the same users."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..staged_files import staged_file
from .bootstrap import bootstrap_interval, coverage_change, relative_change

TOP_ITEMS = "top_items"
# Of rates that may be 0 a relative change says nothing.
CHANGES = ("recall@10", "ndcg@10", "recall@50", "popular_item_share")


@dataclass
class PolicyResults:
    """A policy's figures, those that are means over users still by user.

    Args:
        facts: figures that are not means over users, such as the illegal rate; JSON.
        by_user: (B,) each, B the users that it was measured on: `recall@10` and other figures of the ranking,
            `kl_to_seed` [nats], `popular_item_share`, and `<judge>/<objective>_mean` and `<judge>/<objective>_max`.
        top_items: (B, k) the ranked items that coverage counts, -1 for nothing.
        num_items: size of the catalogue.
    """

    facts: dict[str, Any]
    by_user: dict[str, np.ndarray]
    top_items: np.ndarray
    num_items: int

    def save(self, path: Path) -> None:
        """Writes one .safetensors file, whole or not at all."""
        arrays = {name: np.ascontiguousarray(values, dtype=np.float64) for name, values in self.by_user.items()}
        about = {"facts": json.dumps(self.facts), "num_items": str(self.num_items)}
        with staged_file(path) as partial:
            save_file({**arrays, TOP_ITEMS: np.ascontiguousarray(self.top_items)}, partial, metadata=about)

    @classmethod
    def load(cls, path: Path) -> PolicyResults:
        with safe_open(path, framework="numpy") as file:
            about, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(json.loads(about["facts"]), arrays, arrays.pop(TOP_ITEMS), int(about["num_items"]))

    def summary(self, before: PolicyResults | None = None) -> dict[str, Any]:
        """Means over users, each with its 95% bootstrap interval.

        Args:
            before: the same users' results under another policy, such as the seed model.

        Returns:
            A round of "alignment" in metrics.json (`reporting.metrics_schema`); with `before` also its `change`.
        """
        result: dict[str, Any] = defined_figures(self.facts)
        judges: dict[str, dict[str, Any]] = {}
        for name, values in self.by_user.items():
            judge, _, figure = name.rpartition("/")
            target = judges.setdefault(judge, {}) if judge else result
            if not np.isnan(values).all():
                target[figure] = float(np.nanmean(values))
                target[f"{figure}_interval"] = list(bootstrap_interval(values))
        result["coverage"] = len(np.unique(self.top_items[self.top_items >= 0])) / self.num_items
        result["judges"] = judges
        if before is not None:
            result["change"] = self._change(before)
        return result

    def _change(self, before: PolicyResults) -> dict[str, Any]:
        change: dict[str, Any] = {"judges": {}}
        for name, values in self.by_user.items():
            judge, _, figure = name.rpartition("/")
            if name not in before.by_user or not (judge or figure in CHANGES):
                continue
            relative, interval = relative_change(before.by_user[name], values)
            if np.isfinite(relative):
                target = change["judges"].setdefault(judge, {}) if judge else change
                target[figure] = {"relative": relative, "interval": list(interval)}
        relative, interval = coverage_change(before.top_items, self.top_items)
        change["coverage"] = {"relative": relative, "interval": list(interval)}
        return change


def defined_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are NaN: JSON has no such number, and who reads figures takes a missing one as unmeasured."""
    return {name: value for name, value in figures.items() if not (isinstance(value, float) and np.isnan(value))}


def last_kept(alignment: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The round of metrics.json's "alignment" that the run ends in: the last one that was not dropped."""
    return [entry for entry in alignment if entry.get("kept", True)][-1]


def popular_items(histories_items: np.ndarray, num_items: int, share: float = 0.01) -> np.ndarray:
    """Whether an item is among the most consumed `share` of the catalogue, (items,); at least one item is, and ties go
    to the lower index.

    Args:
        histories_items: catalogue indices of all consumed items of the fitted period.
    """
    counts = np.bincount(histories_items, minlength=num_items)
    popular = np.zeros(num_items, dtype=bool)
    popular[np.argsort(-counts, kind="stable")[: max(1, round(share * num_items))]] = True
    return popular


def popular_item_share(sessions: np.ndarray, popular: np.ndarray) -> np.ndarray:
    """Share of popular items among each user's generated items, (users,); NaN for a user without any.

    Args:
        sessions: (users, ...) catalogue indices, -1 for nothing.
        popular: (items,) of [`popular_items`].
    """
    flat = np.asarray(sessions).reshape(len(sessions), -1)
    present = flat >= 0
    with np.errstate(invalid="ignore"):
        return (popular[np.where(present, flat, 0)] & present).sum(1) / present.sum(1)
