"""Compiled passes over sparse codes. They are bounded by memory, and run in one thread.

B images of a block, P patches, X patches of a block, n codes, S latents, K top images, R sampled images,
G classes, E entries (an image shown for a latent).
"""

import numpy as np

from saev.compiled import jit

N_BINS = 64


@jit
def mix(seed, a, b):
    """A hash of two numbers (splitmix64's finaliser, Steele et al. 2014), for seeded samples."""
    x = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * (np.uint64(a) + np.uint64(1))
    x ^= np.uint64(0xC2B2AE3D27D4EB4F) * (np.uint64(b) + np.uint64(1))
    for _ in range(2):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


@jit
def _insert(value, position, value_K, position_K):
    """Inserts into a table that is sorted by descending value. Among equals the older one stays first."""
    at = len(value_K) - 1
    if not value > value_K[at]:
        return
    while at > 0 and value > value_K[at - 1]:
        value_K[at], position_K[at] = value_K[at - 1], position_K[at - 1]
        at -= 1
    value_K[at], position_K[at] = value, position


@jit
def rank(best_BS, first, value_SK, position_SK):
    """Adds the images at positions first, first + 1, ... to each latent's table of the largest values."""
    for b in range(best_BS.shape[0]):
        for s in range(best_BS.shape[1]):
            _insert(best_BS[b, s], first + b, value_SK[s], position_SK[s])


@jit
def merge(value_SK, position_SK, out_value_SK, out_position_SK):
    """Adds each latent's table of the largest values of later images to that of earlier ones."""
    for s in range(value_SK.shape[0]):
        for k in range(value_SK.shape[1]):
            _insert(value_SK[s, k], position_SK[s, k], out_value_SK[s], out_position_SK[s])


@jit
def _sample(key, position, value, n, key_R, position_R, value_R):
    """Keeps the R smallest keys, ascending. `n` are held. Returns the new number."""
    R = len(key_R)
    if n == R and not key < key_R[R - 1]:
        return n
    at = min(n, R - 1)
    while at > 0 and key < key_R[at - 1]:
        key_R[at], position_R[at], value_R[at] = key_R[at - 1], position_R[at - 1], value_R[at - 1]
        at -= 1
    key_R[at], position_R[at], value_R[at] = key, position, value
    return min(n + 1, R)


