"""How much memory a dump takes on a CPU. Imports no torch. A test compares the formula with processes."""

import typing as tp

import beartype

from saev.data import config

PROGRAM = 750 * 10**6
"""Python, torch and the compiled kernels: what every stage takes."""
LIBRARIES = 100 * 10**6
"""timm and open_clip, which build the ViT."""
IN_FORWARD = 20
"""Of a batch in the ViT, in units of its residual stream."""
PREFETCH = 3
"""Batches of images decoded ahead of the ViT."""
UNWRITTEN = 2
"""Batches of activations that may wait for the disk."""
PHOTO = 12 * 10**6
"""Pixels of a camera's photo."""


class Sizes(tp.NamedTuple):
    """Of a ViT."""

    weights: int
    """Bytes of its parameters."""
    pixels: int
    """Of its input."""
    n_tokens: int
    """Of one image, as recorded."""
    d_vit: int
    n_layers: int
    """Recorded ones."""


@beartype.beartype
def peak(cfg: config.Dump, vit: Sizes, photo: int = PHOTO) -> int:
    """Bytes that a job of a dump takes at the most. photo: pixels of the largest photo."""
    imgs = 12 * vit.pixels * cfg.vit_batch_size
    layer = 4 * vit.n_tokens * vit.d_vit * cfg.vit_batch_size
    decoding = (
        8 * photo * cfg.n_workers
    )  # Pillow keeps four bytes for each pixel, and a copy in RGB
    batches = (PREFETCH + 2) * imgs + IN_FORWARD * layer + (UNWRITTEN + 2) * vit.n_layers * layer
    loading = 0 if cfg.vit.vit_weights == "random" else vit.weights
    return PROGRAM + LIBRARIES + vit.weights + max(loading, decoding + batches)
