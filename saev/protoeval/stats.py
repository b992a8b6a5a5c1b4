"""Statistics of results, as group-bys and joins of one frame.

The frame of *cells* has a row per scorer, number of prototypes and number of train images, with the columns
of summary.csv and those that `cells` adds. The frame of *traits* has a row per cell, draw and trait.

T traits, R draws of train images, M resamples of the test images.
"""

import collections.abc

import numpy as np
import polars as pl

from saev.formats import results

PLACE = ("labels", "min_certainty", "vit", "layer", "tokens")
"""Fields of `results.About` that comparable results share, in the order of the reports."""
IS_REFERENCE = pl.col("cls").is_in(list(results.REFERENCES))
IS_BASELINE = pl.col("cls") == results.BASELINE
IS_SINGLE = pl.col("model") == ""
"""Whether a row is of single prototypes, the best for each trait; else it is of several, or of keys."""
IS_AGAINST_BASELINE = (
    ~IS_BASELINE & (pl.col("cls_other") == results.BASELINE) & (pl.col("model") == pl.col("model_other"))
)
"""Of differences: those of other scorers from random activations, with as many prototypes for each trait."""


def cells(summary: pl.DataFrame, about: results.About) -> pl.DataFrame:
    """Adds columns to those of summary.csv: PLACE, seed, n_boot, scorer_id, cls, family, model, of, row.

    family is the scorer's id without the seed; row is the cell's index in the resamples. Of a row of several
    prototypes, model is their number, or "key", and `of` the id of the scorer of single ones; else "" and
    its own id.
    """
    scorers = [about.scorer(name) for name in summary["scorer"].unique(maintain_order=True)]
    ids = [
        (
            *(s.name, s.id, str(s.settings.get("cls", s.name)), s.seedless.id),
            *(str(s.settings.get("model", "")), about.scorer(about.models.get(s.name, (s.name,))[0]).id),
        )
        for s in scorers
    ]
    columns = dict.fromkeys(("scorer", "scorer_id", "cls", "family", "model", "of"), pl.String)
    of = {key: pl.lit(getattr(about, key)) for key in (*PLACE, "seed", "n_boot")}
    return (
        summary.with_row_index("row")
        .with_columns(**of)
        .join(pl.DataFrame(ids, columns, orient="row"), on="scorer", maintain_order="left")
    )


def in_order(frame: pl.DataFrame) -> pl.DataFrame:
    """Sorts rows as in reports: by PLACE, with the constant scorer and the probes first, then by name.

    Numbers in names sort by value: "5 prototypes" before "20 prototypes".
    """
    rank = [pl.col("cls") != name for name in results.FIRST]
    padded = pl.col("scorer").str.replace_all(r"(\d+)", f"{'0' * 12}$1").str.replace_all(r"\d*(\d{12})", "$1")
    return frame.sort(*PLACE, *rank, padded, "scorer", "n_prototypes", "n_train", maintain_order=True)


def summary(rows: list[results.Row]) -> pl.DataFrame:
    """The frame of summary.csv."""
    lines = [
        (
            *(row.scorer, row.n_prototypes, row.n_train, row.mean_ap, *row.interval, row.spread),
            *(*results.quantiles(row.measured_T, 0.05, 0.95), len(row.measured_T)),
            int(np.isnan(row.train_ap_RT).any(axis=0).sum()),
        )
        for row in rows
    ]
    return pl.DataFrame(lines, results.SUMMARY, orient="row")


