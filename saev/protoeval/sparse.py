"""Sparse logistic models of traits: several prototypes together, chosen by forward selection on train images.

The model of a trait is a logistic regression on the scores of a few prototypes. Each step adds one: of the
SHORTLIST prototypes with the largest correlation with the model's residual (orthogonal matching pursuit,
Pati, Rezaiifar and Krishnaprasad 1993), the one with the largest score statistic, which takes the prototypes
that the model has into account (Rao 1948). Then all weights are fitted again. The correlations of all traits
with all prototypes are one matrix product per step.

N images, K prototypes, C of them, T traits, Z columns of a model: the intercept, then its prototypes.
"""

import collections.abc
import dataclasses
import typing as tp

import beartype
import numpy as np
import scipy.special
from jaxtyping import Bool, Float64, Int64, jaxtyped

from saev import compiled
from saev.compiled import jit

SHORTLIST = 16
"""Prototypes whose score statistic is computed in each step."""
RIDGE = 1.0
"""Penalty: half the sum of the squared weights of scores of variance 1, as scikit-learn's C = 1."""
MAX_STEPS, PRECISION = 50, 1e-10
"""Newton steps of a fit. It ends when a step would lower the mean loss by less."""
MAX_SWEEPS, SWEEP_PRECISION = 1000, 1e-7
"""Of coordinate descent. It ends when no gradient was further from the optimum, relative to the lasso."""

Read = collections.abc.Callable[[tp.Any], np.ndarray]
"""Returns the scores (C, N) of some prototypes, given as a slice or as numbers."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Model:
    """log odds of a trait = intercept + sum of weights x scores."""

    prototype_Z: Int64[np.ndarray, " Z"]
    """In the order in which they were chosen. Empty for a trait that no train image has, or every one."""
    weight_Z: Float64[np.ndarray, " Z"]
    intercept: float

    def __call__(self, read: Read, n_images: int) -> Float64[np.ndarray, " N"]:
        """The log odds of images."""
        if not len(self.prototype_Z):
            return np.full(n_images, self.intercept)
        return self.weight_Z @ read(self.prototype_Z).astype(np.float64) + self.intercept


Models = dict[int, list[Model]]
"""Number of prototypes, at most -> each trait's model."""


@jaxtyped(typechecker=beartype.beartype)
def fit(
    read: Read,
    n_prototypes: int,
    labels_NT: Bool[np.ndarray, "N T"],
    known_NT: Bool[np.ndarray, "N T"] | None,
    sizes: collections.abc.Collection[int],
    block: int,
) -> Models:
    """Fits each trait on at most `n` prototypes, for every n of `sizes`. A smaller model begins a larger one.

    Args:
        known_NT: which labels are known. Images are left out of the models of the others.
        block: prototypes that are read at a time.
    """
    known_NT = np.ones_like(labels_NT) if known_NT is None else known_NT
    paths = [_Path(y_N.copy(), known_N.copy()) for y_N, known_N in zip(labels_NT.T, known_NT.T, strict=True)]
    found = {}
    blocks = [slice(at, min(at + block, n_prototypes)) for at in range(0, n_prototypes, block)]
    scale_K = np.concatenate([_scale(read(part)) for part in blocks])
    for step in range(1, max(sizes) + 1):
        short_TS = _shortlists(read, blocks, scale_K, paths)

        def extend(t: int, short_TS: np.ndarray = short_TS) -> None:
            if paths[t].is_open:
                paths[t].extend(read, short_TS[t])

        compiled.each_in_threads(extend, list(range(len(paths))))
        if step in sizes:
            found[step] = [path.model for path in paths]
    return found


