"""Comparing dictionaries, against plain NumPy and SciPy. N images, P patches, D d_vit, S and Z latents."""

import dataclasses
import json
import pathlib
import sys

import forked
import inprocess
import numpy as np
import polars as pl
import pytest
import scipy.optimize
import torch

from saev import errors, nn, scorers
from saev.compare import config, correlate, match, memory, run, sides, store
from saev.data import activations, passes
from saev.data import config as data_config
from saev.data import memory as data_memory
from saev.formats import codeshards
from saev.nn import config as nn_config
from saev.report import figures
from saev.scorers import base, rows
from saev.scorers import config as scorers_config
from saev.scorers import sae as sae_scorer

pytestmark = pytest.mark.usefixtures("undrawn")
save_figure = figures.save
N, P, D = 40, 9, 12


@pytest.fixture
def made(make_shards) -> tuple[pathlib.Path, np.ndarray]:
    """Shards of two layers, and their patches (N, L, P, D)."""
    dpath, acts_NLTD = make_shards(n_imgs=N, n_patches=P, d_vit=D, layers=(3, 7), per_shard=11)
    return dpath, acts_NLTD[:, :, 1:]


def trained(
    fpath: pathlib.Path, seed: int, cfg: nn_config.Architecture | None = None
) -> nn.SparseAutoencoder:
    """A random SAE, saved."""
    sae = nn.SparseAutoencoder(cfg or nn_config.Relu(d_vit=D, exp_factor=2), seed=seed)
    with torch.no_grad():
        sae.b_enc.fill_(-0.5)
        sae.threshold.fill_(0.4)
    nn.save(sae, fpath, {"layers": [3]})
    return nn.load(fpath)


def permuted_copy(sae: nn.SparseAutoencoder, fpath: pathlib.Path, order_S: np.ndarray) -> None:
    """The same SAE with its latents in another order, each scaled by 2 (which no correlation sees)."""
    copy = nn.SparseAutoencoder(sae.cfg)
    copy.load_state_dict(sae.state_dict())
    with torch.no_grad():
        copy.W_enc.copy_(2 * sae.W_enc[:, order_S])
        copy.b_enc.copy_(2 * sae.b_enc[order_S])
        copy.W_dec.copy_(sae.W_dec[order_S])
    nn.save(copy, fpath, {"layers": [3]})


def configured(dpath: pathlib.Path, tmp_path: pathlib.Path, **given) -> config.Compare:
    """Compares a.pt with b.pt on layer 3."""
    fields = {
        "scorer": str(tmp_path / "a" / "sae.pt"),
        "other": str(tmp_path / "b" / "sae.pt"),
        "data": data_config.Shards(str(dpath), 3),
        "dump_to": str(tmp_path / "out"),
        "device": "cpu",
    }
    return config.Compare(**fields | given)


def read(out: str, name: str) -> pl.DataFrame:
    fpath = pathlib.Path(out) / name
    return pl.read_parquet(fpath) if fpath.suffix == ".parquet" else pl.read_csv(fpath)


