"""Many logistic regressions on the same inputs at once, by Newton's method with conjugate gradients.

A step solves H d = g by conjugate gradients (Dembo, Eisenstat and Steihaug 1982), which need H only in
products with d: two matrix products for all regressions. It is damped by ln(1 + m) / m, where m is the
largest change of a logit: with it the loss cannot rise (Sun and Tran-Dinh, Generalized self-concordant
functions, 2019).

N rows, E inputs (the last one is 1, for the intercept), C regressions.
"""

import beartype
import numpy as np
import scipy.special
from jaxtyping import Bool, Float64, jaxtyped

MAX_STEPS, MAX_INNER = 200, 200
"""Newton steps, and conjugate gradients in each. Most fits need fewer than 10 of both."""
FORCING = 0.1
"""Conjugate gradients end when the residual's norm has fallen by this factor."""


@jaxtyped(typechecker=beartype.beartype)
def fit(
    x_NE: Float64[np.ndarray, "N E"],
    label_NC: Bool[np.ndarray, "N C"],
    is_used_NC: Bool[np.ndarray, "N C"],
    penalty_C: Float64[np.ndarray, " C"],
    start_EC: Float64[np.ndarray, "E C"],
    precision: float = 1e-9,
) -> Float64[np.ndarray, "E C"]:
    """Minimises for each regression, over the rows that it uses, starting from `start_EC`,

        sum_n [log(1 + exp(z_n)) - y_n z_n] + penalty / 2 |w|^2,   z = x w,

    where |w| leaves out the last weight, as scikit-learn's LogisticRegression(C=1 / penalty) does.

    Args:
        x_NE: inputs with orthogonal columns converge fastest.
        precision: a fit ends when the next step would lower its mean loss by less.
    """
    w_EC, live_L = start_EC.copy(), np.flatnonzero(is_used_NC.any(axis=0))
    least_C, square_E = precision * is_used_NC.sum(axis=0), np.square(x_NE).sum(axis=0)
    for _ in range(MAX_STEPS):
        if not len(live_L):
            break
        w_EL, is_used_NL = w_EC[:, live_L], is_used_NC[:, live_L]
        penalty_EL = np.repeat(penalty_C[None, live_L], len(w_EC), axis=0)
        penalty_EL[-1] = 0
        share_NL = scipy.special.expit(x_NE @ w_EL)
        slope_NL = np.where(is_used_NL, share_NL - label_NC[:, live_L], 0.0)
        curve_NL = np.where(is_used_NL, share_NL * (1 - share_NL), 0.0)
        gradient_EL = x_NE.T @ slope_NL + penalty_EL * w_EL
        step_EL = _solve(x_NE, curve_NL, penalty_EL, square_E, gradient_EL)
        change_L = np.abs(np.where(is_used_NL, x_NE @ step_EL, 0.0)).max(axis=0)
        damping_L = np.where(change_L > 0.1, np.log1p(change_L) / np.maximum(change_L, 0.1), 1.0)
        w_EC[:, live_L] -= damping_L * step_EL
        live_L = live_L[(gradient_EL * step_EL).sum(axis=0) / 2 > least_C[live_L]]
    return w_EC


def _solve(
    x_NE: np.ndarray,
    curve_NL: np.ndarray,
    penalty_EL: np.ndarray,
    square_E: np.ndarray,
    gradient_EL: np.ndarray,
) -> np.ndarray:
    """Solves (x' curve x + penalty) step = gradient for each regression.

    The preconditioner takes each regression's mean curvature for all rows, and the inputs as orthogonal.
    """
    tiny = np.finfo(np.float64).tiny
    inverse_EL = 1 / (np.outer(square_E, curve_NL.mean(axis=0)) + penalty_EL + tiny)
    step_EL, rest_EL = np.zeros_like(gradient_EL), gradient_EL.copy()
    along_EL = inverse_EL * rest_EL
    size_L = (rest_EL * along_EL).sum(axis=0)
    enough_L = FORCING**2 * size_L
    for _ in range(MAX_INNER):
        image_EL = x_NE.T @ (curve_NL * (x_NE @ along_EL)) + penalty_EL * along_EL
        length_L = size_L / np.maximum((along_EL * image_EL).sum(axis=0), tiny)
        step_EL += length_L * along_EL
        rest_EL -= length_L * image_EL
        ahead_EL, last_L = inverse_EL * rest_EL, size_L
        size_L = (rest_EL * ahead_EL).sum(axis=0)
        if (size_L <= enough_L).all():
            break
        along_EL = ahead_EL + size_L / np.maximum(last_L, tiny) * along_EL
    return step_EL
