"""Compiled moves of activations: from the files into the shuffled loader's pool, and from there into batches.

They run without Python's lock. Values are moved as unsigned integers, with the bits that are stored.

Shape letters: P pool slots, D d_vit, W bytes of an activation, G blocks, n any number.
"""

import ctypes
import importlib
import os
import platform

import numpy as np
from jaxtyping import UInt8

from saev.compiled import LINE, address, big_endian_at, call, copy_line, jit, prefetch, stores_done
from saev.data import activations

_LIBC = ctypes.CDLL(None)
_XXHASH = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__)
C: tuple[int, int, int, int, int] = (
    address(_LIBC, "pread"),
    address(_LIBC, "posix_fadvise"),
    address(_XXHASH, "XXH3_64bits_dispatch", "XXH3_64bits"),
    address(_LIBC, "memcpy"),
    address(_LIBC, "preadv2"),
)
"""C functions that `read` calls; 0 if missing. Without the second it gives no hints, without the last too
many, and without another it reads nothing."""
WILLNEED = getattr(os, "POSIX_FADV_WILLNEED", 0)
NOWAIT = getattr(os, "RWF_NOWAIT", 0)
"""Read only what is in memory."""
FAR = 4096
"""Bytes of a row that are asked for early; the processor itself asks for the rest."""
EARLY_BYTES = 12 * 2**10
"""About how much is asked for before it is copied."""

EARLY_ROWS = 8
"""How far ahead the first line of a slot is asked for: its page is then known when it is written."""
PAGE = 4096
"""Direct reads begin and end at multiples of this, in the file and in memory."""
_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
AIO: tuple[int, int, int, int, int] = (
    address(_LIBC, "syscall"),
    *_NUMBERS.get(platform.machine(), (-1, -1, -1, -1)),
)
"""A C function, and Linux's numbers of io_setup, io_destroy, io_getevents and io_submit."""


def aligned(n: int, to: int = LINE) -> UInt8[np.ndarray, " n"]:
    """New memory that begins at a multiple of `to`: of a cache line."""
    memory = np.empty(n + to, np.uint8)
    return memory[-memory.ctypes.data % to :][:n]


@jit
def _prefetch(where, n):
    for at in range(0, min(n, FAR), LINE):
        prefetch(where + at)


@jit
def _move(c, target, source, n):
    """Copies n bytes that are not read soon: past the cache, if whole lines are written."""
    if (target | n) % LINE:
        call(c[3], (target, source, n))
    else:
        for at in range(0, n, LINE):
            copy_line(target + at, source + at)


# ---- files to pool ----


@jit
def _piece(start_n, offset):
    """(first byte of the row, number of the piece in it) of a byte of a shard."""
    row_bytes = start_n[-1]
    row = offset // row_bytes
    return row * row_bytes, np.searchsorted(start_n, offset - row * row_bytes, side="right") - 1


@jit
def _is_in_memory(c, fd, start, n, target_2):
    """Reads n bytes if the kernel has them all. target_2: address and n."""
    if not (c[4] and NOWAIT):
        return False
    target_2[1] = n
    return call(c[4], (fd, target_2.ctypes.data, 1, start, NOWAIT)) == n


@jit
def _hint(c, file_G2, span_G2):
    """Asks the kernel to read these blocks in the background."""
    if c[1]:
        for g in range(len(span_G2)):
            start, end = span_G2[g]
            call(c[1], (file_G2[g, 0], start, end - start, WILLNEED))


@jit
def _is_filled(c, fd, start, n, target):
    """Reads n bytes. False: an error, or the file ends."""
    at = 0
    while at < n:
        got = call(c[0], (fd, target + at, n - at, start + at))
        if got <= 0:
            return False
        at += got
    return True


