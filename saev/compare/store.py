"""Codes of dictionaries in files, written in one pass over shards. A killed pass resumes.

B images of a block, P patches of an image, D d_vit, S latents, R rows (patches or images), n codes
other than 0.
"""

import collections.abc
import dataclasses
import logging
import os
import pathlib
import time
import typing as tp

import beartype
import msgspec
import numpy as np
import torch
import xxhash
from jaxtyping import Float, Float32, Int32, Int64, jaxtyped
from torch import Tensor

from saev import errors, helpers, scorers
from saev.data import activations, ordered
from saev.formats import jsonfile

logger = logging.getLogger("saev")

MAX_CODES = 2**26
"""Most dense codes of a block (256 MB in float32)."""
SAVE_S = 30.0
"""Seconds between saved progress notes."""
NOTE = "done.json"
PARTS = {"value": np.float32, "latent": np.int32, "count": np.int32}
"""A dictionary's files: its codes' values and latents, and the number of codes of each row."""

Count = tp.Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Block(msgspec.Struct):
    """One block of a pass."""

    n_images: Count
    n_codes: list[Count]
    """For each dictionary."""
    xxh3_128: str
    """Checksum of what the block added to the files."""


class Note(msgspec.Struct):
    """done.json: the progress of a pass."""

    of: str
    """Hash of scorers, activations and how values are made."""
    blocks: list[Block]


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Codes of some rows, sorted by row (CSR)."""

    start_R1: Int64[np.ndarray, " R1"]
    latent_n: Int32[np.ndarray, " n"]
    value_n: Float32[np.ndarray, " n"]


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Store:
    """All codes of one dictionary, in the order of its stream. Values and latents are memory-mapped."""

    start_R1: Int64[np.ndarray, " R1"]
    latent_n: Int32[np.ndarray, " n"]
    value_n: Float32[np.ndarray, " n"]
    n_latents: int
    per_image: int
    """Rows of an image."""

    @property
    def n_images(self) -> int:
        return (len(self.start_R1) - 1) // self.per_image

    @property
    def density(self) -> float:
        """Fraction of codes that are not 0."""
        return len(self.value_n) / max(1, (len(self.start_R1) - 1) * self.n_latents)

    def rows(self, image_N: Int64[np.ndarray, " N"]) -> Rows:
        """The codes of images, given by their places, in that order. Copied to memory."""
        P = self.per_image
        first_N, last_N = self.start_R1[image_N * P], self.start_R1[(image_N + 1) * P]
        breaks = np.flatnonzero(np.diff(image_N) != 1) + 1  # consecutive images are one slice
        runs = zip(first_N[np.r_[0, breaks]], last_N[np.r_[breaks - 1, len(image_N) - 1]], strict=True)
        slices = [slice(first, last) for first, last in runs]
        row_R = (image_N[:, None] * P + np.arange(P)).ravel()
        start_R1 = np.concatenate([[0], np.cumsum(self.start_R1[row_R + 1] - self.start_R1[row_R])])
        latent_n, value_n = (np.concatenate([x[s] for s in slices]) for x in (self.latent_n, self.value_n))
        return Rows(start_R1.astype(np.int64), latent_n, value_n)

    def blocks(self, n: int = 2**22) -> collections.abc.Iterator[slice]:
        """Slices of the codes."""
        return (slice(at, at + n) for at in range(0, len(self.value_n), n))


Values = collections.abc.Callable[[tp.Any, Tensor], Tensor]
"""(scorer, activations of images (B, P, D)) -> their values (R, S), image after image."""


def per_patch(scorer: scorers.Scorer, acts_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "R S"]:
    return scorer(acts_BPD.flatten(0, 1))


def per_image_max(scorer: scorers.Scorer, acts_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B S"]:
    return scorer.of_images(acts_BPD)


def per_image_mean(scorer: scorers.Scorer, acts_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B S"]:
    return per_patch(scorer, acts_BPD).unflatten(0, acts_BPD.shape[:2]).mean(dim=1)


@torch.inference_mode()
def encode(
    run: list[scorers.Scorer],
    acts: activations.Activations,
    values: Values,
    dpath: pathlib.Path,
    device: torch.device,
) -> list[Store]:
    """Encodes all images of a stream by each scorer, into files in `dpath`. Resumes a killed pass.

    Args:
        values: one of this module's functions.
        dpath: folder for only these scorers and activations.

    Raises:
        UserError: bad shards or activations, a value that is not finite, or a disk without room.
    """
    dpath.mkdir(parents=True, exist_ok=True)
    helpers.sweep(dpath)
    name = tp.cast(tp.Any, values).__name__
    key = helpers.hash_of([[s.digest() for s in run], acts.fingerprint, name, device.type])
    fpaths = [[dpath / f"{i}.{part}" for part in PARTS] for i in range(len(run))]
    rows = acts.n_tokens if values is per_patch else 1
    blocks = _done(dpath / NOTE, key, fpaths, rows)
    first = sum(block.n_images for block in blocks)
    run = [scorer.to(device) for scorer in run]
    n_imgs = max(1, min(64, MAX_CODES // (acts.n_tokens * max(s.n_prototypes for s in run))))
    stream = ordered.Ordered(acts, n_imgs, [range(first, acts.n_imgs)])
    saved_s = time.monotonic()
    files = [[fpath.open("ab") for fpath in mine] for mine in fpaths]
    try:
        for block in helpers.progress(stream, "encode", len(stream), "blocks"):
            acts_BPD = torch.from_numpy(block.act_NXD).to(device)
            digest, n_codes = xxhash.xxh3_128(), []
            for scorer, mine in zip(run, files, strict=True):
                found = _sparse(values(scorer, acts_BPD), acts, block.image_i_N)
                n_codes.append(len(found[0]))
                for file, array in zip(mine, found, strict=True):
                    digest.update(array.data)
                    file.write(array.data)
            blocks.append(Block(len(block.image_i_N), n_codes, digest.hexdigest()))
            first += len(block.image_i_N)
            if time.monotonic() - saved_s >= SAVE_S or first == acts.n_imgs:
                for file in (file for mine in files for file in mine):
                    file.flush()
                    os.fsync(file.fileno())
                helpers.write_text(dpath / NOTE, jsonfile.dumps(Note(key, blocks)))
                saved_s = time.monotonic()
    finally:
        for file in (file for mine in files for file in mine):
            file.close()
    return [_opened(mine, scorer.n_prototypes, rows) for mine, scorer in zip(fpaths, run, strict=True)]


def _sparse(
    f_RS: Tensor, acts: activations.Activations, image_i_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, latents, and the number of codes of each row."""
    row_n, latent_n = f_RS.nonzero(as_tuple=True)
    value_n = f_RS[row_n, latent_n].float()
    if not (good_n := value_n.isfinite()).all():
        at = int((~good_n).nonzero()[0])
        image_i = int(image_i_B[int(row_n[at]) * len(image_i_B) // len(f_RS)])
        raise errors.UserError(
            f"the value of {acts.records[image_i].path} for latent {int(latent_n[at])} is "
            f"{value_n[at].item()}. Check the checkpoint's weights."
        )
    count_R = torch.bincount(row_n, minlength=len(f_RS)).int()
    return value_n.cpu().numpy(), latent_n.int().cpu().numpy(), count_R.cpu().numpy()


def _done(note_fpath: pathlib.Path, key: str, fpaths: list[list[pathlib.Path]], n_rows: int) -> list[Block]:
    """The blocks that a killed pass has written, up to the first that changed. Cuts the files to them.

    Args:
        n_rows: rows of an image.
    """
    note = None
    try:
        note = jsonfile.read(note_fpath, Note, "The images are encoded again.")
    except FileNotFoundError:
        pass
    except (OSError, errors.UserError) as err:
        logger.warning("%s", errors.first_line(err))
    arrays = [[_mapped(f, dtype) for f, dtype in zip(mine, PARTS.values(), strict=True)] for mine in fpaths]
    ends, good = np.zeros((len(fpaths), len(PARTS)), np.int64), []
    for block in note.blocks if note and note.of == key else []:
        sizes = np.array([[n, n, n_rows * block.n_images] for n in block.n_codes], np.int64)
        if sizes.shape != ends.shape or _checksum(arrays, ends, ends + sizes) != block.xxh3_128:
            logger.warning("%s: its codes are not those that were written (checksum)", note_fpath.parent)
            break
        good.append(block)
        ends = ends + sizes
    del arrays
    for mine, sizes in zip(fpaths, ends.tolist(), strict=True):
        for fpath, size in zip(mine, sizes, strict=True):
            with fpath.open("ab") as fd:
                fd.truncate(4 * size)
    return good


def _checksum(arrays: list[list[np.ndarray]], start: np.ndarray, stop: np.ndarray) -> str:
    digest = xxhash.xxh3_128()
    for mine, firsts, lasts in zip(arrays, start.tolist(), stop.tolist(), strict=True):
        for array, first, last in zip(mine, firsts, lasts, strict=True):
            digest.update(array[first:last].data)
    return digest.hexdigest()


def _mapped(fpath: pathlib.Path, dtype: type) -> np.ndarray:
    is_empty = not fpath.exists() or fpath.stat().st_size < 4
    return (
        np.empty(0, dtype) if is_empty else np.memmap(fpath, dtype, "r", shape=(fpath.stat().st_size // 4,))
    )


def _opened(fpaths: list[pathlib.Path], n_latents: int, n_rows: int) -> Store:
    value_n, latent_n, count_R = (_mapped(f, d) for f, d in zip(fpaths, PARTS.values(), strict=True))
    start_R1 = np.concatenate([[0], np.cumsum(count_R, dtype=np.int64)])
    return Store(start_R1, latent_n, value_n, n_latents, n_rows)
