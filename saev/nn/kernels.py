"""CPU kernels, compiled on first use: they find the codes of a batch, sort them, and update weights.

Shape letters: B batch, D d_vit, S latents, G groups, n codes of the batch, sorted by row and latent.

Codes are found from pre-activations in float32 or in bfloat16. The latter are called "screened" and cost a
quarter on processors that multiply bfloat16. Every pre-activation then lies within known bounds of its
screened value. Only latents whose bounds allow them to fire are computed again in float32, so the result is
that of float32. With u = 2^-8 (bfloat16's unit roundoff) and exact bias b, |x . w - fl(x . w)| <= (2u + u^2)
|x| |w| + u |fl(x . w)|.

`compiled.in_threads` runs kernels on ranges of rows. No result depends on the number of threads.
"""

import numpy as np
from torch import Tensor

from saev.compiled import copy, jit, jit_sums

ROUNDOFF = 2.0**-8
"""Unit roundoff of bfloat16."""
MARGIN = 1.01 * (2 * ROUNDOFF + ROUNDOFF**2)
"""Bound of |x . w - x~ . w~| / (|x| |w|) for x~, w~ rounded to bfloat16, plus 1% for float32 sums."""


def available(tensor: Tensor) -> bool:
    """Do the kernels run where this tensor is? If not, torch operations (and Triton) do the same."""
    return not tensor.is_cuda


# ---- codes of a row ----


