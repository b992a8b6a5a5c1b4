"""Sparse logistic models of traits and dichotomous keys, on planted scores. N images, K prototypes, T traits, C categories."""

import dataclasses
import pathlib
import re
import warnings

import hypothesis
import inprocess
import numpy as np
import polars as pl
import pytest
import sklearn.linear_model
import sklearn.metrics
import sklearn.model_selection
import sklearn.tree
from hypothesis import strategies as st

from saev import errors
from saev.data import config as data_config
from saev.data.traits import config as traits_config
from saev.formats import manifest, results, shards
from saev.protoeval import ap, config, keys, merge, run, sparse
from saev.scorers import config as scorers_config

ROOT = pathlib.Path(__file__).parent.parent
N, K = 400, 60
ap_of = sklearn.metrics.average_precision_score


def latents(seed: int = 0, n: int = N) -> np.ndarray:
    """Scores (K, N) like an SAE's: mostly 0. Prototypes 0 to 2 fire on about half of the images, at 1 to 2."""
    rng = np.random.default_rng(seed)
    scores_KN = (rng.random((K, n)) < 0.2) * rng.exponential(1, (K, n))
    scores_KN[:3] = (rng.random((3, n)) < [[0.5], [0.4], [0.3]]) * rng.uniform(1, 2, (3, n))
    return scores_KN.astype(np.float32)


def planted(scores_KN: np.ndarray) -> np.ndarray:
    """(N, 3): prototype 0 or 1, 0 and 1, and exactly one of them."""
    a_N, b_N = scores_KN[:2] > 0
    return np.stack([a_N | b_N, a_N & b_N, a_N ^ b_N], axis=1)


def fitted(scores_KN: np.ndarray, labels_NT: np.ndarray, *sizes: int, known_NT=None, block: int = K):
    return sparse.fit(scores_KN.__getitem__, len(scores_KN), labels_NT, known_NT, sizes, block)


def refit(x_NZ: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, float]:
    """scikit-learn's weights and intercept."""
    scale_Z = x_NZ.std(axis=0)
    found = sklearn.linear_model.LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000)
    found.fit((x_NZ - x_NZ.mean(axis=0)) / scale_Z, y_N)
    weight_Z = found.coef_[0] / scale_Z
    return weight_Z, found.intercept_[0] - weight_Z @ x_NZ.mean(axis=0)


# ---- sparse models ----


def test_two_prototypes_find_what_one_cannot() -> None:
    train_KN, test_KN = latents(0), latents(1)
    labels_NT, test_NT = planted(train_KN), planted(test_KN)
    single_T = ap.of_rows(test_KN, test_NT).max(axis=0)
    found = fitted(train_KN, labels_NT, 1, 2, 5)
    for t, model in enumerate(found[2][:2]):  # or, and
        assert set(model.prototype_Z) == {0, 1}
        assert single_T[t] < 0.9
        assert ap_of(test_NT[:, t], model(test_KN.__getitem__, N)) > 0.995
    exclusive = found[5][2]  # no sum of weights says "exactly one of two"
    assert ap_of(test_NT[:, 2], exclusive(test_KN.__getitem__, N)) < 0.85
    for few, more in zip(found[2], found[5], strict=True):
        np.testing.assert_array_equal(few.prototype_Z, more.prototype_Z[:2])


def test_weights_are_those_of_a_plain_refit_also_with_missing_labels() -> None:
    rng = np.random.default_rng(3)
    scores_KN = rng.standard_normal((K, N)).astype(np.float32)
    labels_NT = rng.random((N, 4)) < 1 / (1 + np.exp(-2 * scores_KN[5:9].T - scores_KN[10][:, None]))
    for known_NT in (None, rng.random((N, 4)) < [0.3, 0.8, 1, 0.5]):
        for t, model in enumerate(fitted(scores_KN, labels_NT, 6, known_NT=known_NT)[6]):
            rows_n = np.arange(N) if known_NT is None else np.flatnonzero(known_NT[:, t])
            x_NZ = scores_KN[model.prototype_Z].T.astype(np.float64)[rows_n]
            weight_Z, intercept = refit(x_NZ, labels_NT[rows_n, t])
            assert len(set(model.prototype_Z)) == 6 and {5 + t, 10} <= set(model.prototype_Z)
            np.testing.assert_allclose(model.weight_Z, weight_Z, rtol=1e-5, atol=1e-6)
            assert model.intercept == pytest.approx(intercept, abs=1e-5)


