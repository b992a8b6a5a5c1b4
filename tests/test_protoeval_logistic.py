"""Regressions of classes on single latents, against scikit-learn's. N patches, K latents, C classes."""

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression

from saev import errors
from saev.protoeval import logistic, newton


def check(codes_NK: np.ndarray, class_N: np.ndarray, n_classes: int, c_reg: float = 1.0) -> logistic.Fits:
    """Every weight, intercept and loss equals scikit-learn's."""
    fits = logistic.fit_each_latent(scipy.sparse.csr_array(codes_NK), class_N, n_classes, c_reg=c_reg)
    is_labelled_N = class_N >= 0
    for k in range(codes_NK.shape[1]):
        for c in range(n_classes):
            x_N1, y_N = codes_NK[is_labelled_N, k : k + 1], class_N[is_labelled_N] == c
            model = LogisticRegression(C=c_reg, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(
                x_N1, y_N
            )
            w, b = model.coef_[0, 0], model.intercept_[0]
            z_N = x_N1[:, 0] * w + b
            loss = np.mean(np.logaddexp(0, z_N) - y_N * z_N)
            got = fits.w_KC[k, c], fits.b_KC[k, c], fits.loss_KC[k, c]
            assert got == pytest.approx((w, b, loss), rel=1e-6, abs=1e-6), (k, c)
    return fits


def draw(kind: str, n: int, rng: np.random.Generator, class_N: np.ndarray) -> np.ndarray:
    """(N, K) codes that depend on the classes."""
    K = class_N.max() + 2
    is_own_NK = class_N[:, None] == np.arange(K)
    if kind == "signed":
        return rng.normal(size=(n, K)) + 1.5 * is_own_NK
    if kind == "mean far away":
        return 50 + rng.normal(size=(n, K)) + 0.5 * is_own_NK
    fires_NK = rng.random((n, K)) < np.where(is_own_NK, 0.6, 0.1)
    if kind == "equal codes":
        return 3.0 * fires_NK
    codes_NK = rng.lognormal(0, 1, (n, K)) * fires_NK * np.where(is_own_NK, 3, 1)
    return codes_NK * {"sparse": 1, "small": 1e-4, "large": 1e4}[kind]


@pytest.mark.parametrize("kind", ["sparse", "small", "large", "signed", "mean far away", "equal codes"])
@pytest.mark.parametrize("n", [60, 3_000, 20_000])
def test_equals_scikit_learn(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    class_N = rng.integers(-1, 3, n)
    check(draw(kind, n, rng, class_N), class_N, 3)


@pytest.mark.parametrize("c_reg", [1e-3, 1.0, 1e3])
def test_a_latent_that_separates_a_class(c_reg: float) -> None:
    """Only the penalty bounds the weight. One latent fires on the class alone, one on all others, one never."""
    class_N = np.repeat([0, 1], [2_000, 1_000])
    values_N = np.random.default_rng(0).uniform(0.5, 2, 3_000)
    codes_NK = np.stack([values_N * (class_N == 0), values_N * (class_N == 1), 0 * values_N], 1)
    fits = check(codes_NK, class_N, 2, c_reg)
    assert (fits.r_KC[:2] > 0.2).all() and np.allclose(fits.r_KC[2], 0, atol=1e-12)
    assert (np.sign(fits.w_KC[:2]) == [[1, -1], [-1, 1]]).all()


def test_probe_r_is_one_minus_the_share_of_the_entropy() -> None:
    class_N = np.repeat([0, 1, -1], [300, 700, 50])
    fits = logistic.fit_each_latent(np.zeros((1_050, 2)), class_N, 2)
    entropy = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7))
    np.testing.assert_allclose(fits.bias_loss_C, entropy)
    np.testing.assert_allclose(fits.loss_KC, entropy)
    np.testing.assert_allclose(fits.b_KC, [[np.log(3 / 7), np.log(7 / 3)]] * 2)


def test_a_class_without_patches_has_no_fit() -> None:
    fits = logistic.fit_each_latent(np.random.default_rng(0).random((50, 2)), np.zeros(50, np.int64), 2)
    assert np.isnan(fits.loss_KC).all() and np.isnan(fits.w_KC).all() and np.isnan(fits.bias_loss_C).all()


def test_explicit_zeros_are_no_codes() -> None:
    rng = np.random.default_rng(0)
    codes_NK, class_N = rng.random((500, 3)) * (rng.random((500, 3)) < 0.3), rng.integers(0, 2, 500)
    with_zeros = scipy.sparse.csc_array(np.where(codes_NK == 0, 1, codes_NK))
    with_zeros.data[with_zeros.data == 1] = 0
    a, b = (logistic.fit_each_latent(x, class_N, 2) for x in (codes_NK, with_zeros))
    np.testing.assert_array_equal(a.loss_KC, b.loss_KC)


