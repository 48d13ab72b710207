"""How the report writes numbers, intervals and tables, as HTML and as plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

MISSING = "–"


def number(value: Any) -> str:
    """Four digits or so of a number; a dash for what is missing or not finite."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        if not math.isfinite(value):
            return MISSING
        if value == 0:
            return "0"
        # Rates such as follow are small: keep three significant digits of them.
        return f"{value:.4f}" if 0.01 <= abs(value) < 10 else f"{value:.4g}" if abs(value) >= 10 else f"{value:.3g}"
    if value is None:
        return MISSING
    return f"{value:,}" if isinstance(value, (int, np.integer)) else str(value)


def with_interval(values: Mapping[str, Any], name: str) -> str:
    """`value [low, high]` of a figure that has `<name>_interval` beside it, else the value alone."""
    interval = values.get(f"{name}_interval")
    if values.get(name) is None or interval is None:
        return number(values.get(name))
    low, high = interval
    return f"{number(values[name])} [{low:.3g}, {high:.3g}]"


def stacked(values: Mapping[str, Any], name: str, change: Mapping[str, Any] | None = None) -> str:
    """A cell of three lines: the value, its interval, and its relative change with the change's interval."""
    return "\n".join([*with_interval(values, name).replace(" [", "\n[").split("\n"), relative_with_interval(change)])


def signed_percent(value: float) -> str:
    return f"{value:+.1%}" if math.isfinite(value) else MISSING


def relative_with_interval(change: Mapping[str, Any] | None) -> str:
    """`+4.1% [+3.2%, +5.0%]` of a change with `relative` and `interval`; empty for None."""
    if change is None:
        return ""
    low, high = change["interval"]
    return f"{signed_percent(change['relative'])} [{signed_percent(low)}, {signed_percent(high)}]"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of plain text, the first one to the left and the others to the right."""
    table = [list(header), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def html_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    kind: str = "",
    classes: Sequence[str] | None = None,
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """An HTML table; what follows a line break in a cell is set smaller below it.

    Args:
        header: titles of the columns; none where all are empty.
        rows: cells of plain text.
        kind: the table's class; "plain" for text.
        classes: the rows' classes.
        groups: titles above the columns, each with the number of columns that it spans.
    """
    classes = classes or [""] * len(rows)
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>" if any(header) else ""
    if groups:
        spans = "".join(f'<th colspan="{span}">{escape(title)}</th>' for title, span in groups)
        head = f'<tr class="groups">{spans}</tr>{head}'
    body = "".join(
        f'<tr class="{escape(name)}">' + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>"
        for row, name in zip(rows, classes, strict=True)
    )
    head = f"<thead>{head}</thead>" if head else ""
    return f'<div class="wide"><table class="{escape(kind)}">{head}<tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    first, *rest = text.split("\n")
    return escape(first) + "".join(f"<br><small>{escape(line)}</small>" for line in rest if line)
