"""Configs of the scorers: one class per way to get prototypes. Imports no torch."""

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
"""What a prototype p scores an activation x, with the mean m of the activations that it was fitted on."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Random:
    """Activations drawn uniformly from the stream, without replacement."""

    similarity: Similarity = "cosine"
    """What prototype p scores activation x (m: the mean activation). plain: x . p. dot: (x - m) . (p - m). cosine: cos(x - m, p - m). distance: -|x - p|^2."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class KMeans:
    """Centroids of Lloyd's algorithm over the whole stream, started by greedy k-means++ on a sample of it."""

    n_iters: int = 20
    """Passes of Lloyd's algorithm over the stream (fewer when it converges)."""
    tolerance: float = 1e-4
    """It has converged when a pass lowers the sum of squared distances by less than this fraction."""
    n_samples: int = 200_000
    """Activations to start from, drawn uniformly from the stream and held in memory."""
    normalize: bool = False
    """Cluster directions (spherical k-means, Dhillon and Modha 2001): activations less the mean, scaled to norm 1."""
    similarity: Similarity = "cosine"
    """See scorer:random."""

    def __post_init__(self) -> None:
        intervals = {"n_iters": "[1, 1e5]", "n_samples": "[1, 1e9]", "tolerance": "[0, 1e6]"}
        fields.settle(self, "scorer.", **intervals)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Pca:
    """Principal components v, exact, in one pass. At most d_vit of them (twice that with both signs).

    Scores are (x - m) . v. The plain product x . v adds m . v to every score of v, which changes no ranking and no AP.
    """

    both_signs: bool = False
    """Also use each component's negative, right after it."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Sae:
    """Latents of a trained sparse autoencoder; K prototypes are its first K latents."""

    ckpt: fields.Path = fields.neither("")  # its content decides
    """Checkpoint (sae.pt)."""

    def __post_init__(self) -> None:
        fields.settle(self, "scorer.")


Scorer = Random | KMeans | Pca | Sae
