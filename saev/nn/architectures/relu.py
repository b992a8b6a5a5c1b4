"""ReLU with an L1 penalty. B batch, D d_vit, S latents, n sparse codes."""

import typing as tp

import torch
from torch import Tensor

from saev.nn import config, sparse
from saev.nn.architectures import base

CHUNK_BYTES = 8 * 2**20
"""Size of the codes that `_DenseStep` computes at a time."""


class _DenseStep(torch.autograd.Function):
    """Loss and gradients while many latents fire, in little more than five dense products.

    It handles some samples at a time, so that everything between the products stays in a CPU's cache, and
    computes the gradients in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: tp.Any,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        x_BD: Tensor,
        l1_coeff: float,
        f_BS: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, D = x_BD.shape
        W_SD, norm_S = W_enc.T, W_dec.norm(dim=1)
        grad_enc_SD, grad_dec_SD = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
        grad_b_S, f_sum_S = torch.zeros_like(b_enc), torch.zeros_like(b_enc)
        error, x_hat_BD, g_sum_D = x_BD.new_zeros(()), torch.empty_like(x_BD), x_BD.new_zeros(D)
        size = max(16, CHUNK_BYTES // (4 * len(W_dec)))
        df_buffer_CS = x_BD.new_empty(min(size, B), len(W_dec))
        for start in range(0, B, size):
            part = slice(start, min(start + size, B))
            xc_CD, f_CS = x_BD[part] - b_dec, f_BS[part]
            df_CS = df_buffer_CS[: len(xc_CD)]
            torch.addmm(b_enc, xc_CD, W_SD.T, out=f_CS).relu_()
            torch.addmm(b_dec, f_CS, W_dec, out=x_hat_BD[part])
            error_CD = x_hat_BD[part] - x_BD[part]
            error += error_CD.square().sum()
            g_CD = error_CD.mul_(2 / (B * D))
            torch.addmm(norm_S * (l1_coeff / B), g_CD, W_dec.T, out=df_CS)
            torch.ops.aten.threshold_backward.grad_input(df_CS, f_CS, 0, grad_input=df_CS)
            grad_dec_SD.addmm_(f_CS.T, g_CD)
            grad_enc_SD.addmm_(df_CS.T, xc_CD)
            grad_b_S += df_CS.sum(dim=0)
            f_sum_S += f_CS.sum(dim=0)
            g_sum_D += g_CD.sum(dim=0)
        grad_dec_SD += (l1_coeff / B) * (f_sum_S / norm_S.clamp(min=1e-12))[:, None] * W_dec
        grad_b_dec_D = g_sum_D - W_enc @ grad_b_S
        ctx.save_for_backward(grad_enc_SD.T, grad_b_S, grad_dec_SD, grad_b_dec_D)
        error, l1 = error / (B * D), f_sum_S @ norm_S / B
        ctx.mark_non_differentiable(error, x_hat_BD)
        return error + l1_coeff * l1, error, x_hat_BD

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]  # torch passes one gradient per output
    def backward(ctx: tp.Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        if g != 1:
            grads = tuple(grad * g for grad in grads)
        return *grads, None, None, None


class Relu(base.Architecture, cfg=config.Relu):
    dense_step = staticmethod(_DenseStep.apply)

    def encode(self, sae, pre_BS: Tensor) -> Tensor:
        return pre_BS.relu()

    def encode_dense(self, sae, pre_BS: Tensor) -> base.Coded:
        f_BS = pre_BS.relu_()
        return base.Coded(f_BS, (f_BS @ torch.linalg.vector_norm(sae.W_dec, dim=1)).mean())

    def encode_sparse(self, sae, pre_n: Tensor, index: sparse.Index) -> base.Coded:
        norm_S = torch.linalg.vector_norm(sae.W_dec, dim=1)
        return base.Coded(pre_n, (pre_n * norm_S.index_select(0, index.latent_n)).sum() / index.n_rows)

    def cutoff(self, sae) -> Tensor:
        return torch.zeros_like(sae.b_enc)

    def fires_above(self, sae) -> Tensor:
        return torch.zeros_like(sae.b_enc)

    def largest(self, sae, pre_BK: Tensor) -> Tensor:
        return pre_BK.relu()
