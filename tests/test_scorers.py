"""Scorers against closed forms and scikit-learn. B activations, D d_vit, K prototypes."""

import pathlib

import numpy as np
import pytest
import sklearn.cluster
import sklearn.decomposition
import torch

from saev import errors, nn, scorers
from saev.data import config as data_config
from saev.nn import config as nn_config
from saev.scorers import base, config, kmeans, pca, random

D = 6


@pytest.fixture
def data(make_shards) -> tuple[data_config.Shards, np.ndarray]:
    """60 images of 5 patches around a large mean, and the activations as (300, D)."""
    rng = np.random.default_rng(0)
    stretch_D = np.array([5, 3, 2, 1, 0.5, 0.2])
    acts_NLTD = (rng.standard_normal((60, 1, 6, D)) * stretch_D + 50).astype(np.float32)
    dpath, acts_NLTD = make_shards(
        acts=acts_NLTD, n_imgs=60, n_patches=5, d_vit=D, layers=(4,), per_shard=7
    )
    return data_config.Shards(str(dpath), 4), acts_NLTD[:, 0, 1:].reshape(-1, D)


@pytest.mark.parametrize("similarity", ["dot", "cosine", "distance"])
def test_similarities_equal_their_formula(similarity: str) -> None:
    rng = np.random.default_rng(1)
    x_BD, p_KD, m_D = (
        rng.standard_normal((4, D)),
        rng.standard_normal((3, D)),
        rng.standard_normal(D),
    )
    scorer = base.Prototypes(torch.tensor(p_KD), torch.tensor(m_D), similarity)
    got_BK = scorer(torch.tensor(x_BD)).numpy()
    for b, x_D in enumerate(x_BD):
        for k, p_D in enumerate(p_KD):
            u_D, v_D = x_D - m_D, p_D - m_D
            want = {
                "dot": u_D @ v_D,
                "cosine": u_D @ v_D / np.linalg.norm(u_D) / np.linalg.norm(v_D),
                "distance": -np.sum((x_D - p_D) ** 2),
            }[similarity]
            assert got_BK[b, k] == pytest.approx(want, abs=1e-12)


def test_reservoir_draws_distinct_activations_of_the_stream(data) -> None:
    cfg, acts_BD = data
    sample = random.reservoir(cfg, 100, seed=3)
    rows = {row.tobytes(): i for i, row in enumerate(acts_BD)}
    drawn = [rows[row.tobytes()] for row in sample.acts_KD]
    assert len(set(drawn)) == 100
    np.testing.assert_allclose(sample.mean_D, acts_BD.mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_reservoir_is_nested_and_seeded(data) -> None:
    cfg, _ = data
    large_KD = random.reservoir(cfg, 200, seed=3).acts_KD
    np.testing.assert_array_equal(random.reservoir(cfg, 50, seed=3).acts_KD, large_KD[:50])
    assert not np.array_equal(random.reservoir(cfg, 50, seed=4).acts_KD, large_KD[:50])


def test_reservoir_is_uniform_over_the_stream(data) -> None:
    """Each activation is drawn with probability k / n: counts over many seeds stay within 5 standard deviations."""
    cfg, acts_BD = data
    rows = {row.tobytes(): i for i, row in enumerate(acts_BD)}
    counts_B = np.zeros(len(acts_BD))
    for seed in range(200):
        for row in random.reservoir(cfg, 30, seed=seed).acts_KD:
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
    scorer = pca.fit(config.Pca(), cfg, 4, seed=0)
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
    (scorer,) = kmeans.fit(config.KMeans(), data_config.Shards(str(dpath), 0), [4], seed=0)
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
    nn.save(
        nn.SparseAutoencoder(nn_config.TopK(d_vit=8, exp_factor=2, top_k=3)), tmp_path / "sae.pt"
    )
    with pytest.raises(errors.UserError, match=r"8 wide, but .* holds 6"):
        scorers.fit(config.Sae(str(tmp_path / "sae.pt")), data[0], 5)


@pytest.mark.parametrize(
    "cfg", [config.Random("dot"), config.KMeans(), config.Pca(both_signs=True)]
)
def test_round_trip_and_cache(
    cfg: config.Scorer, data, tmp_path: pathlib.Path, monkeypatch
) -> None:
    shards, acts_BD = data
    scorer = scorers.fit(cfg, shards, 5, dpath=tmp_path)
    (fpath,) = tmp_path.glob("*.bin")
    x_BD = torch.from_numpy(acts_BD)
    loaded = scorers.load(fpath)
    assert isinstance(loaded, scorers.Scorer)
    torch.testing.assert_close(loaded(x_BD), scorer(x_BD), rtol=0, atol=0)
    monkeypatch.setattr("saev.scorers.store.NESTED", {})  # a second fit would be a KeyError
    monkeypatch.setattr("saev.scorers.store.kmeans", {})  # or an AttributeError
    torch.testing.assert_close(scorers.fit(cfg, shards, 5, dpath=tmp_path)(x_BD), scorer(x_BD))
    with pytest.raises((KeyError, AttributeError)):
        scorers.fit(cfg, shards, 6, dpath=tmp_path)


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
    with pytest.raises(errors.UserError, match="tensors cannot be read"):
        scorers.load(fpath)
