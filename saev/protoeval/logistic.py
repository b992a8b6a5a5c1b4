"""The logistic regression of every class on every single latent: K x C fits of two numbers each.

For latent k and class c, weight w and intercept b minimise, over the labelled patches n,

    sum_n [log(1 + exp(w f_n + b)) - y_n (w f_n + b)] + w^2 / (2 c_reg)

as scikit-learn's LogisticRegression(C=c_reg) does. Patches on which the latent does not fire share one term,
so a fit costs as much as the latent's codes. A latent with more codes than NODES is binned: a bin stands for
its codes by their sums of powers, and the terms of the sum are expanded to the fifth order around its mean.

Newton's steps are damped by ln(1 + d) / d, where d is the largest change of w f + b of any code: with it the
sum cannot rise (Sun and Tran-Dinh, Generalized self-concordant functions, 2019).

Shape letters: K latents, C classes, N patches, n codes, J nodes (codes or bins).
"""

import dataclasses
import typing as tp

import beartype
import numpy as np
from jaxtyping import Float64, Int32, Int64, Integer, Shaped, jaxtyped

from saev import compiled, errors
from saev.compiled import jit, jit_sums

NODES = 512
"""Codes of a latent that are used one by one; bins of a latent with more."""
MAX_STEPS = 200
"""Newton steps. Most fits need fewer than 15."""
PRECISION = 1e-13
"""A fit ends when a step would lower the mean loss by less."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Fits:
    """Regressions of each class on each latent. NaN for a class that all patches have, or none."""

    w_KC: Float64[np.ndarray, "K C"]
    b_KC: Float64[np.ndarray, "K C"]
    loss_KC: Float64[np.ndarray, "K C"]
    """Mean loss in nats, without the penalty."""
    bias_loss_C: Float64[np.ndarray, " C"]
    """Mean loss of the intercept alone: the entropy of the class's frequency."""

    @property
    def r_KC(self) -> Float64[np.ndarray, "K C"]:
        """Probe R: 1 - loss / loss of the intercept alone. 1 is a perfect latent, 0 one that says nothing."""
        return 1 - self.loss_KC / self.bias_loss_C


@errors.no_type_check
def fit_each_latent(codes_NK: tp.Any, class_N: tp.Any, n_classes: int, *, c_reg: float = 1.0) -> Fits:
    """Fits every class on every latent.

    Args:
        codes_NK: codes (patches, latents), as a scipy.sparse matrix or a NumPy array.
        class_N: each patch's class, from 0. Patches with a negative class are left out.
        n_classes: number of classes.
        c_reg: inverse strength of the penalty on w, as scikit-learn's C.

    Raises:
        UserError: the shapes do not fit, a class is too large, or a code is not finite.
    """
    codes, class_N = _as_csc(codes_NK), np.asarray(class_N)
    if class_N.shape != codes.shape[:1] or class_N.dtype.kind not in "iu":
        raise errors.UserError(
            f"class_N: shape {class_N.shape}, {class_N.dtype}; pass one integer for each of the "
            f"{codes.shape[0]} patches."
        )
    if class_N.max(initial=-1) >= n_classes:
        raise errors.UserError(f"class_N: has class {class_N.max()}, but there are {n_classes} classes.")
    if not np.isfinite(codes.data).all():
        raise errors.UserError("codes_NK: has NaN or infinite codes.")
    if not c_reg > 0:
        raise errors.UserError(f"c_reg {c_reg}: pass a positive number.")
    n_C = np.bincount(class_N[class_N >= 0], minlength=n_classes)
    return _fit(
        codes.indptr.astype(np.int64), codes.indices, codes.data, class_N.astype(np.int32), n_C, 1 / c_reg
    )


def _as_csc(codes_NK: tp.Any) -> tp.Any:
    """A matrix of scipy.sparse, by columns."""
    if hasattr(codes_NK, "tocsc"):
        return codes_NK.tocsc()
    import scipy.sparse  # which takes a while

    return scipy.sparse.csc_array(np.asarray(codes_NK))


