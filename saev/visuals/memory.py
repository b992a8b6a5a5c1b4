"""Estimates the memory of `visuals.py` (docs/memory.md). Imports no torch.

Tests compare the estimates with processes.
"""

import typing as tp

from saev.data import memory
from saev.visuals import config

MAX_SHOWN = 2**25
"""Most patches with heat that are held at a time, about (3 bytes each)."""
MIN_SAMPLED = 128
"""At least this many images that fire a latent are sampled. Their quarters stand for those of all."""
MAX_PAIRS, MAX_SAMPLED_CODES = 2**26, 2**24
"""Pairs of latents that fire on the same patch, and codes, that are counted, about."""
AT_ONCE = 512
"""Latents that are compared with all others at a time."""
N_GROUPS = 5
"""Groups of images beside the top ones."""
LIBRARIES = 100 * 10**6
"""Bytes of compiled kernels and libraries beyond `data.memory.PROGRAM`."""


class Sizes(tp.NamedTuple):
    """Sizes of the activations and of what is shown."""

    n_imgs: int
    n_patches: int
    """Per image."""
    d_vit: int
    n: int
    """Latents, prototypes or units."""

    @property
    def block(self) -> int:
        """Images that are encoded at a time."""
        return memory.n_block(self.n_patches, self.n)


def sampled(n_group: int) -> int:
    """Images that fire a latent which are sampled."""
    return max(MIN_SAMPLED, 4 * n_group)


def peak(cfg: config.Visuals, sizes: Sizes) -> int:
    """Estimates the peak memory in bytes, if one latent in a hundred fires on a patch."""
    n, n_block = sizes.n, min(sizes.block, sizes.n_imgs)
    is_sae, is_fitted = isinstance(cfg.shown, config.Sae), isinstance(cfg.shown, config.Fitted)
    weights = 8 * sizes.d_vit * n * (is_sae or is_fitted)
    acts = 4 * n_block * sizes.n_patches * sizes.d_vit
    scores = 8 * n_block * sizes.n_patches * n * is_fitted
    tables = n * (8 * cfg.n_images + 16 * sampled(cfg.n_group) + 360)
    entries = n * (min(cfg.n_images, sizes.n_imgs) + N_GROUPS * min(cfg.n_group, sizes.n_imgs))
    heat = 3 * min(MAX_SHOWN, entries * max(1, sizes.n_patches // 32))
    n_codes = min(MAX_SAMPLED_CODES, sizes.n_imgs * sizes.n_patches * max(1, n // 100))
    related = weights // 2 + max(12 * n_codes, 4 * AT_ONCE * n)
    after = tables + max(68 * entries + heat, related)
    loading = 4 * weights * is_sae  # the file's bytes, its tensors, the SAE
    return memory.PROGRAM + LIBRARIES + max(loading, weights + max(weights // 4 + 6 * acts + scores, after))
