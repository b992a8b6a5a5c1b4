"""Exact average precision. N images or patches, K prototypes, T traits, P positives of a trait, M resamples
of I images.

AP = sum over thresholds n of (R_n - R_{n-1}) P_n, with recall R and precision P. Tied scores share one
threshold, as in scikit-learn's `average_precision_score`. Equivalently, AP is the mean over positive images i
of

    (positives scored >= i) / (images scored >= i).

The images of a prototype are visited once, best first. Each adds to the traits that it has, so the cost is a
radix sort plus the number of labels, not T passes. Images with the lowest score are skipped, because their
share follows from the others. SAE latents score most images 0, so most are skipped.

An image whose label for a trait is missing counts neither as scored nor as positive for this trait. The same
pass counts such images per trait.
"""

import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int32, Shaped, UInt8, jaxtyped

from saev import compiled, errors

BLOCK_BYTES = 64 * 2**20
"""Bytes of scores that are copied at a time."""
LANES = 256
"""Resamples that are processed together."""


@errors.no_type_check
def average_precision(
    scores_NK: Float[np.ndarray, "N K"] | Float[torch.Tensor, "N K"],
    labels_NT: Shaped[np.ndarray, "N T"] | Shaped[torch.Tensor, "N T"],
    known_NT: Bool[np.ndarray, "N T"] | None = None,
) -> Float64[np.ndarray, "K T"]:
    """AP of every prototype for every trait. NaN for traits without a positive.

    Takes NumPy arrays, and torch tensors on any device. Without prototypes or traits the result is empty.

    Args:
        scores_NK: numbers that float64 represents exactly, without NaN.
        labels_NT: booleans, or numbers that are 0 or 1.
        known_NT: which labels are known; images are left out of the APs of the others. Default: all.

    Raises:
        UserError: other values, no images, or different numbers of images.
    """
    scores_NK = _numbers(scores_NK, "scores_NK", "(images, prototypes)")
    labels_NT = _numbers(labels_NT, "labels_NT", "(images, traits)")
    if len(scores_NK) != len(labels_NT):
        raise errors.UserError(
            f"average_precision: scores of {len(scores_NK):,} images, but labels of {len(labels_NT):,}. Pass "
            "the same images."
        )
    if not len(scores_NK):
        raise errors.UserError("average_precision: there are no images. Pass at least one.")
    if not ((labels_NT == 0) | (labels_NT == 1)).all():
        raise errors.UserError("average_precision: labels_NT holds other values than 0 and 1. Pass booleans.")
    labels_NT = labels_NT.astype(bool)
    if known_NT is not None and (known_NT.shape != labels_NT.shape or known_NT.dtype != bool):
        raise errors.UserError(
            f"average_precision: known_NT is {known_NT.dtype} {known_NT.shape}. Pass booleans "
            f"{labels_NT.shape}."
        )
    return of_rows(scores_NK.T, labels_NT, known_NT)


def _numbers(values: object, name: str, shape: str) -> np.ndarray:
    """Converts to a float32 or float64 matrix of exactly the same numbers."""
    if isinstance(values, torch.Tensor) and values.layout == torch.strided and not values.is_meta:
        values = values.detach().cpu().resolve_neg()
        is_half = values.is_floating_point() and values.dtype != torch.float64
        values = values.float().numpy() if is_half else values.numpy()
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        what = getattr(values, "dtype", type(values).__name__)
        raise errors.UserError(
            f"average_precision: {name} is {what}. Pass a NumPy array or a dense torch tensor of numbers."
        )
    if values.ndim != 2:
        raise errors.UserError(f"average_precision: {name} has shape {values.shape}. Pass a matrix {shape}.")
    is_half = values.dtype in (np.float16, np.float32)
    wide = values.astype(np.float32 if is_half else np.float64, copy=False)
    if values.dtype.itemsize >= 8 and wide.dtype != values.dtype:
        with np.errstate(invalid="ignore"):  # 2^63 as a float exceeds the largest integer
            back = wide.astype(values.dtype)
        if not np.array_equal(back, values, equal_nan=values.dtype.kind == "f"):
            raise errors.UserError(
                f"average_precision: {name} holds numbers that float64 cannot represent. Pass float64."
            )
    return wide


