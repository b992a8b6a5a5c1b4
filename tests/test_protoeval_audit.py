"""The audit, against scikit-learn and plain loops on planted prototypes.

N images, P patches, D d_vit, K prototypes, T traits, B prototypes that are audited, M resamples.
"""

import dataclasses
import pathlib
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from saev import errors, nn
from saev.data import config as data_config
from saev.data.traits import config as traits_config
from saev.formats import patchlabels, patchresults, results, shards
from saev.nn import config as nn_config
from saev.protoeval import ap, audit, audit_rank, config, memory, merge, run, score, sparse
from saev.report import frame
from saev.scorers import config as scorers_config

pytestmark = pytest.mark.usefixtures("undrawn")

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
    """Shards with patch labels, in reverse order; a table of traits; an SAE whose latents are dimensions."""
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


@pytest.fixture(scope="module")
def cfg(root: pathlib.Path) -> config.ProtoEval:
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
        dump_to=str(root / "results"),
        scorers_to=str(root / "scorers"),
        device="cpu",
    )


@pytest.fixture(scope="module")
def result(cfg: config.ProtoEval) -> pathlib.Path:
    return pathlib.Path(run.main([cfg]))


def split_of(scores_KN: np.ndarray, labels_NT: np.ndarray, known_NT: np.ndarray | None = None) -> score.Split:
    n = scores_KN.shape[1]
    pooled_N1 = np.zeros((n, 1), np.float32)
    found = score.Scores(scores_KN, pooled_N1, pooled_N1, np.arange(n))
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


@pytest.mark.parametrize("n", [15, 200])
def test_a_fit_is_at_its_optimum(n: int) -> None:
    """From any start, also with fewer images than columns that are alike: at each weight the gradient is the lasso,
    against its sign, or at most the lasso where the weight is 0."""
    rng = np.random.default_rng(n)
    x_ZN = np.vstack(
        [np.ones(n), rng.standard_normal((40, 5)) @ rng.standard_normal((5, n)) + rng.random((40, n))]
    )
    y_N = (rng.random(n) < 1 / (1 + np.exp(-3 * x_ZN[1]))).astype(float)
    for lasso, start in ((0.1 * n, 0.0), (0.01 * n, 0.0), (0.01 * n, 2.0)):
        lasso_Z = np.append(0.0, np.full(40, lasso))
        weight_Z = sparse.newton(x_ZN, y_N, np.full(41, start), np.zeros(41), lasso_Z)
        gradient_Z = x_ZN @ (1 / (1 + np.exp(-weight_Z @ x_ZN)) - y_N)
        on_Z = (weight_Z != 0) | (lasso_Z == 0)
        assert 1 < on_Z.sum() < 20
        np.testing.assert_allclose(
            gradient_Z[on_Z], -np.sign(weight_Z * lasso_Z)[on_Z] * lasso, atol=1e-5 * lasso
        )
        assert (np.abs(gradient_Z[~on_Z]) <= lasso * (1 + 1e-5)).all()


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


def test_planted_prototypes_are_proposed_and_localise(result: pathlib.Path) -> None:
    """The first 4 are the planted ones, and Yield(4) is 1. Permuted labels yield the share of all prototypes."""
    dpath = result
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
        assert row["localises"] == (test_ap >= patchresults.TAU)
    rows = read(dpath, "audit-yields.csv", patchresults.AUDIT_YIELDS).filter(pl.col("scorer") == "Sae run")
    assert rows["measure"].to_list() == ["2", "4", "12", "area"]
    values = dict(zip(rows["measure"], rows["value"], strict=True))
    is_found_B = found["localises"].to_numpy()
    assert values["2"] == values["4"] == 1 and values["12"] == is_found_B.mean()
    assert values["area"] == pytest.approx(np.mean([is_found_B[:b].mean() for b in range(1, 13)]))
    base_rate = np.mean([by_hand(code_NPK, id_NP, k)[2] >= patchresults.TAU for k in range(D)])
    assert base_rate < 0.3
    nulls = dict(zip(rows["measure"], rows["null"], strict=True))
    assert abs(nulls["12"] - base_rate) < 0.1 and nulls["4"] < 0.4
    assert rows["p"].to_list()[-1] == 1 / (1 + audit.N_NULL)
    constant = read(dpath, "audit-yields.csv", patchresults.AUDIT_YIELDS).filter(
        pl.col("scorer") == "constant"
    )
    assert constant["value"].to_list() == constant["null"].to_list() == [0] * 4
    text = (dpath / "audit.md").read_text()
    assert "| Sae run, permuted labels | 24 |" in text and "without background, never" in text


