"""Predicts the peak memory of a dump, and sizes the blocks of a pass that writes codes. Imports no torch.

Tests compare the predictions with the measured memory of processes.
"""

import typing as tp

from saev.data import config

PROGRAM = 750 * 10**6
"""Bytes of Python, torch and the compiled kernels, in every stage."""
LIBRARIES = 100 * 10**6
"""Bytes of timm and open_clip, which build the ViT."""
IN_FORWARD = 20
"""A batch's memory in the ViT, in multiples of its residual stream."""
PREFETCH = 3
"""Batches of images decoded ahead of the ViT."""
UNWRITTEN = 2
"""Batches of activations that may wait for the disk."""
PHOTO = 12 * 10**6
"""Pixels of a typical camera photo."""
MAX_IMAGES, MAX_CODES = 64, 2**26
"""Most images of a block that is encoded, and most codes if all latents fire (256 MB in float32)."""


def n_block(n_patches: int, n_latents: int) -> int:
    """Images that are encoded at a time."""
    return max(1, min(MAX_IMAGES, MAX_CODES // (n_patches * n_latents)))


class Sizes(tp.NamedTuple):
    """Sizes of a ViT."""

    weights: int
    """Bytes of its parameters."""
    pixels: int
    """Pixels of its input."""
    n_tokens: int
    """Recorded tokens per image."""
    d_vit: int
    n_layers: int
    """Recorded layers."""


def peak(cfg: config.Dump, vit: Sizes, photo: int = PHOTO) -> int:
    """Peak bytes of one job of a dump. photo: pixels of the largest photo."""
    imgs = 12 * vit.pixels * cfg.vit_batch_size
    layer = 4 * vit.n_tokens * vit.d_vit * cfg.vit_batch_size
    decoding = 8 * photo * cfg.n_workers  # Pillow keeps 4 bytes per pixel, and a copy in RGB
    batches = (PREFETCH + 2) * imgs + IN_FORWARD * layer + (UNWRITTEN + 2) * vit.n_layers * layer
    loading = 0 if cfg.vit.vit_weights == "random" else vit.weights
    return PROGRAM + LIBRARIES + vit.weights + max(loading, decoding + batches)
