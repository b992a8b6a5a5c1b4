"""Results of protoeval: the summary table, and the per-trait, per-kind and difference tables.

T traits, R draws of the train images, M bootstrap resamples of the test images.
"""

import collections.abc
import csv
import dataclasses
import io
import pathlib
import typing as tp

import beartype
import numpy as np
from jaxtyping import Float64, Int64

from saev import helpers

CONSTANT, PROBE, BASELINE = "constant", "Linear probe", "Random"
"""Names of the rows that others are held against: the floor, the supervised reference, what a scorer must beat."""
REFERENCES = (CONSTANT, PROBE)

FILES = ("about.json", "summary.csv", "kinds.csv", "resamples.npz", "traits.parquet", "table.md")
"""What later commands read of a results directory: all in its manifest."""

SUMMARY = (
    "scorer",
    "n_prototypes",
    "n_train",
    "map",
    "low",
    "high",
    "spread",
    "q05",
    "q95",
    "n_traits",
    "n_traits_without_train_positives",
)
KINDS = ("colour", "pattern", "shape", "size", "length", "other")
KIND_COLUMNS = ("scorer", "n_prototypes", "n_train", "kind", "n_traits", "map")
DIFFERENCES = (
    "scorer",
    "n_prototypes",
    "n_train",
    "baseline",
    "baseline_prototypes",
    "difference",
    "low",
    "high",
    "excludes_zero",
)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class About:
    """What a table is of."""

    vit: str
    layer: int
    tokens: str
    shards: list[str]
    labels: str
    """Hash of paths, split, traits and labels, and of whatever else than usual is measured."""
    min_certainty: int
    seed: int
    n_seeds: int
    n_boot: int
    created: str
    """ISO 8601, UTC."""
    scorers: dict[str, dict[str, tp.Any]]
    """By name in the table, all that decides a scorer: class, settings, the hashes of its checkpoint and of what it was fitted on."""
    activations: list[str] = dataclasses.field(default_factory=list)
    """Hashes of the train and of the test activations."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """What is implausible about the labels, or was left out, where --force went on all the same."""
    chosen_on: str = ""
    """Number of images that prototypes are chosen on, and of which split: "5,994 train images"."""
    measured_on: str = ""
    n_classes: int = 0
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """By split, paths of the images that the dump recorded as corrupt."""
    annotations: str = "any"
    n_zero: int = 0
    """Traits without a positive test image that count as AP 0."""


SEEDS = (
    "scorer",
    "n_prototypes",
    "n_train",
    "n_seeds",
    "map",
    "spread",
    "baseline",
    "difference",
    "difference_spread",
)


class Measured(tp.NamedTuple):
    """What differences are taken of."""

    scorer: str
    n_prototypes: int
    n_train: int
    mean_ap: float
    boot_RM: Float64[np.ndarray, "R M"]
    """mAP of each draw of the train images on the same resamples of the test images."""


class Row(tp.NamedTuple):
    """One cell of the grid: a scorer with K prototypes, chosen on n_train images."""

    scorer: str
    n_prototypes: int
    n_train: int
    best_RT: Int64[np.ndarray, "R T"]
    """Chosen prototype of each trait."""
    train_ap_RT: Float64[np.ndarray, "R T"]
    """Its AP on the train images it was chosen on; NaN where these hold no positive."""
    test_ap_RT: Float64[np.ndarray, "R T"]
    """Its AP on all test images; NaN where these hold no positive."""
    boot_RM: Float64[np.ndarray, "R M"]
    """mAP of each draw on resamples of the test images, the same resamples for all rows."""

    @property
    def measured(self) -> Measured:
        return Measured(self.scorer, self.n_prototypes, self.n_train, self.mean_ap, self.boot_RM)

    @property
    def measured_T(self) -> Float64[np.ndarray, " T"]:
        """Test APs, means over draws, of the traits that have one."""
        ap_T = self.test_ap_RT.mean(axis=0)
        return ap_T[~np.isnan(ap_T)]

    @property
    def mean_ap(self) -> float:
        """mAP over the traits with a test positive."""
        return float(self.measured_T.mean()) if len(self.measured_T) else float("nan")

    @property
    def spread(self) -> float:
        """Standard deviation of the mAP over draws; NaN of one draw."""
        if len(self.test_ap_RT) < 2 or not len(self.measured_T):
            return float("nan")
        return float(np.nanmean(self.test_ap_RT, axis=1).std(ddof=1))

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mAP (mean over draws) over test images, by the bootstrap; NaN without resamples."""
        return interval(self.boot_RM.mean(axis=0), self.mean_ap)

    @property
    def quantiles(self) -> tuple[float, float]:
        """5% and 95% quantiles over the same traits."""
        return _quantiles(self.measured_T, 0.05, 0.95)


@beartype.beartype
def interval(boot_M: np.ndarray, value: float) -> tuple[float, float]:
    """95% interval: quantiles of the bootstrap distribution, centred on the value: images drawn twice rank together, which raises every AP a little."""
    low, high = _quantiles(boot_M, 0.025, 0.975)
    shift = value - float(boot_M.mean()) if len(boot_M) else 0.0
    return low + shift, high + shift


