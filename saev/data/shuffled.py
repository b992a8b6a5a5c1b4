"""Well-mixed batches of single activations, for training.

`mixing` plans which activation is in which batch. Threads read blocks of neighbouring tokens into a pool of
bounded size, and copy the batches out of it when the reads before them have ended. Compiled code does both
(`moves`), so that the threads rarely wait for Python's lock. A thread with little left to do plans the next
batch: a thread for the plan alone would take a core from the others, and have to wake them for each task.
The order does not depend on the threads. To start at any batch, a stream first reads the blocks that are
then partly in the pool, a few times the pool's size.

Shape letters: B batch, P pool slots, G blocks, R activations ready to be drawn, D d_vit.
"""

import collections
import collections.abc
import contextlib
import math
import os
import typing as tp
import weakref

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped

from saev.data import activations, aio, config, mixing, moves, readers
from saev.data.ahead import Task, Tasks, ahead, run_first


class Batch(tp.NamedTuple):
    """A batch of activations and where each comes from."""

    act_BD: Float[torch.Tensor, "B D"]
    """float32, or as stored (`keep_half`)."""
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
        n_threads: threads that plan, read and copy. 0: one per core (two for direct reads), at most 4.
        pin: page-locked batches, so that `.to("cuda", non_blocking=True)` copies in the background. torch
            uses a batch's memory again when the batch is dropped and such copies of it have ended.
        keep_half: batches of float16 and bfloat16 dumps in that type, for a GPU that converts them: half the
            bytes to copy. By default they are converted to float32.
        direct: read past the page cache (see `aio`), if the system can. None: if the files do not fit into
            memory. The batches are the same.

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
        keep_half: bool = False,
        direct: bool | None = None,
    ):
        self.acts = activations.Activations.open(data).advised(activations.RANDOM)
        self.batch_size = batch_size
        self.seed = seed
        self.pin = pin
        self.dtype = getattr(torch, self.acts.dtype) if keep_half else torch.float32
        self.read_bytes = pool_bytes // 8
        self.direct = aio.is_better(self.acts, pool_bytes) if direct is None else direct
        per_core = 2 if self.direct else 1  # one may wait for the disk while the other copies
        self.n_threads = n_threads or min(4, per_core * (os.cpu_count() or 1))
        self.layout = mixing.Layout.of(
            self.acts.shard_positions(),
            n_layers=len(self.acts.layers),
            n_tokens=self.acts.n_tokens,
            n_lead=self.acts.n_lead,
            n_piece=self.acts.pieces.n_patches,
            token_bytes=self.acts.token_bytes,
            batch_size=batch_size,
            n_fit=mixing.n_fit(pool_bytes, batch_size, self.acts.d_vit, self.acts.token_bytes),
            is_kept_NT=self.acts.is_kept_NT,
        )

    def __iter__(self) -> collections.abc.Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> collections.abc.Generator[Batch]:
        """The stream from batch `start` on."""
        tasks: Tasks = collections.deque()
        planned = self._planned(start, tasks)
        with contextlib.closing(ahead(planned, mixing.AHEAD, self.n_threads, tasks)) as batches:
            for batch in batches:
                yield batch.result()
                del batch  # free the memory for the consumer

    def _planned(self, start: int, tasks: Tasks) -> collections.abc.Generator["_Batch"]:
        """Batches that the threads may still be copying."""
        pool = _Pool(self, start, tasks)
        try:
            while True:
                yield pool.draw()
        finally:
            pool.reader.close()


class _Batch:
    """A batch that threads fill with parts of it."""

    def __init__(self, stream: Shuffled, memory: "_Memory"):
        self.acts, B = stream.acts, stream.batch_size
        self.act_BD = memory.empty((B, self.acts.d_vit))
        self.bits_BD = _bits(self.act_BD)
        self.place_3B = np.empty((3, B), np.int64)
        """Image, patch and layer."""
        self.parts: list[Task[bool]] = []
        """Each says whether its activations are good."""

    def fill(
        self, pool: "_Pool", reads: list[Task[None]], part_n2: Int64[np.ndarray, "n 2"], at: int
    ) -> bool:
        """Copies activations to rows `at`, ... Returns whether all are finite and not too large.

        reads: those that may not have ended.
        part_n2: stream index and slot.

        Raises:
            UserError: see `Activations.read_extents`.
        """
        for read in reads:
            read.result()
        acts, rows = self.acts, slice(at, at + len(part_n2))
        out_nD = self.bits_BD[rows]
        kind = moves.SAME if out_nD.dtype == pool.act_PD.dtype else moves.CONVERTED[acts.dtype]
        sizes = (acts.n_per_img, acts.n_tokens, acts.first_patch)
        places = (*sizes, acts.image_is_N, np.array(acts.layers), self.place_3B[:, rows])
        return moves.fill(kind, pool.act_PD, part_n2, moves.LARGEST[acts.dtype], out_nD, *places)

    def result(self) -> Batch:
        """The batch, when it is full.

        Raises:
            UserError: see `activations.check_finite`.
        """
        is_good = [part.result() for part in self.parts]
        if not all(is_good):
            act_BD = self.act_BD.to(torch.float32).numpy()
            activations.check_finite(act_BD, self.place_3B[0], self.acts)
        return Batch(self.act_BD, *self.place_3B)