def test_each_step_adds_the_prototype_with_the_largest_score_statistic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plain loop over all prototypes, with the penalised Fisher information inverted for each."""
    monkeypatch.setattr(sparse, "SHORTLIST", K)
    rng = np.random.default_rng(4)
    scores_KN = (rng.standard_normal((K, N)) + rng.standard_normal(N)).astype(np.float32)
    scores_KN[7] = 0.3  # constant; its mean is rounded
    y_N = rng.random(N) < 1 / (1 + np.exp(-scores_KN[1] + scores_KN[2] + 0.5 * scores_KN[3]))
    (model,) = fitted(scores_KN, y_N[:, None], 5)[5]
    chosen: list[int] = []
    for _ in range(5):
        x_NZ = scores_KN[chosen].T.astype(np.float64)
        weight_Z, intercept = (
            refit(x_NZ, y_N) if chosen else (np.zeros(0), np.log(y_N.mean() / (1 - y_N.mean())))
        )
        p_N = 1 / (1 + np.exp(-x_NZ @ weight_Z - intercept))
        statistic_K = np.full(K, -1.0)
        for k in set(range(K)) - {7, *chosen}:
            z_NZ = scores_KN[[*chosen, k]].T.astype(np.float64)
            z_NZ = np.hstack([np.ones((N, 1)), (z_NZ - z_NZ.mean(axis=0)) / z_NZ.std(axis=0)])
            information_ZZ = (z_NZ.T * p_N * (1 - p_N)) @ z_NZ + np.diag([0.0] + [1.0] * (len(chosen) + 1))
            statistic_K[k] = (z_NZ[:, -1] @ (y_N - p_N)) ** 2 * np.linalg.inv(information_ZZ)[-1, -1]
        chosen.append(int(statistic_K.argmax()))
    assert model.prototype_Z.tolist() == chosen


def test_blocks_change_nothing() -> None:
    scores_KN = latents()
    whole, parts = (fitted(scores_KN, planted(scores_KN), 4, block=block)[4] for block in (K, 7))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a.prototype_Z, b.prototype_Z)
        np.testing.assert_allclose(a.weight_Z, b.weight_Z, rtol=1e-9)


def test_traits_that_no_image_or_every_one_has_get_a_constant_score() -> None:
    scores_KN = latents()
    labels_NT = np.stack([np.zeros(N, bool), np.ones(N, bool), scores_KN[0] > 0], axis=1)
    none, every, some = fitted(scores_KN, labels_NT, 3)[3]
    for model in (none, every):
        assert not len(model.prototype_Z) and not model(scores_KN.__getitem__, N).any()
    assert some.prototype_Z[0] == 0
    known_NT = np.zeros((N, 3), bool)
    assert all(not len(m.prototype_Z) for m in fitted(scores_KN, labels_NT, 3, known_NT=known_NT)[3])


def test_fewer_useful_prototypes_than_asked_for() -> None:
    scores_KN = latents()
    scores_KN[3:] = 0
    for model in fitted(scores_KN, planted(scores_KN), 20)[20]:
        assert 1 <= len(model.prototype_Z) <= 3 and np.isfinite(model.weight_Z).all()
    one_KN = scores_KN[:1]
    assert [m.prototype_Z.tolist() for m in fitted(one_KN, planted(scores_KN), 5)[5]] == [[0]] * 3


# ---- keys ----


def grown(scores_KN: np.ndarray, category_N: np.ndarray, n_categories: int = 2, depth: int = 3) -> keys.Key:
    prototype_K = 100 + np.arange(len(scores_KN))
    return keys.grow(scores_KN, prototype_K, category_N.astype(np.int64), n_categories, depth, 0)


def reader(scores_KN: np.ndarray):
    return lambda prototype_K: scores_KN[prototype_K - 100]


@pytest.mark.parametrize("trait", [0, 1, 2])
def test_a_key_recovers_planted_thresholds(trait: int) -> None:
    """Or, and, and exactly one of two prototypes that are 0 or 1."""
    train_KN, test_KN = ((latents(seed)[:3] > 0).astype(np.float32) for seed in (0, 1))
    key = grown(train_KN, planted(train_KN)[:, trait])
    asked = key.prototype_L != keys.LEAF
    assert key.depth == 2 and set(key.prototype_L[asked]) == {100, 101}
    assert (key.threshold_L[asked] == 0.5).all()
    call_N = key.call_L[key.leaf_of(reader(test_KN), N)]
    np.testing.assert_array_equal(call_N, planted(test_KN)[:, trait])


def test_a_key_is_scikit_learns_tree_of_the_best_depth() -> None:
    scores_KN = np.random.default_rng(0).standard_normal((5, N)).astype(np.float32)
    noise_N = np.random.default_rng(1).standard_normal(N)
    category_N = np.digitize(scores_KN[0] + 0.5 * scores_KN[1] + 0.5 * noise_N, [-0.5, 1.0])
    key = grown(scores_KN, category_N, 3, 5)
    folds = sklearn.model_selection.StratifiedKFold(5, shuffle=True, random_state=0)
    found = []
    for depth in range(1, 6):
        tree = sklearn.tree.DecisionTreeClassifier(
            max_depth=depth, min_samples_leaf=5, class_weight="balanced", random_state=0
        )
        found.append(
            sklearn.model_selection.cross_val_score(
                tree, scores_KN.T, category_N, scoring="balanced_accuracy", cv=folds
            ).mean()
        )
    best = 1 + int(np.argmax(found))
    assert key.depth == best > 1
    tree = sklearn.tree.DecisionTreeClassifier(
        max_depth=best, min_samples_leaf=5, class_weight="balanced", random_state=0
    ).fit(scores_KN.T, category_N)
    leaf_N = key.leaf_of(reader(scores_KN), N)
    np.testing.assert_array_equal(key.call_L[leaf_N], tree.predict(scores_KN.T))
    theirs_N = tree.apply(scores_KN.T)
    for leaf in set(theirs_N.tolist()):
        share_C = np.bincount(category_N[theirs_N == leaf], minlength=3) / (theirs_N == leaf).sum()
        ours_NC = key.share_LC[leaf_N[theirs_N == leaf]]
        np.testing.assert_allclose(ours_NC, np.broadcast_to(share_C, ours_NC.shape))


@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
def test_a_category_with_one_image_does_not_keep_a_key_short() -> None:
    scores_KN = latents()
    category_N = 2 * (scores_KN[0] > 0) + (scores_KN[1] > 0).astype(np.int64)
    category_N[7] = 4
    assert grown(scores_KN, category_N, 5, 3).depth >= 2


@hypothesis.given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_thresholds_separate_what_they_separated(a: float, b: float) -> None:
    low, high = sorted((a, b))
    if low < high:
        rounded = keys.between(low, high)
        assert low <= rounded < high
        assert float(f"{rounded:.17g}") == float(str(rounded)) == rounded


def test_thresholds_have_few_digits() -> None:
    assert [keys.between(0.0, 1.0), keys.between(0.41, 0.4312), keys.between(1234.3, 1234.9)] == [
        0.5,
        0.42,
        1234.6,
    ]


def test_a_key_without_anything_to_tell_apart_ends_at_once() -> None:
    scores_KN = latents()
    for key in (grown(scores_KN, np.ones(N)), grown(scores_KN[:0], planted(scores_KN)[:, 0])):
        assert key.depth == 0 and not key.leaf_of(reader(scores_KN), N).any()
    unlabelled = grown(scores_KN[:, :0], np.zeros(0))
    assert unlabelled.depth == 0 and not unlabelled.share_LC.any()
    few = grown(scores_KN, np.arange(N) == 3)  # a single image has the trait: no cross-validation
    assert few.depth == 1
    target = keys.Target("x", [0], keys.PRESENT)
    assert (
        keys.text(grown(scores_KN, np.ones(N)), target, str) == f"    1. All images ... present ({N} of {N})"
    )


def test_accuracies_are_scikit_learns_on_each_resample() -> None:
    rng = np.random.default_rng(0)
    category_N, call_N = rng.integers(0, 3, 50), rng.integers(0, 4, 50)
    times_MN = ap.resamples(50, 20, 0, with_all=True)
    assert (times_MN[0] == 1).all() and (times_MN[1:] == ap.resamples(50, 20, 0)).all()
    accuracy_M, balanced_M = keys.accuracies(category_N, call_N, 4, times_MN)
    for times_N, accuracy, balanced in zip(times_MN, accuracy_M, balanced_M, strict=True):
        y_n, got_n = np.repeat(category_N, times_N), np.repeat(np.where(call_N == 3, 0, call_N), times_N)
        right_n = np.repeat(call_N == category_N, times_N)
        assert accuracy == pytest.approx(right_n.mean())
        want = np.mean([right_n[y_n == c].mean() for c in np.unique(y_n)])
        assert balanced == pytest.approx(want)
        if not (call_N == 3).any():
            assert balanced == pytest.approx(sklearn.metrics.balanced_accuracy_score(y_n, got_n))
    same_M = keys.accuracies(category_N, call_N % 3, 3, times_MN)
    want = sklearn.metrics.balanced_accuracy_score(category_N, call_N % 3)
    assert same_M[1][0] == pytest.approx(want)
    assert same_M[0][0] == pytest.approx(sklearn.metrics.accuracy_score(category_N, call_N % 3))


def test_traits_that_exclude_each_other_have_one_key() -> None:
    names = ["size::small", "wading", "size::large", "colour::red", "colour::blue"]
    labels_NT = np.array([[1, 0, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 0, 0, 1]], bool)
    found = keys.targets(names, labels_NT, None)
    assert [(t.name, t.trait_is, t.categories) for t in found] == [
        ("size", [0, 2], ("small", "large")),
        ("wading", [1], ("absent", "present")),
        ("colour::red", [3], ("absent", "present")),
        ("colour::blue", [4], ("absent", "present")),
    ]
    np.testing.assert_array_equal(found[0].category_of(labels_NT), [0, 1, 0])
    np.testing.assert_array_equal(found[1].category_of(labels_NT), [0, 1, 1])
    assert [found[0].max_depth(4), found[1].max_depth(4)] == [4, 4]
    assert keys.Target("x", list(range(200)), tuple(map(str, range(200)))).max_depth(4) == 11
    known_NT = np.ones_like(labels_NT)
    known_NT[1, 0] = False
    assert len(keys.targets(names, labels_NT, known_NT)) == 5


def follow(text: str, score_K: np.ndarray) -> str:
    """What a printed key says of an image, read as a person reads it."""
    lead = re.compile(r"(\d+)([ab])\. prototype (\d+)(?: \(.*\))? (above|at most) (\S+) \.\.\. (.+)")
    leads = [match.groups() for match in map(lead.match, map(str.strip, text.strip().splitlines())) if match]
    number = "1"
    while True:
        (to,) = [
            to
            for n, _, prototype, relation, threshold, to in leads
            if n == number and (score_K[int(prototype)] > float(threshold)) == (relation == "above")
        ]
        if not to.isdecimal():
            return to.partition(" (")[0]
        number = to


def test_the_printed_key_is_the_one_that_is_measured() -> None:
    rng = np.random.default_rng(2)
    scores_KN, test_KN = (rng.standard_normal((6, N)).astype(np.float32) for _ in range(2))
    category_N = np.digitize(scores_KN[1] - scores_KN[4] + 0.3 * rng.standard_normal(N), [-1, 0, 1])
    key = keys.grow(scores_KN, np.arange(6), category_N, 4, 4, 0)
    target = keys.Target("size", [0, 1, 2, 3], ("s", "m", "l", "xl"))
    text = keys.text(key, target, lambda k: f"prototype {k} (t, AP 0.50)")
    assert text.count("a. ") == text.count("b. ") == (key.prototype_L != keys.LEAF).sum() > 3
    call_N = key.call_L[key.leaf_of(test_KN.__getitem__, N)]
    assert [follow(text, test_KN[:, n]) for n in range(N)] == [target.categories[c] for c in call_N]


@pytest.mark.parametrize("n_categories", [2, 4])
def test_a_key_has_the_depth_that_sklearns_search_finds(
    n_categories: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grows in threads, which share the warning filters, so it may not reset them as that search does."""
    rng = np.random.default_rng(n_categories)
    scores_KN = rng.standard_normal((6, N)).astype(np.float32)
    found = []
    for noise in (0.1, 0.5, 1, 2, 4):
        sum_N = scores_KN[0] + scores_KN[1] * (scores_KN[2] > 0) + noise * rng.standard_normal(N)
        category_N = np.digitize(sum_N, np.quantile(sum_N, np.arange(1, n_categories) / n_categories))
        tree = sklearn.tree.DecisionTreeClassifier(
            min_samples_leaf=keys.MIN_LEAF, class_weight="balanced", random_state=0
        )
        folds = sklearn.model_selection.StratifiedKFold(keys.N_FOLDS, shuffle=True, random_state=0)
        grid = {"max_depth": [1, 2, 3, 4, 5]}
        search = sklearn.model_selection.GridSearchCV(tree, grid, scoring="balanced_accuracy", cv=folds)
        want = search.fit(scores_KN.T, category_N).best_estimator_
        with monkeypatch.context() as patch:
            patch.setattr(warnings, "resetwarnings", None)
            key = grown(scores_KN, category_N, n_categories, 5)
        found.append(want.get_depth())
        assert key.depth == found[-1]
        assert key.prototype_L[0] - 100 == want.tree_.feature[0]
    assert len(set(found)) > 1