def _quantiles(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    if not len(values):
        return float("nan"), float("nan")
    a, b = np.quantile(values, [low, high]).tolist()
    return a, b


@beartype.beartype
def is_reference(scorer: str) -> bool:
    """Is this one of the rows that others are held against (which a name may tell apart from others)?"""
    return scorer.startswith(REFERENCES)


@beartype.beartype
def summary(row: Row) -> dict[str, object]:
    """One line of summary.csv."""
    values = (
        row.scorer,
        row.n_prototypes,
        row.n_train,
        row.mean_ap,
        *row.interval,
        row.spread,
        *row.quantiles,
        len(row.measured_T),
        int(np.isnan(row.train_ap_RT).any(axis=0).sum()),
    )
    return dict(zip(SUMMARY, values, strict=True))


# ---- traits and their kinds ----


@beartype.beartype
def group(trait: str) -> str:
    """has_wing_color::blue -> has_wing_color."""
    return trait.partition("::")[0]


@beartype.beartype
def kind(trait: str) -> str:
    """What a trait is about, by the last word of its group."""
    last = group(trait).rpartition("_")[2]
    return {"color": "colour"}.get(last, last if last in KINDS else "other")


@beartype.beartype
def write_traits(fpath: pathlib.Path, rows: list[Row], names: list[str]) -> None:
    """One line for each row, draw and trait, as parquet, atomically."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, list[object]] = {}
    names = [helpers.printable(name) for name in names]
    for row in rows:
        n_R, n_T = row.best_RT.shape
        part = {
            "scorer": [row.scorer] * n_R * n_T,
            "n_prototypes": [row.n_prototypes] * n_R * n_T,
            "n_train": [row.n_train] * n_R * n_T,
            "draw": np.repeat(np.arange(n_R), n_T).tolist(),
            "trait": names * n_R,
            "group": [group(name) for name in names] * n_R,
            "kind": [kind(name) for name in names] * n_R,
            "prototype": row.best_RT.ravel().tolist(),
            "train_ap": row.train_ap_RT.ravel().tolist(),
            "test_ap": row.test_ap_RT.ravel().tolist(),
        }
        for name, values in part.items():
            columns.setdefault(name, []).extend(values)
    with (
        helpers.atomic(fpath) as tmp_fpath,
        tmp_fpath.open("wb") as fd,
    ):  # pyarrow opens UTF-8 paths only
        pyarrow.parquet.write_table(pyarrow.table(columns), fd)


@beartype.beartype
def best_traits(data: bytes, scorer: str) -> list[dict[str, tp.Any]]:
    """A scorer's lines of traits.parquet with most prototypes and train images (first draw), best test AP first."""
    import pyarrow
    import pyarrow.parquet

    lines = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    mine = [line for line in lines if line["scorer"] == scorer and line["draw"] == 0]
    most = max((line["n_train"], line["n_prototypes"]) for line in mine)
    best = [line for line in mine if (line["n_train"], line["n_prototypes"]) == most]
    return sorted(best, key=lambda line: -np.nan_to_num(line["test_ap"], nan=-1.0))


@beartype.beartype
def by_kind(rows: list[Row], names: list[str]) -> list[dict[str, object]]:
    """mAP of the traits of each kind: of each scorer's row with most prototypes and train images."""
    kinds = np.array([kind(name) for name in names])
    best: dict[str, Row] = {}
    for row in rows:
        now = best.get(row.scorer, row)
        if (row.n_train, row.n_prototypes) >= (now.n_train, now.n_prototypes):
            best[row.scorer] = row
    lines = []
    for row in best.values():
        ap_T = row.test_ap_RT.mean(axis=0)
        for k in KINDS:
            found_T = ap_T[(kinds == k) & ~np.isnan(ap_T)]
            if len(found_T):
                cell = (row.scorer, row.n_prototypes, row.n_train, k, len(found_T))
                line = (*cell, float(found_T.mean()))
                lines.append(dict(zip(KIND_COLUMNS, line, strict=True)))
    return lines


# ---- files ----


@beartype.beartype
def write_csv(
    fpath: pathlib.Path, header: tuple[str, ...], lines: collections.abc.Iterable[dict[str, object]]
) -> None:
    """Writes a CSV file atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    helpers.write_text(fpath, text.getvalue())


@beartype.beartype
def write_resamples(fpath: pathlib.Path, rows: list[Row]) -> None:
    """Writes each row's `boot_RM`, in the order of summary.csv, atomically: other results are held against these rows."""
    with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
        np.savez_compressed(fd, **{str(i): row.boot_RM for i, row in enumerate(rows)})


@beartype.beartype
def read_resamples(data: bytes, n_rows: int) -> list[np.ndarray]:
    """What `write_resamples` wrote.

    Raises:
        OSError, ValueError, KeyError: not such a file.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        out = [arrays[str(i)] for i in range(n_rows)]
    if any(boot_RM.ndim != 2 or boot_RM.dtype != np.float64 for boot_RM in out):
        raise ValueError("the arrays are not (draws, resamples)")
    return out


@beartype.beartype
def read_csv(data: bytes, header: tuple[str, ...]) -> list[dict[str, tp.Any]]:
    """Reads what `write_csv` wrote: numbers as numbers.

    Raises:
        ValueError: another header, or a cell that should be a number and is not.
    """
    texts = {"scorer", "baseline", "kind", "excludes_zero"}
    reader = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""))
    if tuple(reader.fieldnames or ()) != header:
        raise ValueError(f"its columns are {reader.fieldnames}")
    return [
        {key: value if key in texts else _number(value) for key, value in line.items()}
        for line in reader
    ]


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)