def _bits(act_BD: Float[torch.Tensor, "B D"]) -> Shaped[np.ndarray, "B D"]:
    """The same memory as unsigned integers."""
    signed, unsigned = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}[act_BD.element_size()]
    return act_BD.view(signed).numpy().view(unsigned)


class _Memory:
    """Memory of batches. It is used again when nothing refers to a batch any more: new memory is slow."""

    def __init__(self, dtype: torch.dtype, pin: bool):
        self.dtype = dtype
        self.pin = pin
        self.free: collections.deque[np.ndarray] = collections.deque(maxlen=mixing.AHEAD + 2)

    def empty(self, shape: tuple[int, int]) -> torch.Tensor:
        """A tensor with any values."""
        if self.pin:  # torch keeps page-locked memory itself
            return torch.empty(shape, dtype=self.dtype, pin_memory=True)
        try:
            memory = self.free.pop()
        except IndexError:
            memory = np.empty(math.prod(shape) * self.dtype.itemsize, np.uint8)
        lent = memory[:]  # all tensors of this memory refer to this array
        weakref.finalize(lent, self.free.append, memory)
        return torch.frombuffer(lent, dtype=self.dtype).view(shape)


class _Reading:
    """Blocks being read into the pool."""

    def __init__(
        self, n_G: Int64[np.ndarray, " G"], row_n2: Int64[np.ndarray, "n 2"], dones: list[Task[None]]
    ):
        self.n_before_G = np.concatenate([[0], np.cumsum(n_G)])
        self.row_n2 = row_n2
        self.dones = dones
        self.at = 0

    def take(self, n_max: int) -> Int64[np.ndarray, "n 2"]:
        """Rows of whole blocks, at most `n_max`."""
        start = self.n_before_G[self.at]
        self.at = int(np.searchsorted(self.n_before_G, start + n_max, "right")) - 1
        return self.row_n2[start : self.n_before_G[self.at]]

    @property
    def is_over(self) -> bool:
        return self.at == len(self.n_before_G) - 1


