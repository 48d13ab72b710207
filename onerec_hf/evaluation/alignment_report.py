"""The report's part on alignment: every round under every judge, its ranking and divergence, and what the log says.

All of it reads metrics.json's "alignment", one entry a round from the seed model's, number 0. A round that the align
stage dropped has "kept": false; it is shown, as dropped, and is not what the run ends in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..figure_style import ACCENT, GRID, INK, MUTED, set_title, styled_axes, svg_image, with_legend
from .counterfactual import MIN_EFFECTIVE_SAMPLES
from .report_tables import html_table, number, relative_with_interval, stacked, text_table, with_interval

JUDGE_NAMES = {"reward_model": "Reward model", "independent_judge": "Independent judge", "truth": "Simulated truth"}
JUDGE_COLOURS = {"reward_model": "#d9822b", "independent_judge": ACCENT, "truth": "#1f8f5f"}
HEAD_NAMES = {
    "reward": "Reward",
    "swt": "Watch time (swt)",
    "vtr": "View (vtr)",
    "wtr": "Follow (wtr)",
    "ltr": "Like (ltr)",
}
KINDS = ("mean", "max")
KL = "kl_to_seed"
ROUND_COLUMNS = {
    "recall@10": "Recall@10",
    "ndcg@10": "NDCG@10",
    "coverage": "coverage",
    "popular_item_share": "popular items",
    KL: "KL to seed [nats]",
    "intra_session_diversity": "diversity",
    "illegal_rate": "illegal",
    "duplicate_rate": "duplicates",
}

Entry = Mapping[str, Any]


def last_kept(alignment: Sequence[Entry]) -> Entry:
    """The entry of the round that the run ends in: the last one that was not dropped."""
    return [entry for entry in alignment if entry.get("kept", True)][-1]


def round_name(entry: Entry, index: int) -> str:
    return f"{entry.get('round', index)}{'' if entry.get('kept', True) else ' (dropped)'}"


def judges_of(alignment: Iterable[Entry]) -> list[str]:
    """Names of the judges: the one that trains, the independent one, the truth, any others."""
    found = {judge: None for entry in alignment for judge in entry.get("judges", {})}
    return [judge for judge in JUDGE_NAMES if judge in found] + [judge for judge in found if judge not in JUDGE_NAMES]


def heads_of(alignment: Iterable[Entry]) -> list[str]:
    """Names of the heads, the scalar reward first."""
    judges = [scores for entry in alignment for scores in entry.get("judges", {}).values()]
    found = {name.removesuffix("_mean"): None for scores in judges for name in scores if name.endswith("_mean")}
    return [head for head in HEAD_NAMES if head in found] + [head for head in found if head not in HEAD_NAMES]


def judge_name(judge: str) -> str:
    return JUDGE_NAMES.get(judge, judge)


def judge_change(entry: Entry, judge: str, figure: str) -> Mapping[str, Any] | None:
    """A judge's change to round 0; None for round 0 itself and where there is nothing to compare with."""
    return entry.get("change", {}).get("judges", {}).get(judge, {}).get(figure)


# ------------------------------------------------------------------------------------------------------------ sections


def rounds_section(alignment: Sequence[Entry]) -> str:
    """Ranking, coverage, popularity and divergence by round, of a run with alignment."""
    columns = [name for name in ROUND_COLUMNS if any(name in entry for entry in alignment)]
    text = (
        "<h3>By alignment round</h3>"
        '<p class="note">Round 0 is the seed model. In brackets 95% bootstrap intervals over users; below, the change '
        "to round 0, paired by user. Popular items: the share of generated items that are among the most consumed 1% "
        "of the catalogue. KL: divergence of a user's session distribution from the seed model's.</p>"
    )
    text += _dropped_note(alignment)
    text += svg_image(_rounds_figure(alignment), "Recall@10, coverage, popularity share and KL by round")
    rows = [
        [
            round_name(entry, index),
            *(stacked(entry, name, entry.get("change", {}).get(name)) for name in columns),
        ]
        for index, entry in enumerate(alignment)
    ]
    return text + html_table(["round", *(ROUND_COLUMNS[name] for name in columns)], rows, classes=_classes(alignment))


