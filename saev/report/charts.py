"""Charts, drawn without a display."""

import itertools
import math
import pathlib

import matplotlib.axes
import matplotlib.figure
import polars as pl

from saev import helpers
from saev.formats import results

MOST_PANELS = 5
"""Most panels in a row of the grid."""
TOO_NEAR = 1.4
"""Tick labels would overlap if neighbouring numbers of train images have a smaller ratio."""
PLACES = [(5, 4, "left"), (-5, -9, "right"), (5, -9, "left"), (-5, 4, "right")]
"""Positions of a point's name (dx, dy, alignment), in turn."""


def save(figure: matplotlib.figure.Figure, fpath: pathlib.Path) -> None:
    with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
        figure.savefig(fd, format="png", dpi=150)


def grid(cells: pl.DataFrame) -> matplotlib.figure.Figure:
    """mAP against the number of train images: a panel per scorer, a line per K.

    Each ViT, layer and kind of tokens starts a new row of panels.
    """
    place = ["vit", "layer", "tokens"]
    tables = cells.partition_by(place, maintain_order=True)
    is_reference = pl.col("cls").is_in(list(results.REFERENCES))
    names = [t.filter(~is_reference)["scorer"].unique(maintain_order=True) for t in tables]
    n_columns = max(1, *(min(MOST_PANELS, len(mine)) for mine in names))
    n_rows = [max(1, -(-len(mine) // n_columns)) for mine in names]
    size = (3.2 * n_columns + 0.6, 2.9 * sum(n_rows) + 0.3)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes_RC = figure.subplots(sum(n_rows), n_columns, sharey=True, squeeze=False)
    varying = [key for key in place if cells[key].n_unique() > 1]
    for table, mine, n in zip(tables, names, n_rows, strict=True):
        panels, axes_RC = axes_RC[:n], axes_RC[n:]
        first = table.row(0, named=True)
        where = ", ".join(f"layer {first[key]}" if key == "layer" else first[key] for key in varying)
        for axes, name in itertools.zip_longest(panels.flat, mine):
            if name is None:
                axes.set_axis_off()
                continue
            _panel(axes, name, table)
            axes.set_title(f"{name}\n{where}".strip(), fontsize=9, parse_math=False)
        for axes in panels[:, 0]:
            axes.set_ylabel("mAP on test images")
    figure.axes[0].set_ylim(bottom=0)  # of all panels, once each has its lines
    return figure


def _panel(axes: matplotlib.axes.Axes, name: str, table: pl.DataFrame) -> None:
    mine = table.filter(pl.col("scorer") == name).sort("n_prototypes", "n_train")
    for k, line in mine.group_by("n_prototypes", maintain_order=True):
        n, value, low, high = line.select("n_train", "map", "low", "high")
        (drawn,) = axes.plot(n, value, marker="o", markersize=4, label=f"{k[0]:,}")
        axes.fill_between(n, low, high, color=drawn.get_color(), alpha=0.12, linewidth=0)
    for _, probe in table.filter(pl.col("cls") == results.PROBE).group_by("cls"):
        probe = probe.sort("n_train", "map")
        style = {"color": "0.3", "linestyle": ":", "linewidth": 1}
        axes.plot(probe["n_train"], probe["map"], label="probe", **style)
    for value in table.filter(pl.col("cls") == results.CONSTANT)["map"]:
        axes.axhline(value, color="0.5", linestyle="--", linewidth=1, label="constant")
    ticks = mine["n_train"].unique().sort().to_list()
    ticks = [n for n, more in itertools.pairwise([*ticks, math.inf]) if more / n > TOO_NEAR]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.set_xlabel("train images")
    axes.legend(title="prototypes", fontsize=7, title_fontsize=7, frameon=False, loc="best")


def front(runs: pl.DataFrame) -> matplotlib.figure.Figure:
    """Normalised MSE against L0: a colour per kind of SAE, the front as a line, each point with its run's
    name.

    Args:
        runs: frame with columns run, kind, l0, normalized_mse and is_best, without missing values.
    """
    runs = runs.sort("l0", "normalized_mse", maintain_order=True)
    figure = matplotlib.figure.Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    best = runs.filter("is_best")
    axes.plot(best["l0"], best["normalized_mse"], color="0.8", zorder=1, label="front")
    for i, kind in enumerate(runs["kind"].unique().sort()):
        mine = runs.filter(pl.col("kind") == kind)
        style = {"color": f"C{i % 10}", "marker": "osD^vP*X"[i % 8], "zorder": 2}
        axes.scatter(mine["l0"], mine["normalized_mse"], label=kind, **style)
    axes.set_xscale("log")
    size = max(4.0, 8.0 - len(runs) / 10)
    for i, (name, x, y) in enumerate(runs.select("run", "l0", "normalized_mse").iter_rows()):
        dx, dy, side = PLACES[i % 4]
        style = {"ha": side, "fontsize": size, "color": "0.35", "parse_math": False}
        axes.annotate(name, (x, y), xytext=(dx, dy), textcoords="offset points", **style)
    axes.set_xlabel("L0 (latents that fire per activation)")
    axes.set_ylabel("normalised MSE")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


MOST_LINES = 10
"""Most pairs of dictionaries that are drawn one by one; of more, the means by what differs are drawn."""


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
    figure = matplotlib.figure.Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, line) in enumerate(share.group_by(*keys, maintain_order=True)):
        line = line.sort("threshold")
        label = f"differ in {name[0]}" if keys == ["differ"] else f"{name[0]} and {name[1]}"
        color = f"C{i % 10}"
        axes.plot(line["threshold"], line["share"], label=label, color=color, linewidth=1.6)
        axes.plot(line["threshold"], line["null"], color=color, linewidth=1, linestyle="--")
    axes.plot([], [], color="0.4", linestyle="--", linewidth=1, label="images permuted (null)")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("correlation of a mutual match, at least")
    axes.set_ylabel("share of live latents (mean of both sides)")
    axes.set_title(caption, fontsize=8, wrap=True, parse_math=False)
    axes.grid(alpha=0.25)
    for text in axes.legend(fontsize=7, frameon=False).get_texts():
        text.set_parse_math(False)
    return figure
