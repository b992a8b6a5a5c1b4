"""Average precision against scikit-learn. N images, K prototypes, T traits."""

import warnings

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sklearn.metrics
import torch

import saev
from saev import errors
from saev.protoeval import ap


def reference(scores_NK: np.ndarray, labels_NT: np.ndarray) -> np.ndarray:
    """scikit-learn's loop, NaN where a trait has no positive."""
    K, T = scores_NK.shape[1], labels_NT.shape[1]
    ap_KT = np.full((K, T), np.nan)
    for k in range(K):
        for t in range(T):
            if labels_NT[:, t].any():
                ap_KT[k, t] = sklearn.metrics.average_precision_score(labels_NT[:, t], scores_NK[:, k])
    return ap_KT


def scores(kind: str, N: int, K: int, rng: np.random.Generator) -> np.ndarray:
    match kind:
        case "random":
            return rng.standard_normal((N, K)).astype(np.float32)
        case "tied":
            return rng.integers(0, 4, (N, K)).astype(np.float32)
        case "mostly zero":
            return (rng.random((N, K)) * (rng.random((N, K)) < 0.05)).astype(np.float32)
        case _:
            return np.full((N, K), 3.0, np.float32)


@pytest.mark.parametrize("kind", ["random", "tied", "mostly zero", "all tied"])
def test_equals_sklearn(kind: str) -> None:
    rng = np.random.default_rng(0)
    scores_NK = scores(kind, 150, 7, rng)
    labels_NT = rng.random((150, 5)) < np.array([0.02, 0.1, 0.3, 0.5, 0.9])
    labels_NT[:, 0] = False
    labels_NT[17, 0] = True  # one positive
    got_KT = ap.average_precision(scores_NK, labels_NT)
    np.testing.assert_allclose(got_KT, reference(scores_NK, labels_NT), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["random", "tied", "mostly zero", "all tied"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_missing_labels_are_left_out_as_sklearn_on_the_others(kind: str, share: float) -> None:
    """Also where a missing label is given as True, and on resamples."""
    rng = np.random.default_rng(1)
    scores_NK, labels_NT = scores(kind, 150, 5, rng), rng.random((150, 5)) < 0.3
    known_NT = rng.random((150, 5)) < share
    known_NT[:, 1], known_NT[:, 2], known_NT[:, 4] = True, False, known_NT[:, 0]
    got_KT = ap.average_precision(scores_NK, labels_NT, known_NT)
    times_MN = ap.resamples(150, 3, seed=1)
    times_MN[0] = 1
    again_TM = ap.resampled(scores_NK.T, labels_NT, times_MN, known_NT)
    np.testing.assert_allclose(ap.paired(scores_NK.T, labels_NT, known_NT), np.diag(got_KT), atol=1e-12)
    for t, known_N in enumerate(known_NT.T):
        want_K = reference(scores_NK[known_N], labels_NT[known_N, t : t + 1])[:, 0]
        np.testing.assert_allclose(got_KT[:, t], want_K, rtol=0, atol=1e-12)
        for m in range(3):
            rows = np.repeat(np.arange(150), times_MN[m] * known_N)
            want = reference(scores_NK[rows, t : t + 1], labels_NT[rows, t : t + 1])[0, 0]
            np.testing.assert_allclose(again_TM[t, m], want, rtol=0, atol=1e-12)
    assert np.isnan(got_KT[:, 2]).all()
    every_KT = ap.average_precision(scores_NK, labels_NT, np.ones((150, 5), bool))
    np.testing.assert_array_equal(every_KT, ap.average_precision(scores_NK, labels_NT))


def test_known_labels_have_the_shape_of_labels() -> None:
    for bad in (np.ones((3, 1), bool), np.ones((3, 2))):
        with pytest.raises(errors.UserError, match=r"known_NT is .*\(3, \d\). Pass booleans \(3, 2\)"):
            ap.average_precision(np.ones((3, 4)), np.ones((3, 2)), bad)


def test_all_tied_is_prevalence() -> None:
    labels_NT = np.array([[True, False], [False, False], [False, True], [False, True]])
    got_KT = ap.average_precision(np.zeros((4, 1), np.float32), labels_NT)
    np.testing.assert_allclose(got_KT, [[0.25, 0.5]])


def test_no_positive_is_nan_where_sklearn_warns_and_says_zero() -> None:
    labels_NT = np.zeros((5, 1), bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sklearn.metrics.average_precision_score(labels_NT[:, 0], np.arange(5)) == 0
    assert np.isnan(ap.average_precision(np.arange(5.0)[:, None], labels_NT)).all()


def test_all_positive_is_one() -> None:
    got_KT = ap.average_precision(np.arange(6.0).reshape(3, 2), np.ones((3, 1), bool))
    np.testing.assert_array_equal(got_KT, np.ones((2, 1)))


def test_negative_zero_ties_with_zero() -> None:
    scores_NK = np.array([[0.0], [-0.0], [1.0]], np.float32)
    labels_NT = np.array([[True], [False], [False]])
    np.testing.assert_allclose(ap.average_precision(scores_NK, labels_NT), [[1 / 3]])


def test_paired_is_the_diagonal_of_the_matrix() -> None:
    rng = np.random.default_rng(1)
    scores_NT, labels_NT = scores("tied", 60, 6, rng), rng.random((60, 6)) < 0.2
    labels_NT[:, 3] = False
    full_TT = ap.average_precision(scores_NT, labels_NT)
    got_T = ap.paired(scores_NT.T, labels_NT)
    np.testing.assert_allclose(got_T, np.diag(full_TT), rtol=1e-14)


def test_numpy_and_torch_of_any_type_give_the_same() -> None:
    rng = np.random.default_rng(0)
    scores_NK = rng.integers(-8, 8, (60, 5)) / 4  # every type holds them
    labels_NT = rng.random((60, 3)) < 0.3
    want_KT = reference(scores_NK, labels_NT)
    types = (np.float16, np.float32, np.float64, np.longdouble, ">f4")
    scores = [scores_NK.astype(t) for t in types]
    halves = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    scores += [torch.from_numpy(scores_NK).to(t) for t in halves]
    scores += [torch.tensor(scores_NK, requires_grad=True)]
    labels = [labels_NT.astype(t) for t in (bool, np.int64, np.uint8, np.float32)]
    labels += [torch.from_numpy(labels_NT), torch.from_numpy(labels_NT).float()]
    for x in scores:
        np.testing.assert_allclose(ap.average_precision(x, labels_NT), want_KT, rtol=1e-12)
    for y in labels:
        np.testing.assert_allclose(ap.average_precision(scores_NK, y), want_KT, rtol=1e-12)
    assert ap.average_precision(scores_NK[:, :0], labels_NT).shape == (0, 3)
    assert ap.average_precision(scores_NK, labels_NT[:, :0]).shape == (5, 0)


@pytest.mark.parametrize(
    ("scores", "labels", "text"),
    [
        (np.zeros((0, 2)), np.zeros((0, 3), bool), "there are no images"),
        (np.zeros((4, 2)), np.zeros((3, 1), bool), "scores of 4 images, but labels of 3"),
        (np.zeros((4, 2)), np.full((4, 1), 2), "other values than 0 and 1"),
        (np.zeros((4, 2)), np.full((4, 1), np.nan), "other values than 0 and 1"),
        (np.zeros(4), np.zeros((4, 1), bool), r"scores_NK has shape \(4,\)"),
        (np.zeros((4, 2), complex), np.zeros((4, 1), bool), "scores_NK is complex128"),
        ([[1.0]], np.zeros((1, 1), bool), "scores_NK is list"),
        (torch.ones(1, 1).to_sparse(), np.zeros((1, 1), bool), "scores_NK is torch.float32. Pass"),
        (torch.ones(1, 1, device="meta"), np.zeros((1, 1), bool), "scores_NK is torch.float32"),
        (np.full((4, 1), 2**62 + 1), np.zeros((4, 1), bool), "float64 cannot represent"),
    ],
)
def test_what_has_no_average_precision_is_one_line(scores, labels, text: str) -> None:
    with pytest.raises(errors.UserError, match=text):
        ap.average_precision(scores, labels)


def test_nan_scores_are_refused_by_number() -> None:
    scores_NK = np.zeros((3, 4), np.float32)
    scores_NK[1, 2] = np.nan
    with pytest.raises(errors.UserError, match="row 2 of the scores"):
        ap.average_precision(scores_NK, np.ones((3, 1), bool))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.data())
def test_equals_sklearn_on_any_small_input(data: st.DataObject) -> None:
    N = data.draw(st.integers(1, 12))
    values = st.sampled_from([-np.inf, -1.0, 0.0, 1e-30, 0.5, 2.0])
    scores_N = data.draw(st.lists(values, min_size=N, max_size=N))
    labels_N = data.draw(st.lists(st.booleans(), min_size=N, max_size=N).filter(any))
    hypothesis.assume(np.isfinite(scores_N).all())
    got = ap.average_precision(np.array(scores_N)[:, None], np.array(labels_N)[:, None])[0, 0]
    assert got == pytest.approx(sklearn.metrics.average_precision_score(labels_N, scores_N), abs=1e-12)


def test_public_name() -> None:
    assert saev.protoeval.average_precision is ap.average_precision


def test_equals_sklearn_in_float64_and_float16() -> None:
    rng = np.random.default_rng(4)
    close_NK = 1 + 1e-12 * rng.integers(-50, 50, (90, 5))  # equal in float32
    labels_NT = rng.random((90, 4)) < 0.3
    for scores_NK in (close_NK, rng.standard_normal((90, 5)).astype(np.float16)):
        want_KT = reference(scores_NK, labels_NT)
        got_KT = ap.average_precision(scores_NK, labels_NT)
        np.testing.assert_allclose(got_KT, want_KT, rtol=0, atol=1e-12)


def test_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    scores_NK, labels_NT = scores("tied", 50, 13, rng), rng.random((50, 6)) < 0.2
    whole_KT = ap.average_precision(scores_NK, labels_NT)
    monkeypatch.setattr(ap, "BLOCK_BYTES", 3 * 8 * 50)
    np.testing.assert_array_equal(ap.average_precision(scores_NK, labels_NT), whole_KT)


@pytest.mark.parametrize("kind", ["random", "tied", "mostly zero", "all tied"])
def test_resampled_equals_sklearn_on_the_repeated_images(kind: str) -> None:
    rng = np.random.default_rng(2)
    scores_NT, labels_NT = scores(kind, 40, 5, rng), rng.random((40, 5)) < 0.15
    labels_NT[:, 0] = np.arange(40) == 3  # one positive: some resamples have none
    times_MN = ap.resamples(40, 300, seed=1)
    got_TM = ap.resampled(scores_NT.T, labels_NT, times_MN)
    assert np.isnan(got_TM[0]).any()
    for m in (0, 7, 255, 256, 299):
        rows = np.repeat(np.arange(40), times_MN[m])
        want_TT = reference(scores_NT[rows], labels_NT[rows])
        np.testing.assert_allclose(got_TM[:, m], np.diag(want_TT), rtol=0, atol=1e-12)


def test_resamples_draw_with_replacement_the_same_for_one_seed() -> None:
    times_MN = ap.resamples(500, 400, seed=3)
    assert (times_MN.sum(axis=1) == 500).all()
    np.testing.assert_array_equal(times_MN, ap.resamples(500, 400, seed=3))
    assert times_MN.var() == pytest.approx(1, abs=0.02)  # Poisson with mean 1
    assert (times_MN == 0).mean() == pytest.approx(np.exp(-1), abs=0.01)


@pytest.mark.parametrize("kind", ["ties", "distinct"])
@pytest.mark.parametrize("n_first", [1, 7, 60, 500])
def test_patches_of_resampled_images_against_a_plain_loop(kind: str, n_first: int) -> None:
    """AP by scikit-learn on the repeated patches; purity as the mean over 400 orders of equal scores."""
    rng = np.random.default_rng(0)
    image_N = rng.integers(0, 30, 200).astype(np.int32)
    scores_TN = rng.integers(0, 5, (3, 200)).astype(np.float32) if kind == "ties" else rng.random((3, 200))
    labels_NT = rng.random((200, 3)) < 0.2
    times_MI = ap.resamples(30, 3, 0)
    found = ap.resampled_patches(scores_TN, labels_NT, image_N, times_MI, n_first)
    for m, times_I in enumerate(times_MI):
        drawn_n = np.repeat(np.arange(200), times_I[image_N])
        for t in range(3):
            y_n, score_n = labels_NT[drawn_n, t], scores_TN[t, drawn_n]
            ap_of_drawn = sklearn.metrics.average_precision_score(y_n, score_n)
            assert found.ap_TM[t, m] == pytest.approx(ap_of_drawn, abs=1e-12)
            orders = (
                np.lexsort((rng.random(len(y_n)), -score_n)) for _ in range(400 if kind == "ties" else 1)
            )
            purity = np.mean([y_n[order[:n_first]].mean() for order in orders])
            assert found.purity_TM[t, m] == pytest.approx(purity, abs=0.06 if kind == "ties" else 1e-12)


def test_purity_of_a_constant_score_is_the_prevalence() -> None:
    labels_NT = np.random.default_rng(0).random((200, 3)) < 0.2
    image_N, times_MI = np.repeat(np.arange(20, dtype=np.int32), 10), np.ones((1, 20), np.uint8)
    found = ap.resampled_patches(np.zeros((3, 200), np.float32), labels_NT, image_N, times_MI, 16)
    np.testing.assert_allclose(found.purity_TM[:, 0], labels_NT.mean(axis=0))
