"""The audit, against scikit-learn and plain loops on planted prototypes.

N images, P patches, D d_vit, K prototypes, T traits, B prototypes that are audited, M resamples.
"""

import pathlib

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from saev import nn
from saev.data import config as data_config
from saev.data.traits import config as traits_config
from saev.formats import patchlabels, results, shards
from saev.nn import config as nn_config
from saev.protoeval import ap, audit, audit_rank, config, run, score
from saev.report import frame
from saev.scorers import config as scorers_config

N, P, D = 120, 8, 24
CLASSES = {0: "background", 1: "wing", 2: "bill", 3: "tail", 4: "never"}
KEYS = np.array([3, 7, 12, 18])
"""Dimensions that are large on the patches of one part (wing, bill, tail, wing), in images that have a trait."""
PARTS = np.array([1, 2, 3, 1])
PATHS = [f"{'a' if i % 3 else 'b'}/bird {i:03}.jpg" for i in range(N)]
IS_TRAIN_N = np.arange(N) % 2 == 0
LABELS_NT = np.random.default_rng(0).random((N, len(KEYS))) < 0.4


def draw() -> tuple[np.ndarray, np.ndarray]:
    """(ids (N, P), activations (N, P, D)). All other dimensions are noise without place and trait."""
    rng = np.random.default_rng(1)
    id_NP = rng.choice([-1, 0, 0, 0, 1, 2, 3], (N, P))
    id_NP[:, :3] = [1, 2, 3]  # each image shows each part
    acts_NPD = rng.standard_normal((N, P, D)).astype(np.float32)
    for t, (d, part) in enumerate(zip(KEYS, PARTS, strict=True)):
        acts_NPD[:, :, d] *= 0.3
        acts_NPD[:, :, d] += 6 * (id_NP == part) * (0.5 + LABELS_NT[:, t, None])
    return id_NP, acts_NPD


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Shards with labels of patches, in reverse order; a table of traits; an SAE whose latents are dimensions."""
    root = tmp_path_factory.mktemp("audit")
    id_NP, acts_NPD = draw()
    metadata = shards.Metadata("timm", "planted", (3,), P, False, D, N, 7 * P, {"__class__": "ImageFolder"})
    out = shards.ShardDir.create(root / "dump", metadata, [shards.Record(p, "") for p in PATHS[::-1]], {})
    for shard_i in range(metadata.n_shards):
        image_is = metadata.imgs_in(shard_i)
        with out.writing(shard_i) as writer:
            writer.write(np.ascontiguousarray(acts_NPD[::-1][image_is.start : image_is.stop, None]))
    patchlabels.write(shards.ShardDir.open(str(out.dpath)), "", id_NP[::-1], CLASSES, {})
    traits = pl.DataFrame(LABELS_NT.astype(int), [f"trait{t}" for t in range(len(KEYS))], orient="row")
    split = np.where(IS_TRAIN_N, "train", "test").tolist()
    traits.with_columns(path=pl.Series(PATHS), split=pl.Series(split)).write_csv(root / "traits.csv")
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=1), 0)
    sae.W_enc.data, sae.b_enc.data, sae.b_dec.data = torch.eye(D), torch.zeros(D), torch.zeros(D)
    nn.save(sae.eval(), root / "run" / "sae.pt")
    return root


@pytest.fixture
def cfg(root: pathlib.Path, tmp_path: pathlib.Path) -> config.ProtoEval:
    (shard_root,) = (str(dpath) for dpath in (root / "dump").iterdir() if dpath.is_dir())
    table = traits_config.Table(
        split="file", file=str(root / "traits.csv"), binary=tuple(f"trait{t}" for t in range(len(KEYS)))
    )
    return config.ProtoEval(
        scorer=scorers_config.Sae(str(root / "run" / "sae.pt")),
        labels=table,
        train_data=data_config.Shards(shard_root, 3),
        patch_labels="labels.bin",
        audit=(4, 2, 12),
        n_prototypes=(D,),
        n_train=(-1,),
        n_boot=20,
        force=True,
        dump_to=str(tmp_path / "results"),
        scorers_to=str(tmp_path / "scorers"),
        device="cpu",
    )


def split_of(scores_KN: np.ndarray, labels_NT: np.ndarray, known_NT: np.ndarray | None = None) -> score.Split:
    n = scores_KN.shape[1]
    found = score.Scores(scores_KN, np.zeros((n, 1), np.float32), np.arange(n))
    return score.Split(found, np.arange(n), labels_NT, known_NT)


# ---- the ranking ----


@pytest.mark.parametrize("some_known", [False, True])
def test_the_path_is_that_of_all_prototypes(monkeypatch: pytest.MonkeyPatch, some_known: bool) -> None:
    """Each prototype enters where scikit-learn, given all of them at each penalty, says so; in small blocks."""
    monkeypatch.setattr(audit_rank, "N_STEPS", 20)
    rng = np.random.default_rng(2)
    n_K, n_N, n_T = 30, 90, 3
    shared_N = rng.standard_normal(n_N)
    scores_KN = np.maximum(rng.standard_normal((n_K, n_N)) + 0.5 * shared_N, 0).astype(np.float32) * 7 + 3
    scores_KN[4] = 1  # a latent that does not fire
    logit_NT = scores_KN[[1, 9, 20]].T - scores_KN[[2, 9, 5]].T / 2 - 5
    labels_NT = rng.random((n_N, n_T)) < 1 / (1 + np.exp(-logit_NT))
    known_NT = rng.random((n_N, n_T)) < 0.8 if some_known else None
    labels_NT = labels_NT if known_NT is None else labels_NT & known_NT
    x = audit_rank.images(split_of(scores_KN, labels_NT), 0, n_K, 7 * 12 * n_N / 1e9)
    assert x.size == 7
    found = audit_rank.rank(x, labels_NT, known_NT, n_K)

    x_NK = scores_KN.T.astype(np.float64)
    x_NK = (x_NK - x_NK.mean(axis=0)) / np.where(x_NK.std(axis=0) > 0, x_NK.std(axis=0), 1)
    rows_T = [np.arange(n_N) if known_NT is None else np.flatnonzero(known_NT[:, t]) for t in range(n_T)]
    largest = max(
        np.abs(x_NK[rows].T @ (labels_NT[rows, t] - labels_NT[rows, t].mean())).max() / len(rows)
        for t, rows in enumerate(rows_T)
    )
    enters: dict[int, tuple[int, float]] = {}
    for step in range(20):
        w_KT = np.zeros((n_K, n_T))
        for t, rows in enumerate(rows_T):
            penalty = largest * audit_rank.RATIO ** (step + 1)
            model = LogisticRegression(
                l1_ratio=1, C=1 / (penalty * len(rows)), solver="saga", tol=1e-9, max_iter=20_000
            )
            w_KT[:, t] = model.fit(x_NK[rows], labels_NT[rows, t]).coef_[0]
        for k in np.flatnonzero(np.abs(w_KT).max(axis=1) > 1e-6):
            enters.setdefault(int(k), (step, -np.abs(w_KT[k]).sum()))
    assert 10 < len(enters) < n_K
    want = sorted(enters, key=lambda k: (enters[k][0], enters[k][1]))
    assert found.prototype_B[: len(want)].tolist() == want
    steps = [enters[k][0] for k in want]
    np.testing.assert_allclose(found.penalty_B[: len(want)], audit_rank.RATIO ** (np.array(steps) + 1.0))
    assert np.isnan(found.penalty_B[len(want) :]).all() and (found.trait_B[len(want) :] == -1).all()
    assert found.prototype_B[-1] == 4 and sorted(found.prototype_B) == list(range(n_K))
    first = audit_rank.rank(x, labels_NT, known_NT, 5)  # ends early, and ranks the same
    assert first.prototype_B.tolist() == want[:5] and first.weight_B.tolist() == found.weight_B[:5].tolist()


def test_labels_without_variation_rank_nothing() -> None:
    scores_KN = np.random.default_rng(0).random((5, 9)).astype(np.float32)
    labels_NT = np.stack([np.zeros(9, bool), np.ones(9, bool)], axis=1)
    known_NT = np.stack([np.ones(9, bool), np.zeros(9, bool)], axis=1)
    for known in (None, known_NT):
        found = audit_rank.rank(
            audit_rank.images(split_of(scores_KN, labels_NT), 0, 5, 1.0), labels_NT, known, 3
        )
        assert found.prototype_B.tolist() == [0, 1, 2] and np.isnan(found.penalty_B).all()


# ---- the audit ----


def read(dpath: pathlib.Path, name: str, columns: dict) -> pl.DataFrame:
    return frame.read_csv((dpath / name).read_bytes(), columns)


def by_hand(code_NPK: np.ndarray, id_NP: np.ndarray, k: int) -> tuple[int, float, float, float]:
    """(class that is best on train patches, its train AP, its test AP, the highest test AP) by scikit-learn."""
    is_labelled_NP = id_NP >= 0
    ap_2C = [
        [average_precision_score(id_NP[rows] == c, code_NPK[rows][:, k]) for c in (1, 2, 3)]
        for rows in (is_labelled_NP & IS_TRAIN_N[:, None], is_labelled_NP & ~IS_TRAIN_N[:, None])
    ]
    best = int(np.argmax(ap_2C[0]))
    return best + 1, ap_2C[0][best], ap_2C[1][best], max(ap_2C[1])


def test_planted_prototypes_are_proposed_and_localise(cfg: config.ProtoEval) -> None:
    """The first 4 are the planted ones, and Yield(4) is 1. Permuted labels yield the share of all prototypes."""
    dpath = pathlib.Path(run.main([cfg]))
    found = pl.read_parquet(dpath / "audit.parquet").filter(pl.col("scorer") == "Sae run")
    assert set(found["prototype"][:4]) == set(KEYS.tolist()) and found["rank"].to_list() == list(range(1, 13))
    trait_of = {int(k): f"trait{t}" for t, k in enumerate(KEYS)}
    part_of = {int(k): CLASSES[c] for k, c in zip(KEYS.tolist(), PARTS.tolist(), strict=True)}
    for row in found[:4].iter_rows(named=True):
        assert (row["trait"], row["class"]) == (trait_of[row["prototype"]], part_of[row["prototype"]])
        assert row["weight"] > 0 and row["test_ap"] > 0.9 and row["localises"]
    id_NP, acts_NPD = draw()
    code_NPK = np.maximum(acts_NPD, 0)
    for row in found.iter_rows(named=True):
        part, train_ap, test_ap, highest = by_hand(code_NPK, id_NP, row["prototype"])
        assert row["class"] == CLASSES[part]
        assert (row["train_ap"], row["test_ap"], row["highest_ap"]) == pytest.approx(
            (train_ap, test_ap, highest), abs=1e-9
        )
        assert row["localises"] == (test_ap >= results.TAU)
    rows = read(dpath, "audit-yields.csv", results.AUDIT_YIELDS).filter(pl.col("scorer") == "Sae run")
    assert rows["measure"].to_list() == ["2", "4", "12", "area"]
    values = dict(zip(rows["measure"], rows["value"], strict=True))
    is_found_B = found["localises"].to_numpy()
    assert values["2"] == values["4"] == 1 and values["12"] == is_found_B.mean()
    assert values["area"] == pytest.approx(np.mean([is_found_B[:b].mean() for b in range(1, 13)]))
    base_rate = np.mean([by_hand(code_NPK, id_NP, k)[2] >= results.TAU for k in range(D)])
    assert base_rate < 0.3
    nulls = dict(zip(rows["measure"], rows["null"], strict=True))
    assert abs(nulls["12"] - base_rate) < 0.1 and nulls["4"] < 0.4
    assert rows["p"].to_list()[-1] == 1 / (1 + audit.N_NULL)
    constant = read(dpath, "audit-yields.csv", results.AUDIT_YIELDS).filter(pl.col("scorer") == "constant")
    assert constant["value"].to_list() == constant["null"].to_list() == [0] * 4
    text = (dpath / "audit.md").read_text()
    assert "| Sae run, permuted labels | 24 |" in text and "without background, never" in text


def test_intervals_equal_a_loop_over_resamples(cfg: config.ProtoEval) -> None:
    dpath = pathlib.Path(run.main([cfg]))
    found = pl.read_parquet(dpath / "audit.parquet").filter(pl.col("scorer") == "Sae run")
    id_NP, acts_NPD = draw()
    test_i = np.flatnonzero(~IS_TRAIN_N)
    by_name = {name: i for i, name in CLASSES.items()}
    yield_BM = np.zeros((12, 20))
    for m, times_I in enumerate(ap.resamples(len(test_i), 20, cfg.seed)):
        image_n = np.repeat(test_i, times_I)
        is_labelled_nP = id_NP[image_n] >= 0
        for b, row in enumerate(found.iter_rows(named=True)):
            y_n = (id_NP[image_n] == by_name[row["class"]])[is_labelled_nP]
            code_n = np.maximum(acts_NPD[image_n][:, :, row["prototype"]], 0)[is_labelled_nP]
            yield_BM[b, m] = average_precision_score(y_n, code_n) >= results.TAU
    assert yield_BM.mean(axis=1).min() > 0 or yield_BM.var() > 0
    rows = read(dpath, "audit-yields.csv", results.AUDIT_YIELDS).filter(pl.col("scorer") == "Sae run")
    for row in rows.iter_rows(named=True):
        if row["measure"] == "area":
            boot_M = np.mean([yield_BM[:b].mean(axis=0) for b in range(1, 13)], axis=0)
        else:
            boot_M = yield_BM[: int(row["measure"])].mean(axis=0)
        assert (row["low"], row["high"]) == pytest.approx(results.interval(boot_M, row["value"]))
