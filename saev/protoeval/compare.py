"""Differences between scorers, and what they are over seeds. R draws of the train images, M resamples of the test images."""

import typing as tp

import beartype
import numpy as np

from saev.formats import results


@beartype.beartype
def differences(rows: list[results.Measured]) -> list[dict[str, object]]:
    """mAP of each scorer less that of each other one chosen on as many train images, with its paired bootstrap interval.

    Both are measured on the same resamples of the test images, and each draw of the train images is the same for both, so what
    they have in common cancels (Efron and Tibshirani 1993). Of several draws the interval is over these too. The other one has as
    many prototypes, or where no row of it has as many, the largest smaller number.
    """
    real = [row for row in rows if not results.is_reference(row.scorer) and row.boot_RM.size]
    others: dict[str, dict[tuple[int, int], results.Measured]] = {}
    for row in real:
        others.setdefault(row.scorer, {})[row.n_prototypes, row.n_train] = row
    lines = []
    for row in real:
        for name, cells in others.items():
            smaller = [k for k, n in cells if n == row.n_train and k <= row.n_prototypes]
            other = cells[max(smaller), row.n_train] if smaller else row
            if name == row.scorer or not smaller or other.boot_RM.shape != row.boot_RM.shape:
                continue
            difference = row.mean_ap - other.mean_ap
            low, high = results.interval(_over_draws(row.boot_RM - other.boot_RM), difference)
            cell = (row.scorer, row.n_prototypes, row.n_train, name, other.n_prototypes, difference)
            line = (*cell, low, high, low > 0 or high < 0)
            lines.append(dict(zip(results.DIFFERENCES, line, strict=True)))
    return lines


def _over_draws(boot_RM: np.ndarray) -> np.ndarray:
    """Means over R of R draws, resampled with each resample of the images; M values.

    With few draws the bootstrap's spread over them is too narrow by sqrt((R - 1) / R), which is given back.
    """
    (R, M), mean_M = boot_RM.shape, boot_RM.mean(axis=0)
    if R == 1:
        return mean_M
    drawn_RM = np.random.default_rng(R).integers(0, R, (R, M))
    resampled_M = np.take_along_axis(boot_RM, drawn_RM, axis=0).mean(axis=0)
    return mean_M + (resampled_M - mean_M) * np.sqrt(R / (R - 1))


@beartype.beartype
def is_baseline(scorer: str) -> bool:
    """Are these random activations (which a name may tell apart from others)?"""
    return scorer.split(" ")[0] == results.BASELINE


@beartype.beartype
def over_seeds(
    maps: dict[tuple[str, int, int], dict[int | None, float]],
) -> list[dict[str, object]]:
    """Means and standard deviations over seeds: of each mAP, and of its difference to random activations of the same seed.

    Args:
        maps: (scorer, prototypes, train images) -> seed -> mAP. Rows of one seed are left out.
    """
    lines = []
    for (scorer, k, n), of_seed in maps.items():
        if len(of_seed) < 2 or results.is_reference(scorer):
            continue
        line = (scorer, k, n, len(of_seed), *_mean_and_spread(list(of_seed.values())))
        others = (
            []
            if is_baseline(scorer)
            else [c for c in maps if is_baseline(c[0]) and c[1:] == (k, n)]
        )
        for other in others or [("", k, n)]:
            base = maps.get(other, {})
            gaps = [value - base[seed] for seed, value in of_seed.items() if seed in base]
            cell = (*line, other[0], *_mean_and_spread(gaps))
            lines.append(dict(zip(results.SEEDS, cell, strict=True)))
    return lines


def _mean_and_spread(values: list[float]) -> tuple[float, float]:
    return (
        float(np.mean(values)) if values else float("nan"),
        float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"),
    )


@beartype.beartype
def against_baseline(lines: list[dict[str, tp.Any]]) -> list[dict[str, tp.Any]]:
    """Of the differences those of other scorers less random activations."""
    return [x for x in lines if is_baseline(x["baseline"]) and not is_baseline(x["scorer"])]
