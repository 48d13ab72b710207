"""Policies of one run side by side, each under every judge: a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.schema import SESSION_LABELS
from .session_judges import REWARD

MISSING = "–"
JUDGES = ("reward_model", "independent_judge", "truth")  # in this order, then others


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
    heads = sorted(
        {
            figure.removesuffix("_mean")
            for row in rows
            for figures in row["judges"].values()
            for figure in figures
            if figure.endswith("_mean") and figure != f"{REWARD}_mean"
        },
        key=lambda head: (SESSION_LABELS.index(head) if head in SESSION_LABELS else len(SESSION_LABELS), head),
    )
    policy_columns = ["policy", "rounds kept", "Recall@10", "coverage", "KL to seed [nats]", "illegal rate"]
    lines = [[*policy_columns, "judge", "mean reward", "max reward", *heads]]
    for row in rows:
        change = row.get("change", {})
        policy = [
            row["name"],
            _number(row["rounds"]),
            _with_change(row, "recall@10", change),
            _number(row["coverage"]) + _change(change.get("coverage")),
            _number(row.get("kl_to_seed")),
            _number(row.get("illegal_rate")),
        ]
        for judge in sorted(row["judges"], key=lambda judge: (judge not in JUDGES, [*JUDGES, judge].index(judge))):
            figures = row["judges"][judge]
            changes = change.get("judges", {}).get(judge, {})
            rewards = [_with_change(figures, f"{REWARD}_{which}", changes) for which in ("mean", "max")]
            objectives = [f"{_number(figures.get(f'{h}_mean'))} / {_number(figures.get(f'{h}_max'))}" for h in heads]
            lines.append([*policy, judge.replace("_", " "), *rewards, *objectives])
            policy = [""] * len(policy)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    table = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([f"# {title}", "", about, "", *table, ""])


def _with_change(figures: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> str:
    """`value [low, high] +4.1% [+3.2%, +5.0%]`."""
    interval = figures.get(f"{name}_interval")
    text = _number(figures.get(name))
    if interval is not None:
        text += f" [{_number(interval[0])}, {_number(interval[1])}]"
    return text + _change(changes.get(name))


def _change(change: Mapping[str, Any] | None) -> str:
    if change is None:
        return ""
    low, high = change["interval"]
    return f" {change['relative']:+.1%} [{low:+.1%}, {high:+.1%}]"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"
