"""The report's part on alignment: every round under every judge, its ranking and divergence, and what the log says.

All of it reads metrics.json's "alignment" (see `metrics_schema`), an entry by round from the seed model's, number 0. A
round that the align stage dropped has "kept": false; it is shown, as dropped, and is not what the run ends in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..evaluation.alignment_checks import RECALL
from ..evaluation.counterfactual import MIN_EFFECTIVE_SAMPLES
from ..evaluation.policy_results import last_kept
from ..figure_style import ACCENT, GRID, INK, MUTED, set_title, styled_axes, svg_image, with_legend
from .tables import Measured, Table, relative_with_interval

JUDGE_NAMES = {"reward_model": "Reward model", "independent_judge": "Independent judge", "truth": "Simulated truth"}
JUDGE_COLOURS = {"reward_model": "#d9822b", "independent_judge": ACCENT, "truth": "#1f8f5f"}
_RATES = {"swt": "Watch time", "vtr": "View", "wtr": "Follow", "ltr": "Like"}
OBJECTIVE_NAMES = {"reward": "Reward"} | {name: f"{shown} ({name})" for name, shown in _RATES.items()}
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
PICTURED_COLUMNS = ("recall@10", "coverage", "popular_item_share", KL)
LOG_FACTS = {
    "exposures": "exposures",
    "effective_sample_size": "effective sample",
    "mean_weight": "mean weight",
    "clipped_share": "clipped weights",
}
ESTIMATES = ("logged", "SNIPS", "difference", "DR", "difference")

Entry = Mapping[str, Any]


def round_name(entry: Entry) -> str:
    return f"{entry['round']}{'' if entry.get('kept', True) else ' (dropped)'}"


def judges_of(alignment: Iterable[Entry]) -> list[str]:
    """Names of the judges: the one that trains, the independent one, the truth, any others."""
    found = {judge: None for entry in alignment for judge in entry.get("judges", {})}
    return [judge for judge in dict.fromkeys([*JUDGE_NAMES, *found]) if judge in found]


def objectives_of(alignment: Iterable[Entry]) -> list[str]:
    """Names of the objectives, the scalar reward first."""
    judges = [scores for entry in alignment for scores in entry.get("judges", {}).values()]
    found = {name.removesuffix("_mean"): None for scores in judges for name in scores if name.endswith("_mean")}
    return [name for name in dict.fromkeys([*OBJECTIVE_NAMES, *found]) if name in found]


def shown_name(name: str) -> str:
    """What a reader is shown for a judge or an objective."""
    return (JUDGE_NAMES | OBJECTIVE_NAMES).get(name, name)


def judge_change(entry: Entry, judge: str, figure: str) -> Mapping[str, Any] | None:
    """A judge's change to round 0; None for round 0 itself and where there is nothing to compare with."""
    return entry.get("change", {}).get("judges", {}).get(judge, {}).get(figure)


def rounds_table(alignment: Sequence[Entry], columns: Sequence[str]) -> Table:
    """A row by round, its figures with their changes to round 0."""
    rows = []
    for entry in alignment:
        change = entry.get("change", {})
        rows.append([round_name(entry), *(Measured.of(entry, name, change.get(name)) for name in columns)])
    return Table(["round", *(ROUND_COLUMNS[name] for name in columns)], rows, _classes(alignment))


def rounds_section(alignment: Sequence[Entry]) -> str:
    """Ranking, coverage, popularity and divergence by round, of a run with alignment."""
    columns = [name for name in ROUND_COLUMNS if any(name in entry for entry in alignment)]
    return (
        "<h3>By alignment round</h3>"
        '<p class="note">Round 0 is the seed model. In brackets 95% bootstrap intervals over users; below, the change '
        "to round 0, paired by user. Popular items: the share of generated items that are among the most consumed 1% "
        "of the catalogue. KL: divergence of a user's session distribution from the seed model's.</p>"
        + _dropped_note(alignment)
        + svg_image(_rounds_figure(alignment), "Recall@10, coverage, popularity share and KL by round")
        + rounds_table(alignment, columns).folded("Rounds in figures")
    )


def reward_section(alignment: Sequence[Entry]) -> str:
    """Every objective's mean and max by round, the judges side by side, and reward against KL."""
    judges, objectives = judges_of(alignment), objectives_of(alignment)
    if not judges or not objectives:
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
        text += svg_image(_change_figure(alignment, judges, objectives), "Change of the rewards by round and judge")
        if any(_finite(entry.get(KL)) for entry in changed):
            text += "<h3>Reward against divergence</h3>" + _paragraphs(confirmed_sentences(alignment))
            text += svg_image(_divergence_figure(alignment, judges), "Reward against KL to the seed model, by judge")
    groups = [("", 1), *((shown_name(judge), len(KINDS)) for judge in judges)]
    header = ["round", *(kind for _ in judges for kind in KINDS)]
    for objective in objectives:
        columns = [(judge, f"{objective}_{kind}") for judge in judges for kind in KINDS]
        rows = [[round_name(entry), *(_judged(entry, *column) for column in columns)] for entry in alignment]
        text += f"<h3>{escape(shown_name(objective))}</h3>" + Table(header, rows, _classes(alignment), groups).folded(
            "By round and judge"
        )
    return text


