"""SAELens' on-disk format, both ways; with SAELens itself where it is installed (group `peers`). B, D d_vit, S latents."""

import json
import pathlib
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from saev import errors, nn
from saev.nn import config, saelens

ROOT = pathlib.Path(__file__).parent.parent
D = 6
CFGS = [
    config.Relu(d_vit=D, exp_factor=4),
    config.TopK(d_vit=D, exp_factor=4, top_k=3),
    config.BatchTopK(d_vit=D, exp_factor=4, top_k=3),
    config.JumpRelu(d_vit=D, exp_factor=4),
]
each_cfg = pytest.mark.parametrize("cfg", CFGS, ids=lambda c: type(c).__name__)


def batch() -> torch.Tensor:
    return 5 * torch.randn(40, D, generator=torch.Generator().manual_seed(0)) + torch.arange(D)


def make(cfg: config.Sae) -> nn.SparseAutoencoder:
    """Scaled, with biases off zero, with a threshold."""
    sae = nn.SparseAutoencoder(cfg, 1)
    sae.initialize(batch())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in sae.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
        sae(batch())
    return sae.eval().requires_grad_(False)


def assert_same(f: torch.Tensor, x_hat: torch.Tensor, sae: nn.SparseAutoencoder) -> None:
    want_x_hat, want_f = sae(batch())
    assert 0 < (want_f > 0).float().mean() < 1
    torch.testing.assert_close(f, want_f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat, want_x_hat, rtol=1e-5, atol=1e-4)


@each_cfg
def test_there_and_back(cfg: config.Sae, tmp_path: pathlib.Path) -> None:
    sae = make(cfg)
    saelens.export(sae, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "cfg.json",
        "out",
        "sae_weights.safetensors",
    ]
    again = saelens.load(tmp_path / "out")
    x_hat_BD, f_BS = again(batch())
    assert_same(f_BS, x_hat_BD, sae)
    assert again.scale == 1


def test_weights_are_folded_for_raw_activations(tmp_path: pathlib.Path) -> None:
    """Written out: f = relu((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec, on what was written."""
    sae = make(CFGS[0])
    saelens.export(sae, tmp_path / "out")
    t = safetensors.torch.load_file(tmp_path / "out" / "sae_weights.safetensors")
    f_BS = torch.relu((batch() - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    assert_same(f_BS, f_BS @ t["W_dec"] + t["b_dec"], sae)


def folder(tmp_path: pathlib.Path, cfg: dict[str, object], **tensors: torch.Tensor) -> pathlib.Path:
    """A folder as SAELens writes it; cfg overrides a standard SAE's."""
    dpath = tmp_path / "sae"
    dpath.mkdir()
    full = {"architecture": "standard", "d_in": D, "d_sae": 2 * D, "apply_b_dec_to_input": True}
    (dpath / "cfg.json").write_text(json.dumps({**full, **cfg}))
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, 2 * D), "b_enc": (2 * D,), "W_dec": (2 * D, D), "b_dec": (D,)}
    given = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    safetensors.torch.save_file({**given, **tensors}, dpath / "sae_weights.safetensors")
    return dpath


def test_b_dec_that_is_not_subtracted(tmp_path: pathlib.Path) -> None:
    dpath = folder(tmp_path, {"apply_b_dec_to_input": False})
    t = safetensors.torch.load_file(dpath / "sae_weights.safetensors")
    want_BS = torch.relu(batch() @ t["W_enc"] + t["b_enc"])
    torch.testing.assert_close(saelens.load(dpath).encode(batch()), want_BS, rtol=1e-4, atol=1e-4)


