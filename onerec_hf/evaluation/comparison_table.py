"""Policies of one run side by side, each under every judge: a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .alignment_report import KINDS, KL, heads_of, judge_change, judge_name, judges_of
from .report_tables import number, relative_with_interval, with_interval
from .session_judges import REWARD

COLUMNS = ("policy", "rounds kept", "Recall@10", "coverage", "KL to seed [nats]", "illegal", "judge")


def comparison_table(title: str, about: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with a row by policy and judge; what no judge says stands in a policy's first row.

    The mean reward, the best one and Recall@10 have the 95% bootstrap interval over users and the paired change from
    the seed model with its own; objectives are `mean / max` over a user's sessions.

    Args:
        title: Heading.
        about: What the table compares, and how.
        rows: By policy `name`, `rounds` (rounds of alignment that were kept, None for a method without), and what
            [`PolicyResults.summary`] says, with `change` where it isn't the seed model.
    """
    objectives = [head for head in heads_of(rows) if head != REWARD]
    lines = [[*COLUMNS, *(f"{kind} {REWARD}" for kind in KINDS), *objectives]]
    for row in rows:
        change = row.get("change", {})
        policy = [
            row["name"],
            number(row["rounds"]),
            _with_change(row, "recall@10", change.get("recall@10")),
            _with_change(row, "coverage", change.get("coverage")),
            number(row.get(KL)),
            number(row.get("illegal_rate")),
        ]
        for judge in judges_of([row]):
            scores = row["judges"][judge]
            rewards = (f"{REWARD}_{kind}" for kind in KINDS)
            cells = [_with_change(scores, figure, judge_change(row, judge, figure)) for figure in rewards]
            cells += [" / ".join(number(scores.get(f"{head}_{kind}")) for kind in KINDS) for head in objectives]
            lines.append([*policy, judge_name(judge), *cells])
            policy = [""] * len(policy)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    table = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    return "\n".join([f"# {title}", "", about, "", *table, ""])


def _with_change(figures: Mapping[str, Any], name: str, change: Mapping[str, Any] | None) -> str:
    """`value [low, high] +4.1% [+3.2%, +5.0%]`."""
    return f"{with_interval(figures, name)} {relative_with_interval(change)}".rstrip()
