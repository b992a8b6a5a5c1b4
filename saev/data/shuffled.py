"""Well-mixed batches of single activations, for training.

Mixing: blocks of a few consecutive images are read in a seeded random order into a pool of bounded size. The
pool is permuted as a whole and its first half is handed out; then the freed half is refilled and the pool is
permuted again. An epoch delivers every activation exactly once, and the next starts when it is over: only the
batch at the seam holds activations of both, so every batch is full. The same seed gives the same sequence.

Shape letters: B batch, D d_vit.
"""

import collections.abc
import itertools
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
        pool_bytes: bound of the pool's memory; as much again is used while it is permuted.

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
        rest_PD, rest_P = np.empty((0, self.reader.d_vit), np.float32), np.empty(0, np.int64)
        for epoch in itertools.count():
            for act_PD, index_P in self._epoch(epoch):
                act_PD, index_P = (
                    np.concatenate([rest_PD, act_PD]),
                    np.concatenate([rest_P, index_P]),
                )
                n_out = len(index_P) // self.batch_size * self.batch_size
                for at in range(0, n_out, self.batch_size):
                    batch = slice(at, at + self.batch_size)
                    yield self._batch(act_PD[batch], index_P[batch])
                rest_PD, rest_P = act_PD[n_out:], index_P[n_out:]

    def _batch(self, act_BD: np.ndarray, index_B: np.ndarray) -> Batch:
        image_i_B, token_i_B = divmod(index_B, self.reader.n_tokens)
        return Batch(torch.from_numpy(act_BD), image_i_B, token_i_B + self.reader.first_patch)

    def _epoch(self, epoch: int) -> collections.abc.Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pieces (P, D) of the permuted pool, with the place of each activation in the stream; all of it, once."""
        rng = np.random.default_rng((self.seed, epoch))
        blocks = rng.permutation(math.ceil(self.reader.n_imgs / BLOCK_IMGS)).tolist()
        pool_PD, pool_P = np.empty((0, self.reader.d_vit), np.float32), np.empty(0, np.int64)
        while blocks:
            acts, indices, n = [pool_PD], [pool_P], len(pool_P)
            while blocks and n < self.n_pool:
                act_XD, index_X = self._read(blocks.pop())
                acts.append(act_XD)
                indices.append(index_X)
                n += len(index_X)
            order_P = rng.permutation(n)
            pool_PD, pool_P = np.concatenate(acts)[order_P], np.concatenate(indices)[order_P]
            n_out = n // 2 if blocks else n
            yield pool_PD[:n_out], pool_P[:n_out]
            pool_PD, pool_P = pool_PD[n_out:], pool_P[n_out:]

    def _read(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        start = block * BLOCK_IMGS
        stop = min(start + BLOCK_IMGS, self.reader.n_imgs)
        acts_NTD = self.reader.read(start, stop)
        reader.check_finite(acts_NTD, self.reader, start)
        index_X = np.arange(start * self.reader.n_tokens, stop * self.reader.n_tokens)
        return acts_NTD.reshape(-1, self.reader.d_vit), index_X