@jaxtyped(typechecker=beartype.beartype)
def of_rows(
    scores_KN: Float[np.ndarray, "K N"],
    labels_NT: Bool[np.ndarray, "N T"],
    known_NT: Bool[np.ndarray, "N T"] | None = None,
) -> Float64[np.ndarray, "K T"]:
    """`average_precision` for scores stored prototype by prototype."""
    n_K, n_N = scores_KN.shape
    n_known_T, unknown = np.full(labels_NT.shape[1], n_N), None
    if known_NT is not None and not known_NT.all():
        labels_NT = labels_NT & known_NT
        n_known_T, unknown = known_NT.sum(axis=0), _unknown(known_NT)
    has, n_positive_T = _by_image(labels_NT), labels_NT.sum(axis=0)
    ap_KT = np.empty((n_K, labels_NT.shape[1]))
    size = max(1, BLOCK_BYTES // (8 * max(1, n_N)))
    for first in range(0, n_K, size):
        bits_CN = _sortable(scores_KN[first : first + size], first)
        out_CT = ap_KT[first : first + size]

        def kernel(start: int, end: int, bits_CN=bits_CN, out_CT=out_CT) -> None:
            _matrix(bits_CN, has, unknown, n_positive_T, n_known_T, start, end, out_CT)

        compiled.in_threads(kernel, len(bits_CN))
    return ap_KT


def _unknown(known_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start_N1, group_n, group_T): each image's groups without labels, as `_by_image`; each trait's group.

    Traits of a group have the same known labels, as those of one column of names have.
    """
    bits_TB = np.packbits(known_NT, axis=0).T
    _, first_G, group_T = np.unique(bits_TB, axis=0, return_index=True, return_inverse=True)
    return *_by_image(~known_NT[:, first_G]), group_T.ravel()


def _by_image(is_set_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(start_N1, trait_n): the traits of image i are trait_n[start_N1[i] : start_N1[i + 1]]."""
    image_n, trait_n = np.nonzero(is_set_NT)
    start_N1 = np.concatenate([[0], np.cumsum(np.bincount(image_n, minlength=len(is_set_NT)))])
    return start_N1, trait_n.astype(np.int32)


@jaxtyped(typechecker=beartype.beartype)
def paired(
    scores_TN: Float[np.ndarray, "T N"],
    labels_NT: Bool[np.ndarray, "N T"],
    known_NT: Bool[np.ndarray, "N T"] | None = None,
) -> Float64[np.ndarray, " T"]:
    """AP of row t of the scores for trait t. NaN for traits without a positive.

    Raises:
        UserError: NaN among the scores.
    """
    return resampled(scores_TN, labels_NT, np.ones((1, len(labels_NT)), np.uint8), known_NT)[:, 0]


class Resampled(tp.NamedTuple):
    ap_TM: Float64[np.ndarray, "T M"]
    purity_TM: Float64[np.ndarray, "T M"]
    """Share of positives among the first ones."""


@jaxtyped(typechecker=beartype.beartype)
def resampled(
    scores_TN: Float[np.ndarray, "T N"],
    labels_NT: Bool[np.ndarray, "N T"],
    times_MN: UInt8[np.ndarray, "M N"],
    known_NT: Bool[np.ndarray, "N T"] | None = None,
) -> Float64[np.ndarray, "T M"]:
    """`paired` on M resamples, in which each image counts `times_MN` times. NaN if no positive was drawn.

    Raises:
        UserError: NaN among the scores.
    """
    image_N = np.arange(len(labels_NT), dtype=np.int32)
    return resampled_patches(scores_TN, labels_NT, image_N, times_MN, known_NT=known_NT).ap_TM


@jaxtyped(typechecker=beartype.beartype)
def resampled_patches(
    scores_TN: Float[np.ndarray, "T N"],
    labels_NT: Bool[np.ndarray, "N T"],
    image_N: Int32[np.ndarray, " N"],
    times_MI: UInt8[np.ndarray, "M I"],
    n_first: int = 0,
    known_NT: Bool[np.ndarray, "N T"] | None = None,
) -> Resampled:
    """AP of row t of the scores for trait t, on M resamples of I images, and the purity of the first patches.

    Where equal scores straddle the first `n_first` patches, the purity is the mean over their orders.

    Args:
        image_N: each patch's image, a column of `times_MI`, which says how often its patches count.

    Raises:
        UserError: NaN among the scores.
    """
    bits_TN, labels_TN = _sortable(scores_TN, 0), np.ascontiguousarray(labels_NT.T)
    known_TN = None if known_NT is None or known_NT.all() else np.ascontiguousarray(known_NT.T)
    n_M = len(times_MI)
    padded_MI = np.pad(times_MI, ((0, -n_M % LANES), (0, 0)))
    times_GIL = np.ascontiguousarray(padded_MI.reshape(-1, LANES, padded_MI.shape[1]).transpose(0, 2, 1))
    out_2TGL = np.empty((2, len(labels_TN), len(times_GIL), LANES))

    def kernel(start: int, end: int) -> None:
        _resampled(bits_TN, labels_TN, known_TN, image_N, times_GIL, n_first, start, end, *out_2TGL)

    compiled.in_threads(kernel, len(labels_TN))
    return Resampled(*(out_TGL.reshape(len(labels_TN), -1)[:, :n_M] for out_TGL in out_2TGL))


@beartype.beartype
def resamples(n_images: int, n: int, seed: int, with_all: bool = False) -> UInt8[np.ndarray, "M N"]:
    """n bootstrap resamples (Efron 1979): how often each image is drawn, with replacement.

    Args:
        with_all: the first row is all images once.
    """
    rng = np.random.default_rng((seed, 0xB007))
    times_MN = np.ones((int(with_all) + n, n_images), np.uint8)
    for times_N in times_MN[int(with_all) :]:
        drawn_N = rng.integers(0, n_images, n_images)
        # Counts are about Poisson(1), so the uint8 cap is never reached in practice.
        times_N[:] = np.minimum(np.bincount(drawn_N, minlength=n_images), 255)
    return times_MN


def _sortable(scores_CN: np.ndarray, first: int) -> np.ndarray:
    """Maps scores to unsigned integers in reverse order, so that larger scores come first. Ties stay ties."""
    wide = np.float32 if scores_CN.dtype.itemsize <= 4 else np.float64
    scores_CN = np.ascontiguousarray(scores_CN, wide) + wide(0)  # -0.0 becomes 0.0
    if np.isnan(scores_CN).any():
        row = first + int(np.isnan(scores_CN).any(axis=1).argmax())
        raise errors.UserError(
            f"row {row} of the scores (prototypes or traits) holds NaN. Fit the scorer again, or check its "
            "checkpoint."
        )
    kind = np.uint32 if wide is np.float32 else np.uint64
    bits_CN = scores_CN.view(kind)
    sign = kind(1) << kind(8 * bits_CN.itemsize - 1)
    return np.where(bits_CN & sign, bits_CN, ~bits_CN & ~sign)


@compiled.jit
def _sort(bits_N, key_2N, place_2N, count_Q):
    """Sorts images by bits, ascending, into key_2N[0] and place_2N[0], without those with the largest bits.

    Returns their number. It is a radix sort with 11-bit digits, which skips digits that all keys share.
    """
    last = bits_N.max()
    n, common, any_bits = 0, ~bits_N.dtype.type(0), bits_N.dtype.type(0)
    for i in range(len(bits_N)):
        if bits_N[i] != last:
            key_2N[0, n], place_2N[0, n] = bits_N[i], i
            common &= bits_N[i]
            any_bits |= bits_N[i]
            n += 1
    source = 0
    for shift in range(0, 8 * bits_N.itemsize, 11):
        if ((common ^ any_bits) >> bits_N.dtype.type(shift)) & bits_N.dtype.type(2047) == 0:
            continue
        count_Q[:] = 0
        for i in range(n):
            count_Q[(key_2N[source, i] >> bits_N.dtype.type(shift)) & bits_N.dtype.type(2047)] += 1
        total = 0
        for q in range(len(count_Q)):
            count_Q[q], total = total, total + count_Q[q]
        for i in range(n):
            key = key_2N[source, i]
            q = (key >> bits_N.dtype.type(shift)) & bits_N.dtype.type(2047)
            at = count_Q[q]
            count_Q[q] = at + 1
            key_2N[1 - source, at], place_2N[1 - source, at] = key, place_2N[source, i]
        source = 1 - source
    if source == 1:
        compiled.copy(key_2N[1, :n], key_2N[0])
        compiled.copy(place_2N[1, :n], place_2N[0])
    return n


@compiled.jit
def _matrix(bits_CN, has, unknown, n_positive_T, n_known_T, first, last, ap_CT):
    """Rows first to last of the AP matrix. unknown: of `_unknown`, or None, which leaves its code out."""
    n_N, n_T = bits_CN.shape[1], len(n_positive_T)
    key_2N, place_2N = np.empty((2, n_N), bits_CN.dtype), np.empty((2, n_N), np.int32)
    count_Q = np.empty(2048, np.int64)
    found_T, sum_T = np.empty(n_T, np.int64), np.empty(n_T)
    unknown_G = np.zeros(n_T, np.int64)
    start_N1, trait_n = has
    for c in range(first, last):
        n = _sort(bits_CN[c], key_2N, place_2N, count_Q)
        found_T[:] = 0
        sum_T[:] = 0.0
        unknown_G[:] = 0
        start = 0
        while start < n:
            end = start + 1
            while end < n and key_2N[0, end] == key_2N[0, start]:
                end += 1
            if unknown is not None:
                for place in place_2N[0, start:end]:
                    for i in range(unknown[0][place], unknown[0][place + 1]):
                        unknown_G[unknown[1][i]] += 1
            share = 1.0 / end
            if end == start + 1:
                image = place_2N[0, start]
                for i in range(start_N1[image], start_N1[image + 1]):
                    t = trait_n[i]
                    found_T[t] += 1
                    if unknown is not None:
                        share = 1.0 / (end - unknown_G[unknown[2][t]])
                    sum_T[t] += found_T[t] * share
            else:
                for place in place_2N[0, start:end]:
                    for i in range(start_N1[place], start_N1[place + 1]):
                        found_T[trait_n[i]] += 1
                for place in place_2N[0, start:end]:
                    for i in range(start_N1[place], start_N1[place + 1]):
                        t = trait_n[i]
                        if unknown is not None:
                            share = 1.0 / (end - unknown_G[unknown[2][t]])
                        sum_T[t] += found_T[t] * share
            start = end
        for t in range(n_T):
            p = n_positive_T[t]
            rest = (p - found_T[t]) * p / n_known_T[t] if p else 0.0
            ap_CT[c, t] = (sum_T[t] + rest) / p if p else np.nan


@compiled.jit
def _resampled(bits_TN, labels_TN, known_TN, image_N, times_GIL, n_first, first, last, ap_TGL, purity_TGL):
    """Traits first to last of `resampled_patches`. known_TN: None leaves its code out."""
    (n_G, _, n_L), n_N = times_GIL.shape, bits_TN.shape[1]
    key_2N, place_2N = np.empty((2, n_N), bits_TN.dtype), np.empty((2, n_N), np.int32)
    count_Q = np.empty(2048, np.int64)
    all_L, found_L, tied_L, total_L, p_L, before_L = np.empty((6, n_L), np.int32)
    sum_L, hits_L = np.empty((2, n_L))
    for t in range(first, last):
        n = _sort(bits_TN[t], key_2N, place_2N, count_Q)
        for g in range(n_G):
            for values_L in (all_L, found_L, total_L, p_L):
                values_L[:] = 0
            sum_L[:] = 0.0
            hits_L[:] = 0.0
            for i in range(n_N):
                if known_TN is not None and not known_TN[t, i]:
                    continue
                times_L = times_GIL[g, image_N[i]]
                for m in range(n_L):
                    total_L[m] += times_L[m]
                if labels_TN[t, i]:
                    for m in range(n_L):
                        p_L[m] += times_L[m]
            start, is_first = 0, n_first > 0
            while start < n:
                end, is_any = start, False
                tied_L[:] = 0
                if is_first:
                    compiled.copy(all_L, before_L)
                while end < n and key_2N[0, end] == key_2N[0, start]:
                    place = place_2N[0, end]
                    end += 1
                    if known_TN is not None and not known_TN[t, place]:
                        continue
                    times_L = times_GIL[g, image_N[place]]
                    for m in range(n_L):
                        all_L[m] += times_L[m]
                    if labels_TN[t, place]:
                        is_any = True
                        for m in range(n_L):
                            tied_L[m] += times_L[m]
                if is_any:
                    for m in range(n_L):
                        found_L[m] += tied_L[m]
                        sum_L[m] += tied_L[m] * (found_L[m] / max(all_L[m], 1))
                if is_first:
                    is_first = False
                    for m in range(n_L):
                        hits_L[m] += _hits(n_first - before_L[m], all_L[m] - before_L[m], tied_L[m])
                        is_first |= all_L[m] < min(n_first, total_L[m])
                start = end
            for m in range(n_L):
                p, others = p_L[m], total_L[m] - all_L[m]
                rest = (p - found_L[m]) * p / max(total_L[m], 1)
                ap_TGL[t, g, m] = (sum_L[m] + rest) / p if p else np.nan
                hits_L[m] += _hits(n_first - all_L[m], others, p - found_L[m])
                purity_TGL[t, g, m] = hits_L[m] / max(min(n_first, total_L[m]), 1)


@compiled.jit
def _hits(n_left, n_tied, n_positive):
    """Positives expected among n_left places that are filled from n_tied images in any order."""
    return min(n_left, n_tied) * n_positive / n_tied if n_left > 0 and n_tied > 0 else 0.0
