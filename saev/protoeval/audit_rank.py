"""Ranks prototypes by the path of an L1-logistic model of the image labels.

For each trait t, with standardised scores x of the train images that have a known label y:

    minimise over w_t and b_t:   mean of log(1 + exp(z)) - y z, z = x w_t + b_t,   + penalty * sum of |w_t|

The penalty falls from the one above which all weights are 0. Prototypes rank in the order in which they enter
the model of any trait; those of one step by the sum of |w_t| over traits.

At each penalty only some prototypes are fitted: those that the strong rule keeps (Tibshirani et al. 2012,
doi:10.1111/j.1467-9868.2011.01004.x). The gradients of all others are checked afterwards, so the solution is
that of all prototypes.

N train images, n of them with a known label, K prototypes, C of them, S those that are fitted, Z the
intercept and these, T traits, B prototypes that are ranked.
"""

import typing as tp

import beartype
import numpy as np
import scipy.special
from jaxtyping import Bool, Float32, Float64, Int64, jaxtyped

from saev.formats import patchresults
from saev.protoeval import choose, score, sparse

REVISION = 2
"""Increment it when rankings change: then older ones are not resumed."""
RATIO, N_STEPS = 10 ** (-1 / 20), 60
"""Of consecutive penalties, and their number: down to a thousandth of the largest."""
SLACK = 0.01
"""By how much a gradient may exceed the penalty, relative to it."""


class Images(tp.NamedTuple):
    """Standardised scores of the train images by a scorer's prototypes, read in blocks."""

    train: score.Split
    first: int
    """Index of the first prototype, counted over all scorers."""
    size: int
    """Prototypes of a block."""
    mean_K: Float32[np.ndarray, " K"]
    scale_K: Float32[np.ndarray, " K"]
    """1 / standard deviation; 0 for a prototype whose scores are all equal."""

    def gradients(self, rest_NT: Float64[np.ndarray, "N T"]) -> Float32[np.ndarray, "K T"]:
        """Products of each prototype's scores with each trait's residuals."""
        rest_NT, n_K = rest_NT.astype(np.float32), len(self.mean_K)
        blocks = [np.arange(k, min(k + self.size, n_K)) for k in range(0, n_K, self.size)]
        return np.concatenate([self.rows(k_C) @ rest_NT for k_C in blocks])

    def rows(self, k_C: Int64[np.ndarray, " C"]) -> Float32[np.ndarray, "C N"]:
        x_CN = self.train.of(self.first + k_C)
        x_CN -= self.mean_K[k_C, None]
        x_CN *= self.scale_K[k_C, None]
        return x_CN


def images(train: score.Split, first: int, n_prototypes: int, memory_gb: float) -> Images:
    """The scores of prototypes first ... first + n_prototypes - 1 of all scorers'."""
    size = max(1, int(memory_gb * 1e9 / (12 * len(train.labels_NT))))
    mean_K, scale_K = np.empty((2, n_prototypes), np.float32)
    for k in range(0, n_prototypes, size):
        some = slice(k, min(k + size, n_prototypes))
        x_CN = train.of(slice(first + some.start, first + some.stop))
        std_C = np.where(np.ptp(x_CN, axis=1) > 0, x_CN.std(axis=1, dtype=np.float64), np.inf)
        mean_K[some], scale_K[some] = x_CN.mean(axis=1, dtype=np.float64), 1 / std_C
    return Images(train, first, size, mean_K, scale_K)


@jaxtyped(typechecker=beartype.beartype)
def rank(
    x: Images, labels_NT: Bool[np.ndarray, "N T"], known_NT: Bool[np.ndarray, "N T"] | None, n: int
) -> patchresults.Ranking:
    """The first n prototypes. Those that do not enter the model come last, by their largest gradient.

    The path ends once n prototypes have entered. Traits that all images have, or none, are left out.
    """
    n_K, n_T = len(x.mean_K), labels_NT.shape[1]
    known_NT = np.ones_like(labels_NT) if known_NT is None else known_NT
    n_known_T = known_NT.sum(axis=0).clip(min=1)
    rest_NT = known_NT * (labels_NT - (labels_NT & known_NT).sum(axis=0) / n_known_T) / n_known_T
    gradient_KT = np.abs(x.gradients(rest_NT))
    largest = penalty = float(gradient_KT.max())
    step_K, size_K = np.full(n_K, N_STEPS), np.zeros(n_K)
    trait_K, weight_K = np.full(n_K, -1), np.zeros(n_K)
    w_KT, b_T = np.zeros((n_K, n_T), np.float32), np.zeros(n_T)
    for step in range(N_STEPS if largest > 0 else 0):
        before, penalty = penalty, penalty * RATIO
        is_fitted_KT = (gradient_KT >= 2 * penalty - before) | (w_KT != 0)
        todo_T = is_fitted_KT.any(axis=0)
        while todo_T.any():
            for t in np.flatnonzero(todo_T).tolist():
                known_N, k_S = known_NT[:, t], np.flatnonzero(is_fitted_KT[:, t])
                x_Sn, start_Z = x.rows(k_S)[:, known_N], np.append(b_T[t], w_KT[k_S, t])
                weight_Z, rest_NT[known_N, t] = _fit(x_Sn, labels_NT[known_N, t], penalty, start_Z)
                b_T[t], w_KT[k_S, t] = weight_Z[0], weight_Z[1:]
            gradient_KT = np.abs(x.gradients(rest_NT))
            new_KT = (gradient_KT > penalty * (1 + SLACK)) & ~is_fitted_KT
            is_fitted_KT |= new_KT
            todo_T = new_KT.any(axis=0)
        k_S = np.flatnonzero((w_KT != 0).any(axis=1) & (step_K == N_STEPS))
        step_K[k_S], size_K[k_S] = step, np.abs(w_KT[k_S]).sum(axis=1)
        trait_K[k_S] = np.abs(w_KT[k_S]).argmax(axis=1)
        weight_K[k_S] = w_KT[k_S, trait_K[k_S]]
        if (step_K < N_STEPS).sum() >= n:
            break
    size_K = np.where(step_K < N_STEPS, size_K, gradient_KT.max(axis=1)).round(choose.AP_DIGITS)
    order_B = np.lexsort((np.arange(n_K), -size_K, step_K))[:n]
    penalty_B = np.where(step_K[order_B] < N_STEPS, RATIO ** (step_K[order_B] + 1.0), np.nan)
    return patchresults.Ranking(order_B, penalty_B, trait_K[order_B], weight_K[order_B])


def _fit(
    x_Sn: np.ndarray, label_n: np.ndarray, penalty: float, start_Z: np.ndarray
) -> tuple[Float64[np.ndarray, " Z"], Float64[np.ndarray, " n"]]:
    """(weights, residuals) of one trait: (label - predicted share) / number of known labels."""
    x_Zn = np.insert(x_Sn.astype(np.float64), 0, 1, axis=0)
    lasso_Z = np.append(0, np.full(len(x_Sn), penalty * len(label_n)))
    weight_Z = sparse.newton(x_Zn, label_n.astype(np.float64), start_Z, np.zeros(len(x_Zn)), lasso_Z)
    return weight_Z, (label_n - scipy.special.expit(weight_Z @ x_Zn)) / len(label_n)
