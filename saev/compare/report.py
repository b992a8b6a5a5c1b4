"""The files of a results directory. docs/compare.md lists them."""

import dataclasses
import datetime
import pathlib
import typing as tp

import numpy as np
import polars as pl

from saev import helpers, provenance
from saev.compare import config, correlate, match, sides
from saev.formats import jsonfile, manifest
from saev.report import charts, figures, frame, tables

FILES = ("dictionaries.csv", "pairs.csv", "curve.csv", "summary.md", "chart.png", "about.json")
MATCHES = "matches.parquet"
"""Only for two dictionaries."""
GRID = np.round(np.linspace(0, 1, 101), 2)
"""Correlations at which curve.csv has the shares."""
PLACE = ("vit", "layer", "kind", "n_latents", "seed")
"""What two dictionaries may differ in."""
WORDS = {"vit": "ViT", "n_latents": "latents"}
NULL = (
    "In parentheses: the same by chance. For correlations, one side's images are permuted (whole images, so "
    "that patches keep their places). For cosines, the other dictionary's directions are replaced by random "
    "ones with the same mean and covariance."
)


class Pair(tp.NamedTuple):
    """A comparison of two sides, given by their numbers."""

    one: int
    two: int
    found: match.Found
    null: match.Found
    cosines: match.Cosines | None
    """None if the sides are not in one space."""


def write(
    dpath: pathlib.Path,
    cfg: config.Compare,
    found: list[sides.Side],
    joined: sides.Joined,
    stats: list[correlate.Moments],
    pairs: list[Pair],
) -> None:
    """Writes a results directory, complete or not at all."""
    of_sides = dictionaries(found, joined, stats)
    thresholds = sorted({*GRID.tolist(), *cfg.thresholds})
    curve = pl.concat([_curve(pair, of_sides, stats, thresholds) for pair in pairs])
    of_pairs = pl.concat([_pair(pair, of_sides) for pair in pairs])
    words = method(cfg, joined, stats[0].n_rows)
    with helpers.atomic_folder(dpath) as tmp_dpath:
        frame.write_csv(tmp_dpath / "dictionaries.csv", of_sides)
        frame.write_csv(tmp_dpath / "pairs.csv", of_pairs)
        frame.write_csv(tmp_dpath / "curve.csv", curve)
        names = [*FILES]
        if cfg.runs:
            text = _of_runs(of_sides, of_pairs, curve, cfg)
        else:
            of_latents = matches(pairs[0], stats)
            frame.write_parquet(tmp_dpath / MATCHES, of_latents)
            names.append(MATCHES)
            text = _of_two(pairs[0], of_sides, of_pairs, curve, cfg) + _by_frequency(
                of_latents, of_sides, cfg
            )
        helpers.write_text(tmp_dpath / "summary.md", f"{text}\n{words} {NULL}\n")
        shown = of_pairs.select("one", "two", "differ").join(curve, on=["one", "two"], maintain_order="left")
        chart = charts.matched(shown, caption(of_sides, joined, stats[0].n_rows))
        figures.save(chart, tmp_dpath / "chart.png")
        about = {
            "config": dataclasses.asdict(cfg),
            "method": words,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "n_images": len(joined.order[0]),
            "n_rows": stats[0].n_rows,
            "per_patch": joined.per_patch,
        }
        helpers.write_text(tmp_dpath / "about.json", jsonfile.dumps(about, indent=4))
        provenance.write(tmp_dpath)
        manifest.write(tmp_dpath, names)


# ---- frames ----


def dictionaries(
    found: list[sides.Side], joined: sides.Joined, stats: list[correlate.Moments]
) -> pl.DataFrame:
    """A row for each dictionary."""
    return pl.DataFrame(
        {
            "name": [side.name for side in found],
            "kind": [side.kind for side in found],
            "n_latents": [side.scorer.n_prototypes for side in found],
            "seed": pl.Series([side.seed for side in found], dtype=pl.String),
            "vit": [side.vit for side in found],
            "layer": [side.layer for side in found],
            "n_images_left_out": joined.n_left_out,
            "n_live": [int(m.is_live_S.sum()) for m in stats],
            "n_never_fired": [int((m.n_fired_S == 0).sum()) for m in stats],
            "mean_fired": [float(m.n_fired_S.sum() / m.n_rows) for m in stats],
        }
    )


