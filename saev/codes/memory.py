"""Estimates the memory of `python -m saev.codes` (docs/memory.md). Imports no torch.

Tests compare the estimate with processes.
"""

from saev.data import memory

MAX_CODES = 2**26
"""Most codes of a block if all latents fire (256 MB in float32). Bounds the images in a block."""


def n_block(n_patches: int, n_latents: int) -> int:
    """Images that are encoded at a time."""
    return max(1, min(64, MAX_CODES // (n_patches * n_latents)))


def peak(n_imgs: int, n_patches: int, d_vit: int, n_latents: int, n_codes: int, is_sae: bool) -> int:
    """Estimates the peak memory in bytes.

    Args:
        n_imgs: images of a block.
        n_codes: codes of a patch.
        is_sae: whether the scorer is an SAE.
    """
    acts = 4 * n_imgs * n_patches * d_vit
    weights = (8 if is_sae else 4) * d_vit * n_latents
    found = (
        (16 if is_sae else 8) * n_imgs * n_patches * n_codes
    )  # as found, and as written; scores, a part of them
    return memory.PROGRAM + max(4 * weights, weights + 6 * acts + found)
