"""The run's report: one self-contained HTML file with pictures, and the table for the terminal.

Both read the dictionary that the evaluate stage writes as metrics.json; a part that the run did not have (no
alignment, no truth) is left out of the report, never filled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluation.policy_results import last_kept
from ..figure_style import ACCENT, GRID, INK, MUTED, OTHERS, SECOND, png_image, set_title, styled_axes, svg_image
from ..semantic_ids.semantic_id_report import code_use_figure
from ..staged_files import staged_file
from .alignment_report import (
    judge_change,
    judges_of,
    log_section,
    reward_section,
    rounds_section,
    shown_name,
    text_tables,
)
from .served_report import BASELINE_NAMES, served_section, served_text
from .tables import Measured, Table, fact_rows, number, signed_percent
from .verdict import verdict_sentences

PARTS = {
    "dataset": {},
    "tokenizer": {},
    "onerec": {},
    "baselines": {},
    "skipped_baselines": {},
    "alignment": [],
    "reward_models": {},
    "served": [],
}
RANKING_COLUMNS = ("recall@5", "recall@10", "recall@50", "ndcg@5", "ndcg@10", "ndcg@50", "coverage")
SESSION_COLUMNS = ("intra_session_diversity", "illegal_rate", "duplicate_rate")
REWARD_METRICS = {
    "auc": "AUC",
    "gauc": "AUC by user",
    "log_loss": "log-loss",
    "base_log_loss": "of the mean",
    "calibration_error": "calibration error",
    "labels": "labels",
}

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1d2733; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 28px 72px; }
h1 { font-size: 27px; margin: 0 0 2px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 44px 0 6px; padding-top: 14px; border-top: 1px solid #e4e8ed; }
h3 { font-size: 15px; margin: 22px 0 4px; }
p { margin: 4px 0 12px; max-width: 78ch; } .note { color: #66717f; }
nav { margin: 14px 0 0; display: flex; flex-wrap: wrap; gap: 4px 16px; }
nav a { color: #2f6fde; text-decoration: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 22px 0 4px; }
.card { border: 1px solid #e4e8ed; border-radius: 10px; padding: 12px 16px; }
.card b { display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: #66717f; font-size: 13px; }
img { max-width: 100%; height: auto; display: block; margin: 8px 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; margin: 8px 0 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; border-bottom: 1px solid #e4e8ed; white-space: nowrap; }
th { color: #66717f; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
table.plain td, table.plain th { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
tr.groups th { text-align: center; border-bottom: 0; padding-top: 8px; color: #1d2733; }
td small { color: #66717f; } tr.dropped td { opacity: .6; }
tr.ours td { font-weight: 650; background: #f2f6fe; }
.user { display: grid; grid-template-columns: 1fr 1fr; gap: 0 28px; margin-bottom: 10px; }
.user > div { min-width: 0; } .user table { width: 100%; }
.user th, .user td { text-align: left; } .user td { white-space: normal; overflow-wrap: anywhere; }
.user td:nth-child(3) { text-align: right; }
tr.hit td { background: #e8f6ec; font-weight: 650; }
details { margin: 8px 0; } summary { cursor: pointer; font-weight: 600; }
.verdict { border-left: 4px solid #2f6fde; padding: 4px 0 4px 16px; margin: 20px 0; }
.verdict p { margin: 0 0 8px; }
@media (max-width: 720px) { main { padding: 18px 14px 40px; } .user { grid-template-columns: 1fr; }
  .wide img { max-width: max(100%, 640px); } }
@media print {
  body { font-size: 11px; } main { max-width: none; padding: 0; } nav { display: none; }
  details::details-content { content-visibility: visible; }
  #all-numbers-and-settings ~ details::details-content { content-visibility: hidden; }
  .wide { overflow: visible; } table { font-size: 8px; width: 100%; }
  th, td { white-space: normal; padding-right: 5px; }
  h2, h3, summary { break-after: avoid; } img, tr, .card, .verdict { break-inside: avoid; }
}
"""