@jit
def _kth_largest(value_n, n, k):
    """Returns the k-th largest (from 1) of value_n[:n]. Reorders them."""
    low, high = 0, n - 1
    while low < high:
        pivot = value_n[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while value_n[i] > pivot:
                i += 1
            while value_n[j] < pivot:
                j -= 1
            if i <= j:
                value_n[i], value_n[j] = value_n[j], value_n[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return value_n[k - 1]


@jit
def _bounds(pre_S, is_screened, b_S, norm_S, margin, low_S, high_S):
    """Fills low_S and high_S with bounds of the row's pre-activations."""
    if is_screened:
        bits_S = low_S.view(np.uint32)  # bfloat16 is the upper half of float32
        for s in range(len(pre_S)):
            bits_S[s] = np.uint32(pre_S[s]) * 65536
        for s in range(len(pre_S)):
            pre = low_S[s]
            error = margin * norm_S[s] + np.float32(ROUNDOFF) * abs(pre)
            low_S[s] = pre + b_S[s] - error
            high_S[s] = pre + b_S[s] + error
    else:
        for s in range(len(pre_S)):
            low_S[s] = pre_S[s]
            high_S[s] = pre_S[s]


@jit
def _collect(value_S, cutoff_S, out_n):
    """Writes the latents whose value is above `cutoff_S` to out_n; returns their number."""
    n = 0
    n_words = len(value_S) // 64
    for word in range(n_words):
        start = word * 64
        fires = np.uint64(0)  # one bit per latent: 64 comparisons take a few instructions
        for i in range(64):
            is_above = np.uint64(value_S[start + i] > cutoff_S[start + i])
            fires |= is_above << np.uint64(i)
        while fires:
            lowest = fires & (~fires + np.uint64(1))
            fires ^= lowest
            s = start
            while lowest > np.uint64(1):
                lowest >>= np.uint64(1)
                s += 1
            out_n[n] = s
            n += 1
    for s in range(n_words * 64, len(value_S)):
        out_n[n] = s
        n += value_S[s] > cutoff_S[s]
    return n


@jit
def _top_k_bound(value_S, k, group_G, scratch_G):
    """Returns a bound that at least k values reach: the k-th largest maximum of groups of values.

    -inf if there are at most k groups.
    """
    G = len(group_G)
    if k >= G:
        return -np.inf
    n_full = len(value_S) // G
    for g in range(G):
        group_G[g] = value_S[g]
    for i in range(1, n_full):
        for g in range(G):
            value = value_S[i * G + g]
            group_G[g] = value if value > group_G[g] else group_G[g]
    for s in range(n_full * G, len(value_S)):
        g = s - n_full * G
        group_G[g] = value_S[s] if value_S[s] > group_G[g] else group_G[g]
    copy(group_G, scratch_G)
    return _kth_largest(scratch_G, G, k)


@jit_sums
def _dot(a_D, b_D):
    total = a_D[0] * b_D[0]
    for d in range(1, len(a_D)):
        total += a_D[d] * b_D[d]
    return total


@jit
def _rescore(x_D, W_SD, b_S, latent_n, n, value_n):
    for i in range(n):
        value_n[i] = _dot(x_D, W_SD[latent_n[i]]) + b_S[latent_n[i]]


# ---- codes of rows ----


@jit
def top_k(pre_BS, is_screened, x_BD, W_SD, b_S, norm_S, margin_B, k, n_B, value_BK, latent_BK):
    """Finds the k largest positive pre-activations of each row; of ties, the lowest latents.

    Fills the first n_B[b] places of row b in value_BK and latent_BK.
    """
    B, S = pre_BS.shape
    G = max(S // 16, min(S, 4 * k))
    low_S, high_S = np.empty(S, x_BD.dtype), np.empty(S, x_BD.dtype)
    cutoff_S = np.empty(S, x_BD.dtype)
    group_G, scratch_G = np.empty(G, x_BD.dtype), np.empty(G, x_BD.dtype)
    latent_n, value_n, scratch_n = (np.empty(S, np.int32), np.empty(S, x_BD.dtype), np.empty(S, x_BD.dtype))
    for b in range(B):
        _bounds(pre_BS[b], is_screened, b_S, norm_S, margin_B[b], low_S, high_S)
        bound = _top_k_bound(low_S, k, group_G, scratch_G)
        # the next lower number, because values equal to `bound` are wanted too
        cutoff_S[:] = max(np.nextafter(np.float32(bound), np.float32(-np.inf)), 0)
        n = _collect(high_S, cutoff_S, latent_n)
        if is_screened:
            _rescore(x_BD[b], W_SD, b_S, latent_n, n, value_n)
        else:
            for i in range(n):
                value_n[i] = pre_BS[b, latent_n[i]]
        n_B[b] = _trim(value_n, latent_n, n, k, scratch_n, value_BK[b], latent_BK[b])


@jit
def _trim(value_n, latent_n, n, k, scratch_n, value_K, latent_K):
    """Copies the k largest of n values if they are positive; returns their number."""
    smallest, n_ties = value_n.dtype.type(0), 0
    if n > k:
        copy(value_n[:n], scratch_n)
        smallest = _kth_largest(scratch_n, n, k)
        n_ties = k
        for i in range(n):
            n_ties -= value_n[i] > smallest
    n_kept = 0
    for i in range(n):
        is_tie = n > k and value_n[i] == smallest and n_ties > 0
        if value_n[i] > 0 and (value_n[i] > smallest or is_tie):
            n_ties -= is_tie
            value_K[n_kept] = value_n[i]
            latent_K[n_kept] = latent_n[i]
            n_kept += 1
    return n_kept


@jit
def above(pre_BS, is_screened, x_BD, W_SD, b_S, norm_S, margin_B, cutoff_S, n_B, value_n, latent_n):
    """Finds pre-activations above `cutoff_S`, row by row; returns their number (-1: value_n is too short)."""
    B, S = pre_BS.shape
    low_S, high_S = np.empty(S, x_BD.dtype), np.empty(S, x_BD.dtype)
    found_n, score_n = np.empty(S, np.int32), np.empty(S, x_BD.dtype)
    n = 0
    for b in range(B):
        if is_screened:
            _bounds(pre_BS[b], is_screened, b_S, norm_S, margin_B[b], low_S, high_S)
            n_found = _collect(high_S, cutoff_S, found_n)
            _rescore(x_BD[b], W_SD, b_S, found_n, n_found, score_n)
        else:
            n_found = _collect(pre_BS[b], cutoff_S, found_n)
            for i in range(n_found):
                score_n[i] = pre_BS[b, found_n[i]]
        if n + n_found > len(value_n):
            return -1
        start = n
        for i in range(n_found):
            if score_n[i] > cutoff_S[found_n[i]]:
                value_n[n] = score_n[i]
                latent_n[n] = found_n[i]
                n += 1
        n_B[b] = n - start
    return n


# ---- order ----


@jit
def by_latent(start_O1, latent_n, latent_start_S1, order_n, row_n):
    """Stable counting sort: fills order_n with the codes sorted by latent, and row_n with their rows."""
    S = len(latent_start_S1) - 1
    latent_start_S1[:] = 0
    for i in range(len(latent_n)):
        latent_start_S1[latent_n[i] + 1] += 1
    for s in range(S):
        latent_start_S1[s + 1] += latent_start_S1[s]
    at_S = latent_start_S1[:S].copy()
    for o in range(len(start_O1) - 1):
        for i in range(start_O1[o], start_O1[o + 1]):
            at = at_S[latent_n[i]]
            order_n[at] = i
            row_n[at] = o
            at_S[latent_n[i]] = at + 1


# ---- weights ----


@jit_sums
def row_dots(w_SD, g_SD, dots_S3, first, last):
    """Fills dots_S3 with g . w, g . g and w . w of rows first to last."""
    for s in range(first, last):
        gw, gg, ww = w_SD.dtype.type(0), w_SD.dtype.type(0), w_SD.dtype.type(0)
        for d in range(w_SD.shape[1]):
            gw += g_SD[s, d] * w_SD[s, d]
            gg += g_SD[s, d] * g_SD[s, d]
            ww += w_SD[s, d] * w_SD[s, d]
        dots_S3[s, 0], dots_S3[s, 1], dots_S3[s, 2] = gw, gg, ww


@jit_sums
def adam_rows(w_SD, g_SD, m_SD, v_SD, along_S, factors, is_unit, first, last):
    """Adam (Kingma & Ba 2015) on rows first to last, with gradient clip (g - along w). is_unit: normalises.

    factors: clip, step size, beta1, beta2, eps, 1 / sqrt(1 - beta2^t), in the weights' dtype.
    """
    clip, step, beta1, beta2, eps, correction = factors
    one, min_norm = w_SD.dtype.type(1), w_SD.dtype.type(1e-8)
    for s in range(first, last):
        along = along_S[s]
        norm2 = w_SD.dtype.type(0)
        for d in range(w_SD.shape[1]):
            g = clip * (g_SD[s, d] - along * w_SD[s, d])
            m = beta1 * m_SD[s, d] + (one - beta1) * g
            v = beta2 * v_SD[s, d] + (one - beta2) * g * g
            w = w_SD[s, d] - step * m / (np.sqrt(v) * correction + eps)
            m_SD[s, d], v_SD[s, d], w_SD[s, d] = m, v, w
            norm2 += w * w
        if is_unit:
            scale = one / max(np.sqrt(norm2), min_norm)
            for d in range(w_SD.shape[1]):
                w_SD[s, d] *= scale


# ---- reconstruction ----


@jit_sums
def reconstruct(
    x_BD, value_n, latent_n, start_B1, W_SD, b_D, end_P, x_hat_BD, error_B, g_BPD, g_n, first, last
):
    """Reconstructs samples first to last by each prefix of the dictionary. x_hat is the last prefix's.

    error[b] is the squared error summed over prefixes and dimensions. Gradients are of error / 2: g[b, p]
    with respect to the contribution of block p's latents (the summed errors of prefix p and all longer ones),
    g[n] with respect to code n.
    """
    D, P = W_SD.shape[1], len(end_P)
    sum_D = np.empty(D, W_SD.dtype)
    for b in range(first, last):
        copy(b_D, sum_D)
        j, stop = start_B1[b], start_B1[b + 1]
        total = W_SD.dtype.type(0)
        for p in range(P):
            while j < stop and latent_n[j] < end_P[p]:
                value, s = value_n[j], latent_n[j]
                for d in range(D):
                    sum_D[d] += value * W_SD[s, d]
                j += 1
            for d in range(D):
                error = sum_D[d] - x_BD[b, d]
                g_BPD[b, p, d] = error
                total += error * error
        error_B[b] = total
        copy(sum_D, x_hat_BD[b])
        for p in range(P - 2, -1, -1):
            for d in range(D):
                g_BPD[b, p, d] += g_BPD[b, p + 1, d]
        p = 0
        for j in range(start_B1[b], stop):
            while latent_n[j] >= end_P[p]:
                p += 1
            g_n[j] = _dot(g_BPD[b, p], W_SD[latent_n[j]])


@jit
def bag_dot(a_OD, table_RD, index_n, start_O1, out_n, first, last):
    """out[j] = <a[o], table[index[j]]> for the codes j of rows o = first to last."""
    for o in range(first, last):
        for j in range(start_O1[o], start_O1[o + 1]):
            out_n[j] = _dot(a_OD[o], table_RD[index_n[j]])


@jit
def n_positive(f_BS, first, last):
    """Counts, for each latent, the samples first to last in which it is positive."""
    n_S = np.zeros(f_BS.shape[1], np.int32)
    for b in range(first, last):
        for s in range(len(n_S)):
            n_S[s] += f_BS[b, s] > 0
    return n_S


@jit
def keep_from(value_n, latent_n, n_B, smallest):
    """Drops values below `smallest` in place; returns the number that stay."""
    n, at = 0, 0
    for b in range(len(n_B)):
        start = n
        for i in range(at, at + n_B[b]):
            if value_n[i] >= smallest:
                value_n[n] = value_n[i]
                latent_n[n] = latent_n[i]
                n += 1
        at += n_B[b]
        n_B[b] = n - start
    return n
