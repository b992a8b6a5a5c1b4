"""Pre-activations -> codes. B batch, S latents."""

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor


@jaxtyped(typechecker=beartype.beartype)
def top_k(pre_BS: Float[Tensor, "B S"], k: int) -> Float[Tensor, "B S"]:
    """The k largest values of each row, negatives set to 0; the rest 0. All are kept when k >= S."""
    values_BK, index_BK = pre_BS.topk(min(k, pre_BS.shape[1]), dim=1, sorted=False)
    return torch.zeros_like(pre_BS).scatter(1, index_BK, values_BK.relu())


@jaxtyped(typechecker=beartype.beartype)
def batch_top_k(pre_BS: Float[Tensor, "B S"], k: int) -> Float[Tensor, "B S"]:
    """The k x B largest values of the whole batch, negatives set to 0; the rest 0.

    Values equal to the smallest kept one are all kept.
    """
    n_batch, n_latents = pre_BS.shape
    n_drop = pre_BS.numel() - min(k, n_latents) * n_batch
    # kthvalue selects without sorting: much cheaper than topk over the flat batch.
    least = pre_BS.detach().flatten().kthvalue(n_drop + 1).values
    return torch.where(pre_BS >= least, pre_BS, 0.0).relu()


@jaxtyped(typechecker=beartype.beartype)
def above(pre_BS: Float[Tensor, "B S"], threshold: Float[Tensor, ""]) -> Float[Tensor, "B S"]:
    """Values above the threshold; the rest 0."""
    return torch.where(pre_BS > threshold, pre_BS, 0.0)