# ---- the command ----

WORDS = ("heron", "robin", "tern")
PATHS = [f"{word}/{i:02}.jpg" for word in WORDS for i in range(30)]


def activations() -> np.ndarray:
    """(N, 2, 4). One of a heron's two patches is large in dimension 0, one of a robin's in dimension 2."""
    acts_NPD = np.random.default_rng(0).standard_normal((len(PATHS), 2, 4)).astype(np.float32)
    for n, path in enumerate(PATHS):
        acts_NPD[n, n % 2, 0] += 6 * path.startswith("heron")
        acts_NPD[n, n % 2, 2] += 6 * path.startswith("robin")
    return acts_NPD


def write_shards(dump_to: pathlib.Path) -> data_config.Shards:
    data: dict[str, object] = {"__class__": "ImageFolder"}
    metadata = shards.Metadata("timm", "planted", (3,), 2, False, 4, len(PATHS), 400, data)
    out = shards.ShardDir.create(dump_to, metadata, [shards.Record(path, "") for path in PATHS], {})
    with out.writing(0) as writer:
        writer.write(activations()[:, None])
    return data_config.Shards(str(out.dpath), 3)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> config.ProtoEval:
    """A table of two traits: a heron or a robin, with missing labels, and the class."""
    root = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(1)
    lines = ["path,red,kind"]
    for path in PATHS:
        word = path.partition("/")[0]
        lines.append(f"{path},{'' if rng.random() < 0.2 else int(word != 'tern')},{word}")
    (root / "traits.csv").write_text("\n".join(lines) + "\n")
    return config.ProtoEval(
        scorer=scorers_config.Units(),
        labels=traits_config.Table(file=str(root / "traits.csv"), binary=("red",), categorical=("kind",)),
        train_data=write_shards(root / "shards"),
        n_prototypes=(2, 8),
        n_train=(20, -1),
        n_seeds=2,
        n_boot=50,
        several=(1, 2),
        key_depth=3,
        dump_to=str(root / "results"),
        scorers_to=str(root / "scorers"),
        device="cpu",
    )