def write_report(
    path: str | Path,
    metrics: Mapping[str, Any],
    training_curves: Mapping[str, Sequence[tuple[float, float]]],
    code_use: Sequence[np.ndarray],
    examples: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    item_map: bytes | None = None,
    code_samples: Sequence[Mapping[str, Any]] = (),
    reliability_plots: Mapping[str, Mapping[str, bytes]] | None = None,
) -> Path:
    """Writes the report, whole or not at all, and returns its path.

    Args:
        path: the HTML file; its folder is created.
        metrics: what the evaluate stage writes as metrics.json, see `metrics_schema`.
        training_curves: title of a curve -> (step, value) pairs.
        code_use: for each level (K_l,), the number of items that have each code.
        examples: one mapping a user: "user"; "history", rows {"item", "label"}, oldest first; "recommendations", rows
            {"item", "label", "score"}, best first; optionally "next_item", what the user really took next.
            "label" is text beside the id, such as title or tags, and may be empty.
        settings: the run's configuration, nested as it likes.
        item_map: a PNG, the items in two dimensions.
        code_samples: items of some first codes, see `sample_items` of the semantic IDs' report.
        reliability_plots: reward model -> what was judged ("sessions", "exposures") -> a PNG.
    """
    details, metrics = _details_section({"settings": settings, **metrics}), PARTS | metrics
    sections = [
        ("Recommendation quality", _quality_section(metrics)),
        ("Served sessions", served_section(metrics["served"])),
        ("Rewards by alignment round", reward_section(metrics["alignment"])),
        ("On the logged exposures", log_section(metrics["alignment"])),
        ("Reward models", _reward_model_section(metrics["reward_models"], reliability_plots or {})),
        ("Losses", _curves_section({name: curve for name, curve in training_curves.items() if len(curve)})),
        ("Semantic IDs", _code_section(code_use, metrics["tokenizer"], item_map, code_samples)),
        ("Histories and recommendations", _examples_section(examples)),
        ("All numbers and settings", details),
    ]
    sections = [(title, body) for title, body in sections if body]
    links = "".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title, _ in sections)
    body = "".join(f'<h2 id="{_anchor(title)}">{escape(title)}</h2>{text}' for title, text in sections)
    title = f"OneRec on {metrics['dataset']['name']}" if "name" in metrics["dataset"] else "OneRec"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        '<p class="note">From raw logs to aligned recommendations: what this run learned and how good it is.</p>'
        f"{_verdict(metrics)}{_cards(metrics)}<nav>{links}</nav>{body}</main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def print_table(metrics: Mapping[str, Any]) -> str:
    """The run's figures as plain text for a terminal: methods, served sessions, rounds, judges and the log."""
    metrics, columns = PARTS | metrics, ("recall@10", "recall@50", "ndcg@10", "coverage")
    rows = [[name, *(row.get(column) for column in columns)] for name, row in compared_methods(metrics)]
    blocks, onerec = ["\n".join([Table(["", *columns], rows).text(), *skipped_notes(metrics)])], metrics["onerec"]
    rates = [f"{name.replace('_', ' ')} {number(onerec[name])}" for name in SESSION_COLUMNS if name in onerec]
    if rates:
        blocks.append("Sessions: " + ", ".join(rates))
    if metrics["served"]:
        blocks.append("Served sessions, one by user:\n" + served_text(metrics["served"]))
    return "\n\n".join([*blocks, *text_tables(metrics["alignment"])])


