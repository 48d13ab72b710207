"""A run's figures as one tidy table, for a notebook or a spreadsheet: results.csv, beside metrics.json."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from ..evaluation.served_sessions import ONEREC
from .served_report import served_name
from .tables import fact_rows

RANKED, SERVED = "ranked", "served"
# What a figure is of, and what is not a level: changes and estimates from a log are in metrics.json alone.
NO_FIGURES = (
    "round",
    "kept",
    "change",
    "on_log",
    "method",
    "retriever",
    "candidates",
    "ranker",
    "guided",
    "guidance_weight",
)


def results_table(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """A row by figure of a method.

    Args:
        metrics: the content of metrics.json, whose schema (`reporting.metrics_schema`) has every figure's meaning and
            unit.

    Returns:
        `part`, "ranked" for ranked lists and sessions that a model generates, "served" for the one session that a user
        is served; `method`, onerec, a baseline or a served method's name; `round` of alignment, and whether it was
        `kept`, missing for methods without; `metric`, such as `ndcg@10` or `truth/reward_mean`; `value`; `low` and
        `high`, the ends of its 95% interval, missing where it has none.
    """
    rounds = metrics.get("alignment", [])
    kept = {entry["round"]: entry["kept"] for entry in rounds}
    rows = [(RANKED, ONEREC, entry["round"], entry["kept"], *figure) for entry in rounds for figure in _figures(entry)]
    for name, baseline in metrics["baselines"].items():
        rows += [(RANKED, name, None, None, *figure) for figure in _figures(baseline)]
    for entry in metrics.get("served", []):
        of_round = entry["round"], kept.get(entry["round"])
        rows += [(SERVED, served_name(entry), *of_round, *figure) for figure in _figures(entry)]
    table = pd.DataFrame(rows, columns=["part", "method", "round", "kept", "metric", "value", "low", "high"])
    floats = dict.fromkeys(("value", "low", "high"), "float64")
    return table.astype({"round": "Int64", "kept": "boolean", **floats})


def _figures(entry: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None, float | None]]:
    """Name, value and the interval's ends of each figure; those of judges as `<judge>/<figure>`."""
    levels = {name: value for name, value in entry.items() if name not in NO_FIGURES and value is not None}
    if "judges" in levels:
        levels |= levels.pop("judges")
    facts = dict(fact_rows(levels, "/", nested_lists=False))
    for name, value in facts.items():
        if isinstance(value, (int, float)):
            # `<figure>_interval` or, where a judge or a label has one figure alone, `interval`.
            interval = facts.get(f"{name}_interval", facts.get(f"{name.rpartition('/')[0]}/interval", (None, None)))
            yield name, value, *interval