@pytest.fixture(scope="module")
def out(cfg: config.ProtoEval) -> pathlib.Path:
    return pathlib.Path(run.main([cfg]))


def test_rows_stand_beside_the_single_prototypes(cfg: config.ProtoEval, out: pathlib.Path) -> None:
    summary = pl.read_csv(out / "summary.csv")
    of_units = summary.filter(pl.col("scorer").str.starts_with("Units"))["scorer"].to_list()
    each = ["Units", "Units, 1 prototype", "Units, 2 prototypes"]
    assert of_units == [*each * 3, *each, "Units, key", "Units, permuted labels"]
    largest = summary.filter(pl.col("n_prototypes") == 8, pl.col("n_train") > 20)
    value = dict(largest.select("scorer", "map").iter_rows())
    # "red" and "tern" are of two dimensions; their halves have an AP of about 0.8
    assert value["Units"] < 0.95 < value["Units, 2 prototypes"]
    assert value["Units, key"] > 0.93
    table = (out / "table.md").read_text()
    assert "| Units, key | 8 | 45 |" in table and "| Units, 2 prototypes | 2 | 20 |" in table
    assert summary.filter(pl.col("low").is_nan()).is_empty()
    several = summary.filter(pl.col("scorer") == "Units, 2 prototypes")
    assert (several["low"] <= several["map"]).all() and (several["map"] <= several["high"]).all()
    few = several.filter(pl.col("n_train") == 20)["spread"].cast(pl.Float64)
    assert len(few) == 2 and few.is_not_nan().all()  # over two draws


