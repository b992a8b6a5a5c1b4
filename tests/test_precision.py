"""What --precision does: which matrices are rounded to what, and that the rest stays float32. B batch, D d_vit, S latents."""

import pathlib
import types
import typing as tp
import unittest.mock

import fake_gpu
import pytest
import test_nn_sparse as sparse_cases
import torch
from test_nn_sparse import ARCHITECTURES, B, D, S
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saev import devices, fields
from saev.nn import kernels, objectives, partsizes, sparse, triton_kernels
from saev.training import config, identity, run

PRECISIONS = ("float32", "tf32", "bfloat16")
matmul = torch.backends.cuda.matmul


def a_run(name: str, precision: str, device: torch.device = torch.device("cpu")) -> run.Run:  # noqa: B008
    cfg = config.Train(
        sae=ARCHITECTURES[name], batch_size=B, n_patches=100 * B, precision=tp.cast(tp.Any, precision)
    )
    return run.Run(cfg, pathlib.Path("run"), device)


# ---- TF32 ----


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tf32_is_set_for_a_step_only(before: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward and the backward pass; also set back after an error."""
    matmul.fp32_precision = before
    made, seen = a_run("top-k", precision), []
    made.sae.W_dec.register_hook(lambda grad: seen.append(matmul.fp32_precision))
    find = made.sae.architecture.find
    monkeypatch.setattr(
        made.sae.architecture, "find", lambda *args: (seen.append(matmul.fp32_precision), find(*args))[1]
    )
    made.step(0, sparse_cases.batch(0))
    assert seen == 2 * ["ieee" if precision == "float32" else "tf32"]
    assert matmul.fp32_precision == before
    monkeypatch.setattr(made.optimizer, "step", unittest.mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made.step(1, sparse_cases.batch(1))
    assert matmul.fp32_precision == before
    matmul.fp32_precision = "none"


def test_tf32_in_older_versions_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", old)
    for is_allowed in (False, True):
        with devices.tf32(is_allowed):
            assert old.allow_tf32 is is_allowed
        assert old.allow_tf32 is True


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_on_a_cpu_tf32_is_float32(name: str) -> None:
    weights = []
    for precision in ("float32", "tf32"):
        made = a_run(name, precision)
        for step in range(3):
            made.step(step, sparse_cases.batch(step))
        weights.append(made.finished().state_dict())
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


def test_run_ids() -> None:
    """float32, the default, is not hashed, so older runs keep their ids."""
    cfgs = [config.Train(precision=tp.cast(tp.Any, precision)) for precision in PRECISIONS]
    assert [fields.identity(cfg).get("precision") for cfg in cfgs] == [None, "tf32", "bfloat16"]
    assert len({identity.run_id(cfg, "x") for cfg in cfgs}) == 3


# ---- bfloat16 ----


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_tables(device: str = "cpu") -> None:
    """Decoding, encoding and all gradients, against float64 on rounded tables: with float32's error only."""
    sae = sparse_cases.make(ARCHITECTURES["top-k"]).to(device)
    x_BD, g_BD = sparse_cases.batch(1).to(device), drawn(2, B, D).to(device)
    encoder = sparse.Encoder(sae.W_enc.detach().T, sae.b_enc.detach(), True)
    xc_BD = x_BD - sae.b_dec.detach()
    codes = sparse.top_k(encoder, xc_BD, 5)
    index, g_n = codes.index, drawn(3, len(codes.value_n)).to(device)

    value_n = codes.value_n.clone().requires_grad_()
    x_hat_BD = sparse.decode(value_n, sae.W_dec, index, is_bfloat16=True)
    x_hat_BD.backward(g_BD)
    pre_n = sparse.encode_at(sae.W_enc, sae.b_enc, sae.b_dec, x_BD, index, codes.value_n, is_bfloat16=True)
    pre_n.backward(g_n)

    f_BS = codes.dense().double()
    g_BS = sparse.Codes(g_n, index).dense().double()
    W_SD = sae.W_dec.detach().bfloat16().double()
    at = index.row_n.long(), index.latent_n.long()
    grad_S = g_BS.sum(dim=0)
    for got, want in (
        (x_hat_BD, f_BS @ W_SD),
        (value_n.grad, (g_BD.double() @ W_SD.T)[at]),
        (sae.W_dec.grad, f_BS.T @ g_BD.bfloat16().double()),
        (sae.W_enc.grad, xc_BD.bfloat16().double().T @ g_BS),
        (sae.b_enc.grad, grad_S),
        (sae.b_dec.grad, -sae.W_enc.detach().double() @ grad_S),
    ):
        assert got is not None and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
        assert (got.double() - want).norm() < 1e-6 * want.norm(), "rounding to bfloat16 costs 1e-3"


@pytest.mark.gpu
def test_tables_on_a_gpu() -> None:
    check_tables("cuda")


@pytest.mark.gpu
def test_the_encoders_product_on_a_gpu() -> None:
    """In bfloat16: rounded factors, sums and results in float32. TF32 has an error of 2^-11 in each factor, float32 much less."""
    x_BD, W_SD, b_S = (drawn(i, *n).cuda() for i, n in enumerate([(64, 512), (96, 512), (96,)]))
    rounded = x_BD.bfloat16().double() @ W_SD.bfloat16().double().T + b_S.double()
    got = sparse.search.dense(sparse.Encoder(W_SD, b_S, True), x_BD)
    assert got.dtype == torch.float32 and (got - rounded).norm() < 1e-5 * rounded.norm()
    want, errors = x_BD.double() @ W_SD.double().T + b_S.double(), []
    for is_allowed in (False, True):
        with devices.tf32(is_allowed):
            got = sparse.search.dense(sparse.Encoder(W_SD, b_S, False), x_BD)
        errors.append(((got - want).norm() / want.norm()).item())
    assert errors[0] < 1e-5 < errors[1] < 1e-3


def test_tables_are_rounded_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda t: False)
    check_tables()


