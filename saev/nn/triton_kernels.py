"""Triton kernels for the GPU: the two products with sparse codes that a sparse training step needs.

Sums are in float32 for tables of any dtype. There are no atomics: one program computes each output number and
adds in a fixed order, so equal inputs give equal bits. The cost: for a latent that fires on every sample, one
program per block of dimensions runs one long loop, beside the programs of all other latents. Splitting that
loop would need atomics, whose order varies, or a second pass over partial sums.

A program loads ROWS rows at a time, in blocks of neighbouring dimensions. It keeps ROWS partial sums and adds
them once after the loop, because a sum inside the loop would make its threads wait for each other.

Indices are not checked, because that would wait for the GPU: an index outside its table reads other memory.

Shape letters: O rows of codes (segments), R table rows, D d_vit, n codes.
"""

import functools
import importlib.util
import inspect
import typing as tp

import beartype
import torch
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

ROWS = 8
"""Table rows that a program loads at once."""
OPTIONS = {"enable_fp_fusion": True}
"""Multiply and add with one rounding. Triton 3.9 warns if it is not set: the default will change."""
IS_INSTALLED = importlib.util.find_spec("triton") is not None


def available(table_RD: Tensor) -> bool:
    """Can the kernels be used for this table? Not for float64, which they would round to float32."""
    return table_RD.is_cuda and table_RD.dtype != torch.float64 and IS_INSTALLED


@functools.cache
def _kernels() -> tuple[tp.Any, tp.Any]:
    """Compiles on first use, so that this module can be imported without Triton.

    Row and output offsets are int64, because a table may have more than 2^31 numbers.
    """
    import triton
    import triton.language as tl

    def jit(function):
        """Unwraps first: Triton cannot compile the wrappers of a test's import hook."""
        return triton.jit(inspect.unwrap(function))

    @jit
    def bag_kernel(table, index, weight, start, out, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        o = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        first = tl.load(start + o)
        last = tl.load(start + o + 1)
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for at in range(first, last, ROWS):
            j = at + tl.arange(0, ROWS)
            row = tl.load(index + j, mask=j < last, other=0).to(tl.int64)
            factor = tl.load(weight + j, mask=j < last, other=0.0).to(tl.float32)
            mask = (j < last)[:, None] & (d < D)[None, :]
            values = tl.load(table + row[:, None] * D + d[None, :], mask=mask, other=0.0)
            total += values.to(tl.float32) * factor[:, None]
        tl.store(out + o * D + d, tl.sum(total, axis=0), mask=d < D)

    @jit
    def bag_dot_kernel(a, table, index, start, out, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        o = tl.program_id(0).to(tl.int64)
        first = tl.load(start + o)
        last = tl.load(start + o + 1)
        for at in range(first, last, ROWS):
            j = at + tl.arange(0, ROWS)
            row = tl.load(index + j, mask=j < last, other=0).to(tl.int64)
            total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for begin in range(0, D, BLOCK):
                d = begin + tl.arange(0, BLOCK)
                left = tl.load(a + o * D + d, mask=d < D, other=0.0).to(tl.float32)
                mask = (j < last)[:, None] & (d < D)[None, :]
                right = tl.load(table + row[:, None] * D + d[None, :], mask=mask, other=0.0)
                total += right.to(tl.float32) * left[None, :]
            tl.store(out + j, tl.sum(total, axis=1), mask=j < last)

    return bag_kernel, bag_dot_kernel


def _block(D: int) -> int:
    """Dimensions that a program handles at once: a power of two from 16 to 256."""
    return min(256, 1 << max(4, (D - 1).bit_length()))


@jaxtyped(typechecker=beartype.beartype)
def bag(
    table_RD: Float[Tensor, "R D"],
    index_n: Int[Tensor, " n"],
    weight_n: Float[Tensor, " n"],
    start_O1: Int[Tensor, " O1"],
    *,
    out_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "O D"]:
    """out[o] = sum over j in start[o] .. start[o + 1] of weight[j] table[index[j]]. An empty sum is 0.

    This is the sparse decoder (o is a sample, the table is W_dec), and the sparse gradient of a weight matrix
    (o is a latent, codes are sorted by latent, the table is a batch). A program computes one o and one block
    of dimensions.
    """
    O, D = len(start_O1) - 1, table_RD.shape[1]  # noqa: E741
    out_OD = torch.empty(O, D, dtype=out_dtype, device=table_RD.device)
    if out_OD.numel():
        block = _block(D)
        ins = [t.contiguous() for t in (table_RD, index_n, weight_n, start_O1)]
        # Triton launches on the current GPU, which may be another than the table's.
        with torch.cuda.device_of(table_RD):
            _kernels()[0][(O, -(-D // block))](*ins, out_OD, D, ROWS=ROWS, BLOCK=block, **OPTIONS)
    return out_OD


@jaxtyped(typechecker=beartype.beartype)
def bag_dot(
    a_OD: Float[Tensor, "O D"],
    table_RD: Float[Tensor, "R D"],
    index_n: Int[Tensor, " n"],
    start_O1: Int[Tensor, " O+1"],
    *,
    out_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " n"]:
    """out[j] = <a[o], table[index[j]]> for j in start[o] .. start[o + 1]: the gradient of the codes.

    Codes outside all segments get 0. A program computes all products of one o.
    """
    O, D = a_OD.shape  # noqa: E741
    out_n = torch.zeros(len(index_n), dtype=out_dtype, device=table_RD.device)
    if O and len(index_n):
        ins = [t.contiguous() for t in (a_OD, table_RD, index_n, start_O1)]
        with torch.cuda.device_of(table_RD):
            _kernels()[1][(O,)](*ins, out_n, D, ROWS=ROWS, BLOCK=_block(D), **OPTIONS)
    return out_n
