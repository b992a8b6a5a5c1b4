"""The logistic regression of every class on every single latent: K x C fits of two numbers each.

For latent k and class c, weight w and intercept b minimise, over the labelled patches n,

    sum_n [log(1 + exp(w f_n + b)) - y_n (w f_n + b)] + w^2 / (2 c_reg)

as scikit-learn's LogisticRegression(C=c_reg) does. The classes enter only through sum_n y_n and
sum_n y_n f_n. The rest is a sum over all codes of a latent, which is taken over bins: SUB_BINS for each power
of 2 of a code's distance from the latent's centre (0, or the mean code of a latent that always fires). A bin
stands for its codes by their sums of powers, and the terms of the sum are expanded to the fifth order around
its mean. So one pass over the codes is enough, in memory that does not depend on their number.

Shape letters: K latents, C classes, N or R patches, n codes, J bins or those of them that are not empty.
"""

import dataclasses
import typing as tp

import beartype
import numpy as np
from jaxtyping import Float, Float64, Int32, Int64, Integer, Shaped, jaxtyped

from saev import compiled, errors
from saev.compiled import jit
from saev.protoeval import newton

OCTAVES, SUB_BINS = 12, 32
"""Powers of 2 below the largest code that have bins, and bins of each. Smaller codes share one bin."""
SIDE = OCTAVES * SUB_BINS
"""Bins of codes above the centre, and of those below."""
N_BINS = 1 + 2 * SIDE
NO_TOP = -2000
"""The largest power of 2 of a latent without codes."""


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


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Sums:
    """What the fits need to know of all codes, added block by block."""

    bin_KJ6: Float64[np.ndarray, "K J 6"]
    """Each bin's number of codes, and their sums of d^i / i! for i = 1, ..., 5. d is the code minus the bin's
    middle."""
    top_K: Int64[np.ndarray, " K"]
    """The power of 2 of the largest distance from the centre."""
    range_K3: Float64[np.ndarray, "K 3"]
    """The centre (NaN: not known yet), and the smallest and largest distance from it (of codes unlike it)."""
    total_KC: Float64[np.ndarray, "K C"]
    """Sum over a class's patches of the distance from the centre."""
    positive_KC: Float64[np.ndarray, "K C"]
    """Patches of a class whose code is not the centre."""
    n_C: Int64[np.ndarray, " C"]
    """Patches of each class."""
    n_labels: int
    """Classes of each patch."""

    @staticmethod
    def empty(n_latents: int, n_classes: int, n_labels: int = 1) -> "Sums":
        K, C = n_latents, n_classes
        range_K3 = np.tile([np.nan, np.inf, -np.inf], (K, 1))
        return Sums(
            np.zeros((K, N_BINS, 6)),
            np.full(K, NO_TOP),
            range_K3,
            np.zeros((K, C)),
            np.zeros((K, C)),
            np.zeros(C, np.int64),
            n_labels,
        )

    @staticmethod
    def n_bytes(n_classes: int) -> int:
        """Bytes per latent."""
        return 8 * (6 * N_BINS + 1 + 3 + 2 * n_classes)

    def add(self, code_KR: Float[np.ndarray, "K R"], class_RL: Int32[np.ndarray, "R L"]) -> None:
        """Adds the codes of some patches, each of `n_labels` different classes, or of none (negative)."""
        self.n_C[:] += np.bincount(class_RL[class_RL >= 0], minlength=len(self.n_C))

        def some(first: int, last: int) -> None:
            _add_rows(
                code_KR[first:last],
                class_RL,
                self.bin_KJ6[first:last],
                self.top_K[first:last],
                self.range_K3[first:last],
                self.total_KC[first:last],
                self.positive_KC[first:last],
            )

        compiled.in_threads(some, len(code_KR))

    def fit(self, c_reg: float = 1.0) -> Fits:
        """Fits every class on every latent.

        Args:
            c_reg: inverse strength of the penalty on w, as scikit-learn's C.
        """
        w_KC, b_KC, loss_KC = (np.full(self.total_KC.shape, np.nan) for _ in range(3))
        n_all = int(self.n_C.sum()) // self.n_labels

        def each(part: range) -> None:
            for k in part:
                state = (self.bin_KJ6[k], self.top_K[k], self.range_K3[k], self.total_KC[k])
                out = (w_KC[k], b_KC[k], loss_KC[k])
                _fit_latent(*state, self.positive_KC[k], self.n_C, n_all, 1 / c_reg, *out)

        K = len(w_KC)  # small parts, because latents differ in their numbers of bins
        compiled.each_in_threads(each, [range(at, min(at + 16, K)) for at in range(0, K, 16)])
        return Fits(w_KC, b_KC, loss_KC, _bias_loss(self.n_C, n_all))


