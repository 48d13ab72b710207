"""Several baselines fused into one: the best that they do together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..co_consumption import flatten_histories
from .baselines import Baseline

COMBINATIONS = ("standardised", "softmax")


@dataclass(eq=False)
class Fused(Baseline):
    """Scores every item by the weighted sum of what several baselines say of it.

    What is summed is comparable: by user, a member's scores less their mean and over their standard deviation
    (`standardised`), or the probabilities that its scores make (`softmax`), of whose sum the score is the logarithm.
    Mean, deviation and the softmax's total are of the items that are not in the user's history, for all members alike:
    on what was consumed, members' scores do not mean the same.

    Args:
        members: baselines by name; those that are fitted already are taken as they are. In a recipe a list of names,
            which have the options of `baselines`, or a mapping of names to options of their own.
        weights: of the members' parts, by name; 1 where it has none.
        combination: standardised or softmax.
        temperatures: by name, what a member's scores are divided by before the softmax; 1 where it has none.

    Raises:
        ValueError: no member, a name that is no member's, or a weight or temperature that is out of range.
    """

    members: Mapping[str, Baseline]
    weights: Mapping[str, float] | None = None
    combination: str = "standardised"
    temperatures: Mapping[str, float] | None = None

    def __post_init__(self):
        self.weights, self.temperatures = dict(self.weights or {}), dict(self.temperatures or {})
        if not self.members:
            raise ValueError("members is empty: name the baselines to fuse, such as ease and sasrec")
        if self.combination not in COMBINATIONS:
            raise ValueError(f"combination must be one of {', '.join(COMBINATIONS)}, got {self.combination!r}")
        for option in ("weights", "temperatures"):
            for name, value in getattr(self, option).items():
                if name not in self.members:
                    raise ValueError(f"{option} has {name!r}, which is no member; there are {', '.join(self.members)}")
                if not (value > 0 or value == 0 and option == "weights"):
                    raise ValueError(f"{option} has {name}: {value}, which must be positive")
        if not any(self.weights.get(name, 1.0) for name in self.members):
            raise ValueError("all weights are 0: give one of the members more")

    def require_memory(self, num_items: int) -> None:
        """As `Baseline.require_memory`, of the members that are not fitted yet."""
        for member in self.members.values():
            if not hasattr(member, "num_items"):
                member.require_memory(num_items)

    def fit(self, histories: Sequence[np.ndarray], num_items: int) -> Fused:
        """As `Baseline.fit`, of the members that are not fitted yet."""
        self.require_memory(num_items)
        self.num_items = num_items
        for name, member in self.members.items():
            if not hasattr(member, "num_items"):
                member.fit(histories, num_items)
            elif member.num_items != num_items:
                raise ValueError(f"{name} was fitted on {member.num_items} items, not on {num_items}")
        return self

    @property
    def num_parameters(self) -> int:
        return sum(member.num_parameters for member in self.members.values())

    def score(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        counted = torch.ones(len(histories), self.num_items, dtype=torch.bool)
        rows, items = flatten_histories(histories, self.num_items)
        counted[torch.from_numpy(rows), torch.from_numpy(items)] = False
        counted[~counted.any(dim=1)] = True  # a user who has consumed everything
        parts = []
        for name, member in self.members.items():
            weight = float(self.weights.get(name, 1.0))
            if not weight:
                continue
            scores = member.score(histories)
            if self.combination == "softmax":
                scores = scores / float(self.temperatures.get(name, 1.0))
                parts.append(math.log(weight) + log_probabilities(scores, counted))
            else:
                parts.append(weight * standardised(scores, counted))
        stacked = torch.stack(parts)
        # In logarithms, so that no item's probability is too small to tell it from another.
        return stacked.logsumexp(dim=0) if self.combination == "softmax" else stacked.sum(dim=0)


def standardised(scores: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Each row of (B, N) less the mean and over the standard deviation of its counted entries; 0 where these are all
    alike."""
    number = counted.sum(dim=1, keepdim=True)
    scores = scores - (scores * counted).sum(dim=1, keepdim=True) / number
    deviation = ((scores.square() * counted).sum(dim=1, keepdim=True) / number).sqrt()
    return torch.where(deviation > 0, scores / deviation, 0.0)


def log_probabilities(scores: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The log-softmax of each row of (B, N), whose total is of its counted entries."""
    return scores - scores.masked_fill(~counted, -torch.inf).logsumexp(dim=1, keepdim=True)
