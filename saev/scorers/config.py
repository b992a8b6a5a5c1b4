"""Configs of the scorers: one class per way to get prototypes. Imports no torch."""

import dataclasses
import typing as tp

import beartype

Similarity = tp.Literal["dot", "cosine", "distance"]


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Random:
    """Activations drawn uniformly from the stream, without replacement."""

    similarity: Similarity = "cosine"
    """dot: x . p. cosine: cos(x, p). distance: -|x - p|^2. dot and cosine are taken after subtracting the mean activation."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class KMeans:
    """Centroids of Lloyd's algorithm on a sample of the stream, started by k-means++."""

    n_iters: int = 20
    """Passes of Lloyd's algorithm (fewer when it converges)."""
    n_samples: int = 200_000
    """Activations to cluster, drawn uniformly from the stream."""
    similarity: Similarity = "cosine"
    """See scorer:random."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Pca:
    """Principal components, exact, in one pass. At most d_vit of them (twice that with both signs)."""

    both_signs: bool = False
    """Also use each component's negative, right after it."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Sae:
    """Latents of a trained sparse autoencoder; K prototypes are its first K latents."""

    ckpt: str = ""
    """Checkpoint (sae.pt)."""


Scorer = Random | KMeans | Pca | Sae
