"""Well-mixed batches of single activations, for training.

Mixing. An epoch visits the shards in random order, GROUP_SHARDS at a time, and the blocks of such a group (a few
dozen neighbouring tokens of one image and layer) in random order. Blocks are read into a pool of bounded size, and
every batch is drawn from the pool at random without replacement; blocks come in as activations go out. An epoch
delivers every activation exactly once and the next starts when it is over: only the batch at the seam holds
activations of both, so every batch is full.

The plan (which activation is in which batch) depends on the seed, the batch size and the pool's size alone, never
on the threads that read. It can be followed without reading, so a stream starts at any step at the cost of reading a
few pools (what is left of the blocks that the pool then holds).

Shape letters: B batch, P places in the pool, R places that may be drawn, D d_vit.
"""

import collections
import collections.abc
import concurrent.futures
import itertools
import math
import os
import threading
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped

from saev.data import config, reader
from saev.data.ahead import ahead
from saev.formats import shards

GROUP_SHARDS = 512
"""Shards that are read at the same time."""
READ_BYTES = 64 * 2**10
"""Blocks are at least so long (or a whole image): shorter reads are slow on every disk."""
BLOCKS_PER_BATCH = 5
"""The pool shall hold so many blocks for each activation of a batch, if its size allows: then few of a batch share an image."""
LAG_BYTES = 64 * 2**20
"""About so much of the pool is being read while the rest may be drawn."""
SHARE_BYTES = 4 * 2**20
"""A thread reads about so much at a time."""
INDEX_BYTES = 40
"""What the plan keeps of each activation in the pool."""
AHEAD = 2
"""Batches made before they are asked for."""


class Batch(tp.NamedTuple):
    """A batch of activations and where each comes from."""

    act_BD: Float32[torch.Tensor, "B D"]
    image_i_B: Int64[np.ndarray, " B"]
    patch_i_B: Int64[np.ndarray, " B"]
    layer_B: Int64[np.ndarray, " B"]


