"""Folders of sparsify, by its formula: f = the k largest of relu((x - b_dec) W' + b). B batch, D d_vit, S latents."""

import json
import pathlib
import sys

import forked
import numpy as np
import pytest
import safetensors.torch
import torch

from saev import errors, nn
from saev.compat import sparsify

ROOT = pathlib.Path(__file__).parent.parent
D, S, K = 6, 24, 4
CFG = {
    "activation": "topk",
    "expansion_factor": 4,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}


def batch() -> torch.Tensor:
    return 2 * torch.randn(40, D, generator=torch.Generator().manual_seed(0)) + torch.arange(D)


def folder(tmp_path: pathlib.Path, n: int = S, more: dict | None = None, **cfg: object) -> pathlib.Path:
    generator = torch.Generator().manual_seed(1)
    shapes = {"encoder.weight": (n, D), "encoder.bias": (n,), "W_dec": (n, D), "b_dec": (D,)}
    state = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    dpath = tmp_path / "layers.3"
    dpath.mkdir()
    safetensors.torch.save_file({**state, **(more or {})}, dpath / "sae.safetensors")
    (dpath / "cfg.json").write_text(json.dumps({**CFG, **cfg}))
    return dpath


def check(sae: nn.SparseAutoencoder, dpath: pathlib.Path) -> None:
    t = safetensors.torch.load_file(dpath / "sae.safetensors")
    t = {name: tensor.double().numpy() for name, tensor in t.items()}
    pre_BS = (batch().numpy() - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    least_B1 = np.sort(pre_BS, axis=1)[:, -K][:, None]
    f_BS = np.where(pre_BS >= least_B1, pre_BS, 0).clip(0)
    x_hat_BD, got_BS = sae(batch())
    np.testing.assert_allclose(got_BS, f_BS, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(x_hat_BD, f_BS @ t["W_dec"] + t["b_dec"], rtol=1e-4, atol=1e-3)


def test_the_formula(tmp_path: pathlib.Path) -> None:
    dpath = folder(tmp_path)
    check(sparsify.load(dpath), dpath)


def test_a_number_of_latents_goes_before_the_factor(tmp_path: pathlib.Path) -> None:
    dpath = folder(tmp_path, 17, num_latents=17)
    assert sparsify.load(dpath).d_sae == 17
    check(sparsify.load(dpath), dpath)


@pytest.mark.slow
def test_the_command(tmp_path: pathlib.Path) -> None:
    dpath, fpath = folder(tmp_path), tmp_path / "sae.pt"
    command = [sys.executable, "-m", "saev.compat", "sparsify", "load", str(dpath), str(fpath)]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(fpath)), done.stderr
    check(nn.load(fpath), dpath)


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'; only topk"),
        ({"transcode": True}, "transcode is True"),
        ({"skip_connection": True}, "skip_connection is True"),
        ({"signed": True}, "signed is True"),
        ({"jump": 1}, "unknown key jump. It may change"),
        ({"d_in": None}, "d_in is None, not a positive integer"),
        ({"k": 0}, "k is 0, not a positive integer"),
        ({"num_latents": -1}, "num_latents is -1"),
        ({"expansion_factor": 5}, r"encoder.weight has shape \(24, 6\).* wants floats of shape \(30, 6\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed(cfg: dict, match: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=match):
        sparsify.load(folder(tmp_path, **cfg))


def test_tensors_and_files(tmp_path: pathlib.Path) -> None:
    dpath = folder(tmp_path, more={"W_skip": torch.zeros(D, D)})
    with pytest.raises(errors.UserError, match="unknown tensor W_skip"):
        sparsify.load(dpath)
    (dpath / "sae.safetensors").write_bytes(b"x")
    with pytest.raises(errors.UserError, match="safetensors: cannot be read"):
        sparsify.load(dpath)
    with pytest.raises(errors.UserError, match=r"cfg\.json: cannot be read"):
        sparsify.load(tmp_path)