def compared_methods(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows of the comparison: OneRec after and before alignment, then the baselines."""
    metrics, rows = PARTS | metrics, []
    aligned = _is_aligned(metrics["alignment"])
    if metrics["onerec"]:
        rows.append(("OneRec, aligned" if aligned else "OneRec", metrics["onerec"]))
    if aligned:
        rows.append(("OneRec, pre-trained", metrics["alignment"][0]))
    return rows + [(BASELINE_NAMES.get(name, name), values) for name, values in metrics["baselines"].items()]


def skipped_notes(metrics: Mapping[str, Any]) -> list[str]:
    """What is said below the comparison of the baselines that could not be fitted."""
    return [
        f"Without {BASELINE_NAMES.get(name, name)}: {why}."
        for name, why in metrics.get("skipped_baselines", {}).items()
    ]


def _is_aligned(alignment: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the run ends in a round of alignment: one that was kept."""
    return len(alignment) > 1 and last_kept(alignment) is not alignment[0]


# HTML


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _verdict(metrics: Mapping[str, Any]) -> str:
    sentences = [sentence.partition(": ") for sentence in verdict_sentences(metrics)]
    text = "".join(
        f"<p><b>{escape(what)}{colon}</b>{escape(rest)}</p>" if colon else f'<p class="note">{escape(what)}</p>'
        for what, colon, rest in sentences
    )
    return f'<div class="verdict">{text}</div>' if text else ""


def _cards(metrics: Mapping[str, Any]) -> str:
    onerec, alignment, cards = metrics["onerec"], metrics["alignment"], []
    if "recall@10" in onerec:
        before = alignment[0].get("recall@10") if _is_aligned(alignment) else None
        note = f"Recall@10, {number(before)} before alignment" if before is not None else "Recall@10"
        cards.append((number(onerec["recall@10"]), note))
    baselines = {name: row["recall@10"] for name, row in metrics["baselines"].items() if "recall@10" in row}
    if baselines:
        best = max(baselines, key=baselines.__getitem__)
        cards.append((number(baselines[best]), f"Recall@10 of the best baseline, {BASELINE_NAMES.get(best, best)}"))
    if _is_aligned(alignment):
        for judge in judges_of(alignment)[1:]:
            change = judge_change(last_kept(alignment), judge, "reward_mean")
            if change is not None:
                low, high = map(signed_percent, change["interval"])
                note = f"mean reward by alignment, {shown_name(judge).lower()}; 95%: {low} to {high}"
                cards.append((signed_percent(change["relative"]), note))
    if "illegal_rate" in onerec:
        cards.append((number(onerec["illegal_rate"]), "illegal items generated"))
    text = "".join(f'<div class="card"><b>{escape(value)}</b><span>{escape(why)}</span></div>' for value, why in cards)
    return f'<div class="cards">{text}</div>' if cards else ""


def _quality_section(metrics: Mapping[str, Any]) -> str:
    methods, onerec = compared_methods(metrics), metrics["onerec"]
    if not methods:
        return ""
    rows = [[name, *(Measured.of(values, column) for column in RANKING_COLUMNS)] for name, values in methods]
    classes = ["ours" if name.startswith("OneRec") else "" for name, _ in methods]
    text = (
        '<p class="note">Each user\'s next item, ranked among the full catalogue, all methods on the same split and '
        "users. Coverage: share of the catalogue in the top 10 of at least one user. In brackets 95% bootstrap "
        "intervals over users.</p>"
    )
    text += svg_image(_comparison_figure(methods), "Recall@10 and NDCG@10 of OneRec and the baselines")
    text += Table(["", *RANKING_COLUMNS], rows, classes).folded("All methods in figures")
    text += "".join(f'<p class="note">{escape(line)}</p>' for line in skipped_notes(metrics))
    if len(metrics["alignment"]) > 1:
        return text + rounds_section(metrics["alignment"])
    columns = [column for column in SESSION_COLUMNS if column in onerec]
    rates = Table(["", *columns], [["OneRec", *(onerec[column] for column in columns)]])
    return text + rates.folded("Generated sessions in figures") if columns else text


def _code_section(
    code_use: Sequence[np.ndarray],
    report: Mapping[str, Any],
    item_map: bytes | None,
    code_samples: Sequence[Mapping[str, Any]],
) -> str:
    text = ""
    if len(code_use):
        text += (
            '<p class="note">Items that have each code, codes sorted by use. The dashed line is even use, which '
            "balanced clustering aims at.</p>" + svg_image(code_use_figure(code_use), "Use of codes by level")
        )
    if item_map is not None:
        text += "<h3>Items by first code</h3>" + png_image(item_map, "Items in two dimensions by first code")
    if code_samples:
        rows = [[str(row["code"]), row["num_items"], "; ".join(map(str, row["items"]))] for row in code_samples]
        samples = Table(["first code", "items", "of them"], rows)
        text += "<h3>Some items of some first codes</h3>" + samples.folded("Items by code", kind="plain")
    if report:
        text += Table(["", ""], fact_rows(report)).folded("Semantic IDs in figures", kind="plain")
    return text


def _examples_section(examples: Sequence[Mapping[str, Any]]) -> str:
    text = ""
    for example in examples:
        next_item = example.get("next_item")
        title = f"User {example['user']}"
        if next_item is not None:
            title += f", who took {next_item} next"
        rows = [[str(row["item"]), row.get("label", "")] for row in example["history"]]
        history = Table(["history, oldest first", ""], rows)
        found = example["recommendations"]
        rows = [[str(row["item"]), row.get("label", ""), float(row["score"])] for row in found]
        hits = ["hit" if next_item is not None and row["item"] == next_item else "" for row in found]
        recommended = Table(["recommended", "", "score"], rows, hits)
        text += f'<details><summary>{escape(title)}</summary><div class="user">'
        text += f"<div>{history.html()}</div><div>{recommended.html()}</div></div></details>"
    return text


def _reward_model_section(reward_models: Mapping[str, Any], plots: Mapping[str, Mapping[str, bytes]]) -> str:
    """The models' metrics side by side, on sessions and on single exposures, and their reliability plots."""
    text = ""
    exposures = {name: report.get("exposures") or {} for name, report in reward_models.items()}
    for what, reports in (("sessions", reward_models), ("exposures", exposures)):
        known = dict.fromkeys(key for report in reports.values() for key in report)
        objectives = [key.removesuffix("_auc") for key in known if key.endswith("_auc")]
        if not objectives:
            continue
        columns = [key for key in REWARD_METRICS if any(f"{objective}_{key}" in known for objective in objectives)]
        rows = [
            [shown_name(objective) if index == 0 else "", shown_name(name)]
            + [report.get(f"{objective}_{key}") for key in columns]
            for objective in objectives
            for index, (name, report) in enumerate(reports.items())
        ]
        text += f"<h3>On later {'sessions' if what == 'sessions' else 'single exposures'}</h3>"
        text += Table(["", "", *(REWARD_METRICS[key] for key in columns)], rows).folded("In figures")
        for name in plots:
            if what in plots[name]:
                title = f"{shown_name(name)}, {what}: estimate against label in bins of equal size"
                text += f'<p class="note">{escape(title)}</p>' + png_image(plots[name][what], title)
    note = (
        '<p class="note">Both on the later behaviour of users that the model was not trained on. "Of the mean" is the '
        "log-loss of always answering the mean label.</p>"
    )
    return note + text if text else ""


def _details_section(parts: Mapping[str, Any]) -> str:
    text, shown = "", ("onerec", "baselines", "skipped_baselines", "tokenizer", "served")
    for key, value in parts.items():
        title = key.replace("_", " ")
        rows = fact_rows(value if isinstance(value, Mapping) else {title: value})
        if rows and key not in shown:
            text += Table(["", ""], rows).folded(title.capitalize(), kind="plain")
    return text


# Pictures


def _comparison_figure(methods: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    figure = Figure(figsize=(10.6, 0.8 + 0.42 * len(methods)), layout="constrained")
    places = np.arange(len(methods))[::-1]
    ours = [name.startswith("OneRec") for name, _ in methods]
    colours = [OTHERS if not own else ACCENT if i == 0 else SECOND for i, own in enumerate(ours)]
    for axis, metric in zip(styled_axes(figure, 1, 2)[0], ("recall@10", "ndcg@10"), strict=True):
        values = np.array([values.get(metric, math.nan) for _, values in methods], dtype=float)
        reach = np.nan_to_num(values)
        axis.barh(places, reach.copy(), color=colours, height=0.66)
        for index, (_, row) in enumerate(methods):
            interval = row.get(f"{metric}_interval")
            if interval is not None:
                axis.plot(interval, [places[index]] * 2, color=INK, linewidth=1.1, solid_capstyle="butt")
                reach[index] = max(reach[index], interval[1])
        beside = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": INK}
        for place, value, end in zip(places, values, reach, strict=True):
            axis.annotate(number(value), (end, place), (5, 0), **beside)
        axis.set_xlim(0, max(float(reach.max()) * 1.16, 1e-6))
        axis.set_yticks(places, [name for name, _ in methods], fontsize=9.5, color=INK)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", color=GRID, linewidth=0.7)
        set_title(axis, metric.replace("recall", "Recall").replace("ndcg", "NDCG"))
    return figure


def _curves_section(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    if not curves:
        return ""
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.55 * columns if columns > 1 else 6.0, 2.4 * rows), layout="constrained")
    axes = styled_axes(figure, rows, columns)
    for axis, (name, curve) in zip(axes.flat, curves.items(), strict=False):
        steps, values = np.array(curve, dtype=float).T
        axis.plot(steps, values, color=ACCENT, linewidth=1.4, marker="o" if len(steps) <= 20 else None, markersize=3.5)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlabel("step", fontsize=9, color=MUTED)
        set_title(axis, name)
    for axis in list(axes.flat)[len(curves) :]:
        axis.set_visible(False)
    return svg_image(figure, "Training and validation curves")
