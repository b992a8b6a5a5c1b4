"""Scorers against closed forms and scikit-learn. B activations, D d_vit, K prototypes."""

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import forked
import numpy as np
import pytest
import sklearn.cluster
import sklearn.decomposition
import torch

from saev import errors, nn, scorers
from saev.data import activations
from saev.data import config as data_config
from saev.formats import checkpoint, tensors
from saev.nn import config as nn_config
from saev.scorers import base, config, kmeans, random
from saev.scorers import sae as sae_scorer

D = 6


@pytest.fixture
def data(make_shards) -> tuple[data_config.Shards, np.ndarray]:
    """60 images of 5 patches around a large mean, and the activations as (300, D)."""
    rng = np.random.default_rng(0)
    stretch_D = np.array([5, 3, 2, 1, 0.5, 0.2])
    acts_NLTD = (rng.standard_normal((60, 1, 6, D)) * stretch_D + 50).astype(np.float32)
    dpath, acts_NLTD = make_shards(acts=acts_NLTD, n_imgs=60, n_patches=5, d_vit=D, layers=(4,), per_shard=7)
    return data_config.Shards(str(dpath), 4), acts_NLTD[:, 0, 1:].reshape(-1, D)


@pytest.mark.parametrize("similarity", ["plain", "dot", "cosine", "distance"])
def test_similarities_equal_their_formula(similarity: str) -> None:
    rng = np.random.default_rng(1)
    x_BD, p_KD, m_D = (rng.standard_normal((4, D)), rng.standard_normal((3, D)), rng.standard_normal(D))
    scorer = base.Prototypes.of(torch.tensor(p_KD), torch.tensor(m_D), similarity)
    got_BK = scorer(torch.tensor(x_BD)).numpy()
    for b, x_D in enumerate(x_BD):
        for k, p_D in enumerate(p_KD):
            u_D, v_D = x_D - m_D, p_D - m_D
            want = {
                "plain": x_D @ p_D,
                "dot": u_D @ v_D,
                "cosine": u_D @ v_D / np.linalg.norm(u_D) / np.linalg.norm(v_D),
                "distance": -np.sum((x_D - p_D) ** 2),
            }[similarity]
            assert got_BK[b, k] == pytest.approx(want, abs=1e-12)


def test_plain_scores_are_products_with_the_very_activations(data, tmp_path: pathlib.Path) -> None:
    """Scores stay exact after saving, loading and taking a prefix: the mean is not subtracted and added back."""
    cfg, acts_BD = data
    want_KD = random.reservoir(activations.Activations(cfg), 40, seed=0).acts_KD
    x_BD = torch.from_numpy(acts_BD)
    for _ in range(2):  # fits, then loads
        scorer = scorers.fit(config.Random("plain"), cfg, 40, dpath=tmp_path)
        np.testing.assert_array_equal(scorer.vectors_KD.numpy(), want_KD)
        want_BK = x_BD @ torch.from_numpy(want_KD).T
        torch.testing.assert_close(scorer(x_BD), want_BK, rtol=1e-6, atol=0)
        part = scorer.prefix(7).to(torch.device("cpu"))
        torch.testing.assert_close(part(x_BD), want_BK[:, :7], rtol=1e-6, atol=0)
    assert scorer.digest() != scorers.fit(config.Random("dot"), cfg, 40, dpath=tmp_path).digest()


def test_scorers_take_any_float_type_and_refuse_the_rest_in_one_line(data, tmp_path: pathlib.Path) -> None:
    cfg, acts_BD = data
    nn.save(nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=2)), tmp_path / "sae.pt")
    plain = scorers.fit(config.Random("plain"), cfg, 5)
    x_BD = torch.from_numpy(acts_BD)
    for scorer in (plain, scorers.load(tmp_path / "sae.pt")):
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            got_BK = scorer(x_BD.to(dtype))
            torch.testing.assert_close(got_BK, scorer(x_BD.to(dtype).float()), rtol=0, atol=0)
        assert scorer(x_BD[:0]).shape == (0, scorer.n_prototypes)
        for bad, text in (
            (x_BD[:, :4], r"shape \(300, 4\); this scorer takes \(B, D\) with D = 6"),
            (x_BD[0], r"shape \(6,\)"),
            (x_BD.long(), "torch.int64; a scorer takes a dense torch tensor of floats"),
            (x_BD.to_sparse(), "torch.float32; a scorer takes a dense torch tensor of floats"),
            (acts_BD.tolist(), "list; a scorer"),
            (x_BD.to("meta"), "on meta, but the scorer is on cpu"),
        ):
            with pytest.raises(errors.UserError, match=text):
                scorer(bad)


