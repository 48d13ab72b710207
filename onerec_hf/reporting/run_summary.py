"""What a run ends with in a terminal: is it better, than what, and what do a few users get, in 25 lines at most.

[`print_table`] has all figures, the report these and the pictures.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.served_sessions import BEAMS, CASCADE, ONEREC
from ..evaluation.session_judges import REWARD
from .alignment_report import judges_of, shown_name
from .report import compared_methods, skipped_notes
from .served_report import served_name
from .tables import Table

COLUMNS = {"recall@10": "Recall@10", "ndcg@10": "NDCG@10"}
SHOWN_USERS, SHOWN_ITEMS, LONGEST_NAME = 3, 5, 26

Entry = Mapping[str, Any]


def run_summary(metrics: Mapping[str, Any], examples: Sequence[Mapping[str, Any]] = ()) -> str:
    """The table of methods, and under it users' latest behaviours and what is recommended to them.

    Args:
        metrics: as of [`write_report`].
        examples: as of [`write_report`]; the first ones are shown.
    """
    served = metrics.get("served", [])
    judges = judges_of(served)[1:]  # that nothing was aligned to
    header = ["", *COLUMNS.values(), *(f"session, {shown_name(judge).lower()}" for judge in judges)]
    rows = []
    for name, figures, entry in _compared(metrics, served, judges):
        recalled = [figures.get(column) for column in COLUMNS]
        rewards = [entry.get("judges", {}).get(judge, {}).get(REWARD) for judge in judges]
        rows.append([name, *recalled, *rewards, *([entry.get("milliseconds")] if served else [])])
    table = Table([*header, *(["ms a user"] if served else [])], rows)
    users = [line for example in examples[:SHOWN_USERS] for line in _user_lines(example)]
    return "\n".join([table.text(), *skipped_notes(metrics), *([""] if users else []), *users])


def _compared(
    metrics: Mapping[str, Any], served: Sequence[Entry], judges: Sequence[str]
) -> list[tuple[str, Mapping[str, Any], Entry]]:
    """Name, figures of the ranked list, and the served session of each method; of the guided ones and of the cascades
    the best by the last judge, the truth where there is one."""
    methods, baselines = compared_methods(metrics), metrics.get("baselines", {})
    rounds = [entry["round"] for entry in metrics.get("alignment", []) if entry.get("kept", True)]
    last = max(rounds, default=0)
    keys = [(ONEREC, last), (ONEREC, 0)][: len(methods) - len(baselines)] + [(name, None) for name in baselines]
    # The likeliest session of a generator, the first items of a ranking.
    plain = [entry for entry in served if entry["candidates"] is None]
    sessions = {
        (entry["method"], entry["round"]): entry for entry in plain if entry["retriever"] in (BEAMS, entry["method"])
    }
    rows = [(*method, sessions.get(key, {})) for method, key in zip(methods, keys, strict=True)]

    def reward(entry: Entry) -> float:
        return entry["judges"].get(judges[-1], {}).get(REWARD, float("-inf"))

    guided = [entry for entry in served if entry["guided"] and entry["round"] == last]
    cascades = [entry for entry in served if entry["method"] == CASCADE]
    for name, found in (("OneRec, guided by reward", guided), (None, cascades)) if judges else ():
        if found:
            best = max(found, key=reward)
            rows.append((name or served_name(best), {}, best))
    return rows


def _user_lines(example: Mapping[str, Any]) -> list[str]:
    width = shutil.get_terminal_size((119, 24)).columns
    lines = [f"User {example['user']} took", "  and is recommended"]
    shown = [example["history"][-SHOWN_ITEMS:], example["recommendations"][:SHOWN_ITEMS]]
    return [f"{line} {', '.join(map(_item_name, items))}"[:width] for line, items in zip(lines, shown, strict=True)]


def _item_name(row: Mapping[str, Any]) -> str:
    name = row.get("label") or str(row["item"])
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
