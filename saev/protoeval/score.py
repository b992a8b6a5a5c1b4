"""Computes images' scores for all prototypes of all scorers, and their pooled activations, in one pass over
shards.

The pass writes them to files image by image, so memory is bounded and a killed pass resumes.

N images, K prototypes of all scorers, C of them, T traits, D d_vit, B images of a block, P patches.
"""

import collections.abc
import dataclasses
import itertools
import logging
import os
import pathlib

import beartype
import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float32, Int64, jaxtyped

from saev import errors, helpers, scorers
from saev.data import activations, ordered, passes
from saev.data.traits import base
from saev.formats import arrays
from saev.protoeval import fit, join
from saev.protoeval.experiment import Experiment

logger = logging.getLogger("saev")

MAX_BLOCK = 256
CHECKED = 2**24
"""Scores that are read at a time to compare checksums."""
SUMS = "checksum_B"
"""Array of done.npz: the checksums of the blocks that are scored, for a pass that goes on."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores and pooled activations of images, in the order of `image_i_N`. The arrays are memory-mapped
    files."""

    scores_KN: Float32[np.ndarray, "K N"]
    mean_ND: Float32[np.ndarray, "N D"]
    max_ND: Float32[np.ndarray, "N D"]
    """Mean and maximum of each dimension over an image's patches: the probes' inputs."""
    image_i_N: Int64[np.ndarray, " N"]


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Split:
    """One split's images, in the order of the labels."""

    scores: Scores
    column_N: Int64[np.ndarray, " N"]
    """Their columns in the scores."""
    labels_NT: Bool[np.ndarray, "N T"]
    known_NT: Bool[np.ndarray, "N T"] | None = None
    """Which labels are known. None: all."""

    def known_of(self, rows: np.ndarray) -> np.ndarray | None:
        """`known_NT` of some images."""
        return None if self.known_NT is None else self.known_NT[rows]

    def n_at_once(self, memory_gb: float) -> int:
        """Prototypes whose scores, of all images, are read at once."""
        return max(1, int(memory_gb * 1e9 / (16 * self.scores.scores_KN.shape[1])))

    def of(self, prototypes: slice | np.ndarray) -> Float32[np.ndarray, "C N"]:
        """Some prototypes' scores, copied to memory."""
        return self.scores.scores_KN[prototypes][:, self.column_N]

    @property
    def mean_ND(self) -> Float32[np.ndarray, "N D"]:
        return self.scores.mean_ND[self.column_N]

    @property
    def max_ND(self) -> Float32[np.ndarray, "N D"]:
        return self.scores.max_ND[self.column_N]


def score(
    experiment: Experiment,
    banks: list[fit.Bank],
    dpath: pathlib.Path,
    sides_of: collections.abc.Iterable[join.Sides] = (),
) -> tuple[Split, Split]:
    """Scores the images to choose on and the images to measure on, in one pass if they share shards.

    Args:
        dpath: folder of a killed pass, which is resumed.
        sides_of: other experiments, whose images are scored too, so that they find the same pass done.

    Raises:
        UserError: see `score_images`.
    """
    cfg, sides = experiment.cfgs[0], experiment.sides
    run, device = fit.on_device(banks, cfg)
    images: dict[activations.Activations, set[int]] = {}
    for side in [*sides, *itertools.chain(*sides_of)]:
        images.setdefault(side.acts, set()).update(side.row_of)
    scored = {
        acts: score_images(run, acts, sorted(is_), dpath / str(n), device, cfg.memory_gb)
        for n, (acts, is_) in enumerate(images.items())
    }
    chosen, measured = (_split(scored[side.acts], side.row_of, experiment.labels) for side in sides)
    return chosen, measured


def _split(scores: Scores, row_of: dict[int, int], labels: base.Traits) -> Split:
    """One split, in the order of the labels, so that no result depends on the order of the shards."""
    column_of = {i: n for n, i in enumerate(scores.image_i_N.tolist())}
    image_is = sorted(row_of, key=row_of.__getitem__)
    rows = [row_of[i] for i in image_is]
    columns = np.array([column_of[i] for i in image_is], np.int64)
    return Split(scores, columns, labels.labels_NT[rows], labels.known_of(rows))


