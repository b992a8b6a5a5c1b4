"""Measures the chosen prototypes, a constant scorer and two probes by average precision on test images.

N images, D d_vit, T traits, M resamples of the test images.
"""

import beartype
import numpy as np
from jaxtyping import Float, Float64, jaxtyped

from saev import helpers
from saev.formats import results
from saev.protoeval import ap, choose, config, probe, score


def measure(
    cells: list[choose.Cell], train: score.Split, test: score.Split, cfg: config.ProtoEval
) -> list[results.Row]:
    """The rows of the constant scorer and of the probes, then one row per cell."""
    meter = Meter(test, cfg)
    rows = [_constant_row(train, meter)]
    pooled = zip(results.PROBES[1:], (train.mean_ND, train.max_ND), (test.mean_ND, test.max_ND), strict=True)
    draws = choose.draws(len(train.labels_NT), cfg).values()
    todo = [(same_n, *each) for each in pooled for same_n in draws]
    for same_n, name, train_ND, test_ND in helpers.progress(todo, "probes", len(todo), "probes"):
        rows.append(_probe_row(name, same_n, train, train_ND, test_ND, meter, cfg.seed))
    for cell in helpers.progress(cells, "measure", len(cells), "cells"):
        found = [meter(test.of(cell.first + choice.best_T)) for choice in cell.choices]
        rows.append(_row(cell.scorer, cell.n_prototypes, cell.n_train, cell.choices, found))
    return rows


class Meter:
    """Test APs, and mAPs on resamples of the test images."""

    def __init__(self, test: score.Split, cfg: config.ProtoEval):
        self.test = test
        self.is_zero = cfg.no_positives == "zero"
        self.times_MN = ap.resamples(len(test.labels_NT), cfg.n_boot, cfg.seed, with_all=True)

    @jaxtyped(typechecker=beartype.beartype)
    def __call__(
        self, scores_TN: Float[np.ndarray, "T N"]
    ) -> tuple[Float64[np.ndarray, " T"], Float64[np.ndarray, " M"]]:
        """AP of row t for trait t, and each resample's mAP over traits with a positive (or all traits)."""
        ap_TM = ap.resampled(scores_TN, self.test.labels_NT, self.times_MN, self.test.known_NT)
        if self.is_zero:
            ap_TM = np.nan_to_num(ap_TM, nan=0.0)
        boot_TM = ap_TM[:, 1:]
        n_M = np.maximum((~np.isnan(boot_TM)).sum(axis=0), 1)
        return ap_TM[:, 0], np.nansum(boot_TM, axis=0) / n_M


def _row(
    name: str, k: int, n: int, choices: list[choose.Choice], measured: list[tuple[np.ndarray, np.ndarray]]
) -> results.Row:
    test_ap, boot = zip(*measured, strict=True)
    return results.Row(
        name,
        k,
        n,
        np.stack([choice.best_T for choice in choices]),
        np.stack([choice.train_ap_T for choice in choices]),
        np.stack(test_ap),
        np.stack(boot),
    )


def _constant_row(train: score.Split, meter: Meter) -> results.Row:
    """The constant scorer, whose AP is the trait's prevalence. Every real scorer should beat it."""
    zeros_NT = np.zeros(train.labels_NT.shape, np.float32)
    train_ap_T = ap.paired(zeros_NT.T, train.labels_NT, train.known_NT)
    choice = choose.Choice(np.zeros(len(train_ap_T), np.int64), train_ap_T)
    measured = meter(np.zeros(meter.test.labels_NT.T.shape, np.float32))
    return _row(results.CONSTANT, 1, len(zeros_NT), [choice], [measured])


def _probe_row(
    name: str,
    same_n: list[np.ndarray],
    train: score.Split,
    train_ND: Float[np.ndarray, "N D"],
    test_ND: Float[np.ndarray, "_ D"],
    meter: Meter,
    seed: int,
) -> results.Row:
    """A probe on pooled activations, trained on the images that scorers choose on: what labels give without
    prototypes."""
    choices, measured = [], []
    for rows_n in same_n:
        own_ND, labels_NT, known_NT = train_ND[rows_n], train.labels_NT[rows_n], train.known_of(rows_n)
        own_NT, test_NT = probe.scores(own_ND, labels_NT, own_ND, test_ND, known_NT=known_NT, seed=seed)
        train_ap_T = ap.paired(own_NT.T, labels_NT, known_NT)
        choices.append(choose.Choice(np.zeros(len(train_ap_T), np.int64), train_ap_T))
        measured.append(meter(test_NT.T))
    return _row(name, 1, len(same_n[0]), choices, measured)
