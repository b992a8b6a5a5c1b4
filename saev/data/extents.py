"""Reads bytes of shard files, and compares them with their checksums."""

import collections.abc
import functools
import os
import typing as tp

import numpy as np

from saev import errors
from saev.formats import shards, staging
from saev.formats.pieces import SUM_BYTES

RUN_BYTES = 2**20
"""Bytes read with one call, about: few enough to be in the core's cache when checksums are compared."""
GAP_BYTES = 128 * 2**10
"""Gaps up to this length are read and dropped; longer ones are skipped."""
IOV_MAX = 1024
"""Buffers of one system call (Linux)."""
N_OPEN = 512
"""Shard files open at a time."""

SEQUENTIAL = getattr(os, "POSIX_FADV_SEQUENTIAL", 0)
RANDOM = getattr(os, "POSIX_FADV_RANDOM", 0)


class Extent(tp.NamedTuple):
    """Consecutive bytes of a shard."""

    part_i: int
    """Number of its directory."""
    shard_i: int
    offset: int
    length: int


class _Read(tp.NamedTuple):
    """An extent that is being read."""

    extent: Extent
    pieces: range
    """Those that hold it."""
    start: int
    """Where they begin in the file."""
    data: memoryview
    """Their bytes."""
    target: memoryview
    """The extent's bytes: the same memory, unless it is only a part of the pieces."""


class File:
    """An open shard. It closes with its last reference, because a thread may outlive the cache entry.

    Raises:
        UserError: it cannot be opened, or its checksums are damaged.
    """

    def __init__(self, part: shards.ShardDir, shard_i: int, advice: int, flags: int):
        self.fd = -1
        self.part = part
        self.shard_i = shard_i
        self.fpath = str(part.acts_fpath(shard_i))
        try:
            self.sums = part.sums(shard_i)
            self.fd = os.open(self.fpath, os.O_RDONLY | flags)
            if hasattr(os, "posix_fadvise"):  # a hint to the kernel, if it takes hints
                os.posix_fadvise(self.fd, 0, 0, advice)
        except OSError as err:
            raise _unreadable(self.fpath, err) from err
        is_long_enough = len(self.sums) >= SUM_BYTES * part.n_pieces(shard_i)
        self.sums_address = np.frombuffer(self.sums, np.uint8).ctypes.data if is_long_enough else 0

    def read(self, buffers: list[memoryview], offset: int) -> None:
        """Fills the buffers from consecutive bytes.

        Raises:
            UserError: the file disappeared or was truncated.
        """
        at = 0
        while at < len(buffers):
            try:
                n = os.preadv(self.fd, buffers[at : at + IOV_MAX], offset)
            except OSError as err:
                raise _unreadable(self.fpath, err) from err
            if not n:
                raise errors.UserError(
                    f"{self.fpath}: ends at byte {offset}, in the middle of its activations. "
                    f"{self.part.remedy}"
                )
            offset += n
            while at < len(buffers) and n >= len(buffers[at]):
                n -= len(buffers[at])
                at += 1
            if n:
                buffers[at] = buffers[at][n:]

    def compare(self, data: memoryview, pieces: range) -> None:
        """Compares whole pieces with their checksums. If they differ in a copy of --stage-to, the shard is
        copied again, and `data` read anew.

        Raises:
            UserError: they differ (the bytes are named).
        """
        have = self.part.pieces.sums(data, pieces)
        want = self.sums[SUM_BYTES * pieces.start : SUM_BYTES * pieces.stop]
        if have != want and not staging.renew(
            self.part, self.shard_i, lambda: self._again(data, pieces) == want
        ):
            (first, *_) = self.part.pieces.differing(have, want, pieces.start)
            raise self.part.differs(self.shard_i, first)

    def _again(self, data: memoryview, pieces: range) -> bytes:
        """Reads whole pieces from the file that has the name now. Returns their checksums.

        The descriptor keeps its number, for other threads.
        """
        new_fd = os.open(self.fpath, os.O_RDONLY)
        try:
            os.dup2(new_fd, self.fd, inheritable=False)
        finally:
            os.close(new_fd)
        self.read([data], self.part.pieces.start(pieces.start))
        return self.part.pieces.sums(data, pieces)

    def __del__(self, close: collections.abc.Callable[[int], None] = os.close) -> None:
        # At exit `os` may already be gone.
        if self.fd >= 0:
            close(self.fd)


def _unreadable(fpath: str, err: OSError) -> errors.UserError:
    return errors.UserError(
        f"{fpath}: cannot be read ({err.strerror}). Check the file system, or run the same "
        "`python -m saev.data` command again."
    )


class Files:
    """Shards of some directories. The last that were read stay open; a pickled copy starts with none.

    Args:
        advice: a hint to the kernel on the order of reads (POSIX_FADV_*).
        flags: with which files are opened (O_DIRECT: then `read` does not work).
    """

    def __init__(self, dirs: list[shards.ShardDir], advice: int = SEQUENTIAL, flags: int = 0):
        self.dirs = dirs
        self.pieces = dirs[0].pieces
        self.how = (advice, flags)
        self._file = functools.lru_cache(N_OPEN)(File)

    def __reduce__(self) -> tuple[type, tuple[list[shards.ShardDir], int, int]]:
        return Files, (self.dirs, *self.how)

    def open(self, part_i: int, shard_i: int) -> File:
        """Raises as `File`."""
        return self._file(self.dirs[part_i], shard_i, *self.how)

    def read(self, extents: list[Extent], into: memoryview) -> None:
        """Reads extents one after the other, in their stored form. Neighbours are read with one call.

        Raises:
            UserError: a shard file disappeared or was truncated, or differs from its checksums.
        """
        runs: list[list[_Read]] = []
        for extent in extents:
            pieces = self.pieces.around(extent.offset, extent.length)
            start, stop = self.pieces.start(pieces.start), self.pieces.start(pieces.stop)
            target, into = into[: extent.length], into[extent.length :]
            is_whole = stop - start == extent.length
            data = target if is_whole else memoryview(bytearray(stop - start))
            read = _Read(extent, pieces, start, data, target)
            if not runs or not _goes_on(runs[-1], read):
                runs.append([])
            runs[-1].append(read)
        for run in runs:
            self._read_run(run)

    def _read_run(self, run: list[_Read]) -> None:
        """Reads neighbours with one call."""
        first, buffers, end = run[0], [], run[0].start
        for read in run:
            if gap := read.start - end:
                buffers.append(memoryview(bytearray(gap)))
            buffers.append(read.data)
            end = read.start + len(read.data)
        file = self.open(first.extent.part_i, first.extent.shard_i)
        file.read(buffers, first.start)
        for read in run:
            file.compare(read.data, read.pieces)
            if read.data is not read.target:
                read.target[:] = read.data[read.extent.offset - read.start :][: read.extent.length]


def _goes_on(run: list[_Read], read: _Read) -> bool:
    """Whether it can be read with the same call as a run."""
    last = run[-1]
    gap = read.start - last.start - len(last.data)
    is_same = last.extent[:2] == read.extent[:2]
    return is_same and 0 <= gap <= GAP_BYTES and last.start - run[0].start < RUN_BYTES
