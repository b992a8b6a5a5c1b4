"""Results of protoeval: the summary table and the per-trait table, as CSV and markdown. T traits."""

import collections.abc
import csv
import io
import pathlib
import typing as tp

import beartype
import numpy as np
from jaxtyping import Float64, Int64

from saev import helpers

SUMMARY = (
    "scorer",
    "n_prototypes",
    "n_train",
    "map",
    "q05",
    "q95",
    "n_traits",
    "n_traits_without_train_positives",
)
TRAITS = ("scorer", "n_prototypes", "n_train", "trait", "group", "prototype", "train_ap", "test_ap")


class Row(tp.NamedTuple):
    """One cell of the grid: a scorer with K prototypes, chosen on n_train images.

    R draws of the train images, M bootstrap resamples of the test images.
    """

    scorer: str
    n_prototypes: int
    n_train: int
    best_RT: Int64[np.ndarray, "R T"]
    """Chosen prototype of each trait."""
    train_ap_RT: Float64[np.ndarray, "R T"]
    """Its AP on the train images it was chosen on; NaN where these hold no positive."""
    test_ap_RT: Float64[np.ndarray, "R T"]
    """Its AP on all test images; NaN where these hold no positive."""
    boot_M: Float64[np.ndarray, " M"]
    """mAP (mean over draws) on resamples of the test images, the same resamples for all rows."""

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
    def quantiles(self) -> tuple[float, float]:
        """5% and 95% quantiles over the same traits."""
        if not len(self.measured_T):
            return float("nan"), float("nan")
        low, high = np.quantile(self.measured_T, [0.05, 0.95]).tolist()
        return low, high


@beartype.beartype
def summary(row: Row) -> dict[str, object]:
    """One line of summary.csv."""
    values = (
        row.scorer,
        row.n_prototypes,
        row.n_train,
        row.mean_ap,
        *row.quantiles,
        len(row.measured_T),
        int(np.isnan(row.train_ap_RT).any(axis=0).sum()),
    )
    return dict(zip(SUMMARY, values, strict=True))


@beartype.beartype
def trait_lines(row: Row, names: list[str]) -> collections.abc.Iterator[dict[str, object]]:
    """The lines of traits.csv; a trait's group is its name up to '::'."""
    columns = zip(
        names,
        row.best_RT[0].tolist(),
        row.train_ap_RT[0].tolist(),
        row.test_ap_RT[0].tolist(),
        strict=True,
    )
    for name, best, train_ap, test_ap in columns:
        group = name.partition("::")[0]
        values = (row.scorer, row.n_prototypes, row.n_train, name, group, best, train_ap, test_ap)
        yield dict(zip(TRAITS, values, strict=True))


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
def markdown(rows: list[Row]) -> str:
    """The table as papers print it."""
    lines = ["| Scorer | Prototypes | Train | mAP | 5% | 95% |", "|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row.quantiles
        cells = (f"{row.mean_ap:.3f}", f"{low:.3f}", f"{high:.3f}")
        lines.append(
            f"| {row.scorer} | {row.n_prototypes:,} | {row.n_train:,} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"
