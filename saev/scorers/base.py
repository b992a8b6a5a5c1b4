"""The `Scorer` interface and its one implementation by vectors.

B activations or images, P patches of an image, D d_vit, K prototypes, R rows and C columns of a tile.
"""

import collections.abc
import dataclasses
import typing as tp

import beartype
import numpy as np
import torch
import xxhash
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev.nn import kernels
from saev.scorers import config

CPU = torch.device("cpu")
TILE = {"cpu": (512, 2**20), "cuda": (2**14, 2**28)}
"""Patches and bytes of scores that are computed at a time: on a CPU so few that they stay in a core's cache."""


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

    def of_images(self, acts_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B K"]:
        """Scores of images: the largest of their patches'."""
        ...

    def digest(self) -> str:
        """Hash of all that decides the scores."""
        ...


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Prototypes:
    """Vectors compared with activations.

    With mean m and vectors p, similarity "dot" is (x - m) . (p - m), "cosine" that divided by both norms,
    "distance" -|x - p|^2 (m plays no part).
    """

    direction_KD: Float[Tensor, "K D"]
    """p - m, which float32 holds better than p where the mean is large."""
    mean_D: Float[Tensor, " D"]
    similarity: config.Similarity

    @staticmethod
    @jaxtyped(typechecker=beartype.beartype)
    def of(
        vectors_KD: Float[Tensor, "K D"], mean_D: Float[Tensor, " D"], similarity: config.Similarity
    ) -> "Prototypes":
        return Prototypes(vectors_KD - mean_D, mean_D, similarity)

    @property
    def vectors_KD(self) -> Float[Tensor, "K D"]:
        return self.direction_KD + self.mean_D

    @property
    def n_prototypes(self) -> int:
        return self.direction_KD.shape[0]

    @jaxtyped(typechecker=beartype.beartype)
    def __call__(self, activations: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        return self.of_images(activations[:, None])

    @jaxtyped(typechecker=beartype.beartype)
    def of_images(self, acts_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B K"]:
        p_KD = self.direction_KD
        match self.similarity:
            case "cosine":
                p_KD = torch.nn.functional.normalize(p_KD, dim=1)
                return largest(acts_BPD, p_KD, self._directions)
            case "distance":  # 2 x . p - |x|^2 - |p|^2
                return largest(acts_BPD, p_KD, self._doubled) - p_KD.square().sum(dim=1)
            case _:
                return largest(acts_BPD, p_KD, lambda x_RD: (x_RD - self.mean_D, None))

    def _directions(self, x_RD: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.normalize(x_RD - self.mean_D, dim=1), None

    def _doubled(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        x_RD = x_RD - self.mean_D
        return 2 * x_RD, -x_RD.square().sum(dim=1)

    def prefix(self, k: int) -> "Prototypes":
        return dataclasses.replace(self, direction_KD=self.direction_KD[:k])

    def to(self, device: torch.device) -> "Prototypes":
        return dataclasses.replace(
            self, direction_KD=self.direction_KD.to(device), mean_D=self.mean_D.to(device)
        )

    def digest(self) -> str:
        return digest(self.similarity, [self.direction_KD, self.mean_D])


@beartype.beartype
def digest(what: str, tensors: list[Tensor]) -> str:
    """Hash of some tensors' values, and of what they are."""
    out = xxhash.xxh3_128(what.encode())
    for tensor in tensors:
        out.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        out.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return out.hexdigest()


Prepare = collections.abc.Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Raw activations (R, D) -> what is multiplied (R, D), and what is added to each row's products (R,) or None."""


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def largest(
    acts_BPD: Float[Tensor, "B P D"], w_KD: Float[Tensor, "K D"], prepare: Prepare
) -> Float[Tensor, "B K"]:
    """max over an image's patches of prepared activations times w; no score of a single patch outlives its tile."""
    (B, P, _), K = acts_BPD.shape, len(w_KD)
    n_rows, n_bytes = TILE[acts_BPD.device.type]
    n_imgs = max(1, n_rows // P)
    width = max(1, n_bytes // (acts_BPD.element_size() * n_imgs * P))
    out_BK = acts_BPD.new_empty(B, K)

    def rows(first: int) -> None:
        with torch.inference_mode(acts_BPD.is_inference()), torch.no_grad():
            x_RD, offset_R = prepare(acts_BPD[first : first + n_imgs].flatten(0, 1))
            for start in range(0, K, width):
                score_RC = x_RD @ w_KD[start : start + width].T
                if offset_R is not None:
                    score_RC += offset_R[:, None]
                best = score_RC.unflatten(0, (-1, P)).amax(dim=1)
                out_BK[first : first + n_imgs, start : start + width] = best

    firsts = list(range(0, B, n_imgs))
    if acts_BPD.device.type == "cpu":
        kernels.each_in_threads(rows, firsts)
    else:
        for first in firsts:
            rows(first)
    return out_BK