def reward_section(alignment: Sequence[Entry]) -> str:
    """Every head's mean and max by round, the judges side by side, and reward against KL."""
    judges, heads = judges_of(alignment), heads_of(alignment)
    if not judges or not heads:
        return ""
    text = (
        '<p class="note">Mean and maximum over the sessions generated for a user, averaged over users. Alignment '
        "optimises the reward model; the independent judge was trained on other users, with another seed and width"
        + (", and the truth is the simulated world's own expectation" if "truth" in judges else "")
        + ". What the reward model alone gains is over-optimisation. In brackets 95% bootstrap intervals over users; "
        "below, the change to round 0, paired by user.</p>"
    )
    text += _dropped_note(alignment)
    changed = [entry for entry in alignment if entry.get("change", {}).get("judges")]
    if changed:
        text += svg_image(_change_figure(alignment, judges, heads), "Change of the rewards by round and judge")
        if any(_finite(entry.get(KL)) for entry in changed):
            text += "<h3>Reward against divergence</h3>" + "".join(
                f"<p>{escape(sentence)}</p>" for sentence in confirmed_sentences(alignment)
            )
            text += svg_image(_divergence_figure(alignment, judges), "Reward against KL to the seed model, by judge")
    groups = [("", 1), *((judge_name(judge), len(KINDS)) for judge in judges)]
    header = ["round", *(kind for _ in judges for kind in KINDS)]
    for head in heads:
        rows = []
        for index, entry in enumerate(alignment):
            cells = [
                stacked(entry.get("judges", {}).get(judge, {}), figure, judge_change(entry, judge, figure))
                for judge in judges
                for figure in (f"{head}_{kind}" for kind in KINDS)
            ]
            rows.append([round_name(entry, index), *cells])
        title = HEAD_NAMES.get(head, head)
        text += f"<h3>{escape(title)}</h3>" + html_table(header, rows, classes=_classes(alignment), groups=groups)
    return text


def log_section(alignment: Sequence[Entry]) -> str:
    """The counterfactual estimates by head and round, of a run with a log of exposures."""
    entries = [(index, entry) for index, entry in enumerate(alignment) if entry.get("on_log")]
    if not entries:
        return ""
    text = (
        '<p class="note">What the next exposures would have earned had the policy chosen them, estimated from the '
        "evaluated period's logged exposures: by self-normalised inverse propensity scores (SNIPS), and doubly robust "
        "(DR) with the independent judge as the model of feedback. Propensities are the items' smoothed shares of "
        "the week of exposures before, the same for all users: a mean weight far from 1 says that they miss what the "
        "logging policy did. In brackets 95% bootstrap intervals over users; differences are to round 0, paired by "
        "user.</p>"
    )
    text += "".join(f"<p>{escape(sentence)}</p>" for sentence in log_sentences(alignment))
    facts = {
        "exposures": "exposures",
        "effective_sample_size": "effective sample",
        "mean_weight": "mean weight",
        "clipped_share": "clipped weights",
    }
    classes = _classes([entry for _, entry in entries])
    rows = [
        [round_name(entry, i), *(number(entry["on_log"][name]) for name in facts), _verdict(entry["on_log"])]
        for i, entry in entries
    ]
    text += html_table(["round", *facts.values(), "enough to conclude"], rows, classes=classes)
    heads = {head: None for _, entry in entries for head in entry["on_log"]["heads"]}
    for head in heads:
        shown = [(index, entry, entry["on_log"]["heads"][head]) for index, entry in entries]
        rows = [
            [round_name(entry, index), number(values.get("logged")), *_estimates(values)]
            for index, entry, values in shown
        ]
        header = ["round", "logged", "SNIPS", "difference", "DR", "difference"]
        text += f"<h3>{escape(HEAD_NAMES.get(head, head))}</h3>" + html_table(header, rows, classes=classes)
    return text


def _estimates(values: Mapping[str, Any]) -> list[str]:
    cells = []
    for name in ("snips", "doubly_robust"):
        difference = f"{name}_difference"
        cells += [with_interval(values, name), with_interval(values, difference) if difference in values else ""]
    return cells


def _verdict(on_log: Mapping[str, Any]) -> str:
    if on_log["conclusive"]:
        return "yes"
    return "no: sample too small" if _too_small(on_log) else "no: propensities off"


def _too_small(on_log: Mapping[str, Any]) -> bool:
    return on_log["effective_sample_size"] < MIN_EFFECTIVE_SAMPLES


# ------------------------------------------------------------------------------------------------------------ in words


def log_sentences(alignment: Sequence[Entry]) -> list[str]:
    """The rounds of which the log tells nothing sure, and why."""
    sentences = []
    for index, entry in enumerate(alignment):
        on_log = entry.get("on_log")
        if not on_log or on_log["conclusive"]:
            continue
        if _too_small(on_log):
            sentences.append(
                f"Round {round_name(entry, index)}: {on_log['exposures']:,} logged exposures count as "
                f"{on_log['effective_sample_size']:.0f}, fewer than {MIN_EFFECTIVE_SAMPLES}. That is too small to "
                "conclude anything from the log about this round."
            )
        else:
            sentences.append(
                f"Round {round_name(entry, index)}: the mean weight is {on_log['mean_weight']:.2f}, where true "
                "propensities give 1. The logging policy was another than estimated: nothing is to be concluded from "
                "the log about this round."
            )
    return sentences


