"""Pictures of semantic IDs: how evenly the codes are used, where the items lie, and which items share a first code."""

import json
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE

from onerec_hf.figure_style import INK, MUTED, OTHERS, SECOND, png_image, set_title, styled_axes
from onerec_hf.semantic_ids.balanced_kmeans import as_points

CODE_USE_FILE = "code_use.png"
ITEM_MAP_FILE = "item_map.png"
CODE_SAMPLES_FILE = "code_samples.json"
PAGE_FILE = "semantic_ids.html"
MAP_ITEMS = 1500
# Without tab10's grey, which is what the other items are drawn in.
CODE_COLOURS = [colour for index, colour in enumerate(matplotlib.colormaps["tab10"].colors) if index != 7]


def code_use(codes: np.ndarray, codebook_sizes: Sequence[int]) -> list[np.ndarray]:
    """Number of items that have each code, int (K_l,) for each level."""
    return [np.bincount(codes[:, level], minlength=size) for level, size in enumerate(codebook_sizes)]


def code_use_figure(counts_by_level: Sequence[np.ndarray]) -> Figure:
    """One histogram a level: items of each code, codes sorted by use, and even use as a dashed line."""
    columns = min(4, len(counts_by_level))
    rows = -(-len(counts_by_level) // columns)
    figure = Figure(figsize=(10.6, 2.5 * rows), layout="constrained")
    axes = styled_axes(figure, rows, columns)
    for level, (axis, counts) in enumerate(zip(axes.flat, counts_by_level, strict=False)):
        counts = np.sort(np.asarray(counts))[::-1]
        # One outline instead of a bar a code keeps the picture small for thousands of codes.
        axis.stairs(counts, np.arange(len(counts) + 1), fill=True, color=SECOND)
        axis.axhline(counts.mean(), color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axis.set(xlim=(0, len(counts)), ylim=(0, max(1.0, float(counts.max()) * 1.1)))
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_xlabel(f"{int((counts > 0).sum())} of {len(counts)} codes used", fontsize=9, color=MUTED)
        set_title(axis, f"Level {level + 1}")
    for axis in list(axes.flat)[len(counts_by_level) :]:
        axis.set_visible(False)
    return figure


def shown_codes(first_codes: np.ndarray, num_codes: int = len(CODE_COLOURS), seed: int = 0) -> np.ndarray:
    """The first codes that the map colours and the table lists: drawn by seed among those in use, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(np.unique(first_codes))[:num_codes])


def item_map_figure(embeddings, first_codes: np.ndarray, max_items: int = MAP_ITEMS, seed: int = 0) -> Figure:
    """Items in two dimensions by t-SNE: those of `shown_codes` coloured by first code, a sample of the others grey.

    Args:
        embeddings: (N, d). first_codes: int (N,).
        max_items: half of them at most are items of the coloured codes.
    """
    codes = np.asarray(first_codes)
    generator = np.random.default_rng(seed)
    shown = shown_codes(codes, seed=seed)
    # Drawn evenly, a code of a large codebook would have a handful of points, which show nothing.
    drawn = [generator.permutation(np.flatnonzero(codes == code))[: max_items // (2 * len(shown))] for code in shown]
    drawn = np.concatenate([*drawn, generator.permutation(np.flatnonzero(~np.isin(codes, shown)))[: max_items // 2]])
    codes, x = codes[drawn], np.asarray(embeddings, dtype=np.float32)[drawn]
    figure = Figure(figsize=(10.6, 5.8), layout="constrained")
    axis = styled_axes(figure, 1, 1)[0, 0]
    if len(x) > 2:
        # Small catalogues have fewer points than t-SNE's usual neighbourhood.
        perplexity = max(1.0, min(30.0, (len(x) - 1) / 3))
        places = TSNE(perplexity=perplexity, max_iter=500, random_state=seed, n_jobs=1).fit_transform(x)
        axis.scatter(*places[~np.isin(codes, shown)].T, color=OTHERS, s=6, linewidths=0, alpha=0.6)
        for colour, code in zip(CODE_COLOURS, shown, strict=False):
            axis.scatter(*places[codes == code].T, color=colour, s=16, linewidths=0, label=f"<a_{code}>")
        axis.legend(
            loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9, labelcolor=INK, title="first code"
        )
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    axis.set_xlabel(f"t-SNE of {len(x):,} of {len(first_codes):,} items", fontsize=9, color=MUTED)
    used = len(np.unique(first_codes))
    set_title(axis, "Items" if used == len(shown) else f"Items of {len(shown)} of the {used} first codes, others grey")
    return figure


def sample_items(
    first_codes: np.ndarray, item_name: Callable[[int], str], items_per_code: int = 6, seed: int = 0
) -> list[dict[str, Any]]:
    """Some items of each of `shown_codes`, by name: rows {"code", "num_items", "items"}.

    Args:
        first_codes: int (N,). item_name: name of the item at a catalogue index.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for code in shown_codes(first_codes, seed=seed).tolist():
        members = np.flatnonzero(first_codes == code)
        names = [item_name(int(item)) for item in np.sort(generator.permutation(members)[:items_per_code])]
        rows.append({"code": f"<a_{code}>", "num_items": len(members), "items": names})
    return rows


def write_semantic_id_report(
    folder: str | os.PathLike,
    embeddings,
    codes: np.ndarray,
    codebook_sizes: Sequence[int],
    item_name: Callable[[int], str],
) -> None:
    """Writes `code_use.png`, `item_map.png`, `code_samples.json` and `semantic_ids.html`, which shows all three.

    Args:
        embeddings: what was quantized, (N, d). codes: int (N, L).
        item_name: name of the item at a catalogue index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        CODE_USE_FILE: code_use_figure(code_use(codes, codebook_sizes)),
        ITEM_MAP_FILE: item_map_figure(as_points(embeddings).cpu(), codes[:, 0]),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    samples = sample_items(codes[:, 0], item_name)
    (folder / CODE_SAMPLES_FILE).write_text(json.dumps(samples, indent=2) + "\n", encoding="utf-8")
    pictures = "".join(png_image((folder / name).read_bytes(), name.removesuffix(".png")) for name in figures)
    rows = "".join(
        f"<tr><td>{escape(row['code'])}</td><td>{row['num_items']}</td><td>{escape('; '.join(row['items']))}</td></tr>"
        for row in samples
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Semantic IDs</title><style>'
        "body { max-width: 1120px; margin: 32px auto; font: 15px/1.5 system-ui, sans-serif; color: #1d2733; } "
        "img { max-width: 100%; } td, th { padding: 4px 12px 4px 0; text-align: left; vertical-align: top; }"
        f"</style></head><body><h1>Semantic IDs</h1>{pictures}<h2>Some items of some first codes</h2>"
        f"<table><tr><th>first code</th><th>items</th><th>of them</th></tr>{rows}</table></body></html>\n"
    )
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