def _shortlists(
    read: Read, blocks: list[slice], scale_K: np.ndarray, paths: "list[_Path]"
) -> Int64[np.ndarray, "T S"]:
    """The prototypes with the largest correlation with each trait's residual, best first."""
    residual_TN = np.stack([path.residual_N for path in paths])
    best_TS, size_TS = np.zeros((len(paths), 0), np.int64), np.zeros((len(paths), 0))
    for part in blocks:
        scale_C = scale_K[part]
        with np.errstate(divide="ignore", invalid="ignore"):
            size_TC = np.abs(residual_TN @ read(part).T) / scale_C
        size_TC[:, ~(scale_C > 0)] = -1.0
        for t, path in enumerate(paths):
            mine = path.prototypes[(path.prototypes >= part.start) & (path.prototypes < part.stop)]
            size_TC[t, mine - part.start] = -1.0
        near_TS = np.argpartition(-size_TC, min(SHORTLIST, size_TC.shape[1]) - 1, axis=1)[:, :SHORTLIST]
        best_TS = np.hstack([best_TS, part.start + near_TS])
        size_TS = np.hstack([size_TS, np.take_along_axis(size_TC, near_TS, axis=1)])
    order_TS = np.lexsort((best_TS, -size_TS), axis=1)[:, :SHORTLIST]
    return np.take_along_axis(best_TS, order_TS, axis=1)


def _scale(scores_CN: np.ndarray) -> Float64[np.ndarray, " C"]:
    """Standard deviations; exactly 0 for equal scores, whose mean may be rounded."""
    is_constant_C = scores_CN.max(axis=1) == scores_CN.min(axis=1)
    return np.where(is_constant_C, 0.0, scores_CN.std(axis=1, dtype=np.float64))


class _Path:
    """Models of one trait, each with one prototype more."""

    def __init__(self, y_N: Bool[np.ndarray, " N"], known_N: Bool[np.ndarray, " N"]):
        self.known_n = np.flatnonzero(known_N)
        self.y_N = y_N[self.known_n].astype(np.float64)
        n = int(self.y_N.sum())
        self.is_open = 0 < n < len(self.y_N)
        """Whether a prototype may be added."""
        share = n / len(self.y_N) if self.is_open else 0.5
        self.prototypes = np.zeros(0, np.int64)
        self.weight_Z = np.array([np.log(share / (1 - share))])
        self.mean_Z, self.scale_Z = np.zeros(1), np.ones(1)
        self.p_N = np.full(len(self.y_N), share)
        self.residual_N = np.zeros(len(known_N), np.float32)
        """Label minus probability; 0 where the label is unknown."""
        self.residual_N[self.known_n] = self.is_open * (self.y_N - self.p_N)

    @property
    def model(self) -> Model:
        weight_Z = self.weight_Z / self.scale_Z
        return Model(self.prototypes, weight_Z[1:], float(weight_Z[0] - weight_Z[1:] @ self.mean_Z[1:]))

    def extend(self, read: Read, short_S: np.ndarray) -> None:
        """Adds the best of some prototypes, and fits all weights again."""
        short_S = short_S[~np.isin(short_S, self.prototypes)]
        raw_CN = read(np.append(self.prototypes, short_S))[:, self.known_n].astype(np.float64)
        mean_C, scale_C = raw_CN.mean(axis=1), _scale(raw_CN)
        x_CN = (raw_CN - mean_C[:, None]) / np.where(scale_C > 0, scale_C, 1)[:, None]
        n = len(self.prototypes)
        x_ZN, x_SN = np.vstack([np.ones(len(self.y_N)), x_CN[:n]]), x_CN[n:]
        statistic_S = np.where(scale_C[n:] > 0, self._statistics(x_ZN, x_SN), -1.0)
        if statistic_S.max(initial=0.0) <= 0:  # all other prototypes are constant
            self.is_open = False
            self.residual_N[:] = 0
            return
        best = int(statistic_S.argmax())
        self.prototypes = np.append(self.prototypes, short_S[best])
        self.mean_Z, self.scale_Z = (
            np.append(mine_Z, found_C[n + best])
            for mine_Z, found_C in ((self.mean_Z, mean_C), (self.scale_Z, scale_C))
        )
        x_ZN = np.vstack([x_ZN, x_SN[best]])
        self.weight_Z = newton(x_ZN, self.y_N, np.append(self.weight_Z, 0.0), _ridge(len(x_ZN)))
        self.p_N = scipy.special.expit(self.weight_Z @ x_ZN)
        self.residual_N[self.known_n] = self.y_N - self.p_N

    def _statistics(
        self, x_ZN: Float64[np.ndarray, "Z N"], x_SN: Float64[np.ndarray, "S N"]
    ) -> Float64[np.ndarray, " S"]:
        """Score statistic of each of some columns: about twice what it adds to the log likelihood."""
        w_N = self.p_N * (1 - self.p_N)
        cross_SZ = (x_SN * w_N) @ x_ZN.T
        hessian_ZZ = (x_ZN * w_N) @ x_ZN.T + np.diag(_ridge(len(x_ZN)))
        known_S = np.einsum("sz,zs->s", cross_SZ, np.linalg.solve(hessian_ZZ, cross_SZ.T))
        variance_S = np.square(x_SN) @ w_N + RIDGE - known_S
        return np.square(x_SN @ (self.y_N - self.p_N)) / variance_S.clip(1e-9)