def test_differences_are_of_one_scorer_or_of_as_many_prototypes(
    cfg: config.ProtoEval, tmp_path: pathlib.Path
) -> None:
    both = [
        dataclasses.replace(cfg, scorer=scorer, n_train=(20,), n_prototypes=(8,), dump_to=str(tmp_path))
        for scorer in (scorers_config.Units(), scorers_config.Random())
    ]
    out = pathlib.Path(run.main(both))
    found = set(pl.read_csv(out / "differences.csv").select("scorer", "baseline").iter_rows())
    models = ["", ", 1 prototype", ", 2 prototypes", ", key"]
    names = [f"{name}{model}" for name in ("Units", "Random") for model in models]
    assert found == {
        (a, b)
        for a in names
        for b in names
        if a != b
        and (a.partition(",")[0] == b.partition(",")[0] or a.partition(",")[2] == b.partition(",")[2])
    }
    text = (out / "table.md").read_text().partition("Difference from random")[2].partition("Keys")[0]
    shown = [re.split(r" *\| *", line)[1:5:3] for line in text.splitlines() if line.startswith("| Units")]
    assert shown == [[f"Units{model}", f"Random{model}"] for model in models]
    summary = pl.read_csv(out / "summary.csv").filter(pl.col("scorer") == "Units, key")
    assert float(summary["spread"].item()) >= 0  # over two draws of train images
    assert merge.write(tmp_path) == tmp_path / "report"
    again = pl.read_csv(tmp_path / "report/differences.csv").select("scorer", "baseline")
    assert set(again.iter_rows()) == found
    assert pl.read_csv(tmp_path / "report/table.csv")["scorer"].n_unique() == len(names) + 5


