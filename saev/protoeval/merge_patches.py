"""The patch tables and audits of the report over all results (`merge`)."""

import collections.abc
import logging
import pathlib

import matplotlib.figure
import polars as pl

from saev.formats import manifest, results
from saev.protoeval import audit_report, patch_report, report, stats
from saev.report import charts, frame, tables

logger = logging.getLogger("saev")

KEYS = {"patches.csv": (), "patch-classes.csv": ("class",), "audit-yields.csv": ("measure",)}
"""Files that are joined, and the columns that identify a row of a scorer and a K."""
COLUMNS = {
    "patches.csv": results.PATCHES,
    "patch-classes.csv": results.PATCH_CLASSES,
    "audit-yields.csv": results.AUDIT_YIELDS,
}
GROUP = ("patch_labels", "audit")
"""Rows are comparable if these columns are equal, and PLACE as far as the report separates it."""


def read(dpath: pathlib.Path, about: results.About) -> dict[str, pl.DataFrame]:
    """The files of a results directory that are joined, with the columns `stats.PLACE`, GROUP, scorer_id and
    cls.

    Raises:
        UserError: one is missing or was changed.
        ValueError, polars.exceptions.PolarsError: one has other columns.
    """
    if not about.patch_labels:
        if (dpath / "patches.csv").exists():
            text = "left out: %s: an older version wrote it, without the hash of the labels of patches. %s"
            logger.warning(text, dpath / "patches.csv", report.AGAIN)
        return {}
    names = [name for name in KEYS if about.audit or name != "audit-yields.csv"]
    out = {}
    for name, data in manifest.read(dpath, names, report.AGAIN).items():
        found = frame.read_csv(data, COLUMNS[name])
        scorers = [about.scorer(name) for name in found["scorer"].unique(maintain_order=True)]
        ids = [(s.name, s.id, str(s.settings.get("cls", s.name))) for s in scorers]
        of = {key: pl.lit(getattr(about, key)) for key in (*stats.PLACE, "patch_labels")}
        of["audit"] = pl.lit(
            " ".join(map(str, sorted(set(about.audit)))) if name == "audit-yields.csv" else ""
        )
        columns = dict.fromkeys(("scorer", "scorer_id", "cls"), pl.String)
        out[name] = found.with_columns(**of).join(
            pl.DataFrame(ids, columns, orient="row"), on="scorer", maintain_order="left"
        )
    return out


def merge(
    found: collections.abc.Sequence[dict[str, pl.DataFrame]], names: pl.DataFrame
) -> dict[str, pl.DataFrame]:
    """Joins what `read` returned, oldest first. If a row was measured twice, the newest counts.

    Args:
        names: the report's scorer of each place and scorer_id.
    """
    out = {}
    for name, key in KEYS.items():
        parts = [each[name] for each in found if name in each]
        if not parts:
            continue
        rows = pl.concat(parts).unique(
            [*stats.PLACE, *GROUP, "scorer_id", "n_prototypes", *key], keep="last", maintain_order=True
        )
        on = [*stats.PLACE, "scorer_id"]
        rows = rows.rename({"scorer": "own"}).join(names, on=on, maintain_order="left")
        rows = rows.with_columns(scorer=pl.coalesce("scorer", "own"))
        is_constant = pl.col("cls") == results.CONSTANT
        by = [*stats.PLACE, *GROUP, ~is_constant, "scorer", "n_prototypes"]
        out[name] = rows.sort(by, maintain_order=True)
    return out


def write(dpath: pathlib.Path, merged: dict[str, pl.DataFrame], place: collections.abc.Sequence[str]) -> None:
    """Writes the joined files, and deletes those of an older report that are not written."""
    for name in KEYS:
        if name not in merged:
            (dpath / name).unlink(missing_ok=True)
            continue
        group = [key for key in GROUP if key != "audit" or name == "audit-yields.csv"]
        frame.write_csv(dpath / name, merged[name].select(*place, *group, *COLUMNS[name]))


def charts_of(
    merged: dict[str, pl.DataFrame],
) -> collections.abc.Iterator[tuple[str, matplotlib.figure.Figure]]:
    """Yields (first digits of the labels of patches, chart of the yields against B) of a section."""
    if "audit-yields.csv" not in merged:
        return
    rows = merged["audit-yields.csv"].filter(pl.col("measure") != results.AREA)
    # a yield does not depend on the other numbers B
    rows = rows.unique(
        [*stats.PLACE, "patch_labels", "scorer_id", "n_prototypes", "measure"], maintain_order=True
    )
    rows = rows.with_columns(b=pl.col("measure").cast(pl.Int64))
    for (labels,), lines in rows.group_by("patch_labels", maintain_order=True):
        caption = (
            f"{tables.where(lines)}. {audit_report.YIELD} Dashed: mean over permutations of the image labels."
        )
        if lines["low"].is_not_nan().any():
            caption += " Shaded: 95% bootstrap interval over the test images."
        yield str(labels)[:8], charts.yields(lines, caption)


def text(merged: dict[str, pl.DataFrame], place: dict[str, str]) -> list[str]:
    """The parts of a section of table.md.

    Args:
        merged: rows of the section.
        place: columns that distinguish results, and their headers.
    """
    out = []
    if "patches.csv" in merged:
        for (labels,), rows in merged["patches.csv"].group_by("patch_labels", maintain_order=True):
            first = {header: tables.texts("{}", rows[key]) for key, header in place.items()}
            table = pl.DataFrame(first).hstack(patch_report.summary_table(rows))
            out.append(f"Labels of patches {str(labels)[:8]}:\n\n{tables.markdown(table)}")
        if out:
            out.append(f"{patch_report.DEFINITIONS}\n")
    if "audit-yields.csv" in merged:
        audits = merged["audit-yields.csv"].group_by(GROUP, maintain_order=True)
        shown = [
            f"Audit of prototypes that image labels propose, by labels of patches {str(labels)[:8]}:\n\n"
            f"{tables.markdown(audit_report.yields_table(rows, place))}"
            for (labels, _), rows in audits
        ]
        out += [*shown, f"{audit_report.DEFINITIONS}\n"] if shown else []
    return out
