"""Results of protoeval's image tables: a cell's measurements, how they were made, and the columns of files.

T traits, R draws of train images, M bootstrap resamples of the test images.
"""

import dataclasses
import io
import pathlib
import typing as tp

import beartype
import numpy as np
import polars as pl
from jaxtyping import Float64, Int64

from saev import helpers
from saev.formats import arrays

CONSTANT, BASELINE, NULL = "constant", "Random", "Permuted labels"
"""Scorers that others are compared with: one constant score, random activations, a scorer's prototypes chosen
on permuted labels."""
PROBES = ("Linear probe", "Logistic probe (mean)", "Logistic probe (max)")
"""Supervised references. The first one, a ridge regression on mean activations, is only in older results."""
FIRST = (CONSTANT, *PROBES)
"""They begin each table, in this order."""
REFERENCES = (*FIRST, NULL)

FILES = ("about.json", "summary.csv", "kinds.csv", "resamples.npz", "traits.parquet", "table.md")
"""Files of a results directory that later commands read. Its manifest lists them."""
FOR_GALLERIES = ("prototypes.parquet", "retrieved.parquet")
"""Further ones, which older results lack."""

WEIGHTS_FILE, KEYS_FILE, KEYS_TEXT = "weights.parquet", "keys.parquet", "keys.md"
"""Of models of several prototypes (--several), and of keys (--key-depth)."""
KEY = "key"
"""In place of the number of prototypes of a model."""

CELL = {"scorer": pl.String, "n_prototypes": pl.Int64, "n_train": pl.Int64}
"""Columns that identify a cell of the grid."""
SUMMARY = CELL | {
    **dict.fromkeys(("map", "low", "high", "spread", "q05", "q95"), pl.Float64),
    **dict.fromkeys(("n_traits", "n_traits_without_train_positives"), pl.Int64),
}
KINDS = ("colour", "pattern", "shape", "size", "length", "other")
KIND_COLUMNS = CELL | {"kind": pl.String, "n_traits": pl.Int64, "map": pl.Float64}
DIFFERENCES = CELL | {
    **{"baseline": pl.String, "baseline_prototypes": pl.Int64},
    **dict.fromkeys(("difference", "low", "high"), pl.Float64),
    "excludes_zero": pl.Boolean,
}
SEEDS = CELL | {
    **{"n_seeds": pl.Int64, "map": pl.Float64, "spread": pl.Float64, "baseline": pl.String},
    **{"difference": pl.Float64, "difference_spread": pl.Float64},
}

TRAITS = (
    {"scorer_id": pl.String}
    | CELL
    | {"draw": pl.Int64, "trait": pl.String, "group": pl.String, "kind": pl.String}
    | {"prototype": pl.Int64, "train_ap": pl.Float64, "test_ap": pl.Float64}
)

FAVOURITES = (
    {"scorer_id": pl.String}
    | CELL
    | {"prototype": pl.Int64, "rank": pl.Int64, "trait": pl.String, "train_ap": pl.Float64}
)
RETRIEVED = (
    {"scorer_id": pl.String}
    | CELL
    | {"trait": pl.String, "prototype": pl.Int64, "rank": pl.Int64, "image": pl.String}
    | {"score": pl.Float32, "has_trait": pl.Boolean}
)

WEIGHTS = (
    {"scorer_id": pl.String}
    | CELL
    | {"trait": pl.String, "rank": pl.Int64, "prototype": pl.Int64, "weight": pl.Float64}
    | {"intercept": pl.Float64}
)
KEYS = (
    {"scorer_id": pl.String}
    | CELL
    | {"trait": pl.String, "n_categories": pl.Int64, "depth": pl.Int64, "n_ends": pl.Int64, "ap": pl.Float64}
    | {f"accuracy{end}": pl.Float64 for end in ("", "_low", "_high")}
    | {f"balanced_accuracy{end}": pl.Float64 for end in ("", "_low", "_high")}
)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class ScorerId:
    """A scorer's name and everything that determines it."""

    name: str
    """Shown in tables; not parsed by code."""
    settings: dict[str, tp.Any]
    """Class, settings, seed, and the hashes of its checkpoint and of the activations."""

    @property
    def id(self) -> str:
        return helpers.hash_of(self.settings)[:12]

    @property
    def seedless(self) -> "ScorerId":
        """The scorer without its seed."""
        return ScorerId(self.name, {k: v for k, v in self.settings.items() if k != "seed"})


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class About:
    """How a table was made."""

    vit: str
    layer: int
    tokens: str
    shards: list[str]
    labels: str
    """Hash of paths, split, traits, labels, and non-default settings of the measurement."""
    min_certainty: int
    seed: int
    n_seeds: int
    n_boot: int
    created: str
    """ISO 8601, UTC."""
    scorers: dict[str, dict[str, tp.Any]]
    """Name in the table -> class, settings, and hashes of its checkpoint and of the data it was fitted on."""
    activations: list[str] = dataclasses.field(default_factory=list)
    """Hashes of the train and test activations."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """Implausible labels and ignored images that --force accepted."""
    chosen_on: str = ""
    """Number and split of the images that prototypes are chosen on: "5,994 train images"."""
    measured_on: str = ""
    n_classes: int = 0
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Split -> paths of images that the dump recorded as corrupt."""
    annotations: str = "any"
    n_zero: int = 0
    """Traits without a positive test image that count as AP 0."""
    source: str = ""
    """Where the labels and the split come from. Empty for CUB."""
    n_unknown: int = 0
    """Labels (of an image and a trait) that are missing."""
    n_labels: int = 0
    """All labels, with those that are missing."""
    nulls: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of a row whose prototypes are chosen on permuted labels -> their scorer."""
    patch_labels: str = ""
    """Hash of classes and labels of the train and test patches. Empty without --patch-labels."""
    audit: list[int] = dataclasses.field(default_factory=list)
    """The numbers B of --audit."""
    models: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Rows of several prototypes: name in the table -> the scorer's name, and their number or KEY."""

    def scorer(self, name: str) -> ScorerId:
        """The scorer with this name in the table. The constant scorer is the same in every table."""
        if name == CONSTANT:
            return ScorerId(name, {"cls": CONSTANT})
        if name in self.nulls:
            of = self.scorer(self.nulls[name]).settings
            return ScorerId(name, of | {"cls": NULL, "of": of["cls"]})
        if name in self.models:
            of, model = self.models[name]
            return ScorerId(name, self.scorer(of).settings | {"model": model})
        splits = dict(zip(("activations", "test"), dict.fromkeys(self.activations), strict=False))
        settings = self.scorers.get(name, {"cls": name}) | {"seed": self.seed} | splits
        return ScorerId(name, settings)

    def is_sae(self, name: str) -> bool:
        return self.scorers[name]["cls"] == "Sae"