@pytest.mark.parametrize("similarity", ["plain", "dot", "cosine"])
def test_products_beyond_float32_are_not_scored_as_0(similarity: str) -> None:
    scorer = base.Prototypes.of(torch.full((1, D), 1e20), torch.zeros(D), similarity)
    assert not scorer(torch.full((2, D), 1e20)).isfinite().any()


def test_reservoir_draws_distinct_activations_of_the_stream(data) -> None:
    cfg, acts_BD = data
    sample = random.reservoir(activations.Activations(cfg), 100, seed=3)
    rows = {row.tobytes(): i for i, row in enumerate(acts_BD)}
    drawn = [rows[row.tobytes()] for row in sample.acts_KD]
    assert len(set(drawn)) == 100
    np.testing.assert_allclose(sample.mean_D, acts_BD.mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_reservoir_is_nested_and_seeded(data) -> None:
    cfg, _ = data
    large_KD = random.reservoir(activations.Activations(cfg), 200, seed=3).acts_KD
    np.testing.assert_array_equal(
        random.reservoir(activations.Activations(cfg), 50, seed=3).acts_KD, large_KD[:50]
    )
    assert not np.array_equal(
        random.reservoir(activations.Activations(cfg), 50, seed=4).acts_KD, large_KD[:50]
    )


def test_reservoir_is_uniform_over_the_stream(data) -> None:
    """Each activation is drawn with probability k / n: counts over many seeds stay within 5 standard deviations."""
    cfg, acts_BD = data
    rows = {row.tobytes(): i for i, row in enumerate(acts_BD)}
    counts_B = np.zeros(len(acts_BD))
    for seed in range(200):
        for row in random.reservoir(activations.Activations(cfg), 30, seed=seed).acts_KD:
            counts_B[rows[row.tobytes()]] += 1
    expected, p = 200 * 0.1, 0.1
    assert np.abs(counts_B - expected).max() < 5 * np.sqrt(200 * p * (1 - p))


def test_too_few_activations(data) -> None:
    cfg, _ = data
    for scorer in (config.Random(), config.KMeans()):
        with pytest.raises(errors.UserError, match="holds 300 activations, fewer than 301"):
            scorers.fit(scorer, cfg, 301)


def test_pca_equals_sklearn_up_to_sign(data) -> None:
    cfg, acts_BD = data
    scorer = scorers.fit(config.Pca(), cfg, 4)
    want_KD = sklearn.decomposition.PCA(4).fit(acts_BD.astype(np.float64)).components_
    got_KD = (scorer.vectors_KD - scorer.mean_D).numpy()
    np.testing.assert_allclose(np.abs((got_KD * want_KD).sum(axis=1)), 1, atol=1e-4)
    assert (np.take_along_axis(got_KD, np.abs(got_KD).argmax(1)[:, None], 1) > 0).all()


def test_pca_scores_are_centred_projections(data) -> None:
    cfg, acts_BD = data
    scores_BK = scorers.fit(config.Pca(), cfg, D)(torch.from_numpy(acts_BD)).numpy()
    np.testing.assert_allclose(scores_BK.mean(axis=0), 0, atol=1e-3)
    want_K = np.sort(np.linalg.eigvalsh(np.cov(acts_BD.T, bias=True)))[::-1]
    np.testing.assert_allclose(scores_BK.var(axis=0), want_K, rtol=1e-3)


def test_pca_has_at_most_d_components_and_both_signs_double_them(data) -> None:
    cfg, acts_BD = data
    assert scorers.fit(config.Pca(), cfg, 100).n_prototypes == D
    both_BK = scorers.fit(config.Pca(both_signs=True), cfg, 100)(torch.from_numpy(acts_BD))
    assert both_BK.shape[1] == 2 * D
    torch.testing.assert_close(both_BK[:, 0::2], -both_BK[:, 1::2])


def test_kmeans_finds_planted_clusters(make_shards) -> None:
    rng = np.random.default_rng(0)
    center_KD = 10 * rng.standard_normal((4, D))
    acts = center_KD[rng.integers(0, 4, (50, 1, 6))] + 0.1 * rng.standard_normal((50, 1, 6, D))
    dpath, _ = make_shards(
        acts=acts.astype(np.float32), n_imgs=50, n_patches=5, d_vit=D, layers=(0,), per_shard=9
    )
    (scorer,) = kmeans.fit(
        config.KMeans(), activations.Activations(data_config.Shards(str(dpath), 0)), [4], seed=0
    )
    distance_KK = np.linalg.norm(scorer.vectors_KD.numpy()[:, None] - center_KD[None], axis=2)
    assert distance_KK.min(axis=0).max() < 0.2


def test_kmeans_inertia_is_not_worse_than_sklearn_on_everything(data) -> None:
    cfg, acts_BD = data
    center_KD = scorers.fit(config.KMeans(n_iters=50), cfg, 12).vectors_KD.numpy()
    inertia = ((acts_BD[:, None] - center_KD[None]) ** 2).sum(2).min(1).sum()
    want = sklearn.cluster.KMeans(12, n_init=1, random_state=1).fit(acts_BD).inertia_
    assert inertia < 1.1 * want


def test_sae_scores_are_its_first_latents_codes(data, tmp_path: pathlib.Path) -> None:
    cfg, acts_BD = data
    sae = nn.SparseAutoencoder(nn_config.TopK(d_vit=D, exp_factor=3, top_k=2)).eval()
    sae.initialize(torch.from_numpy(acts_BD))
    nn.save(sae, tmp_path / "sae.pt")
    scorer = scorers.fit(config.Sae(str(tmp_path / "sae.pt")), cfg, 5)
    x_BD = torch.from_numpy(acts_BD)
    torch.testing.assert_close(scorer(x_BD), sae.encode(x_BD)[:, :5].detach(), rtol=0, atol=0)
    assert scorers.fit(config.Sae(str(tmp_path / "sae.pt")), cfg, 99).n_prototypes == 18


def test_sae_of_another_width_is_refused(data, tmp_path: pathlib.Path) -> None:
    nn.save(nn.SparseAutoencoder(nn_config.TopK(d_vit=8, exp_factor=2, top_k=3)), tmp_path / "sae.pt")
    with pytest.raises(errors.UserError, match="d_vit 6 instead of 8"):
        scorers.fit(config.Sae(str(tmp_path / "sae.pt")), data[0], 5)


@pytest.mark.parametrize("cfg", [config.Random(), config.KMeans(), config.Pca()])
def test_round_trip_and_cache(cfg: config.Scorer, data, tmp_path: pathlib.Path, monkeypatch) -> None:
    shards, acts_BD = data
    scorer = scorers.fit(cfg, shards, 5, dpath=tmp_path)
    (fpath,) = tmp_path.glob("*.bin")
    x_BD = torch.from_numpy(acts_BD)
    loaded = scorers.load(fpath).prefix(5)
    assert isinstance(loaded, scorers.Scorer)
    torch.testing.assert_close(loaded(x_BD), scorer(x_BD), rtol=0, atol=0)
    monkeypatch.delattr("saev.scorers.store._fit")  # a second fit would be a NameError
    torch.testing.assert_close(scorers.fit(cfg, shards, 5, dpath=tmp_path)(x_BD), scorer(x_BD))
    with pytest.raises(NameError):
        scorers.fit(cfg, data_config.Shards(shards.shard_root, 4, "all"), 5, dpath=tmp_path)


def test_an_sae_checkpoint_loads_as_a_scorer(tmp_path: pathlib.Path) -> None:
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=2)).eval()
    nn.save(sae, tmp_path / "sae.pt")
    scorer = scorers.load(tmp_path / "sae.pt")
    assert scorer.n_prototypes == 12
    x_BD = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scorer(x_BD), sae.encode(x_BD).detach())


