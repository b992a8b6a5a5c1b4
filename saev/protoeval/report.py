"""The files of a results directory. docs/results.md lists them."""

import dataclasses
import os
import pathlib
import urllib.parse

import beartype
import msgspec
import polars as pl

from saev import errors, helpers
from saev.formats import jsonfile, manifest, results
from saev.protoeval import config, stats
from saev.report import charts, frame, tables
from saev.scorers import config as scorers_config

AGAINST = """Difference from random activations (paired bootstrap over the test images, prototypes chosen on the same train images). With \
several draws of the train images the interval is over these too. It is not over the prototypes: activations or an SAE of another seed \
give other figures, so compare several seeds before you call a difference real."""
AGAIN = "Move that folder away and evaluate again with protoeval.py."
PROBE_NOTE = """Linear probe: ridge regression on the mean activation, trained on the labels of as many images. It is a supervised \
reference; with few images it is no upper bound."""


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
    cells = stats.cells(stats.summary(rows), about)
    traits = stats.traits(rows, cells, [helpers.printable(name) for name in names])
    kinds = stats.kinds(traits)
    differences = stats.differences(cells, [row.boot_RM for row in rows])
    frame.write_csv(dpath / "summary.csv", cells.select(*results.SUMMARY))
    frame.write_csv(dpath / "kinds.csv", kinds)
    frame.write_csv(dpath / "differences.csv", differences.select(*results.DIFFERENCES))
    frame.write_parquet(dpath / "traits.parquet", traits.select(*results.TRAITS))
    results.write_resamples(dpath / "resamples.npz", rows)
    charts.save(charts.grid(cells), dpath / "chart.png")
    table = summary_table(cells)
    helpers.write_text(dpath / "table.tex", f"% {describe(about)}\n{tables.latex(table)}")
    text = [warning(about), tables.markdown(table), _notes(cells, len(names), about)]
    text += ["\nBy kind of trait (number of traits):\n\n", tables.markdown(kinds_table(kinds))]
    if len(against := against_baseline(differences)):
        text.append(f"\n{AGAINST}\n\n{tables.markdown(differences_table(against))}")
    helpers.write_text(dpath / "table.md", "".join(text))
    manifest.write(dpath, results.FILES)


# ---- tables ----


@beartype.beartype
def against_baseline(differences: pl.DataFrame) -> pl.DataFrame:
    """The differences of other scorers from random activations."""
    return differences.filter(~stats.IS_BASELINE, pl.col("cls_other") == results.BASELINE)


def _size(lines: pl.DataFrame, place: dict[str, str]) -> dict[str, list[str]]:
    """The first columns of every table. place: column -> header of what tells its tables apart."""
    return {header: tables.texts("{}", lines[key]) for key, header in place.items()} | {
        "Scorer": lines["scorer"].to_list(),
        "Prototypes": tables.texts("{:,}", lines["n_prototypes"]),
        "Train": tables.texts("{:,}", lines["n_train"]),
    }


@beartype.beartype
def summary_table(lines: pl.DataFrame, place: dict[str, str] | None = None) -> pl.DataFrame:
    """The main table. The interval and the spread over draws are left out where no line has one."""
    table = _size(lines, place or {}) | {"mAP": tables.texts("{:.3f}", lines["map"])}
    if lines["low"].is_not_nan().any():
        table["95% interval"] = tables.texts("{:.3f} to {:.3f}", lines["low"], lines["high"])
    if lines["spread"].is_not_nan().any():
        table["Draws"] = tables.texts("± {:.3f}", lines["spread"])
    table["5%"], table["95%"] = (tables.texts("{:.3f}", lines[key]) for key in ("q05", "q95"))
    return pl.DataFrame(table)


@beartype.beartype
def kinds_table(lines: pl.DataFrame, place: dict[str, str] | None = None) -> pl.DataFrame:
    """mAP by kind of trait, one row for each scorer."""
    kinds = [kind for kind in results.KINDS if kind in lines["kind"]]
    key = [*(place or {}), *results.CELL]
    wide = lines.pivot("kind", index=key, values="map", maintain_order=True)
    counts = dict(lines.group_by("kind").agg(pl.col("n_traits").max()).iter_rows())
    shown = {f"{kind} ({counts[kind]})": tables.texts("{:.3f}", wide[kind]) for kind in kinds}
    return pl.DataFrame(_size(wide, place or {}) | shown)


@beartype.beartype
def differences_table(lines: pl.DataFrame, place: dict[str, str] | None = None) -> pl.DataFrame:
    shown = {
        "Baseline": lines["baseline"].to_list(),
        "Baseline prototypes": tables.texts("{:,}", lines["baseline_prototypes"]),
        "Difference": tables.texts("{:+.3f}", lines["difference"]),
        "95% interval": tables.texts("{:+.3f} to {:+.3f}", lines["low"], lines["high"]),
        "": ["excludes 0" if excludes else "" for excludes in lines["excludes_zero"]],
    }
    return pl.DataFrame(_size(lines, place or {}) | shown)