def test_intervals_equal_a_loop_over_resamples(cfg: config.ProtoEval, result: pathlib.Path) -> None:
    dpath = result
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
            yield_BM[b, m] = average_precision_score(y_n, code_n) >= patchresults.TAU
    assert len(set(yield_BM.sum(axis=0))) > 1  # it differs among resamples
    rows = read(dpath, "audit-yields.csv", patchresults.AUDIT_YIELDS).filter(pl.col("scorer") == "Sae run")
    for row in rows.iter_rows(named=True):
        if row["measure"] == "area":
            boot_M = np.mean([yield_BM[:b].mean(axis=0) for b in range(1, 13)], axis=0)
        else:
            boot_M = yield_BM[: int(row["measure"])].mean(axis=0)
        assert (row["low"], row["high"]) == pytest.approx(results.interval(boot_M, row["value"]))


def test_the_joint_report_has_the_audit(result: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(result, tmp_path / "a")
    out = merge.write(tmp_path)
    joined = pl.read_csv(out / "audit-yields.csv", schema_overrides={"measure": pl.String})
    own = read(result, "audit-yields.csv", patchresults.AUDIT_YIELDS)
    assert (
        joined.select(own.columns)
        .sort("scorer", maintain_order=True)
        .equals(own.sort("scorer", maintain_order=True))
    )
    assert set(joined["audit"]) == {"2 4 12"} and joined["patch_labels"].str.len_chars().min() == 64
    (fpath,) = out.glob("yields-*.png")
    assert fpath.stem.removeprefix("yields-") == joined["patch_labels"][0][:8]
    assert "| Sae run, permuted labels | 24 |" in (out / "table.md").read_text()


@pytest.mark.slow
def test_rankings_and_rows_do_not_depend_on_other_scorers(
    cfg: config.ProtoEval, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside k-means (a fit for each K), random activations and units, in small memory and several passes."""
    monkeypatch.setattr(audit, "N_NULL", 2)
    cfg = dataclasses.replace(cfg, dump_to=str(tmp_path))
    alone = pathlib.Path(run.main([cfg]))
    others = [
        scorers_config.Random("dot"),
        scorers_config.KMeans(n_samples=200),
        cfg.scorer,
        scorers_config.Units(),
    ]
    small = 4 * N * P * 10 / 1e9  # scores of about 10 prototypes
    cfgs = [
        dataclasses.replace(cfg, scorer=scorer, n_prototypes=(6, D), memory_gb=small) for scorer in others
    ]
    dpath = pathlib.Path(run.main(cfgs))
    found, want = (pl.read_parquet(each / "audit.parquet") for each in (dpath, alone))
    assert dict(
        found.group_by("scorer", maintain_order=True).agg(pl.col("n_prototypes").max()).iter_rows()
    ) == {"constant": 1, "Random": D, "KMeans": D, "Sae run": D, "Units": D}
    is_sae = pl.col("scorer") == "Sae run"
    assert found.filter(is_sae).equals(want.filter(is_sae))
    rows, alone_rows = (read(each, "audit-yields.csv", patchresults.AUDIT_YIELDS) for each in (dpath, alone))
    assert rows.filter(is_sae).equals(alone_rows.filter(is_sae))
    against = read(dpath, "audit-differences.csv", patchresults.PATCH_DIFFERENCES)
    assert set(against["scorer"]) == {"KMeans", "Sae run", "Units"} and set(against["baseline"]) == {"Random"}
    value = {
        (s, m): v for s, _, m, v in rows.select(*patchresults.PATCH_CELL, "measure", "value").iter_rows()
    }
    for scorer, measure, difference in against.select("scorer", "measure", "difference").iter_rows():
        assert difference == pytest.approx(value[scorer, measure] - value["Random", measure])
    assert run.main(cfgs) == str(dpath)
    monkeypatch.setattr(audit_rank, "rank", None)  # of nothing that is done already
    assert run.main([cfg]) == str(alone)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "damaged"])
def test_a_killed_audit_goes_on(
    cfg: config.ProtoEval, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(audit, "N_NULL", 4)
    cfg = dataclasses.replace(cfg, dump_to=str(tmp_path / "once"))
    want = (pathlib.Path(run.main([cfg])) / "audit.parquet").read_bytes()
    again = dataclasses.replace(cfg, dump_to=str(tmp_path / "again"))
    own_rank, ranked = audit_rank.rank, []

    def rank(*args):
        if len(ranked) == 3 and killed:
            raise KeyboardInterrupt
        ranked.append(args)
        return own_rank(*args)

    monkeypatch.setattr(audit_rank, "rank", rank)
    killed = True
    with pytest.raises(KeyboardInterrupt):
        run.main([again])
    fpaths = sorted(tmp_path.glob("again/.*.partial/audit/*.npz"))
    assert len(fpaths) == 3
    if how == "damaged":
        fpaths[1].write_bytes(fpaths[1].read_bytes()[:-30])
    killed = False
    ranked.clear()
    assert (pathlib.Path(run.main([again])) / "audit.parquet").read_bytes() == want
    assert len(ranked) == (2 if how == "killed" else 3)


def test_bad_input_is_one_line(cfg: config.ProtoEval, root: pathlib.Path) -> None:
    masks = traits_config.Masks()
    for change, message in [
        ({"patch_labels": ""}, "--audit: needs patch labels. Pass --patch-labels"),
        ({"audit": (0, 10)}, "--audit 0: must be at least 1"),
        ({"labels": masks}, r"--patch-labels labels\.bin also gives the image labels \(labels:masks\)"),
    ]:
        with pytest.raises(errors.UserError, match=message):
            dataclasses.replace(cfg, **change)
    named = dataclasses.replace(cfg, labels=traits_config.Masks(label_name="other"))
    assert named.audit == cfg.audit  # other patch labels may rank
    with pytest.raises(errors.UserError, match="--audit 25: Sae run has 24 prototypes. Pass smaller numbers"):
        run.main([dataclasses.replace(cfg, audit=(10, 25))])
    kmeans = dataclasses.replace(cfg, scorer=scorers_config.KMeans(n_samples=100), n_prototypes=(3, 6))
    with pytest.raises(errors.UserError, match="--audit 12: KMeans has 6 prototypes"):
        run.main([kmeans])
    shard_dir = shards.ShardDir.open(cfg.train_data.shard_root)
    id_NP, _ = draw()
    frequent_NP = np.where(id_NP > 1, 1, id_NP)  # background and wings, which are more than 30%
    patchlabels.write(shard_dir, "frequent", frequent_NP[::-1], CLASSES, {})
    with pytest.raises(errors.UserError, match=r"no class of labels-frequent\.bin can be audited: each is"):
        run.main([dataclasses.replace(cfg, patch_labels="labels-frequent.bin")])
    assert not list(root.glob("**/scores.bin"))  # nothing was scored


def test_images_that_rank_are_not_measured(
    cfg: config.ProtoEval, root: pathlib.Path, result: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels of test images change neither ranking nor class, those of test patches the test AP alone."""
    monkeypatch.setattr(audit, "N_NULL", 1)
    first = pl.read_parquet(result / "audit.parquet")
    traits = pl.read_csv(root / "traits.csv")
    names = [f"trait{t}" for t in range(len(KEYS))]
    shuffled = traits.with_columns(
        pl.when(pl.col("split") == "test").then(pl.lit(1) - pl.col(name)).otherwise(pl.col(name)).alias(name)
        for name in names
    )
    shuffled.write_csv(root / "other.csv")
    table = dataclasses.replace(cfg.labels, file=str(root / "other.csv"))
    second = pl.read_parquet(
        pathlib.Path(run.main([dataclasses.replace(cfg, labels=table)])) / "audit.parquet"
    )
    assert second.equals(first)  # image labels of test images are not used
    id_NP, _ = draw()
    new_NP = np.where(IS_TRAIN_N[:, None], id_NP, np.roll(id_NP, 1, axis=1))
    patchlabels.write(shards.ShardDir.open(cfg.train_data.shard_root), "other", new_NP[::-1], CLASSES, {})
    third = run.main([dataclasses.replace(cfg, patch_labels="labels-other.bin")])
    third = pl.read_parquet(pathlib.Path(third) / "audit.parquet")
    same = ["scorer", "rank", "prototype", "penalty", "trait", "class", "train_ap"]
    assert third.select(same).equals(first.select(same)) and not third["test_ap"].equals(first["test_ap"])


DOCS = pathlib.Path(__file__).parent.parent / "docs"


def test_every_file_and_column_is_documented() -> None:
    text = (DOCS / "results.md").read_text()
    sections = {section.split("\n")[0]: section for section in text.split("\n### ")}
    for name in patchresults.AUDIT_FILES:
        assert f"| `{name}` |" in text
    for name, columns in (
        ("audit.parquet", patchresults.AUDIT),
        ("audit-yields.csv", patchresults.AUDIT_YIELDS),
        ("audit-differences.csv", patchresults.PATCH_DIFFERENCES),
    ):
        assert all(f"`{column}`" in sections[name] for column in columns), name
    assert memory.RANKINGS == 1 + audit.N_NULL
