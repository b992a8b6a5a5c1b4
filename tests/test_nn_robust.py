"""Robust statistics against plain formulas over the ordinary activations. N activations, D d_vit."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saev import nn
from saev.nn import config, robust

D = 16


def ordinary(n: int = 4000, offset: float = 5.0) -> Tensor:
    rng = np.random.default_rng(0)
    spread_D = np.linspace(0.3, 3, D)
    return torch.from_numpy((offset + spread_D * rng.standard_normal((n, D))).astype(np.float32))


def with_sinks(share: float, norm: float) -> tuple[Tensor, Tensor]:
    """Returns activations, a fraction of them moved far along one direction, and which those are."""
    x_ND = ordinary()
    is_sink_N = torch.rand(len(x_ND), generator=torch.Generator().manual_seed(0)) < share
    x_ND[is_sink_N, 3] += norm
    return x_ND, is_sink_N


def test_without_extreme_activations_it_is_the_mean_and_the_plain_spread() -> None:
    x_ND = ordinary()
    found = robust.typical(x_ND)
    np.testing.assert_allclose(found.centre_D, x_ND.double().mean(dim=0), rtol=1e-5)
    variance = x_ND.double().var(dim=0, correction=0).sum().item()
    assert found.radius.item() == pytest.approx(math.sqrt(variance), rel=1e-5)


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.2])
@pytest.mark.parametrize("norm", [100.0, 1e4, 1e15])
def test_sinks_move_neither_centre_nor_radius(share: float, norm: float) -> None:
    x_ND, is_sink_N = with_sinks(share, norm)
    found, want = robust.typical(x_ND), robust.typical(x_ND[~is_sink_N])
    torch.testing.assert_close(found.centre_D, want.centre_D)
    torch.testing.assert_close(found.radius, want.radius)


def test_activations_that_are_mostly_equal_have_a_radius_all_the_same() -> None:
    x_ND = torch.ones(100, D)
    x_ND[:30] = ordinary(30)
    found = robust.typical(x_ND)
    variance = x_ND.double().var(dim=0, correction=0).sum().item()
    assert found.radius.item() == pytest.approx(math.sqrt(variance), rel=1e-4)


def test_clipping_moves_the_far_ones_alone() -> None:
    x_ND, is_sink_N = with_sinks(0.01, 1000)
    around = robust.typical(x_ND)
    clipped_ND = robust.clip(x_ND, around, 5.0)
    assert torch.equal(clipped_ND[~is_sink_N], x_ND[~is_sink_N])
    from_centre_ND = (clipped_ND - around.centre_D)[is_sink_N]
    norm_N = from_centre_ND.norm(dim=1)
    torch.testing.assert_close(norm_N, (5 * around.radius).expand_as(norm_N))
    cos_N = torch.cosine_similarity(from_centre_ND, (x_ND - around.centre_D)[is_sink_N])
    torch.testing.assert_close(cos_N, torch.ones_like(cos_N))
    assert robust.clip(ordinary(), around, 5.0).equal(ordinary())
    constant_ND = torch.ones(8, D)
    assert robust.clip(constant_ND, robust.typical(constant_ND), 5.0).equal(constant_ND)


def test_figures_of_tokens_are_numpys() -> None:
    x_ND, is_sink_N = with_sinks(0.01, 1000)
    noise_ND = torch.randn(x_ND.shape, generator=torch.Generator().manual_seed(1))
    x_hat_ND = x_ND + noise_ND * torch.linspace(0, 2, len(x_ND))[:, None]
    around = robust.typical(x_ND)
    tokens = robust.Tokens(around)
    for i in range(0, len(x_ND), 777):
        tokens.add(x_ND[i : i + 777], (x_ND - x_hat_ND)[i : i + 777])
    found = tokens.metrics()
    error_N = (x_ND - x_hat_ND).double().square().sum(dim=1) / around.radius.double() ** 2
    assert found["token_nmse_median"] == pytest.approx(np.quantile(error_N, 0.5), rel=0.012)
    assert found["token_nmse_q95"] == pytest.approx(np.quantile(error_N, 0.95), rel=0.012)
    assert found["extreme_frac"] == pytest.approx(is_sink_N.double().mean().item())
    square_N = (x_ND - around.centre_D).double().square().sum(dim=1)
    share = (square_N[is_sink_N].sum() / square_N.sum()).item()
    assert found["extreme_variance_frac"] == pytest.approx(share, rel=1e-4)


def test_figures_of_constant_activations_and_of_perfect_reconstructions() -> None:
    constant_ND = torch.full((50, D), 50.1)
    tokens = robust.Tokens(robust.typical(constant_ND))
    tokens.add(constant_ND, 0 * constant_ND)
    found = tokens.metrics()
    assert math.isnan(found["token_nmse_median"]) and found["extreme_frac"] == 0
    x_ND = ordinary(50)
    tokens = robust.Tokens(robust.typical(x_ND))
    tokens.add(x_ND, 0 * x_ND)
    assert tokens.metrics()["token_nmse_q95"] == 0


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_each_dimension_alone(scale: float) -> None:
    """Numpy over the ordinary ones, although one dimension's deviations hide the sinks of the others."""
    x_ND, is_sink_N = with_sinks(0.01, 300)
    x_ND[:, 7] *= scale
    x_ND[:, 9] = 0.1
    found = robust.by_dimension(x_ND)
    want_ND = x_ND[~is_sink_N].double().numpy()
    np.testing.assert_allclose(found.centre_D, want_ND.mean(axis=0), rtol=1e-6)
    want_D = np.where(np.arange(D) == 9, 0, want_ND.std(axis=0))
    np.testing.assert_allclose(found.deviation_D, want_D, rtol=1e-6)


