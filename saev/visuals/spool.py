"""The one pass over the activations. It writes all codes to files ("spool"), from which everything else is
computed. A killed pass resumes.

    codes.count     int32: number of latents that fire on each patch, image after image
    codes.latent    int32: these latents
    codes.value     float32: their values
    state           the blocks that are written, their checksums, and the tables of top scores

B images of a block, P patches, X patches of a block, n codes, S prototypes, K top images.
"""

import collections.abc
import contextlib
import dataclasses
import logging
import os
import pathlib
import time
import typing as tp

import beartype
import numpy as np
import torch
import xxhash
from jaxtyping import Float64, Int64, jaxtyped

from saev import errors, helpers
from saev.data import ordered
from saev.formats import checkpoint, tensors
from saev.visuals import coders, kernels

logger = logging.getLogger("saev")

REVISION = 1
"""Increment it when the files or the codes change: then older passes are not resumed."""
SAVE_S = 30.0
"""Seconds between saved states."""
FILES = {"count": np.dtype("<i4"), "latent": np.dtype("<i4"), "value": np.dtype("<f4")}
REMEDY = "The pass begins again."


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass
class Ranked:
    """Scores of all patches, for coders that rank by them."""

    value_SK: np.ndarray
    """float32: the largest scores (maxima over an image's patches), descending; -inf if there are fewer."""
    position_SK: np.ndarray
    """int32: their images' positions in the stream. Among equal scores the lower one is first."""
    total_S: Float64[np.ndarray, " S"]
    """Sum over all patches."""

    @staticmethod
    def empty(n: int, k: int) -> "Ranked":
        return Ranked(np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int32), np.zeros(n))

    def add(self, scores_BPS: torch.Tensor, first: int) -> None:
        """Adds the images at positions first, first + 1, ..."""
        self.total_S += scores_BPS.sum(dim=(0, 1), dtype=torch.float64).cpu().numpy()
        kernels.rank(scores_BPS.amax(dim=1).cpu().numpy(), first, self.value_SK, self.position_SK)


class Block(tp.NamedTuple):
    """Codes of consecutive images."""

    first: int
    """Position of the first image."""
    fired: coders.Fired


@dataclasses.dataclass
class Spool:
    """Finished files. Reading checks nothing: `run` did."""

    dpath: pathlib.Path
    n_patches: int
    image_B: Int64[np.ndarray, " B"]
    """Number of images of each block."""
    code_B: Int64[np.ndarray, " B"]
    """Number of codes of each block."""
    ranked: Ranked | None

    @property
    def n_imgs(self) -> int:
        return int(self.image_B.sum())

    @property
    def n_codes(self) -> int:
        return int(self.code_B.sum())

    def blocks(self, desc: str) -> collections.abc.Iterator[Block]:
        """Reads all codes, block after block."""
        numbers = range(len(self.image_B))
        return helpers.progress(self._read(numbers), desc, len(numbers), "blocks")

    def at(self, positions: list[int]) -> collections.abc.Iterator[tuple[int, coders.Fired]]:
        """Reads the codes of the images at these positions, in ascending order."""
        first_B1 = np.concatenate([[0], np.cumsum(self.image_B)])
        block_n = np.searchsorted(first_B1, positions, side="right") - 1
        for block in self._read(sorted(set(block_n.tolist()))):
            count_X = block.fired.count_X
            start_X1 = np.concatenate([[0], np.cumsum(count_X)])
            n_imgs = len(count_X) // self.n_patches
            for position in sorted(p for p in positions if block.first <= p < block.first + n_imgs):
                x = (position - block.first) * self.n_patches
                part = slice(start_X1[x], start_X1[x + self.n_patches])
                mine = (
                    count_X[x : x + self.n_patches],
                    block.fired.latent_n[part],
                    block.fired.value_n[part],
                )
                yield position, coders.Fired(*mine)

    def _read(self, numbers: collections.abc.Iterable[int]) -> collections.abc.Iterator[Block]:
        image_B1, code_B1 = (np.concatenate([[0], np.cumsum(n_B)]) for n_B in (self.image_B, self.code_B))
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(_fpath(self.dpath, name).open("rb")) for name in FILES}
            for b in numbers:
                patches, codes = (self.n_patches * image_B1[b : b + 2]).tolist(), code_B1[b : b + 2].tolist()
                spans = (patches, codes, codes)
                parts = [_part(files[name], name, *span) for name, span in zip(FILES, spans, strict=True)]
                yield Block(int(image_B1[b]), coders.Fired(*parts))


def _fpath(dpath: pathlib.Path, name: str) -> pathlib.Path:
    return dpath / f"codes.{name}"


def _part(fd: tp.BinaryIO, name: str, start: int, stop: int) -> np.ndarray:
    dtype = FILES[name]
    fd.seek(start * dtype.itemsize)
    out = np.fromfile(fd, dtype, stop - start)
    if len(out) < stop - start:
        raise errors.UserError(
            f"{fd.name}: ends too early. Delete its folder and run the same command again."
        )
    return out


# ---- the pass ----


