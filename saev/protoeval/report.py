"""The files of a results directory. docs/results.md lists them."""

import collections.abc
import contextlib
import dataclasses
import logging
import pathlib

import numpy as np
import polars as pl

from saev import helpers, provenance
from saev.data.traits import base
from saev.formats import jsonfile, manifest, patchresults, results
from saev.protoeval import audit_report, config, patch_report, stats
from saev.report import charts, figures, frame, tables
from saev.scorers import config as scorers_config

logger = logging.getLogger("saev")

AGAINST = (
    "Difference from random activations (paired bootstrap over the test images, with prototypes chosen on "
    "the same train images). With several draws of train images, the interval includes their variation. It "
    "does not include the variation of prototypes: random activations or an SAE with another seed give other "
    "numbers, so compare several seeds before you call a difference real."
)
AGAIN = "Move that folder away and evaluate again with protoeval.py."
INTERVAL = "95% bootstrap interval of the mAP over {} resamples of the test images (quantiles 2.5% and 97.5%)"
"""What `results.interval` is, for notes and captions."""
REFERENCE_NOTES = {
    results.PROBES[0]: "Linear probe (of an older version): ridge regression on the mean activation.",
    results.PROBES[1]: "Logistic probes: logistic regression on the mean, or maximum, of each dimension over "
    "an image's patches, trained on the labels of the same number of images, with the penalty of each trait "
    "chosen by cross-validation on them. They are supervised references. With few images they are not upper "
    "bounds.",
    results.NULL: "Permuted labels: the prototypes are chosen after the labels of the train images were "
    "permuted, and measured on the true labels of the test images.",
}
"""What a row means, for a class of references."""

KEYS_NOTE = (
    "Keys (keys.md has their text, keys.parquet their numbers): means over keys, on test images. Balanced "
    "accuracy: the share of the images of a category that are led to it, mean over categories."
)


@dataclasses.dataclass(frozen=True)
class Found:
    """What an evaluation found."""

    about: results.About
    names: list[str]
    """The traits' names."""
    rows: list[results.Row]
    frames: dict[str, pl.DataFrame] = dataclasses.field(default_factory=dict)
    """File name -> a further Parquet file."""
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    """The same of text files."""
    patches: patchresults.PatchTable | None = None
    audit: patchresults.AuditTable | None = None


@contextlib.contextmanager
def once(out: pathlib.Path, cfg: config.ProtoEval) -> collections.abc.Generator[bool]:
    """Yields whether a results directory must still be written. Inside, no other process writes it.

    Raises:
        UserError: it was written, but a file is damaged.
    """
    helpers.sweep(out.parent)
    helpers.sweep(out)
    if not (out / manifest.NAME).exists():
        with helpers.locked(out.with_name(f".{out.name}.lock"), f"it evaluates {out}"):
            yield not (out / manifest.NAME).exists()
    else:
        several = [results.WEIGHTS_FILE] * bool(cfg.several)
        several += [results.KEYS_FILE, results.KEYS_TEXT] * bool(cfg.key_depth)
        tables = patchresults.PATCH_FILES * bool(cfg.patch_labels) + patchresults.AUDIT_FILES * bool(
            cfg.audit
        )
        manifest.read(out, (*results.FILES, *several, *tables), AGAIN)
        logger.info("%s: already evaluated", out)
        yield False


def write(dpath: pathlib.Path, found: Found, cfgs: list[config.ProtoEval]) -> None:
    """Writes a results directory, with the manifest last."""
    about, rows = found.about, found.rows
    configs = [
        dataclasses.asdict(cfg)
        | {"scorer_type": type(cfg.scorer).__name__, "labels_type": type(cfg.labels).__name__}
        for cfg in cfgs
    ]
    helpers.write_text(dpath / "config.json", jsonfile.dumps(configs, indent=4))
    provenance.write(dpath)
    helpers.write_text(dpath / "about.json", jsonfile.dumps(dataclasses.asdict(about), indent=4))
    cells = stats.cells(stats.summary(rows), about)
    traits = stats.traits(rows, cells, [helpers.printable(name) for name in found.names])
    kinds = stats.kinds(traits)
    differences = stats.differences(cells, [row.boot_RM for row in rows])
    frame.write_csv(dpath / "summary.csv", cells.select(*results.SUMMARY))
    frame.write_csv(dpath / "kinds.csv", kinds)
    frame.write_csv(dpath / "differences.csv", differences.select(*results.DIFFERENCES))
    frame.write_parquet(dpath / "traits.parquet", traits.select(*results.TRAITS))
    for name, lines in found.frames.items():
        frame.write_parquet(dpath / name, lines)
    for name, text in found.texts.items():
        helpers.write_text(dpath / name, text)
    results.write_resamples(dpath / "resamples.npz", rows)
    single = cells.filter(stats.IS_SINGLE)
    figures.save(charts.grid(single, caption(single, [about])), dpath / "chart.png")
    table = summary_table(cells)
    helpers.write_text(dpath / "table.tex", f"% {describe(about)}\n{tables.latex(table)}")
    text = warning(about) + tables.markdown(table) + _notes(cells, len(found.names), about)
    parts = [text, *sections(kinds, differences)]
    if results.KEYS_FILE in found.frames:
        parts.append(f"{KEYS_NOTE}\n\n{tables.markdown(keys_table(found.frames[results.KEYS_FILE]))}")
    helpers.write_text(dpath / "table.md", "\n".join(parts))
    if found.patches:
        patch_report.write(dpath, found.patches, about)
    if found.audit:
        audit_report.write(dpath, found.audit, about)
    more = patchresults.PATCH_FILES * bool(found.patches) + patchresults.AUDIT_FILES * bool(found.audit)
    manifest.write(dpath, (*results.FILES, *found.frames, *found.texts, *more))


