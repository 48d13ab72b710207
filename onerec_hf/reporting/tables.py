"""How every report writes numbers, intervals, changes and tables, as plain text, HTML and Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

MISSING = "–"
LONGEST_LIST = 16


def number(value: Any) -> str:
    """Four digits or so of a number, a dash for what is missing or not finite, lists entry by entry; text as it is."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        if not math.isfinite(value):
            return MISSING
        if value == 0:
            return "0"
        # Rates such as follow are small: keep three significant digits of them.
        return f"{value:.4f}" if 0.01 <= abs(value) < 10 else f"{value:.4g}" if abs(value) >= 10 else f"{value:.3g}"
    if isinstance(value, (list, tuple, np.ndarray)):
        shown = ", ".join(map(number, value[:LONGEST_LIST]))
        return shown if len(value) <= LONGEST_LIST else f"{shown}, … ({len(value)} values)"
    if value is None:
        return MISSING
    return f"{value:,}" if isinstance(value, (int, np.integer)) else str(value)


def signed_percent(value: float) -> str:
    return f"{value:+.1%}" if math.isfinite(value) else MISSING


def relative_with_interval(change: Mapping[str, Any] | None) -> str:
    """`+4.1% [+3.2%, +5.0%]` of a change with `relative` and `interval`; empty for None."""
    if change is None:
        return ""
    low, high = change["interval"]
    return f"{signed_percent(change['relative'])} [{signed_percent(low)}, {signed_percent(high)}]"


@dataclass(frozen=True)
class Measured:
    """A figure with its interval and its relative change from another policy, where it has them; a table's cell."""

    value: Any
    interval: Sequence[float] | None = None
    change: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, figures: Mapping[str, Any], name: str, change: Mapping[str, Any] | None = None) -> Measured:
        """The figure of that name, whose interval is `<name>_interval`."""
        return cls(figures.get(name), figures.get(f"{name}_interval"), change)

    @property
    def lines(self) -> list[str]:
        """The value, `[low, high]`, and the change; empty where it has none."""
        interval = None if self.value is None else self.interval
        shown = "" if interval is None else "[{:.3g}, {:.3g}]".format(*interval)
        return [number(self.value), shown, relative_with_interval(self.change)]

    @property
    def level(self) -> str:
        return " ".join(filter(None, self.lines[:2]))

    def __str__(self) -> str:
        return " ".join(filter(None, self.lines))


def fact_rows(
    values: Mapping[str, Any], separator: str = ".", nested_lists: bool = True, prefix: str = ""
) -> list[tuple[str, Any]]:
    """Names and values of nested mappings, the levels of a name joined; also of lists of mappings or lists, which are
    left out without `nested_lists`."""
    rows = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and any(isinstance(entry, (Mapping, list, tuple)) for entry in value):
            value = dict(enumerate(value)) if nested_lists else {}
        if isinstance(value, Mapping):
            rows += fact_rows(value, separator, nested_lists, f"{name}{separator}")
        else:
            rows.append((name, value))
    return rows


@dataclass
class Table:
    """Rows of cells, text or anything that [`number`] writes, and a header.

    Args:
        header: titles of the columns; in HTML none where all are empty.
        classes: HTML classes of the rows.
        groups: HTML titles above the columns, each with the number of columns that it spans.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    classes: Sequence[str] | None = None
    groups: Sequence[tuple[str, int]] = ()

    def text(self) -> str:
        """Columns of plain text, the first one to the left and the others to the right; changes in a line below."""
        table = [list(self.header)]
        for row in self.rows:
            table.append([cell.level if isinstance(cell, Measured) else number(cell) for cell in row])
            changes = [cell.lines[2] if isinstance(cell, Measured) else "" for cell in row]
            if any(changes):
                label = next(place for place, cell in enumerate(row) if isinstance(cell, Measured)) - 1
                changes[label] = "change" if label else "  change"
                table.append(changes)
        first, *widths = _widths(table)
        lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in table]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def markdown(self, aligned: bool = False) -> str:
        """A GitHub-flavoured table, its columns as wide as their longest cell if `aligned`; empty without rows."""
        if not self.rows:
            return ""
        table = [list(self.header), *([number(cell).replace("|", "\\|") for cell in row] for row in self.rows)]
        table = [[cell.replace("\n", " ") for cell in row] for row in table]
        widths = _widths(table) if aligned else [0] * len(self.header)
        table.insert(1, ["-" * (width or 3) for width in widths])
        return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in table)

    def folded(self, summary: str, kind: str = "") -> str:
        """The HTML table below a line that unfolds it."""
        return f"<details><summary>{escape(summary)}</summary>{self.html(kind)}</details>"

    def html(self, kind: str = "") -> str:
        """An HTML table; intervals and changes, or what follows a line break, are set smaller below a cell's value.

        Args:
            kind: the table's class; "plain" for text.
        """
        head = "".join(f"<th>{escape(title)}</th>" for title in self.header) if any(self.header) else ""
        head = f"<tr>{head}</tr>" if head else ""
        if self.groups:
            spans = "".join(f'<th colspan="{span}">{escape(title)}</th>' for title, span in self.groups)
            head = f'<tr class="groups">{spans}</tr>{head}'
        body = "".join(
            f'<tr class="{escape(name)}">' + "".join(f"<td>{_html_cell(cell)}</td>" for cell in row) + "</tr>"
            for row, name in zip(self.rows, self.classes or [""] * len(self.rows), strict=True)
        )
        head = f"<thead>{head}</thead>" if head else ""
        return f'<div class="wide"><table class="{escape(kind)}">{head}<tbody>{body}</tbody></table></div>'


def _widths(table: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def _html_cell(cell: Any) -> str:
    first, *rest = cell.lines if isinstance(cell, Measured) else number(cell).split("\n")
    return escape(first) + "".join(f"<br><small>{escape(line)}</small>" for line in rest if line)