@jaxtyped(typechecker=beartype.beartype)
def _fit(
    start_B: Int64[np.ndarray, " B"],
    row_n: Integer[np.ndarray, " n"],
    code_n: Shaped[np.ndarray, " n"],
    class_N: Int32[np.ndarray, " N"],
    n_C: Int64[np.ndarray, " C"],
    ridge: float,
) -> Fits:
    K, C = len(start_B) - 1, len(n_C)
    w_KC, b_KC, loss_KC = (np.full((K, C), np.nan) for _ in range(3))

    def each(part: range) -> None:
        for k in part:
            codes = slice(start_B[k], start_B[k + 1])
            _fit_latent(row_n[codes], code_n[codes], class_N, n_C, ridge, w_KC[k], b_KC[k], loss_KC[k])

    # Small parts, because latents differ in their numbers of codes.
    compiled.each_in_threads(each, [range(at, min(at + 16, K)) for at in range(0, K, 16)])
    share_C = n_C / max(1, n_C.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        bias_loss_C = -(share_C * np.log(share_C) + (1 - share_C) * np.log1p(-share_C))
    return Fits(w_KC, b_KC, loss_KC, bias_loss_C)


@jit
def _fit_latent(row_n, code_n, class_N, n_C, ridge, w_C, b_C, loss_C):
    """Fits all classes on one latent."""
    n_all, n_coded, largest = n_C.sum(), 0, 0.0
    value_n, positive_C, total_C = np.empty(len(code_n)), np.zeros(len(n_C)), np.zeros(len(n_C))
    for i in range(len(code_n)):
        c = class_N[row_n[i]]
        if c >= 0 and code_n[i] != 0:
            value_n[n_coded] = code_n[i]
            positive_C[c] += 1
            total_C[c] += code_n[i]
            largest = max(largest, abs(code_n[i]))
            n_coded += 1
    scale = largest if largest > 0 else 1.0
    value_n = value_n[:n_coded] / scale
    node_JX = _nodes(value_n)
    low = value_n.min() if n_coded else 0.0
    high = value_n.max() if n_coded else 0.0
    for c in range(len(n_C)):
        if 0 < n_C[c] < n_all:
            w, b, loss = _solve(
                node_JX,
                low,
                high,
                n_all - n_coded,
                n_C[c],
                positive_C[c],
                total_C[c] / scale,
                ridge / scale**2,
            )
            w_C[c], b_C[c], loss_C[c] = w / scale, b, loss / n_all


@jit
def _nodes(value_n):
    """(6, J): each node's number of codes, their mean t, and the sums of (f - t)^i / i! for i = 2, ..., 5."""
    n = len(value_n)
    if n <= NODES:
        node_XJ = np.zeros((6, n))
        node_XJ[0] = 1
        node_XJ[1] = value_n
        return node_XJ
    low, high = value_n.min(), value_n.max()
    node_XJ, bin_n = np.zeros((6, NODES)), np.empty(n, np.int64)
    per_bin = NODES / (high - low) if high > low else 0.0
    for i in range(n):
        j = min(NODES - 1, int((value_n[i] - low) * per_bin))
        bin_n[i] = j
        node_XJ[0, j] += 1
        node_XJ[1, j] += value_n[i]
    for j in range(NODES):
        if node_XJ[0, j] > 0:
            node_XJ[1, j] /= node_XJ[0, j]
    for i in range(n):
        j = bin_n[i]
        delta = value_n[i] - node_XJ[1, j]
        square = delta * delta
        node_XJ[2, j] += square / 2
        node_XJ[3, j] += square * delta / 6
        node_XJ[4, j] += square * square / 24
        node_XJ[5, j] += square * square * delta / 120
    n_used = 0
    for j in range(NODES):
        if node_XJ[0, j] > 0:
            node_XJ[:, n_used] = node_XJ[:, j]
            n_used += 1
    return node_XJ[:, :n_used].copy()


@jit
def _solve(node_XJ, low, high, n_zero, n_positive, n_coded_positive, total, ridge):
    """Newton's method. Returns w, b and the loss, summed over all patches.

    Args:
        low, high: smallest and largest code.
        n_zero: patches without a code.
        n_positive: patches of the class.
        n_coded_positive, total: those of them with a code, and the sum of these codes.
    """
    count_J, mean_J = node_XJ[0], node_XJ[1]
    n_coded, is_binned = count_J.sum(), len(count_J) > 0 and count_J.max() > 1
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
        if is_binned:
            g_b, g_w, h_bb, h_bw, h_ww = _binned_sums(node_XJ, w, b)
        else:
            g_b, g_w, h_bb, h_bw, h_ww = _sums(mean_J, w, b)
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
        loss += count_J[j] * _softplus(z)
        if is_binned:
            s = 1 / (1 + np.exp(-z))
            d1 = s * (1 - s)
            d2 = d1 * (1 - 2 * s)
            d3 = d1 * (1 - 6 * d1)
            d4 = d2 * (1 - 12 * d1)
            m2, m3, m4, m5 = node_XJ[2:, j]
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
def _sums(code_J, w, b):
    """Gradient and Hessian of the sum of log(1 + exp(w f + b)) over codes f."""
    g_b = g_w = h_bb = h_bw = h_ww = 0.0
    for j in range(len(code_J)):
        f = code_J[j]
        s = 1 / (1 + _exp(-min(max(w * f + b, -600.0), 600.0)))
        d = s * (1 - s)
        g_b += s
        g_w += s * f
        h_bb += d
        h_bw += d * f
        h_ww += d * f * f
    return g_b, g_w, h_bb, h_bw, h_ww


@jit_sums
def _binned_sums(node_XJ, w, b):
    """As `_sums`, over bins. The Hessian takes the curvature at a bin's mean; it changes only the steps."""
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
