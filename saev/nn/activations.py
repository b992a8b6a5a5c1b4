"""Pre-activations -> codes. B batch, S latents."""

import typing as tp

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor


@jaxtyped(typechecker=beartype.beartype)
def top_k(pre_BS: Float[Tensor, "B S"], k: int, keep_negative: bool = False) -> Float[Tensor, "B S"]:
    """Sets all but each row's k largest values to 0 (none if k >= S), and by default negative ones too."""
    values_BK, index_BK = pre_BS.topk(min(k, pre_BS.shape[1]), dim=1, sorted=False)
    values_BK = values_BK if keep_negative else values_BK.relu()
    return torch.zeros_like(pre_BS).scatter(1, index_BK, values_BK)


@jaxtyped(typechecker=beartype.beartype)
def batch_top_k(pre_BS: Float[Tensor, "B S"], k: int) -> Float[Tensor, "B S"]:
    """Keeps the k x B largest values of the whole batch if they are positive, and sets the rest to 0.

    Ties with the smallest of them are all kept.
    """
    if pre_BS.numel() == 0:
        return pre_BS
    n_batch, n_latents = pre_BS.shape
    n_drop = pre_BS.numel() - min(k, n_latents) * n_batch
    # kthvalue selects without sorting, which is much cheaper than topk over the flat batch.
    smallest = pre_BS.detach().flatten().kthvalue(n_drop + 1).values
    return torch.where(pre_BS >= smallest, pre_BS, 0.0).relu()


@jaxtyped(typechecker=beartype.beartype)
def above(pre_BS: Float[Tensor, "B S"], threshold: Float[Tensor, ""]) -> Float[Tensor, "B S"]:
    """Keeps values above the threshold and sets the rest to 0."""
    return torch.where(pre_BS > threshold, pre_BS, 0.0)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: tp.Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    # pyrefly: ignore[bad-override]  # torch passes one gradient per output
    def backward(ctx: tp.Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        g_threshold = torch.where(near, g * (-threshold / ctx.width), 0.0)
        return torch.where(pre > threshold, g, 0.0), g_threshold.sum_to_size(threshold.shape), None


class _Fires(torch.autograd.Function):
    @staticmethod
    def forward(ctx: tp.Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    # pyrefly: ignore[bad-override]  # torch passes one gradient per output
    def backward(ctx: tp.Any, g: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        return None, torch.where(near, g / -ctx.width, 0.0).sum_to_size(threshold.shape), None


@jaxtyped(typechecker=beartype.beartype)
def jump(pre: Float[Tensor, "*B S"], threshold: Float[Tensor, "#S"], width: float) -> Float[Tensor, "*B S"]:
    """Keeps values above their thresholds and sets the rest to 0.

    Values within half a width of a threshold give it a gradient (rectangle kernel; Rajamanoharan et al. 2024,
    arXiv 2407.14435, eq. 11).
    """
    return _Jump.apply(pre, threshold, width)


@jaxtyped(typechecker=beartype.beartype)
def fires(pre: Float[Tensor, "*B S"], threshold: Float[Tensor, "#S"], width: float) -> Float[Tensor, "*B S"]:
    """1 above the threshold, else 0; the sum is L0. Only the threshold gets a gradient (ibid., eq. 12)."""
    return _Fires.apply(pre, threshold, width)
