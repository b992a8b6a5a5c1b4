"""Charts, drawn without a display."""

import collections.abc
import functools
import itertools
import math
import typing as tp

import matplotlib
import matplotlib.artist
import matplotlib.axes
import matplotlib.figure
import matplotlib.font_manager
import matplotlib.lines
import matplotlib.patches
import matplotlib.textpath
import matplotlib.ticker
import numpy as np
import polars as pl

from saev.formats import results
from saev.report import figures

MOST_PANELS = 4
"""Most panels in a row of the grid."""
Style = dict[str, tp.Any]
"""Keyword arguments of matplotlib."""
DASHED: Style = {"linestyle": "--", "linewidth": 0.8}
REFERENCES: dict[str, Style] = {
    name: {"color": "0.25", "linestyle": line, "linewidth": 1, "label": f"{name[0].lower()}{name[1:]}"}
    for name, line in zip(results.PROBES, ("-.", ":", (0, (1, 3))), strict=True)
} | {results.CONSTANT: {"color": "0.45", "label": "constant score", **DASHED}}
"""Lines of the probes and of the constant scorer."""
BAND: Style = {"alpha": 0.15, "linewidth": 0}
PLACE = ["vit", "layer", "tokens"]
"""Columns that say where a table's scores are from. Tables of two places are not in one panel."""

_entry = functools.partial(matplotlib.lines.Line2D, [], [])
"""A legend's entry that looks as a line of this style."""


def _looks(names: collections.abc.Iterable[tp.Any]) -> dict[tp.Any, Style]:
    """A colour and a marker for each."""
    each = zip(names, itertools.cycle(figures.COLORS), itertools.cycle(figures.MARKERS), strict=False)
    return {name: {"color": color, "marker": marker} for name, color, marker in each}


def _place(table: pl.DataFrame, varying: list[str]) -> str:
    """Where one panel's table is from, as far as that differs among panels."""
    first = table.row(0, named=True)
    return ", ".join(f"layer {first[key]}" if key == "layer" else first[key] for key in varying)


def _title(axes: matplotlib.axes.Axes, width: float, *lines: str) -> None:
    wrapped = (figures.wrapped(line, width - 0.1, figures.FONT, hyphens=True) for line in lines if line)
    axes.set_title("\n".join(wrapped))


# ---- mAP against train images ----