@jit
def _is_intact(c, start_n, start, n, data, sums):
    """Compares pieces, which begin at byte `start` of the shard, with their checksums."""
    row, i = _piece(start_n, start)
    n_per_row = len(start_n) - 1
    sums += 8 * (row // start_n[-1] * n_per_row + i)
    at = 0
    while at < n:
        length = start_n[i + 1] - start_n[i]
        if np.uint64(call(c[2], (data + at, length))) != big_endian_at(sums):
            return False
        at += length
        sums += 8
        i = (i + 1) % n_per_row
    return True


@jit
def _spans(run_G2, start_n, W):
    """First byte and end of the pieces that hold each block."""
    span_G2 = np.empty((len(run_G2), 2), np.int64)
    for g in range(len(run_G2)):
        offset, n = run_G2[g]
        row, i = _piece(start_n, offset)
        end, j = _piece(start_n, offset + n * W - 1)
        span_G2[g, 0], span_G2[g, 1] = row + start_n[i], end + start_n[j + 1]
    return span_G2


@jit
def _place(c, source, slots, pool, W):
    """Moves activations that follow each other to their slots (negative: discarded)."""
    for i, slot in enumerate(slots):
        if i + EARLY_ROWS < len(slots):
            prefetch(pool + max(0, slots[i + EARLY_ROWS]) * W)
        if slot >= 0:
            _move(c, pool + slot * W, source + i * W, W)


@jit
def announce(c, file_G2, run_G2, start_n, W):
    """Asks the kernel to read, in the background, the blocks whose first byte is not in memory.

    Args as in `read`; W: bytes of an activation. Returns whether there was one.
    """
    span_G2 = _spans(run_G2, start_n, W)
    byte = np.empty(1, np.uint8)
    target_2 = np.empty(2, np.int64)
    target_2[0] = byte.ctypes.data
    is_cold = False
    for g in range(len(span_G2)):
        if not _is_in_memory(c, file_G2[g, 0], span_G2[g, 0], 1, target_2):
            _hint(c, file_G2[g : g + 1], span_G2[g : g + 1])
            is_cold = True
    return is_cold


@jit
def read(c, file_G2, run_G2, first_G, slot_n, start_n, staging_n, pool_PW, is_hinted, is_read_G):
    """Reads blocks, compares them with their checksums, and moves their activations to their slots.

    From the first block on that is not in memory, the kernel is asked for all, unless `announce` did so
    (is_hinted). Returns whether it was asked. A block that cannot be read, differs, or is too long for
    `staging_n` is left out: is_read_G is then false.

    Args:
        c: C.
        file_G2: file descriptor; address of the shard's checksums (0: there are too few).
        run_G2: offset in the file; number of activations.
        first_G: the block's first entry in slot_n.
        slot_n: slot of each activation; negative: discarded.
        start_n: first bytes of the pieces of an image and layer, and their end.
        staging_n: memory for the pieces that hold a block.
    """
    if not (c[0] and c[2] and c[3]):
        return is_hinted
    W = pool_PW.shape[1]
    pool, staging = pool_PW.ctypes.data, staging_n.ctypes.data
    span_G2 = _spans(run_G2, start_n, W)
    target_2 = np.empty(2, np.int64)  # np.array would make floats of an address and a number
    target_2[0] = staging
    for g in range(len(run_G2)):
        fd, start, length = file_G2[g, 0], span_G2[g, 0], span_G2[g, 1] - span_G2[g, 0]
        if file_G2[g, 1] == 0 or length > len(staging_n):
            continue
        is_filled = not is_hinted and _is_in_memory(c, fd, start, length, target_2)
        if not is_filled:
            if not is_hinted:
                _hint(c, file_G2[g:], span_G2[g:])
                is_hinted = True
            is_filled = _is_filled(c, fd, start, length, staging)
        is_read_G[g] = is_filled and _is_intact(c, start_n, start, length, staging, file_G2[g, 1])
        if is_read_G[g]:
            slots = slot_n[first_G[g] : first_G[g] + run_G2[g, 1]]
            _place(c, staging + run_G2[g, 0] - start, slots, pool, W)
    stores_done()
    return is_hinted


# ---- files to pool, past the page cache ----


@jit
def submit(aio, context, file_G2, run_G2, start_n, W, staging_GR, request_G8, where_G):
    """Asks the kernel to read blocks in the background. Returns the number of its answers to wait for.

    Blocks without checksums, or too long for a row, are left out. Other args as in `read` and `announce`.

    Args:
        aio: AIO.
        context: of io_setup.
        file_G2: of files that are open with O_DIRECT.
        staging_GR: memory for the pages that hold each block.
        request_G8: memory for the kernel's `struct iocb`.
        where_G: their addresses.
    """
    span_G2 = _spans(run_G2, start_n, W)
    n = 0
    for g in range(len(span_G2)):
        start = span_G2[g, 0] // PAGE * PAGE
        length = (span_G2[g, 1] - start + PAGE - 1) // PAGE * PAGE
        if file_G2[g, 1] and length <= staging_GR.shape[1]:
            request_G8[n, 0] = g
            request_G8[n, 2] = file_G2[g, 0] << 32  # beside the number of "read", which is 0
            request_G8[n, 3] = staging_GR[g].ctypes.data
            request_G8[n, 4] = length
            request_G8[n, 5] = start
            n += 1
    n_sent = 0
    while n_sent < n:
        got = call(aio[0], (aio[4], context, n - n_sent, where_G[n_sent:].ctypes.data))
        if got <= 0:
            break
        n_sent += got
    return n_sent


@jit
def receive(
    c, aio, context, n, file_G2, run_G2, first_G, slot_n, start_n, pool_PW, is_read_G, staging_GR, answer_G4
):
    """Waits for blocks that were asked for, and does the rest of `read`, in the order in which they come.

    Returns the number of answers that are missing, because the wait was interrupted. Other args as there.

    Args:
        n: the answers to wait for.
        answer_G4: memory for the kernel's `struct io_event`.
    """
    W, pool = pool_PW.shape[1], pool_PW.ctypes.data
    span_G2 = _spans(run_G2, start_n, W)
    while n:
        got = call(aio[0], (aio[3], context, 1, n, answer_G4.ctypes.data, 0))
        if got <= 0:
            break
        n -= got
        for a in range(got):
            g = answer_G4[a, 0]
            start, length = span_G2[g, 0], span_G2[g, 1] - span_G2[g, 0]
            before = start % PAGE
            data = staging_GR[g].ctypes.data + before
            n_read = answer_G4[a, 2]  # less than 0: an error
            if c[2] and c[3] and n_read >= before + length:
                is_read_G[g] = _is_intact(c, start_n, start, length, data, file_G2[g, 1])
            if is_read_G[g]:
                slots = slot_n[first_G[g] : first_G[g] + run_G2[g, 1]]
                _place(c, data + run_G2[g, 0] - start, slots, pool, W)
    stores_done()
    return n


# ---- pool to batch ----


SAME, BFLOAT16, FLOAT16 = range(3)
"""How `take` converts: not at all, or from one of these to float32."""
CONVERTED = {"bfloat16": BFLOAT16, "float16": FLOAT16}
_LARGEST = np.float32(activations.LARGEST).view(np.uint32)
LARGEST = {
    "float32": _LARGEST,
    "bfloat16": np.uint16(_LARGEST >> np.uint32(16)),
    "float16": np.finfo(np.float16).max.view(np.uint16),
}
"""Bits of the largest accepted activation."""


@jit
def _float16(bits):
    """float32's bits. float16 has 5 bits of exponent (bias 15) and 10 of mantissa, float32 8 (127) and 23."""
    size = np.uint32(bits & np.uint32(0x7FFF))
    wide = np.uint32(size * np.uint32(1 << 13) + np.uint32((127 - 15) << 23))
    tiny = np.float32(np.int32(size)) * np.float32(2.0**-24)  # zero and what has no implicit one
    wide = wide if size >= np.uint32(1 << 10) else np.float32(tiny).view(np.uint32)
    wide = wide | np.uint32(0xFF << 23) if size >= np.uint32(0x1F << 10) else wide
    return wide | np.uint32(bits & np.uint32(0x8000)) * np.uint32(1 << 16)


@jit
def _places(index_n, n_per_img, n_tokens, first_patch, image_is_N, layer_L, image_i_n, patch_i_n, layer_n):
    """Fills in image, patch and layer of each of the stream's activations."""
    for i in range(len(index_n)):
        position = index_n[i] // n_per_img
        x = index_n[i] - position * n_per_img
        layer_i = x // n_tokens
        image_i_n[i] = image_is_N[position]
        patch_i_n[i] = x - layer_i * n_tokens + first_patch
        layer_n[i] = layer_L[layer_i]


@jit
def take(kind, pool_PD, slot_n, largest, out_nD):
    """Copies activations, which are unsigned integers. Returns whether all are finite and not too large.

    largest: of the magnitudes, which are a value's bits without the sign. As integers they are ordered as the
    values are; infinity and NaN come last.
    """
    D = pool_PD.shape[1]
    pool, row_bytes = pool_PD.ctypes.data, pool_PD.strides[0]
    stored = pool_PD.dtype.type  # sums of this type: with a wider one, a vector holds fewer values
    sign = stored(1 << (8 * pool_PD.itemsize - 1))
    too_large = stored(0)  # the highest bit: of a difference below zero
    early = max(1, EARLY_BYTES // row_bytes)
    for i in range(len(slot_n)):
        if i + early < len(slot_n):
            _prefetch(pool + slot_n[i + early] * row_bytes, row_bytes)
        row_D = pool_PD[slot_n[i]]
        if kind == SAME:
            for d in range(D):
                out_nD[i, d] = row_D[d]
                too_large = stored(too_large | stored(largest - stored(row_D[d] & stored(~sign))))
        elif kind == BFLOAT16:  # the upper half of a float32
            for d in range(D):
                out_nD[i, d] = np.uint32(row_D[d]) * np.uint32(1 << 16)
                too_large = stored(too_large | stored(largest - stored(row_D[d] & stored(~sign))))
        else:
            for d in range(D):
                out_nD[i, d] = _float16(np.uint32(row_D[d]))
                too_large = stored(too_large | stored(largest - stored(row_D[d] & stored(~sign))))
    return too_large < sign


@jit
def fill(
    kind, pool_PD, part_n2, largest, out_nD, n_per_img, n_tokens, first_patch, image_is_N, layer_L, place_3n
):
    """Copies activations, and fills in where they come from: one call, because each waits for Python's lock.

    Other args, and what is returned, as in `take`.

    Args:
        part_n2: stream index and slot.
        place_3n: image, patch and layer.
    """
    sizes = (n_per_img, n_tokens, first_patch)
    _places(part_n2[:, 0], *sizes, image_is_N, layer_L, place_3n[0], place_3n[1], place_3n[2])
    return take(kind, pool_PD, part_n2[:, 1], largest, out_nD)
