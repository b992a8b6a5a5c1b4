"""Every metric against a plain loop (and numpy.corrcoef). B batch, D d_vit, S latents."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saev.nn import metrics

B, D, S = 11, 5, 9


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(seed: int = 0) -> Tensor:
    """Sparse codes. Latent 2 is dead, latent 5 is constant, and latents 0 and 1 are proportional."""
    f_BS = (rand(B, S, seed=seed) - 0.3).relu()
    f_BS[:, 1] = 2 * f_BS[:, 0]
    f_BS[:, 2] = 0
    f_BS[:, 5] = 0.1
    return f_BS


def pearson(a_B: list[float], b_B: list[float]) -> float:
    a_mean, b_mean = sum(a_B) / len(a_B), sum(b_B) / len(b_B)
    cov = sum((a - a_mean) * (b - b_mean) for a, b in zip(a_B, b_B, strict=True))
    var_a, var_b = sum((a - a_mean) ** 2 for a in a_B), sum((b - b_mean) ** 2 for b in b_B)
    return cov / math.sqrt(var_a * var_b)


def plain_mean_abs_corr(f_BS: Tensor) -> float:
    columns = f_BS.double().T.tolist()
    total = 0.0
    for i, a_B in enumerate(columns):
        for j, b_B in enumerate(columns):
            if i != j and len(set(a_B)) > 1 and len(set(b_B)) > 1:
                total += abs(pearson(a_B, b_B))
    return total / (len(columns) * (len(columns) - 1))


# ---- reconstruction ----


def test_mse() -> None:
    x_BD, x_hat_BD = rand(B, D), rand(B, D, seed=1)
    total = sum((x_BD[b, d] - x_hat_BD[b, d]).item() ** 2 for b in range(B) for d in range(D))
    assert metrics.mse(x_BD, x_hat_BD) == pytest.approx(total / B / D, rel=1e-5)


def test_explained_variance_is_over_all_elements() -> None:
    """Differences between the dimensions' means count in explained_variance and not in the other."""
    x_BD = 3 * rand(B, D) + torch.tensor([100.0, 90, 80, 100, 95])
    x_hat_BD = x_BD + rand(B, D, seed=1)
    r_BD = (x_hat_BD - x_BD).double()
    values, residuals = x_BD.double().flatten().tolist(), r_BD.flatten().tolist()
    total = sum((x - sum(values) / B / D) ** 2 for x in values)
    residual = sum((r - sum(residuals) / B / D) ** 2 for r in residuals)
    got = metrics.explained_variance(x_BD, x_hat_BD)
    assert got == pytest.approx(1 - residual / total, rel=1e-4)
    assert got == pytest.approx(1 - ((x_hat_BD - x_BD).var() / x_BD.var()).item(), rel=1e-6)
    per_dim = metrics.explained_variance_per_dim(x_BD, x_hat_BD)
    assert per_dim == pytest.approx(1 - (r_BD.var(dim=0).sum() / x_BD.var(dim=0).sum()).item())
    assert got > per_dim + 0.05


def test_normalized_mse() -> None:
    x_BD, x_hat_BD = 3 * rand(B, D) + 10, 3 * rand(B, D) + 10 + rand(B, D, seed=1)
    mean_D = [sum(x_BD[:, d].tolist()) / B for d in range(D)]
    error = sum((x_BD[b, d] - x_hat_BD[b, d]).item() ** 2 for b in range(B) for d in range(D))
    baseline = sum((x_BD[b, d].item() - mean_D[d]) ** 2 for b in range(B) for d in range(D))
    assert metrics.normalized_mse(x_BD, x_hat_BD) == pytest.approx(error / baseline, rel=1e-4)


def test_perfect_and_mean_predictions() -> None:
    x_BD = rand(B, D) + 5
    mean_BD = x_BD.mean(dim=0).expand(B, D).clone()
    assert metrics.explained_variance(x_BD, x_BD) == 1
    assert metrics.explained_variance_per_dim(x_BD, x_BD) == 1
    assert metrics.normalized_mse(x_BD, x_BD) == 0
    assert metrics.explained_variance_per_dim(x_BD, mean_BD) == pytest.approx(0, abs=1e-6)
    assert metrics.normalized_mse(x_BD, mean_BD) == pytest.approx(1, rel=1e-6)
    # A constant offset raises normalised MSE but, by definition, does not change the explained variance.
    assert metrics.explained_variance(x_BD, x_BD + 3) == pytest.approx(1, abs=1e-6)
    assert metrics.normalized_mse(x_BD, x_BD + 3) > 1


@pytest.mark.parametrize("value", [0.0, 0.1, 2.0])
@pytest.mark.parametrize(
    "metric", [metrics.explained_variance, metrics.explained_variance_per_dim, metrics.normalized_mse]
)
def test_constant_activations_have_no_variance_to_explain(metric, value: float) -> None:
    assert math.isnan(metric(torch.full((B, D), value), rand(B, D)))


# ---- codes ----


def test_l0_and_l1() -> None:
    f_BS = codes()
    f_BS[0, 2], f_BS[1, 2], f_BS[2, 2] = 1e-8, 2e-8, -1.0
    values = f_BS.flatten().tolist()
    assert metrics.l0(f_BS) == pytest.approx(sum(abs(v) > 1.0000001e-8 for v in values) / B / S)
    assert metrics.l1(f_BS) == pytest.approx(sum(map(abs, values)) / B / S, rel=1e-5)


def test_dead_pct_is_a_fraction_of_the_batch() -> None:
    assert metrics.dead_pct(torch.tensor([True, False, True, True, False])) == pytest.approx(0.4)


