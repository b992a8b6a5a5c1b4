"""Statistics of every latent, and the images to show for it, from the codes that `spool` wrote.

N images, P patches, S latents, K top images, R sampled images, H bins, G classes, C chosen latents, W images
shown for a latent.
"""

import dataclasses
import functools

import beartype
import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, UInt32, jaxtyped

from saev.visuals import coders, kernels, memory, spool

RANDOM_POOL = 512
"""Random images are drawn from this many, because each needs a picture in the gallery."""
MAX_COUNTS = 2**26
"""If latents x classes are more, classes are counted on the sampled images."""
ROWS = 4096
"""Latents whose images are chosen at a time."""
QUARTERS = ("q4", "q3", "q2", "q1")


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of every latent. Exact, except that the images of `sampled` are a sample."""

    n_imgs: int
    n_patches: int
    """Of all images, without padding."""
    fired_S: Int64[np.ndarray, " S"]
    """Patches that it fires on."""
    total_S: Float64[np.ndarray, " S"]
    """Sum of |value| over these patches."""
    low_S: Float32[np.ndarray, " S"]
    """Smallest value on these patches; 0 if there are none."""
    high_S: Float32[np.ndarray, " S"]
    """Largest value on these patches; 0 if there are none."""
    images_S: Int64[np.ndarray, " S"]
    """Images that it fires on."""
    class_SG: UInt32[np.ndarray, "S G"]
    """Of these, the images of each class. No columns if there were too many classes."""
    bin_SH: UInt32[np.ndarray, "S H"]
    """Histogram of the values where it fires, in equal bins from low to high."""
    top_value_SK: Float32[np.ndarray, "S K"]
    """Largest values (maxima over an image's patches), descending; -inf if fewer images fire it."""
    top_position_SK: Int32[np.ndarray, "S K"]
    """Positions of these images in the stream. Among equal values the lower one is first."""
    sampled_S: Int32[np.ndarray, " S"]
    """Size of the uniform sample of the images that fire it (all, if they are at most R)."""
    at_SR: Int32[np.ndarray, "S R"]
    """Positions of the sampled images, in random order."""
    value_SR: Float32[np.ndarray, "S R"]
    """Their largest values."""

    @property
    def freq_S(self) -> Float64[np.ndarray, " S"]:
        """Fraction of patches that it fires on."""
        return self.fired_S / self.n_patches

    @property
    def mean_S(self) -> Float64[np.ndarray, " S"]:
        """Mean |value| where it fires; NaN for a latent that never fires."""
        return np.where(self.fired_S > 0, self.total_S / np.maximum(self.fired_S, 1), np.nan)

    @functools.cached_property
    def upto_SH(self) -> Int64[np.ndarray, "S H"]:
        """Patches in a bin of the histogram or in a lower one."""
        return self.bin_SH.cumsum(axis=1, dtype=np.int64)


def collect(
    coder: coders.Coder,
    codes: spool.Spool,
    k: int,
    n_group: int,
    seed: int,
    class_N: Int64[np.ndarray, " N"],
    n_classes: int,
) -> Stats:
    """Collects all statistics in two passes over the codes.

    Args:
        k: number of top images.
        n_group: number of images that will be drawn from each quarter.
        class_N: class of the image at each position of the stream, or -1.
    """
    S, R = coder.n, memory.sampled(n_group)
    n_classes = n_classes if S * n_classes <= MAX_COUNTS else 0
    fired_S, images_S = np.zeros((2, S), np.int64)
    total_S, sampled_S = np.zeros(S), np.zeros(S, np.int32)
    low_S, high_S = np.full(S, np.inf, np.float32), np.full(S, -np.inf, np.float32)
    class_SG = np.zeros((S, n_classes), np.uint32)
    value_SK, position_SK = np.full((S, k), -np.inf, np.float32), np.full((S, k), -1, np.int32)
    key_SR, at_SR = np.zeros((S, R), np.uint64), np.full((S, R), -1, np.int32)
    value_SR = np.full((S, R), -np.inf, np.float32)
    for first, fired in codes.blocks("statistics"):
        kernels.collect(
            *fired, codes.n_patches, first, codes.n_shown_N, class_N,
            coder.is_signed, not coder.is_ranked_by_score, seed,
            fired_S, total_S, low_S, high_S, images_S, class_SG,
            value_SK, position_SK, sampled_S, key_SR, at_SR, value_SR,
        )  # fmt: skip
    bin_SH = np.zeros((S, kernels.N_BINS), np.uint32)
    for _, fired in codes.blocks("histograms"):
        kernels.histogram(fired.latent_n, fired.value_n, low_S, high_S, bin_SH)
    if codes.ranked is not None:
        value_SK, position_SK = codes.ranked.value_SK, codes.ranked.position_SK
    fires_S = fired_S > 0
    low_S, high_S = (np.where(fires_S, v_S, np.float32(0)) for v_S in (low_S, high_S))
    return Stats(
        codes.n_imgs, int(codes.n_shown_N.sum()), fired_S, total_S, low_S, high_S, images_S, class_SG, bin_SH,
        value_SK, position_SK, sampled_S, at_SR, value_SR,
    )  # fmt: skip


@jaxtyped(typechecker=beartype.beartype)
def below(
    stats: Stats, latent_n: Int32[np.ndarray, " n"], value_n: Float32[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """For values of latents, the share of the latent's values (on patches that it fires on) that are smaller.

    From the histogram, and linear within a bin: 1 for the latent's largest value, and wrong by at most the
    share of one bin. It needs no sign, unlike a share of the maximum.
    """
    low_n, high_n = (v_S[latent_n].astype(np.float64) for v_S in (stats.low_S, stats.high_S))
    with np.errstate(invalid="ignore", divide="ignore"):
        at_n = kernels.N_BINS * (value_n - low_n) / (high_n - low_n)  # in bins
    at_n = np.where(high_n > low_n, at_n, kernels.N_BINS).clip(0, kernels.N_BINS)
    bin_n = np.minimum(at_n.astype(np.int64), kernels.N_BINS - 1)
    not_below_n = (1 - (at_n - bin_n)) * stats.bin_SH[latent_n, bin_n]
    return (stats.upto_SH[latent_n, bin_n] - not_below_n) / stats.fired_S[latent_n]


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Shown:
    """The images to show for each chosen latent, in groups."""

    names: tuple[str, ...]
    """top, q4 to q1 (quarters of the images that fire it, by value), random."""
    ends: tuple[int, ...]
    """Group g has the columns from ends[g - 1] to ends[g]."""
    position_CW: Int32[np.ndarray, "C W"]
    """Positions of the images in the stream, or -1."""


def images_of(stats: Stats, chosen_C: Int64[np.ndarray, " C"], k: int, n_group: int, seed: int) -> Shown:
    """Chooses the images to show. Within a group they are sorted by value, in `random` they are not."""
    parts = [
        _images_of(stats, chosen_C[i : i + ROWS], k, n_group, seed) for i in range(0, len(chosen_C), ROWS)
    ]
    widths = [k] + [n_group] * 4 + [min(n_group, RANDOM_POOL, stats.n_imgs)]
    return Shown(("top", *QUARTERS, "random"), tuple(np.cumsum(widths).tolist()), np.concatenate(parts))


def _images_of(stats: Stats, chosen_C: np.ndarray, k: int, n_group: int, seed: int) -> np.ndarray:
    groups = [stats.top_position_SK[chosen_C, :k]]
    at_CR, value_CR, n_C1 = stats.at_SR[chosen_C], stats.value_SR[chosen_C], stats.sampled_S[chosen_C, None]
    R = at_CR.shape[1]
    by_position_CR = np.argsort(at_CR, axis=1, kind="stable")
    value_sorted_CR = np.take_along_axis(value_CR, by_position_CR, 1)
    order_CR = np.take_along_axis(by_position_CR, np.argsort(-value_sorted_CR, axis=1, kind="stable"), 1)
    rank_CR = np.empty_like(order_CR)
    np.put_along_axis(rank_CR, order_CR, np.arange(R)[None], 1)  # 0 is the largest value
    ranked_CR = np.take_along_axis(at_CR, order_CR, 1)
    quarter_CR = np.where(rank_CR < n_C1, 4 * rank_CR // np.maximum(n_C1, 1), -1)
    for quarter in range(4):
        is_mine_CR = quarter_CR == quarter
        is_drawn_CR = is_mine_CR & (is_mine_CR.cumsum(axis=1) <= n_group)  # columns are in random order
        drawn_CQ = np.sort(np.where(is_drawn_CR, rank_CR, R), axis=1)[:, :n_group]
        position_CQ = np.take_along_axis(ranked_CR, np.minimum(drawn_CQ, R - 1), 1)
        groups.append(np.where(drawn_CQ < R, position_CQ, -1))
    pool = random_pool(stats.n_imgs, seed)
    start_C = np.array([int(kernels.mix(seed, s, 0)) % len(pool) for s in chosen_C.tolist()], np.int64)
    column_W = np.arange(min(n_group, len(pool)))
    groups.append(pool[(start_C[:, None] + column_W) % len(pool)])
    return np.concatenate(groups, axis=1).astype(np.int32)


def random_pool(n_imgs: int, seed: int) -> Int64[np.ndarray, " N"]:
    """The positions that random images are drawn from. A latent takes neighbours from a random place."""
    rng = np.random.default_rng((seed, 0x9A11E))
    return rng.choice(n_imgs, min(RANDOM_POOL, n_imgs), replace=False)
