"""The cascade that OneRec replaces: a retriever's candidates, of which a reward model makes the session that a user is
served; and the best session that a world which knows the truth can make."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data import SessionSimulator
from ..reward import RewardGuide, SessionScorer
from .session_judges import REWARD, judge_by_truth

RANKERS = ("item", "session")
_ORACLE_USERS = 8  # at a time, each with a session for every item of the catalogue


def cascade_sessions(
    scorer: SessionScorer,
    rows: Sequence[Mapping[str, Any]],
    candidates: torch.LongTensor,
    session_items: int,
    ranker: str = "session",
    batch_size: int = 32,
    title: str | None = None,
) -> torch.LongTensor:
    """The session that a reward model makes of each user's candidates.

    Args:
        scorer, rows: the reward model, and B rows as [`SessionScorer.score`] has them.
        candidates: (B, K) catalogue indices, none twice for a user, -1 for nothing.
        session_items: m.
        ranker: `"item"` takes the candidates of highest reward, each judged as a session of its own, best first;
            `"session"` builds the session greedily: the next item is the one with which the session so far has the
            highest reward.
        batch_size: users at a time.
        title: of a progress bar; none by default.

    Returns:
        (B, m) catalogue indices, -1 where the candidates are used up.

    Raises:
        ValueError: for another ranker.
    """
    if ranker not in RANKERS:
        raise ValueError(f"ranker must be one of {', '.join(RANKERS)}, got {ranker!r}.")
    sessions = [torch.empty(0, session_items, dtype=torch.long)]
    for start in tqdm(range(0, len(rows), batch_size), desc=title, disable=title is None):
        users = slice(start, start + batch_size)
        guide = scorer.guide(rows[users])

        def reward(session: torch.LongTensor, items: torch.LongTensor, guide: RewardGuide = guide) -> torch.Tensor:
            return guide(session[:, None], items[:, None])[:, 0].cpu()

        sessions.append(_built(candidates[users], session_items, reward, greedy=ranker == "session"))
    return torch.cat(sessions)


def oracle_sessions(
    world: SessionSimulator,
    scorer: SessionScorer,
    item_ids: np.ndarray,
    user_ids: np.ndarray,
    candidates: torch.LongTensor,
    session_items: int,
) -> torch.LongTensor:
    """The sessions that are built greedily by the truth: what no method is told.

    Args:
        world, scorer, item_ids, user_ids: as of [`judge_by_truth`], whose reward has to be known.
        candidates: (B, K) catalogue indices, all that a user may be given; -1 for nothing.
        session_items: m.

    Returns:
        (B, m) catalogue indices.
    """
    sessions = [torch.empty(0, session_items, dtype=torch.long)]
    for start in tqdm(range(0, len(user_ids), _ORACLE_USERS), desc="sessions of the truth"):
        users = slice(start, start + _ORACLE_USERS)

        def reward(session: torch.LongTensor, items: torch.LongTensor, users: slice = users) -> torch.Tensor:
            extended = torch.cat([session[:, None].expand(-1, items.shape[1], -1), items[..., None]], dim=-1)
            return torch.from_numpy(judge_by_truth(world, scorer, item_ids, user_ids[users], extended)[REWARD])

        sessions.append(_built(candidates[users], session_items, reward, greedy=True))
    return torch.cat(sessions)


def _built(
    candidates: torch.LongTensor,
    session_items: int,
    reward: Callable[[torch.LongTensor, torch.LongTensor], torch.Tensor],
    greedy: bool,
) -> torch.LongTensor:
    """Sessions (B, m) of candidates (B, K) by the `reward` (B, K) of the session so far (B, n) with each of them; if
    not `greedy` by that of single items."""
    session, free = candidates[:, :0], candidates >= 0
    for place in range(session_items):
        if greedy or not place:
            rewards = reward(session, candidates).nan_to_num(-torch.inf)
        best = rewards.masked_fill(~free, -torch.inf).argmax(dim=1, keepdim=True)
        item = candidates.gather(1, best).masked_fill(~free.any(1, keepdim=True), -1)
        session, free = torch.cat([session, item], dim=1), free.scatter(1, best, False)
    return session
