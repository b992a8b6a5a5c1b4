"""Fits every class of patches on every prototype, in one pass over the train images, and chooses prototypes.

C classes, K prototypes, N images, X tokens of an image, R rows (patches of a block).
"""

import collections.abc
import dataclasses
import logging
import pathlib
import typing as tp

import numpy as np
import torch
from jaxtyping import Float32, Int32

from saev import errors, helpers, scorers
from saev.data import passes
from saev.formats import arrays, patchresults
from saev.protoeval import choose, config, fit, logistic, patch_join

logger = logging.getLogger("saev")

REVISION = 1
"""Increment it when the sums change: then older passes are not resumed."""
TILE = 2**24
"""Scores that are computed at once."""
N_IMGS = 64
"""Images that are read at a time."""
N_LABELS = 2
"""Classes of each patch: its own, and that of another patch."""
ARRAYS = [field.name for field in dataclasses.fields(logistic.Sums) if field.name != "n_labels"]
"""What is saved of sums."""


class _Share(tp.NamedTuple):
    """Some prototypes of a scorer."""

    scorer_i: int
    start: int
    stop: int


def _shares(sizes: list[int], n_most: int) -> list[list[_Share]]:
    """Divides all prototypes into parts of at most `n_most`."""
    parts: list[list[_Share]] = [[]]
    left = n_most
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            if not left:
                parts.append([])
                left = n_most
            stop = min(size, start + left)
            parts[-1].append(_Share(i, start, stop))
            left -= stop - start
            start = stop
    return parts


def fit_all(
    run: list[scorers.Scorer],
    labels: patch_join.Labels,
    cfg: config.ProtoEval,
    dpath: pathlib.Path,
    device: torch.device,
) -> list[logistic.Fits]:
    """Fits every class on every prototype of each scorer. Classes C ... 2 C - 1 are of permuted labels.

    Reads the train images once, or once for each part of the prototypes whose sums fit into --memory-gb.
    """
    C, sizes = len(labels.names), [s.n_prototypes for s in run]
    n_most = max(1, int(cfg.memory_gb * 1e9 / logistic.Sums.n_bytes(2 * C)))
    parts = _shares(sizes, n_most)
    if len(parts) > 1:
        text = "--memory-gb %g: the train images are read %d times, for %d prototypes at a time"
        logger.info(text, cfg.memory_gb, len(parts), n_most)
    found: list[list[logistic.Fits]] = [[] for _ in run]
    for part_i, part in enumerate(parts):
        fits = _fits(run, part, labels, cfg.seed, dpath / f"sums{part_i}.npz", device)
        for share, each in zip(part, fits, strict=True):
            found[share.scorer_i].append(each)
    return [_joined(fits) for fits in found]


def _fits(run: list[scorers.Scorer], part: list[_Share], *given: tp.Any) -> list[logistic.Fits]:
    """The fits of some prototypes, whose sums are no longer needed."""
    return [each.fit() for each in _sums(run, part, *given)]


def _joined(fits: list[logistic.Fits]) -> logistic.Fits:
    """The fits of consecutive prototypes."""
    if len(fits) == 1:
        return fits[0]
    parts = ([f.w_KC for f in fits], [f.b_KC for f in fits], [f.loss_KC for f in fits])
    w_KC, b_KC, loss_KC = map(np.concatenate, parts)
    return logistic.Fits(w_KC, b_KC, loss_KC, fits[0].bias_loss_C)


def _with_null(class_NX: Int32[np.ndarray, "N X"], n_classes: int, seed: int) -> Int32[np.ndarray, "N X 2"]:
    """Each patch's class, and n_classes + the class of another labelled patch."""
    null_NX = class_NX.copy()
    is_labelled_NX = class_NX >= 0
    drawn_n = np.random.default_rng((seed, 0x9E12)).permutation(class_NX[is_labelled_NX])
    null_NX[is_labelled_NX] = n_classes + drawn_n
    return np.stack([class_NX, null_NX], axis=2)