def test_dead_frac_window() -> None:
    since_S = torch.tensor([0, 99, 100, 101, 5])
    assert metrics.dead_frac_window(since_S, 100, n_seen=101) == pytest.approx(0.4)
    assert metrics.dead_frac_window(since_S, 1000, n_seen=1000) == 0
    assert math.isnan(metrics.dead_frac_window(since_S, 1000, n_seen=999)), "not known yet"


def test_mean_abs_corr_against_a_plain_loop_and_numpy() -> None:
    f_BS = codes()
    got = metrics.mean_abs_corr(f_BS)
    assert got == pytest.approx(plain_mean_abs_corr(f_BS), rel=1e-4)
    live = [s for s in range(S) if s not in (2, 5)]
    corr = np.abs(np.corrcoef(f_BS.double().numpy()[:, live], rowvar=False))
    assert got == pytest.approx((corr.sum() - len(live)) / (S * (S - 1)), rel=1e-4)


@pytest.mark.parametrize("size", [1, 4, B])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_correlation_sums_are_those_of_one_batch(size: int, offset: float) -> None:
    """Also with codes far from zero, where plain sums of squares lose digits."""
    f_BS = codes() + offset
    sums = metrics.CorrelationSums(S, torch.device("cpu"))
    for part_BS in f_BS.split(size):
        sums.add(part_BS)
    assert sums.mean_abs_corr() == pytest.approx(plain_mean_abs_corr(f_BS), rel=1e-4)


def test_correlation_of_many_latents_is_that_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    f_BS = (rand(200, 60) + rand(200, 1, seed=1)).relu()
    monkeypatch.setattr(metrics, "MAX_CORR_LATENTS", 25)
    sums = metrics.CorrelationSums(60, torch.device("cpu"))
    sums.add(f_BS)
    chosen_C = sums.latent_C
    assert len(set(chosen_C.tolist())) == 25 and sums.zz_CC.shape == (25, 25)
    assert sums.mean_abs_corr() == pytest.approx(metrics.mean_abs_corr(f_BS[:, chosen_C]), rel=1e-4)
    assert sums.mean_abs_corr() == pytest.approx(metrics.mean_abs_corr(f_BS), rel=0.15)


@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 50])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    f_BS, W_dec = codes(), rand(S, D)
    want = metrics.mean_abs_corr(f_BS), metrics.coherence(W_dec)
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    got = metrics.mean_abs_corr(f_BS), metrics.coherence(W_dec)
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.3])
def test_constant_latents_correlate_with_nothing(value: float) -> None:
    f_BS = torch.full((1000, 4), value)
    assert metrics.mean_abs_corr(f_BS) == 0
    f_BS[:, 1] = rand(1000)
    f_BS[:, 2] = 3 - 2 * f_BS[:, 1]
    assert metrics.mean_abs_corr(f_BS) == pytest.approx(2 / (4 * 3), rel=1e-5)
    sums = metrics.CorrelationSums(4, torch.device("cpu"))
    for part_BS in f_BS.split(300):
        sums.add(part_BS)
    assert sums.mean_abs_corr() == pytest.approx(2 / (4 * 3), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e15, 1e25])
def test_correlation_does_not_depend_on_scale(scale: float) -> None:
    f_BS = codes()
    assert metrics.mean_abs_corr(f_BS * scale) == pytest.approx(metrics.mean_abs_corr(f_BS), rel=1e-4)


def test_single_latent() -> None:
    assert metrics.mean_abs_corr(rand(B, 1)) == 0
    assert metrics.coherence(rand(1, D)) == 0


def test_single_sample() -> None:
    assert metrics.mean_abs_corr(rand(1, S)) == 0


# ---- decoder ----


def test_coherence_and_column_norm() -> None:
    W_dec = 3 * rand(S, D)
    rows = W_dec.double().tolist()
    norms = [math.sqrt(sum(v * v for v in row)) for row in rows]
    cosines = [
        abs(sum(a * b for a, b in zip(rows[i], rows[j], strict=True))) / norms[i] / norms[j]
        for i in range(S)
        for j in range(i)
    ]
    assert metrics.coherence(W_dec) == pytest.approx(max(cosines), rel=1e-5)
    assert metrics.avg_w_col_norm(W_dec) == pytest.approx(sum(norms) / S, rel=1e-5)


def test_coherence_sees_opposite_rows_in_different_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 2)
    W_dec = torch.eye(7)
    assert metrics.coherence(W_dec) == 0
    W_dec[6] = -W_dec[0]
    assert metrics.coherence(W_dec) == pytest.approx(1)


def test_measure_gives_each_metric_under_its_name() -> None:
    x_BD, x_hat_BD, f_BS, W_dec = rand(B, D), rand(B, D, seed=1), codes(), rand(S, D)
    got = metrics.measure(x_BD, x_hat_BD, f_BS, S)
    assert got.pop("l0_count") == pytest.approx(metrics.l0(f_BS) * S)
    recon = ("mse", "normalized_mse", "explained_variance", "explained_variance_per_dim")
    want = {name: getattr(metrics, name)(x_BD, x_hat_BD) for name in recon}
    want |= {name: getattr(metrics, name)(f_BS) for name in ("l0", "l1")}
    assert got == pytest.approx(want)
    without_zeros = metrics.measure(x_BD, x_hat_BD, f_BS[f_BS != 0], S)
    without_zeros.pop("l0_count")
    assert without_zeros == pytest.approx(want), "sparse codes leave their zeros out"
    costly = {"mean_abs_corr": metrics.mean_abs_corr(f_BS), "coherence": metrics.coherence(W_dec)}
    assert metrics.costly(f_BS, W_dec) == costly