def _ridge(n_columns: int) -> Float64[np.ndarray, " Z"]:
    """The penalty on each column of a model. The intercept has none."""
    return np.array([0.0] + [RIDGE] * (n_columns - 1))


@jaxtyped(typechecker=beartype.beartype)
def newton(
    x_ZN: Float64[np.ndarray, "Z N"],
    y_N: Float64[np.ndarray, " N"],
    weight_Z: Float64[np.ndarray, " Z"],
    ridge_Z: Float64[np.ndarray, " Z"],
    lasso_Z: Float64[np.ndarray, " Z"] | None = None,
) -> Float64[np.ndarray, " Z"]:
    """Logistic regression from some weights on. Minimises the summed loss + ridge / 2 w^2 + lasso |w|.

    Steps are damped as in the module `newton`, so the sum cannot rise. With a lasso, a step is found by
    coordinate descent over the A weights that are not 0 or whose gradient exceeds the lasso.
    """
    for _ in range(MAX_STEPS):
        p_N = scipy.special.expit(weight_Z @ x_ZN)
        gradient_Z = x_ZN @ (p_N - y_N) + ridge_Z * weight_Z
        on_A = np.flatnonzero((weight_Z != 0) | (np.abs(gradient_Z) >= (0 if lasso_Z is None else lasso_Z)))
        x_AN, gradient_A = x_ZN[on_A], gradient_Z[on_A]
        hessian_AA = (x_AN * (p_N * (1 - p_N))) @ x_AN.T + np.diag(ridge_Z[on_A])
        if lasso_Z is None:
            step_A = -np.linalg.solve(hessian_AA, gradient_A)
        else:
            step_A = _descend(hessian_AA, gradient_A, weight_Z[on_A], lasso_Z[on_A])
        change = float(np.abs(step_A @ x_AN).max())
        weight_Z = weight_Z.copy()
        weight_Z[on_A] += step_A * (np.log1p(change) / change if change > 0.1 else 1.0)
        if step_A @ hessian_AA @ step_A / 2 <= PRECISION * len(y_N):
            break
    return weight_Z


@jit
def _descend(hessian_AA, gradient_A, weight_A, lasso_A):
    """The step d that minimises gradient d + d' hessian d / 2 + lasso |weight + d|."""
    new_A, gradient_A = weight_A.copy(), gradient_A.copy()
    for _ in range(MAX_SWEEPS):
        largest = 0.0
        for i in range(len(new_A)):
            curve = hessian_AA[i, i] + 1e-12
            goal = new_A[i] - gradient_A[i] / curve
            by = np.sign(goal) * max(abs(goal) - lasso_A[i] / curve, 0.0) - new_A[i]
            if by != 0:
                new_A[i] += by
                gradient_A += hessian_AA[i] * by
                largest = max(largest, curve * abs(by))
        if largest <= SWEEP_PRECISION * lasso_A.max():
            break
    return new_A - weight_A
