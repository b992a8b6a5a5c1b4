"""Predicts the peak memory of `protoeval.py` (docs/memory.md). Imports no torch.

Tests compare the predictions with the measured memory of processes.
"""

import collections.abc
import os
import typing as tp

from saev.data import memory
from saev.protoeval import config
from saev.scorers import config as scorers_config

LIBRARIES = 300 * 10**6
"""Bytes of kernels that are compiled, libraries that are imported, and threads that Polars starts; half of
them after the fit."""
FIT_BLOCK, SCORE_BLOCK = 64, 256
"""Most images that are read at a time."""
BINS, SCORES = 36_944, 4 * 2**24
"""Bytes of a prototype's bins in the patch table (`logistic.Sums`), and of the scores computed at once."""
PROBES = 60
"""Regressions that a thread fits at once (`probe.AT_ONCE`, in 5 folds)."""
UNTRAINED, PRE_ACTIVATIONS = 65_536, 4 * 2**25
"""Activations that initialise an untrained SAE, and bytes of the pre-activations that set its threshold."""
PER_PATCH = 250
"""Bytes per test patch while its classes are measured."""
AP_BLOCKS = 4 * 2**26
"""Bytes of the scores that are sorted at once (`ap.BLOCK_BYTES`), and of their copies."""
RANKINGS = 21
"""Rankings of a scorer's prototypes in the audit (1 + `audit.N_NULL`)."""


class Sizes(tp.NamedTuple):
    """Sizes of the activations and labels of a group of scorers."""

    n_train: int
    """Images that prototypes are chosen on."""
    n_test: int
    """Images that they are measured on."""
    n_traits: int
    n_tokens: int
    """Per image."""
    d_vit: int
    n_fit: int
    """Activations that scorers are fitted on."""
    ckpt: int = 0
    """Bytes of the largest SAE's checkpoint."""
    n_classes: int = 0
    """Classes of patches, with --patch-labels."""

    @property
    def n_imgs(self) -> int:
        return self.n_train + self.n_test

    @property
    def n_patches(self) -> tuple[int, int]:
        """Of the train and of the test images."""
        return self.n_train * self.n_tokens, self.n_test * self.n_tokens

    @property
    def labels(self) -> int:
        """Bytes of the labels of images, as they are read and by split, and of those of patches."""
        return 2 * self.n_imgs * self.n_traits + 4 * sum(self.n_patches) * (self.n_classes > 0)