def test_cut_scorer_file(data, tmp_path: pathlib.Path) -> None:
    scorers.fit(config.Pca(), data[0], 3, dpath=tmp_path)
    (fpath,) = tmp_path.glob("*.bin")
    fpath.write_bytes(fpath.read_bytes()[:-50])
    with pytest.raises(errors.UserError, match=r"its bytes changed since it was written .* Delete it"):
        scorers.load(fpath)


CRAFTED = {
    "another width": ({"direction_KD": torch.zeros(3, 9), "mean_D": torch.zeros(9)}, r"\(3, 9\) ins"),
    "one row less": ({"direction_KD": torch.zeros(2, D)}, r"\(2, 6\) instead of \(3, 6\)"),
    "no rows": ({"direction_KD": torch.zeros(0, D)}, r"shape \(0, 6\)"),
    "another mean": ({"mean_D": torch.zeros(5)}, "are not prototypes"),
    "NaN": ({"mean_D": torch.full((D,), torch.nan)}, "mean_D holds NaN or infinity"),
    "float64": ({"mean_D": torch.zeros(D).double()}, "are torch.float32"),
    "a number": ({"direction_KD": 7}, "are not prototypes"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_scorers_with_a_good_checksum_are_refused(data, tmp_path, name: str) -> None:
    scorers.fit(config.Random(), data[0], 3, dpath=tmp_path)
    (fpath,) = tmp_path.glob("*.bin")
    changes, match = CRAFTED[name]
    tree = {"direction_KD": torch.zeros(3, D), "mean_D": torch.zeros(D), **changes}
    header = {"cls": "Prototypes", "similarity": "dot"}
    checkpoint.write(fpath, "scorer", header, tensors.dump(tree))
    with pytest.raises(errors.UserError, match=rf"\.bin: .*{match}[^\n]*Delete [^\n]*$"):
        scorers.fit(config.Random(), data[0], 3, dpath=tmp_path)
    checkpoint.write(fpath, "scorer", header | {"similarity": "likeness"}, tensors.dump(tree))
    with pytest.raises(errors.UserError, match=r"\.bin: [^\n]*$"):
        scorers.load(fpath)


def test_every_flipped_bit_of_a_scorer_is_refused(data, tmp_path: pathlib.Path) -> None:
    """One of each byte, and all of a sample."""
    scorers.fit(config.Random(), data[0], 3, dpath=tmp_path)
    (fpath,) = tmp_path.glob("*.bin")
    content = fpath.read_bytes()
    for i in range(0, 8 * len(content), 9):
        bad = bytearray(content)
        bad[i // 8] ^= 1 << i % 8
        fpath.write_bytes(bad)
        with pytest.raises(errors.UserError):
            scorers.load(fpath)


def test_a_file_with_a_strange_name_among_the_scorers_is_passed_over(data, tmp_path) -> None:
    scorers.fit(config.Random(), data[0], 3, dpath=tmp_path)
    (fpath,) = tmp_path.glob("*.bin")
    shutil.copy(fpath, fpath.with_name(fpath.name.replace("-3-", "-many-")))
    assert scorers.fit(config.Random(), data[0], 3, dpath=tmp_path).n_prototypes == 3


# ---- reuse of fits ----


def test_a_fit_serves_every_use_of_it(data, tmp_path: pathlib.Path, monkeypatch) -> None:
    """Other similarities, signs and fewer components need no new pass; another seed does."""
    shards, acts_BD = data
    for cfg in (config.Random(), config.KMeans(n_iters=2), config.Pca()):
        scorers.fit(cfg, shards, 5, dpath=tmp_path)
    monkeypatch.delattr("saev.scorers.store._fit")
    x_BD = torch.from_numpy(acts_BD)
    for cls in (config.Random, lambda **used: config.KMeans(n_iters=2, **used)):
        dot, distance = (
            scorers.fit(cls(similarity=name), shards, 5, dpath=tmp_path) for name in ("dot", "distance")
        )
        assert (dot.similarity, distance.similarity) == ("dot", "distance")
        want_BK = -torch.cdist(x_BD, distance.vectors_KD).square()
        torch.testing.assert_close(distance(x_BD), want_BK, rtol=1e-3, atol=1e-2)
    both = scorers.fit(config.Pca(both_signs=True), shards, 100, dpath=tmp_path)
    one = scorers.fit(config.Pca(), shards, 100, dpath=tmp_path, seed=3)  # PCA does not use the seed
    assert (both.n_prototypes, one.n_prototypes) == (2 * D, D)
    with pytest.raises(NameError):
        scorers.fit(config.Random(), shards, 5, dpath=tmp_path, seed=3)


@pytest.mark.slow
def test_two_processes_fit_once(data, tmp_path: pathlib.Path) -> None:
    code = """
        import pathlib, sys, time
        from saev import scorers
        from saev.data import config as data_config
        from saev.scorers import config, kmeans
        slow = kmeans.one_pass
        def one_pass(*args):
            slow(*args)
            time.sleep(0.3)
            print("pass", flush=True)
        kmeans.one_pass = one_pass
        print("ready", flush=True)
        sys.stdin.readline()
        data = data_config.Shards(sys.argv[1], int(sys.argv[2]))
        scorers.fit(config.KMeans(n_iters=3, tolerance=0.0), data, 7, dpath=pathlib.Path(sys.argv[3]))
    """
    shards, _ = data
    command = [sys.executable, "-c", textwrap.dedent(code), shards.shard_root, str(shards.layer)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    both = [forked.Popen([*command, str(tmp_path / "s")], **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.count("pass") for text in said) == [0, 3]
    assert [f.suffix for f in (tmp_path / "s").iterdir()] == [".bin"]  # neither lock nor state


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_pca_of_a_large_mean_and_of_blocks_far_apart(make_shards, offset: float) -> None:
    """The first images are far from the rest, so block means differ from the overall mean."""
    rng = np.random.default_rng(0)
    acts = rng.standard_normal((300, 1, 5, D)) * np.arange(1, D + 1) + offset
    acts[:64] += 300
    dpath, acts_NLTD = make_shards(
        acts=acts.astype(np.float32), n_imgs=300, n_patches=4, d_vit=D, layers=(0,), per_shard=64
    )
    acts_BD = acts_NLTD[:, 0, 1:].reshape(-1, D)
    scorer = scorers.fit(config.Pca(), data_config.Shards(str(dpath), 0), D)
    wide_BD = acts_BD.astype(np.float64) - acts_BD.astype(np.float64).mean(axis=0)
    want_KD = np.linalg.svd(wide_BD, full_matrices=False)[2]
    want_KD *= np.sign(np.take_along_axis(want_KD, np.abs(want_KD).argmax(1)[:, None], 1))
    np.testing.assert_allclose(scorer.direction_KD.numpy(), want_KD, atol=2e-5)


def test_components_are_no_more_than_activations_span(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=2, n_patches=3, d_vit=16, layers=(0,))
    assert scorers.fit(config.Pca(), data_config.Shards(str(dpath), 0), 16).n_prototypes == 5


def test_a_scorer_moved_elsewhere_leaves_the_one_it_came_from(data, tmp_path: pathlib.Path) -> None:
    nn.save(nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=2)), tmp_path / "sae.pt")
    for scorer in (scorers.load(tmp_path / "sae.pt"), scorers.fit(config.Pca(), data[0], 3)):
        want = scorer.digest()
        assert scorer.prefix(2).digest() != want
        scorer.to(torch.device("meta"))
        assert scorer.digest() == want


def test_the_sample_is_that_of_sorting_all_keys(data) -> None:
    """Regardless of how often the reservoir is compacted."""
    shards, acts_BD = data
    key_B = np.random.default_rng((5, 0xACE)).random(len(acts_BD))
    for k in (1, 7, 290, 300):
        want_KD = acts_BD[np.argsort(key_B)[:k]]
        np.testing.assert_array_equal(
            random.reservoir(activations.Activations(shards), k, 5).acts_KD, want_KD
        )
    monkey = np.random.default_rng(0).random(500)
    key_R, acts_RD = monkey.copy(), monkey[:, None].astype(np.float32)
    bound = random._compact(key_R, acts_RD, 60)
    np.testing.assert_array_equal(np.sort(key_R[:60]), np.sort(monkey)[:60])
    np.testing.assert_array_equal(acts_RD[:60, 0], key_R[:60].astype(np.float32))
    assert bound == np.sort(monkey)[59] and np.isinf(key_R[60:]).all()


def test_units_score_by_each_dimension_and_its_negative(make_shards) -> None:
    dpath, acts_NLTD = make_shards()
    scorer = scorers.fit(config.Units(), data_config.Shards(str(dpath), 7), 100)
    x_BD = torch.from_numpy(acts_NLTD[:, 1, 1:].reshape(-1, acts_NLTD.shape[-1]))
    score_BK = scorer(x_BD).unflatten(1, (-1, 2))
    assert scorer.n_prototypes == 2 * x_BD.shape[1]
    assert torch.equal(score_BK[:, :, 0], x_BD) and torch.equal(score_BK[:, :, 1], -x_BD)
    three = scorers.fit(config.Units(), data_config.Shards(str(dpath), 7), 3)
    assert torch.equal(three(x_BD), scorer(x_BD)[:, :3])


# ---- SAEs before training ----

SAES = [
    nn_config.Relu(d_vit=D, exp_factor=4),
    nn_config.TopK(d_vit=D, d_sae=30, top_k=4, keep_negative=True),
    nn_config.BatchTopK(d_vit=D, exp_factor=4, top_k=4, normalize="none"),
    nn_config.BatchTopK(d_vit=D, d_sae=6, top_k=6),
    nn_config.JumpRelu(d_vit=D, exp_factor=4, tied_init=False),
]


@pytest.mark.parametrize("sae_cfg", SAES, ids=lambda c: f"{type(c).__name__} {c.n_latents}")
def test_an_untrained_sae_is_that_of_the_first_step(
    data, tmp_path: pathlib.Path, sae_cfg: nn_config.Sae
) -> None:
    """The shape of the trained one, whose weights change nothing; and as many latents fire as its config says."""
    cfg, acts_BD = data
    acts = activations.Activations(cfg)
    trained = nn.SparseAutoencoder(sae_cfg, 7)
    torch.nn.init.normal_(trained.W_enc)
    trained.b_enc.data.fill_(9)
    trained.threshold.fill_(3)
    fpath = tmp_path / "run" / "sae.pt"
    fpath.parent.mkdir()
    nn.save(trained, fpath, acts.space.describe())
    like = config.Untrained(str(fpath))
    made, again, other = (
        scorers.fit(like, cfg, 5, seed=seed, dpath=tmp_path / name)
        for seed, name in ((2, "a"), (2, "a"), (3, "b"))
    )
    assert isinstance(made, sae_scorer.SaeLatents) and made.n_prototypes == 5
    assert made.digest() == again.digest() != other.digest()
    (stored,) = (tmp_path / "a").glob(f"untrained-{sae_cfg.n_latents}-*.bin")
    got, want = nn.load(stored), nn.SparseAutoencoder(sae_cfg, 2)
    want.initialize(torch.from_numpy(random.reservoir(acts, len(acts), 2).acts_KD))
    assert got.cfg == trained.cfg and got.activations == nn.load(fpath).activations
    for name, value in want.state_dict().items():
        if name != "threshold":
            torch.testing.assert_close(got.state_dict()[name], value, rtol=0, atol=0)
    l0 = float((got.encode(acts_BD) != 0).sum(dim=1).float().mean())
    pre_BS = (torch.from_numpy(acts_BD) * got.scale - got.b_dec) @ got.W_enc
    positive = float((pre_BS > 0).sum(dim=1).float().mean())
    want_l0 = {
        nn_config.Relu: positive,
        nn_config.TopK: 4,
        nn_config.BatchTopK: min(getattr(sae_cfg, "top_k", 0), positive),
        nn_config.JumpRelu: l0,
    }[type(sae_cfg)]
    assert l0 == pytest.approx(want_l0, rel=0.01) and l0 >= 0.99


def test_an_untrained_sae_needs_a_trained_one_of_these_activations(data, tmp_path: pathlib.Path) -> None:
    cfg, _ = data
    with pytest.raises(errors.UserError, match="--scorer.like is missing: pass the sae.pt of a trained SAE"):
        scorers.fit(config.Untrained(), cfg, 5)
    with pytest.raises(errors.UserError, match="no such checkpoint"):
        scorers.fit(config.Untrained(str(tmp_path / "sae.pt")), cfg, 5, dpath=tmp_path / "s")
    trained = nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=4))
    space = activations.Activations(cfg).space.describe()
    nn.save(trained, tmp_path / "sae.pt", space | {"layers": [9]})
    with pytest.raises(errors.UserError, match="sae.pt.*layer"):
        scorers.fit(config.Untrained(str(tmp_path / "sae.pt")), cfg, 5, dpath=tmp_path / "s")
    nn.save(trained, tmp_path / "sae.pt", space)
    scorers.fit(config.Untrained(str(tmp_path / "sae.pt")), cfg, 5, dpath=tmp_path / "s")
    (stored,) = (tmp_path / "s").glob("*.bin")
    scorers.save(scorers.fit(config.Random(), cfg, 24), stored)
    with pytest.raises(errors.UserError, match=r"holds \(24, 6\) instead of \(24, 6\)|Delete the file"):
        scorers.fit(config.Untrained(str(tmp_path / "sae.pt")), cfg, 5, dpath=tmp_path / "s")


def test_the_kind_of_a_file(data: tuple[data_config.Shards, np.ndarray], tmp_path: pathlib.Path) -> None:
    """By the name that it was given when it was fitted; a renamed file is of no known kind."""
    fitted = {
        "random": config.Random(),
        "pca": config.Pca(),
        "kmeans": config.KMeans(n_samples=20, n_iters=1),
    }
    for kind, cfg in fitted.items():
        scorers.fit(cfg, data[0], 2, dpath=tmp_path / kind)
        (fpath,) = (tmp_path / kind).glob("*.bin")
        assert scorers.kind_of(fpath) == kind
        assert scorers.kind_of(fpath.rename(tmp_path / f"mine-{kind}.bin")) == "prototypes"
