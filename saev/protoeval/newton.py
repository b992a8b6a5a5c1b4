"""Newton's method for one logistic regression of two numbers, whose sums over codes are taken over bins.

Its steps are damped by ln(1 + d) / d, where d is the largest change of w f + b of any code: with it the sum
cannot rise (Sun and Tran-Dinh, Generalized self-concordant functions, 2019).

Shape letters: J bins with codes, X their numbers: how many codes, their mean t, sums of (f - t)^i / i!.
"""

import numpy as np

from saev.compiled import jit, jit_sums

MAX_STEPS = 200
"""Newton steps. Most fits need fewer than 15."""
PRECISION = 1e-13
"""A fit ends when a step would lower the mean loss by less."""


@jit
def solve(node_XJ, low, high, n_zero, n_positive, n_coded_positive, total, ridge):
    """Newton's method. Returns w, b and the loss, summed over all patches.

    Args:
        low, high: smallest and largest code.
        n_zero: patches without a code.
        n_positive: patches of the class.
        n_coded_positive, total: those of them with a code, and the sum of these codes.
    """
    count_J, mean_J = node_XJ[0], node_XJ[1]
    n_coded = count_J.sum()
    n_all = n_coded + n_zero
    # A start that is right if all codes are equal.
    zero_share = (n_positive - n_coded_positive + 0.5) / (n_zero + 1)
    coded_share = (n_coded_positive + 0.5) / (n_coded + 1)
    b, w = np.log(zero_share / (1 - zero_share)), 0.0
    if n_zero == 0 or n_coded == 0:
        b = np.log(n_positive / (n_all - n_positive))
    elif low > 0:
        w = (np.log(coded_share / (1 - coded_share)) - b) / ((count_J * mean_J).sum() / n_coded)
    for _ in range(MAX_STEPS):
        g_b, g_w, h_bb, h_bw, h_ww = binned_sums(node_XJ, w, b)
        share = 1 / (1 + np.exp(-b))
        g_b += n_zero * share - n_positive
        h_bb += n_zero * share * (1 - share)
        g_w += ridge * w - total
        h_ww += ridge
        determinant = h_bb * h_ww - h_bw * h_bw
        if not determinant > 1e-14 * h_bb * h_ww:  # all codes are equal, or shares are 0 and 1
            h_bb, h_ww = h_bb * (1 + 1e-9) + 1e-12, h_ww * (1 + 1e-9) + 1e-12
            determinant = h_bb * h_ww - h_bw * h_bw
        step_b = (h_ww * g_b - h_bw * g_w) / determinant
        step_w = (h_bb * g_w - h_bw * g_b) / determinant
        gain = (g_b * step_b + g_w * step_w) / 2
        change = max(abs(step_b + step_w * low), abs(step_b + step_w * high))
        if n_zero > 0:
            change = max(change, abs(step_b))
        damping = np.log1p(change) / change if change > 0 else 1.0
        if change < 0.1:
            damping = 1.0
        b -= damping * step_b
        w -= damping * step_w
        if not gain > PRECISION * n_all:
            break
    loss = n_zero * _softplus(b) - n_positive * b - w * total
    for j in range(len(count_J)):
        z = w * mean_J[j] + b
        s = 1 / (1 + np.exp(-z))
        d1 = s * (1 - s)
        d2 = d1 * (1 - 2 * s)
        d3 = d1 * (1 - 6 * d1)
        d4 = d2 * (1 - 12 * d1)
        m2, m3, m4, m5 = node_XJ[2:, j]
        loss += count_J[j] * _softplus(z)
        loss += w * w * (d1 * m2 + w * (d2 * m3 + w * (d3 * m4 + w * d4 * m5)))
    return w, b, loss


@jit
def _softplus(z):
    """log(1 + exp(z))."""
    return max(z, 0.0) + np.log1p(np.exp(-abs(z)))


@jit
def _exp(x):
    """exp(x) for |x| < 700, in operations that a compiler turns into vector ones.

    It is right also where sums may be reordered: relative error 1e-13 then, else 2e-16.
    """
    whole = np.floor(x * 1.4426950408889634 + 0.5)
    shifted = whole + 6755399441055744.0  # its lowest bits are the whole number
    r = (x - whole * 0.6931471803691238) - whole * 1.9082149292705877e-10
    p = 1 / 39916800 + r * (1 / 479001600 + r / 6227020800)
    p = 1 / 40320 + r * (1 / 362880 + r * (1 / 3628800 + r * p))
    p = 1 / 120 + r * (1 / 720 + r * (1 / 5040 + r * p))
    p = 1 + r * (1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * p))))
    bits = np.int64(np.float64(shifted).view(np.int64) << 52) + np.int64(1023 << 52)
    return p * np.int64(bits).view(np.float64)


@jit_sums
def binned_sums(node_XJ, w, b):
    """Gradient and Hessian of the sum of log(1 + exp(w f + b)) over codes f.

    The Hessian takes the curvature at a bin's mean; it changes only the steps.
    """
    g_b = g_w = h_bb = h_bw = h_ww = 0.0
    n_J, t_J, m2_J, m3_J, m4_J, m5_J = node_XJ
    for j in range(len(t_J)):
        n, t, m2, m3, m4, m5 = n_J[j], t_J[j], m2_J[j], m3_J[j], m4_J[j], m5_J[j]
        s = 1 / (1 + _exp(-min(max(w * t + b, -600.0), 600.0)))
        d1 = s * (1 - s)
        d2 = d1 * (1 - 2 * s)
        d3 = d1 * (1 - 6 * d1)
        d4 = d2 * (1 - 12 * d1)
        d5 = d1 * (1 - 30 * d1 * (1 - 4 * d1))
        # Derivatives by z at t; a code at t + e has z larger by w e.
        total = n * s + w * w * (d2 * m2 + w * (d3 * m3 + w * (d4 * m4 + w * d5 * m5)))
        moment = w * (2 * d1 * m2 + w * (3 * d2 * m3 + w * (4 * d3 * m4 + w * 5 * d4 * m5)))
        g_b += total
        g_w += t * total + moment
        h_bb += n * d1
        h_bw += n * d1 * t
        h_ww += n * d1 * t * t + 2 * d1 * m2
    return g_b, g_w, h_bb, h_bw, h_ww