def peak(cfgs: collections.abc.Sequence[config.ProtoEval], sizes: Sizes) -> int:
    """Peak bytes for one group of scorers, including the memory-mapped files of scores."""
    ks = [n_prototypes(cfg, sizes.d_vit) for cfg in cfgs]
    held = sum(
        2 * sizes.ckpt if scorers_config.checkpoint(cfg.scorer) else 8 * k * sizes.d_vit
        for cfg, k in zip(cfgs, ks, strict=True)
    )
    fit = max(_fit(cfg, k, sizes) for cfg, k in zip(cfgs, ks, strict=True))
    scores = 4 * sizes.n_imgs * (sum(ks) + 2 * sizes.d_vit)
    one = 4 * (5 * sizes.n_tokens * sizes.d_vit + 2 * sum(ks))  # an image's activations and scores
    block = max(one, int(min(cfgs[0].memory_gb * 1e9, one * min(SCORE_BLOCK, sizes.n_imgs))))
    # pooled activations in float64, scaled and decomposed; what the regressions of all threads need
    n_columns = 8 * min(PROBES * (os.cpu_count() or 1), 5 * sizes.n_traits) + sizes.n_traits
    probe = 8 * sizes.n_train * (6 * sizes.d_vit + n_columns)
    choosing = _choice(cfgs[0], max(ks), sizes)
    patches = max(_patches(cfgs, sum(ks), sizes), _audit(cfgs, ks, sizes))
    most = max(block, choosing + _several(cfgs[0], sizes), probe, patches)
    after = LIBRARIES + held + scores + most
    return memory.PROGRAM + sizes.labels + max(LIBRARIES // 2 + fit, after)


def _several(cfg: config.ProtoEval, sizes: Sizes) -> int:
    """Models of several prototypes: labels, probabilities and residuals, and the scores of all images."""
    return bool(cfg.models) * sizes.n_traits * (28 * sizes.n_train + 8 * sizes.n_imgs)


def _patches(cfgs: collections.abc.Sequence[config.ProtoEval], k: int, sizes: Sizes) -> int:
    """The patch table: sums over train patches and fits, or scores of test patches and what measures them.

    Both read activations and compute a tile of scores.
    """
    if not sizes.n_classes:
        return 0
    most, (n_train, n_test) = int(cfgs[0].memory_gb * 1e9), sizes.n_patches
    n_columns = min(k, sizes.n_classes * len(cfgs) * (len(cfgs[0].n_prototypes) + 1))
    scoring = _patch_scores(k, sizes)
    sums = min(most, k * (BINS + 32 * sizes.n_classes)) + 80 * k * sizes.n_classes + 20 * n_train
    measured = min(most, 4 * n_test * n_columns)
    resamples = 12 * cfgs[0].n_boot * sizes.n_test
    return max(sums + scoring, measured + scoring, measured + PER_PATCH * n_test + resamples)


def _patch_scores(k: int, sizes: Sizes) -> int:
    """Scores of some patches by all prototypes (computed, chosen, transposed), and blocks of activations."""
    tile = min(SCORES, 4 * FIT_BLOCK * sizes.n_tokens * k)
    return 3 * tile + 4 * 5 * FIT_BLOCK * sizes.n_tokens * sizes.d_vit


def _audit(
    cfgs: collections.abc.Sequence[config.ProtoEval], ks: collections.abc.Sequence[int], sizes: Sizes
) -> int:
    """Ranking: weights, gradients and two flags of each prototype and trait, and a block of scores. Auditing:
    scores of train or test patches by the first prototypes, each patch's classes, and what computes the
    scores, or APs of some prototypes, or resampled APs."""
    if not cfgs[0].audit:
        return 0
    most, k = int(cfgs[0].memory_gb * 1e9), max(ks)
    ranking = 16 * k * sizes.n_traits + min(most, 12 * sizes.n_train * k)
    n_patches = max(sizes.n_train, sizes.n_test) * sizes.n_tokens
    n_columns = sum(min(k, RANKINGS * max(cfgs[0].audit)) for k in ks)
    held = min(most, 4 * n_patches * n_columns) + sizes.n_classes * n_patches
    resampling = PER_PATCH * sizes.n_test * sizes.n_tokens + 12 * cfgs[0].n_boot * sizes.n_test
    ap = AP_BLOCKS + 40 * n_patches
    return max(ranking, held + max(_patch_scores(k, sizes), ap, resampling))


def n_prototypes(cfg: config.ProtoEval, d_vit: int) -> int:
    """All prototypes of a scorer. k-means is fitted separately for each number."""
    match cfg.scorer:
        case scorers_config.KMeans():
            return sum(set(cfg.n_prototypes))
        case scorers_config.Pca(both_signs=both):
            return min(max(cfg.n_prototypes), (1 + both) * d_vit)
        case scorers_config.Units():
            return min(max(cfg.n_prototypes), 2 * d_vit)
        case _:
            return max(cfg.n_prototypes)


def _fit(cfg: config.ProtoEval, k: int, sizes: Sizes) -> int:
    """A fit's sample and its candidates, k-means' centres and sums, PCA's matrices, 4 blocks read ahead."""
    d_vit, blocks = sizes.d_vit, 4 * sizes.d_vit * min(4 * FIT_BLOCK * sizes.n_tokens, sizes.n_fit)
    match cfg.scorer:
        case scorers_config.Random():
            return _sample(k, sizes, blocks)
        case scorers_config.KMeans(n_samples=n):
            sample = 4 * d_vit * min(n, sizes.n_fit)
            return max(_sample(n, sizes, blocks), sample + 30 * k * d_vit, 30 * k * d_vit + blocks)
        case scorers_config.Pca():
            return 5 * 8 * d_vit**2 + blocks
        case scorers_config.Units():
            return 16 * d_vit**2
        case scorers_config.Untrained():
            sample = min(UNTRAINED, sizes.n_fit)
            return _sample(sample, sizes, blocks) + max(4 * sizes.ckpt, 4 * PRE_ACTIVATIONS)
        case _:
            return 4 * sizes.ckpt


def _sample(n: int, sizes: Sizes, blocks: int) -> int:
    """The larger of the candidates (5/4 of the sample) + blocks, and the candidates + the sample."""
    drawn = min(n + n // 4, sizes.n_fit)
    return max(4 * sizes.d_vit * drawn + blocks, 4 * sizes.d_vit * (drawn + min(n, drawn)))


def _choice(cfg: config.ProtoEval, k: int, sizes: Sizes) -> int:
    """Two copies of a block's scores, three float64 matrices of its APs, three copies of the resamples."""
    some = min(k, max(1, int(cfg.memory_gb * 1e9 / (16 * sizes.n_imgs))))
    return some * (8 * sizes.n_train + 24 * sizes.n_traits) + 3 * cfg.n_boot * sizes.n_test