@jit
def collect(
    start_X1, latent_n, value_n, n_patches, first, n_shown_N, class_N, is_signed, is_positive, seed,
    fired_S, total_S, low_S, high_S, images_S, class_SG,
    value_SK, position_SK, sampled_S, key_SR, at_SR, value_SR,
):  # fmt: skip
    """Adds the images of a block to all statistics.

    Args:
        first: position of the block's first image.
        n_shown_N: patches of each image by position, without padding.
        class_N: class of each image by position, or -1.
        is_signed: values may be negative where a latent fires, and 0 elsewhere is the larger one.
        is_positive: images whose largest value is not positive are not ranked or sampled.
    """
    S = len(fired_S)
    peak_S, on_S = np.empty(S, np.float32), np.zeros(S, np.int32)
    touched_S = np.empty(S, np.int32)
    for b in range((len(start_X1) - 1) // n_patches):
        position, n_touched = first + b, 0
        for p in range(n_patches):
            x = b * n_patches + p
            for n in range(start_X1[x], start_X1[x + 1]):
                s, value = latent_n[n], value_n[n]
                fired_S[s] += 1
                total_S[s] += abs(value)
                low_S[s], high_S[s] = min(low_S[s], value), max(high_S[s], value)
                if on_S[s] == 0:
                    touched_S[n_touched] = s
                    n_touched += 1
                    peak_S[s] = value
                elif value > peak_S[s]:
                    peak_S[s] = value
                on_S[s] += 1
        for i in range(n_touched):
            s = touched_S[i]
            peak = peak_S[s]
            if is_signed and on_S[s] < n_shown_N[position]:
                peak = max(peak, np.float32(0))
            on_S[s] = 0
            images_S[s] += 1
            if class_SG.shape[1] and class_N[position] >= 0:
                class_SG[s, class_N[position]] += 1
            if is_positive and not peak > 0:
                continue
            _insert(peak, position, value_SK[s], position_SK[s])
            key = mix(seed, s, position)
            sampled_S[s] = _sample(key, position, peak, sampled_S[s], key_SR[s], at_SR[s], value_SR[s])


@jit
def largest(x_CS, value_CK, at_CK, c_start, c_end):
    """The K largest values of rows c_start to c_end, and their columns. Of equals, the lower column is first.

    Args:
        value_CK: filled with -inf.
        at_CK: filled with -1.
    """
    for c in range(c_start, c_end):
        for s in range(x_CS.shape[1]):
            _insert(x_CS[c, s], s, value_CK[c], at_CK[c])


@jit
def add_rows(x_CS, first, value_CK, at_CK, c_start, c_end):
    """Adds the values of rows c_start to c_end to their `largest`. Columns begin with number `first`."""
    for c in range(c_start, c_end):
        for s in range(x_CS.shape[1]):
            _insert(x_CS[c, s], first + s, value_CK[c], at_CK[c])


@jit
def add_columns(x_CS, first, value_SK, at_SK, s_start, s_end):
    """Adds the values of columns s_start to s_end to their `largest`. Rows begin with number `first`."""
    for c in range(len(x_CS)):
        for s in range(s_start, s_end):
            _insert(x_CS[c, s], first + c, value_SK[s], at_SK[s])


@jit
def bin_of(value, low, high):
    """The bin of a value between low and high."""
    if not high > low:
        return 0
    where = (np.float64(value) - np.float64(low)) / (np.float64(high) - np.float64(low))
    return min(int(where * N_BINS), N_BINS - 1)


@jit
def histogram(latent_n, value_n, low_S, high_S, bin_SH):
    """Counts values in equal bins between each latent's extremes."""
    for n in range(len(latent_n)):
        s = latent_n[n]
        bin_SH[s, bin_of(value_n[n], low_S[s], high_S[s])] += 1


@jit
def count_entries(
    start_X1,
    latent_n,
    value_n,
    n_patches,
    first,
    start_N1,
    latent_E,
    slot_S,
    only_positive,
    patches_E,
    peak_E,
):
    """Counts the patches that each entry shows, and finds its largest value.

    Args:
        start_N1: the entries of the image at position i are start[i] to start[i + 1], sorted by latent.
        slot_S: -1 everywhere; it is so again at the end.
    """
    for b in range((len(start_X1) - 1) // n_patches):
        e0, e1 = start_N1[first + b], start_N1[first + b + 1]
        _set_slots(e0, e1, latent_E, slot_S)
        for p in range(n_patches):
            x = b * n_patches + p
            for n in range(start_X1[x], start_X1[x + 1]):
                s, value = latent_n[n], value_n[n]
                e = slot_S[s]
                if e < 0 or (only_positive and not value > 0):
                    continue
                while e < e1 and latent_E[e] == s:
                    patches_E[e] += 1
                    peak_E[e] = max(peak_E[e], value)
                    e += 1
        for e in range(e0, e1):
            slot_S[latent_E[e]] = -1


@jit
def _set_slots(e0, e1, latent_E, slot_S):
    for i in range(e1 - e0):
        slot_S[latent_E[e1 - 1 - i]] = e1 - 1 - i


@jit
def fill_entries(
    start_X1, latent_n, value_n, n_patches, first, start_N1, latent_E, slot_S, only_positive,
    low_S, high_S, cursor_E, patch_m, heat_m,
):  # fmt: skip
    """Writes each entry's patches and their heat, from cursor[e] on. Other arguments as above."""
    for b in range((len(start_X1) - 1) // n_patches):
        e0, e1 = start_N1[first + b], start_N1[first + b + 1]
        _set_slots(e0, e1, latent_E, slot_S)
        for p in range(n_patches):
            x = b * n_patches + p
            for n in range(start_X1[x], start_X1[x + 1]):
                s, value = latent_n[n], value_n[n]
                e = slot_S[s]
                if e < 0 or (only_positive and not value > 0):
                    continue
                heat = heat_of(value, low_S[s], high_S[s])
                while e < e1 and latent_E[e] == s:
                    if cursor_E[e] >= 0:
                        patch_m[cursor_E[e]], heat_m[cursor_E[e]] = p, heat
                        cursor_E[e] += 1
                    e += 1
        for e in range(e0, e1):
            slot_S[latent_E[e]] = -1


@jit
def heat_of(value, low, high):
    """0 at low to 255 at high, at least 1: the patch is shown."""
    where = (np.float64(value) - np.float64(low)) / max(np.float64(high) - np.float64(low), 1e-30)
    return np.uint8(min(255, max(1, round(255 * where))))


# ---- latents that fire together ----


@jit
def sample_patches(start_X1, latent_n, first, share, seed, count_X, out_n):
    """Copies the codes of a seeded sample of patches, of which about `share` are taken.

    Args:
        first: number of the first patch.

    Returns:
        The numbers of sampled patches and of their codes.
    """
    limit = np.uint64(min(share, 0.9999999999) * 2.0**64)
    rows, m = 0, 0
    for x in range(len(start_X1) - 1):
        if share >= 1 or mix(seed, x + first, 0) < limit:
            count_X[rows] = start_X1[x + 1] - start_X1[x]
            rows += 1
            for n in range(start_X1[x], start_X1[x + 1]):
                out_n[m] = latent_n[n]
                m += 1
    return rows, m


@jit
def together(start_X1, latent_n, start_S1, patch_n, chosen_C, together_CK, count_CK, c_start, c_end):
    """The latents that fire most often on the same sampled patches as chosen[c_start:c_end], and how often.

    Args:
        start_X1, latent_n: codes by patch.
        start_S1, patch_n: patches by latent.
        together_CK: filled with -1; count_CK: filled with 0.
    """
    S = len(start_S1) - 1
    count_S, touched_S = np.zeros(S, np.int32), np.empty(S, np.int32)
    for c in range(c_start, c_end):
        s, n_touched = chosen_C[c], 0
        for i in range(start_S1[s], start_S1[s + 1]):
            x = patch_n[i]
            for j in range(start_X1[x], start_X1[x + 1]):
                other = latent_n[j]
                if count_S[other] == 0:
                    touched_S[n_touched] = other
                    n_touched += 1
                count_S[other] += 1
        for i in range(n_touched):
            other = touched_S[i]
            n = count_S[other]
            count_S[other] = 0
            if other == s:
                continue
            # larger counts first, then lower numbers
            at = together_CK.shape[1] - 1
            if not _is_before(n, other, count_CK[c, at], together_CK[c, at]):
                continue
            while at > 0 and _is_before(n, other, count_CK[c, at - 1], together_CK[c, at - 1]):
                count_CK[c, at], together_CK[c, at] = count_CK[c, at - 1], together_CK[c, at - 1]
                at -= 1
            count_CK[c, at], together_CK[c, at] = n, other


@jit
def _is_before(n, s, other_n, other_s):
    return n > other_n or (n == other_n and s < other_s)


@jit
def by_latent(start_X1, latent_n, start_S1, patch_n):
    """Patches of each latent, ascending, from the codes by patch."""
    S = len(start_S1) - 1
    start_S1[:] = 0
    for n in range(len(latent_n)):
        start_S1[latent_n[n] + 1] += 1
    for s in range(S):
        start_S1[s + 1] += start_S1[s]
    cursor_S = start_S1[:-1].copy()
    for x in range(len(start_X1) - 1):
        for n in range(start_X1[x], start_X1[x + 1]):
            patch_n[cursor_S[latent_n[n]]] = x
            cursor_S[latent_n[n]] += 1
