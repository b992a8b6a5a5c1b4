"""Well-mixed batches of single activations, for training.

Mixing: blocks of a few consecutive images are read in a seeded random order into a pool of bounded size. The
pool is permuted as a whole and its first half is handed out in batches; then the freed half is refilled and the
pool is permuted again. Each epoch delivers every activation exactly once; a batch may span two epochs, so
every batch is full. The same seed gives the same sequence.

Shape letters: B batch, D d_vit.
"""

import collections.abc
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
        pool_bytes: bound of the pool's memory; half of it again is used while permuting.

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
        self.n_pool = max(2 * batch_size, min(n_fit, len(self.reader)))

    def __iter__(self) -> collections.abc.Iterator[Batch]:
        pool = _Pool(self.reader, self.n_pool, self.seed)
        while True:
            pool.fill()
            yield from pool.drain(self.batch_size)


class _Pool:
    """Activations in memory, permuted, with the index of each in the stream."""

    def __init__(self, acts: reader.Reader, n_pool: int, seed: int):
        self.reader = acts
        self.rng = np.random.default_rng((seed, 0x5AE))
        self.n_pool = n_pool
        self.act_PD = np.empty((0, acts.d_vit), np.float32)
        self.index_P = np.empty(0, np.int64)
        self.blocks = self._endless_blocks()

    def _endless_blocks(self) -> collections.abc.Iterator[int]:
        n_blocks = -(-self.reader.n_imgs // BLOCK_IMGS)
        while True:
            yield from (self.rng.permutation(n_blocks) * BLOCK_IMGS).tolist()

    def fill(self) -> None:
        """Reads blocks until the pool is full, then permutes all of it."""
        acts, indices, n = [self.act_PD], [self.index_P], len(self.index_P)
        while n < self.n_pool:
            start = next(self.blocks)
            stop = min(start + BLOCK_IMGS, self.reader.n_imgs)
            acts_NTD = self.reader.read(start, stop)
            reader.check_finite(acts_NTD, self.reader, start)
            acts.append(acts_NTD.reshape(-1, self.reader.d_vit))
            indices.append(np.arange(start * self.reader.n_tokens, stop * self.reader.n_tokens))
            n += len(indices[-1])
        order_P = self.rng.permutation(n)
        self.act_PD = np.concatenate(acts)[order_P]
        self.index_P = np.concatenate(indices)[order_P]

    def drain(self, batch_size: int) -> collections.abc.Iterator[Batch]:
        """Hands out half of the pool (at least one batch)."""
        n_out = max(1, len(self.index_P) // 2 // batch_size) * batch_size
        for at in range(0, n_out, batch_size):
            image_i_B, token_i_B = divmod(self.index_P[at : at + batch_size], self.reader.n_tokens)
            act_BD = torch.from_numpy(self.act_PD[at : at + batch_size].copy())
            yield Batch(act_BD, image_i_B, token_i_B + self.reader.first_patch)
        self.act_PD, self.index_P = self.act_PD[n_out:], self.index_P[n_out:]