@torch.inference_mode()
def _sums(
    run: list[scorers.Scorer],
    part: list[_Share],
    labels: patch_join.Labels,
    seed: int,
    fpath: pathlib.Path,
    device: torch.device,
) -> list[logistic.Sums]:
    """One pass over the train images. Saves its state to `fpath`, and resumes a killed pass."""
    side, C = labels.chosen, len(labels.names)
    digests = [run[share.scorer_i].digest() for share in part]
    key = helpers.hash_of(
        [REVISION, digests, part, side.acts.fingerprint, labels.fingerprint, seed, N_IMGS, device.type]
    )
    n_done, sums = 0, [logistic.Sums.empty(share.stop - share.start, 2 * C, N_LABELS) for share in part]
    names = [(i, name) for i in range(len(part)) for name in ARRAYS]
    saved = arrays.read_state(fpath, key, ["n_done", *(f"{i}.{name}" for i, name in names)])
    if saved:
        n_done = int(saved["n_done"])
        own = ({name: saved[f"{i}.{name}"] for name in ARRAYS} for i in range(len(part)))
        sums = [logistic.Sums(**each, n_labels=N_LABELS) for each in own]

    def save(n: int) -> None:
        state = {f"{i}.{name}": getattr(sums[i], name) for i, name in names}
        arrays.write_state(fpath, key, {"n_done": np.array(n), **state})

    class_NX2 = _with_null(side.class_NX, C, seed)
    for imgs, block in passes.resumed(side.acts, N_IMGS, n_done, save, "patches"):
        class_X2 = class_NX2[imgs.start : imgs.stop].reshape(-1, 2)
        is_labelled_X = class_X2[:, 0] >= 0
        x_RD = torch.from_numpy(block.act_NXD).flatten(0, 1)[torch.from_numpy(is_labelled_X)].to(device)
        class_R2 = class_X2[is_labelled_X]
        for share, each in zip(part, sums, strict=True):
            for at, code_KR in codes(run[share.scorer_i], x_RD, slice(share.start, share.stop)):
                each.add(code_KR, class_R2[at : at + code_KR.shape[1]])
    return sums


def codes(
    scorer: scorers.Scorer, x_RD: torch.Tensor, columns: slice | torch.Tensor
) -> collections.abc.Iterator[tuple[int, Float32[np.ndarray, "K r"]]]:
    """Yields (first row, scores of some rows by these prototypes), prototype by prototype.

    Raises:
        UserError: a score is not finite.
    """
    n_rows = max(1, TILE // scorer.n_prototypes)
    for at in range(0, len(x_RD), n_rows):
        code_RK = scorer(x_RD[at : at + n_rows])[:, columns]
        if not code_RK.isfinite().all():
            column = int((~code_RK.isfinite()).nonzero()[0, 1])
            k = columns.start + column if isinstance(columns, slice) else int(columns[column])
            raise errors.UserError(
                f"a patch's score by prototype {k} is not finite. Check the checkpoint's weights, or delete "
                "the fitted scorer to fit it again."
            )
        yield at, code_RK.T.float().contiguous().cpu().numpy()


# ---- the choice ----


def choose_all(
    banks: list[fit.Bank],
    run: list[scorers.Scorer],
    labels: patch_join.Labels,
    cfg: config.ProtoEval,
    dpath: pathlib.Path,
    device: torch.device,
) -> list[patchresults.PatchChoice]:
    """Fits every class on every prototype of each scorer (`fit_all`), and chooses."""
    fits = fit_all(run, labels, cfg, dpath, device)
    return [choice for i, bank in enumerate(banks) for choice in choices(bank, i, fits[i], labels)]


def choices(
    bank: fit.Bank, scorer_i: int, fits: logistic.Fits, labels: patch_join.Labels
) -> collections.abc.Iterator[patchresults.PatchChoice]:
    """For each K the prototypes with the lowest loss; for the largest one also on permuted labels."""
    C = len(labels.names)
    loss_KC = np.where(np.isnan(fits.loss_KC), np.inf, fits.loss_KC).round(choose.AP_DIGITS)
    for is_null in (False, True):
        mine = slice(C, 2 * C) if is_null else slice(0, C)
        for n_prototypes in bank.ks[-1:] if is_null else bank.ks:
            best_C = loss_KC[:n_prototypes, mine].argmin(axis=0)
            at = (best_C, np.arange(C) + C * is_null)
            name = bank.name + patchresults.PERMUTED * is_null
            r_C = 1 - fits.loss_KC[at] / fits.bias_loss_C[at[1]]
            found = (fits.w_KC[at], fits.b_KC[at], r_C)
            yield patchresults.PatchChoice(name, scorer_i, n_prototypes, best_C, *found)
