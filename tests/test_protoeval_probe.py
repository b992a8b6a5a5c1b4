"""The logistic probes against scikit-learn. N images, D d_vit, T traits."""

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.model_selection
import torch

from saev.protoeval import newton_cg, probe

D = 8


def sklearn_fit(x_ND: np.ndarray, y_N: np.ndarray, penalty: float) -> sklearn.linear_model.LogisticRegression:
    model = sklearn.linear_model.LogisticRegression(
        C=1 / penalty, tol=1e-12, max_iter=10_000, solver="newton-cholesky"
    )
    return model.fit(x_ND, y_N)


def loss(x_ND: np.ndarray, y_N: np.ndarray, penalty: float, w_D: np.ndarray, b: float) -> float:
    z_N = x_ND @ w_D + b
    return float((np.logaddexp(0, z_N) - y_N * z_N).sum() + penalty / 2 * (w_D**2).sum()) / len(y_N)


def data(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Activations of different scales, and traits from common to rare that depend on them."""
    rng = np.random.default_rng(seed)
    x_ND = (rng.standard_normal((n, d)) * rng.uniform(0.1, 3, d) + 5).astype(np.float32)
    z_N = 2 * (x_ND[:, 0] - x_ND[:, 5]) / x_ND[:, [0, 5]].std()
    z_NT = z_N[:, None] + rng.logistic(size=(n, 3)) - [0, 2, 5] - z_N.mean()
    return x_ND, z_NT > 0


@pytest.mark.parametrize(("n", "d"), [(40, 100), (300, 20)])
@pytest.mark.parametrize("penalty", [1e4, 10.0, 0.1])
def test_a_fit_has_sklearns_loss(n: int, d: int, penalty: float) -> None:
    """Each regression on the rows that it uses, also with fewer of them than inputs."""
    x_ND, labels_NT = data(n, d)
    is_used_NT = np.random.default_rng(1).random(labels_NT.shape) < 0.8
    x_ND = ((x_ND - x_ND.mean(axis=0)) / x_ND.std(axis=0)).astype(np.float64)
    given = (np.column_stack([x_ND, np.ones(n)]), labels_NT, is_used_NT, np.full(3, penalty))
    w_ET = newton_cg.fit(*map(torch.from_numpy, given), torch.zeros(d + 1, 3, dtype=torch.float64)).numpy()
    for t in range(3):
        rows = is_used_NT[:, t]
        own_ND, y_N = x_ND[rows], labels_NT[rows, t]
        want = sklearn_fit(own_ND, y_N, penalty)
        want = loss(own_ND, y_N, penalty, want.coef_[0], want.intercept_[0])
        assert loss(own_ND, y_N, penalty, w_ET[:-1, t], w_ET[-1, t]) == pytest.approx(want, abs=1e-8)


def plain_choice(x_ND: np.ndarray, y_N: np.ndarray) -> float:
    """The penalty with the lowest held-out loss of all, by a plain loop."""
    folds = sklearn.model_selection.StratifiedKFold(
        min(5, y_N.sum(), (~y_N).sum()), shuffle=True, random_state=3
    )
    losses = []
    for penalty in probe.PENALTIES:
        total = 0.0
        for train, held in folds.split(x_ND, y_N):
            model = sklearn_fit(x_ND[train], y_N[train], penalty)
            total += loss(x_ND[held], y_N[held], 0, model.coef_[0], model.intercept_[0]) * len(held)
        losses.append(total)
    return probe.PENALTIES[int(np.argmin(losses))]


def test_folds_are_scikit_learns() -> None:
    """Also of traits whose rarer label has fewer images than there are folds, and of either first label."""
    rng = np.random.default_rng(0)
    labels_NT = rng.random((60, 8)) < [0.5, 0.5, 0.2, 0.9, 0.06, 0.97, 0, 1]
    labels_NT[0, :2] = [False, True]
    known_NT = rng.random(labels_NT.shape) < 0.8
    fold_NT = probe._folds(labels_NT, known_NT, 3)
    n_folds = []
    for t in range(8):
        rows, want_N = np.flatnonzero(known_NT[:, t]), np.full(60, -1)
        y_n = labels_NT[rows, t]
        n_folds.append(min(5, y_n.sum(), (~y_n).sum()))
        if n_folds[-1] > 1:
            folds = sklearn.model_selection.StratifiedKFold(n_folds[-1], shuffle=True, random_state=3)
            for fold, (_, held) in enumerate(folds.split(rows, y_n)):
                want_N[rows[held]] = fold
        np.testing.assert_array_equal(fold_NT[:, t], want_N)
    assert {0, 5} < set(n_folds) and set(n_folds) & {2, 3, 4}


@pytest.mark.parametrize("is_all_known", [True, False])
def test_scores_are_those_of_sklearn_with_the_penalty_of_the_lowest_held_out_loss(is_all_known: bool) -> None:
    """On a trait's known labels; of a trait with two positives too."""
    x_ND, labels_NT = data(200, D)
    train_ND, test_ND, labels_NT = x_ND[:140], x_ND[140:], labels_NT[:140]
    assert labels_NT.sum(axis=0).min() >= 2
    known_NT = np.random.default_rng(2).random(labels_NT.shape) < (1 if is_all_known else 0.8)
    known_NT |= labels_NT.sum(axis=0) < 10
    got_NT, own_NT = probe.scores(
        train_ND, labels_NT, test_ND, train_ND, known_NT=None if is_all_known else known_NT, seed=3
    )
    scaled_ND, others_ND = ((x - train_ND.mean(axis=0)) / train_ND.std(axis=0) for x in (train_ND, test_ND))
    for t in range(3):
        rows = known_NT[:, t]
        penalty = plain_choice(scaled_ND[rows].astype(float), labels_NT[rows, t])
        model = sklearn_fit(scaled_ND[rows].astype(float), labels_NT[rows, t], penalty)
        for got_N, x in ((got_NT[:, t], others_ND), (own_NT[:, t], scaled_ND)):
            np.testing.assert_allclose(got_N, model.decision_function(x.astype(float)), atol=1e-3)
    assert np.ptp(got_NT[:, 0]) > 1


def test_penalties_differ_by_trait_and_are_chosen_for_each_alone() -> None:
    rng = np.random.default_rng(4)
    x_ND = rng.standard_normal((300, D))
    labels_NT = np.stack([x_ND[:, 0] > 0, rng.random(300) < 0.3, np.arange(300) == 7], axis=1)
    x_NE = torch.from_numpy(np.column_stack([x_ND, np.ones(300)]))
    all_known = np.ones_like(labels_NT)
    got_T = probe.choose_penalties(x_NE, labels_NT, all_known, 0)
    assert got_T[0] <= 1 < 1e3 <= got_T[1]  # a trait that the inputs decide, and one of chance
    assert got_T[2] == probe.FEW_PENALTY  # one positive: no second fold
    for t in range(3):
        alone = probe.choose_penalties(x_NE, labels_NT[:, t : t + 1], all_known[:, :1], 0)
        assert alone == got_T[t]


def test_the_probe_finds_a_linear_trait_and_gives_a_constant_where_there_is_no_positive() -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((300, D)).astype(np.float32)
    labels_NT = np.stack([x_ND[:, 2] - x_ND[:, 5] > 1, np.zeros(300, bool), np.ones(300, bool)], axis=1)
    train_NT, test_NT = probe.scores(x_ND[:200], labels_NT[:200], x_ND[:200], x_ND[200:])
    assert train_NT.shape == (200, 3) and np.ptp(test_NT[:, 1:], axis=0).max() < 1e-9
    best = test_NT[:, 0].argsort()[::-1][: labels_NT[200:, 0].sum()]
    assert labels_NT[200:, 0][best].mean() > 0.9


def test_a_dimension_that_is_constant_on_the_train_images_is_left_out() -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((90, D)).astype(np.float32)
    labels_NT = x_ND[:, 2:3] > 0
    with_constant_ND = np.column_stack([x_ND, np.full(90, 0.1, np.float32)])
    want, got = (probe.scores(x[:60], labels_NT[:60], x)[0] for x in (x_ND, with_constant_ND))
    np.testing.assert_allclose(got, want, atol=1e-9)
    with_constant_ND[60:, -1] = 1e6
    np.testing.assert_allclose(probe.scores(x_ND[:60], labels_NT[:60], x_ND)[0], want, atol=1e-9)
    np.testing.assert_allclose(
        probe.scores(with_constant_ND[:60], labels_NT[:60], with_constant_ND)[0], want, atol=1e-9
    )


def test_the_probe_with_fewer_images_than_dimensions_and_one_trait() -> None:
    rng = np.random.default_rng(1)
    x_ND = rng.standard_normal((6, 50)).astype(np.float32)
    labels_NT = np.array([[True], [False]] * 3)
    (own_NT,) = probe.scores(x_ND, labels_NT, x_ND)
    assert own_NT.shape == (6, 1) and np.isfinite(own_NT).all()


def test_the_probe_of_one_image_is_a_constant() -> None:
    x_ND = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    (test_NT,) = probe.scores(x_ND[:1], np.array([[True, False]]), x_ND)
    assert np.ptp(test_NT, axis=0).max() < 1e-9
