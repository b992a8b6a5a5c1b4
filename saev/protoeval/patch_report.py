"""The files of the patch table. docs/results.md lists them.

C classes, M: all test images, then resamples of them.
"""

import collections.abc
import itertools
import pathlib

import polars as pl

from saev import helpers
from saev.formats import patchresults, results
from saev.report import frame, tables

TITLES = {
    "probe_r": "Probe R",
    "map": "Patch mAP",
    "purity": f"Purity@{patchresults.PURITY_FIRST}",
    "coverage": f"Coverage@{patchresults.TAU}",
}
DEFINITIONS = (
    f"Probe R: 1 - loss / loss of the class's share in the train patches. Purity: share of the class in the "
    f"{patchresults.PURITY_FIRST} patches with the highest scores. Coverage: share of classes with an AP of "
    f"at least {patchresults.TAU}. Permuted labels: the prototypes are chosen on a permutation of the train "
    "patches' labels."
)
"""What the columns of the table mean."""
AGAINST = (
    "Difference from random activations (paired bootstrap over the test images). It does not include the "
    "variation of prototypes: random activations or an SAE with another seed give other numbers.\n\n"
)


def write(dpath: pathlib.Path, table: patchresults.PatchTable, about: results.About) -> None:
    """Writes PATCH_FILES into a results directory."""
    rows, against = summary(table.rows), differences(table.rows, about)
    frame.write_csv(dpath / "patches.csv", rows)
    frame.write_csv(dpath / "patch-classes.csv", classes(table))
    frame.write_csv(dpath / "patch-differences.csv", against)
    text = f"Patch labels:\n\n{tables.markdown(summary_table(rows))}\n{_note(table, about)}\n"
    if len(against):
        shown = {name: TITLES[name] for name in patchresults.PATCH_MEASURES[:2]}
        text += f"\n{AGAINST}{tables.markdown(differences_table(against, shown))}"
    helpers.write_text(dpath / "patches.md", text)


def summary(rows: collections.abc.Sequence[patchresults.PatchRow]) -> pl.DataFrame:
    """The frame of patches.csv."""
    lines = []
    for row in rows:
        n_classes = int((row.ap_CM[:, 0] >= 0).sum())
        found = (
            results.measured(row.means_M(name), name != "probe_r") for name in patchresults.PATCH_MEASURES
        )
        lines.append((row.scorer, row.n_prototypes, n_classes, *itertools.chain(*found)))
    return pl.DataFrame(lines, patchresults.PATCHES, orient="row")


def classes(table: patchresults.PatchTable) -> pl.DataFrame:
    """The frame of patch-classes.csv."""
    lines = [
        (
            *(row.scorer, row.n_prototypes, helpers.printable(name), int(table.n_train_C[c])),
            *(int(table.n_test_C[c]), int(row.best_C[c]), float(row.w_C[c]), float(row.b_C[c])),
            *(float(row.train_r_C[c]), *(float(x_CM[c, 0]) for x_CM in (row.r_CM, row.ap_CM, row.purity_CM))),
        )
        for row in table.rows
        for c, name in enumerate(table.names)
    ]
    return pl.DataFrame(lines, patchresults.PATCH_CLASSES, orient="row")


def differences(
    rows: collections.abc.Sequence[patchresults.PatchRow] | collections.abc.Sequence[patchresults.AuditRow],
    about: results.About,
    measures: collections.abc.Sequence[str] = patchresults.PATCH_MEASURES,
    any_k: bool = False,
) -> pl.DataFrame:
    """The frame of patch-differences.csv or audit-differences.csv: scorers minus random
    activations, at equal K, else at the baseline's largest smaller K. any_k: at the baseline's largest K."""
    cls_of = {name: settings.get("cls") for name, settings in about.scorers.items()}
    bases = [row for row in rows if cls_of.get(row.scorer) == results.BASELINE]
    lines = []
    for row in rows:
        smaller = [base for base in bases if base.n_prototypes <= row.n_prototypes or any_k]
        if cls_of.get(row.scorer, results.BASELINE) == results.BASELINE or not smaller:
            continue
        base = max(smaller, key=lambda base: base.n_prototypes)
        for name in measures:
            gap_M = row.means_M(name) - base.means_M(name)
            value, low, high = results.measured(gap_M, is_share=False)
            line = (row.scorer, row.n_prototypes, base.scorer, base.n_prototypes, name, value, low, high)
            lines.append((*line, low > 0 or high < 0))
    return pl.DataFrame(lines, patchresults.PATCH_DIFFERENCES, orient="row")


def summary_table(lines: pl.DataFrame) -> pl.DataFrame:
    table = {"Scorer": lines["scorer"].to_list(), "Prototypes": tables.texts("{:,}", lines["n_prototypes"])}
    has_intervals = lines["map_low"].is_not_nan().any()
    form = "{:.3f} ({:.3f} to {:.3f})" if has_intervals else "{:.3f}"
    for name, title in TITLES.items():
        table[title] = tables.texts(form, *(lines[name + end] for end in ("", "_low", "_high")))
    return pl.DataFrame(table)


def differences_table(lines: pl.DataFrame, titles: dict[str, str]) -> pl.DataFrame:
    """titles: measure -> title, of those that are shown. patch-differences.csv has all."""
    lines = lines.filter(pl.col("measure").is_in(list(titles)))
    return pl.DataFrame(
        {
            "Scorer": lines["scorer"].to_list(),
            "Prototypes": tables.texts("{:,}", lines["n_prototypes"]),
            "Baseline": lines["baseline"].to_list(),
            "Baseline prototypes": tables.texts("{:,}", lines["baseline_prototypes"]),
            "Measure": [titles[name] for name in lines["measure"]],
            "Difference": tables.texts("{:+.3f}", lines["difference"]),
            "95% interval": tables.texts("{:+.3f} to {:+.3f}", lines["low"], lines["high"]),
            "": ["excludes 0" if excludes else "" for excludes in lines["excludes_zero"]],
        }
    )


def _note(table: patchresults.PatchTable, about: results.About) -> str:
    n_used = int(((table.n_train_C > 0) & (table.n_test_C > 0)).sum())
    note = "For each class of patches, the prototype with the lowest logistic loss on "
    note += f"{table.n_train_C.sum():,} patches of {about.chosen_on}, measured on "
    note += f"{table.n_test_C.sum():,} patches of {about.measured_on}. Means over {n_used} classes"
    if left_out := len(table.names) - n_used:
        note += f"; {left_out} without a train or a test patch are left out"
    note += f". {DEFINITIONS}"
    if about.n_boot:
        note += f" In brackets: 95% intervals from {about.n_boot:,} bootstrap resamples of the test images."
    return note