# ---- one pass ----


@torch.inference_mode()
def score_images(
    run: list[scorers.Scorer],
    acts: activations.Activations,
    image_is: list[int],
    dpath: pathlib.Path,
    device: torch.device,
    memory_gb: float = 4.0,
) -> Scores:
    """Scores the images numbered `image_is` into files in `dpath`, and resumes a killed pass.

    Args:
        dpath: folder for only these scorers, activations and images.
        memory_gb: memory for a block of activations and scores, in GB.

    Raises:
        UserError: bad shards or activations, or a score that is not finite.
    """
    image_i_N = np.array(image_is, np.int64)
    n_prototypes = sum(s.n_prototypes for s in run)
    dpath.mkdir(parents=True, exist_ok=True)
    helpers.sweep(dpath)
    done_fpath = dpath / "done.npz"
    column_of = np.full(acts.n_all, -1, np.int64)
    column_of[image_i_N] = np.arange(len(image_i_N))
    image_bytes = 4 * (5 * acts.n_per_img * acts.d_vit + 2 * n_prototypes)
    n_imgs = int(np.clip(memory_gb * 1e9 / image_bytes, 1, MAX_BLOCK))
    # what the scores depend on; the block size may change their last bits
    key = helpers.hash_of([[s.digest() for s in run], acts.fingerprint, image_is, n_imgs, device.type])
    pooled = (len(image_i_N), acts.d_vit)
    shapes = {"scores.bin": (n_prototypes, len(image_i_N)), "means.bin": pooled, "maxima.bin": pooled}
    parts = np.split(column_of[acts.image_is_N], range(n_imgs, acts.n_imgs, n_imgs))
    sums = _done(done_fpath, key, shapes, parts)
    n_done = sum(map(len, parts[: len(sums)]))
    mapped = scores_KN, mean_ND, max_ND = [_mapped(dpath / name, shape) for name, shape in shapes.items()]

    def save(_: int) -> None:
        for array in mapped:
            array.flush()
        arrays.write_state(done_fpath, key, {SUMS: np.array(sums)})

    for _, block in passes.resumed(acts, n_imgs, n_done, save, "score"):
        column_B = column_of[block.image_i_N]
        wanted_B = column_B >= 0
        best_KB, mean_BD, max_BD = scores_KN[:, :0], mean_ND[:0], max_ND[:0]
        if wanted_B.any():
            acts_BPD, pooled_2BD = _images(block, acts.kept(block.image_i_N), wanted_B, device)
            best_BK = torch.cat([s.of_images(acts_BPD) for s in run], dim=1)
            _check_finite(best_BK, [acts.records[int(i)].path for i in block.image_i_N[wanted_B]])
            best_KB = best_BK.T.contiguous().cpu().numpy()
            mean_BD, max_BD = pooled_2BD.cpu().numpy()
            column_N = column_B[wanted_B]
            scores_KN[:, column_N], mean_ND[column_N], max_ND[column_N] = best_KB, mean_BD, max_BD
        sums += _checksums(best_KB, [mean_BD, max_BD], [slice(None)])
    return Scores(scores_KN, mean_ND, max_ND, image_i_N)