def confirmed_sentences(alignment: Sequence[Entry]) -> list[str]:
    """Whether the other judges confirm what the reward model says was gained, in the round that the run ends in; in
    the last one where none was kept."""
    judges = judges_of(alignment)
    entry = last_kept(alignment)
    entry = alignment[-1] if entry is alignment[0] else entry
    trained = judges[0]
    sentences = []
    for kind in KINDS:
        changes = {judge: judge_change(entry, judge, f"reward_{kind}") for judge in judges}
        if any(change is None for change in changes.values()) or len(judges) < 2:
            continue
        said = ", ".join(f"the {judge_name(j).lower()} {relative_with_interval(changes[j])}" for j in judges[1:])
        sentence = (
            f"Round {round_name(entry, alignment.index(entry))}, {kind} reward: the {judge_name(trained).lower()}, "
            f"which trains, says {relative_with_interval(changes[trained])}; {said}."
        )
        unconfirmed = [judge_name(j).lower() for j in judges[1:] if changes[j]["interval"][0] <= 0]
        if changes[trained]["interval"][0] > 0 and unconfirmed:
            sentence += (
                f" The {' and the '.join(unconfirmed)} {'do' if len(unconfirmed) > 1 else 'does'} not confirm a gain."
            )
        sentences.append(sentence)
    return sentences


def _dropped_note(alignment: Sequence[Entry]) -> str:
    dropped = [entry.get("round", index) for index, entry in enumerate(alignment) if not entry.get("kept", True)]
    if not dropped:
        return ""
    return (
        f"<p>Round {', '.join(map(str, dropped))} was dropped: its Recall@10 on held-out sessions fell by more than "
        f"max_recall_drop allows. The run ends in round {last_kept(alignment).get('round', 0)}.</p>"
    )


def _classes(alignment: Sequence[Entry]) -> list[str]:
    return ["" if entry.get("kept", True) else "dropped" for entry in alignment]


# ---------------------------------------------------------------------------------------------------------- plain text


def text_tables(alignment: Sequence[Entry]) -> list[str]:
    """The same tables for a terminal: rounds, judges' figures and their changes, the log."""
    blocks = []
    names = [round_name(entry, index) for index, entry in enumerate(alignment)]
    if len(alignment) > 1:
        columns = [name for name in ("recall@10", "coverage", "popular_item_share", KL) if name in alignment[0]]
        rows = []
        for name, entry in zip(names, alignment, strict=True):
            rows.append([name, *(with_interval(entry, column) for column in columns)])
            changes = [relative_with_interval(entry.get("change", {}).get(column)) for column in columns]
            if any(changes):
                rows.append(["  change", *changes])
        blocks.append("By round:\n" + text_table(["round", *(ROUND_COLUMNS[c] for c in columns)], rows))
    judges, heads = judges_of(alignment), heads_of(alignment)
    if judges and heads:
        rows = []
        for figure in (f"{head}_{kind}" for head in heads for kind in KINDS):
            for name, entry in zip(names, alignment, strict=True):
                scores = entry.get("judges", {})
                rows.append(
                    [figure.replace("_", " "), name, *(with_interval(scores.get(j, {}), figure) for j in judges)]
                )
                changes = [relative_with_interval(judge_change(entry, judge, figure)) for judge in judges]
                if any(changes):
                    rows.append(["", "change", *changes])
        header = ["figure", "round", *(judge_name(judge) for judge in judges)]
        blocks.append("Rewards of generated sessions, by judge:\n" + text_table(header, rows))
        blocks += confirmed_sentences(alignment)
    rows = []
    for name, entry in zip(names, alignment, strict=True):
        on_log = entry.get("on_log")
        if on_log:
            size = number(round(on_log["effective_sample_size"]))
            for head, values in on_log["heads"].items():
                rows.append([head, name, size, number(values.get("logged")), *_estimates(values)])
    if rows:
        header = ["head", "round", "effective sample", "logged", "SNIPS", "difference", "DR", "difference"]
        blocks.append("On the logged exposures:\n" + text_table(header, rows))
        blocks += log_sentences(alignment)
    return blocks


# ------------------------------------------------------------------------------------------------------------ pictures


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _points(
    axis: Axes,
    alignment: Sequence[Entry],
    x: Sequence[float],
    values: Sequence[tuple[float, Sequence[float] | None] | None],
    colour: str,
    label: str | None = None,
    x_intervals: Sequence[Sequence[float] | None] | None = None,
) -> None:
    """A line through the rounds' values (value, interval), intervals as bars, dropped rounds hollow."""
    known = [i for i, value in enumerate(values) if value is not None and _finite(value[0]) and _finite(x[i])]
    axis.plot([x[i] for i in known], [values[i][0] for i in known], color=colour, linewidth=1.6, label=label)
    for i in known:
        value, interval = values[i]
        if interval is not None:
            axis.plot([x[i], x[i]], interval, color=colour, linewidth=1.1, alpha=0.7)
        if x_intervals is not None and x_intervals[i] is not None:
            axis.plot(x_intervals[i], [value, value], color=colour, linewidth=1.1, alpha=0.7)
        kept = alignment[i].get("kept", True)
        axis.plot([x[i]], [value], "o", markersize=5, color=colour, markerfacecolor=colour if kept else "white")


