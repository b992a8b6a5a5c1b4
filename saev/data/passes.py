"""Passes over activations that resume when they were killed.

`write` writes codes in shards (`formats.codeshards`), from which galleries and comparisons are made. It needs
no notes: the same command goes on with the shards that are not complete. `resumed` is for passes whose
results are not read image by image: it goes on from the state that they save.

N images of a block, R rows (patches or images), K latents.
"""

import collections.abc
import itertools
import pathlib
import shutil
import time
import typing as tp

import numpy as np
from jaxtyping import Int64

from saev import errors, helpers
from saev.data import activations, ordered
from saev.formats import codeshards

MIN_PATCHES, MAX_SHARDS = 2**16, 1024
"""Least patches of a shard that is not kept, and about the most shards. A kill costs one shard."""
SAVE_S = 60.0
"""Seconds between saved states. A kill costs that."""

Write = collections.abc.Callable[[codeshards.ShardWriter, collections.abc.Iterator[ordered.Block]], None]
"""Writes the codes of a shard's blocks."""


def scratch(
    dpath: pathlib.Path, key: object, acts: activations.Activations, n_block: int, dtypes: dict[str, np.dtype]
) -> codeshards.Shards:
    """The shards of a pass whose codes only the command itself reads, in a folder below `dpath`.

    Shards of another pass in `dpath`, and damaged ones, are removed.

    Args:
        key: all that the codes depend on, besides the activations (JSON).
        n_block: images that are encoded at a time. Their number may change the last bits of codes.
    """
    name = helpers.hash_of([key, acts.fingerprint, n_block])[:16]
    for other in dpath.glob("*"):
        if other.name != name:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    n_imgs = max(MIN_PATCHES // acts.n_tokens, acts.n_imgs // MAX_SHARDS)
    n_imgs = n_block * max(1, n_imgs // n_block)  # blocks do not depend on it
    shards = codeshards.Shards(dpath / name, acts.n_imgs, n_imgs, dtypes, "command")
    shards.dpath.mkdir(parents=True, exist_ok=True)
    helpers.sweep(shards.dpath)
    shards.remove_damaged()
    return shards


def write(
    shards: codeshards.Shards, acts: activations.Activations, n_block: int, write_shard: Write, desc: str
) -> None:
    """Writes the shards that are missing. A shard's bytes do not depend on the others.

    Args:
        n_block: images of a block, except the last one of a shard.

    Raises:
        UserError: bad shards or activations.
        OSError: codes cannot be written (no space, no permission).
    """
    todo = shards.missing()
    stream = ordered.Ordered(acts, n_block, [shards.imgs_in(i) for i in todo])
    blocks = iter(helpers.progress(stream, desc, len(stream), "blocks"))
    for shard_i in todo:
        with shards.writing(shard_i) as writer:
            write_shard(writer, itertools.islice(blocks, -(-len(shards.imgs_in(shard_i)) // n_block)))


def resumed(
    acts: activations.Activations,
    n_block: int,
    n_done: int,
    save: collections.abc.Callable[[int], None],
    desc: str,
) -> collections.abc.Iterator[tuple[range, ordered.Block]]:
    """Yields (positions, block) of all images but the first `n_done`.

    Args:
        save: saves the caller's state, given the number of images that it has used. Called every SAVE_S
            seconds, and at the end.

    Raises:
        UserError: bad shards or activations.
    """
    stream = ordered.Ordered(acts, n_block, [range(n_done, acts.n_imgs)])
    saved_s = time.monotonic()
    for block in helpers.progress(stream, desc, len(stream), "blocks"):
        n_before, n_done = n_done, n_done + len(block.image_i_N)
        yield range(n_before, n_done), block
        if time.monotonic() - saved_s >= SAVE_S or n_done == acts.n_imgs:
            save(n_done)
            saved_s = time.monotonic()


def check(
    codes: codeshards.Csr | np.ndarray,
    image_i_N: Int64[np.ndarray, " N"],
    acts: activations.Activations,
    noun: str = "latent",
    dtype: tp.Literal["float16", "float32"] = "float32",
) -> None:
    """Checks values before they are written.

    Args:
        codes: those of some images: CSR, or dense (R, K).
        image_i_N: the images' numbers.
        noun: what a column is, for the message.

    Raises:
        UserError: one is not finite, or larger than `dtype` can hold (the image is named).
    """
    value_n = codes.reshape(-1) if isinstance(codes, np.ndarray) else codes.value_n
    limit = float(np.finfo(dtype).max)
    # NaN if there is one
    if not len(value_n) or max(abs(float(value_n.min())), abs(float(value_n.max()))) <= limit:
        return
    at = int(np.flatnonzero(~(np.abs(value_n) <= limit))[0])
    if isinstance(codes, np.ndarray):
        n_rows, (row, latent) = len(codes), divmod(at, codes.shape[1])
    else:
        n_rows, row = len(codes.start_R1) - 1, int(np.searchsorted(codes.start_R1, at, "right")) - 1
        latent = int(codes.latent_n[at])
    image, patch = divmod(row, n_rows // len(image_i_N))
    where = acts.name_of(int(image_i_N[image])) + f", patch {patch}," * (n_rows > len(image_i_N))
    what = f"the value of {noun} {latent} in {where} is {value_n[at]:g}"
    if np.isfinite(value_n[at]):
        raise errors.UserError(f"{what}; the largest {dtype} is {limit:g}. Pass --dtype float32.")
    raise errors.UserError(f"{what}. Check the weights; a fitted scorer is fitted again if you delete it.")