def _bias_loss(n_C: Int64[np.ndarray, " C"], n_all: int) -> Float64[np.ndarray, " C"]:
    share_C = n_C / max(1, n_all)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -(share_C * np.log(share_C) + (1 - share_C) * np.log1p(-share_C))


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
    return _fit_columns(
        codes.indptr.astype(np.int64), codes.indices, codes.data, class_N.astype(np.int32), n_C, 1 / c_reg
    )


def _as_csc(codes_NK: tp.Any) -> tp.Any:
    """A matrix of scipy.sparse, by columns."""
    if hasattr(codes_NK, "tocsc"):
        return codes_NK.tocsc()
    import scipy.sparse  # which takes a while

    return scipy.sparse.csc_array(np.asarray(codes_NK))


@jaxtyped(typechecker=beartype.beartype)
def _fit_columns(
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
            _fit_column(row_n[codes], code_n[codes], class_N, n_C, ridge, w_KC[k], b_KC[k], loss_KC[k])

    compiled.each_in_threads(each, [range(at, min(at + 16, K)) for at in range(0, K, 16)])
    return Fits(w_KC, b_KC, loss_KC, _bias_loss(n_C, int(n_C.sum())))


# ---- bins ----


@jit
def _add_rows(code_KR, class_RL, bin_KJ6, top_K, range_K3, total_KC, positive_KC):
    for k in range(len(code_KR)):
        if np.isnan(range_K3[k, 0]):
            range_K3[k, 0] = _centre(code_KR[k], class_RL)
        sums = bin_KJ6[k], top_K[k], range_K3[k], total_KC[k], positive_KC[k]
        top_K[k] = _add(code_KR[k], class_RL, *sums)


@jit
def _centre(code_R, class_RL):
    """The mean code; 0 if some code is 0, as those of sparse latents are. NaN without a labelled patch."""
    total, n = 0.0, 0
    for i in range(len(code_R)):
        if class_RL[i, 0] >= 0:
            if code_R[i] == 0:
                return 0.0
            total += code_R[i]
            n += 1
    return total / n if n else np.nan


@jit
def _add(code_n, class_nL, bin_J6, top, range_3, total_C, positive_C):
    """Adds codes of one latent. Returns its `top`."""
    for i in range(len(code_n)):
        if class_nL[i, 0] < 0:
            continue
        distance = np.float64(code_n[i]) - range_3[0]
        if distance == 0:
            continue
        for c in class_nL[i]:
            total_C[c] += distance
            positive_C[c] += 1
        range_3[1] = min(range_3[1], distance)
        range_3[2] = max(range_3[2], distance)
        bits = np.float64(distance).view(np.int64)
        power = ((bits >> 52) & 2047) - 1023
        if power > top:
            _raise(bin_J6, top, min(power - top, OCTAVES))
            top = power
        octave, j = power - top + OCTAVES - 1, 0
        if octave >= 0:
            j = 1 + octave * SUB_BINS + ((bits >> 47) & 31)
            if distance < 0:
                j += SIDE
            distance -= np.int64((bits >> 47 << 47) | (1 << 46)).view(np.float64)  # the bin's middle
        square = distance * distance
        bin_J6[j, 0] += 1
        bin_J6[j, 1] += distance
        bin_J6[j, 2] += square / 2
        bin_J6[j, 3] += square * distance / 6
        bin_J6[j, 4] += square * square / 24
        bin_J6[j, 5] += square * square * distance / 120
    return top


@jit
def _middle(j, top):
    """The middle of a bin."""
    if j == 0:
        return 0.0
    octave, part = divmod((j - 1) % SIDE, SUB_BINS)
    middle = np.ldexp(1 + (part + 0.5) / SUB_BINS, top - OCTAVES + 1 + octave)
    return -middle if j > SIDE else middle


@jit
def _raise(bin_J6, top, by):
    """Makes room for larger codes: the lowest octaves join the bin of small codes, the others move down."""
    for side in range(2):
        for place in range(SIDE):
            j = 1 + side * SIDE + place
            if bin_J6[j, 0] > 0:
                if place < by * SUB_BINS:
                    _shift(bin_J6[j], _middle(j, top), bin_J6[0])
                else:
                    compiled.copy(bin_J6[j], bin_J6[j - by * SUB_BINS])
                bin_J6[j] = 0


@jit
def _shift(sum_6, by, out_6):
    """Adds the sums of a bin to those of another, whose middle lies `by` lower."""
    for i in range(6):
        term = 1.0
        for j in range(i + 1):  # (d + by)^i / i! is the sum of d^(i - j) / (i - j)! by^j / j!
            out_6[i] += sum_6[i - j] * term
            term *= by / (j + 1)


@jit
def _nodes(bin_J6, top, scale):
    """(6, J) of the bins with codes, in units of `scale`: number of codes, their mean t, and the sums of
    (f - t)^i / i! for i = 2, ..., 5."""
    node_XJ, n_used = np.zeros((6, len(bin_J6))), 0
    node_6 = np.empty(6)
    for j in range(len(bin_J6)):
        if bin_J6[j, 0] > 0:
            mean = bin_J6[j, 1] / bin_J6[j, 0]
            node_6[:] = 0
            _shift(bin_J6[j], -mean, node_6)
            node_6[1] = _middle(j, top) + mean
            unit = 1.0
            for i in range(6):
                node_XJ[i, n_used] = node_6[i] / unit
                unit *= scale
            n_used += 1
    return node_XJ[:, :n_used].copy()


# ---- fits ----


@jit
def _fit_column(row_n, code_n, class_N, n_C, ridge, w_C, b_C, loss_C):
    """Fits all classes on one latent, given the codes that are not 0."""
    class_nL = class_N[row_n].reshape(-1, 1)
    for i in range(len(code_n)):
        if code_n[i] == 0:
            class_nL[i] = -1
    n_all, n_coded = n_C.sum(), (class_nL >= 0).sum()
    range_3 = np.array([0.0, np.inf, -np.inf])
    if 0 < n_coded == n_all:
        range_3[0] = _centre(code_n, class_nL)
    bin_J6, total_C, positive_C = np.zeros((N_BINS, 6)), np.zeros(len(n_C)), np.zeros(len(n_C))
    top = _add(code_n, class_nL, bin_J6, NO_TOP, range_3, total_C, positive_C)
    _fit_latent(bin_J6, top, range_3, total_C, positive_C, n_C, n_all, ridge, w_C, b_C, loss_C)


@jit
def _fit_latent(bin_J6, top, range_3, total_C, positive_C, n_C, n_all, ridge, w_C, b_C, loss_C):
    """Fits all classes on one latent."""
    n_coded = np.int64(bin_J6[:, 0].sum())
    centre, low, high = range_3
    if n_coded == 0:
        low = high = 0.0
    scale = max(abs(low), abs(high)) if n_coded else 1.0
    node_XJ = _nodes(bin_J6, top, scale)
    for c in range(len(n_C)):
        if 0 < n_C[c] < n_all:
            w, b, loss = newton.solve(
                node_XJ,
                low / scale,
                high / scale,
                n_all - n_coded,
                n_C[c],
                positive_C[c],
                total_C[c] / scale,
                ridge / scale**2,
            )
            w_C[c] = w / scale
            b_C[c] = b - w_C[c] * centre if w != 0 else b
            loss_C[c] = loss / n_all