def _pair(pair: Pair, of_sides: pl.DataFrame) -> pl.DataFrame:
    one, two = (of_sides.row(n, named=True) for n in (pair.one, pair.two))
    known = [key for key in PLACE if None not in (one[key], two[key])]
    differ = [WORDS.get(key, key) for key in known if one[key] != two[key]]
    cosines = [best.mean() for best in pair.cosines] if pair.cosines else [float("nan")] * 4
    return pl.DataFrame(
        {
            "one": [one["name"]],
            "two": [two["name"]],
            "differ": [", ".join(differ) or "other settings"],
            "corr_one": [pair.found.one.mean()],
            "corr_two": [pair.found.two.mean()],
            "null_one": [pair.null.one.mean()],
            "null_two": [pair.null.two.mean()],
            "mmcs_one": [cosines[0]],
            "mmcs_two": [cosines[1]],
            "mmcs_null_one": [cosines[2]],
            "mmcs_null_two": [cosines[3]],
        }
    )


def _curve(
    pair: Pair, of_sides: pl.DataFrame, stats: list[correlate.Moments], thresholds: list[float]
) -> pl.DataFrame:
    """Shares of live latents with a match of at least each threshold."""
    live = [stats[n].is_live_S for n in (pair.one, pair.two)]
    columns: dict[str, list[float]] = {"threshold": thresholds}
    nothing = (None, None)
    cosines, cosines_null = (pair.cosines[:2], pair.cosines[2:]) if pair.cosines else (nothing, nothing)
    of_best = {"share": pair.found[:2], "null": pair.null[:2], "cosine": cosines, "cosine_null": cosines_null}
    for name, both in of_best.items():
        for side, best, is_live_S in zip(("one", "two"), both, live, strict=True):
            columns[f"{name}_{side}"] = [
                best.share(t, is_live_S) if best else float("nan") for t in thresholds
            ]
    for name, pairs in (("one_to_one", pair.found.pairs), ("one_to_one_null", pair.null.pairs)):
        for side, is_live_S in zip(("one", "two"), live, strict=True):
            columns[f"{name}_{side}"] = [
                pairs.share(t, is_live_S) if pairs else float("nan") for t in thresholds
            ]
    names = {"one": of_sides["name"][pair.one], "two": of_sides["name"][pair.two]}
    return pl.DataFrame(columns).select(*(pl.lit(v).alias(k) for k, v in names.items()), pl.all())


def matches(pair: Pair, stats: list[correlate.Moments]) -> pl.DataFrame:
    """A row for each latent of both dictionaries (column `of`: one or two)."""
    out = []
    for side, i in (("one", pair.one), ("two", pair.two)):
        best, null, S = getattr(pair.found, side), getattr(pair.null, side), len(stats[i].mean_S)
        cosine, cosine_null = (
            (getattr(pair.cosines, name) for name in (side, f"null_{side}")) if pair.cosines else (None, None)
        )
        other_S, corr_S = _partners(pair.found.pairs, S, side == "two")
        _, null_pair_S = _partners(pair.null.pairs, S, side == "two")
        columns = {
            "latent": np.arange(S),
            "is_live": stats[i].is_live_S,
            "frequency": stats[i].n_fired_S / stats[i].n_rows,
            "best": best.latent_S,
            "corr": best.value_S,
            "is_mutual": best.is_mutual_S,
            "pair": other_S,
            "pair_corr": corr_S,
            "null_corr": null.value_S,
            "cos_best": cosine.latent_S if cosine else np.full(S, match.NONE),
            "cos": cosine.value_S if cosine else np.full(S, np.nan),
            "null_pair_corr": null_pair_S,
            "null_cos": cosine_null.value_S if cosine_null else np.full(S, np.nan),
        }
        out.append(pl.DataFrame(columns).select(pl.lit(side).alias("of"), pl.all()))
    return pl.concat(out)


def _partners(pairs: match.Pairs | None, S: int, is_inverse: bool) -> tuple[np.ndarray, np.ndarray]:
    assert pairs is not None, "one-to-one matches are made for two dictionaries"
    if not is_inverse:
        return pairs.other_S, pairs.corr_S
    other_S, corr_S = np.full(S, match.NONE), np.full(S, np.nan)
    one = np.flatnonzero(pairs.other_S >= 0)
    other_S[pairs.other_S[one]], corr_S[pairs.other_S[one]] = one, pairs.corr_S[one]
    return other_S, corr_S


