"""Reads shares of blocks into the shuffled loader's pool: through the page cache, or past it.

The kernel gets requests for the next shares while the threads still copy batches.

Shape letters: G blocks, P pool slots, W bytes of an activation, n any number.
"""

import collections.abc
import concurrent.futures
import queue
import threading
import typing as tp

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from saev.data import activations, aio, moves

SHARE_BYTES, DIRECT_BYTES = 4 * 2**20, 2 * 2**20
"""Bytes that one thread reads at a time, about: through the page cache and past it."""
ANNOUNCED = 4
"""Shares for each thread that are announced and not yet read: they come while the threads copy batches."""
Hint = concurrent.futures.Future[tp.Any] | None
"""An announcement."""


class Share(tp.NamedTuple):
    """Blocks to read, and where they are."""

    index_G: Int64[np.ndarray, " G"]
    """The block's first activation in the stream."""
    run_G2: Int64[np.ndarray, "G 2"]
    """Offset in its file, and number of activations."""
    first_G: Int64[np.ndarray, " G"]
    """Place of its first slot in slot_n."""
    file_G2: Int64[np.ndarray, "G 2"]
    files: collections.abc.Sequence[object]
    """See `Activations.files`."""
    slot_n: Int64[np.ndarray, " n"]
    """Slots of the activations of these and other blocks (-1: discarded)."""

    def only(self, share_g: Int64[np.ndarray, " g"]) -> "Share":
        """Some of the blocks."""
        parts = {name: getattr(self, name)[share_g] for name in ("index_G", "run_G2", "first_G", "file_G2")}
        return self._replace(**parts)


class Cached:
    """Reads through the page cache. Shares are announced in advance as long as they are not in memory.

    Args:
        acts: the activations.
        n_threads: that call `read` at the same time.
        read_bytes: memory for the threads' reads.
        block_bytes: of the longest block.
    """

    def __init__(self, acts: activations.Activations, n_threads: int, read_bytes: int, block_bytes: int):
        self.opened = acts
        """What opens the files that are read."""
        self.share_bytes = min(SHARE_BYTES, read_bytes // n_threads)
        self.n_blocks = max(1, self.share_bytes // block_bytes)
        """Blocks of a share."""
        self.block_bytes = block_bytes
        self.announcer = concurrent.futures.ThreadPoolExecutor(1, "saev-announce")
        self.room = threading.Semaphore(ANNOUNCED * n_threads)
        self.is_cold = True
        """Whether a share was read or announced lately that was not in memory."""
        self.local = threading.local()

    def announce(self, share: Share) -> Hint:
        """Asks the kernel for a share, when there is room for what is announced and not yet read."""
        return self.announcer.submit(self._announce, share) if self.is_cold else None

    def _announce(self, share: Share) -> None:
        self.room.acquire()
        args = (share.file_G2, share.run_G2, self.opened.pieces.start_n, self.opened.token_bytes)
        self.is_cold = moves.announce(moves.C, *args)

    def read(self, share: Share, hint: Hint, pool_PW: UInt8[np.ndarray, "P W"]) -> Bool[np.ndarray, " G"]:
        """Reads a share into its slots. Returns which blocks were read. hint: what `announce` returned."""
        is_read_G = np.zeros(len(share.run_G2), bool)
        args = (share.file_G2, share.run_G2, share.first_G, share.slot_n, self.opened.pieces.start_n)
        is_announced = hint is not None and not hint.cancel()
        is_hinted = moves.read(moves.C, *args, self._staging(), pool_PW, is_announced, is_read_G)
        if is_announced:
            self.room.release()
        elif is_hinted:
            self.is_cold = True
        return is_read_G

    def _staging(self) -> UInt8[np.ndarray, " n"]:
        """This thread's reused memory."""
        if not hasattr(self.local, "staging"):
            self.local.staging = np.empty(self.block_bytes, np.uint8)
        return self.local.staging

    def close(self) -> None:
        """Leaves out announcements that have not begun. Nobody may call `read` any more."""
        self.announcer.shutdown(wait=False, cancel_futures=True)
        self.room.release()  # it may be waiting for room
        self.announcer.shutdown(wait=True)


class Direct:
    """Reads past the page cache (see `aio`). Args as in `Cached`.

    Raises:
        OSError: see `aio.Buffer`; the disk of a directory has no such reads.
    """

    def __init__(self, acts: activations.Activations, n_threads: int, read_bytes: int, block_bytes: int):
        aio.check(acts)
        self.opened = acts.advised(activations.RANDOM, aio.FLAG)
        row_bytes = aio.row_bytes(block_bytes)
        self.share_bytes = min(DIRECT_BYTES, read_bytes // (2 * n_threads))
        self.n_blocks = max(1, self.share_bytes // row_bytes)
        n = min((1 + ANNOUNCED) * n_threads, read_bytes // (self.n_blocks * row_bytes))
        n = max(n, n_threads + 1)
        staging_nGR = aio.rows(n * self.n_blocks, row_bytes).reshape(n, self.n_blocks, row_bytes)
        self.buffers = [aio.Buffer(staging_GR) for staging_GR in staging_nGR]
        self.own: queue.SimpleQueue[aio.Buffer] = queue.SimpleQueue()
        """One for each thread, for shares that were not announced in time."""
        self.room: queue.SimpleQueue[aio.Buffer | None] = queue.SimpleQueue()
        """The others, for shares that are announced. None: stop."""
        for i, buffer in enumerate(self.buffers):
            (self.own if i < n_threads else self.room).put(buffer)
        self.announcer = concurrent.futures.ThreadPoolExecutor(1, "saev-announce")

    def announce(self, share: Share) -> Hint:
        """Begins to read a share, when there is room for it."""
        return self.announcer.submit(self._announce, share)

    def _announce(self, share: Share) -> aio.Buffer | None:
        buffer = self.room.get()
        return buffer and self._submit(share, buffer)

    def _submit(self, share: Share, buffer: aio.Buffer) -> aio.Buffer:
        buffer.submit(share.file_G2, share.run_G2, self.opened.pieces.start_n, self.opened.token_bytes)
        return buffer

    def read(self, share: Share, hint: Hint, pool_PW: UInt8[np.ndarray, "P W"]) -> Bool[np.ndarray, " G"]:
        """As `Cached.read`."""
        is_late = hint is None or hint.cancel()
        buffer: aio.Buffer = self._submit(share, self.own.get()) if is_late else hint.result()
        is_read_G = np.zeros(len(share.run_G2), bool)
        args = (share.file_G2, share.run_G2, share.first_G, share.slot_n, self.opened.pieces.start_n)
        buffer.receive(*args, pool_PW, is_read_G)
        (self.own if is_late else self.room).put(buffer)
        return is_read_G

    def close(self) -> None:
        """As `Cached.close`. Waits for the kernel."""
        self.announcer.shutdown(wait=False, cancel_futures=True)
        self.room.put(None)  # it may be waiting for room
        self.announcer.shutdown(wait=True)
        for buffer in self.buffers:
            buffer.close()


def reader(is_direct: bool, acts: activations.Activations, *sizes: int) -> Cached | Direct:
    """A direct reader if that is asked for and possible, else a cached one. sizes: the other args of both."""
    if not is_direct:
        return Cached(acts, *sizes)
    try:
        out = Direct(acts, *sizes)
    except OSError as err:
        aio.say(f"{acts.root}: read through the page cache, because direct reads fail ({err})")
        return Cached(acts, *sizes)
    aio.say(f"{acts.root}: read past the page cache")
    return out
