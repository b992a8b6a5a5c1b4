"""Measures where prototypes score high: the patch table (docs/patch-table.md).

For each class of patches, the prototype with the lowest 1-D logistic loss on the train patches is chosen, and
measured on the test patches. One pass over the train images collects what all regressions need
(`logistic.Sums`); one pass over the test images scores them by the chosen prototypes.

C classes, K prototypes, I test images, N test patches with a label, R rows (patches of a block), T pairs of a
class and its prototype, M resamples of the test images.
"""

import collections.abc
import pathlib
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int32, Int64, UInt8, jaxtyped

from saev import compiled, helpers, scorers
from saev.data import ordered
from saev.formats import patchresults, results
from saev.protoeval import ap, config, fit, patch_fit, patch_join
from saev.protoeval.experiment import Experiment

PAIRS = 8
"""Classes that are measured at a time."""


def evaluate(
    experiment: Experiment, banks: list[fit.Bank], labels: patch_join.Labels, dpath: pathlib.Path
) -> patchresults.PatchTable:
    """The patch table: a row for the constant scorer, then one per scorer and K.

    Args:
        dpath: folder of a killed pass, which is resumed.

    Raises:
        UserError: bad shards, or a score that is not finite.
    """
    cfg = experiment.cfgs[0]
    run, device = fit.on_device(banks, cfg)
    choices = patch_fit.choose_all(banks, run, labels, cfg, dpath, device)
    rows = _measure(choices, run, labels, cfg, device)
    n_train_C, n_test_C = counts(labels)
    return patchresults.PatchTable(labels.names, n_train_C, n_test_C, rows)


@jaxtyped(typechecker=beartype.beartype)
class Patches(tp.NamedTuple):
    """The labelled test patches."""

    class_N: Int32[np.ndarray, " N"]
    image_N: Int32[np.ndarray, " N"]
    times_MI: UInt8[np.ndarray, "M I"]
    """How often each image counts in each resample. The first row is all images once."""
    bias_C: Float64[np.ndarray, " C"]
    """The share of each class in the train patches."""


def _measure(
    choices: list[patchresults.PatchChoice],
    run: list[scorers.Scorer],
    labels: patch_join.Labels,
    cfg: config.ProtoEval,
    device: torch.device,
) -> list[patchresults.PatchRow]:
    """Measures on the test patches. Columns of scores are held in memory, in as many passes as --memory-gb
    needs."""
    patches = test_patches(labels, cfg)
    is_used_C = is_used(labels)
    pairs = {(choice.scorer_i, k) for choice in choices for k in choice.best_C[is_used_C].tolist()}
    parts: dict[tuple[int, int], _Measured] = {}
    for some, scores_KN in scored(run, pairs, labels.measured, cfg.memory_gb, device):
        row_of = {column: row for row, column in enumerate(some)}
        todo = [
            (i, c)
            for i, choice in enumerate(choices)
            for c in np.flatnonzero(is_used_C).tolist()
            if (choice.scorer_i, int(choice.best_C[c])) in row_of
        ]
        steps = range(0, len(todo), PAIRS)
        for start in helpers.progress(steps, "measure patches", len(steps), "steps"):
            part = todo[start : start + PAIRS]
            rows = [row_of[choices[i].scorer_i, int(choices[i].best_C[c])] for i, c in part]
            w_T, b_T = (np.array([getattr(choices[i], name)[c] for i, c in part]) for name in ("w_C", "b_C"))
            class_T = np.array([c for _, c in part])
            parts |= dict(zip(part, _of_pairs(scores_KN[rows], w_T, b_T, class_T, patches), strict=True))
    rows = [_constant(patches, is_used_C)]
    for i, choice in enumerate(choices):
        rows.append(_row(choice, [parts.get((i, c)) for c in range(len(labels.names))]))
    return rows


def is_used(labels: patch_join.Labels) -> Bool[np.ndarray, " C"]:
    """Classes that some train patch and some test patch has."""
    n_train_C, n_test_C = counts(labels)
    return (n_train_C > 0) & (n_test_C > 0)


def counts(labels: patch_join.Labels) -> list[Int64[np.ndarray, " C"]]:
    """Train and test patches of each class."""
    found = (side.class_NX[side.class_NX >= 0] for side in (labels.chosen, labels.measured))
    return [np.bincount(class_N, minlength=len(labels.names)) for class_N in found]


def test_patches(labels: patch_join.Labels, cfg: config.ProtoEval) -> Patches:
    side = labels.measured
    is_labelled_IX = side.class_NX >= 0
    image_IX = np.broadcast_to(side.order_N[:, None], side.class_NX.shape).astype(np.int32)
    n_C, _ = counts(labels)
    return Patches(
        side.class_NX[is_labelled_IX],
        image_IX[is_labelled_IX],
        ap.resamples(len(side.order_N), cfg.n_boot, cfg.seed, with_all=True),
        n_C / n_C.sum(),
    )


Column = tuple[int, int]
"""(number of the scorer, prototype)."""


def scored(
    run: list[scorers.Scorer],
    columns: collections.abc.Iterable[Column],
    side: patch_join.Side,
    memory_gb: float,
    device: torch.device,
) -> collections.abc.Iterator[tuple[list[Column], Float32[np.ndarray, "K N"]]]:
    """Yields some of the columns, sorted, and their scores of a split's labelled patches, which the next ones
    overwrite. Reads the split's images once, or once for each part of the columns that fits into memory."""
    columns, n_patches = sorted(columns), int((side.class_NX >= 0).sum())
    size = min(len(columns), max(1, int(memory_gb * 1e9 / (4 * max(1, n_patches)))))
    out_KN = np.empty((size, n_patches), np.float32)
    for at in range(0, len(columns), max(1, size)):
        some = columns[at : at + size]
        _scores(run, some, side, device, out_KN[: len(some)])
        yield some, out_KN[: len(some)]


