"""Well-mixed batches of single activations, for training.

Mixing. An epoch visits the shards in random order, GROUP_SHARDS at a time, and the blocks of such a group (a few
dozen neighbouring tokens of one image and layer) in random order. Blocks are read into a pool of bounded size, and
every batch is drawn from the pool at random without replacement; blocks come in as activations go out. An epoch
delivers every activation exactly once and the next starts when it is over: only the batch at the seam holds
activations of both, so every batch is full.

The plan (which activation is in which batch) depends on the seed, the batch size and the pool's size alone, never
on the threads that read. It can be followed without reading, so a stream starts at any step at the cost of reading one pool.

Shape letters: B batch, P places in the pool, R places that may be drawn, D d_vit.
"""

import collections
import collections.abc
import concurrent.futures
import itertools
import math
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Float32, Int64

from saev.data import config, reader
from saev.data.ahead import ahead
from saev.formats import shards

GROUP_SHARDS = 128
"""Shards that are read at the same time."""
READ_BYTES = 64 * 2**10
"""Blocks are at least so long (or a whole image): shorter reads are slow on every disk."""
BLOCKS_PER_BATCH = 5
"""The pool shall hold so many blocks for each activation of a batch, if its size allows: then few of a batch share an image."""
LAG_BYTES = 64 * 2**20
"""About so much of the pool is being read while the rest may be drawn."""
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
            case; the order of the blocks takes 8 bytes a block of the shards that are read at the same time.)
        n_threads: threads that read.
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
        n_threads: int = 4,
        pin: bool = False,
    ):
        self.reader = reader.Reader(cfg, reader.RANDOM)
        self.batch_size = batch_size
        self.seed = seed
        self.n_threads = n_threads
        self.pin = pin
        batch_bytes = 4 * self.reader.d_vit * batch_size
        n_fit = (pool_bytes - (AHEAD + 2) * batch_bytes) // self.reader.token_bytes
        self.layout = Layout.of(self.reader, batch_size, n_fit)

    def __iter__(self) -> collections.abc.Iterator[Batch]:
        return self.batches()

    @beartype.beartype
    def batches(self, start: int = 0) -> collections.abc.Iterator[Batch]:
        """The stream from its batch number `start` on."""
        return ahead(self._batches(start), AHEAD)

    def _batches(self, start: int) -> collections.abc.Iterator[Batch]:
        pool = _Pool(self.reader, self.layout, self.seed, self.n_threads, start)
        acts = self.reader
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
    def of(cls, acts: reader.Reader, batch_size: int, n_fit: int) -> "Layout":
        """n_fit: activations that fit into memory."""
        longest = min(acts.n_tokens, reader.IOV_MAX)
        mixing = 2 * n_fit // (BLOCKS_PER_BATCH * batch_size)
        n_block = min(max(mixing, READ_BYTES // acts.token_bytes, 1), longest)
        n_block = math.ceil(acts.n_tokens / math.ceil(acts.n_tokens / n_block))
        # Both bounds from below: a batch can always be drawn, and a block can always be read.
        n_pool = min(max(n_fit, 2 * (batch_size + n_block)), 2 * len(acts) + n_block)
        lag = min(n_pool // 8, max(4 * batch_size, LAG_BYTES // acts.token_bytes))
        n_ready = min(n_pool - lag, len(acts))
        return cls(
            acts.shard_positions(),
            len(acts.layers),
            acts.n_tokens,
            n_block,
            batch_size,
            n_pool,
            n_ready,
        )

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

    def blocks(self, seed: int, epoch: int) -> collections.abc.Iterator[int]:
        """All blocks of an epoch in the order in which they come into the pool."""
        rng = np.random.default_rng((seed, epoch, 0))
        per_img = self.n_layers * self.n_parts
        order = rng.permutation(len(self.shards)).tolist()
        for at in range(0, len(order), GROUP_SHARDS):
            group = [self.shards[i] for i in order[at : at + GROUP_SHARDS]]
            blocks = np.concatenate([np.arange(r.start * per_img, r.stop * per_img) for r in group])
            rng.shuffle(blocks)
            yield from map(int, blocks)

    def n_in(self, block: int) -> int:
        """Activations of a block."""
        return min(self.n_block, self.n_tokens - block % self.n_parts * self.n_block)

    def blocks_of(self, index_R: Int64[np.ndarray, " R"]) -> Int64[np.ndarray, " blocks"]:
        """The blocks that hold these activations."""
        x_R, token_R = np.divmod(index_R, self.n_tokens)
        return np.unique(x_R * self.n_parts + token_R // self.n_block)

    def where(self, block: int) -> tuple[int, int, int, int]:
        """(position of the image, number of the layer among the chosen ones, first token, tokens) of a block."""
        x, part = divmod(block, self.n_parts)
        position, layer = divmod(x, self.n_layers)
        return position, layer, part * self.n_block, self.n_in(block)

    def first_index(self, block: int) -> int:
        """Number of a block's first activation in the stream; the others follow it."""
        x, part = divmod(block, self.n_parts)
        return x * self.n_tokens + part * self.n_block


class _Epoch:
    """One epoch's draws: which activations are ready, and which of them go next. Reads nothing."""

    def __init__(self, layout: Layout, seed: int, epoch: int):
        self.layout = layout
        self.rng = np.random.default_rng((seed, epoch, 1))
        self.blocks = _Peekable(layout.blocks(seed, epoch))
        self.n_drawn = 0
        self.n_filled = 0
        self.n_ready = 0
        self.ready_R2 = np.empty((layout.n_ready, 2), np.int64)
        """Number in the stream and place in the pool of what may be drawn; the first `n_ready` rows count."""

    @property
    def n_left(self) -> int:
        return self.layout.n_acts - self.n_drawn

    def fill(self, place: collections.abc.Callable[[int], Int64[np.ndarray, " n"] | int]) -> None:
        """Adds the blocks that are ready now, at the places that `place(block)` says."""
        bound = min(self.layout.n_ready + self.n_drawn, self.layout.n_acts)
        while self.n_filled < bound:
            n = self.layout.n_in(self.blocks.peek())
            if self.n_filled + n > bound:
                break
            block = next(self.blocks)
            first = self.layout.first_index(block)
            rows_n2 = self.ready_R2[self.n_ready : self.n_ready + n]
            rows_n2[:, 0] = np.arange(first, first + n)
            rows_n2[:, 1] = place(block)
            self.n_ready += n
            self.n_filled += n

    def draw(self, n: int) -> Int64[np.ndarray, "n 2"]:
        """Takes `n` of the ready rows at random; the last ones move into their place."""
        drawn_n = self.rng.choice(self.n_ready, n, replace=False)
        out_n2 = self.ready_R2[drawn_n]
        self.n_ready -= n
        last_n2 = self.ready_R2[self.n_ready : self.n_ready + n]
        is_last_n = drawn_n >= self.n_ready
        stays_n = np.ones(n, bool)
        stays_n[drawn_n[is_last_n] - self.n_ready] = False
        self.ready_R2[drawn_n[~is_last_n]] = last_n2[stays_n]
        self.n_drawn += n
        return out_n2


class _Peekable(collections.abc.Iterator[int]):
    """An iterator whose next item can be looked at."""

    def __init__(self, items: collections.abc.Iterator[int]):
        self.items = items
        self.ahead: int | None = None

    def peek(self) -> int:
        if self.ahead is None:
            self.ahead = next(self.items)
        return self.ahead

    def __next__(self) -> int:
        item, self.ahead = self.peek(), None
        return item


class Plan:
    """Which activation is in which batch, from batch `start` on."""

    def __init__(self, layout: Layout, seed: int, start: int):
        self.layout = layout
        self.seed = seed
        self.epoch_i, n_drawn = divmod(start * layout.batch_size, layout.n_acts)
        self.epoch = _Epoch(layout, seed, self.epoch_i)
        while self.epoch.n_drawn < n_drawn:
            self.epoch.fill(lambda _: -1)  # no place: nothing is read
            drawn = self.epoch_i * layout.n_acts + self.epoch.n_drawn
            self.epoch.draw(min(layout.batch_size - drawn % layout.batch_size, self.epoch.n_left))

    def draw(
        self, place: collections.abc.Callable[[int], Int64[np.ndarray, " n"] | int]
    ) -> collections.abc.Iterator[Int64[np.ndarray, "n 2"]]:
        """The next batch's (number in the stream, place in the pool), in one part for each epoch that it touches."""
        n_left = self.layout.batch_size
        while n_left:
            if not self.epoch.n_left:
                self.epoch_i += 1
                self.epoch = _Epoch(self.layout, self.seed, self.epoch_i)
            self.epoch.fill(place)
            n = min(n_left, self.epoch.n_left)
            n_left -= n
            yield self.epoch.draw(n)

    def unread(self) -> collections.abc.Iterator[int]:
        """The blocks that `draw` will ask for, in order, without end."""
        blocks = self.layout.blocks(self.seed, self.epoch_i)
        n = 0
        while n < self.epoch.n_filled:
            n += self.layout.n_in(next(blocks))
        yield from blocks
        for epoch_i in itertools.count(self.epoch_i + 1):
            yield from self.layout.blocks(self.seed, epoch_i)


# ---- pool: the plan followed with activations ----


class _Reading(tp.NamedTuple):
    """A block on its way into the pool."""

    block: int
    place_n: Int64[np.ndarray, " n"]
    done: concurrent.futures.Future[None]


class _Pool:
    """Activations in memory, each at a place that it keeps until it is drawn."""

    def __init__(self, acts: reader.Reader, layout: Layout, seed: int, n_threads: int, start: int):
        self.reader = acts
        self.layout = layout
        self.plan = Plan(layout, seed, start)
        self.unread = _Peekable(self.plan.unread())
        self.threads = concurrent.futures.ThreadPoolExecutor(n_threads, "saev-read")
        self.n_threads = n_threads
        self.act_PD = np.empty((layout.n_pool, acts.d_vit), shards.STORED[acts.dtype])
        self.bytes = memoryview(self.act_PD).cast("B")
        self.reading: collections.deque[_Reading] = collections.deque()
        self.free_P = np.arange(layout.n_pool)
        self.n_free = layout.n_pool
        self._reload()
        self._read_ahead()

    def draw(self, out_BD: Float32[np.ndarray, "B D"]) -> Int64[np.ndarray, " B"]:
        """Fills `out_BD` with the next batch and returns each activation's number in the stream."""
        index_parts, at = [], 0
        for part_n2 in self.plan.draw(self._take):
            self._move(part_n2[:, 1], out_BD[at : at + len(part_n2)])
            self._read_ahead()
            index_parts.append(part_n2[:, 0])
            at += len(part_n2)
        return np.concatenate(index_parts)

    def _move(self, place_n: Int64[np.ndarray, " n"], out_nD: Float32[np.ndarray, "n D"]) -> None:
        """Copies activations out of the pool and frees their places."""
        if self.act_PD.dtype == out_nD.dtype:
            self.act_PD.take(place_n, axis=0, out=out_nD, mode="clip")  # clip: no buffer for `out`
        else:
            out_nD[:] = shards.decode(self.act_PD[place_n], self.reader.dtype)
        self.free_P[self.n_free : self.n_free + len(place_n)] = place_n
        self.n_free += len(place_n)

    def close(self) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)

    def _take(self, block: int) -> Int64[np.ndarray, " n"]:
        """The places of the next block, once it is read."""
        reading = self.reading.popleft()
        assert reading.block == block
        reading.done.result()
        return reading.place_n

    def _read_ahead(self) -> None:
        """Starts to read the next blocks while there are free places for them."""
        todo = []
        while (n := self.layout.n_in(self.unread.peek())) <= self.n_free:
            self.n_free -= n
            place_n = self.free_P[self.n_free : self.n_free + n].copy()
            todo.append((next(self.unread), place_n))
        dones = self._submit([(block, self._rows(place_n)) for block, place_n in todo])
        self.reading += [_Reading(*item, done) for item, done in zip(todo, dones, strict=True)]

    def _submit(
        self, todo: list[tuple[int, list[memoryview]]]
    ) -> list[concurrent.futures.Future[None]]:
        """Starts to read blocks into rows, in the order of the files, a share by each thread."""
        order = sorted(range(len(todo)), key=lambda i: todo[i][0])
        size = max(1, min(64, math.ceil(len(todo) / self.n_threads)))
        dones = {}
        for at in range(0, len(todo), size):
            share = order[at : at + size]
            done = self.threads.submit(self._read, [todo[i] for i in share])
            dones |= dict.fromkeys(share, done)
        return [dones[i] for i in range(len(todo))]

    def _read(self, share: list[tuple[int, list[memoryview]]]) -> None:
        wheres = [self.layout.where(block) for block, _ in share]
        for where in wheres:
            self.reader.will_need(*where)
        for (position, layer, token, _), (_, rows) in zip(wheres, share, strict=True):
            self.reader.read_rows(position, layer, token, rows)

    def _rows(self, place_n: Int64[np.ndarray, " n"]) -> list[memoryview]:
        size = self.reader.token_bytes
        return [self.bytes[p * size : (p + 1) * size] for p in place_n.tolist()]

    def _reload(self) -> None:
        """Reads what a plan that starts in the middle of an epoch finds in its pool."""
        epoch = self.plan.epoch
        ready_R2 = epoch.ready_R2[: epoch.n_ready]
        self.n_free -= len(ready_R2)
        ready_R2[:, 1] = self.free_P[self.n_free : self.n_free + len(ready_R2)]
        place_of = dict(ready_R2.tolist())
        drawn = memoryview(bytearray(self.reader.token_bytes))  # rows that are not needed any more
        todo = []
        for block in self.layout.blocks_of(ready_R2[:, 0]).tolist():
            first, n = self.layout.first_index(block), self.layout.n_in(block)
            places = [place_of.get(first + i) for i in range(n)]
            rows = [drawn if p is None else self._rows(np.array([p]))[0] for p in places]
            todo.append((block, rows))
        for done in self._submit(todo):
            done.result()