def test_codes_that_are_rescaled_by_decoder_norms(tmp_path: pathlib.Path) -> None:
    dpath = folder(tmp_path, {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True})
    t = safetensors.torch.load_file(dpath / "sae_weights.safetensors")
    norm_S = t["W_dec"].norm(dim=1)
    pre_BS = ((batch() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norm_S
    f_BS = torch.where(pre_BS >= pre_BS.topk(3).values[:, -1:], pre_BS, 0.0).relu()
    x_hat_BD, got_BS = saelens.load(dpath)(batch())
    torch.testing.assert_close(got_BS, f_BS, rtol=1e-4, atol=1e-4)
    want_BD = (f_BS / norm_S) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(x_hat_BD, want_BD, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        ({"architecture": "gated"}, "architecture is 'gated'; saev has only standard, topk"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"d_sae": 2 * D + 1}, "not a multiple of d_in"),
        ({"d_sae": "12"}, "d_sae is '12', not a positive integer"),
        ({"architecture": "topk"}, "k is None, not a positive integer"),
        ({"architecture": "jumprelu"}, "tensor threshold is missing"),
        ({"d_sae": 3 * D}, "tensor W_enc has shape"),
    ],
)
def test_what_cannot_be_expressed(
    cfg: dict[str, object], match: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(errors.UserError, match=match):
        saelens.load(folder(tmp_path, cfg))


def test_broken_folders(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r"cfg\.json cannot be read"):
        saelens.load(tmp_path / "nowhere")
    dpath = folder(tmp_path, {}, b_dec=torch.full((D,), torch.nan))
    with pytest.raises(errors.UserError, match="b_dec holds NaN"):
        saelens.load(dpath)
    fpath = dpath / "sae_weights.safetensors"
    fpath.write_bytes(fpath.read_bytes()[:-10])
    with pytest.raises(errors.UserError, match="safetensors cannot be read"):
        saelens.load(dpath)


def test_a_failed_export_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError):
        saelens.export(make(CFGS[0]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


TRAINED_ON = {"vit_family": "dinov2", "vit_ckpt": "dinov2_vits14", "layers": [8]}


def test_the_command(tmp_path: pathlib.Path) -> None:
    sae = make(CFGS[1])
    nn.save(sae, tmp_path / "sae.pt", TRAINED_ON)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "saev.nn.saelens", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run("export", str(tmp_path / "sae.pt"), str(tmp_path / "out")).returncode == 0
    again = run("export", str(tmp_path / "sae.pt"), str(tmp_path / "out"))
    assert (again.returncode, again.stderr.count("\n")) == (
        2,
        1,
    ) and "exists already" in again.stderr
    assert run("load", str(tmp_path / "out"), str(tmp_path / "back.pt")).returncode == 0
    back = nn.load(tmp_path / "back.pt")
    x_hat_BD, f_BS = back(batch())
    assert_same(f_BS, x_hat_BD, sae)
    assert back.activations == TRAINED_ON
    stamp = (tmp_path / "back.pt").read_bytes()
    again = run("load", str(tmp_path / "out"), str(tmp_path / "back.pt"))
    assert again.returncode == 2 and "back.pt exists already" in again.stderr
    assert (tmp_path / "back.pt").read_bytes() == stamp


# ---- SAELens itself ----


@pytest.mark.filterwarnings("ignore")
@each_cfg
def test_saelens_reads_what_we_export(cfg: config.Sae, tmp_path: pathlib.Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = make(cfg)
    saelens.export(sae, tmp_path / "out")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "out"))
    with torch.no_grad():
        f_BS = theirs.encode(batch())
        assert_same(f_BS, theirs.decode(f_BS), sae)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["Standard", "TopK", "JumpReLU"])
def test_we_read_what_saelens_saves(architecture: str, tmp_path: pathlib.Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    more = {"k": 3} if architecture == "TopK" else {}
    cfg = getattr(sae_lens, f"{architecture}SAEConfig")(d_in=D, d_sae=4 * D, **more)
    theirs = getattr(sae_lens, f"{architecture}SAE")(cfg)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in theirs.parameters():
            p += torch.randn(p.shape, generator=generator)
        f_BS = theirs.encode(batch())
        x_hat_BD = theirs.decode(f_BS)
    theirs.save_model(str(tmp_path / "out"))
    assert_same(f_BS, x_hat_BD, saelens.load(tmp_path / "out"))
