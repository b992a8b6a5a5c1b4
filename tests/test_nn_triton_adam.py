"""Adam's GPU programs against the CPU's kernels and torch: in Triton's interpreter, compiled for GPUs, and run on one."""

import pathlib
import re
import unittest.mock

import pytest
import torch

from benchmarks import kernel_resources
from saev import nn
from saev.nn import config, kernels, optim, triton_kernels

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent


def stepped(
    cfg: config.Sae, device: str, max_norm: float, is_gpu: bool
) -> tuple[nn.SparseAutoencoder, optim.Adam, list[float]]:
    """Four steps on gradients that do not depend on the weights, some rows of which are 0."""
    sae = nn.SparseAutoencoder(cfg, 1).to(device)
    optimizer, norms = optim.Adam(sae, max_norm), []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p in sae.parameters():
            grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step - 2)
            if p.ndim == 2:
                grad[:, :: 3 + step] = 0
            p.grad = grad.to(device)
        assert sae.W_enc.grad is not None
        if step % 2 or not is_gpu:  # a GPU takes any layout
            sae.W_enc.grad = sae.W_enc.grad.T.contiguous().T
        norms.append(optimizer.step(1e-2).item())
    return sae, optimizer, norms


CASES = [
    (config.TopK(d_vit=12, d_sae=48, top_k=5), 0.0),
    (config.JumpRelu(d_vit=1, d_sae=5), 1.0),
    (config.TopK(d_vit=1030, d_sae=6, top_k=2), 5.0),
]


def check(device: str) -> None:
    """Near torch's operations in each number; near the CPU's kernels in norm. (Adam enlarges the rounding of tiny gradients.)"""
    for cfg, max_norm in CASES:
        by_cpu = stepped(cfg, "cpu", max_norm, False)
        with unittest.mock.patch.object(kernels, "available", lambda t: False):
            by_torch = stepped(cfg, "cpu", max_norm, True)
            with (
                unittest.mock.patch.object(triton_kernels, "available", lambda t: True),
                unittest.mock.patch.object(optim.Adam, "_step_torch", None),
            ):
                sae, optimizer, norms = stepped(cfg, device, max_norm, True)
                again = stepped(cfg, device, max_norm, True)[0]
        for name, p in sae.named_parameters():
            assert torch.equal(p, again.state_dict()[name]), name
        for (model, theirs, their_norms), atol in ((by_cpu, 1.0), (by_torch, 2e-6)):
            assert norms == pytest.approx(their_norms, rel=1e-5)
            for name, p in sae.named_parameters():
                for left, right in (
                    (p.detach(), model.state_dict()[name]),
                    (optimizer.m[name], theirs.m[name]),
                    (optimizer.v[name], theirs.v[name]),
                ):
                    torch.testing.assert_close(left.cpu(), right, rtol=1e-5, atol=atol, msg=name)
                    assert (left.cpu() - right).norm() <= 1e-4 * right.norm(), name
        assert (sae.W_dec.norm(dim=1).cpu() - 1).abs().max() < 1e-6


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    check("cuda")


@pytest.mark.parametrize("arch", kernel_resources.ARCHS)
@pytest.mark.parametrize("d_vit", [1024, 4096])
def test_programs_fit_a_gpu(
    arch: int, d_vit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """As those of `triton_select`: no spilled registers, little shared memory, no atomics, 64-bit offsets."""
    pytest.importorskip("triton", minversion="3.3")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    launches = kernel_resources.adam(d_vit)
    assert [launch.name for launch in launches] == ["row_dots", "adam_rows", "adam_rows"]
    for launch in launches:
        needs = kernel_resources.compiled(launch, arch)
        assert needs.stack == 0 and needs.shared <= 16 * 1024 and needs.registers <= 192, launch
        assert ".ftz" not in needs.ptx
        assert not re.search(r"^\s*(@\S+ )?(atom|red)\.", needs.ptx, re.MULTILINE)
        assert "mul.lo.s64" in needs.ptx and "mul.lo.s32" not in needs.ptx
        assert "ld.global.v4.b32" in needs.ptx
