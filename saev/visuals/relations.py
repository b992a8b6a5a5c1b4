"""What latents have to do with each other, and with the images' classes.

S latents, C chosen latents, K related ones, D d_vit, G classes, X sampled patches, n codes.
"""

import functools
import typing as tp

import numpy as np
import torch
from torch import Tensor

from saev import compiled
from saev.visuals import kernels, memory, spool, statistics

N_RELATED = 10
"""Related latents that are shown."""
MIN_IMAGES = 2
"""A class must have at least this many of the images that fire a latent."""


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
    if 2 * len(chosen_C) > len(unit_SD):
        return Related(*(found_SK[chosen_C] for found_SK in _neighbours_of_all(unit_SD, k)))
    latent_CK = np.full((len(chosen_C), k), -1, np.int32)
    value_CK = np.full((len(chosen_C), k), -np.inf, np.float32)
    for start in range(0, len(chosen_C), memory.AT_ONCE):
        chosen = torch.from_numpy(chosen_C[start : start + memory.AT_ONCE]).to(unit_SD.device)
        cosine_CS = unit_SD[chosen] @ unit_SD.T
        cosine_CS[torch.arange(len(chosen), device=chosen.device), chosen] = -torch.inf
        arrays = (cosine_CS.cpu().numpy(), value_CK[start:], latent_CK[start:])
        compiled.in_threads(functools.partial(kernels.largest, *arrays), len(chosen))
    return Related(latent_CK, value_CK)


def _neighbours_of_all(unit_SD: Tensor, k: int) -> Related:
    """Computes each cosine once, and adds it to both latents'."""
    S = len(unit_SD)
    latent_SK, value_SK = np.full((S, k), -1, np.int32), np.full((S, k), -np.inf, np.float32)
    for start in range(0, S, memory.AT_ONCE):
        stop = min(start + memory.AT_ONCE, S)
        cosine_CR = unit_SD[start:stop] @ unit_SD[start:].T  # R: from `start` on
        cosine_CR.fill_diagonal_(-torch.inf)
        found_CR = cosine_CR.cpu().numpy()
        rows = (found_CR, start, value_SK[start:stop], latent_SK[start:stop])
        columns = (found_CR[:, stop - start :], start, value_SK[stop:], latent_SK[stop:])
        compiled.in_threads(functools.partial(kernels.add_rows, *rows), stop - start)
        compiled.in_threads(functools.partial(kernels.add_columns, *columns), S - stop)
    return Related(latent_SK, value_SK)


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
    n_pairs = sum(int(np.square(np.diff(fired.start_R1)).sum()) for _, fired in codes.blocks("pairs"))
    share = min(1.0, memory.MAX_PAIRS / max(n_pairs, 1), memory.MAX_SAMPLED_CODES / max(codes.n_codes, 1))
    counts, latents, first = [], [], 0
    for _, fired in codes.blocks("sample"):
        start_X1, latent_n = fired.start_R1, np.empty_like(fired.latent_n)
        count_X = np.empty(len(start_X1) - 1, np.int32)
        n_X, n = kernels.sample_patches(start_X1, fired.latent_n, first, share, seed, count_X, latent_n)
        counts.append(count_X[:n_X].copy())
        latents.append(latent_n[:n].copy())
        first += len(count_X)
    start_X1 = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
    latent_n = np.concatenate(latents)
    start_S1, patch_n = np.empty(n_latents + 1, np.int64), np.empty(len(latent_n), np.int32)
    kernels.by_latent(start_X1, latent_n, start_S1, patch_n)
    latent_CK = np.full((len(chosen_C), k), -1, np.int32)
    count_CK = np.zeros((len(chosen_C), k), np.int32)
    arrays = (start_X1, latent_n, start_S1, patch_n, chosen_C, latent_CK, count_CK)
    compiled.in_threads(functools.partial(kernels.together, *arrays), len(chosen_C))
    n_C1 = np.diff(start_S1)[chosen_C, None]
    share_CK = (count_CK / np.maximum(n_C1, 1)).astype(np.float32)
    return Together(Related(latent_CK, share_CK), len(start_X1) - 1)


def classes(
    stats: statistics.Stats, chosen_C: np.ndarray, class_N: np.ndarray, n_G: np.ndarray, k: int = N_RELATED
) -> list[list[list[object]]]:
    """For each chosen latent, [class, images, lift] of the classes that are over-represented where it fires.

    Lift is a class's share of the images that fire the latent, over its share of all images. Shown are the
    classes with the largest images x log(lift), among those with MIN_IMAGES. Counted on all images that fire
    the latent, or on the sampled ones if there are too many classes.

    Args:
        class_N: class of the image at each position, or -1.
        n_G: number of images of each class.
    """
    G = len(n_G)
    if not G:
        return [[]] * len(chosen_C)
    share_G = n_G / n_G.sum()
    count_CG = _class_counts(stats, chosen_C, class_N, G)
    lift_CG = count_CG / np.maximum(count_CG.sum(axis=1, keepdims=True), 1) / share_G
    is_over_CG = (lift_CG > 1) & (count_CG >= MIN_IMAGES)
    score_CG = np.where(is_over_CG, count_CG * np.log(np.maximum(lift_CG, 1)), 0)
    best_CK = np.argsort(-score_CG, axis=1, kind="stable")[:, :k]
    found = (np.take_along_axis(x_CG, best_CK, 1).tolist() for x_CG in (count_CG, lift_CG, score_CG))
    return [
        [[g, n, round(lift, 3)] for g, n, lift, score in zip(*each, strict=True) if score > 0]
        for each in zip(best_CK.tolist(), *found, strict=True)
    ]


def _class_counts(stats: statistics.Stats, chosen_C: np.ndarray, class_N: np.ndarray, G: int) -> np.ndarray:
    if stats.class_SG.shape[1]:
        return stats.class_SG[chosen_C].astype(np.int64)
    at_CR = stats.at_SR[chosen_C]
    class_CR = np.where(at_CR >= 0, class_N[at_CR], -1)
    c_n, r_n = np.nonzero(class_CR >= 0)
    flat_n = c_n * G + class_CR[c_n, r_n]
    return np.bincount(flat_n, minlength=len(chosen_C) * G).reshape(len(chosen_C), G)
