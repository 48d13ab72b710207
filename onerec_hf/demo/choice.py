"""From a history and the page's settings to all that is shown: pure functions, without a browser."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..evaluation import judge_by_model, judge_by_truth, rank_items
from ..reporting.served_report import BASELINE_NAMES
from .content import DemoContent

LIKELIEST, CHOSEN = "OneRec, plain", "OneRec, as set"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a visitor has set.

    Args:
        blocked: catalogue indices of items that may not be recommended.
        guidance_weight: of the reward model in the search for the session; 0: without it.
        temperature: of a draw without repeats of the list and, without guidance, of the session; 0: the likeliest.
        seed: of the draw.
    """

    blocked: tuple[int, ...] = ()
    guidance_weight: float = 0.0
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class RankedItem:
    """An item of the ranked list: its catalogue index, log-probability, and its rank from 1 on without any setting,
    None where it is not in that list."""

    item: int
    score: float
    rank_before: int | None


@dataclass(frozen=True)
class Choice:
    """What a history and settings give, items as catalogue indices.

    Args:
        session: with the settings; `likeliest`: without any.
        ranked: the list with the settings.
        baselines: ranked lists by the baselines' shown names.
        rewards: a row for each of the sessions, a baseline's being its first items; columns by judge and then by
            value, the reward and its objectives. None without a reward model.
    """

    session: list[int]
    likeliest: list[int]
    ranked: list[RankedItem]
    baselines: dict[str, list[int]]
    rewards: pd.DataFrame | None


def with_item(row: Row, item_id: Any, num_conditions: int = 0) -> dict[str, Any]:
    """The row after one more behaviour, of unknown feedback, at the moment of recommendation.

    Args:
        num_conditions: of `history_feedback`, where the model reads it.
    """
    added = {**row, "history_item_ids": [*row["history_item_ids"], item_id]}
    if row.get("history_feedback") is not None:
        added["history_feedback"] = [*row["history_feedback"], [None] * num_conditions]
    if row.get("history_timestamps") is not None:
        added["history_timestamps"] = [*row["history_timestamps"], row["timestamp"]]
    if row.get("exposed_item_ids") is not None:
        added["exposed_item_ids"] = [*row["exposed_item_ids"], item_id]
        added["exposed_feedback"] = [*row["exposed_feedback"], *[math.nan] * _feedback_columns(row)]
    return added


def without_item(row: Row, place: int) -> dict[str, Any]:
    """The row without the behaviour at a place of its history, and without the latest exposure to that item."""
    item = row["history_item_ids"][place]
    columns = ("history_item_ids", "history_feedback", "history_timestamps")
    kept = {name: _without(row[name], place) for name in columns if row.get(name) is not None}
    exposed = row.get("exposed_item_ids")
    if exposed is not None and item in exposed:
        last, width = len(exposed) - 1 - exposed[::-1].index(item), _feedback_columns(row)
        kept["exposed_item_ids"] = _without(exposed, last) or None
        kept["exposed_feedback"] = _without(row["exposed_feedback"], last * width, width) or None
    return {**row, **kept}


def _without(values: Sequence, place: int, count: int = 1) -> list:
    return [*values[:place], *values[place + count :]]


def _feedback_columns(row: Row) -> int:
    return len(row["exposed_feedback"]) // len(row["exposed_item_ids"])


def found_items(content: DemoContent, query: str, count: int = 24) -> list[int]:
    """Items with all words of a query in their names or ids, those that most users took first."""
    words = content.words
    found = np.ones(len(words), dtype=bool)
    for word in query.lower().split():
        found &= words.str.contains(word, regex=False).to_numpy(dtype=bool)
    items = np.flatnonzero(found & content.tokenizer.generatable)
    popularity = content.baselines.get("popularity")
    if popularity is not None:
        items = items[np.argsort(-popularity.counts.numpy()[items], kind="stable")]
    return items[:count].tolist()


def choose(content: DemoContent, row: Row, settings: Settings, top_k: int = 10) -> Choice:
    """Sessions, lists and rewards.

    Raises:
        ValueError: the history is empty, holds an unknown item, or no item is left to recommend.
    """
    if not row["history_item_ids"]:
        raise ValueError("The history is empty: pick a user, or click items of the catalogue.")
    tokenizer = content.tokenizer
    plain = content.recommender([row], top_k)[0]
    options: dict[str, Any] = {}
    if settings.blocked:
        options["blocked_items"] = tokenizer.item_ids[list(settings.blocked)].tolist()
    drawn = {}
    if settings.temperature:
        drawn = {"search": "stochastic_beam", "temperature": settings.temperature, "seed": settings.seed}
    found = content.recommender([row], top_k, **options, **drawn)[0] if options or drawn else plain
    if not found["items"]:
        raise ValueError("No item is left to recommend: all are blocked or in the history. Unblock some.")
    session = found["session"]
    if settings.guidance_weight and content.guided is not None:
        guided = {"search": "guided_beam", "guidance_weight": settings.guidance_weight}
        session = content.guided([row], top_k, **options, **guided)[0]["session"]
    session, likeliest, items, before = (
        tokenizer.item_index(ids).tolist() for ids in (session, plain["session"], found["items"], plain["items"])
    )
    ranks = {item: rank for rank, item in enumerate(before, 1)}
    ranked = [RankedItem(item, score, ranks.get(item)) for item, score in zip(items, found["scores"], strict=True)]
    history = tokenizer.item_index(row["history_item_ids"])
    excluded = np.concatenate([history, np.array(settings.blocked, dtype=np.int64)])
    lists = {}
    for name, baseline in content.baselines.items():
        best = rank_items(baseline.score([history]), [excluded], top_k)[0]
        lists[BASELINE_NAMES[name]] = best[best >= 0].tolist()
    length = content.recommender.model.config.session_items
    sessions = {LIKELIEST: likeliest, CHOSEN: session, **{name: items[:length] for name, items in lists.items()}}
    return Choice(session, likeliest, ranked, lists, session_rewards(content, row, sessions))


def session_rewards(content: DemoContent, row: Row, sessions: Mapping[str, list[int]]) -> pd.DataFrame | None:
    """What the reward model, and the truth where the user is of a simulated world, say of sessions by name."""
    scorer, item_index = content.scorer, content.tokenizer.item_index
    if scorer is None:
        return None
    longest = max(map(len, sessions.values()))
    padded = torch.tensor([[[*items, *[-1] * (longest - len(items))] for items in sessions.values()]])
    exposed = row.get("exposed_item_ids")
    indexed = {
        **row,
        "history": item_index(row["history_item_ids"]),
        "exposed": None if exposed is None else item_index(exposed),
    }
    judges = {"Reward model": judge_by_model(scorer, [indexed], padded)}
    if content.world is not None and row["user_id"] is not None:
        ids = np.asarray(content.tokenizer.item_ids)
        judges["Truth"] = judge_by_truth(content.world, scorer, ids, np.array([row["user_id"]]), padded)
    tables = {
        judge: pd.DataFrame({name: column[0] for name, column in values.items()}, index=list(sessions))
        for judge, values in judges.items()
        if values
    }
    return pd.concat(tables, axis=1)
