"""The report's part on the one session that each user is served: methods side by side, and reward against recall.

All of it reads metrics.json's "served" (see `metrics_schema`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluation.served_sessions import BEAMS, CASCADE, ONEREC, ORACLE, RANKED_LIST
from ..evaluation.session_judges import REWARD
from ..figure_style import ACCENT, GRID, INK, MUTED, OTHERS, set_title, styled_axes, svg_image, with_legend
from .alignment_report import judges_of, shown_name
from .tables import Measured, Table

BASELINE_NAMES = {
    "popularity": "Popularity",
    "item_knn": "Item-KNN",
    "ease": "EASE",
    "sasrec": "SASRec",
    "fused": "Fused",
}
RETRIEVER_NAMES = BASELINE_NAMES | {ONEREC: "OneRec"}
CASCADE_COLOUR = "#d9822b"
KINDS = (("OneRec", ACCENT, "o"), ("cascades", CASCADE_COLOUR, "s"), ("rankings", OTHERS, "D"))

Entry = Mapping[str, Any]


def served_name(entry: Entry) -> str:
    """What a reader is shown for a method, such as `EASE's 32, session by reward`."""
    method, retriever, count = entry["method"], entry["retriever"], entry["candidates"]
    if method == ORACLE:
        return "The truth's own"
    if method == CASCADE:
        ranked = "session by reward" if entry["ranker"] == "session" else "items by reward"
        return f"{RETRIEVER_NAMES.get(retriever, retriever)}'s {count}, {ranked}"
    if method != ONEREC:
        return f"{RETRIEVER_NAMES.get(method, method)}, first items"
    if retriever == RANKED_LIST:
        way = "first items"
    elif entry["guided"]:
        way = f"guided, {count} beams, weight {entry['guidance_weight']:g}"
    elif count is None:
        way = "likeliest session"
    else:
        way = f"best of {count} by {'beams' if retriever == BEAMS else 'diverse beams'}"
    return f"OneRec {entry['round']}, {way}"


def served_table(served: Sequence[Entry]) -> Table:
    """A row by method: every judge's reward, recall of what the user took next, and cost."""
    judges, replayed = judges_of(served), any(entry["replay"] for entry in served)
    shares = any("oracle_share" in entry for entry in served)
    header = ["", *map(shown_name, judges), *(["of the way"] if shares else []), "session recall", "coverage"]
    header += ["diversity", "popular items", *(["shown", "their reward"] if replayed else []), "ms a user"]
    rows = []
    for entry in served:
        rewards = [entry["judges"].get(judge, {}) for judge in judges]
        row = [served_name(entry), *(Measured(found.get(REWARD), found.get("interval")) for found in rewards)]
        row += [entry.get("oracle_share")] if shares else []
        row += [Measured.of(entry, "recall"), *(entry[name] for name in ("coverage", "diversity"))]
        row += [entry["popular_item_share"]]
        if replayed:
            found = entry["replay"]["feedback"].get(REWARD, {})
            row += [entry["replay"]["items"], Measured(found.get("mean"), found.get("interval"))]
        rows.append([*row, entry["milliseconds"]])
    return Table(header, rows, ["ours" if entry["method"] == ONEREC else "" for entry in served])


def served_text(served: Sequence[Entry]) -> str:
    """The table for a terminal: the rewards without their intervals, recall and cost."""
    judges, shares = judges_of(served), any("oracle_share" in entry for entry in served)
    header = ["", *map(shown_name, judges), *(["of the way"] if shares else []), "session recall", "ms a user"]
    rows = []
    for entry in served:
        rewards = [entry["judges"].get(judge, {}).get(REWARD) for judge in judges]
        share = [entry.get("oracle_share")] if shares else []
        rows.append([served_name(entry), *rewards, *share, entry["recall"], entry["milliseconds"]])
    return Table(header, rows).text()


def served_section(served: Sequence[Entry]) -> str:
    """Table and picture of a run that serves sessions; empty for another."""
    if not served:
        return ""
    text = (
        '<p class="note">One session for each judged user, by every method. A cascade\'s retriever ranks items, of '
        "which the reward model takes the best, one by one or as the session that it builds of them. Session recall: "
        "of the user's next positive items, as many as a session has, the share that it holds. In brackets 95% "
        "bootstrap intervals over users. OneRec's number is the round of alignment.</p>"
    )
    if any("oracle_share" in entry for entry in served):
        text += (
            '<p class="note">Of the way: how far by the truth a method is from the first popular items (0) to the '
            "sessions that the truth itself would build (1).</p>"
        )
    if any(entry["replay"] for entry in served):
        text += (
            '<p class="note">Shown: served items that the log really showed to that user in the evaluated period, '
            "and the mean reward of what they did with them. Few, and chosen by another policy, but nobody's "
            "opinion.</p>"
        )
    text += svg_image(served_figure(served), "Reward against session recall, by judge")
    return text + served_table(served).folded("All methods in figures")


def served_figure(served: Sequence[Entry]) -> Figure:
    """Reward against session recall, a panel for each judge but the one that ranks; the frontier joins the methods
    that no other has more of both than."""
    judges = judges_of(served)[1:] or judges_of(served)
    figure = Figure(figsize=(5.4 * len(judges), 4.6), layout="constrained")
    axes = styled_axes(figure, 1, len(judges))[0]
    for axis, judge in zip(axes, judges, strict=True):
        _panel(axis, [entry for entry in served if judge in entry["judges"]], judge)
    return with_legend(figure, axes[0])


def _panel(axis: Axes, served: Sequence[Entry], judge: str) -> None:
    shown = [entry for entry in served if entry["method"] != ORACLE]
    points = np.array([[entry["recall"], entry["judges"][judge][REWARD]] for entry in shown])
    kinds = np.array([{ONEREC: 0, CASCADE: 1}.get(entry["method"], 2) for entry in shown])
    for kind, (label, colour, marker) in enumerate(KINDS):
        axis.plot(*points[kinds == kind].T, marker, color=colour, markersize=6, label=label, alpha=0.85, zorder=3)
    for entry in served:
        if entry["method"] == ORACLE:
            axis.axhline(
                entry["judges"][judge][REWARD], color=INK, linewidth=1, linestyle=":", label="the truth's own"
            )
    best = frontier(points)
    axis.plot(*points[best].T, color=MUTED, linewidth=1, label="frontier", zorder=2)
    for place in best:
        axis.annotate(served_name(shown[place]), points[place], (4, 5), textcoords="offset points", fontsize=7.5)
    axis.grid(axis="x", color=GRID, linewidth=0.7)
    axis.margins(0.12)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel("session recall", fontsize=9, color=MUTED)
    axis.set_ylabel("reward of the served session", fontsize=9, color=MUTED)
    set_title(axis, shown_name(judge))


def frontier(points: np.ndarray) -> list[int]:
    """Places of the points (P, 2) that no other has at least as much of both and more of one than, by falling first
    coordinate; of equal points the first."""
    order = np.lexsort([np.arange(len(points)), -points[:, 1], -points[:, 0]])
    best, kept = -np.inf, []
    for place in order:
        if points[place, 1] > best:
            kept.append(int(place))
            best = points[place, 1]
    return kept
