"""A loss and its gradients, computed for one part of a batch after another. B batch.

Only one part's intermediate results are in memory at a time. Gradients are sums over the parts, so they equal
those of the whole batch up to the rounding of another order of addition.
"""

import collections.abc
import typing as tp

import torch
from torch import Tensor

LossOf = collections.abc.Callable[..., Tensor]
"""(rows, *tensors) -> the part's share of the loss, differentiable in the tensors."""


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: tp.Any, loss_of: LossOf, parts: list[slice], *tensors: Tensor) -> Tensor:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        total = tensors[0].new_zeros(())
        for rows in parts:
            with torch.enable_grad():
                loss = loss_of(rows, *leaves)
            loss.backward()  # adds to the leaves' gradients, and frees what this part needed
            total += loss.detach()
        ctx.grads = [leaf.grad for leaf in leaves]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore[bad-override]  # torch passes one gradient per output
    def backward(ctx: tp.Any, g: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return None, None, *(None if grad is None else grad.mul_(g) for grad in grads)


def summed(loss_of: LossOf, parts: list[slice], *tensors: Tensor) -> Tensor:
    """The sum of the parts' losses, differentiable in the tensors (once).

    Gradients are computed at once, whether or not `backward` is called.
    """
    return _Summed.apply(loss_of, parts, *tensors)


def slices(n: int, size: int) -> list[slice]:
    """Rows 0 to n, divided into parts of this size. The last one may be smaller."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
