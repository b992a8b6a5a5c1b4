"""The `Scorer` interface and its one implementation by vectors. B activations, D d_vit, K prototypes."""

import dataclasses
import typing as tp

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev.scorers import config


@tp.runtime_checkable
class Scorer(tp.Protocol):
    """K prototypes: maps activations (B, D) to scores (B, K). Larger means more like the prototype."""

    def __call__(self, activations: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]: ...

    @property
    def n_prototypes(self) -> int: ...

    def prefix(self, k: int) -> "Scorer":
        """A scorer with the first k prototypes."""
        ...

    def to(self, device: torch.device) -> "Scorer": ...


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Prototypes:
    """Vectors compared with activations.

    With mean m and vectors p, similarity "dot" is (x - m) . (p - m), "cosine" that divided by both norms,
    "distance" -|x - p|^2 (m plays no part).
    """

    vectors_KD: Float[Tensor, "K D"]
    mean_D: Float[Tensor, " D"]
    similarity: config.Similarity

    @property
    def n_prototypes(self) -> int:
        return self.vectors_KD.shape[0]

    @jaxtyped(typechecker=beartype.beartype)
    def __call__(self, activations: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        x_BD, p_KD = activations - self.mean_D, self.vectors_KD - self.mean_D
        if self.similarity == "distance":
            squares_BK = x_BD.square().sum(1, keepdim=True) + p_KD.square().sum(1)
            return 2 * x_BD @ p_KD.T - squares_BK
        if self.similarity == "cosine":
            x_BD = torch.nn.functional.normalize(x_BD, dim=1)
            p_KD = torch.nn.functional.normalize(p_KD, dim=1)
        return x_BD @ p_KD.T

    def prefix(self, k: int) -> "Prototypes":
        return dataclasses.replace(self, vectors_KD=self.vectors_KD[:k])

    def to(self, device: torch.device) -> "Prototypes":
        return dataclasses.replace(
            self, vectors_KD=self.vectors_KD.to(device), mean_D=self.mean_D.to(device)
        )