class Shuffled:
    """Endless iterator over full batches.

    Args:
        cfg: which activations.
        batch_size: activations per batch.
        seed: of the order.
        pool_bytes: bound of the memory: the pool, and the batches made ahead. (The pool holds two batches in any
            case; the order of the blocks takes 4 bytes a block of the shards that are read at the same time.)
        n_threads: threads that read; 0: one for each core, at most 4 (on few cores more get in each other's way).
        pin: make the batches in page-locked memory, so that `.to("cuda", non_blocking=True)` copies in the background.

    Raises:
        UserError: see `reader.Reader`; while iterating, NaN or infinite activations (names the image).
    """

    @beartype.beartype
    def __init__(
        self,
        cfg: config.Shards,
        *,
        batch_size: int,
        seed: int = 0,
        pool_bytes: int = 2 * 10**9,
        n_threads: int = 0,
        pin: bool = False,
    ):
        self.reader = reader.Reader(cfg, reader.RANDOM)
        self.batch_size = batch_size
        self.seed = seed
        self.n_threads = n_threads or min(4, os.cpu_count() or 1)
        self.pin = pin
        self.share_bytes = min(SHARE_BYTES, pool_bytes // 8 // self.n_threads)
        self.layout = Layout.of(
            self.reader.shard_positions(),
            n_layers=len(self.reader.layers),
            n_tokens=self.reader.n_tokens,
            token_bytes=self.reader.token_bytes,
            batch_size=batch_size,
            n_fit=n_fit(pool_bytes, batch_size, self.reader.d_vit, self.reader.token_bytes),
        )

    def __iter__(self) -> collections.abc.Iterator[Batch]:
        return self.batches()

    @beartype.beartype
    def batches(self, start: int = 0) -> collections.abc.Iterator[Batch]:
        """The stream from its batch number `start` on."""
        return ahead(self._batches(start), AHEAD)

    def _batches(self, start: int) -> collections.abc.Iterator[Batch]:
        pool, acts = _Pool(self, start), self.reader
        try:
            while True:
                act_BD = torch.empty(self.batch_size, acts.d_vit, pin_memory=self.pin)
                position_B, x_B = np.divmod(pool.draw(act_BD.numpy()), acts.n_per_img)
                layer_i_B, token_i_B = np.divmod(x_B, acts.n_tokens)
                image_i_B = acts.image_is_N[position_B]
                reader.check_finite(act_BD.numpy(), image_i_B, acts)
                layer_B = np.array(acts.layers)[layer_i_B]
                yield Batch(act_BD, image_i_B, token_i_B + acts.first_patch, layer_B)
        finally:
            pool.close()


# ---- plan: index numbers only ----


def n_fit(pool_bytes: int, batch_size: int, d_vit: int, token_bytes: int) -> int:
    """Activations that the pool can hold beside the threads' reads (an eighth) and the batches that are being made, waiting, and with the consumer."""
    batch_bytes = 4 * d_vit * batch_size
    n_bytes = pool_bytes - pool_bytes // 8 - (AHEAD + 2) * batch_bytes
    return n_bytes // (token_bytes + INDEX_BYTES)


class Layout(tp.NamedTuple):
    """How a stream is cut into blocks, and how many activations the pool holds."""

    shards: list[range]
    """Positions of the images of each shard."""
    n_layers: int
    n_tokens: int
    """Per image and layer."""
    n_block: int
    """Tokens of a block; the last block of an image may be shorter."""
    batch_size: int
    n_pool: int
    n_ready: int
    """Activations that may be drawn at a time (fewer at an epoch's end); the others are being read."""

    @classmethod
    def of(
        cls,
        shards: list[range],
        *,
        n_layers: int,
        n_tokens: int,
        token_bytes: int,
        batch_size: int,
        n_fit: int,
    ) -> "Layout":
        """n_fit: activations that fit into memory. In the long run a batch's activations are spread over twice as many
        blocks as fit into the pool (a block leaves it bit by bit, so more of them are there than would be whole)."""
        n_acts = sum(map(len, shards)) * n_layers * n_tokens
        mixing = 2 * n_fit // (BLOCKS_PER_BATCH * batch_size)
        n_block = min(max(mixing, READ_BYTES // token_bytes, 1), n_tokens)
        n_block = math.ceil(n_tokens / math.ceil(n_tokens / n_block))
        # Both bounds from below: a batch can always be drawn, and a block can always be read.
        n_pool = min(max(n_fit, 2 * (batch_size + n_block)), 2 * n_acts + n_block)
        lag = min(n_pool // 8, max(4 * batch_size, LAG_BYTES // token_bytes))
        n_ready = min(n_pool - lag, n_acts)
        return cls(shards, n_layers, n_tokens, n_block, batch_size, n_pool, n_ready)

    @property
    def n_per_img(self) -> int:
        return self.n_layers * self.n_tokens

    @property
    def n_parts(self) -> int:
        """Blocks per image and layer."""
        return math.ceil(self.n_tokens / self.n_block)

    @property
    def n_acts(self) -> int:
        return sum(map(len, self.shards)) * self.n_per_img

    def order(self, seed: int, epoch: int) -> collections.abc.Iterator[Int64[np.ndarray, " G"]]:
        """All blocks of an epoch in the order in which they come into the pool."""
        rng = np.random.default_rng((seed, epoch, 0))
        per_img = self.n_layers * self.n_parts
        order = rng.permutation(len(self.shards)).tolist()
        for at in range(0, len(order), GROUP_SHARDS):
            group = [self.shards[i] for i in order[at : at + GROUP_SHARDS]]
            dtype = np.min_scalar_type(per_img * max(r.stop for r in group))
            parts = [np.arange(r.start * per_img, r.stop * per_img, dtype=dtype) for r in group]
            block_G = np.concatenate(parts)
            rng.shuffle(block_G)
            for start in range(0, len(block_G), 2**16):
                yield block_G[start : start + 2**16].astype(np.int64)

    def n_in(self, block_G: Int64[np.ndarray, " G"]) -> Int64[np.ndarray, " G"]:
        """Activations of each block."""
        return np.minimum(self.n_block, self.n_tokens - block_G % self.n_parts * self.n_block)

    def first_in(self, block_G: Int64[np.ndarray, " G"]) -> Int64[np.ndarray, " G"]:
        """Number of each block's first activation in the stream; its others follow."""
        x_G, part_G = np.divmod(block_G, self.n_parts)
        return x_G * self.n_tokens + part_G * self.n_block

    def all_in(self, block_G: Int64[np.ndarray, " G"]) -> Int64[np.ndarray, " n"]:
        """Numbers of all activations of the blocks, one block after the other."""
        n_G = self.n_in(block_G)
        before_G = np.cumsum(n_G) - n_G
        return np.repeat(self.first_in(block_G) - before_G, n_G) + np.arange(n_G.sum())

    def blocks_of(self, index_R: Int64[np.ndarray, " R"]) -> Int64[np.ndarray, " G"]:
        """The blocks that hold these activations."""
        x_R, token_R = np.divmod(index_R, self.n_tokens)
        return np.unique(x_R * self.n_parts + token_R // self.n_block)


class Cursor:
    """The blocks of all epochs from `epoch` on, in order, taken whole."""

    def __init__(self, layout: Layout, seed: int, epoch: int):
        self.layout = layout
        self.groups = (g for e in itertools.count(epoch) for g in layout.order(seed, e))
        self.block_G = self.n_before_G = np.empty(0, np.int64)
        self.at = 0

    def take(self, n_max: int) -> Int64[np.ndarray, " G"]:
        """As many of the next blocks as hold at most `n_max` activations together."""
        parts = [np.empty(0, np.int64)]
        while True:
            if self.at == len(self.block_G):
                self.block_G, self.at = next(self.groups), 0
                self.n_before_G = np.concatenate([[0], np.cumsum(self.layout.n_in(self.block_G))])
            bound = self.n_before_G[self.at] + n_max
            stop = int(np.searchsorted(self.n_before_G, bound, "right")) - 1
            parts.append(self.block_G[self.at : stop])
            n_max -= int(self.n_before_G[stop] - self.n_before_G[self.at])
            self.at = stop
            if stop < len(self.block_G):
                return np.concatenate(parts)


Source = collections.abc.Callable[[int], Int64[np.ndarray, "n 2"]]
"""n_max -> (number in the stream, place in the pool) of the next blocks' activations, n_max of them at most."""


class _Epoch:
    """One epoch's draws: which activations are ready, and which of them go next."""

    def __init__(self, layout: Layout, seed: int, epoch: int):
        self.layout = layout
        self.rng = np.random.default_rng((seed, epoch, 1))
        self.n_drawn = 0
        self.n_filled = 0
        self.n_ready = 0
        self.ready_R2 = np.empty((layout.n_ready, 2), np.int64)
        """Number in the stream and place in the pool of what may be drawn; the first `n_ready` rows count."""

    @property
    def n_left(self) -> int:
        return self.layout.n_acts - self.n_drawn

    def fill(self, source: Source) -> None:
        """Adds the blocks that are ready now."""
        bound = min(self.layout.n_ready + self.n_drawn, self.layout.n_acts)
        added_n2 = source(bound - self.n_filled)
        self.ready_R2[self.n_ready : self.n_ready + len(added_n2)] = added_n2
        self.n_ready += len(added_n2)
        self.n_filled += len(added_n2)

    def draw(self, n: int) -> Int64[np.ndarray, "n 2"]:
        """Takes `n` of the ready rows at random; the last ones move into their place."""
        drawn_n = _sample(self.rng, self.n_ready, n)
        out_n2 = self.ready_R2[drawn_n]
        self.n_ready -= n
        last_n2 = self.ready_R2[self.n_ready : self.n_ready + n]
        is_last_n = drawn_n >= self.n_ready
        stays_n = np.ones(n, bool)
        stays_n[drawn_n[is_last_n] - self.n_ready] = False
        self.ready_R2[drawn_n[~is_last_n]] = last_n2[stays_n]
        self.n_drawn += n
        return out_n2


def _sample(rng: np.random.Generator, n_all: int, n: int) -> Int64[np.ndarray, " n"]:
    """n of range(n_all) without replacement, in random order. numpy's own choice takes O(n_all)."""
    if 4 * n > n_all:
        return rng.permutation(n_all)[:n]
    drawn_n = np.empty(0, np.int64)
    while (n_missing := n - len(drawn_n)) > 0:  # draw again for those that came twice
        drawn_n = np.sort(np.concatenate([drawn_n, rng.integers(n_all, size=n_missing)]))
        drawn_n = drawn_n[np.diff(drawn_n, prepend=-1) > 0]
    rng.shuffle(drawn_n)
    return drawn_n


class Plan:
    """Which activation is in which batch, from batch `start` on."""

    def __init__(self, layout: Layout, seed: int, start: int = 0):
        self.layout = layout
        self.seed = seed
        self.epoch_i, n_drawn = divmod(start * layout.batch_size, layout.n_acts)
        self.epoch = _Epoch(layout, seed, self.epoch_i)
        self.cursor = Cursor(layout, seed, self.epoch_i)
        while self.epoch.n_drawn < n_drawn:
            self.epoch.fill(self.without_places)
            drawn = self.epoch_i * layout.n_acts + self.epoch.n_drawn
            self.epoch.draw(min(layout.batch_size - drawn % layout.batch_size, self.epoch.n_left))

    def without_places(self, n_max: int) -> Int64[np.ndarray, "n 2"]:
        """A source that reads nothing."""
        index_n = self.layout.all_in(self.cursor.take(n_max))
        return np.stack([index_n, np.full_like(index_n, -1)], axis=1)

    def draw(self, source: Source) -> collections.abc.Iterator[Int64[np.ndarray, "n 2"]]:
        """The next batch's (number in the stream, place in the pool), in one part for each epoch that it touches."""
        n_left = self.layout.batch_size
        while n_left:
            if not self.epoch.n_left:
                self.epoch_i += 1
                self.epoch = _Epoch(self.layout, self.seed, self.epoch_i)
            self.epoch.fill(source)
            n = min(n_left, self.epoch.n_left)
            n_left -= n
            yield self.epoch.draw(n)


# ---- pool: the plan followed with activations ----


class _Reading:
    """Blocks on their way into the pool."""

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
        """Rows of whole blocks, at most `n_max`; waits until they are read."""
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
    """Activations in memory, each at a place that it keeps until it is drawn."""

    def __init__(self, stream: Shuffled, start: int):
        acts, layout = stream.reader, stream.layout
        self.reader = acts
        self.layout = layout
        self.plan = Plan(layout, stream.seed, start)
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
        """Fills `out_BD` with the next batch and returns each activation's number in the stream."""
        index_parts, at = [], 0
        for part_n2 in self.plan.draw(self._ready):
            self._move(part_n2[:, 1], out_BD[at : at + len(part_n2)])
            self._read_ahead()
            index_parts.append(part_n2[:, 0])
            at += len(part_n2)
        return np.concatenate(index_parts)

    def close(self) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)

    def _move(self, place_n: Int64[np.ndarray, " n"], out_nD: Float32[np.ndarray, "n D"]) -> None:
        """Copies activations out of the pool and frees their places."""
        if self.act_PD.dtype == out_nD.dtype:
            self.act_PD.take(place_n, axis=0, out=out_nD, mode="clip")  # clip: no buffer for `out`
        else:
            stored_nD = self._staging(len(place_n))
            self.act_PD.take(place_n, axis=0, out=stored_nD, mode="clip")
            self.reader.decode_to(stored_nD, out_nD)
        self.free_P[self.n_free : self.n_free + len(place_n)] = place_n
        self.n_free += len(place_n)

    def _ready(self, n_max: int) -> Int64[np.ndarray, "n 2"]:
        """The plan's source."""
        parts = [np.empty((0, 2), np.int64)]
        while self.readings:
            parts.append(self.readings[0].take(n_max))
            n_max -= len(parts[-1])
            if not self.readings[0].is_over:
                break
            self.readings.popleft()
        return np.concatenate(parts)

    def _read_ahead(self) -> None:
        """Starts to read the next blocks, as many as there are free places for."""
        block_G = self.plan.cursor.take(self.n_free)
        if len(block_G):
            index_n = self.layout.all_in(block_G)
            place_n = self._places(len(index_n))
            row_n2 = np.stack([index_n, place_n], axis=1)
            dones = self._read(block_G, place_n)
            self.readings.append(_Reading(self.layout.n_in(block_G), row_n2, dones))

    def _places(self, n: int) -> Int64[np.ndarray, " n"]:
        self.n_free -= n
        return self.free_P[self.n_free : self.n_free + n].copy()

    def _reload(self) -> None:
        """Reads what a plan that starts in the middle of an epoch finds in its pool."""
        ready_R2 = self.plan.epoch.ready_R2[: self.plan.epoch.n_ready]
        ready_R2[:, 1] = self._places(len(ready_R2))
        order_R = np.argsort(ready_R2[:, 0])
        block_G = self.layout.blocks_of(ready_R2[:, 0])
        index_n = self.layout.all_in(block_G)  # rising, as order_R's
        place_n = np.full(len(index_n), -1)  # drawn already
        place_n[np.searchsorted(index_n, ready_R2[order_R, 0])] = ready_R2[order_R, 1]
        for done in self._read(block_G, place_n):
            done.result()

    def _read(
        self, block_G: Int64[np.ndarray, " G"], place_n: Int64[np.ndarray, " n"]
    ) -> list[concurrent.futures.Future[None]]:
        """Starts to read blocks to their activations' places (-1: to none), in the order of the files."""
        order_G = np.argsort(block_G)
        n_G = self.layout.n_in(block_G)
        start_G = np.cumsum(n_G) - n_G
        n_share = max(1, self.share_bytes // (self.layout.n_block * self.reader.token_bytes))
        n_share = max(1, min(n_share, math.ceil(len(block_G) / self.n_threads)))
        shares = [order_G[at : at + n_share] for at in range(0, len(order_G), n_share)]
        return [
            self.threads.submit(
                self._read_share,
                block_G[share],
                [place_n[start_G[g] : start_G[g] + n_G[g]] for g in share],
            )
            for share in shares
        ]

    def _read_share(
        self, block_G: Int64[np.ndarray, " G"], places: list[Int64[np.ndarray, " n"]]
    ) -> None:
        """Reads blocks one after the other, then moves all their activations at once: Python's lock is taken rarely."""
        place_n = np.concatenate(places)
        staged_nD = self._staging(len(place_n))
        extents = self.reader.extents(self.layout.first_in(block_G), self.layout.n_in(block_G))
        self.reader.read_extents(extents, memoryview(staged_nD).cast("B"))
        if place_n.min() < 0:
            place_n, staged_nD = place_n[place_n >= 0], staged_nD[place_n >= 0]
        self.act_PD[place_n] = staged_nD

    def _staging(self, n: int) -> Shaped[np.ndarray, "n D"]:
        """Memory of this thread, used again and again."""
        if len(getattr(self.local, "staging", ())) < n:
            self.local.staging = np.empty((n, self.reader.d_vit), self.act_PD.dtype)
        return self.local.staging[:n]
