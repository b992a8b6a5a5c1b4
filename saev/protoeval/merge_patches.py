"""The patch tables and audits of the report over all results (`merge`)."""

import collections.abc
import logging
import pathlib

import matplotlib.figure
import polars as pl

from saev.formats import manifest, patchresults, results
from saev.protoeval import audit_report, patch_report, report, stats
from saev.report import charts, frame, tables

logger = logging.getLogger("saev")

PAIR = ("baseline_id", "baseline_prototypes", "measure")
FILES = {
    "patches.csv": (patchresults.PATCHES, ()),
    "patch-classes.csv": (patchresults.PATCH_CLASSES, ("class",)),
    "patch-differences.csv": (patchresults.PATCH_DIFFERENCES, PAIR),
    "audit-yields.csv": (patchresults.AUDIT_YIELDS, ("measure",)),
    "audit-differences.csv": (patchresults.PATCH_DIFFERENCES, PAIR),
}
"""Files that are joined: their columns, and those that identify a row of a scorer and a K."""
AUDITS = ("audit-yields.csv", "audit-differences.csv")
GROUP = ("patch_labels", "audit")
"""Rows are comparable if these columns are equal, and PLACE as far as the report separates it."""


def read(dpath: pathlib.Path, about: results.About) -> dict[str, pl.DataFrame]:
    """The files of a results directory that are joined, with the columns `stats.PLACE`, GROUP, scorer_id,
    cls, and baseline_id where there is a baseline.

    Raises:
        UserError: one is missing or was changed.
        ValueError, polars.exceptions.PolarsError: one has other columns.
    """
    if not about.patch_labels:
        if (dpath / "patches.csv").exists():
            text = "left out: %s: an older version wrote it, without the hash of the patch labels. %s"
            logger.warning(text, dpath / "patches.csv", report.AGAIN)
        return {}
    names = [name for name in FILES if about.audit or name not in AUDITS]
    out = {}
    for name, data in manifest.read(dpath, names, report.AGAIN).items():
        found = frame.read_csv(data, FILES[name][0])
        scorers = [about.scorer(name) for name in found["scorer"].unique(maintain_order=True)]
        ids = [(s.name, s.id, str(s.settings.get("cls", s.name))) for s in scorers]
        of = {key: pl.lit(getattr(about, key)) for key in (*stats.PLACE, "patch_labels")}
        of["audit"] = pl.lit(" ".join(map(str, sorted(set(about.audit)))) if name in AUDITS else "")
        columns = dict.fromkeys(("scorer", "scorer_id", "cls"), pl.String)
        out[name] = found.with_columns(**of).join(
            pl.DataFrame(ids, columns, orient="row"), on="scorer", maintain_order="left"
        )
        if "baseline" in found.columns:
            id_of = {baseline: about.scorer(baseline).id for baseline in found["baseline"].unique()}
            baseline_id = pl.col("baseline").replace_strict(id_of, return_dtype=pl.String)
            out[name] = out[name].with_columns(baseline_id=baseline_id)
    return out


def merge(
    found: collections.abc.Sequence[dict[str, pl.DataFrame]], names: pl.DataFrame
) -> dict[str, pl.DataFrame]:
    """Joins what `read` returned, oldest first. If a row was measured twice, the newest counts.

    Args:
        names: the report's scorer of each place and scorer_id.
    """
    out = {}
    for name, (_, key) in FILES.items():
        parts = [each[name] for each in found if name in each]
        if not parts:
            continue
        rows = pl.concat(parts).unique(
            [*stats.PLACE, *GROUP, "scorer_id", "n_prototypes", *key], keep="last", maintain_order=True
        )
        rows = _renamed(rows, names, "scorer", "scorer_id")
        if "baseline" in rows.columns:
            rows = _renamed(rows, names, "baseline", "baseline_id")
        is_constant = pl.col("cls") == results.CONSTANT
        by = [*stats.PLACE, *GROUP, ~is_constant, "scorer", "n_prototypes"]
        out[name] = rows.sort(by, maintain_order=True)
    return out


def _renamed(rows: pl.DataFrame, names: pl.DataFrame, column: str, of: str) -> pl.DataFrame:
    """Replaces the names in a column by the report's, for the ids in the column `of`."""
    names = names.rename({"scorer_id": of, "scorer": "new"})
    found = rows.join(names, on=[*stats.PLACE, of], maintain_order="left")
    return found.with_columns(pl.coalesce("new", column).alias(column)).drop("new")


def write(dpath: pathlib.Path, merged: dict[str, pl.DataFrame], place: collections.abc.Sequence[str]) -> None:
    """Writes the joined files, and deletes those of an older report that are not written."""
    for name, (columns, _) in FILES.items():
        if name not in merged:
            (dpath / name).unlink(missing_ok=True)
            continue
        group = [key for key in GROUP if key != "audit" or name in AUDITS]
        frame.write_csv(dpath / name, merged[name].select(*place, *group, *columns))


def charts_of(
    merged: dict[str, pl.DataFrame],
) -> collections.abc.Iterator[tuple[str, matplotlib.figure.Figure]]:
    """Yields (first digits of the patch labels, chart of the yields against B) of a section."""
    if "audit-yields.csv" not in merged:
        return
    rows = merged["audit-yields.csv"].filter(pl.col("measure") != patchresults.AREA)
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
        against = merged["patch-differences.csv"]
        for (labels,), rows in merged["patches.csv"].group_by("patch_labels", maintain_order=True):
            table = _places(rows, place).hstack(patch_report.summary_table(rows))
            out.append(f"Patch labels {str(labels)[:8]}:\n\n{tables.markdown(table)}")
            shown = {name: patch_report.TITLES[name] for name in patchresults.PATCH_MEASURES[:2]}
            out += _differences(against.filter(patch_labels=labels), shown, place)
        if out:
            out.append(f"{patch_report.DEFINITIONS}\n")
    if "audit-yields.csv" in merged:
        against, audits = merged["audit-differences.csv"], []
        for group, rows in merged["audit-yields.csv"].group_by(GROUP, maintain_order=True):
            labels, numbers = map(str, group)
            audits.append(
                f"Audit of prototypes that image labels propose, by patch labels {labels[:8]}:\n\n"
                f"{tables.markdown(audit_report.yields_table(rows, place))}"
            )
            shown = {name: audit_report.title(name) for name in rows["measure"].unique(maintain_order=True)}
            audits += _differences(against.filter(patch_labels=labels, audit=numbers), shown, place)
        out += [*audits, f"{audit_report.DEFINITIONS}\n"] if audits else []
    return out


def _places(rows: pl.DataFrame, place: dict[str, str]) -> pl.DataFrame:
    """The first columns of a table."""
    return pl.DataFrame({header: tables.texts("{}", rows[key]) for key, header in place.items()})


def _differences(lines: pl.DataFrame, titles: dict[str, str], place: dict[str, str]) -> list[str]:
    """The table of differences, if there are any. titles: measure -> title, of those that are shown."""
    lines = lines.filter(pl.col("measure").is_in(list(titles)))
    if not len(lines):
        return []
    table = _places(lines, place).hstack(patch_report.differences_table(lines, titles))
    return [f"{patch_report.AGAINST}{tables.markdown(table)}"]