# ---- words and tables ----


def method(cfg: config.Compare, joined: sides.Joined, n_rows: int) -> str:
    """How the numbers were made, in sentences."""
    n_images = len(joined.order[0])
    if joined.per_patch:
        text = f"Pearson correlation over the {n_rows:,} patches of {n_images:,} images."
    else:
        pooled = "maximum" if cfg.pool == "max" else "mean"
        text = f"Pearson correlation over {n_images:,} images; a latent's value is the {pooled} over an "
        text += "image's patches."
    text += " Latents whose value does not vary have no correlation and are left out."
    text += " A match is mutual: each latent is the other one's best."
    if n := sum(joined.n_left_out):
        text += f" {n:,} images that a side lacks are left out."
    return text


def caption(of_sides: pl.DataFrame, joined: sides.Joined, n_rows: int) -> str:
    what = f"{n_rows:,} patches of " if joined.per_patch else ""
    return f"{tables.where(of_sides)}; n = {what}{len(joined.order[0]):,} images"


def sides_table(of_sides: pl.DataFrame) -> pl.DataFrame:
    """The dictionaries."""
    return pl.DataFrame(
        {
            "Dictionary": of_sides["name"],
            "Kind": of_sides["kind"],
            "Seed": of_sides["seed"].fill_null(""),
            "ViT": of_sides["vit"],
            "Layer": tables.texts("{}", of_sides["layer"]),
            "Latents": tables.texts("{:,}", of_sides["n_latents"]),
            "Live": tables.texts("{:,}", of_sides["n_live"]),
            "Constant": tables.texts("{:,}", of_sides["n_latents"] - of_sides["n_live"]),
        }
    )


def _of_two(
    pair: Pair, of_sides: pl.DataFrame, of_pairs: pl.DataFrame, curve: pl.DataFrame, cfg: config.Compare
) -> str:
    """The summary of two dictionaries."""
    lines = curve.filter(pl.col("threshold").is_in(list(cfg.thresholds))).sort("threshold")
    names = of_sides["name"].to_list()
    table = {"Correlation": tables.texts("{:g} or more", lines["threshold"])}
    measures = [("matched", "share", "null"), ("one to one", "one_to_one", "one_to_one_null")]
    measures += [("by cosine", "cosine", "cosine_null")] if pair.cosines else []
    for name, side in zip(names, ("one", "two"), strict=True):
        for words, *keys in measures:
            shares = (lines[f"{key}_{side}"] for key in keys)
            table[f"{name} {words} (null)"] = tables.texts("{:.1%} ({:.1%})", *shares)
    means = {"": names}
    for words, *keys in (("best correlation", "corr", "null"), ("max cosine", "mmcs", "mmcs_null")):
        both = [[of_pairs[f"{key}_{side}"][0] for side in ("one", "two")] for key in keys]
        means[f"Mean {words} (null)"] = tables.texts("{:.3f} ({:.3f})", *both)
    is_exact = pair.found.pairs is None or pair.found.pairs.is_exact
    how = "over all pairs" if is_exact else f"among the {cfg.candidates} best partners of each latent"
    note = f"One-to-one matches have the largest sum of correlations {how}."
    if not pair.cosines:
        note += " The dictionaries are not in one space, so that cosines of directions mean nothing."
    parts = [sides_table(of_sides), pl.DataFrame(table), pl.DataFrame(means)]
    return "\n".join([*map(tables.markdown, parts), note])