def test_deviations_far_smaller_than_the_mean_lose_no_digits() -> None:
    rng = np.random.default_rng(0)
    x_ND = torch.from_numpy((3000 + rng.standard_normal((20_000, D))).astype(np.float32))
    found = robust.by_dimension(x_ND)
    np.testing.assert_allclose(found.deviation_D, x_ND.double().numpy().std(axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    "value_N", [7.3 * torch.ones(500), 1e-40 * torch.randn(500)], ids=["constant", "denormal"]
)
def test_a_dimension_without_deviations_gets_the_usual_scale(value_N: torch.Tensor) -> None:
    """The inverse of a denormal deviation would be infinite."""
    x_ND = torch.randn(500, D, generator=torch.Generator().manual_seed(0))
    x_ND[:, 3] = value_N
    sae = nn.SparseAutoencoder(config.TopK(d_vit=D, exp_factor=2, top_k=3, normalize="per-dim"))
    sae.initialize(x_ND)
    others = 1 / np.delete(x_ND.double().numpy(), 3, axis=1).std(axis=0)
    np.testing.assert_allclose(np.delete(sae.scale.numpy(), 3), others, rtol=1e-5)
    assert sae.scale[3].item() == pytest.approx(np.sort(others)[-len(others) // 2], rel=1e-5)


@pytest.mark.parametrize("b_dec_init", ["mean", "geometric-median"])
def test_an_sae_starts_alike_with_and_without_sinks(b_dec_init: str) -> None:
    x_ND, is_sink_N = with_sinks(0.002, 560)
    with_them, without = (
        nn.SparseAutoencoder(config.TopK(d_vit=D, exp_factor=2, top_k=3, b_dec_init=b_dec_init))
        for _ in range(2)
    )
    with_them.initialize(x_ND)
    without.initialize(x_ND[~is_sink_N])
    torch.testing.assert_close(with_them.scale, without.scale)
    torch.testing.assert_close(with_them.b_dec, without.b_dec, atol=0.02, rtol=0)
