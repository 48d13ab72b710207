"""Sessions of methods that rank single items, so that they are judged beside a generator of sessions."""

from __future__ import annotations

import functools
import math

import numpy as np


def sessions_of_ranking(
    items: np.ndarray, scores: np.ndarray, num_sessions: int, session_items: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sessions that have the highest sum of item scores, each user's best first: what beam search would find if
    every item were chosen without a look at the others.

    A session's items stand in the order of the ranking. Exact with `num_sessions + session_items - 1` ranked items.

    Args:
        items: (B, k) catalogue indices, best first, -1 for nothing.
        scores: (B, k) such as log-probabilities, falling along a row where there is an item.
        num_sessions, session_items: C and m.

    Returns:
        (B, C, m), -1 throughout where a user's ranking has no further session, and the sums (B, C), -inf there.

    Raises:
        ValueError: the ranking is too short for the C best sessions, or its scores rise.
    """
    items, scores = np.asarray(items), np.asarray(scores, dtype=np.float64)
    needed = num_sessions + session_items - 1
    if items.shape != scores.shape or items.shape[1] < needed:
        raise ValueError(
            f"items {items.shape} and scores {scores.shape} must have one shape, with at least {needed} ranked items "
            f"for the best {num_sessions} sessions of {session_items}: rank more, or fill up with -1"
        )
    scores = np.where(items >= 0, scores, -np.inf)[:, :needed]
    with np.errstate(invalid="ignore"):
        rising = (np.diff(scores, axis=1) > 0).any(axis=1)
    if rising.any():
        raise ValueError(f"scores row {int(rising.argmax())} rises: rankings are ordered best first")
    places = candidate_places(num_sessions, session_items)
    totals = scores[:, places].sum(axis=-1)
    best = np.argsort(-totals, axis=1, kind="stable")[:, :num_sessions]
    totals = np.take_along_axis(totals, best, axis=1)
    chosen = np.take_along_axis(items[:, None, :needed], places[best], axis=2)
    return np.where(np.isfinite(totals)[..., None], chosen, -1).astype(np.int64), totals


@functools.lru_cache
def candidate_places(num_sessions: int, session_items: int) -> np.ndarray:
    """Places (S, m) in a ranking, rising along a row, of all sessions that can be among the best C.

    Every session whose places lie before another's, one by one, is as good or better. Moved up step by step, a session
    whose places are d after those of the top m in sum has d such ones; and one with j places that are each s or more
    after theirs has (s + j over j) - 1 of them. Either number must be below C.
    """
    found: list[tuple[int, ...]] = []

    def extend(places: tuple[int, ...], budget: int) -> None:
        place = len(places)
        if place == session_items:
            found.append(places)
            return
        # Places are distinct: those after this one are shifted at least as far.
        shift = places[-1] - (place - 1) if places else 0
        left = session_items - place
        while shift * left <= budget and math.comb(shift + left, left) <= num_sessions:
            extend((*places, place + shift), budget - shift)
            shift += 1

    extend((), num_sessions - 1)
    return np.array(sorted(found, key=lambda places: (sum(places), places)), dtype=np.int64)