def _rounds(alignment: Sequence[Entry]) -> list[int]:
    return [entry.get("round", index) for index, entry in enumerate(alignment)]


def _rounds_figure(alignment: Sequence[Entry]) -> Figure:
    columns = [name for name in ("recall@10", "coverage", "popular_item_share", KL) if name in alignment[0]]
    figure = Figure(figsize=(11.4, 2.5), layout="constrained")
    for axis, name in zip(styled_axes(figure, 1, len(columns))[0], columns, strict=True):
        values = [
            None if entry.get(name) is None else (entry[name], entry.get(f"{name}_interval")) for entry in alignment
        ]
        _points(axis, alignment, _rounds(alignment), values, ACCENT)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("round", fontsize=9, color=MUTED)
        title = ROUND_COLUMNS[name]
        set_title(axis, title[0].upper() + title[1:])
    return figure


def _changes(alignment: Sequence[Entry], judge: str, figure: str) -> list[tuple[float, Sequence[float] | None] | None]:
    """(change, interval) by round; exactly 0 in round 0, where the judge has judged it."""
    values: list[tuple[float, Sequence[float] | None] | None] = []
    for entry in alignment:
        change = judge_change(entry, judge, figure)
        if change is not None:
            values.append((change["relative"], change["interval"]))
        else:
            seed = "change" not in entry and figure in entry.get("judges", {}).get(judge, {})
            values.append((0.0, None) if seed else None)
    return values


def _change_figure(alignment: Sequence[Entry], judges: Sequence[str], heads: Sequence[str]) -> Figure:
    """Change to round 0: a row for mean and for max, a column by head, a line by judge."""
    figure = Figure(figsize=(max(11.4, 2.2 * len(heads)), 4.9), layout="constrained")
    axes = styled_axes(figure, len(KINDS), len(heads))
    shift = 0.07  # so that the judges' bars do not lie upon each other
    for row, kind in zip(axes, KINDS, strict=True):
        for axis, head in zip(row, heads, strict=True):
            for index, judge in enumerate(judges):
                x = [place + shift * (index - (len(judges) - 1) / 2) for place in _rounds(alignment)]
                values = _changes(alignment, judge, f"{head}_{kind}")
                _points(axis, alignment, x, values, judge_colour(judge), judge_name(judge))
            _percent_axis(axis)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if kind == KINDS[0]:
                set_title(axis, HEAD_NAMES.get(head, head))
            else:
                axis.set_xlabel("round", fontsize=9, color=MUTED)
        row[0].set_ylabel(f"{kind}, change to round 0", fontsize=9, color=INK)
    return with_legend(figure, axes[0][0])


def _divergence_figure(alignment: Sequence[Entry], judges: Sequence[str]) -> Figure:
    """Change of the reward against KL to the seed model, by judge: mean, and max."""
    figure = Figure(figsize=(10.6, 3.9), layout="constrained")
    axes = styled_axes(figure, 1, len(KINDS))[0]
    x = [0.0 if "change" not in entry else entry.get(KL, math.nan) for entry in alignment]
    x_intervals = [entry.get(f"{KL}_interval") for entry in alignment]
    for axis, kind in zip(axes, KINDS, strict=True):
        for judge in judges:
            values = _changes(alignment, judge, f"reward_{kind}")
            _points(axis, alignment, x, values, judge_colour(judge), judge_name(judge), x_intervals)
        _percent_axis(axis)
        top = axis.get_ylim()[1]
        for name, place in zip(_rounds(alignment), x, strict=True):
            if _finite(place):
                place_above = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": MUTED}
                axis.annotate(str(name), (place, top), (0, 2), **place_above)
        axis.set_xlabel("KL to the seed model [nats a session]; round above", fontsize=9, color=MUTED)
        axis.set_title(f"{kind.capitalize()} reward", loc="left", fontsize=10, color=INK, fontweight="bold", pad=16)
    axes[0].set_ylabel("change to round 0", fontsize=9, color=INK)
    return with_legend(figure, axes[0])


def _percent_axis(axis: Axes) -> None:
    axis.axhline(0, color=MUTED, linewidth=0.8)
    axis.grid(axis="x", color=GRID, linewidth=0.7)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter(PercentFormatter(1, symbol="%"))


def judge_colour(judge: str) -> str:
    return JUDGE_COLOURS.get(judge, MUTED)