class Row(tp.NamedTuple):
    """One cell of the grid: a scorer with K prototypes, chosen on n_train images."""

    scorer: str
    n_prototypes: int
    n_train: int
    best_RT: Int64[np.ndarray, "R T"]
    """Prototype chosen for each trait."""
    train_ap_RT: Float64[np.ndarray, "R T"]
    """Its AP on the train images it was chosen on; NaN without a positive among them."""
    test_ap_RT: Float64[np.ndarray, "R T"]
    """Its AP on all test images; NaN without a positive among them."""
    boot_RM: Float64[np.ndarray, "R M"]
    """mAP of each draw on resamples of the test images. All rows share the resamples."""

    @property
    def measured_T(self) -> Float64[np.ndarray, " T"]:
        """Test APs, averaged over draws, of the traits that have one."""
        ap_T = self.test_ap_RT.mean(axis=0)
        return ap_T[~np.isnan(ap_T)]

    @property
    def mean_ap(self) -> float:
        """mAP over the traits with a test positive."""
        return float(self.measured_T.mean()) if len(self.measured_T) else float("nan")

    @property
    def spread(self) -> float:
        """Standard deviation of the mAP over draws; NaN with one draw."""
        if len(self.test_ap_RT) < 2 or not len(self.measured_T):
            return float("nan")
        return float(np.nanmean(self.test_ap_RT, axis=1).std(ddof=1))

    @property
    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval over test images of the mAP (averaged over draws); NaN without resamples."""
        return share_interval(self.boot_RM.mean(axis=0), self.mean_ap)


def measured(value_M: np.ndarray, is_share: bool = True) -> tuple[float, float, float]:
    """(value, its 95% interval) of a measure on all test images, then on resamples of them."""
    value, boot_M = float(value_M[0]), value_M[1:]
    return value, *(share_interval if is_share else interval)(boot_M, value)


def share_interval(boot_M: np.ndarray, value: float) -> tuple[float, float]:
    """`interval` of an average precision, an accuracy or another share, which is at least 0 and at most 1."""
    low, high = np.clip(interval(boot_M, value), 0, 1).tolist()
    return low, high


def interval(boot_M: np.ndarray, value: float) -> tuple[float, float]:
    """95% interval: quantiles of the bootstrap distribution, shifted so that its mean is `value`.

    The shift removes a small bias: images that are drawn twice rank together, which raises every AP. The
    interval always includes `value`, also if less than 2.5% of the resamples differ from the others.
    """
    low, high = quantiles(boot_M, 0.025, 0.975)
    if not len(boot_M):
        return low, high
    shift = value - float(boot_M.mean())
    return float(np.minimum(low + shift, value)), float(np.maximum(high + shift, value))


def quantiles(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Two quantiles; NaN without values."""
    if not len(values):
        return float("nan"), float("nan")
    a, b = np.quantile(values, [low, high]).tolist()
    return a, b


# ---- traits and their kinds ----


def group(trait: str) -> str:
    """has_wing_color::blue -> has_wing_color."""
    return trait.partition("::")[0]


def kind(trait: str) -> str:
    """A trait's kind, from the last word of its group: has_wing_color::blue -> colour."""
    last = group(trait).rpartition("_")[2]
    return {"color": "colour"}.get(last, last if last in KINDS else "other")


# ---- files ----


def write_resamples(fpath: pathlib.Path, rows: list[Row]) -> None:
    """Writes each row's `boot_RM` in the order of summary.csv, for comparisons with other results."""
    arrays.write(fpath, {str(i): row.boot_RM for i, row in enumerate(rows)}, np.savez_compressed)


def read_resamples(data: bytes, n_rows: int) -> list[np.ndarray]:
    """Reads what `write_resamples` wrote.

    Raises:
        OSError, ValueError, KeyError: it is not such a file.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        out = [found[str(i)] for i in range(n_rows)]
    if any(boot_RM.ndim != 2 or boot_RM.dtype != np.float64 for boot_RM in out):
        raise ValueError("the arrays are not (draws, resamples)")
    return out
