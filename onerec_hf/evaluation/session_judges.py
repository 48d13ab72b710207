"""Judges of generated sessions, side by side: reward models and, where the feed is simulated, its truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..data import SessionSimulator
from ..reward import SessionScorer

REWARD = "reward"


def judge_by_model(
    scorer: SessionScorer, rows: Sequence[Mapping[str, Any]], sessions: torch.LongTensor
) -> dict[str, np.ndarray]:
    """A reward model's estimates of the sessions (B, C, m) of B rows: "reward" and each objective, (B, C)."""
    scores = scorer.score(rows, sessions)
    values = {name: scores.probabilities[..., index] for index, name in enumerate(scorer.objectives)}
    return {name: value.double().numpy() for name, value in {REWARD: scores.reward, **values}.items()}


def judge_by_truth(
    world: SessionSimulator,
    scorer: SessionScorer,
    item_ids: np.ndarray,
    user_ids: np.ndarray,
    sessions: torch.LongTensor,
) -> dict[str, np.ndarray]:
    """The simulated world's own expectations: each of the scorer's objectives that it has, (B, C), NaN for a session
    that is not whole; and "reward", the scorer's scalar of them, where it has all that the scalar counts.
    """
    known = (sessions >= 0).all(-1).numpy()
    # The world answers for whole sessions alone; a row without one is blanked below.
    asked = np.where(known[..., None], sessions.numpy(), sessions[:, :1].numpy())
    found = world.expected_feedback(user_ids, np.where(asked >= 0, item_ids[asked], -1))
    truth = {name: np.where(known, found[name], np.nan) for name in scorer.objectives if name in found}
    reward = scalar_of(scorer, truth)
    if reward is not None:
        truth = {REWARD: reward, **truth}
    return truth


def scalar_of(scorer: SessionScorer, values: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The scorer's scalar of objectives' values, arrays of one shape: NaN where one that it counts is NaN, and None
    where one that it counts is not among them."""
    count = len(scorer.objectives)
    # The scalar is affine: an objective counts if a step along it changes the result.
    steps = scorer.scalar(torch.eye(count)) - scorer.scalar(torch.zeros(count))
    counted = [name for name, step in zip(scorer.objectives, steps.tolist(), strict=True) if step]
    if not counted or not set(counted) <= set(values):
        return None
    unknown = np.any([np.isnan(values[name]) for name in counted], axis=0)
    known = [np.nan_to_num(values[name]) if name in values else np.zeros(unknown.shape) for name in scorer.objectives]
    return np.where(unknown, np.nan, scorer.scalar(torch.from_numpy(np.stack(known, -1))).numpy())


def mean_and_max(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<name>_mean` and `<name>_max` of arrays (B, C) over a user's sessions, each (B,); NaN for users without any."""
    result = {}
    for name, array in values.items():
        known = ~np.isnan(array)
        count = known.sum(axis=1)
        with np.errstate(invalid="ignore"):
            result[f"{name}_mean"] = np.where(known, array, 0.0).sum(axis=1) / count
        best = np.where(known, array, -np.inf).max(axis=1, initial=-np.inf)
        result[f"{name}_max"] = np.where(count > 0, best, np.nan)
    return result
