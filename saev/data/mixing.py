"""Plans which activation goes into which batch of a shuffled stream. Works on indices only.

An epoch visits the shards in random order, GROUP_SHARDS at a time. It visits the blocks of each group in
random order; a block is a few dozen neighbouring tokens of one image and layer. Blocks enter a bounded pool
as activations leave it, and each batch is drawn from the pool at random without replacement. An epoch
delivers every activation exactly once. Only the batch at its end can hold activations of two epochs.

The plan depends only on the seed, the batch size and the pool size. Replaying it from the start of an epoch
takes a fraction of a millisecond per batch.

Shape letters: B batch, G blocks, R activations ready to be drawn, W words of 64 bits, n any number.
"""

import collections.abc
import itertools
import math
import typing as tp

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from saev.compiled import jit, prefetch

GROUP_SHARDS = 512
"""Shards that are read at the same time."""
READ_BYTES = 64 * 2**10
"""Smallest block, unless an image is smaller. Shorter reads are slow on every disk."""
BLOCKS_PER_BATCH = 5
"""Target blocks in the pool per activation of a batch. The more, the fewer of a batch share an image."""
LAG_BYTES = 64 * 2**20
"""About how much of the pool is being read while the rest can be drawn."""
INDEX_BYTES = 40
"""Bytes of bookkeeping for each activation in the pool."""
AHEAD = 2
"""Batches made in advance."""


def n_fit(pool_bytes: int, batch_size: int, d_vit: int, token_bytes: int) -> int:
    """Returns how many activations fit into the pool.

    An eighth of `pool_bytes` is left for the threads' reads, and room for AHEAD + 2 batches: those waiting,
    one being made, and the consumer's.
    """
    batch_bytes = 4 * d_vit * batch_size
    n_bytes = pool_bytes - pool_bytes // 8 - (AHEAD + 2) * batch_bytes
    return n_bytes // (token_bytes + INDEX_BYTES)


