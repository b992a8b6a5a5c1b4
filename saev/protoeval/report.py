"""Tables and chart of a protoeval run."""

import dataclasses
import itertools
import math
import os
import pathlib
import urllib.parse

import beartype
import matplotlib.axes
import matplotlib.figure
import msgspec
import numpy as np

from saev import errors, helpers
from saev.formats import jsonfile, layout, manifest, results
from saev.protoeval import compare, config
from saev.scorers import config as scorers_config

AGAINST = """Less random activations chosen on the same train images, on the same resamples of the test images. Intervals are over test \
images, and over the draws of train images where there are several; not over the prototypes: activations, or an SAE, of another seed would \
give other figures, so compare seeds before one difference is called real."""
AGAIN = "Move that folder away and evaluate again with protoeval.py."
MOST_PANELS, TOO_NEAR = 5, 1.4
"""Panels of the chart in a row; numbers of train images whose labels would lie on each other, as a ratio."""
PROBE_NOTE = """Linear probe: ridge regression on the mean activation, trained on the labels of as many images: a supervised reference, \
no bound where these are few."""


@beartype.beartype
def write(
    dpath: pathlib.Path,
    rows: list[results.Row],
    names: list[str],
    cfgs: list[config.ProtoEval],
    about: results.About,
) -> None:
    """Writes a results directory, each file atomically, the manifest last. names: of the traits."""
    fields = [dataclasses.asdict(cfg) | {"scorer_type": type(cfg.scorer).__name__} for cfg in cfgs]
    helpers.write_text(dpath / "config.json", jsonfile.dumps(fields, indent=4))
    helpers.write_text(dpath / "about.json", jsonfile.dumps(dataclasses.asdict(about), indent=4))
    lines = [results.summary(row) for row in rows]
    kinds = results.by_kind(rows, names)
    differences = compare.differences([row.measured for row in rows])
    results.write_csv(dpath / "summary.csv", results.SUMMARY, lines)
    results.write_csv(dpath / "kinds.csv", results.KIND_COLUMNS, kinds)
    results.write_csv(dpath / "differences.csv", results.DIFFERENCES, differences)
    results.write_resamples(dpath / "resamples.npz", rows)
    results.write_traits(dpath / "traits.parquet", rows, names)
    save(chart([(about, lines)]), dpath / "chart.png")
    tex = layout.latex(layout.table(lines))
    helpers.write_text(dpath / "table.tex", f"% {describe(about)}\n{tex}")
    text = warning(about) + layout.markdown(layout.table(lines)) + _notes(rows, names, about)
    text += (
        f"\nBy kind of trait (number of traits):\n\n{layout.markdown(layout.kinds_table(kinds))}"
    )
    if against := compare.against_baseline(differences):
        cells = layout.differences_table(against)
        text += f"\n{AGAINST}\n\n{layout.markdown(cells)}"
    helpers.write_text(dpath / "table.md", text)
    manifest.write(dpath, results.FILES)


def _notes(rows: list[results.Row], names: list[str], about: results.About) -> str:
    """What the table is of, and what the means leave out."""
    missing = len(names) - len(rows[0].measured_T)
    note = f"\n{describe(about)} mAP is the mean over {len(rows[0].measured_T)} traits; 5% and 95% are quantiles over traits."
    if about.n_boot:
        note += f" Intervals: {about.n_boot:,} bootstrap resamples of the test images."
    if about.n_seeds > 1:
        note += f" Draws: standard deviation over {about.n_seeds} draws of the train images."
    if about.n_zero:
        note += f" {about.n_zero} trait(s) without a positive test image count as AP 0."
    for split, paths in about.left_out.items():
        note += f" {len(paths):,} {split} image(s) are left out, because the dump recorded them as corrupt (about.json names them)."
    if missing:
        note += f" {missing} trait(s) without a positive test image are left out."
    unseen = {row.n_train: int(np.isnan(row.train_ap_RT).any(axis=0).sum()) for row in rows}
    for n_train, n in sorted(unseen.items()):
        if n:
            note += f" With {n_train} train images {n} trait(s) have no positive one (in some draw): prototype 0 is taken for them."
    return f"{note} {PROBE_NOTE}\n\n{settings(about)}"


@beartype.beartype
def warning(about: results.About) -> str:
    """What stands above a table that --force wanted all the same; else empty."""
    return "".join(f"**Forced: {problem}.**\n\n" for problem in about.problems)


@beartype.beartype
def settings(about: results.About) -> str:
    """A line for each scorer: its settings, its checkpoint and what it was fitted on, by the first digits of their hashes."""
    lines = []
    for name, fields in about.scorers.items():
        similarity = fields.get("similarity", "dot" if fields.get("cls") == "Pca" else "")
        said = fields
        if similarity in scorers_config.FORMULAS:
            said = fields | {"similarity": f"{similarity} {scorers_config.FORMULAS[similarity]}"}
        parts = [
            f"{key.replace('_', ' ')} {str(value)[:8] if key in ('ckpt', 'fit') else value}"
            for key, value in said.items()
            if key != "cls"
        ]
        lines.append(f"- {name}: {fields.get('cls', name)}, {', '.join(parts)}\n")
    return "".join(lines)


@beartype.beartype
def describe(about: results.About) -> str:
    """What a table is of, in a sentence."""
    names = " and ".join(about.shards)
    text = f"{about.vit}, layer {about.layer}, {about.tokens}, shards {names}"
    if about.chosen_on:
        text += f"; {about.n_classes} classes, chosen on {about.chosen_on}, measured on {about.measured_on}"
    text += " (splits swapped)" * about.chosen_on.endswith("test images")
    text += f"; certainty from {about.min_certainty}"
    text += ", the last annotation counts" * (about.annotations == "last")
    return f"{text}; seed {about.seed}."


