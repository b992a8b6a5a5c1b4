"""Estimates the memory of `python -m saev.codes` (docs/memory.md). Imports no torch.

Tests compare the estimate with processes.
"""

from saev.data import memory


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
