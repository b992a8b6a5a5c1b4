"""Estimates the memory of `visuals.py` (docs/memory.md). Imports no torch.

Tests compare the estimates with processes, and with tensors on a fake GPU.
"""

from saev.data import memory

MAX_CODES = 2**26
"""Most codes held at a time (256 MB in float32). Bounds the images in a block."""


def peak(n_images: int, n_block: int, n_patches: int, d_vit: int, d_sae: int) -> int:
    """Estimates the peak memory in bytes.

    Args:
        n_images: images shown per latent (--n-images).
        n_block: images read at a time.
        n_patches: patches per image.
    """
    weights = 8 * d_vit * d_sae
    codes, acts = (4 * n_block * n_patches * width for width in (d_sae, d_vit))
    loading = 4 * weights  # the file's bytes, its tensors, the SAE
    statistics = 4 * codes + 6 * acts  # codes, |codes| also in float64; blocks read ahead
    tables = 48 * d_sae * (n_images + n_block) + codes  # top images so far and a block's, sorted
    return memory.PROGRAM + max(loading, weights + max(statistics, tables))


def gpu_peak(n_images: int, n_block: int, n_patches: int, d_vit: int, d_sae: int) -> int:
    """Estimates the peak of a GPU's tensors in bytes. Arguments as for `peak`."""
    codes, acts = (4 * n_block * n_patches * width for width in (d_sae, d_vit))
    tables = 48 * d_sae * (n_images + n_block) + codes
    return 8 * d_vit * d_sae + max(4 * codes + 3 * acts, tables)