@torch.inference_mode()
def run(coder: coders.Coder, stream: ordered.Ordered, k: int, dpath: pathlib.Path) -> Spool:
    """Encodes the stream into files in `dpath`, and resumes a killed pass.

    Args:
        k: number of top images to rank by score, if the coder does.

    Raises:
        UserError: bad shards, or codes that are not finite.
    """
    acts, device = stream.acts, coder.device
    dpath.mkdir(parents=True, exist_ok=True)
    # what the codes depend on; the number of images in a block may change their last bits
    parts = [REVISION, coder.kind, coder.digest(), acts.fingerprint, stream.block, device.type]
    parts += [k] * coder.is_ranked_by_score
    state = _resumed(dpath, helpers.hash_of(parts), coder, acts.n_tokens, k)
    first = sum(state.image_B)
    todo = ordered.Ordered(acts, stream.block, [range(first, acts.n_imgs)])
    saved_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_fpath(dpath, name).open("ab")) for name in FILES]
        for block in helpers.progress(todo, "encode", len(todo), "blocks"):
            x_XD = torch.from_numpy(block.act_NXD).flatten(0, 1).to(device)
            if state.ranked is None:
                fired = coder(x_XD)
            else:
                scores_XS = coder.scores(x_XD)
                fired = coder.of(scores_XS)
                state.ranked.add(scores_XS.unflatten(0, block.act_NXD.shape[:2]), first)
            _check_finite(fired, coder, [acts.records[i].path for i in block.image_i_N.tolist()])
            for fd, values, dtype in zip(files, fired, FILES.values(), strict=True):
                fd.write(values.astype(dtype, copy=False).data)
            first += len(block.image_i_N)
            state.add(len(block.image_i_N), fired)
            if time.monotonic() - saved_s >= SAVE_S or first == acts.n_imgs:
                for fd in files:
                    fd.flush()
                    os.fsync(fd.fileno())
                state.save(dpath)
                saved_s = time.monotonic()
    return state.spool(dpath, acts.n_tokens)


def _check_finite(fired: coders.Fired, coder: coders.Coder, paths: list[str]) -> None:
    if not (is_good_n := np.isfinite(fired.value_n)).all():
        n = int(np.argmin(is_good_n))
        x = int(np.searchsorted(np.cumsum(fired.count_X), n, side="right"))
        raise errors.UserError(
            f"the value of {coder.noun} {fired.latent_n[n]} in {paths[x * len(paths) // len(fired.count_X)]} "
            f"is {fired.value_n[n]}. Check the weights."
        )


@dataclasses.dataclass
class _State:
    """Progress of a pass."""

    key: str
    image_B: list[int]
    code_B: list[int]
    sum_B: list[str]
    """Checksum of each block's codes."""
    ranked: Ranked | None

    def add(self, n_imgs: int, fired: coders.Fired) -> None:
        self.image_B.append(n_imgs)
        self.code_B.append(len(fired.value_n))
        self.sum_B.append(_checksum(fired))

    def spool(self, dpath: pathlib.Path, n_patches: int) -> Spool:
        sizes = np.array([self.image_B, self.code_B], np.int64)
        return Spool(dpath, n_patches, sizes[0], sizes[1], self.ranked)

    def save(self, dpath: pathlib.Path) -> None:
        tree: dict[str, tp.Any] = {"image_B": self.image_B, "code_B": self.code_B, "sum_B": self.sum_B}
        if self.ranked is not None:
            tree["ranked"] = {k: torch.from_numpy(v) for k, v in vars(self.ranked).items()}
        checkpoint.write(dpath / "state", "state", {"key": self.key}, tensors.dump(tree))


def _checksum(fired: coders.Fired) -> str:
    digest = xxhash.xxh3_128()
    for values in fired:
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _resumed(dpath: pathlib.Path, key: str, coder: coders.Coder, n_patches: int, k: int) -> _State:
    """The state of a killed pass, up to its first block that is not as it was written; else a new one."""
    ranked = Ranked.empty(coder.n, k) if coder.is_ranked_by_score else None
    state = _State(key, [], [], [], ranked)
    try:
        if (dpath / "state").exists():
            state = _read_state(dpath, state, n_patches)
    except (OSError, errors.UserError, KeyError, ValueError) as err:
        logger.warning("%s", errors.first_line(err))
    lengths = (sum(state.image_B) * n_patches, sum(state.code_B), sum(state.code_B))
    for (name, dtype), n in zip(FILES.items(), lengths, strict=True):
        with _fpath(dpath, name).open("ab") as fd:
            fd.truncate(n * dtype.itemsize)
    return state


def _read_state(dpath: pathlib.Path, new: _State, n_patches: int) -> _State:
    header, payload = checkpoint.read(dpath / "state", "state")
    if header.get("key") != new.key:
        return new
    tree = tensors.load(payload, str(dpath / "state"), REMEDY)
    found = _State(new.key, tree["image_B"], tree["code_B"], tree["sum_B"], new.ranked)
    n_good = 0
    with contextlib.suppress(errors.UserError):
        for block, want in zip(found.spool(dpath, n_patches).blocks("check"), found.sum_B, strict=True):
            if _checksum(block.fired) != want:
                break
            n_good += 1
    if n_good < len(found.sum_B):
        logger.warning(
            "%s: its codes are not those that were written (checksum); they are computed again", dpath
        )
        if new.ranked is not None:  # its tables hold all blocks
            return new
    elif found.ranked is not None:
        found.ranked = Ranked(**{name: value.numpy() for name, value in tree["ranked"].items()})
    for blocks_B in (found.image_B, found.code_B, found.sum_B):
        del blocks_B[n_good:]
    return found