def binned(value_n: np.ndarray, block: int) -> logistic.Sums:
    """The values as codes of one latent, added block by block; all of class 0."""
    sums = logistic.Sums.empty(1, 2)
    for at in range(0, len(value_n), block):
        part_n = value_n[at : at + block]
        sums.add(part_n[None], np.zeros((len(part_n), 1), np.int32))
    return sums


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_bins_hold_the_sums_over_all_codes(order: str) -> None:
    """Against NumPy's, over 20 powers of 2. With ascending values the bins move at each power."""
    rng = np.random.default_rng(0)
    value_n = np.concatenate([rng.lognormal(0, 2, 3_000), -rng.lognormal(0, 2, 1_000)])
    value_n = value_n[np.argsort(np.abs(value_n))]
    value_n = {"ascending": value_n, "descending": value_n[::-1], "random": rng.permutation(value_n)}[order]
    sums = binned(np.concatenate([[0.0], value_n]), 100)  # with a 0, the centre is 0
    scale = np.abs(value_n).max()
    node_XJ = logistic._nodes(sums.bin_KJ6[0], sums.top_K[0], scale)
    value_n = value_n / scale
    assert node_XJ[0].sum() == len(value_n) and node_XJ.shape[1] < 600
    for w, b in ((30.0, -2.3), (-3.0, 1.0), (0.0, 0.0), (500.0, -4.0)):
        share_n = 1 / (1 + np.exp(-(w * value_n + b)))
        curve_n = share_n * (1 - share_n)
        expected = share_n.sum(), share_n @ value_n, curve_n.sum(), curve_n @ value_n, curve_n @ value_n**2
        got = newton.binned_sums(node_XJ, w, b)
        np.testing.assert_allclose(got[:2], expected[:2], rtol=1e-7)
        np.testing.assert_allclose(got[2:], expected[2:], rtol=1e-3)


@pytest.mark.parametrize("kind", ["sparse", "mean far away", "equal codes"])
def test_blocks_of_any_size_give_the_same_fits(kind: str) -> None:
    """float32 scores, added block by block, against the whole matrix. Some patches have no class."""
    rng = np.random.default_rng(1)
    class_N = rng.integers(-1, 3, 5_000).astype(np.int32)
    codes_NK = draw(kind, 5_000, rng, class_N).astype(np.float32)
    want = check(codes_NK.astype(np.float64), class_N, 3)
    for block in (37, 5_000):
        sums = logistic.Sums.empty(codes_NK.shape[1], 3)
        for at in range(0, 5_000, block):
            sums.add(np.ascontiguousarray(codes_NK[at : at + block].T), class_N[at : at + block, None])
        got = sums.fit()
        np.testing.assert_allclose(got.loss_KC, want.loss_KC, atol=1e-7)
        np.testing.assert_allclose(got.w_KC, want.w_KC, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.b_KC, want.b_KC, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got.bias_loss_C, want.bias_loss_C)


def test_patches_with_two_labels() -> None:
    """Each set of labels has the fits that it has alone."""
    rng = np.random.default_rng(2)
    class_NL = np.stack([rng.integers(0, 2, 800), rng.integers(2, 5, 800)], 1).astype(np.int32)
    codes_NK = draw("sparse", 800, rng, class_NL[:, 0]).astype(np.float32)
    sums = logistic.Sums.empty(codes_NK.shape[1], 5, 2)
    sums.add(np.ascontiguousarray(codes_NK.T), class_NL)
    got, alone = sums.fit(), [logistic.fit_each_latent(codes_NK, class_NL[:, i], 5) for i in range(2)]
    for name in ("w_KC", "b_KC", "loss_KC"):
        want = np.where(np.arange(5) < 2, *(getattr(fits, name) for fits in alone))
        np.testing.assert_allclose(getattr(got, name), want, rtol=1e-6)
    np.testing.assert_allclose(got.bias_loss_C, np.where(np.arange(5) < 2, *(f.bias_loss_C for f in alone)))


def test_bad_input_is_refused() -> None:
    codes_NK = np.ones((4, 2))
    for codes, classes, message in [
        (
            codes_NK,
            np.zeros(3, int),
            r"class_N: shape \(3,\), int64; pass one integer for each of the 4 patches",
        ),
        (codes_NK, np.zeros(4), "class_N: .*float64; pass one integer"),
        (codes_NK, np.full(4, 2), "class_N: has class 2, but there are 2 classes"),
        (codes_NK * np.nan, np.zeros(4, int), "codes_NK: has NaN or infinite codes"),
    ]:
        with pytest.raises(errors.UserError, match=message):
            logistic.fit_each_latent(codes, classes, 2)
    with pytest.raises(errors.UserError, match="c_reg 0"):
        logistic.fit_each_latent(codes_NK, np.zeros(4, int), 2, c_reg=0)
