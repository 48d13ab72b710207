"""Policies of one run side by side, each under every judge: a Markdown table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..evaluation.session_judges import REWARD
from ..figure_style import ACCENT, GRID, INK, MUTED, set_title, styled_axes, with_legend
from .alignment_report import KINDS, KL, judge_change, judge_colour, judges_of, objectives_of, shown_name
from .tables import Measured, Table, number

COLUMNS = ("policy", "rounds kept", "Recall@10", "coverage", "KL to seed [nats]", "illegal", "judge")


def comparison_table(title: str, about: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with a row by policy and judge; what no judge says stands in a policy's first row.

    The mean reward, the best one and Recall@10 have the 95% bootstrap interval over users and the paired change from
    the seed model with its own; objectives are `mean / max` over a user's sessions.

    Args:
        title: heading.
        about: what the table compares, and how.
        rows: by policy `name`, `rounds` (rounds of alignment that were kept, None for a method without), and what
            [`PolicyResults.summary`] says, with `change` where it isn't the seed model.
    """
    objectives = [objective for objective in objectives_of(rows) if objective != REWARD]
    lines = []
    for row in rows:
        ranking = [Measured.of(row, name, row.get("change", {}).get(name)) for name in ("recall@10", "coverage")]
        policy = [row["name"], row["rounds"], *ranking, row.get(KL), row.get("illegal_rate")]
        for judge in judges_of([row]):
            scores = row["judges"][judge]
            rewards = (f"{REWARD}_{kind}" for kind in KINDS)
            cells = [Measured.of(scores, figure, judge_change(row, judge, figure)) for figure in rewards]
            cells += [" / ".join(number(scores.get(f"{name}_{kind}")) for kind in KINDS) for name in objectives]
            lines.append([*policy, shown_name(judge), *cells])
            policy = [""] * len(policy)
    header = [*COLUMNS, *(f"{kind} {REWARD}" for kind in KINDS), *objectives]
    return f"# {title}\n\n{about}\n\n{Table(header, lines).markdown(aligned=True)}\n"


def comparison_figure(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A row by policy; panels of the mean and the best reward's change from the seed model by judge, Recall@10 and,
    where a policy has one, its divergence from the seed model, all with their intervals.

    Args:
        title, rows: as for [`comparison_table`].
    """
    judges = judges_of(rows)
    figures = {"recall@10": "Recall@10"}
    if any(row.get(KL) is not None for row in rows):
        figures[KL] = "KL to seed [nats]"
    figure = Figure(figsize=(2.9 * (len(KINDS) + len(figures)) + 1, 1.7 + 0.36 * len(rows)), layout="constrained")
    axes = styled_axes(figure, 1, len(KINDS) + len(figures))[0]
    for axis, kind in zip(axes, KINDS, strict=False):
        for index, judge in enumerate(judges):
            changes = [judge_change(row, judge, f"{REWARD}_{kind}") or {} for row in rows]
            values = [(change.get("relative"), change.get("interval")) for change in changes]
            _intervals(axis, values, 0.2 * (index - (len(judges) - 1) / 2), judge_colour(judge), shown_name(judge))
        axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        set_title(axis, f"{kind.capitalize()} reward, change")
    for axis, (name, shown) in zip(axes[len(KINDS) :], figures.items(), strict=True):
        _intervals(axis, [(row.get(name), row.get(f"{name}_interval")) for row in rows], 0, ACCENT)
        axis.set_xlim(left=0)
        set_title(axis, shown)
    for axis in axes:
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows] if axis is axes[0] else [""] * len(rows))
        axis.grid(axis="x", color=GRID, linewidth=0.7)
        axis.xaxis.set_major_locator(MaxNLocator(4))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, fontweight="bold")
    return with_legend(figure, axes[0]) if judges else figure


def _intervals(
    axis: Axes,
    values: Sequence[tuple[float | None, Sequence[float] | None]],
    shift: float,
    colour: str,
    label: str | None = None,
) -> None:
    """A point (value, interval) by row, where there is one."""
    known = [place for place, (value, _) in enumerate(values) if value is not None]
    for place in known:
        if values[place][1] is not None:
            axis.plot(values[place][1], [place + shift] * 2, color=colour, linewidth=1.3, alpha=0.7)
    x, y = [values[place][0] for place in known], [place + shift for place in known]
    axis.plot(x, y, "o", markersize=4.5, color=colour, label=label)