@torch.inference_mode()
def _scores(
    run: list[scorers.Scorer],
    columns: list[Column],
    side: patch_join.Side,
    device: torch.device,
    out_KN: Float32[np.ndarray, "K N"],
) -> None:
    """Writes the labelled patches' scores by prototypes, which are sorted, into `out_KN`."""
    is_labelled_IX = side.class_NX >= 0
    stream = ordered.Ordered(side.acts, patch_fit.N_IMGS)
    image, patch = 0, 0
    for block in helpers.progress(stream, "score patches", len(stream), "blocks"):
        is_mine_X = is_labelled_IX[image : image + len(block.image_i_N)].reshape(-1)
        x_RD = torch.from_numpy(block.act_NXD).flatten(0, 1)[torch.from_numpy(is_mine_X)].to(device)
        row = 0
        for scorer_i in dict.fromkeys(i for i, _ in columns):
            mine = torch.tensor([k for i, k in columns if i == scorer_i], device=device)
            for at, code_KR in patch_fit.codes(run[scorer_i], x_RD, mine):
                start = patch + at
                out_KN[row : row + len(mine), start : start + code_KR.shape[1]] = code_KR
            row += len(mine)
        image += len(block.image_i_N)
        patch += len(x_RD)


class _Measured(tp.NamedTuple):
    """A class's measures on all test images, then on each resample."""

    r_M: Float64[np.ndarray, " M"]
    ap_M: Float64[np.ndarray, " M"]
    purity_M: Float64[np.ndarray, " M"]


def _of_pairs(
    code_TN: Float32[np.ndarray, "T N"],
    w_T: Float64[np.ndarray, " T"],
    b_T: Float64[np.ndarray, " T"],
    class_T: Int64[np.ndarray, " T"],
    patches: Patches,
) -> list[_Measured]:
    """Measures regressions of classes on one prototype each."""
    is_own_TN = patches.class_N == class_T[:, None]
    ranked_TN = code_TN * np.sign(w_T)[:, None].astype(np.float32)
    found = ap.resampled_patches(
        ranked_TN, is_own_TN.T, patches.image_N, patches.times_MI, patchresults.PURITY_FIRST
    )
    n_imgs = patches.times_MI.shape[1]

    def losses(t: int) -> tuple[Float64[np.ndarray, " I"], Float64[np.ndarray, " I"]]:
        """Sums over each image's patches of the regression's loss, and of that of the bias alone."""
        z_N = w_T[t] * code_TN[t].astype(np.float64) + b_T[t]
        loss_N = np.logaddexp(0, z_N) - is_own_TN[t] * z_N
        share = patches.bias_C[class_T[t]]
        bias_N = np.where(is_own_TN[t], -np.log(share), -np.log1p(-share))
        loss_I, bias_I = (np.bincount(patches.image_N, x_N, n_imgs) for x_N in (loss_N, bias_N))
        return loss_I, bias_I

    loss_TI, bias_TI = map(
        np.stack, zip(*compiled.each_in_threads(losses, list(range(len(w_T)))), strict=True)
    )
    times_MI = patches.times_MI.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # of resamples without a labelled patch
        r_TM = 1 - (loss_TI @ times_MI.T) / (bias_TI @ times_MI.T)
    r_TM = r_TM.round(12) + 0.0  # exactly 0 without a prototype
    return [_Measured(*each) for each in zip(r_TM, found.ap_TM, found.purity_TM, strict=True)]


def _row(choice: patchresults.PatchChoice, measured: list[_Measured | None]) -> patchresults.PatchRow:
    """NaN for classes that are not measured."""
    some = next(each for each in measured if each)
    nothing = _Measured(*(np.full_like(some.r_M, np.nan) for _ in range(3)))
    r_CM, ap_CM, purity_CM = (
        np.stack(x_M) for x_M in zip(*(each or nothing for each in measured), strict=True)
    )
    return patchresults.PatchRow(**vars(choice), r_CM=r_CM, ap_CM=ap_CM, purity_CM=purity_CM)


def _constant(patches: Patches, is_used_C: Bool[np.ndarray, " C"]) -> patchresults.PatchRow:
    """The constant scorer: R is 0, AP and purity are the class's share of the test patches."""
    C = len(is_used_C)
    zero_C = np.zeros(C)
    with np.errstate(divide="ignore"):  # of classes without a train patch
        b_C = np.log(patches.bias_C / (1 - patches.bias_C))
    found = {}
    for class_T in np.split(used := np.flatnonzero(is_used_C), range(PAIRS, len(used), PAIRS)):
        code_TN = np.zeros((len(class_T), len(patches.class_N)), np.float32)
        measured = _of_pairs(code_TN, zero_C[class_T], b_C[class_T], class_T, patches)
        found |= dict(zip(class_T.tolist(), measured, strict=True))
    choice = patchresults.PatchChoice(results.CONSTANT, 0, 1, np.zeros(C, np.int64), zero_C, b_C, zero_C)
    return _row(choice, [found.get(c) for c in range(C)])
