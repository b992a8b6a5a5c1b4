"""The `Scorer` interface, and `Prototypes`, which compares activations with vectors.

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

from saev import compiled, errors
from saev.scorers import config

CPU = torch.device("cpu")
TILE = {"cpu": (512, 2**20), "cuda": (2**14, 2**28)}
"""Patches and bytes of scores that are computed at once. On a CPU they fit in a core's cache."""


@tp.runtime_checkable
class Scorer(tp.Protocol):
    """K prototypes. Maps activations (B, D) to scores (B, K); higher means more similar to the prototype."""

    def __call__(self, activations: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]: ...

    @property
    def n_prototypes(self) -> int: ...

    def prefix(self, k: int) -> "Scorer":
        """A scorer with the first k prototypes."""
        ...

    def to(self, device: torch.device) -> "Scorer": ...

    def of_images(self, acts_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B K"]:
        """Scores of images: the maximum over each image's patches."""
        ...

    def digest(self) -> str:
        """Hash of everything that affects the scores."""
        ...


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Prototypes:
    """Scores an activation x by its similarity to vectors p, with mean m.

    The similarity is "plain" x . p, "dot" (x - m) . (p - m), "cosine" the same divided by both norms, or
    "distance" -|x - p|^2. "plain" and "distance" do not depend on m.
    """

    direction_KD: Float[Tensor, "K D"]
    """p - m. float32 holds it more exactly than p if the mean is large."""
    mean_D: Float[Tensor, " D"]
    similarity: config.Similarity
    given_KD: Float[Tensor, "K D"] | None = None
    """p itself, if it was given, because adding m to p - m would round."""

    @staticmethod
    @jaxtyped(typechecker=beartype.beartype)
    def of(
        vectors_KD: Float[Tensor, "K D"], mean_D: Float[Tensor, " D"], similarity: config.Similarity
    ) -> "Prototypes":
        return Prototypes(vectors_KD - mean_D, mean_D, similarity, vectors_KD)

    @staticmethod
    def units(d_vit: int) -> "Prototypes":
        """Scores an activation by its dimensions."""
        return Prototypes(torch.eye(d_vit), torch.zeros(d_vit), "plain")

    @property
    def vectors_KD(self) -> Float[Tensor, "K D"]:
        return self.direction_KD + self.mean_D if self.given_KD is None else self.given_KD

    @property
    def n_prototypes(self) -> int:
        return self.direction_KD.shape[0]

    @errors.no_type_check
    def __call__(self, activations: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        return self.of_images(ready(activations, self.mean_D, "B D")[:, None])

    @errors.no_type_check
    def of_images(self, acts_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B K"]:
        acts_BPD = ready(acts_BPD, self.mean_D, "B P D")
        p_KD = self.direction_KD
        match self.similarity:
            case "plain":
                return largest(acts_BPD, self.vectors_KD, lambda x_RD: (x_RD, None))
            case "cosine":
                p_KD = torch.nn.functional.normalize(p_KD, dim=1)
                return largest(acts_BPD, p_KD, self._directions)
            case "distance":  # 2 x . p - |x|^2 - |p|^2
                return largest(acts_BPD, p_KD, self._doubled) - p_KD.square().sum(dim=1)
            case _:
                return largest(acts_BPD, p_KD, lambda x_RD: (x_RD - self.mean_D, None))

    def _directions(self, x_RD: Tensor) -> tuple[Tensor, None]:
        """Unit vectors. NaN if float32 cannot hold the norm, because dividing by infinity would score 0."""
        x_RD = x_RD - self.mean_D
        norm_R1 = x_RD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return x_RD / torch.where(norm_R1.isinf(), torch.nan, norm_R1), None

    def _doubled(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        x_RD = x_RD - self.mean_D
        return 2 * x_RD, -x_RD.square().sum(dim=1)

    def prefix(self, k: int) -> "Prototypes":
        return self._each(lambda x_KD: x_KD[:k], self.mean_D)

    def only(self, chosen_C: Tensor) -> "Prototypes":
        """These prototypes, in this order."""
        return self._each(lambda x_KD: x_KD[chosen_C], self.mean_D)

    def to(self, device: torch.device) -> "Prototypes":
        return self._each(lambda x_KD: x_KD.to(device), self.mean_D.to(device))

    def _each(self, change: collections.abc.Callable[[Tensor], Tensor], mean_D: Tensor) -> "Prototypes":
        given_KD = None if self.given_KD is None else change(self.given_KD)
        return Prototypes(change(self.direction_KD), mean_D, self.similarity, given_KD)

    def saved(self) -> dict[str, Tensor]:
        """The tensors to save, on the CPU: p if it was given, else p - m; and m."""
        out = {"direction_KD": self.direction_KD} if self.given_KD is None else {"vectors_KD": self.given_KD}
        return {name: x.cpu().clone() for name, x in (out | {"mean_D": self.mean_D}).items()}

    def digest(self) -> str:
        return digest(self.similarity, [self.vectors_KD, self.direction_KD, self.mean_D])


def ready(activations: tp.Any, like: Tensor, shape: str) -> Tensor:
    """Checks activations and converts them to the float type of `like`.

    Args:
        like: one of the scorer's tensors, d_vit wide.
        shape: the expected shape, such as "B P D", where D is d_vit.

    Raises:
        UserError: not a float tensor of that shape, or on another device than the scorer.
    """
    is_dense = isinstance(activations, Tensor) and activations.layout == torch.strided
    if not is_dense or not activations.is_floating_point():
        what = getattr(activations, "dtype", type(activations).__name__)
        raise errors.UserError(f"activations: {what}; a scorer takes a dense torch tensor of floats.")
    if activations.ndim != len(shape.split()) or activations.shape[-1] != like.shape[-1]:
        raise errors.UserError(
            f"activations: shape {tuple(activations.shape)}; this scorer takes ({', '.join(shape.split())}) "
            f"with D = {like.shape[-1]}."
        )
    if activations.device != like.device:
        raise errors.UserError(
            f"activations: on {activations.device}, but the scorer is on {like.device}. "
            "Move one of them with .to(device)."
        )
    return activations.to(like.dtype)


def digest(what: str, tensors: list[Tensor]) -> str:
    """Hash of a description and of tensors' shapes, dtypes and values."""
    out = xxhash.xxh3_128(what.encode())
    for tensor in tensors:
        out.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        out.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return out.hexdigest()


Prepare = collections.abc.Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Raw activations (R, D) -> (R, D) to multiply, and (R,) to add to each row's products, or None."""


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def largest(
    acts_BPD: Float[Tensor, "B P D"], w_KD: Float[Tensor, "K D"], prepare: Prepare
) -> Float[Tensor, "B K"]:
    """Maximum over each image's patches of prepared activations times w, computed tile by tile."""
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
        compiled.each_in_threads(rows, firsts)
    else:
        for first in firsts:
            rows(first)
    return out_BK
