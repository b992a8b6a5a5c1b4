"""Proposes prototypes by image labels and audits them on patch labels (docs/audit.md).

A ranking by the image labels of the train images proposes the first B prototypes. Each gets the class of
patches that it finds best on the train images, and is measured for this class on the test images.

N labelled patches, I test images, K prototypes, C audited classes, B prototypes that are audited, M resamples
of the test images, P permutations of the image labels.
"""

import collections.abc
import logging
import pathlib

import numpy as np
import torch
from jaxtyping import Float64, Int64

from saev import errors, helpers, scorers
from saev.formats import arrays, patchresults, results
from saev.protoeval import ap, audit_rank, choose, config, fit, patch_join, patch_table, score
from saev.protoeval.experiment import Experiment

logger = logging.getLogger("saev")

N_NULL = 20
"""Permutations of the image labels."""
BACKGROUND = "background"
"""Class that does not count as a part."""


def check(banks: list[fit.Bank], cfg: config.ProtoEval, patches: patch_join.Labels) -> None:
    """Refuses an impossible audit before images are scored.

    Raises:
        UserError: a scorer has fewer prototypes than the largest B, or no class of patches can be audited.
    """
    for i in _audited_banks(banks):
        if max(banks[i].ks) < max(cfg.audit):
            raise errors.UserError(
                f"--audit {max(cfg.audit)}: {banks[i].name} has {max(banks[i].ks):,} prototypes. Pass "
                "smaller numbers, or more prototypes (--n-prototypes)."
            )
    class_C = _classes(patches)
    logger.info("audit: %d of %d classes of patches", len(class_C), len(patches.names))
    if not len(class_C):
        raise errors.UserError(
            f"--audit: no class of {cfg.patch_labels} can be audited: each is {BACKGROUND}, has no "
            f"train or no test patches, or has {patchresults.TAU:.0%} or more of the train patches. Label "
            "smaller parts."
        )


def evaluate(
    experiment: Experiment,
    banks: list[fit.Bank],
    train: score.Split,
    patches: patch_join.Labels,
    dpath: pathlib.Path,
) -> patchresults.AuditTable:
    """The audit of each scorer's prototypes, in its largest number.

    Args:
        train: scores of the images to choose on.
        dpath: folder of a killed audit, which is resumed.

    Raises:
        UserError: bad shards, or a score that is not finite.
    """
    cfg = experiment.cfgs[0]
    run, device = fit.on_device(banks, cfg)
    rankings = {
        i: _rankings(banks, i, experiment, train, dpath) for i in _audited_banks(banks)
    }  # the first is by the labels, the others are by permuted ones
    meter = _Meter(run, patches, cfg, device)
    columns = {(i, k) for i, some in rankings.items() for each in some for k in each.prototype_B.tolist()}
    meter.measure(columns, {(i, k) for i, some in rankings.items() for k in some[0].prototype_B.tolist()})
    rows = [_constant(meter, max(cfg.audit))]
    rows += [_row(banks[i], i, some, meter) for i, some in rankings.items()]
    names = experiment.labels.attribute_names_T
    return patchresults.AuditTable(sorted(set(cfg.audit)), patches.names, meter.class_C.tolist(), names, rows)


def _audited_banks(banks: list[fit.Bank]) -> list[int]:
    """The bank with the most prototypes of each scorer: k-means has one for each number."""
    largest = {bank.name: i for i, bank in sorted(enumerate(banks), key=lambda each: max(each[1].ks))}
    return sorted(largest.values())


def _classes(patches: patch_join.Labels) -> Int64[np.ndarray, " C"]:
    """The audited classes: those that train and test patches have, without the background and those that are
    so frequent that a constant score would reach TAU."""
    n_C, _ = patch_table.counts(patches)
    is_part_C = np.array([name != BACKGROUND for name in patches.names])
    return np.flatnonzero(patch_table.is_used(patches) & is_part_C & (n_C / n_C.sum() < patchresults.TAU))


# ---- proposing ----


def _rankings(
    banks: list[fit.Bank], bank_i: int, experiment: Experiment, train: score.Split, dpath: pathlib.Path
) -> list[patchresults.Ranking]:
    """A scorer's prototypes, ranked by the image labels and by N_NULL permutations of them."""
    cfg, bank = experiment.cfgs[0], banks[bank_i]
    first = sum(other.scorer.n_prototypes for other in banks[:bank_i])
    x = audit_rank.images(train, first, max(bank.ks), cfg.memory_gb)
    n, n_imgs = max(cfg.audit), len(train.labels_NT)
    out = []
    for p in helpers.progress(range(1 + N_NULL), f"rank {bank.name}", 1 + N_NULL, "rankings"):
        parts = [audit_rank.REVISION, experiment.id, bank.scorer.digest(), max(bank.ks), n, p]
        key = helpers.hash_of(parts)
        fpath = dpath / f"{key[:16]}.npz"
        if saved := arrays.read_state(fpath, key, patchresults.Ranking._fields):
            out.append(patchresults.Ranking(**saved))
            continue
        order_N = np.arange(n_imgs)
        if p:
            order_N = np.random.default_rng((cfg.seed, 0xA0D17, p)).permutation(n_imgs)
        out.append(audit_rank.rank(x, train.labels_NT[order_N], train.known_of(order_N), n))
        arrays.write_state(fpath, key, out[-1]._asdict())
    return out


