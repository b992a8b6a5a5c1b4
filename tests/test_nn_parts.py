"""Steps in parts of a batch, as on a GPU, against those in one piece. B batch, S latents."""

import dataclasses
import pathlib

import pytest
import test_nn_sparse as sparse_cases
import torch
from test_nn_sparse import ARCHITECTURES, OBJECTIVES, S
from torch import Tensor

from saev import nn
from saev.nn import config, kernels, metrics, objectives, parts, partsizes
from saev.training import config as training_config
from saev.training import run

pytestmark = pytest.mark.usefixtures("gpus_operations")
B = 37


@pytest.fixture
def gpus_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda _: False)


def bytes_for(sae: nn.SparseAutoencoder, n_rows: int) -> int:
    """Memory for so many rows of dense codes."""
    each = 4 * sae.cfg.GPU_CODES or partsizes.PRE_BYTES
    return int(n_rows * S * each)


def stepped(
    sae: nn.SparseAutoencoder, objective: config.Objective, n_bytes: int, is_bfloat16: bool = False
) -> tuple[objectives.Output, dict[str, Tensor]]:
    """A step's results and gradients, with dead latents."""
    lengths = objectives.prefixes(objective, S, 0, 0)
    sae.zero_grad()
    step = objectives.Objective(sae, objective, part_bytes=n_bytes, is_bfloat16=is_bfloat16)
    out = step(
        sparse_cases.batch(3, B, sae.W_dec.dtype),
        sparsity=0.7,
        end_P=None if lengths is None else torch.tensor(lengths),
        dead_C=torch.arange(30, 47),
        correlates=True,
    )
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("n_rows", [1, 5, 36])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_parts_give_what_the_whole_batch_gives(
    name: str, objective: str, n_rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Up to rounding: sums over the batch are added in another order, and smaller products may round differently."""
    sae = sparse_cases.make(ARCHITECTURES[name], dtype)
    want, want_grads = stepped(sae, OBJECTIVES[objective], 2**40)
    threshold = sae.threshold.clone()
    sae.threshold.zero_()
    got, grads = stepped(sae, OBJECTIVES[objective], bytes_for(sae, n_rows))
    same = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(sae.threshold, threshold, **same)
    for key in ("loss", "reconstruction", "x_hat_BD"):
        torch.testing.assert_close(getattr(got, key), getattr(want, key), **same)
    assert torch.equal(got.fired_S, want.fired_S) and not got.loss.isnan()
    assert grads.keys() == want_grads.keys() == dict(sae.named_parameters()).keys()
    for key, grad in grads.items():
        assert (grad - want_grads[key]).norm() <= 10 * tolerance * want_grads[key].norm(), key
        assert grad.stride() == want_grads[key].stride()
    x_BD = sparse_cases.batch(3, B, dtype)
    logged = [metrics.measure(x_BD, out.x_hat_BD, out.values, S) for out in (got, want)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert want.correlations is None and got.correlations is not None
    correlation = metrics.mean_abs_corr(want.dense())
    assert got.correlations.mean_abs_corr() == pytest.approx(correlation, rel=1e-4)


@pytest.mark.parametrize("name", ["relu", "jump-relu"])
def test_codes_of_a_divided_batch_are_not_kept(name: str) -> None:
    sae = sparse_cases.make(ARCHITECTURES[name])
    out, _ = stepped(sae, OBJECTIVES["vanilla"], bytes_for(sae, 9))
    assert isinstance(out.codes, metrics.CodeSums)
    with pytest.raises(ValueError, match="divided"):
        out.dense()
    whole, _ = stepped(sae, OBJECTIVES["vanilla"], bytes_for(sae, B))
    assert whole.dense().shape == (B, S) and whole.correlations is None


@pytest.mark.parametrize("name", ["relu", "jump-relu"])
def test_parts_in_bfloat16(name: str) -> None:
    """Each row's product is rounded as it is in the whole batch."""
    sae = sparse_cases.make(ARCHITECTURES[name])
    want, want_grads = stepped(sae, OBJECTIVES["vanilla"], 2**40, is_bfloat16=True)
    got, grads = stepped(sae, OBJECTIVES["vanilla"], bytes_for(sae, 9), is_bfloat16=True)
    torch.testing.assert_close(got.loss, want.loss)
    assert all((grads[key] - want_grads[key]).norm() < 1e-4 * want_grads[key].norm() for key in grads)


@pytest.mark.parametrize("n_rows", [1, 8, 36])
@pytest.mark.parametrize("aux_k", [0, 3, 40])
def test_aux_k_in_parts(n_rows: int, aux_k: int) -> None:
    """In float64, with a factor on the loss."""
    cfg = dataclasses.replace(ARCHITECTURES["top-k"], aux_k=aux_k)
    sae = sparse_cases.make(cfg, torch.float64)
    x_BD, error_BD = sparse_cases.batch(1, B, torch.float64), sparse_cases.batch(2, B, torch.float64)
    dead_C = torch.tensor([3, 30, 31, 32, 46])
    found = []
    for n_bytes in (2**40, n_rows * len(dead_C) * partsizes.AUX_BYTES):
        sae.zero_grad()
        loss = objectives.aux_k(sae, x_BD, error_BD, dead_C, n_bytes)
        (3 * loss).backward()
        found.append([loss.detach(), *(p.grad for p in sae.parameters())])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    assert found[1][0] > 0 and found[1][1].norm() > 0


def test_a_run_with_resampling_in_parts(tmp_path: pathlib.Path) -> None:
    """30 steps of a ReLU SAE, one of which resamples, end with the weights of those in one piece."""
    sae = dataclasses.replace(ARCHITECTURES["relu"], resample_every=12)
    cfg = training_config.Train(sae=sae, batch_size=B, n_patches=40 * B, dead_window=4 * B, device="cpu")
    states = []
    for n_bytes in (2**40, 8 * S * 12):
        made = run.Run(cfg, tmp_path, torch.device("cpu"), part_bytes=n_bytes)
        made.start(sparse_cases.batch(0, 400))
        with torch.no_grad():
            made.sae.b_enc[40:] = -100  # dead
        for step in range(30):
            made.step(step, sparse_cases.batch(step, B))
            if step == 5:
                assert made._is_dead_S()[40:].all()
        states.append(made.sae.state_dict())
        assert (made.sae.b_enc[40:] > -1).all(), "resampled"
    for key, want in states[0].items():
        torch.testing.assert_close(states[1][key], want, rtol=1e-3, atol=1e-4)


def test_columns_of_sparse_codes() -> None:
    sae = sparse_cases.make(ARCHITECTURES["top-k"])
    codes = objectives.Objective(sae, config.Vanilla())(sparse_cases.batch(3)).codes
    latent_C = torch.tensor([47, 0, 5, 13])
    assert torch.equal(codes.columns(latent_C), codes.dense()[:, latent_C])
    assert codes.columns(torch.arange(S)).count_nonzero() == 5 * len(sparse_cases.batch(3))


def test_sizes_of_parts() -> None:
    """As few parts as fit, of nearly equal size, each with fewer than 2^31 numbers."""
    assert partsizes.n_rows(37, 60, 36 * 60 * 8) == 19
    assert partsizes.n_rows(37, 60, 37 * 60 * 8) == 37
    assert partsizes.n_rows(37, 60, 1) == 1
    assert partsizes.n_rows(16_384, 131_072, 2**50) == 8192
    assert partsizes.n_rows(0, 60, 100) >= 1 and partsizes.n_rows(9, 0, 100) == 9
    assert [len(range(37)[part]) for part in parts.slices(37, 19)] == [19, 18]
    assert parts.slices(0, 5) == []