@figures.styled()
def grid(cells: pl.DataFrame, caption: str) -> matplotlib.figure.Figure:
    """mAP against the number of train images: a panel per scorer, a line per K.

    Each ViT, layer and kind of tokens starts a new row of panels. A K has one colour in all panels.
    """
    tables = cells.partition_by(PLACE, maintain_order=True)
    is_reference = pl.col("cls").is_in(list(results.REFERENCES))
    names = [t.filter(~is_reference)["scorer"].unique(maintain_order=True) for t in tables]
    n_columns = max(1, *(min(MOST_PANELS, len(mine)) for mine in names))
    n_rows = [max(1, -(-len(mine) // n_columns)) for mine in names]
    width = figures.COLUMN if n_columns == 1 else figures.PAGE
    panel = width / n_columns
    height = min(0.85 * panel, 2.2) + 0.35
    figure = matplotlib.figure.Figure(figsize=(width, height * sum(n_rows) + 0.7), layout="constrained")
    axes_RC = figure.subplots(sum(n_rows), n_columns, sharey=True, squeeze=False)
    varying = [key for key in PLACE if cells[key].n_unique() > 1]
    styles = _styles(cells.filter(~is_reference)["n_prototypes"].unique().sort().to_list())
    for table, mine, n in zip(tables, names, n_rows, strict=True):
        panels, axes_RC = axes_RC[:n], axes_RC[n:]
        for axes, name in itertools.zip_longest(panels.flat, mine):
            if name is None:
                axes.set_axis_off()
                continue
            _panel(axes, name, table, styles, panel)
            _title(axes, panel, name, _place(table, varying))
        for axes in panels[:, 0]:
            axes.set_ylabel("mAP on test images")
    figure.axes[0].set_ylim(bottom=0)  # of all panels, once each has its lines
    _legend(figure, _entries(cells, styles))
    figures.caption(figure, caption)
    return figure


def _styles(ks: list[int]) -> dict[int, Style]:
    """The colour, from light to dark, and the marker of each K."""
    colors = matplotlib.colormaps["viridis"](np.linspace(0.75, 0, len(ks)))
    markers = itertools.cycle(figures.MARKERS)
    return {
        k: {"color": tuple(color), "marker": marker}
        for k, color, marker in zip(ks, colors, markers, strict=False)
    }


def _panel(
    axes: matplotlib.axes.Axes, name: str, table: pl.DataFrame, styles: dict[int, Style], width: float
) -> None:
    mine = table.filter(pl.col("scorer") == name).sort("n_prototypes", "n_train")
    for k, line in mine.group_by("n_prototypes", maintain_order=True):
        n, value, low, high = line.select("n_train", "map", "low", "high")
        axes.plot(n, value, **styles[k[0]])
        axes.fill_between(n, low, high, color=styles[k[0]]["color"], **BAND)
    for name in results.PROBES:
        probe = table.filter(pl.col("cls") == name).sort("n_train", "map")
        if len(probe):
            axes.plot(probe["n_train"], probe["map"], **REFERENCES[name])
    for value in table.filter(pl.col("cls") == results.CONSTANT)["map"]:
        axes.axhline(value, **REFERENCES[results.CONSTANT])
    ticks = _apart(mine["n_train"].unique().sort().to_list(), 72 * (width - 0.6))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("train images")


def _apart(ticks: list[int], width: float) -> list[int]:
    """The ticks of a logarithmic axis of `width` points whose labels do not overlap, the largest first."""
    octave = width / max(math.log2(ticks[-1] / ticks[0]), 1)
    kept: list[int] = []
    for n in reversed(ticks):
        labels = 0.6 * figures.SMALL * len(f"{n:,}{max(kept, default=0):,}") / 2 + 3
        if not kept or octave * math.log2(kept[0] / n) > labels:
            kept.insert(0, n)
    return kept


def _entries(cells: pl.DataFrame, styles: dict[int, Style]) -> list[matplotlib.artist.Artist]:
    """The legend's entries."""
    found: list[tp.Any] = [_entry(label=f"K = {k:,}", **style) for k, style in styles.items()]
    found += [_entry(**style) for name, style in REFERENCES.items() if name in cells["cls"]]
    if cells["low"].is_not_nan().any():
        found.append(matplotlib.patches.Patch(color="0.3", label="95% interval", **BAND))
    return found


def _legend(figure: matplotlib.figure.Figure, handles: collections.abc.Sequence[tp.Any]) -> None:
    """One legend above all panels."""
    width, _ = figure.get_size_inches()
    longest = max(len(handle.get_label()) for handle in handles)
    n = int(72 * width / (0.57 * figures.SMALL * longest + 5 * figures.SMALL))
    n_rows = -(-len(handles) // max(1, n))
    figure.legend(handles=handles, loc="outside upper center", ncols=-(-len(handles) // n_rows))


# ---- yields of an audit ----


@figures.styled()
def yields(lines: pl.DataFrame, caption: str) -> matplotlib.figure.Figure:
    """Yield(B) against B: a panel per ViT, layer and kind of tokens, a colour per scorer, its null dashed.

    Args:
        lines: the columns vit, layer, tokens, scorer, n_prototypes, b, value, low, high and null.
    """
    panels = lines.partition_by(PLACE, maintain_order=True)
    n_columns = min(MOST_PANELS, len(panels))
    width = figures.COLUMN if n_columns == 1 else figures.PAGE
    n_rows = -(-len(panels) // n_columns)
    figure = matplotlib.figure.Figure(figsize=(width, 2.4 * n_rows + 0.9), layout="constrained")
    axes_RC = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False)
    looks = _looks(lines.select("scorer", "n_prototypes").unique(maintain_order=True).rows())
    varying = [key for key in PLACE if lines[key].n_unique() > 1]
    for axes, mine in itertools.zip_longest(axes_RC.flat, panels):
        if mine is None:
            axes.set_axis_off()
            continue
        for name, line in mine.group_by("scorer", "n_prototypes", maintain_order=True):
            b, value, low, high, null = line.sort("b").select("b", "value", "low", "high", "null")
            axes.plot(b, value, **looks[name])
            axes.fill_between(b, low, high, color=looks[name]["color"], **BAND)
            axes.plot(b, null, color=looks[name]["color"], **DASHED)
        _title(axes, width / n_columns, _place(mine, varying))
        axes.set_xlabel("first prototypes, B")
        axes.set_ylim(-0.02, 1.02)
    for axes in axes_RC[:, 0]:
        axes.set_ylabel("Yield(B)")
    entries = [_entry(label=f"{scorer}, K = {k:,}", **look) for (scorer, k), look in looks.items()]
    _legend(figure, [*entries, _entry(color="0.4", label="permuted labels", **DASHED)])
    figures.caption(figure, caption)
    return figure


# ---- normalised MSE against L0 ----

FEW = 12
"""A chart of at most this many runs fits the column of a paper."""
MOST_NAMES = 60
"""Of more runs, those on the front are named."""
RADII = (3.0, 8.0, 14.0, 21.0, 30.0, 42.0)
"""Distances of a name from its point, in points, from the nearest. A line joins them beyond the first."""
ANGLES = np.pi / 8 * np.array([0, 8, 2, 6, 14, 10, 4, 12, 1, 7, 15, 9, 3, 5, 13, 11])
"""Directions of a name from its point, in the order in which they are tried."""


@figures.styled()
def front(runs: pl.DataFrame, caption: str) -> matplotlib.figure.Figure:
    """Normalised MSE against L0: a colour per kind of SAE, the front as a line, each point with its run's
    name if there is room for it.

    Args:
        runs: frame with columns run, kind, l0, normalized_mse and is_best, without missing values.
    """
    is_small = len(runs) <= FEW
    size = (figures.COLUMN, 3.0) if is_small else (figures.PAGE, 4.8)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    runs = runs.sort(~pl.col("is_best"), "l0", "normalized_mse", maintain_order=True)
    best = runs.filter("is_best")
    axes.plot(best["l0"], best["normalized_mse"], color="0.75", zorder=1, label="front")
    for kind, look in _looks(runs["kind"].unique().sort()).items():
        mine = runs.filter(pl.col("kind") == kind)
        axes.scatter(mine["l0"], mine["normalized_mse"], label=kind, s=14, linewidth=0, zorder=2, **look)
    axes.set_xscale("log")
    for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    axes.tick_params(axis="x", which="both", length=3, pad=3)
    axes.margins(0.08)
    axes.set_xlabel("L0 (latents that fire per activation)")
    axes.set_ylabel("normalised MSE")
    _legend(figure, axes.get_legend_handles_labels()[0])
    named = runs if len(runs) <= MOST_NAMES else best
    if len(named) < len(runs):
        caption += " Named: runs on the front."
    figures.caption(figure, caption)
    _name(axes, runs, len(named), figures.SMALL if is_small else 5.0)
    return figure


def _name(axes: matplotlib.axes.Axes, runs: pl.DataFrame, n_named: int, size: float) -> None:
    """Writes the names of the first runs where they overlap neither each other nor a point nor the front.

    N things that are drawn, as boxes of (low, high) x (x, y) in points.
    """
    figure = tp.cast(matplotlib.figure.Figure, axes.get_figure())
    figure.draw_without_rendering()  # lays it out
    scale = figure.dpi / 72  # pixels per point
    points = runs.select("l0", "normalized_mse").rows()
    xy_N2 = axes.transData.transform(points) / scale
    inside_22 = axes.get_window_extent().get_points() / scale
    on_line = [np.linspace(a, b, 60) for a, b in itertools.pairwise(xy_N2[: runs["is_best"].sum()])]
    line_N2 = np.concatenate([xy_N2[:0], *on_line])
    low_N2, high_N2 = (np.concatenate([xy_N2 + by * 2.5, line_N2 + by * 0.5]) for by in (-1, 1))
    taken_N22 = np.stack([low_N2, high_N2], axis=1)
    font = matplotlib.font_manager.FontProperties(size=size)
    for i, name in enumerate(runs["run"][:n_named]):
        length, _, _ = matplotlib.textpath.text_to_path.get_text_width_height_descent(name, font, False)
        half_2 = np.array([length / 2 + 1, 0.6 * size])
        found = _room(xy_N2[i], half_2, inside_22, taken_N22)
        if found is None:
            continue
        radius, offset_2 = found
        box_22 = xy_N2[i] + offset_2 + np.stack([-half_2, half_2])
        taken_N22 = np.concatenate([taken_N22, box_22[None]])
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            name,
            points[i],
            tuple(offset_2),
            textcoords="offset points",
            arrowprops=line if radius > RADII[0] else None,
            fontsize=size,
            color="0.25",
            ha="center",
            va="center",
        ).set_in_layout(False)


def _room(
    xy_2: np.ndarray, half_2: np.ndarray, inside_22: np.ndarray, taken_N22: np.ndarray
) -> tuple[float, np.ndarray] | None:
    """The first radius and offset where a box of half this size has room."""
    for radius, angle in itertools.product(RADII, ANGLES):
        offset_2 = np.array([np.cos(angle), np.sin(angle)]) * (radius + half_2)
        low_2, high_2 = xy_2 + offset_2 - half_2, xy_2 + offset_2 + half_2
        is_inside = (low_2 > inside_22[0]).all() and (high_2 < inside_22[1]).all()
        is_apart_N = ((low_2 > taken_N22[:, 1]) | (high_2 < taken_N22[:, 0])).any(axis=1)
        if is_inside and is_apart_N.all():
            return radius, offset_2
    return None


# ---- matches of dictionaries ----

MOST_LINES = 10
"""Most pairs of dictionaries that are drawn one by one; of more, the means by what differs are drawn."""


@figures.styled()
def matched(curve: pl.DataFrame, caption: str) -> matplotlib.figure.Figure:
    """Share of matched latents against the least correlation: a colour per pair, its null dashed.

    Args:
        curve: frame with columns one, two, differ, threshold, share_one, share_two, null_one and null_two.
        caption: says which ViT, layer and n.
    """
    share = curve.with_columns(
        share=pl.mean_horizontal("share_one", "share_two"), null=pl.mean_horizontal("null_one", "null_two")
    )
    keys = ["one", "two"]
    if len(share.unique(keys)) > MOST_LINES:
        keys = ["differ"]
        share = share.group_by(*keys, "threshold", maintain_order=True).agg(pl.col("share", "null").mean())
    figure = matplotlib.figure.Figure(figsize=(figures.PAGE, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, line) in enumerate(share.group_by(*keys, maintain_order=True)):
        line = line.sort("threshold")
        label = f"differ in {name[0]}" if keys == ["differ"] else f"{name[0]} and {name[1]}"
        color = figures.COLORS[i % len(figures.COLORS)]
        axes.plot(line["threshold"], line["share"], label=label, color=color, linewidth=1.6)
        axes.plot(line["threshold"], line["null"], color=color, linewidth=1, linestyle="--")
    axes.plot([], [], color="0.4", linestyle="--", linewidth=1, label="images permuted (null)")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("correlation of a mutual match, at least")
    axes.set_ylabel("share of live latents (mean of both sides)")
    axes.legend()
    figures.caption(figure, caption)
    return figure