def plain(f_RS: np.ndarray, f_RZ: np.ndarray) -> np.ndarray:
    """(S, Z) correlations, NaN where a latent is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(f_RS.T.astype(np.float64), f_RZ.T.astype(np.float64))[
            : f_RS.shape[1], f_RS.shape[1] :
        ]


def stored(dpath: pathlib.Path, f_RS: np.ndarray, per_image: int = 1) -> store.Store:
    """Codes in shards of 7 images."""
    dtypes = codeshards.csr("0") | {"0_values": codeshards.VALUES}
    shards = codeshards.Shards(dpath, len(f_RS) // per_image, 7, dtypes, "command")
    for i, first in enumerate(range(0, len(f_RS), 7 * per_image)):
        with shards.writing(i) as writer:
            writer.add_codes("0", rows.of_dense(torch.from_numpy(f_RS[first : first + 7 * per_image])))
    return store.Store(shards, "0", f_RS.shape[1], per_image, len(f_RS))


def sparse_codes(n_rows: int, n_latents: int, seed: int, density: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    f_RS = rng.random((n_rows, n_latents), np.float32) * (rng.random((n_rows, n_latents)) < density)
    f_RS[:, 1] = 0  # dead
    f_RS[:, 2] = 1.7  # constant
    return f_RS.astype(np.float32)


# ---- correlations ----


@pytest.mark.parametrize("memory_gb", [1e-9, 1e-5, 1.0])
@pytest.mark.parametrize("density", [0.05, 0.9])
def test_correlations_are_numpys(tmp_path: pathlib.Path, memory_gb: float, density: float) -> None:
    """In tiles and chunks of any size, by sparse and by dense products, in order and with permuted images."""
    f_RS, f_RZ = sparse_codes(60, 9, 0, density), sparse_codes(60, 70, 1, density)
    one, two = stored(tmp_path / "1", f_RS, 3), stored(tmp_path / "2", f_RZ, 3)
    assert (one.density * two.density > correlate.DENSE) == (density > 0.5)
    stats = (correlate.moments(one), correlate.moments(two))
    for order_N in (np.arange(20), run.permuted(20, 0)):
        found_SZ = np.empty((9, 70))
        for first, corr_TZ in correlate.tiles(one, two, (np.arange(20), order_N), stats, memory_gb):
            found_SZ[first : first + len(corr_TZ)] = corr_TZ
        moved_RZ = f_RZ.reshape(20, 3, 70)[order_N].reshape(60, 70)
        want_SZ = plain(f_RS, moved_RZ)
        want_SZ[1:3], want_SZ[:, 1:3] = np.nan, np.nan
        np.testing.assert_allclose(found_SZ, np.nan_to_num(want_SZ, nan=-np.inf), atol=1e-12)


def test_a_large_mean_costs_no_digits(tmp_path: pathlib.Path) -> None:
    """Such as the scores of --similarity distance."""
    rng = np.random.default_rng(0)
    f_RS = (-5000 + rng.standard_normal((500, 6))).astype(np.float32)
    codes = stored(tmp_path, f_RS)
    stats = correlate.moments(codes)
    (tile,) = correlate.tiles(codes, codes, (np.arange(500), np.arange(500)), (stats, stats), 1.0)
    assert stats.is_live_S.all()
    np.testing.assert_allclose(tile.corr_TZ, plain(f_RS, f_RS), atol=1e-7)


def test_rows_of_images_in_any_order(tmp_path: pathlib.Path) -> None:
    """And all codes in blocks of any size, over the borders of shards."""
    f_RS = sparse_codes(30, 5, 0, 0.4)
    codes = stored(tmp_path, f_RS, 3)
    value_n = f_RS[f_RS != 0]
    assert codes.n_codes == len(value_n) and codes.density == pytest.approx(len(value_n) / 150)
    for n in (1, 7, 1000):
        blocks = list(codes.blocks(n))
        assert {len(values) for _, values in blocks[:-1]} <= {n}
        np.testing.assert_array_equal(np.concatenate([values for _, values in blocks]), value_n)
        np.testing.assert_array_equal(np.concatenate([latents for latents, _ in blocks]), f_RS.nonzero()[1])
    for image_N in (np.arange(10), np.array([3, 4, 1, 9, 0, 0]), np.array([7])):
        found = codes.rows(image_N)
        want_RS = f_RS.reshape(10, 3, 5)[image_N].reshape(-1, 5)
        dense_RS = np.zeros_like(want_RS)
        for r in range(len(dense_RS)):
            part = slice(found.start_R1[r], found.start_R1[r + 1])
            dense_RS[r, found.latent_n[part]] = found.value_n[part]
        np.testing.assert_array_equal(dense_RS, want_RS)


def test_no_image_keeps_its_place_in_the_null() -> None:
    for n in (2, 3, 50):
        order_N = run.permuted(n, seed=3)
        assert sorted(order_N.tolist()) == list(range(n)) and (order_N != np.arange(n)).all()
    assert (run.permuted(50, 3) == run.permuted(50, 3)).all() and (
        run.permuted(50, 3) != run.permuted(50, 4)
    ).any()


# ---- matches ----


def in_tiles(corr_SZ: np.ndarray, n: int) -> list[correlate.Tile]:
    return [correlate.Tile(i, corr_SZ[i : i + n].copy()) for i in range(0, len(corr_SZ), n)]


@pytest.mark.parametrize("n", [1, 7, 100])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_matches_are_those_of_plain_loops(
    n: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    corr_SZ = rng.uniform(-0.5, 1, shape).round(1)  # ties
    corr_SZ[4], corr_SZ[:, 9] = -np.inf, -np.inf
    S, Z = shape
    found = match.match(in_tiles(corr_SZ, n), S, Z, candidates=12)
    for s in set(range(S)) - {4}:
        assert (
            found.one.latent_S[s] == int(np.argmax(corr_SZ[s])) and found.one.value_S[s] == corr_SZ[s].max()
        )
        assert found.one.is_mutual_S[s] == (int(np.argmax(corr_SZ[:, found.one.latent_S[s]])) == s)
    for z in set(range(Z)) - {9}:
        assert (
            found.two.latent_S[z] == int(np.argmax(corr_SZ[:, z]))
            and found.two.value_S[z] == corr_SZ[:, z].max()
        )
        assert found.two.is_mutual_S[z] == (int(np.argmax(corr_SZ[found.two.latent_S[z]])) == z)
    assert found.one.latent_S[4] == -1 and np.isnan(found.one.value_S[4]) and not found.one.is_mutual_S[4]
    assert found.two.latent_S[9] == -1 and np.isnan(found.two.value_S[9])
    assert found.one.is_mutual_S.sum() == found.two.is_mutual_S.sum() > 3
    # the optimum, over all pairs and among candidates
    one, two = scipy.optimize.linear_sum_assignment(corr_SZ.clip(min=0), maximize=True)
    best = corr_SZ[one, two].clip(min=0).sum()
    assert found.pairs is not None and found.pairs.is_exact
    monkeypatch.setattr(memory, "EXACT", 10)
    restricted = match.match(in_tiles(corr_SZ, n), S, Z, candidates=12).pairs
    assert restricted is not None and not restricted.is_exact
    for pairs in (found.pairs, restricted):
        at = np.flatnonzero(pairs.other_S >= 0)
        assert len(set(pairs.other_S[at].tolist())) == len(at) and 4 not in at
        np.testing.assert_allclose(pairs.corr_S[at], corr_SZ[at, pairs.other_S[at]])
        assert np.nansum(pairs.corr_S) == pytest.approx(best)
        assert (pairs.corr_S[at] > 0).all() and np.isnan(np.delete(pairs.corr_S, at)).all()


def test_shares_count_live_latents() -> None:
    corr_SZ = np.array([[0.9, 0.1, -np.inf], [0.2, 0.6, -np.inf], [0.3, 0.5, -np.inf]])
    found = match.match(in_tiles(corr_SZ, 2), 3, 3)
    live_S, live_Z = np.array([True] * 3), np.array([True, True, False])
    assert [found.one.share(t, live_S) for t in (0.0, 0.6, 0.61, 0.91)] == [2 / 3, 2 / 3, 1 / 3, 0]
    assert [found.two.share(t, live_Z) for t in (0.0, 0.7)] == [1, 0.5]
    assert found.one.mean() == pytest.approx((0.9 + 0.6 + 0.5) / 3)
    dead = match.match(in_tiles(np.full((2, 3), -np.inf), 1), 2, 3, candidates=3)
    assert np.isnan(dead.one.mean()) and dead.one.share(0.0, np.zeros(2, bool)) == 0


@pytest.mark.parametrize("at_once", [1, 2**26])
def test_cosines(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "COSINES", at_once)
    generator = torch.Generator().manual_seed(0)
    one_SD, two_ZD = (
        torch.nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (8, 11)
    )
    live_S, live_Z = np.arange(8) != 2, np.arange(11) != 5
    one, two = match.by_cosine(one_SD, two_ZD, live_S, live_Z)
    want_SZ = (one_SD @ two_ZD.T).double().numpy()
    want_SZ[2], want_SZ[:, 5] = -np.inf, -np.inf
    np.testing.assert_array_equal(one.latent_S[live_S], want_SZ[live_S].argmax(axis=1))
    np.testing.assert_array_equal(two.latent_S[live_Z], want_SZ[:, live_Z].argmax(axis=0))
    np.testing.assert_allclose(two.value_S[live_Z], want_SZ[:, live_Z].max(axis=0), rtol=1e-5)


# ---- whole comparisons ----


def test_cosines_of_saes_with_their_own_scales(made, tmp_path: pathlib.Path) -> None:
    """The same latents, with and without --sae.normalize per-dim, on a dimension that dominates raw cosines."""
    cfg = nn_config.TopK(d_vit=D, exp_factor=2, top_k=4)
    plain = trained(tmp_path / "a" / "sae.pt", 0, cfg)
    scale_D = torch.ones(D)
    scale_D[2] = 1e-3
    copies = [nn.SparseAutoencoder(dataclasses.replace(cfg, normalize="per-dim")) for _ in range(2)]
    for n, sae in enumerate(copies):
        state = plain.state_dict() | {"scale": scale_D * (1 + n)}
        state |= {"W_enc": plain.W_enc / state["scale"][:, None], "W_dec": plain.W_dec * state["scale"]}
        sae.load_state_dict(state)
        nn.save(sae, tmp_path / "bc"[n] / "sae.pt", {"layers": [3]})
    files = [str(tmp_path / name / "sae.pt") for name in "abc"]
    for one, two in ((0, 1), (1, 0), (1, 2)):
        pair = sides.open_all(configured(made[0], tmp_path, scorer=files[one], other=files[two]))
        want_KD = torch.nn.functional.normalize(plain.W_dec * scale_D, dim=1)
        for got_KD in sides.directions(*pair):
            torch.testing.assert_close(got_KD, want_KD)
    torch.testing.assert_close(copies[1].directions(), plain.directions())
    out = run.main(configured(made[0], tmp_path))
    found = read(out, "matches.parquet").filter("is_live")
    assert len(found) > 30 and found["cos_best"].equals(found["latent"], check_names=False)
    np.testing.assert_allclose(found["cos"], 1, atol=1e-6)


ARCHITECTURES = [
    nn_config.Relu(d_vit=D, exp_factor=2),
    nn_config.TopK(d_vit=D, exp_factor=2, top_k=4),
    nn_config.TopK(d_vit=D, exp_factor=2, top_k=4, keep_negative=True),
    nn_config.BatchTopK(d_vit=D, exp_factor=2, top_k=4),
    nn_config.JumpRelu(d_vit=D, exp_factor=2),
]


@pytest.mark.parametrize("cfg", ARCHITECTURES[:2])
@pytest.mark.parametrize("per", ["patch", "image"])
def test_a_permuted_copy_matches_in_full(
    made, tmp_path: pathlib.Path, cfg: nn_config.Architecture, per: str
) -> None:
    """All live latents, with correlation 1, and the permutation is recovered; by cosine too."""
    sae = trained(tmp_path / "a" / "sae.pt", 0, cfg)
    order_S = np.random.default_rng(1).permutation(sae.d_sae)
    permuted_copy(sae, tmp_path / "b" / "sae.pt", order_S)
    out = run.main(configured(made[0], tmp_path, per=per))
    found = read(out, "matches.parquet").filter("is_live")
    one, two = (found.filter(of=side) for side in ("one", "two"))
    assert len(one) == len(two) > 15
    assert order_S[one["best"].to_numpy()].tolist() == one["latent"].to_list()
    assert two["best"].to_list() == order_S[two["latent"].to_numpy()].tolist()
    for lines in (one, two):
        assert lines["is_mutual"].all() and lines["pair"].equals(lines["best"], check_names=False)
        np.testing.assert_allclose(lines["corr"], 1, atol=1e-6)
        assert lines["cos_best"].equals(lines["best"], check_names=False)
        np.testing.assert_allclose(lines["cos"], 1, atol=1e-6)
    curve = read(out, "curve.csv")
    last = curve.filter(pl.col("threshold") == 0.99).row(0, named=True)
    assert [
        last[f"{name}_{side}"] for name in ("share", "one_to_one", "cosine") for side in ("one", "two")
    ] == [1] * 6
    nulls = ("null", "one_to_one_null", "cosine_null")
    assert [last[f"{name}_{side}"] for name in nulls for side in ("one", "two")] == [0] * 6
    assert found["null_pair_corr"].max() < 0.99 and found["null_cos"].max() < 0.99
    text = (pathlib.Path(out) / "summary.md").read_text()
    assert text.count("| 100.0% (0.0%)") >= 6 and ("360 patches of 40 images" in text) == (per == "patch")


def test_an_independent_dictionary_lies_near_the_null(make_shards, tmp_path: pathlib.Path) -> None:
    """Each reads dimensions that are independent of the other's."""
    dpath, _ = make_shards(n_imgs=100, n_patches=P, d_vit=D, layers=(3,))
    for name, seed, dims in (("a", 0, slice(0, D // 2)), ("b", 1, slice(D // 2, D))):
        sae = trained(tmp_path / name / "sae.pt", seed)
        with torch.no_grad():
            other = sae.W_enc[dims].clone()
            sae.W_enc.zero_()[dims] = 2 * other
        nn.save(sae, tmp_path / name / "sae.pt")
    out = run.main(configured(dpath, tmp_path))
    (pair,) = read(out, "pairs.csv").iter_rows(named=True)
    assert abs(pair["corr_one"] - pair["null_one"]) < 0.02 and pair["corr_one"] < 0.2
    curve = read(out, "curve.csv").filter(pl.col("threshold") >= 0.3)
    shares = ("share_one", "share_two", "null_one", "one_to_one_one", "one_to_one_two", "one_to_one_null_one")
    assert curve.select(pl.max_horizontal(shares).max()).item() == 0
    one = read(out, "matches.parquet").filter("is_live", of="one")
    paired, null = (one[name].drop_nans().mean() for name in ("pair_corr", "null_pair_corr"))
    assert abs(paired - null) < 0.02 and 0.02 < null < 0.2
    assert abs(pair["mmcs_one"] - pair["mmcs_null_one"]) < 0.05  # decoder rows of two seeds
    assert abs(pair["mmcs_two"] - pair["mmcs_null_two"]) < 0.05


@pytest.mark.parametrize("n_latents", [200, 20])
def test_random_directions_have_the_mean_and_covariance_of_the_live_ones(n_latents: int) -> None:
    """Two draws of one crowded distribution come as close to each other as to their nulls. Isotropic
    directions do not come near. Also with fewer latents than dimensions."""
    D, generator = 32, torch.Generator().manual_seed(0)
    scale_D = 0.7 ** torch.arange(D)
    one_SD, two_SD = (
        torch.nn.functional.normalize(torch.randn(n_latents, D, generator=generator) * scale_D + 0.1, dim=1)
        for _ in range(2)
    )
    live_S = np.arange(n_latents) % 10 != 3
    one_SD[~torch.from_numpy(live_S)] = 1e3  # dead latents count for nothing
    drawn_SD = match.random_like(one_SD, live_S, 7)
    assert drawn_SD.shape == one_SD.shape and drawn_SD.norm(dim=1).sub(1).abs().max() < 1e-5
    assert torch.equal(drawn_SD, match.random_like(one_SD, live_S, 7))
    one_SD[~torch.from_numpy(live_S)] = one_SD[0].clone()
    found = match.cosines(one_SD, two_SD, live_S, np.ones(n_latents, bool), 7)
    assert abs(found.one.mean() - found.null_one.mean()) < 0.05
    assert abs(found.two.mean() - found.null_two.mean()) < 0.05
    isotropic_SD = torch.nn.functional.normalize(torch.randn(n_latents, D, generator=generator), dim=1)
    isotropic, _ = match.by_cosine(one_SD, isotropic_SD, live_S, np.ones(n_latents, bool))
    assert isotropic.mean() < found.null_one.mean() - 0.15
    if n_latents == 200:  # their moments, before they are scaled to length 1, up to the sample's noise
        x_LD = one_SD[torch.from_numpy(live_S)].numpy()
        many_SD = match.random_like(torch.from_numpy(x_LD).repeat(100, 1), np.ones(100 * len(x_LD), bool), 1)
        np.testing.assert_allclose(many_SD.numpy().mean(axis=0), x_LD.mean(axis=0), atol=0.05)
        np.testing.assert_allclose(np.cov(many_SD.numpy().T), np.cov(x_LD.T), atol=0.1)


@pytest.mark.parametrize("cfg", ARCHITECTURES)
@pytest.mark.parametrize(("per", "pool"), [("patch", "max"), ("image", "max"), ("image", "mean")])
def test_every_architecture_against_numpy(
    made, tmp_path: pathlib.Path, cfg: nn_config.Architecture, per: str, pool: str
) -> None:
    dpath, acts_NLPD = made
    one = trained(tmp_path / "a" / "sae.pt", 0, cfg)
    two = trained(tmp_path / "b" / "sae.pt", 1)
    out = run.main(configured(dpath, tmp_path, per=per, pool=pool))
    x_NPD = torch.from_numpy(np.ascontiguousarray(acts_NLPD[:, 0]))
    f, g = (sae.encode(x_NPD).numpy().astype(np.float64) for sae in (one, two))
    if per == "image":
        f, g = (x.max(axis=1) if pool == "max" else x.mean(axis=1) for x in (f, g))
    corr_SZ = plain(f.reshape(-1, f.shape[-1]), g.reshape(-1, g.shape[-1]))
    lines = read(out, "matches.parquet").filter(of="one")
    live_S = lines["is_live"].to_numpy()
    np.testing.assert_array_equal(live_S, ~np.isnan(corr_SZ).all(axis=1))
    np.testing.assert_allclose(
        lines["corr"].to_numpy()[live_S], np.nanmax(corr_SZ[live_S], axis=1), atol=1e-5
    )


def test_fitted_scorers(made, tmp_path: pathlib.Path) -> None:
    """Their scores are dense; an SAE of the same layer shares their space."""
    dpath, acts_NLPD = made
    rng = np.random.default_rng(0)
    vectors_KD = torch.from_numpy(rng.standard_normal((10, D)).astype(np.float32))
    scorer = base.Prototypes.of(vectors_KD, torch.zeros(D), "plain")
    scorers.save(scorer, tmp_path / "p.bin")
    sae = trained(tmp_path / "b" / "sae.pt", 1)
    out = run.main(configured(dpath, tmp_path, scorer=str(tmp_path / "p.bin")))
    x_RD = np.ascontiguousarray(acts_NLPD[:, 0]).reshape(-1, D)
    corr_SZ = plain(x_RD @ vectors_KD.numpy().T, sae.encode(torch.from_numpy(x_RD)).numpy())
    lines = read(out, "matches.parquet").filter(of="one")
    np.testing.assert_allclose(lines["corr"], np.nanmax(corr_SZ, axis=1), atol=1e-5)
    cosine_SZ = torch.nn.functional.normalize(vectors_KD, dim=1) @ sae.W_dec.T
    np.testing.assert_allclose(lines["cos"], cosine_SZ.amax(dim=1), atol=1e-5)
    sides_ = read(out, "dictionaries.csv")
    assert sides_["name"].to_list() == ["p", "b"] and sides_["kind"].to_list() == [
        "Prototypes (plain)",
        "Relu",
    ]


def test_an_untrained_sae(made, tmp_path: pathlib.Path) -> None:
    """Compared with the SAE whose shape it has."""
    dpath, acts_NLPD = made
    sae = trained(tmp_path / "b" / "sae.pt", 1)
    like = scorers_config.Untrained(str(tmp_path / "b" / "sae.pt"))
    scorers.fit(like, data_config.Shards(str(dpath), 3), sae.d_sae, dpath=tmp_path / "scorers")
    (fpath,) = (tmp_path / "scorers").glob("untrained-*.bin")
    out = run.main(configured(dpath, tmp_path, scorer=str(fpath)))
    x_RD = torch.from_numpy(np.ascontiguousarray(acts_NLPD[:, 0])).reshape(-1, D)
    corr_SZ = plain(nn.load(fpath).encode(x_RD).numpy(), sae.encode(x_RD).numpy())
    lines = read(out, "matches.parquet").filter(of="one")
    np.testing.assert_allclose(lines["corr"], np.nanmax(corr_SZ, axis=1), atol=1e-5)
    sides_ = read(out, "dictionaries.csv")
    assert sides_["name"].to_list() == [fpath.stem, "b"] and sides_["kind"].to_list() == ["Relu"] * 2


def test_quarters_by_frequency(made, tmp_path: pathlib.Path) -> None:
    """The summary's table against NumPy."""
    for name, seed in (("a", 0), ("b", 1)):
        trained(tmp_path / name / "sae.pt", seed)
    out = run.main(configured(made[0], tmp_path, thresholds=(0.4,)))
    lines = (pathlib.Path(out) / "summary.md").read_text().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("| Dictionary | Latents")]
    rows = [line.strip("| ").split(" | ") for line in lines[start + 2 : start + 10]]
    assert [row[:2] for row in rows] == [
        [name, q] for name in "ab" for q in ("rarest quarter", "second", "third", "most frequent")
    ]
    live = read(out, "matches.parquet").filter("is_live", of="one").sort("frequency", maintain_order=True)
    for row, part in zip(rows[:4], np.array_split(np.arange(len(live)), 4), strict=True):
        mine = live[part]
        share = np.mean(mine["is_mutual"].to_numpy() & (mine["corr"].to_numpy() >= 0.4))
        assert row[2:4] == [f"{np.median(mine['frequency']):.3%}", f"{share:.1%}"]
        assert row[4] == f"{mine['corr'].mean():.3f} ({mine['null_corr'].mean():.3f})"


# ---- images, grids ----


def test_images_are_joined_by_path(make_shards, tmp_path: pathlib.Path) -> None:
    """The other ViT has another grid, other images, and its images in another order."""
    dpath, acts = make_shards(n_imgs=30, n_patches=P, d_vit=D, layers=(3,))
    other_dpath, other = make_shards(n_imgs=20, n_patches=4, d_vit=6, layers=(5,), name="other", seed=1)
    fpath = other_dpath / "images.jsonl"
    assert fpath.exists()
    one = trained(tmp_path / "a" / "sae.pt", 0)
    sae = trained(tmp_path / "b" / "sae.pt", 1, nn_config.Relu(d_vit=6, exp_factor=2))
    nn.save(sae, tmp_path / "b" / "sae.pt", {"layers": [5]})
    cfg = configured(dpath, tmp_path, other_data=data_config.Shards(str(other_dpath), 5))
    out = run.main(cfg)
    f_NS = one.encode(torch.from_numpy(np.ascontiguousarray(acts[:20, 0, 1:]))).amax(dim=1).numpy()
    g_NZ = sae.encode(torch.from_numpy(np.ascontiguousarray(other[:, 0, 1:]))).amax(dim=1).numpy()
    lines = read(out, "matches.parquet").filter("is_live", of="one")
    corr_SZ = plain(f_NS, g_NZ)
    np.testing.assert_allclose(
        lines["corr"], np.nanmax(corr_SZ[lines["latent"].to_numpy()], axis=1), atol=1e-5
    )
    assert lines["cos"].is_nan().all()
    assert read(out, "dictionaries.csv")["n_images_left_out"].to_list() == [10, 0]
    text = (pathlib.Path(out) / "summary.md").read_text()
    assert "over 20 images" in text and "10 images that a side lacks" in text and "not in one space" in text
    with pytest.raises(errors.UserError, match="--per patch: .*9 and 4 patches"):
        run.main(dataclasses.replace(cfg, per="patch"))
    drawn = run.main(dataclasses.replace(cfg, n_images=7))
    assert drawn != out and "over 7 images" in (pathlib.Path(drawn) / "summary.md").read_text()


def test_another_order_of_images(
    make_shards, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpath, acts = make_shards(n_imgs=12, n_patches=P, d_vit=D, layers=(3,))
    order_N = np.random.default_rng(0).permutation(12)
    other_dpath, _ = make_shards(n_imgs=12, n_patches=P, d_vit=D, layers=(3,), acts=acts[order_N])
    sae = trained(tmp_path / "a" / "sae.pt", 0)
    nn.save(sae, tmp_path / "b" / "sae.pt")
    cfg = configured(dpath, tmp_path, other_data=data_config.Shards(str(other_dpath), 3), per="image")
    plain_numbered = sides._by_path
    paths = [r.path for r in activations.Activations.open(cfg.data).records]

    def numbered(acts, key):
        if str(acts.root) != str(other_dpath):
            return plain_numbered(acts, key)
        return {paths[order_N[i]]: i for i in range(12)}

    monkeypatch.setattr(sides, "_by_path", numbered)
    lines = read(run.main(cfg), "matches.parquet").filter("is_live", of="one")
    assert lines["best"].equals(lines["latent"], check_names=False) and lines["is_mutual"].all()
    np.testing.assert_allclose(lines["corr"], 1, atol=1e-6)


def test_no_image_in_common(make_shards, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dpath, _ = make_shards(n_imgs=6, n_patches=P, d_vit=D, layers=(3,))
    other_dpath, _ = make_shards(n_imgs=6, n_patches=P, d_vit=D, layers=(3,), name="other")
    for name in "ab":
        nn.save(nn.SparseAutoencoder(nn_config.Relu(d_vit=D)), tmp_path / name / "sae.pt")
    cfg = configured(dpath, tmp_path, other_data=data_config.Shards(str(other_dpath), 3))
    plain_numbered = sides._by_path

    def numbered(acts, key):
        return {f"{acts.root}{k}": v for k, v in plain_numbered(acts, key).items()}

    monkeypatch.setattr(sides, "_by_path", numbered)
    with pytest.raises(errors.UserError, match="0 images in common"):
        run.main(cfg)


# ---- several runs, resuming, the command ----


def test_runs_of_two_layers(made, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each SAE is run on its own layer; pairs are named by what differs."""
    monkeypatch.setattr(figures, "save", save_figure)
    dpath, acts_NLPD = made
    sae = trained(tmp_path / "runs" / "a" / "sae.pt", 0)
    permuted_copy(sae, tmp_path / "runs" / "b" / "sae.pt", np.random.default_rng(0).permutation(sae.d_sae))
    wider = nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=3), seed=2)
    nn.save(wider, tmp_path / "runs" / "c" / "sae.pt", {"layers": [7]})
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps({"seed": seed}))
    cfg = configured(dpath, tmp_path, scorer="", other="", runs=(str(tmp_path / "runs"),))
    out = run.main(cfg)
    assert read(out, "dictionaries.csv")["layer"].to_list() == [3, 3, 7]
    pairs = read(out, "pairs.csv")
    assert pairs["differ"].to_list() == ["seed", "layer, latents, seed", "layer, latents, seed"]
    pairs = pairs.with_columns(pl.col("mmcs_one", "mmcs_two").cast(pl.Float64))
    assert pairs["mmcs_one"].is_nan().to_list() == [False, True, True]
    assert pairs["corr_one"][0] == pytest.approx(1, abs=1e-6) and pairs["mmcs_two"][0] == pytest.approx(
        1, abs=1e-6
    )
    f_RS = sae.encode(torch.from_numpy(np.ascontiguousarray(acts_NLPD[:, 0]))).flatten(0, 1).numpy()
    g_RZ = (
        wider.encode(torch.from_numpy(np.ascontiguousarray(acts_NLPD[:, 1]))).detach().flatten(0, 1).numpy()
    )
    best = np.nanmax(plain(f_RS, g_RZ), axis=1)
    assert pairs["corr_one"][1] == pytest.approx(np.nanmean(best), abs=1e-6)
    assert not (pathlib.Path(out) / "matches.parquet").exists()
    text = (pathlib.Path(out) / "summary.md").read_text()
    assert (pathlib.Path(out) / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "| seed | 1 | 100.0% (" in text and text.count("\n| c |") == 1
    assert run.main(cfg) == out


def test_stability_over_seeds_is_one_command_on_a_sweep(made, tmp_path: pathlib.Path) -> None:
    sweep = tmp_path / "seeds.toml"
    sweep.write_text(
        "seed = [0, 1, 2]\nn_patches = 640\nbatch_size = 64\nsae = {type = 'top-k', exp_factor = 2, top_k = 4}"
    )
    data = ("--data.shard-root", made[0], "--data.layer", 3, "--device", "cpu")
    args = ("--sweep", sweep, *data, "--ckpt-to", tmp_path / "checkpoints", "--wandb-project", "")
    done = inprocess.run("train.py", *args)
    assert done.returncode == 0 and len(done.stdout.split()) == 3, done.stderr
    args = ("--runs", tmp_path / "checkpoints", *data[:2], "--device", "cpu", "--dump-to", tmp_path / "out")
    done = inprocess.run("-m", "saev.compare", *args)
    assert done.returncode == 0, done.stderr
    assert "\n| seed | 3 | " in done.stdout  # three pairs that differ in the seed
    out = done.stdout.splitlines()[-1]
    assert sorted(read(out, "dictionaries.csv")["seed"]) == [0, 1, 2]
    assert read(out, "pairs.csv")["differ"].to_list() == ["seed"] * 3
    curve = read(out, "curve.csv")
    assert curve.filter(pl.col("threshold") == 0)["share_one"].min() > 0.2
    assert curve["cosine_null_one"].is_between(0, 1).all() and curve["null_one"].min() < 0.1


def test_mistakes_are_one_line(made, tmp_path: pathlib.Path) -> None:
    dpath, _ = made
    sae = trained(tmp_path / "a" / "sae.pt", 0)
    nn.save(sae, tmp_path / "b" / "sae.pt", {"layers": [7]})
    wrong = {
        "given twice": {"other": str(tmp_path / "a" / "sae.pt")},
        "no such checkpoint": {"other": str(tmp_path / "none.pt")},
        "layer 3 instead of 7": {},
        "holds one dictionary": {"scorer": "", "other": "", "runs": (str(tmp_path / "a"),)},
        "no checkpoint, run directory": {"scorer": "", "other": "", "runs": (str(tmp_path / "none"),)},
    }
    for message, given in wrong.items():
        with pytest.raises(errors.UserError, match=message):
            run.main(configured(dpath, tmp_path, **given))
    flags = {
        "--runs takes all": {"runs": ("x",)},
        "not --runs": {"runs": ("x",), "scorer": "", "other": "", "gallery": "x"},
        "needs --gallery": {"other_gallery": "x"},
        "name two dictionaries": {"other": ""},
    }
    for message, given in flags.items():
        with pytest.raises(errors.UserError, match=message):
            configured(dpath, tmp_path, **given).check()
    assert list(tmp_path.glob("out/*")) == []


def test_another_layer_of_the_same_shards(made, tmp_path: pathlib.Path) -> None:
    cfg = configured(made[0], tmp_path, other_data=data_config.Shards(layer=7))
    assert cfg.second_data == data_config.Shards(str(made[0]), 7)
    assert configured(made[0], tmp_path).second_data == cfg.data


def encoded(acts: activations.Activations, dpath: pathlib.Path, run_: list) -> list[store.Store]:
    return store.encode(run_, acts, store.per_patch, dpath, torch.device("cpu"))


def test_a_pass_that_stopped_resumes(made, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete shards stay, those with changed bytes are encoded again."""
    acts = activations.Activations.open(data_config.Shards(str(made[0]), 3))
    run_ = [sae_scorer.SaeLatents(trained(tmp_path / f"{i}.pt", i), 2 * D) for i in range(2)]
    monkeypatch.setattr(data_memory, "MAX_IMAGES", 5)
    monkeypatch.setattr(passes, "MIN_PATCHES", 1)  # a shard is a block
    whole = encoded(acts, tmp_path / "whole", run_)
    want = files_of(tmp_path / "whole")
    assert len(want) == 8 * 7
    real, n_calls = rows.of_dense, 0

    def killed(*args):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 8:  # in the fourth block, between the two scorers
            raise KeyboardInterrupt
        return real(*args)

    for damage in ("none", "0_values.bin", "shard.json"):
        dpath, n_calls = tmp_path / damage, 0
        monkeypatch.setattr(rows, "of_dense", killed)
        with pytest.raises(KeyboardInterrupt):
            encoded(acts, dpath, run_)
        if damage != "none":
            (fpath,) = dpath.glob(f"*/shard000001/{damage}")
            data = bytearray(fpath.read_bytes())
            data[len(data) // 2] ^= 1
            fpath.write_bytes(bytes(data))
        n_calls = -100
        found = encoded(acts, dpath, run_)
        n_encoded = n_calls + 100
        assert n_encoded == 2 * (5 if damage == "none" else 6)
        assert files_of(dpath) == want
        every = np.arange(N)
        np.testing.assert_array_equal(found[1].rows(every).value_n, whole[1].rows(every).value_n)


def files_of(dpath: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(dpath)): f.read_bytes() for f in dpath.rglob("*") if f.is_file()}


@pytest.mark.slow
def test_a_killed_command_ends_as_an_undisturbed_one(made, tmp_path: pathlib.Path) -> None:
    """kill -9 in the pass; then the same command."""
    trained(tmp_path / "a" / "sae.pt", 0)
    trained(tmp_path / "b" / "sae.pt", 1)
    words = [
        "-m",
        "saev.compare",
        "--scorer",
        tmp_path / "a" / "sae.pt",
        "--other",
        tmp_path / "b" / "sae.pt",
    ]
    words += ["--data.shard-root", made[0], "--data.layer", "3", "--device", "cpu", "--dump-to"]
    slowed = """
import os, runpy, signal, sys
from saev.data import memory, passes
from saev.scorers import rows
memory.MAX_IMAGES, passes.MIN_PATCHES = 3, 1
real, calls = rows.of_dense, []
def sparse(*args):
    calls.append(1)
    if len(calls) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
rows.of_dense = sparse
sys.argv = sys.argv[1:]
runpy.run_module("saev.compare", run_name="__main__", alter_sys=True)
"""
    flags = [str(w) for w in words[2:]]
    done = forked.run(
        [sys.executable, "-c", slowed, "x", *flags, str(tmp_path / "killed")], cwd=inprocess.ROOT
    )
    assert done.returncode == -9
    left = {f.name[-8:] for f in (tmp_path / "killed").iterdir()}
    assert left == {".partial", "ial.lock"} and list((tmp_path / "killed").glob(".*.partial/0/*/shard000000"))
    ends = [inprocess.run(*words, tmp_path / name) for name in ("killed", "whole")]
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr
    one, two = (pathlib.Path(end.stdout.splitlines()[-1]) for end in ends)
    assert one.name == two.name and list((tmp_path / "killed").glob(".*")) == []
    for name in ("matches.parquet", "curve.csv", "pairs.csv", "summary.md", "dictionaries.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert "Correlation" in ends[0].stdout


def test_dry_run_and_flags() -> None:
    done = inprocess.run("-m", "saev.compare", "--dry-run", "--runs", "a", "b", "--slurm-acct", "X")
    assert done.returncode == 0 and "runs = ('a', 'b')" in done.stdout and "1 Slurm job" in done.stdout
    done = inprocess.run("-m", "saev.compare", "--scorer", "x")
    assert done.returncode == 2 and done.stderr.startswith("error: name two dictionaries")


# ---- the ViT's units ----


@pytest.mark.parametrize("per", ["patch", "image"])
def test_raw_units_are_a_dictionary(made, tmp_path: pathlib.Path, per: str) -> None:
    """Against plain correlations of the activations themselves. Cosines are the decoder's entries."""
    dpath, acts_NLPD = made
    sae = trained(tmp_path / "a" / "sae.pt", 0)
    out = run.main(configured(dpath, tmp_path, other="units", per=per))
    found = read(out, "matches.parquet")
    text = (pathlib.Path(out) / "summary.md").read_text()
    assert "| a | rarest quarter" in text and "| units | rarest quarter" not in text  # they always fire
    x_NPD = acts_NLPD[:, 0]
    f_NPS = sae.encode(torch.from_numpy(x_NPD)).numpy()
    rows = [v.reshape(N * P, -1) if per == "patch" else v.max(axis=1) for v in (f_NPS, x_NPD)]
    want_SD = plain(*rows)
    one, two = found.filter(of="one"), found.filter(of="two")
    live_S = one["is_live"].to_numpy()
    np.testing.assert_allclose(one["corr"].to_numpy()[live_S], want_SD[live_S].max(axis=1), atol=1e-6)
    np.testing.assert_array_equal(two["best"].to_numpy(), want_SD[live_S].argmax(axis=0))
    assert len(two) == D and two["is_live"].all()
    cosine_SD = sae.W_dec.detach().numpy()[live_S]
    np.testing.assert_allclose(one["cos"].to_numpy()[live_S], cosine_SD.max(axis=1), atol=1e-6)


def test_raw_units_among_runs(made, tmp_path: pathlib.Path) -> None:
    dpath, _ = made
    trained(tmp_path / "a" / "sae.pt", 0)
    out = run.main(
        configured(dpath, tmp_path, scorer="", other="", runs=("units", str(tmp_path / "a" / "sae.pt")))
    )
    assert read(out, "dictionaries.csv")["kind"].to_list() == ["Units", "Relu"]
    assert read(out, "pairs.csv")["one"].to_list() == ["units"]
    assert read(out, "pairs.csv")["differ"].to_list() == ["kind, latents"]  # not the seed: units have none
