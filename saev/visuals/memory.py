"""Estimates the memory of `visuals.py` (docs/memory.md). Imports no torch.

Tests compare the estimates with processes, and with tensors on a fake GPU.
"""

from saev.data import memory
from saev.visuals import config

MAX_CODES = 2**26
"""Most values of a block, if every latent fired on every patch. Bounds the images in a block."""
MAX_IMAGES = 64


def block(n_patches: int, n_latents: int) -> int:
    """Images that are encoded at a time."""
    return max(1, min(MAX_IMAGES, MAX_CODES // (n_patches * n_latents)))


def peak(cfg: config.Visuals, n_block: int, n_patches: int, d_vit: int, d_sae: int) -> int:
    """Estimates the peak memory in bytes.

    Args:
        n_block: images encoded at a time.
        n_patches: patches per image.
    """
    weights = 8 * d_vit * d_sae
    acts = 4 * n_block * n_patches * d_vit
    loading = 4 * weights  # the file's bytes, its tensors, the SAE
    return memory.PROGRAM + max(loading, weights + 6 * acts)


def gpu_peak(n_block: int, n_patches: int, d_vit: int, d_sae: int) -> int:
    """Estimates the peak of a GPU's tensors in bytes. Arguments as for `peak`."""
    codes, acts = (4 * n_block * n_patches * width for width in (d_sae, d_vit))
    return 8 * d_vit * d_sae + 4 * codes + 3 * acts