def _judged(entry: Entry, judge: str, figure: str) -> Measured:
    return Measured.of(entry.get("judges", {}).get(judge, {}), figure, judge_change(entry, judge, figure))


def _paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def log_section(alignment: Sequence[Entry]) -> str:
    """The counterfactual estimates by objective and round, of a run with a log of exposures."""
    entries = [entry for entry in alignment if entry.get("on_log")]
    if not entries:
        return ""
    text = (
        '<p class="note">What the next exposures would have earned had the policy chosen them, estimated from the '
        "evaluated period's logged exposures: by self-normalised inverse propensity scores (SNIPS), and doubly robust "
        f"(DR) with the independent judge as the model of feedback. {_propensities(entries[0])} In brackets 95% "
        "bootstrap intervals over users; differences are to round 0, paired by user.</p>"
    )
    text += _paragraphs(log_sentences(alignment))
    classes = _classes(entries)
    rows = [
        [round_name(entry), *(entry["on_log"][name] for name in LOG_FACTS), _verdict(entry["on_log"])]
        for entry in entries
    ]
    text += Table(["round", *LOG_FACTS.values(), "enough to conclude"], rows, classes).folded("The sample")
    for objective in dict.fromkeys(name for entry in entries for name in entry["on_log"]["heads"]):
        rows = [[round_name(entry), *_estimates(entry["on_log"]["heads"][objective])] for entry in entries]
        text += f"<h3>{escape(shown_name(objective))}</h3>" + Table(["round", *ESTIMATES], rows, classes).folded(
            "Estimates"
        )
    return text


def _propensities(entry: Entry) -> str:
    if entry["on_log"].get("known_propensities"):
        return "The exposures are those that were drawn by known chances, which are their propensities."
    return (
        "Propensities are the items' smoothed shares of the week of exposures before, the same for all users: a mean "
        "weight far from 1 says that they miss what the logging policy did."
    )


def _estimates(values: Mapping[str, Any]) -> list[Any]:
    """Cells of the columns `ESTIMATES`."""
    names = ("snips", "snips_difference", "doubly_robust", "doubly_robust_difference")
    return [values.get("logged"), *(Measured.of(values, name).level if name in values else "" for name in names)]


def _verdict(on_log: Mapping[str, Any]) -> str:
    why = "sample too small" if on_log["effective_sample_size"] < MIN_EFFECTIVE_SAMPLES else "propensities off"
    return "yes" if on_log["conclusive"] else f"no: {why}"


def log_sentences(alignment: Sequence[Entry]) -> list[str]:
    """The rounds of which the log tells nothing sure, and why."""
    sentences = []
    for entry in alignment:
        on_log = entry.get("on_log")
        if not on_log or on_log["conclusive"]:
            continue
        if on_log["effective_sample_size"] < MIN_EFFECTIVE_SAMPLES:
            why = (
                f"{on_log['exposures']:,} logged exposures count as {on_log['effective_sample_size']:.0f}, fewer than "
                f"{MIN_EFFECTIVE_SAMPLES}. That is too small to conclude anything from the log about this round."
            )
        else:
            why = (
                f"the mean weight is {on_log['mean_weight']:.2f}, where true propensities give 1. The logging policy "
                "was another than estimated: nothing is to be concluded from the log about this round."
            )
        sentences.append(f"Round {round_name(entry)}: {why}")
    return sentences


def confirmed_sentences(alignment: Sequence[Entry]) -> list[str]:
    """Whether the other judges confirm what the reward model says was gained, in the round that the run ends in; in
    the last one where none was kept."""
    trained, *others = judges_of(alignment)
    entry = last_kept(alignment)
    entry = alignment[-1] if entry is alignment[0] else entry
    sentences = []
    for kind in KINDS:
        changes = {judge: judge_change(entry, judge, f"reward_{kind}") for judge in (trained, *others)}
        if not others or None in changes.values():
            continue
        said = {judge: relative_with_interval(change) for judge, change in changes.items()}
        sentence = (
            f"Round {round_name(entry)}, {kind} reward: the {shown_name(trained).lower()}, which trains, says "
            f"{said[trained]}; {', '.join(f'the {shown_name(judge).lower()} {said[judge]}' for judge in others)}."
        )
        unconfirmed = [shown_name(judge).lower() for judge in others if changes[judge]["interval"][0] <= 0]
        if changes[trained]["interval"][0] > 0 and unconfirmed:
            verb = "do" if len(unconfirmed) > 1 else "does"
            sentence += f" The {' and the '.join(unconfirmed)} {verb} not confirm a gain."
        sentences.append(sentence)
    return sentences


def _dropped_note(alignment: Sequence[Entry]) -> str:
    dropped = [str(entry["round"]) for entry in alignment if not entry.get("kept", True)]
    note = (
        f"<p>Round {', '.join(dropped)} was dropped: its {RECALL} on held-out sessions fell by more than "
        f"max_recall_drop allows. The run ends in round {last_kept(alignment)['round']}.</p>"
    )
    return note if dropped else ""