def test_weights_give_the_ap_of_the_table(cfg: config.ProtoEval, out: pathlib.Path) -> None:
    weights = pl.read_parquet(out / "weights.parquet")
    assert dict(weights.schema) == dict(results.WEIGHTS)
    traits = pl.read_parquet(out / "traits.parquet").filter(pl.col("draw") == 0)
    split = dict(pl.read_csv(out / "split.csv").iter_rows())
    table = dict(pl.read_csv(out.parent.parent / "traits.csv").select("path", "red").iter_rows())
    score_of = dict(zip(PATHS, image_scores(), strict=True))
    for name, k, n in (
        traits.filter(pl.col("scorer").str.contains("prototype")).select(*results.CELL).unique().iter_rows()
    ):
        mine = weights.filter(scorer=name, n_prototypes=k, n_train=n, trait="red")
        w_Z, best_Z, b = mine["weight"].to_numpy(), mine["prototype"].to_numpy(), mine["intercept"][0]
        assert len(best_Z) == int(name.split()[1]) and best_Z.max() < k
        test = [path for path in PATHS if split[path] == "test" and table[path] is not None]
        want = ap_of([table[path] for path in test], [score_of[path][best_Z] @ w_Z + b for path in test])
        (got,) = traits.filter(scorer=name, n_prototypes=k, n_train=n, trait="red")["test_ap"]
        assert got == pytest.approx(want, abs=1e-12)


def image_scores() -> np.ndarray:
    """(N, 8): the largest of each dimension and of its negative over patches."""
    acts_NPD = activations()
    return np.stack([acts_NPD, -acts_NPD], axis=-1).reshape(len(PATHS), 2, 8).max(axis=1)