# ---- auditing ----


class _Meter:
    """Measures prototypes on train and test patches."""

    def __init__(
        self,
        run: list[scorers.Scorer],
        labels: patch_join.Labels,
        cfg: config.ProtoEval,
        device: torch.device,
    ):
        self.run, self.labels, self.device, self.memory_gb = run, labels, device, cfg.memory_gb
        self.class_C = _classes(labels)
        self.patches = patch_table.test_patches(labels, cfg)
        self.train_C: dict[patch_table.Column, Float64[np.ndarray, " C"]] = {}
        """Each column's APs on the train patches."""
        self.test_C: dict[patch_table.Column, Float64[np.ndarray, " C"]] = {}
        self.resampled: dict[patch_table.Column, tuple[np.ndarray, float]] = {}
        """(AP (M,), purity) for the class that is best on the train patches."""

    def measure(
        self, columns: set[patch_table.Column], resampled: collections.abc.Set[patch_table.Column]
    ) -> None:
        """Measures columns, some of them also on resamples of the test images."""
        self._measure_side(self.labels.chosen, self.train_C, columns, frozenset())
        self._measure_side(self.labels.measured, self.test_C, columns, resampled)

    def _measure_side(
        self,
        side: patch_join.Side,
        found: dict[patch_table.Column, Float64[np.ndarray, " C"]],
        columns: set[patch_table.Column],
        resampled: collections.abc.Set[patch_table.Column],
    ) -> None:
        is_class_NC = side.class_NX[side.class_NX >= 0][:, None] == self.class_C
        for some, scores_KN in patch_table.scored(self.run, columns, side, self.memory_gb, self.device):
            found |= dict(zip(some, ap.of_rows(scores_KN, is_class_NC), strict=True))
            self._resample(scores_KN, [i for i, column in enumerate(some) if column in resampled], some)

    def _resample(self, scores_KN: np.ndarray, rows: list[int], columns: list[patch_table.Column]) -> None:
        steps = range(0, len(rows), patch_table.PAIRS)
        for at in helpers.progress(steps, "audit", len(steps), "steps"):
            part = rows[at : at + patch_table.PAIRS]
            class_T = self.class_C[[self.best(columns[row]) for row in part]]
            found = ap.resampled_patches(
                scores_KN[part],
                self.patches.class_N[:, None] == class_T,
                self.patches.image_N,
                self.patches.times_MI,
                patchresults.PURITY_FIRST,
            )
            for row, ap_M, purity_M in zip(part, *found, strict=True):
                self.resampled[columns[row]] = (ap_M, float(purity_M[0]))

    def best(self, column: patch_table.Column) -> int:
        """The class with the highest AP on train patches (the first of several), among the audited ones."""
        return int(self.train_C[column].round(choose.AP_DIGITS).argmax())

    def test_ap(self, column: patch_table.Column) -> float:
        """The AP on test patches for that class."""
        return float(self.test_C[column][self.best(column)])


def _row(
    bank: fit.Bank, bank_i: int, rankings: list[patchresults.Ranking], meter: _Meter
) -> patchresults.AuditRow:
    own, *nulls = rankings
    columns = [(bank_i, k) for k in own.prototype_B.tolist()]
    best_B = [meter.best(column) for column in columns]
    ap_M_B, purity_B = zip(*(meter.resampled[column] for column in columns), strict=True)
    null_ap_PB = [[meter.test_ap((bank_i, k)) for k in null.prototype_B.tolist()] for null in nulls]
    return patchresults.AuditRow(
        scorer=bank.name,
        n_prototypes=max(bank.ks),
        ranking=own,
        class_B=meter.class_C[best_B],
        train_ap_B=np.array([meter.train_C[column][c] for column, c in zip(columns, best_B, strict=True)]),
        ap_BM=np.stack(ap_M_B),
        purity_B=np.array(purity_B),
        highest_ap_B=np.array([meter.test_C[column].max() for column in columns]),
        null_ap_PB=np.array(null_ap_PB),
    )


def _constant(meter: _Meter, n: int) -> patchresults.AuditRow:
    """The constant scorer, n times: its AP is the share of the class, the most frequent one that is
    audited."""
    train_n_C, test_n_C = patch_table.counts(meter.labels)
    best = int(meter.class_C[train_n_C[meter.class_C].argmax()])
    patches = meter.patches
    is_class_N = patches.class_N == best
    zeros_N = np.zeros((1, len(is_class_N)), np.float32)
    n_first = patchresults.PURITY_FIRST
    found = ap.resampled_patches(zeros_N, is_class_N[:, None], patches.image_N, patches.times_MI, n_first)
    nan_B, highest = np.full(n, np.nan), test_n_C[meter.class_C].max() / test_n_C.sum()
    return patchresults.AuditRow(
        scorer=results.CONSTANT,
        n_prototypes=1,
        ranking=patchresults.Ranking(np.zeros(n, np.int64), nan_B, np.full(n, -1), nan_B),
        class_B=np.full(n, best),
        train_ap_B=np.full(n, train_n_C[best] / train_n_C.sum()),
        ap_BM=np.tile(found.ap_TM, (n, 1)),
        purity_B=np.full(n, found.purity_TM[0, 0]),
        highest_ap_B=np.full(n, highest),
        null_ap_PB=np.full((N_NULL, n), found.ap_TM[0, 0]),
    )
