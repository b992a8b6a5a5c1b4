"""What a sparse autoencoder is trained to minimise. B batch, D d_vit, S latents."""

import typing as tp

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev.nn import config
from saev.nn.sae import SparseAutoencoder


class Output(tp.NamedTuple):
    """One training step's results."""

    loss: Float[Tensor, ""]
    x_hat_BD: Float[Tensor, "B D"]
    f_BS: Float[Tensor, "B S"]


@jaxtyped(typechecker=beartype.beartype)
def vanilla(sae: SparseAutoencoder, x_BD: Float[Tensor, "B D"]) -> Output:
    """Mean squared error in scaled units (so that one learning rate suits every layer), plus ReLU's L1 penalty.

    L1 is the sum over latents of f times the decoder row's norm, averaged over the batch.
    """
    x_hat_BD, f_BS = sae(x_BD)
    loss = (x_hat_BD - x_BD).mul(sae.scale).square().mean()
    if isinstance(sae.cfg, config.Relu):
        loss = (
            loss
            + sae.cfg.sparsity_coeff * (f_BS @ torch.linalg.vector_norm(sae.W_dec, dim=1)).mean()
        )
    return Output(loss, x_hat_BD, f_BS)