@beartype.beartype
def save(figure: matplotlib.figure.Figure, fpath: pathlib.Path) -> None:
    with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
        figure.savefig(fd, format="png", dpi=150)


@beartype.beartype
def chart(tables: list[tuple[results.About, list[dict]]]) -> matplotlib.figure.Figure:
    """mAP against the number of train images: rows of panels for each table, one panel per scorer, one line per K."""
    names = [
        [n for n in dict.fromkeys(x["scorer"] for x in lines) if not results.is_reference(n)]
        for _, lines in tables
    ]
    n_columns = max(1, *(min(MOST_PANELS, len(mine)) for mine in names))
    n_rows = [max(1, -(-len(mine) // n_columns)) for mine in names]
    size = (3.2 * n_columns + 0.6, 2.9 * sum(n_rows) + 0.3)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    grid = figure.subplots(sum(n_rows), n_columns, sharey=True, squeeze=False)
    places = [(about.vit, f"layer {about.layer}", about.tokens) for about, _ in tables]
    varying = [len(set(column)) > 1 for column in zip(*places, strict=True)]
    for (_, lines), mine, n, place in zip(tables, names, n_rows, places, strict=True):
        panels, grid = grid[:n], grid[n:]
        said = ", ".join(part for part, varies in zip(place, varying, strict=True) if varies)
        for axes, name in itertools.zip_longest(panels.flat, mine):
            if name is None:
                axes.set_axis_off()
                continue
            _panel(axes, name, lines)
            axes.set_title(f"{name}\n{said}".strip(), fontsize=9)
        for axes in panels[:, 0]:
            axes.set_ylabel("mAP on test images")
    figure.axes[0].set_ylim(bottom=0)  # of all panels, once each has its lines
    return figure


def _panel(axes: matplotlib.axes.Axes, name: str, lines: list[dict]) -> None:
    mine = [line for line in lines if line["scorer"] == name]
    for k in sorted({line["n_prototypes"] for line in mine}):
        points = sorted(
            (line["n_train"], line["map"], line["low"], line["high"])
            for line in mine
            if line["n_prototypes"] == k
        )
        n, value, low, high = map(list, zip(*points, strict=True))
        (drawn,) = axes.plot(n, value, marker="o", markersize=4, label=f"{k:,}")
        axes.fill_between(n, low, high, color=drawn.get_color(), alpha=0.12, linewidth=0)
    probe = sorted((x["n_train"], x["map"]) for x in lines if x["scorer"].startswith(results.PROBE))
    if probe:
        axes.plot(*zip(*probe, strict=True), color="0.3", linestyle=":", linewidth=1, label="probe")
    for line in lines:
        if line["scorer"] == results.CONSTANT:
            axes.axhline(line["map"], color="0.5", linestyle="--", linewidth=1, label="constant")
    ticks = sorted({line["n_train"] for line in mine})
    ticks = [n for n, more in itertools.pairwise([*ticks, math.inf]) if more / n > TOO_NEAR]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.set_xlabel("train images")
    if mine:
        axes.legend(title="prototypes", fontsize=7, title_fontsize=7, frameon=False, loc="best")


class Gallery(msgspec.Struct):
    """What a gallery says that it shows."""

    sha256: str
    """Of the SAE's checkpoint."""
    latents: list[int]


@beartype.beartype
def read_gallery(gallery: pathlib.Path) -> Gallery:
    """What visuals.py wrote to gallery.json.

    Raises:
        UserError: there is none, or it is not as it was written.
    """
    fpath = gallery / "gallery.json"
    try:
        return jsonfile.read_sealed(fpath, Gallery, "Run visuals.py again.")
    except (FileNotFoundError, NotADirectoryError) as err:
        raise errors.UserError(
            f"--gallery {gallery}: no gallery.json that names its SAE. Pass a folder that visuals.py wrote."
        ) from err


@beartype.beartype
def link(dpath: pathlib.Path, scorer: str, gallery: pathlib.Path) -> None:
    """Writes traits.md into a results directory: each trait's latent, linked to its place in a gallery that shows it.

    Args:
        scorer: the SAE's name in the table; of its rows the one with most prototypes and train images counts.
    """
    data = manifest.read(dpath, ["traits.parquet"], AGAIN)["traits.parquet"]
    best, shown = results.best_traits(data, scorer), set(read_gallery(gallery).latents)
    index = urllib.parse.quote(os.fsencode(os.path.relpath(gallery / "index.html", dpath)))
    cells = [["Trait", "Latent", "AP on train images", "AP on test images"]]
    for trait in best:
        latent = trait["prototype"]
        where = f"[{latent}]({index}#latent_{latent:06})" if latent in shown else str(latent)
        cells.append([trait["trait"], where, *(f"{trait[k]:.3f}" for k in ("train_ap", "test_ap"))])
    missing = sorted({trait["prototype"] for trait in best} - shown)
    text = f"Best latents of {scorer} with {best[0]['n_train']} train images.\n\n{layout.markdown(cells)}"
    if missing:
        flags = " ".join(map(str, sorted({trait["prototype"] for trait in best})))
        text += f"\n{len(missing)} of them are not in the gallery; visuals.py shows all with --latents {flags}\n"
    helpers.write_text(dpath / "traits.md", text)