def test_on_a_cpu_only_the_encoders_product_is_rounded() -> None:
    sae, x_BD = sparse_cases.make(ARCHITECTURES["top-k"]), sparse_cases.batch(1)
    encoder = sparse.Encoder(sae.W_enc.detach().T, sae.b_enc.detach(), True)
    codes, end_P, results = sparse.top_k(encoder, x_BD, 5), torch.tensor([S // 2, S]), []
    for is_bfloat16 in (False, True):
        sae.zero_grad()
        pre_n = sparse.encode_at(
            sae.W_enc, sae.b_enc, sae.b_dec, x_BD, codes.index, codes.value_n, is_bfloat16
        )
        loss, x_hat_BD = sparse.reconstruct(
            pre_n, sae.W_dec, sae.b_dec, x_BD, codes.index, end_P, is_bfloat16
        )
        loss.backward()
        results.append([loss.detach(), x_hat_BD, *(p.grad for p in sae.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("objective", ["vanilla", "fixed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_near_those_in_float64(
    name: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "available", lambda t: False)
    cfg = ARCHITECTURES[name]
    low, high = sparse_cases.make(cfg), sparse_cases.make(cfg, torch.float64)
    x_BD, ends = sparse_cases.batch(3, 400), [S] if objective == "vanilla" else [S // 4, S]
    made = objectives.Objective(low, sparse_cases.OBJECTIVES[objective], is_bfloat16=True)
    out = made(x_BD, end_P=torch.tensor(ends))
    want = sparse_cases.plain_loss(high, x_BD.double(), ends, None)
    out.loss.backward(), want.backward()
    assert out.loss.item() == pytest.approx(want.item(), rel=0.01)
    for (key, mine), theirs in zip(low.named_parameters(), high.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype == torch.float32
        assert (mine.grad - theirs.grad).norm() < 0.06 * theirs.grad.norm(), key


class Copies(TorchDispatchMode):
    """Counts copies of matrices of S x D numbers in bfloat16."""

    n = 0

    def __torch_dispatch__(
        self, func: tp.Any, types: tp.Any, args: tp.Any = (), kwargs: tp.Any = None
    ) -> tp.Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and out.dtype == torch.bfloat16:
            self.n += out.numel() == S * D
        return out


@pytest.mark.skipif(not triton_kernels.IS_INSTALLED, reason="needs Triton")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", ["top-k", "batch-top-k"])
def test_on_a_gpu_every_table_is_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch that is searched in parts, too: one copy of each weight matrix for a step. Adam stays float32."""
    with fake_gpu.Gpu(lambda n: 5 * B if n == B * S else 3):
        made = a_run(name, "bfloat16", fake_gpu.DEVICE)
        made.objective.part_bytes = partsizes.PRE_BYTES * S * (B // 4)
        made.step(1, torch.empty(B, D, device=fake_gpu.DEVICE))
        bag = unittest.mock.Mock(wraps=triton_kernels.bag)
        bag_dot = unittest.mock.Mock(wraps=triton_kernels.bag_dot)
        monkeypatch.setattr(triton_kernels, "bag", bag)
        monkeypatch.setattr(triton_kernels, "bag_dot", bag_dot)
        with Copies() as copies:
            made.step(2, torch.empty(B, D, device=fake_gpu.DEVICE))
        assert copies.n == 2
        tables = [call.args[0] for call in bag.call_args_list] + [bag_dot.call_args.args[1]]
        assert len(tables) == 4 and all(table.dtype == torch.bfloat16 for table in tables)
        assert bag_dot.call_args.args[0].dtype == torch.float32
        pre_BS = sparse.search.dense(
            sparse.Encoder(made.sae.W_enc.T, made.sae.b_enc, True), torch.empty(B, D, device=fake_gpu.DEVICE)
        )
        assert pre_BS.dtype == torch.float32 and pre_BS.shape == (B, S)
        kept = [*made.sae.parameters(), *made.optimizer.m.values(), *made.optimizer.v.values()]
        assert all(tensor.dtype == torch.float32 for tensor in kept)


def test_the_docs_say_what_each_does() -> None:
    text = (pathlib.Path(__file__).parent.parent / "docs/training.md").read_text()
    table = text.split("## Precision")[1].split("## ")[0]
    assert all(f"| `{precision}` |" in table for precision in PRECISIONS)
