"""Reads past the page cache, for dumps that memory cannot hold.

The kernel copies blocks from the disk straight into the loader's memory (O_DIRECT), many at a time and in the
background (Linux's io_submit). That takes a fraction of the processor time of reads through the page cache,
which would be of no use: until the next epoch reads a block again, it has long been replaced.

Shape letters: G blocks, R bytes for each.
"""

import ctypes
import functools
import logging
import os
import typing as tp
import weakref

import numpy as np
from jaxtyping import UInt8

from saev import machine
from saev.data import activations, moves

logger = logging.getLogger("saev")

FLAG = getattr(os, "O_DIRECT", 0)
"""With which files are opened."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class Buffer:
    """Memory that the kernel fills with blocks in the background.

    staging_GR: see `rows`.

    Raises:
        OSError: the system cannot do that, forbids it, or does it for too many others.
    """

    def __init__(self, staging_GR: UInt8[np.ndarray, "G R"]):
        n_blocks = len(staging_GR)
        self.staging_GR = staging_GR
        self.request_G8 = np.zeros((n_blocks, 8), np.int64)
        self.answer_G4 = np.empty((n_blocks, 4), np.int64)
        self.where_G = self.request_G8.ctypes.data + 64 * np.arange(n_blocks)
        self.n_asked = 0
        context = ctypes.c_long(0)
        _system(moves.AIO[1], n_blocks, ctypes.addressof(context))
        self.context = context.value
        self.close = weakref.finalize(self, _tear_down, self.context, self.staging_GR)
        """Waits for the kernel. If nobody calls it, it is called before the memory is freed."""

    def submit(self, *blocks: tp.Any) -> None:
        """Begins to read blocks. blocks: the arguments of `moves.submit` from file_G2 to W."""
        memory = (self.staging_GR, self.request_G8, self.where_G)
        self.n_asked = moves.submit(moves.AIO, self.context, *blocks, *memory)

    def receive(self, *blocks: tp.Any) -> None:
        """Moves them into the pool. blocks: the arguments of `moves.receive` from file_G2 to is_read_G."""
        while self.n_asked:  # again after a signal
            asked = (moves.AIO, self.context, self.n_asked)
            self.n_asked = moves.receive(moves.C, *asked, *blocks, self.staging_GR, self.answer_G4)


def row_bytes(n_bytes: int) -> int:
    """Bytes of the pages that hold a block, wherever it begins."""
    return (-(-n_bytes // moves.PAGE) + 1) * moves.PAGE


def rows(n_blocks: int, R: int) -> UInt8[np.ndarray, "G R"]:
    """Memory for blocks. NumPy asks for huge pages for large arrays: a request has then few pieces."""
    return moves.aligned(n_blocks * R, moves.PAGE).reshape(n_blocks, R)


def _system(number: int, *args: int) -> None:
    if _LIBC.syscall(*map(ctypes.c_long, (number, *args))):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _tear_down(context: int, _: object) -> None:
    _system(moves.AIO[2], context)


def check(acts: activations.Activations) -> None:
    """Tries a direct read of each directory.

    Raises:
        OSError: it fails.
    """
    if not FLAG:
        raise OSError("not on this system")
    page = moves.aligned(moves.PAGE, moves.PAGE).data
    for part in acts.dirs:
        fd = os.open(part.acts_fpath(part.shard_is[0]), os.O_RDONLY | FLAG)
        try:
            os.preadv(fd, [page], 0)
        finally:
            os.close(fd)


@functools.cache
def say(line: str) -> None:
    """Logs a line once, not for each stream."""
    logger.info("%s", line)


def is_better(acts: activations.Activations, pool_bytes: int) -> bool:
    """Whether memory cannot hold the files that a stream reads, beside the stream's pool."""
    n_bytes = acts.n_imgs * acts.n_per_img * acts.token_bytes
    return n_bytes + pool_bytes > machine.free_bytes()