def write_split(dpath: pathlib.Path, labels: base.Traits) -> None:
    """Writes split.csv: the path of each image, and whether it is a train or a test image."""
    split = np.where(labels.is_train_N, "train", "test").tolist()
    paths = [helpers.printable(path) for path in labels.paths_N]
    frame.write_csv(dpath / "split.csv", pl.DataFrame({"path": paths, "split": split}))


# ---- tables ----


def sections(
    kinds: pl.DataFrame, differences: pl.DataFrame, place: dict[str, str] | None = None
) -> list[str]:
    """The tables by kind of trait, and of differences from random activations, with their titles."""
    out = [f"By kind of trait (number of traits):\n\n{tables.markdown(kinds_table(kinds, place))}"]
    if len(against := differences.filter(stats.IS_AGAINST_BASELINE)):
        out.append(f"{AGAINST}\n\n{tables.markdown(differences_table(against, place))}")
    return out


def _size(lines: pl.DataFrame, place: dict[str, str]) -> dict[str, list[str]]:
    """The first columns of every table. place: column -> header of further first columns."""
    return {header: tables.texts("{}", lines[key]) for key, header in place.items()} | {
        "Scorer": lines["scorer"].to_list(),
        "Prototypes": tables.texts("{:,}", lines["n_prototypes"]),
        "Train": tables.texts("{:,}", lines["n_train"]),
    }


def summary_table(lines: pl.DataFrame, place: dict[str, str] | None = None) -> pl.DataFrame:
    """The main table, without interval or spread if no row has one."""
    table = _size(lines, place or {}) | {"mAP": tables.texts("{:.3f}", lines["map"])}
    if lines["low"].is_not_nan().any():
        table["Interval"] = tables.texts("{:.3f} to {:.3f}", lines["low"], lines["high"])
    if lines["spread"].is_not_nan().any():
        table["Draws"] = tables.texts("± {:.3f}", lines["spread"])
    table["5%"], table["95%"] = (tables.texts("{:.3f}", lines[key]) for key in ("q05", "q95"))
    return pl.DataFrame(table)


def kinds_table(lines: pl.DataFrame, place: dict[str, str] | None = None) -> pl.DataFrame:
    """mAP by kind of trait, one row per scorer."""
    kinds = [kind for kind in results.KINDS if kind in lines["kind"]]
    key = [*(place or {}), *results.CELL]
    wide = lines.pivot("kind", index=key, values="map", maintain_order=True)
    counts = dict(lines.group_by("kind").agg(pl.col("n_traits").max()).iter_rows())
    shown = {f"{kind} ({counts[kind]})": tables.texts("{:.3f}", wide[kind]) for kind in kinds}
    return pl.DataFrame(_size(wide, place or {}) | shown)


def differences_table(lines: pl.DataFrame, place: dict[str, str] | None = None) -> pl.DataFrame:
    shown = {
        "Baseline": lines["baseline"].to_list(),
        "Baseline prototypes": tables.texts("{:,}", lines["baseline_prototypes"]),
        "Difference": tables.texts("{:+.3f}", lines["difference"]),
        "95% interval": tables.texts("{:+.3f} to {:+.3f}", lines["low"], lines["high"]),
        "": ["excludes 0" if excludes else "" for excludes in lines["excludes_zero"]],
    }
    return pl.DataFrame(_size(lines, place or {}) | shown)