class Layout(tp.NamedTuple):
    """How a stream is cut into blocks, and how many activations the pool holds."""

    shards: list[range]
    """Image positions of each shard."""
    n_layers: int
    n_tokens: int
    """Per image and layer."""
    n_lead: int
    """Tokens before the patches ([CLS]). They belong to an image's first block."""
    n_block: int
    """Patches per block, a multiple of a checksummed piece. The last block of an image may be shorter."""
    batch_size: int
    n_pool: int
    n_ready: int
    """Activations of the pool that can be drawn (fewer at the end of an epoch). The others are being read."""
    is_kept_NT: Bool[np.ndarray, "N T"] | None = None
    """Whether an image's token is in the stream. None: all are."""

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
        n_lead: int = 0,
        n_piece: int = 1,
        is_kept_NT: Bool[np.ndarray, "N T"] | None = None,
    ) -> "Layout":
        """Chooses the sizes of the blocks and the pool.

        In the long run the pool holds parts of twice as many blocks as would fit whole, because a block
        leaves it one activation at a time.

        Args:
            n_fit: activations that fit into memory.
            n_piece: patches per checksummed piece.
        """
        n_acts = n_layers * _n_kept(shards, n_tokens, is_kept_NT)
        mixing = 2 * n_fit // (BLOCKS_PER_BATCH * batch_size)
        n_patches = n_tokens - n_lead
        n_block = min(max(mixing, READ_BYTES // token_bytes, 1), n_patches)
        n_block = math.ceil(n_patches / math.ceil(n_patches / n_block))
        n_block = min(max(1, round(n_block / n_piece)) * n_piece, n_patches)
        # The lower bounds ensure that a batch can always be drawn and a block can always be read.
        max_block = n_lead + n_block
        n_pool = min(max(n_fit, 2 * (batch_size + max_block)), 2 * n_acts + max_block)
        lag = min(n_pool // 8, max(4 * batch_size, LAG_BYTES // token_bytes))
        n_ready = min(n_pool - lag, n_acts)
        return cls(shards, n_layers, n_tokens, n_lead, n_block, batch_size, n_pool, n_ready, is_kept_NT)

    @property
    def n_per_img(self) -> int:
        return self.n_layers * self.n_tokens

    @property
    def n_parts(self) -> int:
        """Blocks per image and layer."""
        return math.ceil((self.n_tokens - self.n_lead) / self.n_block)

    @property
    def max_block(self) -> int:
        """Tokens in the longest block."""
        return self.n_lead + self.n_block

    @property
    def n_acts(self) -> int:
        return self.n_layers * _n_kept(self.shards, self.n_tokens, self.is_kept_NT)

    def order(self, seed: int, epoch: int) -> collections.abc.Iterator[Int64[np.ndarray, " G"]]:
        """Yields all blocks of an epoch in the order in which they enter the pool."""
        rng = np.random.default_rng((seed, epoch, 0))
        per_img = self.n_layers * self.n_parts
        order = rng.permutation(len(self.shards)).tolist()
        for at in range(0, len(order), GROUP_SHARDS):
            group = [self.shards[i] for i in order[at : at + GROUP_SHARDS]]
            dtype = np.min_scalar_type(per_img * max(r.stop for r in group))
            parts = [np.arange(r.start * per_img, r.stop * per_img, dtype=dtype) for r in group]
            block_G = np.concatenate(parts)
            rng.shuffle(block_G)
            if self.is_kept_NT is not None:
                block_G = block_G[self.n_in(block_G.astype(np.int64)) > 0]
            for start in range(0, len(block_G), 2**16):
                yield block_G[start : start + 2**16].astype(np.int64)

    def spans(
        self, block_G: Int64[np.ndarray, " G"]
    ) -> tuple[Int64[np.ndarray, " G"], Int64[np.ndarray, " G"]]:
        """Returns the stream index of each block's first token, and its number of tokens. The others follow
        the first. Tokens that are left out of the stream count."""
        first_G, n_G = np.empty_like(block_G), np.empty_like(block_G)
        _spans(block_G, self.n_parts, self.n_tokens, self.n_lead, self.n_block, first_G, n_G)
        return first_G, n_G

    def n_in(self, block_G: Int64[np.ndarray, " G"]) -> Int64[np.ndarray, " G"]:
        """Returns the number of activations in each block."""
        first_G, n_G = self.spans(block_G)
        if self.is_kept_NT is None:
            return n_G
        image_G, token_G, out_G = first_G // self.n_per_img, first_G % self.n_tokens, np.empty_like(block_G)
        for start in set(token_G.tolist()):
            mine_G = token_G == start
            stop = start + n_G[mine_G][0]
            out_G[mine_G] = self.is_kept_NT[image_G[mine_G], start:stop].sum(axis=1)
        return out_G

    def all_in(self, block_G: Int64[np.ndarray, " G"]) -> Int64[np.ndarray, " n"]:
        """Returns the stream indices of all activations of the blocks, block by block."""
        index_n = self.all_read(block_G)
        return index_n if self.is_kept_NT is None else index_n[self.is_kept(index_n)]

    def all_read(self, block_G: Int64[np.ndarray, " G"]) -> Int64[np.ndarray, " n"]:
        """Returns the stream indices of all tokens of the blocks, including those that are left out."""
        first_G, n_G = self.spans(block_G)
        index_n = np.empty(n_G.sum(), np.int64)
        _count_up(first_G, n_G, index_n)
        return index_n

    def is_kept(self, index_n: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Returns which tokens are in the stream."""
        if self.is_kept_NT is None:
            return np.ones(len(index_n), bool)
        return self.is_kept_NT[index_n // self.n_per_img, index_n % self.n_tokens]

    def blocks_of(self, index_R: Int64[np.ndarray, " R"]) -> Int64[np.ndarray, " G"]:
        """Returns the blocks that hold these activations."""
        x_R, token_R = np.divmod(index_R, self.n_tokens)
        part_R = np.maximum(token_R - self.n_lead, 0) // self.n_block
        return np.unique(x_R * self.n_parts + part_R)


def _n_kept(shards: list[range], n_tokens: int, is_kept_NT: Bool[np.ndarray, "N T"] | None) -> int:
    """Tokens of one layer that are in the stream."""
    return sum(map(len, shards)) * n_tokens if is_kept_NT is None else int(is_kept_NT.sum())


class Cursor:
    """Walks through the whole blocks of all epochs, starting with `epoch`."""

    def __init__(self, layout: Layout, seed: int, epoch: int):
        self.layout = layout
        self.groups = (g for e in itertools.count(epoch) for g in layout.order(seed, e))
        self.block_G = self.n_before_G = np.empty(0, np.int64)
        self.at = 0

    def take(self, n_max: int) -> Int64[np.ndarray, " G"]:
        """Takes as many of the next blocks as hold at most `n_max` activations in total."""
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


NextBlocks = collections.abc.Callable[[int], Int64[np.ndarray, "n 2"]]
"""Maps n_max to (stream index, pool slot) of the activations in the next blocks, at most n_max."""


class _Epoch:
    """The draws of one epoch: which activations are ready, and which are drawn next."""

    def __init__(self, layout: Layout, seed: int, epoch: int):
        self.layout = layout
        self.rng = np.random.default_rng((seed, epoch, 1))
        self.n_drawn = 0
        self.n_filled = 0
        self.n_ready = 0
        self.ready_R2 = np.empty((layout.n_ready, 2), np.int64)
        """Stream index and pool slot of the activations that can be drawn: the first `n_ready` rows."""
        self.is_drawn_W = np.zeros(layout.n_ready // 64 + 1, np.uint64)

    @property
    def n_left(self) -> int:
        return self.layout.n_acts - self.n_drawn

    def fill(self, next_blocks: NextBlocks) -> None:
        """Adds the next blocks, as far as there is room."""
        bound = min(self.layout.n_ready + self.n_drawn, self.layout.n_acts)
        added_n2 = next_blocks(bound - self.n_filled)
        self.ready_R2[self.n_ready : self.n_ready + len(added_n2)] = added_n2
        self.n_ready += len(added_n2)
        self.n_filled += len(added_n2)

    def draw(self, n: int) -> Int64[np.ndarray, "n 2"]:
        """Removes and returns `n` random ready rows. The last rows fill their places."""
        drawn_n = _sample(self.rng, self.n_ready, n, self.is_drawn_W)
        out_n2 = np.empty((n, 2), np.int64)
        _remove(self.ready_R2[: self.n_ready], drawn_n, out_n2)
        self.n_ready -= n
        self.n_drawn += n
        return out_n2


def _sample(
    rng: np.random.Generator, n_all: int, n: int, is_drawn_W: UInt64[np.ndarray, " W"]
) -> Int64[np.ndarray, " n"]:
    """Samples `n` of range(n_all) without replacement, in random order. NumPy's `choice` takes O(n_all).

    is_drawn_W: a bit for each of range(n_all), all zero before and after.
    """
    if 4 * n > n_all:
        return rng.permutation(n_all)[:n]
    n_missing = n
    while n_missing > 0:  # draw again in place of duplicates
        n_missing -= _mark(rng.integers(n_all, size=n_missing), is_drawn_W)
    drawn_n = np.empty(n, np.int64)
    _unmark(is_drawn_W, drawn_n)
    rng.shuffle(drawn_n)
    return drawn_n


@jit
def _spans(block_G, n_parts, n_tokens, n_lead, n_block, first_G, n_G):
    """Fills in `Layout.spans`."""
    for g, block in enumerate(block_G):
        x = block // n_parts
        part = block - x * n_parts
        start = n_lead + part * n_block if part else 0
        first_G[g] = x * n_tokens + start
        n_G[g] = min(n_lead + (part + 1) * n_block, n_tokens) - start


@jit
def _count_up(first_G, n_G, out_n):
    """Writes first_G, first_G + 1, ... (n_G of them) for each block."""
    at = 0
    for g in range(len(first_G)):
        for i in range(n_G[g]):
            out_n[at + i] = first_G[g] + i
        at += n_G[g]


@jit
def _mark(drawn_n, is_drawn_W):
    """Sets the bits of these numbers. Returns how many were not set before."""
    n_new = 0
    for number in drawn_n:
        word, bit = number >> 6, np.uint64(1) << np.uint64(number & 63)
        n_new += (is_drawn_W[word] & bit) == 0
        is_drawn_W[word] |= bit
    return n_new


@jit
def _unmark(is_drawn_W, out_n):
    """Writes the numbers of all set bits, ascending, and clears the bits."""
    n = 0
    for word in range(len(is_drawn_W)):
        bits = is_drawn_W[word]
        is_drawn_W[word] = 0
        while bits:
            lowest = bits & (~bits + np.uint64(1))
            exponent = np.float64(lowest).view(np.uint64) >> np.uint64(52)  # of a power of two
            out_n[n] = (word << 6) + np.int64(exponent) - 1023
            bits ^= lowest
            n += 1


@jit
def _remove(ready_R2, drawn_n, out_n2):
    """Takes the drawn rows out of the ready ones. The last rows that stay fill their places, in order."""
    n_left = len(ready_R2) - len(drawn_n)
    stays_n = np.ones(len(drawn_n), np.bool_)
    where, row_bytes = ready_R2.ctypes.data, ready_R2.strides[0]
    for row in drawn_n:
        prefetch(where + row * row_bytes)
    for i, row in enumerate(drawn_n):
        out_n2[i, 0], out_n2[i, 1] = ready_R2[row, 0], ready_R2[row, 1]
        if row >= n_left:
            stays_n[row - n_left] = False
    last = 0
    for row in drawn_n:
        if row < n_left:
            while not stays_n[last]:
                last += 1
            ready_R2[row, 0] = ready_R2[n_left + last, 0]
            ready_R2[row, 1] = ready_R2[n_left + last, 1]
            last += 1


class Plan:
    """The batches of a stream, from batch `start` on."""

    def __init__(self, layout: Layout, seed: int, start: int = 0):
        self.layout = layout
        self.seed = seed
        self.epoch_i, n_drawn = divmod(start * layout.batch_size, layout.n_acts)
        self.epoch = _Epoch(layout, seed, self.epoch_i)
        self.cursor = Cursor(layout, seed, self.epoch_i)
        while self.epoch.n_drawn < n_drawn:
            self.epoch.fill(self.without_slots)
            drawn = self.epoch_i * layout.n_acts + self.epoch.n_drawn
            self.epoch.draw(min(layout.batch_size - drawn % layout.batch_size, self.epoch.n_left))

    def without_slots(self, n_max: int) -> Int64[np.ndarray, "n 2"]:
        """The next blocks, without assigning pool slots."""
        index_n = self.layout.all_in(self.cursor.take(n_max))
        return np.stack([index_n, np.full_like(index_n, -1)], axis=1)

    def draw(self, next_blocks: NextBlocks) -> collections.abc.Iterator[Int64[np.ndarray, "n 2"]]:
        """Yields the next batch's (stream index, pool slot), one part per epoch in the batch."""
        n_left = self.layout.batch_size
        while n_left:
            if not self.epoch.n_left:
                self.epoch_i += 1
                self.epoch = _Epoch(self.layout, self.seed, self.epoch_i)
            self.epoch.fill(next_blocks)
            n = min(n_left, self.epoch.n_left)
            n_left -= n
            yield self.epoch.draw(n)
