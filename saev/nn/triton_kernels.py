"""Triton kernels for the GPU: the two products with sparse codes that every sparse step is made of.

Float32 accumulation whatever the tables' dtype, and no atomics: each output is summed by one program in a fixed
order, so the same inputs give the same bits. A latent that fires on every sample is one long sum; its programs (one
for each block of dimensions) take longer than the others, which run beside them.

Shape letters: O rows of codes, R table rows, D d_vit, n codes.
"""

import functools
import importlib.util
import typing as tp

import beartype
import torch
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

ROWS = 8
"""Table rows that a program loads at a time."""


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def available(table_RD: Tensor) -> bool:
    """Do the kernels run where this tensor is?"""
    return table_RD.is_cuda and table_RD.dtype != torch.float64 and _is_installed()


@functools.cache
def _kernels() -> tuple[tp.Any, tp.Any]:
    """Compiled on first use: this module can be imported without Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def bag_kernel(table, index, weight, start, out, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        o = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        first = tl.load(start + o)
        last = tl.load(start + o + 1)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for at in range(first, last, ROWS):
            j = at + tl.arange(0, ROWS)
            row = tl.load(index + j, mask=j < last, other=0).to(tl.int64)
            factor = tl.load(weight + j, mask=j < last, other=0.0).to(tl.float32)
            mask = (j < last)[:, None] & (d < D)[None, :]
            values = tl.load(table + row[:, None] * D + d[None, :], mask=mask, other=0.0)
            total += tl.sum(values.to(tl.float32) * factor[:, None], axis=0)
        tl.store(out + o * D + d, total, mask=d < D)

    @triton.jit
    def bag_dot_kernel(a, table, index, start, out, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        o = tl.program_id(0).to(tl.int64)
        first = tl.load(start + o)
        last = tl.load(start + o + 1)
        for at in range(first, last, ROWS):
            j = at + tl.arange(0, ROWS)
            row = tl.load(index + j, mask=j < last, other=0).to(tl.int64)
            total = tl.zeros((ROWS,), dtype=tl.float32)
            for begin in range(0, D, BLOCK):
                d = begin + tl.arange(0, BLOCK)
                left = tl.load(a + o * D + d, mask=d < D, other=0.0).to(tl.float32)
                mask = (j < last)[:, None] & (d < D)[None, :]
                right = tl.load(table + row[:, None] * D + d[None, :], mask=mask, other=0.0)
                total += tl.sum(right.to(tl.float32) * left[None, :], axis=1)
            tl.store(out + j, total, mask=j < last)

    return bag_kernel, bag_dot_kernel


def _block(D: int) -> int:
    """Dimensions that a program handles: a power of two, at most 256."""
    return min(256, 1 << max(4, (D - 1).bit_length()))


@jaxtyped(typechecker=beartype.beartype)
def bag(
    table_RD: Float[Tensor, "R D"],
    index_n: Int[Tensor, " n"],
    weight_n: Float[Tensor, " n"],
    start_O1: Int[Tensor, " O1"],
) -> Float[Tensor, "O D"]:
    """out[o] = sum over j in start[o] .. start[o + 1] of weight[j] table[index[j]], in float32. An empty sum is 0."""
    O, D = len(start_O1) - 1, table_RD.shape[1]  # noqa: E741
    out_OD = torch.empty(O, D, dtype=torch.float32, device=table_RD.device)
    if O:
        block = _block(D)
        kernel = _kernels()[0]
        table_RD, weight_n = table_RD.contiguous(), weight_n.contiguous()
        kernel[(O, -(-D // block))](
            table_RD, index_n, weight_n, start_O1, out_OD, D, ROWS=ROWS, BLOCK=block
        )
    return out_OD


@jaxtyped(typechecker=beartype.beartype)
def bag_dot(
    a_OD: Float[Tensor, "O D"],
    table_RD: Float[Tensor, "R D"],
    index_n: Int[Tensor, " n"],
    start_O1: Int[Tensor, " O1"],
) -> Float[Tensor, " n"]:
    """out[j] = <a[o], table[index[j]]> for j in start[o] .. start[o + 1], in float32."""
    O, D = a_OD.shape  # noqa: E741
    out_n = torch.empty(len(index_n), dtype=torch.float32, device=table_RD.device)
    if len(index_n):
        kernel = _kernels()[1]
        a_OD, table_RD = a_OD.contiguous(), table_RD.contiguous()
        kernel[(O,)](a_OD, table_RD, index_n, start_O1, out_n, D, ROWS=ROWS, BLOCK=_block(D))
    return out_n
