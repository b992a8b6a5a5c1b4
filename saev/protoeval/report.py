"""Table, CSV and chart of a protoeval run."""

import dataclasses
import json
import pathlib

import beartype
import matplotlib.figure
import numpy as np

from saev import helpers
from saev.formats import results
from saev.protoeval import config


@beartype.beartype
def write(
    dpath: pathlib.Path,
    rows: list[results.Row],
    names: list[str],
    cfgs: list[config.ProtoEval],
    what: str,
) -> None:
    """Writes config.json, summary.csv, traits.csv, chart.png and table.md into `dpath`, each atomically, the table last.

    names: of the traits. what: a sentence that says what the table is of.
    """
    fields = [dataclasses.asdict(cfg) | {"scorer_type": type(cfg.scorer).__name__} for cfg in cfgs]
    helpers.write_text(dpath / "config.json", json.dumps(fields, indent=4))
    results.write_csv(dpath / "summary.csv", results.SUMMARY, map(results.summary, rows))
    lines = (line for row in rows for line in results.trait_lines(row, names))
    results.write_csv(dpath / "traits.csv", results.TRAITS, lines)
    with helpers.atomic(dpath / "chart.png") as tmp_fpath:
        chart(rows).savefig(tmp_fpath, format="png", dpi=150)
    helpers.write_text(dpath / "table.md", results.markdown(rows) + _notes(rows, names, what))


def _notes(rows: list[results.Row], names: list[str], what: str) -> str:
    """What the table is of, and what the means leave out."""
    missing = len(names) - len(rows[0].measured_T)
    note = f"\n{what} mAP is the mean over {len(rows[0].measured_T)} traits; 5% and 95% are quantiles over traits."
    if missing:
        note += f" {missing} trait(s) without a positive test image are left out."
    unseen = {row.n_train: int(np.isnan(row.train_ap_RT).any(axis=0).sum()) for row in rows}
    for n_train, n in sorted(unseen.items()):
        if n:
            note += f" With {n_train} train images {n} trait(s) have no positive one: prototype 0 is taken for them."
    return note + "\n"


@beartype.beartype
def chart(rows: list[results.Row]) -> matplotlib.figure.Figure:
    """mAP against the number of train images: one panel per scorer, one line per number of prototypes."""
    constant, *others = rows
    measured = [row for row in others if row.scorer != "Linear probe"]
    names = list(dict.fromkeys(row.scorer for row in measured))
    figure = matplotlib.figure.Figure(figsize=(3.2 * len(names) + 0.6, 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _panel(axes, name, [row for row in measured if row.scorer == name], constant)
    panels[0].set_ylabel("mAP on test images")
    panels[0].set_ylim(bottom=0)  # of all panels, once each has its lines
    return figure


def _panel(
    axes: matplotlib.axes.Axes, name: str, rows: list[results.Row], constant: results.Row
) -> None:
    for k in sorted({row.n_prototypes for row in rows}):
        line = sorted((row.n_train, row.mean_ap) for row in rows if row.n_prototypes == k)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=f"{k:,}")
    axes.axhline(constant.mean_ap, color="0.5", linestyle="--", linewidth=1, label="constant")
    ticks = sorted({row.n_train for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("train images")
    axes.legend(title="prototypes", fontsize=7, title_fontsize=7, frameon=False, loc="lower left")
