"""--sae.normalize per-dim in everything that uses an SAE. N activations, P patches, D d_vit, S latents."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch
from test_training import plant

from saev import nn
from saev.data import config as data_config
from saev.nn import config as nn_config
from saev.nn import robust
from saev.scorers import rows
from saev.scorers import sae as sae_scorer
from saev.training import config, evaluate, loop, run

D, S = 32, 128
BAD = 5
"""The dimension with 1,000 times the deviations of the others."""


def activations(n_imgs: int = 400) -> np.ndarray:
    """Planted dictionary (n_imgs, 1, 20, D), and a dimension that says nothing about the others."""
    acts, _ = plant(n_imgs, 20, D, 64)
    deviation = acts.reshape(-1, D).std(axis=0).mean()
    noise = np.random.default_rng(1).standard_normal(acts.shape[:-1])
    acts[..., BAD] = deviation * (3000 + 1000 * noise)
    return acts


def configured(tmp_path: pathlib.Path, sae: nn_config.Sae, **given) -> config.Train:
    usual = {"n_patches": 300 * 256, "batch_size": 256, "dead_window": 20 * 256, "log_every": 300}
    usual |= {"ckpt_to": str(tmp_path / "checkpoints"), "wandb_project": "", "device": "cpu"}
    return config.Train(sae=sae, **(usual | given))


@pytest.mark.slow
@pytest.mark.parametrize("cls", [nn_config.TopK, nn_config.BatchTopK])
def test_an_outlier_dimension_costs_no_latents(
    make_shards, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, cls: type
) -> None:
    """Two SAEs on one stream of bfloat16, which differ in --sae.normalize alone."""
    shape = {"n_imgs": 400, "n_patches": 20, "d_vit": D, "layers": (0,), "cls_token": False}
    dpath, _ = make_shards(acts=activations(), **shape, per_shard=100, dtype="bfloat16")
    data = data_config.Shards(str(dpath))
    saes = [cls(exp_factor=4, top_k=4, normalize=name) for name in ("scale", "per-dim")]
    fpaths = loop.main([configured(tmp_path, sae, data=data) for sae in saes])
    warned = [r.message for r in caplog.records if "--sae.normalize per-dim" in r.message]
    assert len(warned) == 1 and warned[0].startswith(f"dimension {BAD} holds 100% of the activations' varia")
    plain, per_dim = (json.loads(pathlib.Path(f).with_name("metrics.json").read_text()) for f in fpaths)
    assert plain["dead_pct"] > 0.4 and per_dim["dead_pct"] < 0.05
    assert plain["explained_variance_median_dim"] < 0 and per_dim["explained_variance_median_dim"] > 0.8


def test_units_of_a_dimension_do_not_matter() -> None:
    """An SAE on activations of which one dimension is 2^10 times as large is the same SAE, bit for bit."""
    x_ND = torch.from_numpy(plant(50, 20, D, 64)[0].reshape(-1, D))
    unit_D = torch.ones(D)
    unit_D[BAD] = 2**10
    cfg = configured(
        pathlib.Path(), nn_config.BatchTopK(exp_factor=4, top_k=4, normalize="per-dim", init="data")
    )
    cfg = cfg.with_d_vit(D)
    runs = [run.Run(cfg, pathlib.Path(), torch.device("cpu")) for _ in range(2)]
    for one, unit in zip(runs, (torch.ones(D), unit_D), strict=True):
        one.start(x_ND * unit)
        for step in range(10):
            one.step(step, x_ND[step::4][:200] * unit)
    (one, two), names = (r.sae.state_dict() for r in runs), ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    assert all(torch.equal(one[name], two[name]) for name in names)
    assert torch.equal(one["scale"], two["scale"] * unit_D) and one["scale"].std() > 0


def test_extreme_activations_are_clipped_in_units_of_deviations() -> None:
    """A dimension with huge deviations does not hide them. The clipped ones are 5 radii from the centre in these units."""
    x_ND = torch.from_numpy(activations(50).reshape(-1, D))
    x_ND[::100, :BAD] += 300
    is_far_N = np.arange(len(x_ND)) % 100 == 0
    cfg = configured(pathlib.Path(), nn_config.TopK(top_k=4, normalize="per-dim"), max_norm_ratio=5.0)
    one = run.Run(cfg.with_d_vit(D), pathlib.Path(), torch.device("cpu"))
    one.start(x_ND)
    usual_ND, clipped_ND = x_ND.double().numpy()[~is_far_N], one.clip(x_ND).double().numpy()
    mean_D, deviation_D = usual_ND.mean(axis=0), usual_ND.std(axis=0)
    np.testing.assert_allclose(clipped_ND[~is_far_N], usual_ND, rtol=1e-5, atol=1e-3)
    norm_N = np.linalg.norm((clipped_ND[is_far_N] - mean_D) / deviation_D, axis=1)
    np.testing.assert_allclose(norm_N, 5 * D**0.5, rtol=1e-3)


# ---- against the same SAE in raw units ----

ARCHITECTURES = [
    nn_config.Relu(d_vit=D, d_sae=S, normalize="per-dim"),
    nn_config.TopK(d_vit=D, d_sae=S, top_k=9, normalize="per-dim"),
    nn_config.TopK(d_vit=D, d_sae=S, top_k=9, normalize="per-dim", keep_negative=True),
    nn_config.BatchTopK(d_vit=D, d_sae=S, top_k=9, normalize="per-dim"),
    nn_config.JumpRelu(d_vit=D, d_sae=S, normalize="per-dim"),
]


@pytest.fixture(scope="module")
def acts_NPD() -> torch.Tensor:
    return torch.from_numpy(activations(40)[:, 0])


@pytest.fixture(params=ARCHITECTURES, ids=lambda c: type(c).__name__)
def both(request: pytest.FixtureRequest, acts_NPD: torch.Tensor) -> list[nn.SparseAutoencoder]:
    """An SAE, and one without normalisation whose weights hold the scale: f = act((x - b / s) s W_enc + b_enc)."""
    sae = nn.SparseAutoencoder(request.param, 1).eval().requires_grad_(False)
    sae.initialize(acts_NPD.flatten(0, 1))
    sae.b_enc.copy_(0.3 * torch.randn(S, generator=torch.Generator().manual_seed(2)))
    sae.threshold.fill_(0.7)
    raw = nn.SparseAutoencoder(dataclasses.replace(request.param, normalize="none")).eval()
    state = {name: tensor.double() for name, tensor in sae.state_dict().items()}
    scale_D = state["scale"]
    state |= {"W_enc": scale_D[:, None] * state["W_enc"], "W_dec": state["W_dec"] / scale_D}
    raw.load_state_dict(state | {"b_dec": state["b_dec"] / scale_D, "scale": torch.ones(())})
    return [sae, raw.requires_grad_(False)]


def test_scores_of_images_and_sparse_rows_are_those_in_raw_units(both, acts_NPD: torch.Tensor) -> None:
    one, two = (sae_scorer.SaeLatents(sae, S) for sae in both)
    want_NS = two.of_images(acts_NPD)
    assert (want_NS > 0).float().mean() > 0.02
    torch.testing.assert_close(one.of_images(acts_NPD), want_NS, atol=1e-3, rtol=1e-3)
    x_ND = acts_NPD.flatten(0, 1)
    torch.testing.assert_close(one(x_ND), two(x_ND), atol=1e-3, rtol=1e-3)
    coded = rows.of_sae(one)(x_ND)
    f_NS = np.zeros((len(x_ND), S), np.float32)
    f_NS[np.repeat(np.arange(len(x_ND)), np.diff(coded.start_R1)), coded.latent_n] = coded.value_n
    np.testing.assert_allclose(f_NS, two(x_ND), atol=1e-3, rtol=1e-3)


def test_evaluation_is_in_raw_units(both, acts_NPD: torch.Tensor) -> None:
    """All but the two figures of decoder rows, which are in the SAE's own units."""
    x_ND = acts_NPD.flatten(0, 1)
    one, two = (evaluate.Sums(sae, robust.typical(x_ND)) for sae in both)
    for sums in (one, two):
        sums.add(x_ND)
    own = ("coherence", "avg_w_col_norm")
    got, want = ({k: v for k, v in sums.metrics().items() if k not in own} for sums in (one, two))
    assert got == pytest.approx(want, rel=2e-3, abs=1e-4)
    x_hat_ND = both[1](x_ND)[0].double().numpy()
    explained_D = 1 - (x_ND.numpy() - x_hat_ND).var(axis=0) / x_ND.double().numpy().var(axis=0)
    median = np.sort(explained_D)[(D - 1) // 2]
    assert got["explained_variance_median_dim"] == pytest.approx(median, rel=1e-3)
    assert one.metrics()["avg_w_col_norm"] == pytest.approx(1)


@pytest.mark.parametrize("given", [{"b_dec_init": "geometric-median"}, {"resample_every": 5}], ids=str)
def test_units_of_a_dimension_do_not_matter_to_its_median_and_resampling(given: dict) -> None:
    """Bit for bit, as above: 2^10 times the values in one dimension, then a median and drawn activations."""
    x_ND = torch.from_numpy(plant(20, 20, D, 64)[0].reshape(-1, D))
    unit_D = torch.ones(D)
    unit_D[BAD] = 2**10
    cfg = configured(pathlib.Path(), nn_config.Relu(exp_factor=4, normalize="per-dim", **given)).with_d_vit(D)
    states = []
    for unit in (torch.ones(D), unit_D):
        one = run.Run(cfg, pathlib.Path(), torch.device("cpu"))
        one.start(x_ND * unit)
        if "resample_every" in given:
            one.tokens_since_fired_S[:50] = cfg.window
            one.resample(5, x_ND * unit)
            assert (one.tokens_since_fired_S[:50] == 0).all()
        states.append(one.sae.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("W_enc", "W_dec", "b_dec"))