def traits(rows: list[results.Row], cells: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """The frame of traits. `row` and `trait_i` are the indices of the cell and of the trait in `names`."""
    rows_T = [(name, results.group(name), results.kind(name)) for name in names]
    of_trait = pl.DataFrame(rows_T, ["trait", "group", "kind"], orient="row").with_row_index("trait_i")
    measured = [
        of_trait.join(pl.DataFrame({"draw": np.arange(len(row.best_RT))}), how="cross")
        .sort("draw", "trait_i")
        .with_columns(
            row=pl.lit(i, pl.UInt32),
            prototype=row.best_RT.ravel(),
            train_ap=row.train_ap_RT.ravel(),
            test_ap=row.test_ap_RT.ravel(),
        )
        for i, row in enumerate(rows)
    ]
    cells = cells.select("row", "scorer_id", *results.CELL)
    found = pl.concat(measured).join(cells, on="row", maintain_order="left")
    return found.select(*results.TRAITS, "row", "trait_i")


def largest(*within: str) -> pl.Expr:
    """Whether a row has the most train images, and among these rows the most prototypes."""
    most = pl.col("n_train") == pl.col("n_train").max().over(within)
    k = pl.when(most).then("n_prototypes")
    return most & (pl.col("n_prototypes") == k.max().over(within))


def kinds(traits: pl.DataFrame) -> pl.DataFrame:
    """The frame of kinds.csv: mAP by kind of trait in each scorer's largest cell, over traits with an AP."""
    last = pl.col("row") == pl.col("row").max().over("scorer")  # of duplicate cells, keep the last
    best = traits.filter(largest("scorer")).filter(last)
    mean = pl.col("test_ap").map_batches(  # NumPy's mean, for the same digits as in summary.csv
        lambda ap: float(np.mean(ap.to_numpy())), returns_scalar=True, return_dtype=pl.Float64
    )
    cell = [*results.CELL, "kind"]
    first = pl.col("row").min().over("scorer")
    return (
        best.group_by(*cell, "trait_i", maintain_order=True)
        .agg(mean)
        .filter(pl.col("test_ap").is_not_nan())
        .group_by(cell, maintain_order=True)
        .agg(n_traits=pl.len().cast(pl.Int64), map=mean)
        .join(traits.select("scorer", first=first).unique(), on="scorer")
        .sort("first", pl.col("kind").cast(pl.Enum(results.KINDS)))
        .select(*results.KIND_COLUMNS)
    )


def differences(cells: pl.DataFrame, boots: list[np.ndarray]) -> pl.DataFrame:
    """Paired differences of mAP between scorers, on the same number of train images, with 95% bootstrap
    intervals.

    Two cells are paired if they share the resamples of the test images and the draws of the train images, so
    that common variation cancels (Efron and Tibshirani 1993). With several draws the interval includes their
    variation. Cells are compared at equal K, else at the baseline's largest smaller K.

    Args:
        boots: (R, M) for each value of the column `row`.
    """
    on = [*PLACE, "seed", "n_boot", "n_train"]
    real = cells.filter(~IS_REFERENCE).with_row_index("order")
    is_alike = pl.col("model") == pl.col("model_other")  # else, the same scorer with fewer or more prototypes
    real = real.with_columns(first=pl.col("order").min().over(*PLACE, "scorer_id"))
    others = real.unique([*on, "scorer_id", "n_prototypes"], keep="last")
    pairs = (
        real.join(others, on=on, suffix="_other")
        .filter(
            pl.col("scorer_id") != pl.col("scorer_id_other"),
            is_alike | (pl.col("of") == pl.col("of_other")),
            pl.col("n_prototypes_other") <= pl.col("n_prototypes"),
        )
        .filter(
            pl.col("n_prototypes_other")
            == pl.col("n_prototypes_other").max().over("order", "scorer_id_other")
        )
        .sort("order", "first_other")
        .rename({"scorer_other": "baseline", "n_prototypes_other": "baseline_prototypes"})
        .with_columns(difference=pl.col("map") - pl.col("map_other"))
    )
    intervals = [
        results.interval(_over_draws(boots[i] - boots[j]), difference)
        if boots[i].size and boots[i].shape == boots[j].shape
        else (None, None)  # they cannot be paired
        for i, j, difference in pairs.select("row", "row_other", "difference").iter_rows()
    ]
    found = pl.DataFrame(intervals, {"low": pl.Float64, "high": pl.Float64}, orient="row")
    return (
        pairs.drop("low", "high")
        .hstack(found)
        .drop_nulls("low")
        .with_columns(excludes_zero=(pl.col("low") > 0) | (pl.col("high") < 0))
        .select(*PLACE, "cls", "cls_other", "model", "model_other", *results.DIFFERENCES)
    )


def _over_draws(boot_RM: np.ndarray) -> np.ndarray:
    """Means over R draws, which are resampled along with the images; M values.

    Corrects the bootstrap's spread over R draws, which is too narrow by sqrt((R - 1) / R).
    """
    (R, M), mean_M = boot_RM.shape, boot_RM.mean(axis=0)
    if R == 1:
        return mean_M
    drawn_RM = np.random.default_rng(R).integers(0, R, (R, M))
    resampled_M = np.take_along_axis(boot_RM, drawn_RM, axis=0).mean(axis=0)
    return mean_M + (resampled_M - mean_M) * np.sqrt(R / (R - 1))


def over_seeds(cells: pl.DataFrame) -> pl.DataFrame:
    """Mean and standard deviation over seeds of each mAP, and of its difference from random activations.

    Differences are between equal seeds. Cells with only one seed are left out.

    Args:
        cells: `scorer` is the name without the seed.
    """
    size = [*PLACE, "model", "n_prototypes", "n_train"]
    found = (
        cells.filter(~IS_REFERENCE)
        .sort("seed", maintain_order=True)
        .group_by("family", *size, maintain_order=True)
        .agg(pl.col("scorer", "cls").first(), "seed", "map")
    )
    bases = found.filter(IS_BASELINE).sort("scorer")
    several = found.filter(pl.col("seed").list.len() > 1)
    compared = several.filter(~IS_BASELINE).join(bases, on=size, how="left", suffix="_other")
    pairs = pl.concat([compared, several.filter(IS_BASELINE)], how="diagonal")
    lines = []
    for values in pairs.select("seed", "map", "seed_other", "map_other").iter_rows():
        seeds, maps, base_seeds, base_maps = (value or [] for value in values)
        base = dict(zip(base_seeds, base_maps, strict=True))
        gaps = [value - base[s] for s, value in zip(seeds, maps, strict=True) if s in base]
        lines.append((len(maps), *_mean_and_spread(maps), *_mean_and_spread(gaps)))
    names = ("n_seeds", "map", "spread", "difference", "difference_spread")
    figures = pl.DataFrame(lines, {name: results.SEEDS[name] for name in names}, orient="row")
    pairs = pairs.drop("map").hstack(figures)
    pairs = pairs.with_columns(baseline=pl.col("scorer_other").fill_null(""))
    return in_order(pairs).select(*PLACE, "cls", *results.SEEDS)


def _mean_and_spread(values: collections.abc.Sequence[float]) -> tuple[float, float]:
    return (
        float(np.mean(values)) if values else float("nan"),
        float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"),
    )
