"""Well-mixed batches of single activations, for training.

Mixing: blocks of a few consecutive images are read in a seeded random order into a pool of bounded size. Batches
are drawn from it at random without replacement; when half of it is gone, it is filled up again. An epoch delivers
every activation exactly once, and the next starts when it is over: only the batch at the seam holds activations
of both, so every batch is full. The same seed gives the same sequence.

Shape letters: B batch, P places in the pool, D d_vit.
"""

import collections.abc
import math
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Float32, Int64

from saev.data import config, reader

BLOCK_IMGS = 4
"""Consecutive images read at once."""


class Batch(tp.NamedTuple):
    """A batch of activations and where each comes from."""

    act_BD: Float32[torch.Tensor, "B D"]
    image_i_B: Int64[np.ndarray, " B"]
    patch_i_B: Int64[np.ndarray, " B"]


class Shuffled:
    """Endless iterator over full batches.

    Args:
        cfg: which activations.
        batch_size: activations per batch.
        seed: of the order.
        pool_bytes: bound of the pool's memory; the pool holds two batches and one block of images in any case.

    Raises:
        UserError: see `reader.Reader`; while iterating, NaN or infinite activations (names the image).
    """

    @beartype.beartype
    def __init__(
        self, cfg: config.Shards, *, batch_size: int, seed: int = 0, pool_bytes: int = 1 << 30
    ):
        self.reader = reader.Reader(cfg)
        self.batch_size = batch_size
        self.seed = seed
        n_fit = pool_bytes // (4 * self.reader.d_vit)
        n_least = max(2 * batch_size, BLOCK_IMGS * self.reader.n_tokens)
        self.n_pool = min(max(n_fit, n_least), len(self.reader))

    def __iter__(self) -> collections.abc.Iterator[Batch]:
        pool = _Pool(self.reader, self.n_pool, self.seed)
        while True:
            act_BD = np.empty((self.batch_size, self.reader.d_vit), np.float32)
            index_B = np.empty(self.batch_size, np.int64)
            n = 0
            while n < self.batch_size:
                n += pool.draw(act_BD[n:], index_B[n:])
            image_i_B, token_i_B = divmod(index_B, self.reader.n_tokens)
            patch_i_B = token_i_B + self.reader.first_patch
            yield Batch(torch.from_numpy(act_BD), image_i_B, patch_i_B)


class _Pool:
    """Activations in memory, each at a place that it keeps until it is drawn.

    `place_P` lists all places: the `n_free` free ones first, then the taken ones in the order in which they are drawn.
    """

    def __init__(self, acts: reader.Reader, n_pool: int, seed: int):
        self.reader = acts
        self.rng = np.random.default_rng((seed, 0x5AE))
        self.act_PD = np.empty((n_pool, acts.d_vit), np.float32)
        self.index_P = np.empty(n_pool, np.int64)  # place of the activation in the stream
        self.place_P = np.arange(n_pool)
        self.n_free = n_pool
        self.n_ready = 0  # may be drawn before the pool is filled again
        self.blocks: list[int] = []  # unread ones of this epoch

    def draw(self, act_BD: np.ndarray, index_B: np.ndarray) -> int:
        """Moves activations from the pool to `act_BD`, at least one and as many as fit or are ready; returns how many."""
        if not self.n_ready:
            self._fill()
        n = min(self.n_ready, len(index_B))
        places = self.place_P[self.n_free : self.n_free + n]
        self.act_PD.take(places, axis=0, out=act_BD[:n], mode="clip")  # clip: no buffer for `out`
        index_B[:n] = self.index_P[places]
        self.n_free += n
        self.n_ready -= n
        return n

    def _fill(self) -> None:
        """Reads blocks of the epoch while they fit (of the next epoch once all is drawn), then permutes what is there."""
        if not self.blocks:  # then all of the epoch is drawn
            n_blocks = math.ceil(self.reader.n_imgs / BLOCK_IMGS)
            self.blocks = self.rng.permutation(n_blocks).tolist()
        while self.blocks and self._read(self.blocks[-1]):
            self.blocks.pop()
        taken = self.place_P[self.n_free :]
        self.rng.shuffle(taken)
        self.n_ready = math.ceil(len(taken) / 2) if self.blocks else len(taken)

    def _read(self, block: int) -> bool:
        """Puts a block into free places; False if it does not fit."""
        start = block * BLOCK_IMGS
        stop = min(start + BLOCK_IMGS, self.reader.n_imgs)
        n = (stop - start) * self.reader.n_tokens
        if n > self.n_free:
            return False
        acts_NTD = self.reader.read(start, stop)
        reader.check_finite(acts_NTD, self.reader, start)
        places = self.place_P[self.n_free - n : self.n_free]
        self.act_PD[places] = acts_NTD.reshape(n, -1)
        self.index_P[places] = np.arange(start * self.reader.n_tokens, stop * self.reader.n_tokens)
        self.n_free -= n
        return True
