"""Latents of a sparse autoencoder as prototypes. B activations, D d_vit, K prototypes."""

import dataclasses

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev import nn


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class SaeLatents:
    """The first `n_prototypes` latents' codes, in evaluation mode (thresholds respected)."""

    sae: nn.SparseAutoencoder
    n_prototypes: int

    @jaxtyped(typechecker=beartype.beartype)
    def __call__(self, activations: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        return self.sae.encode(activations)[:, : self.n_prototypes]

    def prefix(self, k: int) -> "SaeLatents":
        return dataclasses.replace(self, n_prototypes=min(k, self.n_prototypes))

    def to(self, device: torch.device) -> "SaeLatents":
        return dataclasses.replace(self, sae=self.sae.to(device))
