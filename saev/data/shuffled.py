"""Well-mixed batches of single activations, for training.

`mixing` plans which activation is in which batch. Threads read blocks of neighbouring tokens into a pool of
bounded size, from which batches are copied. The order does not depend on the threads. To start at any batch,
a stream first reads the blocks that are then partly in the pool, a few times the pool's size.

Shape letters: B batch, P pool slots, G blocks, R activations ready to be drawn, D d_vit.
"""

import collections
import collections.abc
import concurrent.futures
import math
import os
import threading
import typing as tp

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped

from saev.data import activations, config, mixing
from saev.data.ahead import ahead
from saev.formats import shards

SHARE_BYTES = 4 * 2**20
"""Bytes that a thread reads at a time, about."""


class Batch(tp.NamedTuple):
    """A batch of activations and where each comes from."""

    act_BD: Float32[torch.Tensor, "B D"]
    image_i_B: Int64[np.ndarray, " B"]
    patch_i_B: Int64[np.ndarray, " B"]
    layer_B: Int64[np.ndarray, " B"]


class Shuffled:
    """Endless iterator over full batches.

    Args:
        data: which activations.
        batch_size: activations per batch.
        seed: of the order.
        pool_bytes: memory for the pool and the batches made ahead. The pool holds at least two batches. The
            order of blocks takes 4 more bytes per block of the shards that are read at the same time.
        n_threads: threads that read. 0: one per core, at most 4.
        pin: page-locked batches, so that `.to("cuda", non_blocking=True)` copies in the background.

    Raises:
        UserError: see `Activations`; while iterating, NaN or infinite activations (the image is named).
    """

    def __init__(
        self,
        data: config.Shards | activations.Activations,
        *,
        batch_size: int,
        seed: int = 0,
        pool_bytes: int = 2 * 10**9,
        n_threads: int = 0,
        pin: bool = False,
    ):
        self.acts = activations.Activations.open(data).advised(activations.RANDOM)
        self.batch_size = batch_size
        self.seed = seed
        self.n_threads = n_threads or min(4, os.cpu_count() or 1)
        self.pin = pin
        self.share_bytes = min(SHARE_BYTES, pool_bytes // 8 // self.n_threads)
        self.layout = mixing.Layout.of(
            self.acts.shard_positions(),
            n_layers=len(self.acts.layers),
            n_tokens=self.acts.n_tokens,
            n_lead=self.acts.n_lead,
            n_piece=self.acts.pieces.n_patches,
            token_bytes=self.acts.token_bytes,
            batch_size=batch_size,
            n_fit=mixing.n_fit(pool_bytes, batch_size, self.acts.d_vit, self.acts.token_bytes),
        )

    def __iter__(self) -> collections.abc.Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> collections.abc.Iterator[Batch]:
        """The stream from batch `start` on."""
        return ahead(self._batches(start), mixing.AHEAD)

    def _batches(self, start: int) -> collections.abc.Iterator[Batch]:
        pool, acts = _Pool(self, start), self.acts
        try:
            while True:
                act_BD = torch.empty(self.batch_size, acts.d_vit, pin_memory=self.pin)
                position_B, x_B = np.divmod(pool.draw(act_BD.numpy()), acts.n_per_img)
                layer_i_B, token_i_B = np.divmod(x_B, acts.n_tokens)
                image_i_B = acts.image_is_N[position_B]
                activations.check_finite(act_BD.numpy(), image_i_B, acts)
                layer_B = np.array(acts.layers)[layer_i_B]
                yield Batch(act_BD, image_i_B, token_i_B + acts.first_patch, layer_B)
        finally:
            pool.close()


class _Reading:
    """Blocks being read into the pool."""

    def __init__(
        self,
        n_G: Int64[np.ndarray, " G"],
        row_n2: Int64[np.ndarray, "n 2"],
        dones: list[concurrent.futures.Future[None]],
    ):
        self.n_before_G = np.concatenate([[0], np.cumsum(n_G)])
        self.row_n2 = row_n2
        self.dones = dones
        self.at = 0

    def take(self, n_max: int) -> Int64[np.ndarray, "n 2"]:
        """Rows of whole blocks, at most `n_max`. Waits until they are read."""
        start = self.n_before_G[self.at]
        self.at = int(np.searchsorted(self.n_before_G, start + n_max, "right")) - 1
        row_n2 = self.row_n2[start : self.n_before_G[self.at]]
        if len(row_n2):
            for done in self.dones:
                done.result()
        return row_n2

    @property
    def is_over(self) -> bool:
        return self.at == len(self.n_before_G) - 1


class _Pool:
    """Activations in memory. Each keeps its slot until it is drawn."""

    def __init__(self, stream: Shuffled, start: int):
        acts, layout = stream.acts, stream.layout
        self.acts = acts
        self.layout = layout
        self.plan = mixing.Plan(layout, stream.seed, start)
        self.threads = concurrent.futures.ThreadPoolExecutor(stream.n_threads, "saev-read")
        self.n_threads = stream.n_threads
        self.share_bytes = stream.share_bytes
        self.local = threading.local()
        self.act_PD = np.empty((layout.n_pool, acts.d_vit), shards.STORED[acts.dtype])
        self.readings: collections.deque[_Reading] = collections.deque()
        self.free_P = np.arange(layout.n_pool)[::-1].copy()  # the last ones go first
        self.n_free = layout.n_pool
        self._reload()
        self._read_ahead()

    def draw(self, out_BD: Float32[np.ndarray, "B D"]) -> Int64[np.ndarray, " B"]:
        """Fills `out_BD` with the next batch and returns each activation's stream index."""
        index_parts, at = [], 0
        for part_n2 in self.plan.draw(self._ready):
            self._move(part_n2[:, 1], out_BD[at : at + len(part_n2)])
            self._read_ahead()
            index_parts.append(part_n2[:, 0])
            at += len(part_n2)
        return np.concatenate(index_parts)

    def close(self) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)

    def _move(self, slot_n: Int64[np.ndarray, " n"], out_nD: Float32[np.ndarray, "n D"]) -> None:
        """Copies activations out of the pool and frees their slots."""
        if self.act_PD.dtype == out_nD.dtype:
            # clip avoids a buffer for `out`
            self.act_PD.take(slot_n, axis=0, out=out_nD, mode="clip")
        else:
            stored_nD = self._staging(len(slot_n))
            self.act_PD.take(slot_n, axis=0, out=stored_nD, mode="clip")
            self.acts.decode_to(stored_nD, out_nD)
        self.free_P[self.n_free : self.n_free + len(slot_n)] = slot_n
        self.n_free += len(slot_n)

    def _ready(self, n_max: int) -> Int64[np.ndarray, "n 2"]:
        """The plan's `mixing.NextBlocks`."""
        parts = [np.empty((0, 2), np.int64)]
        while self.readings:
            parts.append(self.readings[0].take(n_max))
            n_max -= len(parts[-1])
            if not self.readings[0].is_over:
                break
            self.readings.popleft()
        return np.concatenate(parts)

    def _read_ahead(self) -> None:
        """Starts to read the next blocks, as many as have free slots."""
        block_G = self.plan.cursor.take(self.n_free)
        if len(block_G):
            index_n = self.layout.all_in(block_G)
            slot_n = self._take_slots(len(index_n))
            row_n2 = np.stack([index_n, slot_n], axis=1)
            dones = self._read(block_G, slot_n)
            self.readings.append(_Reading(self.layout.n_in(block_G), row_n2, dones))

    def _take_slots(self, n: int) -> Int64[np.ndarray, " n"]:
        self.n_free -= n
        return self.free_P[self.n_free : self.n_free + n].copy()

    def _reload(self) -> None:
        """Fills the pool of a plan that starts in the middle of an epoch."""
        ready_R2 = self.plan.epoch.ready_R2[: self.plan.epoch.n_ready]
        ready_R2[:, 1] = self._take_slots(len(ready_R2))
        order_R = np.argsort(ready_R2[:, 0])
        block_G = self.layout.blocks_of(ready_R2[:, 0])
        index_n = self.layout.all_in(block_G)  # ascending, as with order_R
        slot_n = np.full(len(index_n), -1)  # already drawn
        slot_n[np.searchsorted(index_n, ready_R2[order_R, 0])] = ready_R2[order_R, 1]
        for done in self._read(block_G, slot_n):
            done.result()

    def _read(
        self, block_G: Int64[np.ndarray, " G"], slot_n: Int64[np.ndarray, " n"]
    ) -> list[concurrent.futures.Future[None]]:
        """Starts to read blocks into their activations' slots (-1: discarded), in file order."""
        order_G = np.argsort(block_G)
        n_G = self.layout.n_in(block_G)
        start_G = np.cumsum(n_G) - n_G
        n_share = max(1, self.share_bytes // (self.layout.max_block * self.acts.token_bytes))
        n_share = max(1, min(n_share, math.ceil(len(block_G) / self.n_threads)))
        shares = [order_G[at : at + n_share] for at in range(0, len(order_G), n_share)]
        return [
            self.threads.submit(
                self._read_share, block_G[share], [slot_n[start_G[g] : start_G[g] + n_G[g]] for g in share]
            )
            for share in shares
        ]

    def _read_share(self, block_G: Int64[np.ndarray, " G"], slots: list[Int64[np.ndarray, " n"]]) -> None:
        """Reads blocks one by one, then moves all their activations at once, to take Python's lock rarely."""
        slot_n = np.concatenate(slots)
        staged_nD = self._staging(len(slot_n))
        extents = self.acts.extents(self.layout.first_in(block_G), self.layout.n_in(block_G))
        self.acts.read_extents(extents, staged_nD.data.cast("B"))
        if slot_n.min() < 0:
            slot_n, staged_nD = slot_n[slot_n >= 0], staged_nD[slot_n >= 0]
        self.act_PD[slot_n] = staged_nD

    def _staging(self, n: int) -> Shaped[np.ndarray, "n D"]:
        """This thread's reused memory."""
        if len(getattr(self.local, "staging", ())) < n:
            self.local.staging = np.empty((n, self.acts.d_vit), self.act_PD.dtype)
        return self.local.staging[:n]