def test_printed_keys_have_the_accuracies_of_the_frame(cfg: config.ProtoEval, out: pathlib.Path) -> None:
    found = pl.read_parquet(out / "keys.parquet")
    assert dict(found.schema) == dict(results.KEYS)
    assert found["trait"].to_list() == ["red", "kind"] and found["n_categories"].to_list() == [2, 3]
    text = (out / "keys.md").read_text()
    split = dict(pl.read_csv(out / "split.csv").iter_rows())
    rows = {row[0]: row[1:] for row in pl.read_csv(out.parent.parent / "traits.csv").iter_rows()}
    scores_N8 = image_scores()
    for line, column in zip(found.to_dicts(), (0, 1), strict=True):
        part = text.partition(f"## {line['trait']}\n")[2].partition("\n## ")[0]
        test = [i for i, path in enumerate(PATHS) if split[path] == "test" and rows[path][column] is not None]
        said = [follow(part, scores_N8[i]) for i in test]
        words = [rows[PATHS[i]][column] for i in test]
        true = [("absent", "present")[word] if column == 0 else word for word in words]
        assert line["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true, said))
        want = sklearn.metrics.balanced_accuracy_score(true, said)
        assert line["balanced_accuracy"] == pytest.approx(want) and want > 0.9
        assert line["balanced_accuracy_low"] <= want <= line["balanced_accuracy_high"]
        assert f"balanced accuracy {want:.3f}" in part and f"AP {line['ap']:.3f}" in part
    assert f"| {found['balanced_accuracy'].mean():.3f} |" in (out / "table.md").read_text()


def test_files_are_sealed_and_nothing_else_changes(
    cfg: config.ProtoEval, out: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    names = ["weights.parquet", "keys.parquet", "keys.md"]
    assert set(manifest.read(out, names, "")) == set(names)
    assert run.main([cfg]) == str(out)
    for name in names:
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:-1])
        with pytest.raises(errors.UserError, match=name):
            run.main([cfg])
        (out / name).write_bytes(data)
    plain = dataclasses.replace(cfg, several=(), key_depth=0, dump_to=str(tmp_path))
    alone = pathlib.Path(run.main([plain]))
    assert alone.name != out.name and not any((alone / name).exists() for name in names)
    ours, theirs = (pl.read_csv(dpath / "summary.csv") for dpath in (out, alone))
    assert ours.filter(~pl.col("scorer").str.contains(", key|, . proto")).equals(theirs)
    assert (alone / "chart.png").read_bytes() == (out / "chart.png").read_bytes()  # shows single prototypes


def test_a_key_to_nearly_as_many_categories_as_images(cfg: config.ProtoEval, tmp_path: pathlib.Path) -> None:
    """No warning of scikit-learn's, which are errors here."""
    lines = [f"{path},{n % 24},{n % 2}" for n, path in enumerate(sorted(PATHS))]
    (tmp_path / "t.csv").write_text("\n".join(["path,kind,side", *lines]) + "\n")
    labels = traits_config.Table(file=str(tmp_path / "t.csv"), categorical=("kind",))
    cfg = dataclasses.replace(cfg, labels=labels, n_prototypes=(8,), n_train=(-1,), n_boot=0, several=())
    found = pl.read_parquet(pathlib.Path(run.main([cfg])) / "keys.parquet")
    assert found["n_categories"].to_list() == [24] and found["depth"].item() >= 1


def test_bad_numbers() -> None:
    for field, flag in (({"several": (0,)}, "--several 0"), ({"key_depth": -1}, "--key-depth -1")):
        with pytest.raises(errors.UserError, match=f"{flag}: must be at least"):
            config.ProtoEval(**field)


def test_the_page_runs_as_it_stands(tmp_path: pathlib.Path) -> None:
    page = (ROOT / "docs/keys.md").read_text()
    (command,) = re.findall(
        r"^    uv run (protoeval.py .*class-folders.*)$", page.replace("\\\n", " "), re.MULTILINE
    )
    words = command.replace("shards/HASH", write_shards(tmp_path / "dump").shard_root).split()
    done = inprocess.run(
        *words, "--dump-to", tmp_path / "r", "--scorers-to", tmp_path / "s", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "r").glob("*/keys.md")
    (shown,) = re.findall(r"\n(    1a\..*?)\n\n", page, re.DOTALL)
    assert shown in written.read_text()
    rows = re.findall(r"^\| .* \| 45 \|.*$", page, re.MULTILINE)
    assert len(rows) == 8 and all(row in done.stdout for row in rows)