def _by_frequency(of_latents: pl.DataFrame, of_sides: pl.DataFrame, cfg: config.Compare) -> str:
    """A table of the live latents in quarters by how often they fire. Prototypes and units always do."""
    live = of_latents.filter("is_live", pl.col("frequency").n_unique().over("of") > 1)
    if not len(live):
        return ""
    rank = (pl.col("frequency").rank("ordinal") - 1) * 4 // pl.len()
    matched = [
        (pl.col("is_mutual") & (pl.col("corr") >= t)).mean().alias(f"Matched at {t:g}")
        for t in sorted(cfg.thresholds)
    ]
    lines = (
        live.with_columns(rank.over("of").cast(pl.Int64).alias("quarter"))
        .group_by("of", "quarter", maintain_order=True)
        .agg(pl.col("frequency").median(), *matched, pl.col("corr").mean(), pl.col("null_corr").mean())
        .sort("of", "quarter")
    )
    quarters = ("rarest quarter", "second", "third", "most frequent")
    table = {
        "Dictionary": [of_sides["name"][int(of == "two")] for of in lines["of"]],
        "Latents": [quarters[q] for q in lines["quarter"]],
        "Fires on (median)": tables.texts("{:.3%}", lines["frequency"]),
    }
    table |= {name: tables.texts("{:.1%}", lines[name]) for name in lines.columns if name.startswith("M")}
    table["Mean best correlation (null)"] = tables.texts("{:.3f} ({:.3f})", lines["corr"], lines["null_corr"])
    return f"\n\nBy how often latents fire:\n\n{tables.markdown(pl.DataFrame(table))}"


def _of_runs(of_sides: pl.DataFrame, of_pairs: pl.DataFrame, curve: pl.DataFrame, cfg: config.Compare) -> str:
    """The summary of several dictionaries: what differs, each dictionary, each pair."""
    lines = curve.filter(pl.col("threshold").is_in(list(cfg.thresholds)))
    wide = of_pairs.with_columns(
        corr=pl.mean_horizontal("corr_one", "corr_two"),
        null=pl.mean_horizontal("null_one", "null_two"),
        mmcs=pl.mean_horizontal("mmcs_one", "mmcs_two"),
        mmcs_null=pl.mean_horizontal("mmcs_null_one", "mmcs_null_two"),
    )
    for t in sorted(cfg.thresholds):
        at = lines.filter(pl.col("threshold") == t).select(
            "one",
            "two",
            pl.mean_horizontal("share_one", "share_two").alias(f"share {t:g}"),
            pl.mean_horizontal("null_one", "null_two").alias(f"null {t:g}"),
        )
        wide = wide.join(at, on=["one", "two"], maintain_order="left")
    figures = [
        "corr",
        "null",
        "mmcs",
        "mmcs_null",
        *(c for c in wide.columns if c.startswith(("share ", "null "))),
    ]
    by_kind = wide.group_by("differ", maintain_order=True).agg(pl.len().alias("n"), pl.col(figures).mean())
    twice = pl.concat([wide.with_columns(name=pl.col(side)) for side in ("one", "two")])
    by_run = twice.group_by("name", "differ", maintain_order=True).agg(
        pl.len().alias("n"), pl.col(figures).mean()
    )
    alone = by_run.filter(~pl.col("differ").str.contains(", "))
    order = of_sides.select("name")
    by_run = order.join(alone if len(alone) else by_run, on="name", how="inner", maintain_order="left")
    parts = [
        sides_table(of_sides),
        _figures(by_kind, {"differ": "Differ in", "n": "Pairs"}, cfg),
        _figures(by_run, {"name": "Dictionary", "differ": "Differ in", "n": "Pairs"}, cfg),
        _figures(wide, {"one": "One", "two": "Two", "differ": "Differ in"}, cfg),
    ]
    which = "pairs that differ in one thing" if len(alone) else "pairs"
    titles = ("", "Means by what differs:\n\n", f"Means of each dictionary's {which}:\n\n", "All pairs:\n\n")
    shown = [title + tables.markdown(part) for title, part in zip(titles, parts, strict=True)]
    note = "Shares are means of both directions. Mean max cosine: only of dictionaries in one space."
    return "\n".join([*shown, note])


def _figures(lines: pl.DataFrame, first: dict[str, str], cfg: config.Compare) -> pl.DataFrame:
    """A table of means. first: column -> header of the first columns."""
    table = {header: tables.texts("{}", lines[key]) for key, header in first.items()}
    for t in sorted(cfg.thresholds):
        shares = (lines[f"share {t:g}"], lines[f"null {t:g}"])
        table[f"Matched at {t:g} (null)"] = tables.texts("{:.1%} ({:.1%})", *shares)
    table["Mean best correlation (null)"] = tables.texts("{:.3f} ({:.3f})", lines["corr"], lines["null"])
    table["Mean max cosine (null)"] = tables.texts("{:.3f} ({:.3f})", lines["mmcs"], lines["mmcs_null"])
    return pl.DataFrame(table)