def _images(
    block: ordered.Block,
    is_kept_BP: Bool[np.ndarray, "B P"] | None,
    wanted_B: Bool[np.ndarray, " B"],
    device: torch.device,
) -> tuple[Float32[torch.Tensor, "N P D"], Float32[torch.Tensor, "2 N D"]]:
    """(activations of the wanted images, their means and maxima), without patches that are left out: padding,
    and those of --exclude-patch-labels (`ordered.filled`)."""
    acts_NPD = torch.from_numpy(block.act_NXD[wanted_B]).to(device)
    if is_kept_BP is None:
        return acts_NPD, torch.stack([acts_NPD.mean(dim=1), acts_NPD.amax(dim=1)])
    is_kept_NP = torch.from_numpy(is_kept_BP[wanted_B]).to(device)
    acts_NPD = ordered.filled(acts_NPD, is_kept_NP)
    is_kept_NP = is_kept_NP | ~is_kept_NP.any(dim=1, keepdim=True)
    total_ND = torch.einsum("npd,np->nd", acts_NPD, is_kept_NP.float())
    mean_ND = total_ND / is_kept_NP.sum(dim=1, keepdim=True)
    return acts_NPD, torch.stack([mean_ND, acts_NPD.amax(dim=1)])


def _done(
    done_fpath: pathlib.Path, key: str, shapes: dict[str, tuple[int, int]], parts: list[np.ndarray]
) -> list[str]:
    """The checksums of the blocks that a killed pass has scored, up to the first that is not as it was
    written.

    Empty if the files are not whole, or of other scorers or images.

    Args:
        parts: the columns of each block's images; -1: not scored.
    """
    fpaths = [done_fpath.parent / name for name in shapes]
    found = arrays.read_state(done_fpath, key, [SUMS])
    sizes = [fpath.stat().st_size if fpath.exists() else -1 for fpath in fpaths]
    want = [] if found is None else found[SUMS].ravel().tolist()
    if not 0 < len(want) <= len(parts) or sizes != [4 * a * b for a, b in shapes.values()]:
        for fpath in (done_fpath, *fpaths):  # the checksums first
            fpath.unlink(missing_ok=True)
        return []
    scores_KN, *pooled = map(_mapped, fpaths, shapes.values())
    got = _checksums(scores_KN, pooled, [part[part >= 0] for part in parts[: len(want)]])
    n_good = (*(a == b for a, b in zip(want, got, strict=True)), False).index(False)
    if n_good < len(want):
        logger.warning(
            "%s: its scores are not those that were written (checksum); "
            "all but the first %d images are scored again",
            done_fpath.parent,
            sum(map(len, parts[:n_good])),
        )
    return want[:n_good]


def _checksums(
    scores_KN: np.ndarray,
    pooled: collections.abc.Sequence[np.ndarray],
    columns: list[np.ndarray] | list[slice],
) -> list[str]:
    """XXH3-128 of each block of columns: its scores, prototype by prototype, then its pooled activations.
    Reads scores once."""
    sums = [xxhash.xxh3_128() for _ in columns]
    n_rows = max(1, CHECKED // max(1, scores_KN.shape[1]))
    for start in range(0, len(scores_KN), n_rows):
        rows_RN = np.array(scores_KN[start : start + n_rows])
        for digest, column_B in zip(sums, columns, strict=True):
            digest.update(np.ascontiguousarray(rows_RN[:, column_B]).data)
    for digest, column_B in zip(sums, columns, strict=True):
        for pooled_ND in pooled:
            digest.update(np.ascontiguousarray(pooled_ND[column_B]).data)
    return [digest.hexdigest() for digest in sums]


def _check_finite(best_BK: torch.Tensor, paths: list[str]) -> None:
    if not (is_good_BK := best_BK.isfinite()).all():
        b, k = (~is_good_BK).nonzero()[0].tolist()
        raise errors.UserError(
            f"the score of {paths[b]} for prototype {k} (counted over all scorers) is "
            f"{best_BK[b, k].item()}. Check the checkpoint's weights, or delete the fitted scorer to "
            "fit it again."
        )


def _mapped(fpath: pathlib.Path, shape: tuple[int, int]) -> np.memmap:
    if not fpath.exists():
        with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
            size = 4 * shape[0] * shape[1]
            if hasattr(os, "posix_fallocate"):  # a full disk fails here, not in the pass
                os.posix_fallocate(fd.fileno(), 0, size)
            fd.truncate(size)
    return np.memmap(fpath, np.float32, "r+", shape=shape)
