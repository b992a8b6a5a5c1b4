"""Results of protoeval on patch labels: rows of the patch table and of the audit, and the columns of files.

C classes of patches, B ranked prototypes.
"""

import dataclasses
import typing as tp

import beartype
import numpy as np
import polars as pl
from jaxtyping import Float64, Int64, jaxtyped

# ---- the patch table ----

PATCH_FILES = ("patches.csv", "patch-classes.csv", "patch-differences.csv", "patches.md")
"""Files that a results directory has besides, with --patch-labels."""
PURITY_FIRST, TAU = 16, 0.3
"""Patches that purity looks at, and the AP from which a class counts as covered (arXiv 2511.17735)."""
PERMUTED = ", permuted labels"
"""Ends the name of a scorer whose prototypes are chosen on permuted labels."""
PATCH_MEASURES = ("probe_r", "map", "purity", "coverage")
"""All but the first one are shares."""
PATCH_CELL = {"scorer": pl.String, "n_prototypes": pl.Int64}
PATCHES = (
    PATCH_CELL
    | {"n_classes": pl.Int64}
    | {name + end: pl.Float64 for name in PATCH_MEASURES for end in ("", "_low", "_high")}
)
PATCH_CLASSES = (
    PATCH_CELL
    | {"class": pl.String, "n_train_patches": pl.Int64, "n_test_patches": pl.Int64, "prototype": pl.Int64}
    | dict.fromkeys(("weight", "intercept", "train_r", "probe_r", "ap", "purity"), pl.Float64)
)
PATCH_DIFFERENCES = (
    PATCH_CELL
    | {"baseline": pl.String, "baseline_prototypes": pl.Int64, "measure": pl.String}
    | dict.fromkeys(("difference", "low", "high"), pl.Float64)
    | {"excludes_zero": pl.Boolean}
)

# ---- the audit ----

AUDIT_FILES = ("audit.parquet", "audit-yields.csv", "audit-differences.csv", "audit.md")
"""Files that a results directory has besides, with --audit."""
AUDIT = (
    PATCH_CELL
    | {"rank": pl.Int64, "prototype": pl.Int64, "penalty": pl.Float64, "trait": pl.String}
    | {"weight": pl.Float64, "class": pl.String}
    | dict.fromkeys(("train_ap", "test_ap", "purity", "highest_ap"), pl.Float64)
    | {"localises": pl.Boolean}
)
AUDIT_YIELDS = (
    PATCH_CELL
    | {"measure": pl.String}
    | dict.fromkeys(("value", "low", "high", "null", "null_low", "null_high", "p", "any_class"), pl.Float64)
)
AREA = "area"
"""Name of the area under the yields, the mean of Yield(1), Yield(2), ... up to the largest B."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class PatchChoice:
    """The prototypes that are chosen for classes of patches, among the first K of a scorer. C classes."""

    scorer: str
    scorer_i: int
    """Its place in the experiment."""
    n_prototypes: int
    best_C: Int64[np.ndarray, " C"]
    """Prototype chosen for each class."""
    w_C: Float64[np.ndarray, " C"]
    b_C: Float64[np.ndarray, " C"]
    """Weight and intercept of its regression."""
    train_r_C: Float64[np.ndarray, " C"]
    """Probe R on the train patches."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class PatchRow(PatchChoice):
    """One row of the patch table. Measures are NaN for classes that no train patch or no test patch has.

    M: all test images, then resamples of them, which all rows share.
    """

    r_CM: Float64[np.ndarray, "C M"]
    ap_CM: Float64[np.ndarray, "C M"]
    purity_CM: Float64[np.ndarray, "C M"]

    def means_M(self, measure: str) -> Float64[np.ndarray, " M"]:
        """The mean of one of PATCH_MEASURES over classes."""
        if measure == "coverage":
            covered_CM = np.where(np.isnan(self.ap_CM), np.nan, self.ap_CM >= TAU)
            return np.nanmean(covered_CM, axis=0)
        of = {"probe_r": self.r_CM, "map": self.ap_CM, "purity": self.purity_CM}
        return np.nanmean(of[measure], axis=0)


class PatchTable(tp.NamedTuple):
    names: list[str]
    """Of the classes."""
    n_train_C: Int64[np.ndarray, " C"]
    n_test_C: Int64[np.ndarray, " C"]
    """Patches of each class."""
    rows: list[PatchRow]


@jaxtyped(typechecker=beartype.beartype)
class Ranking(tp.NamedTuple):
    """A scorer's first B prototypes, ranked by the image labels of train images."""

    prototype_B: Int64[np.ndarray, " B"]
    penalty_B: Float64[np.ndarray, " B"]
    """Penalty at which it enters the model, as a share of the largest; NaN: it does not."""
    trait_B: Int64[np.ndarray, " B"]
    """Trait with its largest weight at this penalty; -1: none."""
    weight_B: Float64[np.ndarray, " B"]
    """That weight, for standardised scores."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class AuditRow:
    """The audit of ranked prototypes.

    M: all test images, then resamples of them, which all rows share. P permutations of the image labels.
    """

    scorer: str
    n_prototypes: int
    ranking: Ranking
    class_B: Int64[np.ndarray, " B"]
    """Class of patches with the highest AP on train images."""
    train_ap_B: Float64[np.ndarray, " B"]
    ap_BM: Float64[np.ndarray, "B M"]
    """AP of this class on test images; NaN in resamples without it."""
    purity_B: Float64[np.ndarray, " B"]
    highest_ap_B: Float64[np.ndarray, " B"]
    """Highest AP of any class on the test images: selected on them, so too high."""
    null_ap_PB: Float64[np.ndarray, "P B"]
    """`ap_BM` of the prototypes that are ranked by permuted image labels, on all test images."""

    def means_M(self, measure: str) -> Float64[np.ndarray, " M"]:
        """Yield("10") is "10". AREA: the area under the yields."""
        return yields(self.ap_BM, measure)

    def null_P(self, measure: str) -> Float64[np.ndarray, " P"]:
        return yields(self.null_ap_PB.T, measure)


def yields(ap_BM: Float64[np.ndarray, "B M"], measure: str) -> Float64[np.ndarray, " M"]:
    """Share of the first B prototypes with an AP of at least TAU. measure: B, or AREA for the mean over all
    B. NaN, of a class without a patch, is less."""
    localises_BM = ap_BM >= TAU
    if measure == AREA:
        n_B = np.arange(1, len(ap_BM) + 1)
        return (localises_BM.cumsum(axis=0) / n_B[:, None]).mean(axis=0)
    return localises_BM[: int(measure)].mean(axis=0)


class AuditTable(tp.NamedTuple):
    budgets: list[int]
    """The numbers B, ascending."""
    names: list[str]
    """Of the classes of patches."""
    audited: list[int]
    """Classes that are audited."""
    traits: list[str]
    rows: list[AuditRow]
    """The constant scorer's first."""

    @property
    def measures(self) -> list[str]:
        return [*map(str, self.budgets), AREA]
