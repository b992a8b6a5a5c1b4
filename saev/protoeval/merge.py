"""Merges all results below a folder into one report: tables over ViTs, layers and scorers."""

import collections.abc
import dataclasses
import logging
import pathlib

import numpy as np
import polars as pl

from saev import errors, helpers
from saev.formats import jsonfile, manifest, results
from saev.protoeval import merge_patches, report, stats
from saev.report import charts, figures, frame, tables

logger = logging.getLogger("saev")

LEGEND = (
    "mAP: mean over traits with a positive test image (table.csv has their number). Interval: 95% bootstrap "
    "interval over test images. 5% and 95% are quantiles over traits."
)
OVER_SEEDS = (
    "Mean and standard deviation over seeds of the mAP, and of its difference from random activations with "
    "the same seed. The seed decides random activations, the start of k-means, and the draws of train images."
)
PLACE = ("vit", "layer", "tokens", "labels", "min_certainty")
"""The first columns of the report's CSV files."""
SCORER = [*stats.PLACE, "scorer_id"]
CELL = [*SCORER, "n_prototypes", "n_train"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One results directory."""

    dpath: pathlib.Path
    about: results.About
    cells: pl.DataFrame
    kinds: pl.DataFrame
    traits: pl.DataFrame
    boots: list[np.ndarray]
    """mAPs (draws, resamples) of each row of `cells`."""
    patches: dict[str, pl.DataFrame]
    """The files of `merge_patches`."""


@dataclasses.dataclass(frozen=True)
class Merged:
    """All results, merged."""

    abouts: list[results.About]
    """Of results with a cell in the report, in its order."""
    cells: pl.DataFrame
    kinds: pl.DataFrame
    differences: pl.DataFrame
    seeds: pl.DataFrame
    drawn: pl.DataFrame
    """Means over seeds, for charts."""
    traits: pl.DataFrame
    patches: dict[str, pl.DataFrame]
    """The patch tables and audits, by name of the file."""
    older: list[str]
    """Directory names of cells that newer ones replaced."""

    def section(self, labels: str, certainty: int) -> "Merged":
        """The part measured on these labels. Other parts are not comparable with it."""
        here = pl.col("labels") == labels, pl.col("min_certainty") == certainty
        abouts = [a for a in self.abouts if (a.labels, a.min_certainty) == (labels, certainty)]
        frames = {
            name: value.filter(*here) for name, value in vars(self).items() if isinstance(value, pl.DataFrame)
        }
        patches = {name: value.filter(*here) for name, value in self.patches.items()}
        return dataclasses.replace(self, abouts=abouts, patches=patches, **frames)


def write(root: pathlib.Path, plot: str = "") -> pathlib.Path:
    """Writes a report over all results to `root`/report (docs/results.md) and returns that folder.

    If a cell was evaluated twice, the newest result counts. Cells are equal if ViT, layer, tokens,
    activations, labels, certainty, scorer (settings, checkpoint and fit data), numbers of prototypes and
    train images, and seed are equal. Results on other labels get separate tables. Directories that cannot be
    read are left out, with a warning. Differences are computed between cells with the same resamples (--seed,
    --n-boot) and the same number of draws.

    Args:
        plot: also write the chart to this file. The charts of several sections add what they are named after.

    Raises:
        UserError: there are no results below `root`.
    """
    found = read_all(root)
    if not found:
        single = " It is itself a result: pass the folder above it." * (root / "about.json").exists()
        raise errors.UserError(
            f"--report {root}: holds no results. Pass the folder that protoeval.py wrote to "
            f"(--dump-to).{single}"
        )
    out, merged = root / "report", merge(found)
    sections = merged.cells.select("labels", "min_certainty").unique(maintain_order=True).rows()
    text, tex, fpaths = [], [], []
    for labels, certainty in sections:
        part = merged.section(labels, certainty)
        sources = {about.source for about in part.abouts if about.source}
        said = "; ".join(sorted(sources)) or f"certainty from {certainty}"
        where = f"labels {labels[:8]}, {said}"
        # columns (and their headers) that distinguish the results
        tokens = {"tokens": "Tokens"} if part.cells["tokens"].n_unique() > 1 else {}
        place = {"vit": "ViT", "layer": "Layer"} | tokens
        table = report.summary_table(part.cells, place)
        text += [f"{where[0].upper()}{where[1:]}:\n", *_text(part, table, place)]
        text += merge_patches.text(part.patches, place)
        tex.append(f"% {where}\n{tables.latex(table)}")
        of = "" if len(sections) == 1 else f"-{labels[:8]}-{certainty}"
        fpaths += _draw(part, out, of, plot)
    if merged.older:
        names = ", ".join(sorted(set(merged.older)))
        text.append(f"{len(merged.older)} older cells were replaced by newer ones (of {names}).\n")
    for fpath in [*out.glob("chart*.png"), *out.glob("yields*.png")]:  # of an older report
        if fpath not in fpaths:
            fpath.unlink()
    frame.write_csv(out / "table.csv", merged.cells.select(*PLACE, *results.SUMMARY))
    frame.write_csv(out / "differences.csv", merged.differences.select(*PLACE, *results.DIFFERENCES))
    frame.write_csv(out / "seeds.csv", merged.seeds.select(*PLACE, *results.SEEDS))
    frame.write_parquet(out / "traits.parquet", merged.traits)
    merge_patches.write(out, merged.patches, PLACE)
    helpers.write_text(out / "table.tex", "\n".join(tex))
    helpers.write_text(out / "table.md", "\n".join(text))
    return out


def _draw(part: Merged, dpath: pathlib.Path, of: str, plot: str) -> list[pathlib.Path]:
    """Saves a section's charts in a folder, and returns their files. of: what they are named after."""
    chart = charts.grid(part.drawn, report.caption(part.cells, part.abouts))
    drawn = {dpath / f"chart{of}.png": chart}
    for patch_labels, figure in merge_patches.charts_of(part.patches):
        drawn[dpath / f"yields{of}-{patch_labels}.png"] = figure
    for fpath, figure in drawn.items():
        figures.save(figure, fpath)
    if plot:
        fpath = pathlib.Path(plot)
        figures.save(chart, fpath.with_name(f"{fpath.stem}{of}{fpath.suffix}"))
    return list(drawn)


def _text(part: Merged, table: pl.DataFrame, place: dict[str, str]) -> list[str]:
    """A section of table.md."""
    text = [w for w in dict.fromkeys(map(report.warning, part.abouts)) if w]
    text += [tables.markdown(table), *report.sections(part.kinds, part.differences, place)]
    if len(part.seeds):
        text += [f"{OVER_SEEDS}\n", tables.markdown(report.seeds_table(part.seeds, place))]
    notes = [
        f"{report.describe(about)} {about.n_seeds} draw(s), {about.n_boot:,} resamples.\n\n"
        f"{report.settings(about)}"
        for about in part.abouts
    ]
    return [*text, f"{LEGEND} {report.reference_notes(part.cells)}\n", *dict.fromkeys(notes)]


# ---- reading ----


def read_all(root: pathlib.Path) -> list[Result]:
    """Complete results directories below `root`, at any depth but not in hidden folders, oldest first."""
    out = []
    for fpath in sorted(root.glob("**/*/about.json")):
        if any(part.startswith(".") for part in fpath.relative_to(root).parts):
            continue
        try:
            out.append(_read(fpath.parent))
        except (OSError, errors.UserError) as err:
            logger.warning("left out: %s", errors.first_line(err))
    return sorted(out, key=lambda result: result.about.created)


def _read(dpath: pathlib.Path) -> Result:
    files = manifest.read(dpath, results.FILES, report.AGAIN)
    about = jsonfile.parse(files["about.json"], results.About, str(dpath / "about.json"), report.AGAIN)
    try:
        summary = frame.read_csv(files["summary.csv"], results.SUMMARY)
        kinds = frame.read_csv(files["kinds.csv"], results.KIND_COLUMNS)
        columns = [name for name in results.TRAITS if name != "scorer_id"]  # older results have none
        traits = pl.read_parquet(files["traits.parquet"]).select(columns)
        key = [*results.CELL, "draw", "trait"]
        traits = traits.unique(key, keep="last", maintain_order=True)
        boots = results.read_resamples(files["resamples.npz"], len(summary))
        patches = merge_patches.read(dpath, about)
    except errors.UserError:
        raise
    except Exception as err:  # another version's columns, or files made to look like ours
        raise errors.UserError(f"{dpath}: cannot be read ({errors.first_line(err)}). {report.AGAIN}") from err
    cells = stats.cells(summary, about)
    ids = cells.select("scorer", *SCORER).unique()
    kinds = kinds.join(ids, on="scorer", maintain_order="left")
    return Result(dpath, about, cells, kinds, traits, boots, patches)


# ---- joining ----


def merge(found: list[Result]) -> Merged:
    """Merges results. found: oldest first."""
    cells, replaced = _newest(_concat(found, [result.cells for result in found]), CELL)
    cells = cells.join(_names(cells, found), on=SCORER, maintain_order="left")
    cells = cells.rename({"scorer": "own_name", "new_name": "scorer"})
    kinds, _ = _newest(_concat(found, [result.kinds for result in found]), [*CELL, "kind"])
    names = cells.select(*SCORER, "scorer").unique()
    kinds = kinds.drop("scorer").join(names, on=SCORER, maintain_order="left")
    boots = [boot_RM for result in found for boot_RM in result.boots]
    seedless = cells.with_columns(scorer="family_name")
    means = pl.col("map", "low", "high").mean()
    drawn = (
        seedless.filter(stats.IS_SINGLE)
        .group_by(*stats.PLACE, "cls", "family", *results.CELL, maintain_order=True)
        .agg(means)
    )
    by_place = cells.sort(stats.PLACE, maintain_order=True)
    return Merged(
        abouts=[found[i].about for i in by_place["result"].unique(maintain_order=True)],
        cells=stats.in_order(cells),
        kinds=kinds.filter(stats.largest(*SCORER)).sort(stats.PLACE, maintain_order=True),
        differences=stats.in_order(stats.differences(cells, boots)),
        seeds=stats.over_seeds(seedless),
        drawn=stats.in_order(drawn),
        traits=_traits(cells, found),
        patches=merge_patches.merge([result.patches for result in found], names),
        older=[found[i].dpath.name for i in replaced],
    )


def _concat(found: list[Result], frames: list[pl.DataFrame]) -> pl.DataFrame:
    """Concatenates a frame per result. Adds `result`, its number. `row` then counts over all results."""
    starts = np.cumsum([0, *(len(result.boots) for result in found)]).tolist()
    return pl.concat(
        part.with_columns(pl.col("^row$") + start, result=pl.lit(i))
        for i, (part, start) in enumerate(zip(frames, starts, strict=False))
    )


def _newest(rows: pl.DataFrame, key: list[str]) -> tuple[pl.DataFrame, list[int]]:
    """(the last row of each key, in order of the keys' first occurrence; the results of the other rows)."""
    order = pl.col("order")
    rows = rows.with_row_index("order").with_columns(first=order.min().over(key))
    is_last = order == order.max().over(key)
    older = rows.filter(~is_last)["result"].to_list()
    return rows.filter(is_last).sort("first").drop("first", "order"), older


def _names(cells: pl.DataFrame, found: list[Result]) -> pl.DataFrame:
    """Distinct names for the scorers of a place: new_name, and family_name for all seeds of a scorer."""
    lines = []
    for place, mine in cells.group_by(stats.PLACE, maintain_order=True):
        rows = mine.select("scorer", "result").iter_rows()
        scorers = {s.id: s for s in (found[i].about.scorer(name) for name, i in rows)}.values()
        names, families = _distinct_names(scorers), _distinct_names([s.seedless for s in scorers])
        lines += [(*place, s.id, names[s.id], families[s.seedless.id]) for s in scorers]
    columns = {key: cells.schema[key] for key in SCORER}
    return pl.DataFrame(lines, columns | {"new_name": pl.String, "family_name": pl.String}, orient="row")


def _distinct_names(scorers: collections.abc.Iterable[results.ScorerId]) -> dict[str, str]:
    """Id -> name. Scorers with the same name get the settings in which they differ (8 digits of hashes)."""
    scorers, out = {scorer.id: scorer for scorer in scorers}.values(), {}
    for scorer in scorers:
        alike = [other.settings for other in scorers if other.name == scorer.name]
        differing = [
            f"{key}={str(value)[:8]}"
            for key, value in sorted(scorer.settings.items())
            if any(other.get(key) != value for other in alike)
        ]
        out[scorer.id] = " ".join([scorer.name, *differing])
    return out


def _traits(cells: pl.DataFrame, found: list[Result]) -> pl.DataFrame:
    """All rows of traits.parquet whose cells are in the report, with PLACE."""
    of = [*PLACE, "seed", "scorer_id", "scorer", "n_prototypes", "n_train"]
    on = ["own_name", "n_prototypes", "n_train"]
    parts = [
        cells.filter(pl.col("result") == i)
        .select(*of, "own_name")
        .join(result.traits.rename({"scorer": "own_name"}), on=on, maintain_order="left_right")
        .drop("own_name")
        for i, result in enumerate(found)
    ]
    return pl.concat(parts)
