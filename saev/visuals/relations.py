"""What latents have to do with each other, and with the images' classes.

S latents, C chosen latents, K related ones, D d_vit, G classes, X sampled patches, n codes.
"""

import typing as tp

import numpy as np
import torch
from torch import Tensor

from saev.visuals import kernels, spool, statistics

N_RELATED = 10
"""Related latents that are shown."""
COLUMNS = 4096
"""Latents that others are compared with at a time."""
MAX_PAIRS, MAX_CODES = 2**28, 2**24
"""Pairs of latents that fire on the same patch, and codes, that `together` counts, about."""
MIN_IMAGES = 2
"""A class must have at least so many of the images that fire a latent."""


class Related(tp.NamedTuple):
    """Related latents of each chosen one, most related first."""

    latent_CK: np.ndarray
    """int32; -1 if there are fewer."""
    value_CK: np.ndarray
    """float32."""


@torch.inference_mode()
def neighbours(vectors_SD: Tensor, chosen_C: np.ndarray, k: int = N_RELATED) -> Related:
    """The latents whose vectors have the largest cosine with each chosen one's; itself excluded."""
    unit_SD = torch.nn.functional.normalize(vectors_SD.float(), dim=1)
    k = min(k, len(unit_SD) - 1)
    found = []
    for chosen in torch.from_numpy(chosen_C).to(unit_SD.device).split(COLUMNS // 4):
        cosine_CS = unit_SD[chosen] @ unit_SD.T
        cosine_CS[torch.arange(len(chosen), device=chosen.device), chosen] = -torch.inf
        found.append([t.cpu() for t in cosine_CS.topk(k, dim=1)])
    value_CK, latent_CK = (torch.cat(each).numpy() for each in zip(*found, strict=True))
    return Related(latent_CK.astype(np.int32), value_CK)


class Together(tp.NamedTuple):
    """Latents that fire on the same patches."""

    related: Related
    """Values are shares of the chosen latent's patches, all or sampled ones."""
    n_patches: int
    """Number of patches that were counted."""


def together(
    codes: spool.Spool, n_latents: int, chosen_C: np.ndarray, seed: int, k: int = N_RELATED
) -> Together:
    """Counts on all patches, or on a seeded sample if counting would take too long or too much memory."""
    n_pairs = sum(int(np.square(b.fired.count_X.astype(np.int64)).sum()) for b in codes.blocks("pairs"))
    share = min(1.0, MAX_PAIRS / max(n_pairs, 1), MAX_CODES / max(codes.n_codes, 1))
    counts, latents, first = [], [], 0
    for _, fired in codes.blocks("sample"):
        count_X, latent_n = np.empty_like(fired.count_X), np.empty_like(fired.latent_n)
        n_X, n = kernels.sample_patches(fired.count_X, fired.latent_n, first, share, seed, count_X, latent_n)
        counts.append(count_X[:n_X].copy())
        latents.append(latent_n[:n].copy())
        first += len(count_X)
    start_X1 = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
    latent_n = np.concatenate(latents)
    start_S1, patch_n = np.empty(n_latents + 1, np.int64), np.empty(len(latent_n), np.int32)
    kernels.by_latent(start_X1, latent_n, start_S1, patch_n)
    latent_CK = np.full((len(chosen_C), k), -1, np.int32)
    count_CK = np.zeros((len(chosen_C), k), np.int32)
    kernels.together(start_X1, latent_n, start_S1, patch_n, chosen_C, latent_CK, count_CK)
    n_C1 = np.diff(start_S1)[chosen_C, None]
    share_CK = (count_CK / np.maximum(n_C1, 1)).astype(np.float32)
    return Together(Related(latent_CK, share_CK), len(start_X1) - 1)


class Class(tp.NamedTuple):
    """A class that is over-represented among the images that fire a latent."""

    name: int
    """Its place in the list of classes."""
    n_images: int
    """Its images that fire the latent."""
    lift: float
    """Its share of the images that fire the latent / its share of all images."""


def classes(
    stats: statistics.Stats, latent: int, class_N: np.ndarray, n_G: np.ndarray, k: int = N_RELATED
) -> list[Class]:
    """The classes with a lift above 1 that explain most: those with the largest images x log(lift).

    Counted on all images that fire the latent, or on the sampled ones if there are too many classes.

    Args:
        class_N: class of the image at each position, or -1.
        n_G: number of images of each class.
    """
    if stats.class_SG.shape[1]:
        count_G = stats.class_SG[latent].astype(np.int64)
    else:
        class_R = class_N[stats.at_SR[latent, : stats.sampled_S[latent]]]
        count_G = np.bincount(class_R[class_R >= 0], minlength=len(n_G))
    found_G = np.flatnonzero(count_G >= MIN_IMAGES)
    share_G = n_G[found_G] / max(n_G.sum(), 1)
    lift_G = count_G[found_G] / max(count_G.sum(), 1) / np.maximum(share_G, 1e-12)
    score_G = np.where(lift_G > 1, count_G[found_G] * np.log(np.maximum(lift_G, 1)), 0)
    best = np.argsort(-score_G, kind="stable")[:k]
    return [
        Class(int(found_G[i]), int(count_G[found_G[i]]), float(lift_G[i])) for i in best if score_G[i] > 0
    ]
