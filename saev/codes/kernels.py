"""CPU kernels: codes of images from those of their patches, and the largest codes of a row.

Shape letters: N images, R rows (patches), K latents, n codes sorted by row and latent.

`compiled.in_threads` runs kernels on ranges of images or rows. No result depends on the number of threads.
"""

import heapq

import numpy as np

from saev.compiled import jit


@jit
def pool(
    value_n, latent_n, start_R1, n_rows, n_latents, n_patches_N, n_N, out_latent_n, max_n, mean_n, first, last
):
    """Maximum and mean over patches of each latent that fires in an image, for images first ... last - 1.

    An image's results begin where its codes begin, because there are at most as many. n_N: their number.
    A latent that does not fire in a patch has code 0 there. n_rows: of an image. n_patches_N: those that are
    no padding.
    """
    best_K = np.zeros(n_latents, np.float32)
    total_K = np.zeros(n_latents, np.float64)
    fired_K = np.zeros(n_latents, np.int64)
    for i in range(first, last):
        begin, end = start_R1[i * n_rows], start_R1[(i + 1) * n_rows]
        for j in range(begin, end):
            k, value = latent_n[j], value_n[j]
            if fired_K[k] == 0 or value > best_K[k]:
                best_K[k] = value
            total_K[k] += value
            fired_K[k] += 1
        at = begin
        for k in range(n_latents):
            if fired_K[k] == 0:
                continue
            is_zero = best_K[k] < 0 and fired_K[k] < n_patches_N[i]
            out_latent_n[at], max_n[at] = k, 0 if is_zero else best_K[k]
            mean_n[at] = total_K[k] / n_patches_N[i]
            total_K[k], fired_K[k] = 0, 0
            at += 1
        n_N[i] = at - begin


@jit
def _bound(value_n, begin, end, n):
    """Returns the n-th largest of value_n[begin:end]."""
    heap = [value_n[begin + j] for j in range(n)]
    heapq.heapify(heap)
    for j in range(begin + n, end):
        if value_n[j] > heap[0]:
            heapq.heapreplace(heap, value_n[j])
    return heap[0]


@jit
def mark_largest(value_n, start_R1, n, is_kept_n, first, last):
    """Marks the n largest codes of rows first ... last - 1. Among equals, the lowest latents are kept."""
    for r in range(first, last):
        begin, end = start_R1[r], start_R1[r + 1]
        is_kept_n[begin:end] = True
        if end - begin <= n:
            continue
        bound = _bound(value_n, begin, end, n)
        n_equal = n
        for j in range(begin, end):
            n_equal -= value_n[j] > bound
        for j in range(begin, end):
            if value_n[j] == bound:
                is_kept_n[j] = n_equal > 0
                n_equal -= 1
            elif value_n[j] < bound:
                is_kept_n[j] = False


@jit
def largest(value_RK, n, out_value_Rn, out_latent_Rn, first, last):
    """The n largest values of rows first ... last - 1, by latent. Among equals, the lowest latents."""
    n_latents = value_RK.shape[1]
    for r in range(first, last):
        value_K = value_RK[r]
        bound = _bound(value_K, 0, n_latents, n)
        n_equal = n
        for k in range(n_latents):
            n_equal -= value_K[k] > bound
        at = 0
        for k in range(n_latents):
            if value_K[k] < bound or (value_K[k] == bound and n_equal <= 0):
                continue
            if value_K[k] == bound:
                n_equal -= 1
            out_value_Rn[r, at], out_latent_Rn[r, at] = value_K[k], k
            at += 1