@beartype.beartype
def seeds_table(lines: pl.DataFrame, place: dict[str, str] | None = None) -> pl.DataFrame:
    def shown(form: str, *names: str) -> list[str]:
        return [t.removesuffix(" ± nan") for t in tables.texts(form, *(lines[n] for n in names))]

    table = {
        "Seeds": tables.texts("{}", lines["n_seeds"]),
        "mAP": shown("{:.3f} ± {:.3f}", "map", "spread"),
        "Baseline": lines["baseline"].to_list(),
        "Difference": shown("{:+.3f} ± {:.3f}", "difference", "difference_spread"),
    }
    return pl.DataFrame(_size(lines, place or {}) | table)


# ---- notes ----


def _notes(cells: pl.DataFrame, n_traits: int, about: results.About) -> str:
    """What the table is of, and what the means leave out."""
    n_measured = cells["n_traits"][0]
    note = f"\n{describe(about)} mAP is the mean over {n_measured} traits; 5% and 95% are quantiles over traits."
    if about.n_boot:
        note += f" Intervals: {about.n_boot:,} bootstrap resamples of the test images."
    if about.n_seeds > 1:
        note += f" Draws: standard deviation over {about.n_seeds} draws of the train images."
    if about.n_zero:
        note += f" {about.n_zero} trait(s) without a positive test image count as AP 0."
    for split, paths in about.left_out.items():
        note += f" {len(paths):,} {split} image(s) are left out, because the dump recorded them as corrupt (about.json names them)."
    if n_measured < n_traits:
        note += f" {n_traits - n_measured} trait(s) without a positive test image are left out."
    unseen = cells.select("n_train", n="n_traits_without_train_positives").filter(pl.col("n") > 0)
    for n_train, n in unseen.unique("n_train", keep="last").sort("n_train").iter_rows():
        note += f" With {n_train} train images {n} trait(s) have no positive one (in some draw): prototype 0 is taken for them."
    return f"{note} {PROBE_NOTE}\n\n{settings(about)}"


@beartype.beartype
def warning(about: results.About) -> str:
    """What a table that --force allowed has above it; else empty."""
    return "".join(f"**Forced: {problem}.**\n\n" for problem in about.problems)


@beartype.beartype
def settings(about: results.About) -> str:
    """A line for each scorer: its settings, and the first digits of the hashes of its checkpoint and of what it was fitted on."""
    lines = []
    for name, fields in about.scorers.items():
        similarity = fields.get("similarity", "dot" if fields.get("cls") == "Pca" else "")
        shown = fields
        if similarity in scorers_config.FORMULAS:
            shown = fields | {"similarity": f"{similarity} {scorers_config.FORMULAS[similarity]}"}
        parts = [
            f"{key.replace('_', ' ')} {str(value)[:8] if key in ('ckpt', 'fit') else value}"
            for key, value in shown.items()
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
    if about.chosen_on.endswith("test images"):
        text += " (splits swapped: below, train images are CUB's test images, and test images its train images)"
    text += f"; certainty from {about.min_certainty}"
    text += ", the last annotation counts" * (about.annotations == "last")
    return f"{text}; seed {about.seed}."


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
        scorer: the SAE's name in the table; its largest cell counts.
    """
    data = manifest.read(dpath, ["traits.parquet"], AGAIN)["traits.parquet"]
    best, shown = best_traits(data, scorer), set(read_gallery(gallery).latents)
    index = urllib.parse.quote(os.fsencode(os.path.relpath(gallery / "index.html", dpath)))
    latents = best["prototype"].to_list()
    table = {
        "Trait": best["trait"],
        "Latent": [f"[{i}]({index}#latent_{i:06})" if i in shown else str(i) for i in latents],
        "AP on train images": [f"{ap:.3f}" for ap in best["train_ap"]],
        "AP on test images": [f"{ap:.3f}" for ap in best["test_ap"]],
    }
    n_train = best["n_train"][0]
    text = f"Best latents of {scorer} with {n_train} train images.\n\n{tables.markdown(pl.DataFrame(table))}"
    if missing := set(latents) - shown:
        flags = " ".join(map(str, sorted(set(latents))))
        text += f"\n{len(missing)} of them are not in the gallery; visuals.py shows all with --latents {flags}\n"
    helpers.write_text(dpath / "traits.md", text)


@beartype.beartype
def best_traits(data: bytes, scorer: str) -> pl.DataFrame:
    """The rows of traits.parquet of a scorer's largest cell (first draw), best test AP first."""
    mine = pl.read_parquet(data).filter(pl.col("scorer") == scorer, pl.col("draw") == 0)
    order = pl.col("test_ap").fill_nan(-1.0)
    return mine.filter(stats.largest("scorer")).sort(order, descending=True, maintain_order=True)
