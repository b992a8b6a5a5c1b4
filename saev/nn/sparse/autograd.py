"""Differentiable encoding and decoding through sparse codes.

Shape letters: B batch, D d_vit, S latents, O rows of codes, P prefixes, n codes.

A step reads only the rows of W_dec whose latents fire. Its gradient needs <g, W_dec[s]> only where latent s
fires, and the gradients of both weight matrices are sums over the samples in which a latent fires. So nothing
here costs B x S except the encoder's product. Results equal those of dense autograd.

On a GPU, `is_bfloat16` rounds the tables whose rows codes select to bfloat16: W_dec, and for the gradients of
the matrices the batch and its error. Reading them is most of the cost. Factors, sums and results are float32.
"""

import functools
import typing as tp

import beartype
import torch
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

from saev import compiled, devices
from saev.nn import kernels
from saev.nn.sparse.codes import Index, bag, bag_dot, latent_bags
from saev.nn.sparse.search import Encoder, dense


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: tp.Any, value_n: Tensor, W_dec: Tensor, index: Index, is_bfloat16: bool) -> Tensor:
        table_SD = _table(W_dec, is_bfloat16)
        ctx.save_for_backward(value_n, table_SD)
        ctx.index, ctx.is_bfloat16 = index, is_bfloat16
        return bag(table_SD, index.latent_n, value_n, index.start_O1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]  # torch passes one gradient per output
    def backward(ctx: tp.Any, g_OD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        value_n, table_SD = ctx.saved_tensors
        g_OD = g_OD.contiguous()
        g_n = bag_dot(g_OD, table_SD, ctx.index)
        return g_n, latent_bags(_table(g_OD, ctx.is_bfloat16), value_n, ctx.index), None, None


@jaxtyped(typechecker=beartype.beartype)
def decode(
    value_n: Float[Tensor, " n"], W_dec: Float[Tensor, "S D"], index: Index, is_bfloat16: bool = False
) -> Float[Tensor, "O D"]:
    """f W_dec. Differentiable in the codes and W_dec."""
    return _Decode.apply(value_n, W_dec, index, is_bfloat16)


def _table(rows_RD: Tensor, is_bfloat16: bool) -> Tensor:
    return rows_RD.bfloat16() if is_bfloat16 else rows_RD


class _Reconstruct(torch.autograd.Function):
    """On a CPU: does all work on the rows of W_dec that a sample fires while they are in the cache."""

    @staticmethod
    def forward(
        ctx: tp.Any, value_n: Tensor, W_dec: Tensor, b_dec: Tensor, x_BD: Tensor, index: Index, end_P: Tensor
    ) -> tuple[Tensor, Tensor]:
        (B, D), P = x_BD.shape, len(end_P)
        x_hat_BD, error_B = torch.empty_like(x_BD), x_BD.new_empty(B)
        g_BPD, g_n = x_BD.new_empty(B, P, D), torch.empty_like(value_n)
        inputs = (x_BD, value_n, index.latent_n, index.start_O1, W_dec.contiguous(), b_dec, end_P)
        arrays = [t.detach().numpy() for t in (*inputs, x_hat_BD, error_B, g_BPD, g_n)]
        compiled.in_threads(functools.partial(kernels.reconstruct, *arrays), B)
        ctx.save_for_backward(value_n, g_BPD, g_n, end_P)
        ctx.index = index
        ctx.mark_non_differentiable(x_hat_BD)
        return error_B.sum() / g_BPD.numel(), x_hat_BD

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]  # torch passes one gradient per output
    def backward(ctx: tp.Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        value_n, g_BPD, g_n, end_P = ctx.saved_tensors
        factor = g * 2 / g_BPD.numel()
        order_n, row_n, start_S1 = ctx.index.by_latent
        if len(end_P) > 1:  # use the rows of g of the latent's block
            latents_S = torch.arange(ctx.index.n_latents)
            block_S = torch.searchsorted(end_P, latents_S, right=True).int()
            row_n = row_n * len(end_P) + block_S.repeat_interleave(start_S1.diff())
        grad_SD = bag(g_BPD.flatten(0, 1), row_n, (value_n * factor)[order_n], start_S1)
        return g_n * factor, grad_SD, g_BPD[:, 0].sum(dim=0) * factor, None, None, None


@jaxtyped(typechecker=beartype.beartype)
def reconstruct(
    value_n: Float[Tensor, " n"],
    W_dec: Float[Tensor, "S D"],
    b_dec: Float[Tensor, " D"],
    x_BD: Float[Tensor, "B D"],
    index: Index,
    end_P: Int[Tensor, " P"],
    is_bfloat16: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, "B D"]]:
    """Reconstructs x by each prefix of the dictionary; prefix p holds the latents below end[p] (on the CPU).

    Returns:
        The mean squared error over samples, prefixes and dimensions, differentiable in the codes, W_dec and
        b_dec; and the reconstructions by the last prefix, without gradient.
    """
    if not kernels.available(x_BD):
        B, P = len(x_BD), len(end_P)
        parts = index.split(devices.send(end_P, x_BD.device)) if P > 1 else index
        x_hat_BPD = decode(value_n, W_dec, parts, is_bfloat16).unflatten(0, (B, P)).cumsum(dim=1) + b_dec
        return (x_hat_BPD - x_BD[:, None]).square().mean(), x_hat_BPD[:, -1].detach()
    return _Reconstruct.apply(value_n, W_dec, b_dec, x_BD, index, end_P)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: tp.Any, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, xc_BD: Tensor, index: Index, value_n: Tensor
    ) -> Tensor:
        ctx.save_for_backward(W_enc, xc_BD)
        ctx.index = index
        return value_n.view_as(value_n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]  # torch passes one gradient per output
    def backward(ctx: tp.Any, g_n: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        W_enc, xc_BD = ctx.saved_tensors
        grad_SD = latent_bags(xc_BD, g_n, ctx.index)
        order_n, _, start_S1 = ctx.index.by_latent
        grad_S = torch.segment_reduce(g_n[order_n], "sum", offsets=start_S1.long(), initial=0)
        return grad_SD.T, grad_S, -(W_enc @ grad_S), None, None, None


@jaxtyped(typechecker=beartype.beartype)
def encode_at(
    W_enc: Float[Tensor, "D S"],
    b_enc: Float[Tensor, " S"],
    b_dec: Float[Tensor, " D"],
    x_BD: Float[Tensor, "B D"],
    index: Index,
    value_n: Float[Tensor, " n"],
    is_bfloat16: bool = False,
) -> Float[Tensor, " n"]:
    """Makes value_n, which is (x - b_dec) W_enc + b_enc at the index, differentiable in the parameters."""
    xc_BD = _table(x_BD - b_dec.detach(), is_bfloat16 and not kernels.available(x_BD))
    return _Encode.apply(W_enc, b_enc, b_dec, xc_BD, index, value_n)


class _Linear(torch.autograd.Function):
    """The gradient of W_enc has the memory layout of its transpose. x has none."""

    @staticmethod
    def forward(
        ctx: tp.Any, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, x_BD: Tensor, is_bfloat16: bool
    ) -> Tensor:
        xc_BD = x_BD - b_dec
        ctx.save_for_backward(W_enc, xc_BD)
        return dense(Encoder(W_enc.T, b_enc, is_bfloat16), xc_BD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]  # torch passes one gradient per output
    def backward(ctx: tp.Any, g_BS: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        W_enc, xc_BD = ctx.saved_tensors
        grad_S = g_BS.sum(dim=0)
        return (g_BS.T @ xc_BD).T, grad_S, -(W_enc @ grad_S), None, None


@jaxtyped(typechecker=beartype.beartype)
def pre_activations(
    W_enc: Float[Tensor, "D S"],
    b_enc: Float[Tensor, " S"],
    b_dec: Float[Tensor, " D"],
    x_BD: Float[Tensor, "B D"],
    is_bfloat16: bool = False,
) -> Float[Tensor, "B S"]:
    """(x - b_dec) W_enc + b_enc, multiplied in bfloat16 if asked. Differentiable in the parameters, not x."""
    return _Linear.apply(W_enc, b_enc, b_dec, x_BD, is_bfloat16)