def keys_table(lines: pl.DataFrame) -> pl.DataFrame:
    """Means over a scorer's keys. lines: the frame of keys.parquet."""
    names = ("ap", "balanced_accuracy", "accuracy")
    means = lines.group_by(list(results.CELL), maintain_order=True).agg(
        pl.len(), *(pl.col(name).fill_nan(None).mean() for name in (*names, "depth"))
    )
    shown = {
        "Keys": tables.texts("{:,}", means["len"]),
        "Depth": tables.texts("{:.1f}", means["depth"]),
        "AP": tables.texts("{:.3f}", means["ap"]),
        "Balanced accuracy": tables.texts("{:.3f}", means["balanced_accuracy"]),
        "Accuracy": tables.texts("{:.3f}", means["accuracy"]),
    }
    return pl.DataFrame(_size(means, {}) | shown)


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
    """How the table was made, and what its means leave out."""
    n_measured = cells["n_traits"][0]
    note = f"\n{describe(about)} mAP is the mean over {n_measured} traits; 5% and 95% are quantiles over "
    note += "traits."
    if about.n_boot:
        note += f" Interval: {INTERVAL.format(format(about.n_boot, ','))}."
    if about.n_seeds > 1:
        note += f" Draws: standard deviation over {about.n_seeds} draws of the train images."
    if about.n_zero:
        note += f" {about.n_zero} trait(s) without a positive test image count as AP 0."
    if about.n_unknown:
        note += f" {about.n_unknown:,} of {about.n_labels:,} labels are missing; each trait's AP is over the "
        note += "images that have its label."
    for split, paths in about.left_out.items():
        note += f" {len(paths):,} {split} image(s) are left out, because the dump recorded them as corrupt "
        note += "(about.json names them)."
    if n_measured < n_traits:
        note += f" {n_traits - n_measured} trait(s) without a positive test image are left out."
    unseen = cells.select("n_train", n="n_traits_without_train_positives").filter(pl.col("n") > 0)
    for n_train, n in unseen.unique("n_train", keep="last").sort("n_train").iter_rows():
        note += f" With {n_train} train images, {n} trait(s) have no positive train image (in some draw) "
        note += "and get prototype 0."
    return f"{note} {reference_notes(cells)}\n\n{settings(about)}"


def reference_notes(cells: pl.DataFrame) -> str:
    """What the rows of references mean that a table has."""
    return " ".join(note for cls, note in REFERENCE_NOTES.items() if cls in cells["cls"])


def caption(cells: pl.DataFrame, abouts: list[results.About]) -> str:
    """What a chart shows: ViT, layer, tokens, images, traits, and what the band is."""
    tokens, n_traits = (cells[key].unique(maintain_order=True) for key in ("tokens", "n_traits"))
    chosen, measured = _joined(a.chosen_on for a in abouts), _joined(a.measured_on for a in abouts)
    text = (
        f"{tables.where(cells)}; {_joined(tokens)}. mAP: mean over {_joined(map(str, n_traits))} traits of "
    )
    text += f"the average precision on {measured or 'the test images'} of the prototype that is best on n "
    text += f"of {chosen}." if chosen else "train images."
    if n_boot := _joined(f"{a.n_boot:,}" for a in abouts if a.n_boot):
        text += f" Shaded: {INTERVAL.format(n_boot)}."
    if n_seeds := _joined(f"{a.n_seeds:,}" for a in abouts if a.n_seeds > 1):
        text += f" Means over {n_seeds} draws of the train images."
    if cells["seed"].n_unique() > 1:
        text += " Of a scorer with several seeds, means of mAP and interval."
    return text


def _joined(words: collections.abc.Iterable[str]) -> str:
    return " or ".join(word for word in dict.fromkeys(words) if word)


def warning(about: results.About) -> str:
    """The lines above a table that needed --force; else ""."""
    return "".join(f"**Forced: {problem}.**\n\n" for problem in about.problems)


def settings(about: results.About) -> str:
    """A line per scorer: its settings, and the first digits of the hashes of its checkpoint and fit data."""
    lines = []
    for name, fields in about.scorers.items():
        similarity = fields.get("similarity", "dot" if fields.get("cls") == "Pca" else "")
        if similarity in scorers_config.FORMULAS:
            fields = fields | {"similarity": f"{similarity} {scorers_config.FORMULAS[similarity]}"}
        parts = [
            f"{key.replace('_', ' ')} {str(value)[:8] if key in ('ckpt', 'like', 'fit') else value}"
            for key, value in fields.items()
            if key != "cls"
        ]
        lines.append(f"- {name}: {', '.join([str(fields.get('cls', name)), *parts])}\n")
    return "".join(lines)


def describe(about: results.About) -> str:
    """How a table was made, in a sentence."""
    text = f"{about.vit}, layer {about.layer}, {about.tokens}, shards {' and '.join(about.shards)}"
    if about.chosen_on:
        classes = f"{about.n_classes} classes; " if about.n_classes > 1 else ""
        text += f"; {classes}prototypes chosen on {about.chosen_on}, measured on {about.measured_on}"
    if about.chosen_on.endswith("test images"):
        whose = "the labels'" if about.source else "CUB's"
        text += f" (splits swapped: below, train images are {whose} test images, and test images its train "
        text += "images)"
    if about.source:
        return f"{text}; {about.source}; seed {about.seed}."
    text += f"; certainty from {about.min_certainty}"
    text += ", the last annotation counts" * (about.annotations == "last")
    return f"{text}; seed {about.seed}."