class _Pool:
    """Activations in memory, as stored, in unsigned integers. Each keeps its slot until it is drawn."""

    def __init__(self, stream: Shuffled, start: int, tasks: Tasks):
        acts, layout = stream.acts, stream.layout
        self.stream = stream
        self.acts = acts
        self.layout = layout
        self.plan = mixing.Plan(layout, stream.seed, start)
        self.memory = _Memory(stream.dtype, stream.pin)
        self.tasks = tasks
        self.reader = readers.reader(
            stream.direct, acts, stream.n_threads, stream.read_bytes, layout.max_block * acts.token_bytes
        )
        unsigned = np.dtype(f"u{acts.token_bytes // acts.d_vit}")
        self.act_PD = moves.aligned(layout.n_pool * acts.token_bytes).view(unsigned).reshape(-1, acts.d_vit)
        self.readings: collections.deque[_Reading] = collections.deque()
        self.reads: list[Task[None]] = []
        """Those that may not have ended, of blocks that can be drawn."""
        self.takings: collections.deque[tuple[Task[bool], Int64[np.ndarray, " n"]]] = collections.deque()
        """Copies out of the pool that may not have ended, and their slots."""
        self.free_P = np.arange(layout.n_pool)[::-1].copy()  # the last ones go first
        self.n_free = layout.n_pool
        self._reload()
        self._read_ahead()

    def draw(self) -> _Batch:
        """The next batch."""
        batch, at = _Batch(self.stream, self.memory), 0
        for part_n2 in self.plan.draw(self._ready):
            self.reads = [read for read in self.reads if not read.is_over() or read.error]
            batch.parts.append(Task(batch.fill, self, self.reads, part_n2, at))
            self.tasks.append(batch.parts[-1])
            self.takings.append((batch.parts[-1], part_n2[:, 1]))
            at += len(part_n2)
            self._free(wait=False)
            if self.n_free * self.acts.token_bytes >= self.stream.n_threads * self.reader.share_bytes:
                self._read_ahead()
        return batch

    def _free(self, wait: bool) -> None:
        """Frees the slots of copies that have ended. wait: of at least one."""
        while self.takings and (wait or self.takings[0][0].is_over()):
            taken, slot_n = self.takings.popleft()
            while not taken.is_over() and run_first(self.tasks):
                pass  # it may be one of them
            taken.wait()
            self.free_P[self.n_free : self.n_free + len(slot_n)] = slot_n
            self.n_free += len(slot_n)
            wait = False

    def _ready(self, n_max: int) -> Int64[np.ndarray, "n 2"]:
        """The plan's `mixing.NextBlocks`. If not all of them are being read yet, waits for free slots."""
        parts: list[Int64[np.ndarray, "n 2"]] = []
        while True:
            while self.readings:
                parts.append(self.readings[0].take(n_max))
                if len(parts[-1]):
                    self.reads = [*self.reads, *self.readings[0].dones]  # copies hold the old list
                    self.readings[0].dones = []
                n_max -= len(parts[-1])
                if not self.readings[0].is_over:
                    return np.concatenate(parts) if parts[1:] else parts[0]
                self.readings.popleft()
            if self._read_ahead():
                continue
            if not self.takings:
                return np.concatenate([np.empty((0, 2), np.int64), *parts])
            self._free(wait=True)

    def _read_ahead(self) -> bool:
        """Starts to read the next blocks, as many as have free slots. Returns whether there was one."""
        block_G = self.plan.cursor.take(self.n_free)
        if not len(block_G):
            return False
        index_n = self.layout.all_in(block_G)
        row_n2 = np.empty((len(index_n), 2), np.int64)
        row_n2[:, 0], row_n2[:, 1] = index_n, (slot_n := self._take_slots(len(index_n)))
        dones = self._read(block_G, self._slots(block_G, slot_n))
        self.readings.append(_Reading(self.layout.n_in(block_G), row_n2, dones))
        return True

    def _slots(
        self, block_G: Int64[np.ndarray, " G"], slot_n: Int64[np.ndarray, " n"]
    ) -> Int64[np.ndarray, " m"]:
        """The slots of all tokens of the blocks (-1: left out), given those of their activations."""
        if self.layout.is_kept_NT is None:
            return slot_n
        is_kept_m = self.layout.is_kept(self.layout.all_read(block_G))
        slot_m = np.full(len(is_kept_m), -1)
        slot_m[is_kept_m] = slot_n
        return slot_m

    def _take_slots(self, n: int) -> Int64[np.ndarray, " n"]:
        self.n_free -= n
        return self.free_P[self.n_free : self.n_free + n].copy()

    def _reload(self) -> None:
        """Fills the pool of a plan that starts in the middle of an epoch."""
        ready_R2 = self.plan.epoch.ready_R2[: self.plan.epoch.n_ready]
        ready_R2[:, 1] = self._take_slots(len(ready_R2))
        order_R = np.argsort(ready_R2[:, 0])
        block_G = self.layout.blocks_of(ready_R2[:, 0])
        index_n = self.layout.all_read(block_G)  # ascending, as with order_R
        slot_n = np.full(len(index_n), -1)  # already drawn, or left out
        slot_n[np.searchsorted(index_n, ready_R2[order_R, 0])] = ready_R2[order_R, 1]
        self.reads = self._read(block_G, slot_n)

    def _read(self, block_G: Int64[np.ndarray, " G"], slot_n: Int64[np.ndarray, " n"]) -> list[Task[None]]:
        """Starts to read blocks into their tokens' slots (-1: discarded), in file order."""
        order_G = np.argsort(block_G)
        index_G, n_G = self.layout.spans(block_G)
        n_share = max(1, min(self.reader.n_blocks, math.ceil(len(block_G) / self.stream.n_threads)))
        at_G3 = self.acts.located(index_G)
        files, file_G2 = self.reader.opened.files(at_G3)
        run_G2 = np.stack([at_G3[:, 2], n_G], axis=1)
        blocks = readers.Share(index_G, run_G2, np.cumsum(n_G) - n_G, file_G2, files, slot_n)
        shares = [blocks.only(order_G[at : at + n_share]) for at in range(0, len(order_G), n_share)]
        reads = [Task(self._read_share, s, self.reader.announce(s)) for s in shares]
        self.tasks.extend(reads)
        return reads

    def _read_share(self, share: readers.Share, hint: readers.Hint) -> None:
        """Reads blocks into their slots. hint: the announcement.

        Raises:
            UserError: see `Activations.read_extents`.
        """
        acts, pool_PW = self.acts, self.act_PD.view(np.uint8)
        is_read_G = self.reader.read(share, hint, pool_PW)
        for g in np.flatnonzero(~is_read_G):  # this raises what is wrong with them
            n = share.run_G2[g : g + 1, 1]
            slots = share.slot_n[share.first_G[g] : share.first_G[g] + n[0]]
            act_nW = np.empty((len(slots), acts.token_bytes), np.uint8)
            acts.read_extents(acts.extents(share.index_G[g : g + 1], n), act_nW.data.cast("B"))
            pool_PW[slots[slots >= 0]] = act_nW[slots >= 0]
