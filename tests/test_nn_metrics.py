"""The nine metrics against plain loops. B batch, D d_vit, S latents."""

import math

import numpy as np
import pytest
import torch

from saev.nn import metrics

B, D, S = 40, 5, 7


@pytest.fixture
def x_BD() -> torch.Tensor:
    return (
        torch.randn(B, D, generator=torch.Generator().manual_seed(0))
        * torch.tensor([3, 1, 1, 0.2, 9])
        + 5
    )


@pytest.fixture
def x_hat_BD(x_BD: torch.Tensor) -> torch.Tensor:
    return x_BD + 0.3 * torch.randn(B, D, generator=torch.Generator().manual_seed(1)) + 0.1


@pytest.fixture
def f_BS() -> torch.Tensor:
    """Sparse codes; latent 2 is dead, latent 5 constant."""
    generator = torch.Generator().manual_seed(2)
    f_BS = torch.rand(B, S, generator=generator) * (torch.rand(B, S, generator=generator) < 0.3)
    f_BS[:, 2], f_BS[:, 5] = 0, 0.1
    return f_BS


def test_mse(x_BD: torch.Tensor, x_hat_BD: torch.Tensor) -> None:
    total = 0.0
    for b in range(B):
        for d in range(D):
            total += (x_BD[b, d].item() - x_hat_BD[b, d].item()) ** 2
    assert metrics.mse(x_BD, x_hat_BD) == pytest.approx(total / (B * D), rel=1e-5)


def variance(rows: list[list[float]]) -> float:
    """Summed over dimensions."""
    total = 0.0
    for column in zip(*rows, strict=True):
        mean = sum(column) / len(column)
        total += sum((v - mean) ** 2 for v in column) / len(column)
    return total


def test_explained_variance(x_BD: torch.Tensor, x_hat_BD: torch.Tensor) -> None:
    want = 1 - variance((x_BD - x_hat_BD).tolist()) / variance(x_BD.tolist())
    assert metrics.explained_variance(x_BD, x_hat_BD) == pytest.approx(want, rel=1e-5)
    assert metrics.explained_variance(x_BD, x_BD + 7) == pytest.approx(
        1, abs=1e-5
    )  # a constant error is no variance


def test_normalized_mse(x_BD: torch.Tensor, x_hat_BD: torch.Tensor) -> None:
    want = metrics.mse(x_BD, x_hat_BD) * D / variance(x_BD.tolist())
    assert metrics.normalized_mse(x_BD, x_hat_BD) == pytest.approx(want, rel=1e-5)
    assert metrics.normalized_mse(x_BD, x_BD.mean(0).expand(B, D)) == pytest.approx(1, rel=1e-5)


def test_l0_and_l1(f_BS: torch.Tensor) -> None:
    values = [v for row in f_BS.tolist() for v in row]
    assert metrics.l0(f_BS) == pytest.approx(sum(abs(v) > 1e-8 for v in values) / (B * S))
    assert metrics.l1(f_BS) == pytest.approx(sum(abs(v) for v in values) / (B * S), rel=1e-5)
    assert metrics.l0(torch.full((1, 4), 1e-9)) == 0


def test_dead_pct() -> None:
    since_S = torch.tensor([0, 99, 100, 101, 5])
    want = 100 * sum(n >= 100 for n in since_S.tolist()) / 5
    assert metrics.dead_pct(since_S, 100) == pytest.approx(want) == 40


def pearson(a: list[float], b: list[float]) -> float:
    """0 for a constant."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    cov = sum((u - mean_a) * (v - mean_b) for u, v in zip(a, b, strict=True))
    norm = math.sqrt(sum((u - mean_a) ** 2 for u in a) * sum((v - mean_b) ** 2 for v in b))
    return cov / norm if norm > 1e-9 else 0.0


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_mean_abs_corr(f_BS: torch.Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    columns = f_BS.T.tolist()
    pairs = [abs(pearson(columns[i], columns[j])) for i in range(S) for j in range(S) if i != j]
    assert metrics.mean_abs_corr(f_BS) == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)


def test_mean_abs_corr_equals_numpy_without_constants(f_BS: torch.Tensor) -> None:
    live_BS = f_BS[:, [0, 1, 3, 4, 6]]
    corr_SS = np.abs(np.corrcoef(live_BS.T.numpy()))
    assert metrics.mean_abs_corr(live_BS) == pytest.approx((corr_SS.sum() - 5) / 20, rel=1e-4)


def test_mean_abs_corr_of_degenerate_codes() -> None:
    assert metrics.mean_abs_corr(torch.zeros(6, 3)) == 0
    assert (
        metrics.mean_abs_corr(torch.full((6, 3), 0.1)) == 0
    )  # constant, with rounding noise after centring
    assert metrics.mean_abs_corr(torch.rand(6, 1)) == 0
    column = torch.rand(6, 1)
    assert metrics.mean_abs_corr(torch.cat([column, -2 * column], 1)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_coherence_and_norm(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    W_dec = torch.randn(S, D, generator=torch.Generator().manual_seed(3))
    norms = [math.sqrt(sum(v * v for v in row)) for row in W_dec.tolist()]
    cosines = [
        abs(sum(u * v for u, v in zip(W_dec[i].tolist(), W_dec[j].tolist(), strict=True)))
        / norms[i]
        / norms[j]
        for i in range(S)
        for j in range(S)
        if i != j
    ]
    assert metrics.coherence(W_dec) == pytest.approx(max(cosines), rel=1e-5)
    assert metrics.avg_w_col_norm(W_dec) == pytest.approx(sum(norms) / S, rel=1e-5)
    assert metrics.coherence(W_dec[:1]) == 0


def test_grad_norm() -> None:
    parameters = [
        torch.nn.Parameter(torch.zeros(2, 2)),
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    parameters[1].grad = torch.tensor([5.0, 6.0, 7.0])
    assert metrics.grad_norm(parameters) == pytest.approx(
        math.sqrt(sum(v * v for v in range(1, 8)))
    )
    assert metrics.grad_norm(parameters[2:]) == 0


def test_measure_has_finite_values_for_dead_and_constant_latents(
    x_BD: torch.Tensor, x_hat_BD: torch.Tensor, f_BS: torch.Tensor
) -> None:
    values = metrics.measure(x_BD, x_hat_BD, f_BS, torch.randn(S, D))
    assert all(math.isfinite(v) for v in values.values())
    assert values["l0_count"] == pytest.approx(values["l0"] * S)
