"""How the project's pictures look: colours, axes, titles, and their way into a self-contained HTML page.

Figures are made without pyplot, which would keep them in a global list and choose a global backend.
"""

import base64
import io
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d2733", "#66717f", "#e4e8ed"
ACCENT, SECOND, OTHERS = "#2f6fde", "#8fb4f3", "#b9c2cc"


def styled_axes(figure: Figure, rows: int, columns: int) -> np.ndarray:
    """Axes [rows, columns] with a light grid and no frame."""
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GRID)
        axis.tick_params(colors=MUTED, labelsize=8.5, length=0)
        axis.grid(axis="y", color=GRID, linewidth=0.7)
        axis.set_axisbelow(True)
    return axes


def set_title(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10, color=INK, fontweight="bold")


def with_legend(figure: Figure, axis: Axes) -> Figure:
    """The figure with a legend of what an axis shows, below to the right."""
    handles, labels = axis.get_legend_handles_labels()
    style = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), **style)
    return figure


def svg_image(figure: Figure, description: str) -> str:
    """A <div class="wide"> with an <img> that holds the figure itself; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    # The salt and the missing date make the same run write the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "onerec"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _image(buffer.getvalue(), "svg+xml", description)


def png_image(content: bytes, description: str) -> str:
    """A <div class="wide"> with an <img> that holds a PNG itself."""
    return _image(content, "png", description)


def _image(content: bytes, kind: str, description: str) -> str:
    data = base64.b64encode(content).decode("ascii")
    # A page with a narrow window may scroll it rather than shrink it.
    return f'<div class="wide"><img alt="{escape(description)}" src="data:image/{kind};base64,{data}"></div>'
