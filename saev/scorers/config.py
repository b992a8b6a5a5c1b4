"""Configs of scorers: one class per kind of prototype. Imports no torch."""

import dataclasses
import typing as tp

import beartype

from saev import fields

Similarity = tp.Literal["plain", "dot", "cosine", "distance"]
FORMULAS = {
    "plain": "x . p",
    "dot": "(x - m) . (p - m)",
    "cosine": "cos(x - m, p - m)",
    "distance": "-|x - p|^2",
}
"""Score of prototype p for activation x. m is the mean of the activations that the scorer was fitted on."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Random:
    """Activations drawn uniformly without replacement."""

    similarity: Similarity = "cosine"
    """Score of prototype p for activation x, with mean activation m. plain: x . p. dot: (x - m) . (p - m).
    cosine: cos(x - m, p - m). distance: -|x - p|^2."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class KMeans:
    """Centroids of k-means: greedy k-means++ on a sample, then Lloyd's algorithm over all activations."""

    n_iters: int = 20
    """Maximum number of passes of Lloyd's algorithm."""
    tolerance: float = 1e-4
    """Stop when a pass lowers the sum of squared distances by less than this fraction."""
    n_samples: int = 200_000
    """Activations for k-means++, drawn uniformly and held in memory."""
    normalize: bool = False
    """Cluster activations minus their mean, scaled to norm 1 (spherical k-means, Dhillon and Modha 2001)."""
    similarity: Similarity = "cosine"
    """Score of prototype p for activation x, with mean activation m. plain: x . p. dot: (x - m) . (p - m).
    cosine: cos(x - m, p - m). distance: -|x - p|^2."""

    def __post_init__(self) -> None:
        intervals = {"n_iters": "[1, 1e5]", "n_samples": "[1, 1e9]", "tolerance": "[0, 1e6]"}
        fields.settle(self, "scorer.", **intervals)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Pca:
    """Exact principal components v, computed in one pass. At most d_vit prototypes (2 d_vit with both signs).

    Scores are (x - m) . v. The plain product x . v would add the constant m . v, which changes no AP.
    """

    both_signs: bool = False
    """Also use the negative of each component, right after it."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Units:
    """The ViT's own units: each dimension of an activation, and right after it its negative. They are not
    fitted; there are 2 d_vit, and scores are x . v."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Sae:
    """Latents of a trained sparse autoencoder. K prototypes are its first K latents."""

    ckpt: fields.Path = fields.neither("")  # its content decides
    """Checkpoint (sae.pt)."""

    def __post_init__(self) -> None:
        fields.settle(self, "scorer.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Untrained:
    """Latents of an SAE before training, with the architecture and size of a trained one. Random weights;
    scale, decoder bias and threshold are set from activations. K prototypes are its first K latents."""

    like: fields.Path = fields.neither("")  # its content decides
    """Checkpoint (sae.pt) of the trained SAE."""

    def __post_init__(self) -> None:
        fields.settle(self, "scorer.")


Scorer = Random | KMeans | Pca | Units | Sae | Untrained


def checkpoint(cfg: Scorer) -> str:
    """The checkpoint of a scorer that is an SAE or like one; "" for the others."""
    match cfg:
        case Sae(ckpt=fpath) | Untrained(like=fpath):
            return fpath
        case _:
            return ""