def _classes(alignment: Sequence[Entry]) -> list[str]:
    return ["" if entry.get("kept", True) else "dropped" for entry in alignment]


def text_tables(alignment: Sequence[Entry]) -> list[str]:
    """The same tables for a terminal: rounds, judges' figures and their changes, the log."""
    blocks = []
    if len(alignment) > 1:
        columns = [name for name in PICTURED_COLUMNS if name in alignment[0]]
        blocks.append("By round:\n" + rounds_table(alignment, columns).text())
    judges, objectives = judges_of(alignment), objectives_of(alignment)
    if judges and objectives:
        rows = [
            [figure.replace("_", " "), round_name(entry), *(_judged(entry, judge, figure) for judge in judges)]
            for figure in (f"{objective}_{kind}" for objective in objectives for kind in KINDS)
            for entry in alignment
        ]
        header = ["figure", "round", *(shown_name(judge) for judge in judges)]
        blocks.append("Rewards of generated sessions, by judge:\n" + Table(header, rows).text())
        blocks += confirmed_sentences(alignment)
    rows = [
        [objective, round_name(entry), round(entry["on_log"]["effective_sample_size"]), *_estimates(values)]
        for entry in alignment
        if entry.get("on_log")
        for objective, values in entry["on_log"]["heads"].items()
    ]
    if rows:
        header = ["objective", "round", "effective sample", *ESTIMATES]
        blocks.append("On the logged exposures:\n" + Table(header, rows).text())
        blocks += log_sentences(alignment)
    return blocks


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _points(
    axis: Axes,
    alignment: Sequence[Entry],
    x: Sequence[float],
    values: Sequence[tuple[float | None, Sequence[float] | None]],
    colour: str,
    label: str | None = None,
    x_intervals: Sequence[Sequence[float] | None] | None = None,
) -> None:
    """A line through the rounds' values (value, interval), intervals as bars, dropped rounds hollow."""
    known = [i for i, (value, _) in enumerate(values) if _finite(value) and _finite(x[i])]
    axis.plot([x[i] for i in known], [values[i][0] for i in known], color=colour, linewidth=1.6, label=label)
    for i in known:
        value, interval = values[i]
        if interval is not None:
            axis.plot([x[i], x[i]], interval, color=colour, linewidth=1.1, alpha=0.7)
        if x_intervals is not None and x_intervals[i] is not None:
            axis.plot(x_intervals[i], [value, value], color=colour, linewidth=1.1, alpha=0.7)
        kept = alignment[i].get("kept", True)
        axis.plot([x[i]], [value], "o", markersize=5, color=colour, markerfacecolor=colour if kept else "white")


def _rounds_figure(alignment: Sequence[Entry]) -> Figure:
    columns = [name for name in PICTURED_COLUMNS if name in alignment[0]]
    figure = Figure(figsize=(11.4, 2.5), layout="constrained")
    for axis, name in zip(styled_axes(figure, 1, len(columns))[0], columns, strict=True):
        values = [(entry.get(name), entry.get(f"{name}_interval")) for entry in alignment]
        _points(axis, alignment, [entry["round"] for entry in alignment], values, ACCENT)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("round", fontsize=9, color=MUTED)
        set_title(axis, ROUND_COLUMNS[name][0].upper() + ROUND_COLUMNS[name][1:])
    return figure


def _changes(alignment: Sequence[Entry], judge: str, figure: str) -> list[tuple[float | None, Sequence[float] | None]]:
    """(change, interval) by round; exactly 0 in round 0, where the judge has judged it."""
    values = []
    for entry in alignment:
        is_seed = "change" not in entry and figure in entry.get("judges", {}).get(judge, {})
        change = judge_change(entry, judge, figure) or {"relative": 0.0 if is_seed else None}
        values.append((change["relative"], change.get("interval")))
    return values


def _change_figure(alignment: Sequence[Entry], judges: Sequence[str], objectives: Sequence[str]) -> Figure:
    """Change to round 0: a row for mean and for max, a column by objective, a line by judge."""
    figure = Figure(figsize=(max(11.4, 2.2 * len(objectives)), 4.9), layout="constrained")
    axes = styled_axes(figure, len(KINDS), len(objectives))
    shift = 0.07  # so that the judges' bars do not lie upon each other
    for row, kind in zip(axes, KINDS, strict=True):
        for axis, objective in zip(row, objectives, strict=True):
            for index, judge in enumerate(judges):
                x = [entry["round"] + shift * (index - (len(judges) - 1) / 2) for entry in alignment]
                values = _changes(alignment, judge, f"{objective}_{kind}")
                _points(axis, alignment, x, values, judge_colour(judge), shown_name(judge))
            _percent_axis(axis)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if kind == KINDS[0]:
                set_title(axis, shown_name(objective))
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
            _points(axis, alignment, x, values, judge_colour(judge), shown_name(judge), x_intervals)
        _percent_axis(axis)
        top = axis.get_ylim()[1]
        above = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": MUTED}
        for entry, place in zip(alignment, x, strict=True):
            if _finite(place):
                axis.annotate(str(entry["round"]), (place, top), (0, 2), **above)
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
