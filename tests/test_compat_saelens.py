"""SAELens' format, read and written; with SAELens itself if it is installed (group `peers`). B batch, D d_vit, S latents."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import forked
import numpy as np
import pytest
import safetensors.torch
import torch

from saev import errors, nn
from saev.compat import known_keys, saelens
from saev.nn import config

ROOT = pathlib.Path(__file__).parent.parent
D = 6
CFGS = [
    config.Relu(d_vit=D, exp_factor=4),
    config.TopK(d_vit=D, exp_factor=4, top_k=3),
    config.BatchTopK(d_vit=D, exp_factor=4, top_k=3),
    config.JumpRelu(d_vit=D, exp_factor=4),
    config.TopK(d_vit=D, exp_factor=4, top_k=3, normalize="per-dim"),
]
each_cfg = pytest.mark.parametrize("cfg", CFGS, ids=lambda c: type(c).__name__)


def batch() -> torch.Tensor:
    return torch.linspace(2, 8, D) * torch.randn(
        40, D, generator=torch.Generator().manual_seed(0)
    ) + torch.arange(D)


def make(cfg: config.Sae) -> nn.SparseAutoencoder:
    """An SAE with a scale, nonzero biases and a threshold."""
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
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cfg.json", "out", "sae_weights.safetensors"]
    again = saelens.load(tmp_path / "out")
    x_hat_BD, f_BS = again(batch())
    assert_same(f_BS, x_hat_BD, sae)
    assert again.scale == 1


@pytest.mark.parametrize("normalize", ["scale", "per-dim"])
def test_weights_are_folded_for_raw_activations(normalize: str, tmp_path: pathlib.Path) -> None:
    """By the formula f = relu((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec, on what was written."""
    sae = make(dataclasses.replace(CFGS[0], normalize=normalize))
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
        ({"architecture": "temporal"}, "architecture is 'temporal'; only standard, topk, jumprelu, gated"),
        ({"architecture": "batchtopk", "k": 3}, "architecture is 'batchtopk'"),
        ({"architecture": "skip_transcoder", "d_out": D}, "architecture is 'skip_transcoder'"),
        ({"normalize_activations": "expected_average_only_in"}, "is 'expected_average_only_in'; only none"),
        ({"normalize_activations": "constant_norm_rescale"}, "is 'constant_norm_rescale'"),
        ({"normalize_activations": True}, "normalize_activations is True"),
        ({"hook_name": "blocks.8.attn.hook_z"}, "reshape_activations is 'hook_z'"),
        ({"use_error_term": True}, "use_error_term is True"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input is 1"),
        ({"d_out": D}, "unknown key d_out. It may change what the SAE computes"),
        ({"threshold_scale": 2, "bias": 1}, "unknown key bias, threshold_scale"),
        (
            {"rescale_acts_by_decoder_norm": True},
            "rescale_acts_by_decoder_norm is True, but architecture is 'standard'",
        ),
        ({"k": 3}, "k is 3, but architecture is 'standard'"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu'; only relu, topk"),
        ({"activation_fn_str": "topk"}, "k is None, not a positive integer"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3, "abs": True}},
            "activation_fn_kwargs: unknown key abs",
        ),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": [3]},
            "activation_fn_kwargs is not a JSON object",
        ),
        ({"activation_fn_kwargs": {"k": 3}}, r"activation_fn_kwargs \(not a TopK\): unknown key k"),
        (
            {"activation_fn_str": "relu", "activation_fn": "topk"},
            "activation_fn_str and activation_fn are the same",
        ),
        (
            {"activation_fn": "topk", "activation_fn_kwargs": {"k": 3}, "architecture": "gated"},
            "architecture is 'gated'; only standard, topk",
        ),
        (
            {
                "activation_fn": "topk",
                "activation_fn_kwargs": {"k": 3},
                "metadata": {"sae_lens_version": "6.2.0"},
            },
            "activation_fn is 'topk'; only relu",
        ),
        (
            {"architecture": "topk", "k": 4, "activation_fn": "topk", "activation_fn_kwargs": {"k": 3}},
            "k is 4, but 3 in activation_fn_kwargs",
        ),
        ({"finetuning_scaling_factor": True}, "tensor scaling_factor is missing"),
        ({"metadata": 3}, "metadata is not a JSON object"),
        ({"metadata": {"trained_on": {"layers": "8"}}}, "trained_on is not as saev writes it"),
        ({"metadata": {"trained_on": 3}}, "trained_on is not as saev writes it"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"d_sae": 2 * D + 1}, "tensor W_enc has shape"),
        ({"d_sae": "12"}, "d_sae is '12', not a positive integer"),
        ({"architecture": "topk"}, "k is None, not a positive integer"),
        ({"architecture": "jumprelu"}, "tensor threshold is missing"),
        ({"d_sae": 3 * D}, "tensor W_enc has shape"),
    ],
)
def test_what_cannot_be_expressed(cfg: dict[str, object], match: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=match):
        saelens.load(folder(tmp_path, cfg))


def test_any_config_is_read_or_refused_in_one_line(tmp_path: pathlib.Path) -> None:
    dpath, random = folder(tmp_path, {}), np.random.default_rng(0)
    values = [None, True, 0, 3, 2 * D, 2**40, 1.5, "topk", "gated", "none", "6.1", [3], {"k": 3}]
    keys, n_read = sorted(saelens.USED | {"activation_fn_str", "hook_name"}), 0
    for _ in range(300):
        chosen = random.choice(keys, 3, replace=False)
        more = {str(key): values[random.integers(len(values))] for key in chosen}
        (dpath / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": 2 * D, **more}))
        try:
            saelens.load(dpath)
            n_read += 1
        except errors.UserError as err:
            assert "\n" not in str(err)
    assert n_read > 3


def test_broken_folders(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r"cfg\.json: cannot be read"):
        saelens.load(tmp_path / "nowhere")
    dpath = folder(tmp_path, {}, b_dec=torch.full((D,), torch.nan))
    with pytest.raises(errors.UserError, match="tensor b_dec holds NaN"):
        saelens.load(dpath)
    (dpath / "cfg.json").write_text('{"d_in": 6, "d_in": 7}')
    with pytest.raises(errors.UserError, match="the key 'd_in' is repeated"):
        saelens.load(dpath)
    (dpath / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": 2 * D}))
    fpath = dpath / "sae_weights.safetensors"
    fpath.write_bytes(fpath.read_bytes()[:-10])
    with pytest.raises(errors.UserError, match="safetensors: cannot be read"):
        saelens.load(dpath)


# ---- other settings ----


def plain(dpath: pathlib.Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors, pre-activations) by the formula, in float64."""
    t = safetensors.torch.load_file(dpath / "sae_weights.safetensors")
    t = {name: tensor.double() for name, tensor in t.items()}
    return t, (batch().double() - t["b_dec"]) @ t["W_enc"]


@pytest.mark.parametrize(
    "cfg",
    [
        {"architecture": "standard", "activation_fn_str": "topk"},
        {"activation_fn_str": "topk"},
        {"activation_fn": "topk", "metadata": {"sae_lens_version": "5.11.0"}},
        {"architecture": "topk", "activation_fn": "topk", "sae_lens_version": "4.0.1"},
    ],
)
def test_before_version_6_the_activation_function_decides(
    cfg: dict[str, object], tmp_path: pathlib.Path
) -> None:
    more = {"activation_fn_kwargs": {"k": 3}, "normalize_activations": None, "hook_point": "h"}
    dpath = folder(tmp_path, {**cfg, **more})
    t, z_BS = plain(dpath)
    pre_BS = z_BS + t["b_enc"]
    want_BS = torch.where(pre_BS >= pre_BS.topk(3).values[:, -1:], pre_BS, 0.0).relu()
    sae = saelens.load(dpath)
    assert isinstance(sae.cfg, config.TopK) and sae.cfg.top_k == 3
    torch.testing.assert_close(sae.encode(batch()), want_BS.float(), rtol=1e-4, atol=1e-4)


def test_codes_that_are_scaled_before_decoding(tmp_path: pathlib.Path) -> None:
    scaling_S = torch.linspace(0.5, 2, 2 * D)
    dpath = folder(tmp_path, {"finetuning_scaling_factor": True}, scaling_factor=scaling_S)
    t, z_BS = plain(dpath)
    f_BS = (z_BS + t["b_enc"]).relu()
    x_hat_BD, got_BS = saelens.load(dpath)(batch())
    torch.testing.assert_close(got_BS, f_BS.float(), rtol=1e-4, atol=1e-4)
    want_BD = (f_BS * scaling_S) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(x_hat_BD, want_BD.float(), rtol=1e-4, atol=1e-3)
    cfg_fpath = dpath / "cfg.json"
    cfg_fpath.write_text(cfg_fpath.read_text().replace("true}", "false}"))
    with pytest.raises(errors.UserError, match="but finetuning_scaling_factor is false in"):
        saelens.load(dpath)


def test_a_scaling_of_ones_is_none(tmp_path: pathlib.Path) -> None:
    """Older versions always wrote it."""
    dpath = folder(tmp_path, {}, scaling_factor=torch.ones(2 * D))
    t, z_BS = plain(dpath)
    want_BS = (z_BS + t["b_enc"]).relu().float()
    torch.testing.assert_close(saelens.load(dpath).encode(batch()), want_BS, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("subtracts", [True, False])
def test_gated_is_a_jump_relu(subtracts: bool, tmp_path: pathlib.Path) -> None:
    generator = torch.Generator().manual_seed(3)
    more = {k: 2 * torch.randn(2 * D, generator=generator) for k in ("b_gate", "b_mag", "r_mag")}
    dpath = folder(tmp_path, {"architecture": "gated", "apply_b_dec_to_input": subtracts}, **more)
    fpath = dpath / "sae_weights.safetensors"
    t = safetensors.torch.load_file(fpath)
    with pytest.raises(errors.UserError, match="unknown tensor b_enc"):
        saelens.load(dpath)
    del t["b_enc"]
    safetensors.torch.save_file(t, fpath)
    t, z_BS = plain(dpath)
    z_BS = z_BS if subtracts else batch().double() @ t["W_enc"]
    is_on_BS = z_BS + t["b_gate"] > 0
    want_BS = (is_on_BS * (z_BS * t["r_mag"].exp() + t["b_mag"]).relu()).float()
    assert (is_on_BS & (want_BS == 0)).any() and 0 < (want_BS > 0).float().mean() < 1
    x_hat_BD, f_BS = saelens.load(dpath)(batch())
    torch.testing.assert_close(f_BS, want_BS, rtol=1e-4, atol=1e-3)
    want_BD = want_BS @ t["W_dec"].float() + t["b_dec"].float()
    torch.testing.assert_close(x_hat_BD, want_BD, rtol=1e-4, atol=1e-2)


def test_unknown_tensors_are_refused(tmp_path: pathlib.Path) -> None:
    dpath = folder(tmp_path, {}, threshold=torch.ones(2 * D))
    with pytest.raises(errors.UserError, match="unknown tensor threshold. It may change"):
        saelens.load(dpath)


def test_half_precision_and_any_number_of_latents(tmp_path: pathlib.Path) -> None:
    dpath = folder(tmp_path, {"d_sae": 2 * D + 1, "dtype": "torch.bfloat16"})
    shapes = {"W_enc": (D, 13), "b_enc": (13,), "W_dec": (13, D), "b_dec": (D,)}
    t = {k: torch.randn(v).bfloat16() for k, v in shapes.items()}
    safetensors.torch.save_file(t, dpath / "sae_weights.safetensors")
    want_BS = ((batch() - t["b_dec"].float()) @ t["W_enc"].float() + t["b_enc"].float()).relu()
    torch.testing.assert_close(saelens.load(dpath).encode(batch()), want_BS, rtol=1e-4, atol=1e-4)


def test_a_top_k_with_negative_values_is_not_exported(tmp_path: pathlib.Path) -> None:
    sae = make(config.TopK(d_vit=D, d_sae=13, top_k=12, keep_negative=True))
    with pytest.raises(errors.UserError, match="keeps negative values .* cannot be exported"):
        saelens.export(sae, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save", fail)
    with pytest.raises(OSError):
        saelens.export(make(CFGS[0]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


TRAINED_ON = {"vit_family": "dinov2", "vit_ckpt": "dinov2_vits14", "layers": [8]}


@pytest.mark.slow
def test_the_command(tmp_path: pathlib.Path) -> None:
    sae = make(CFGS[1])
    nn.save(sae, tmp_path / "sae.pt", TRAINED_ON)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "saev.compat", "saelens", *args]
        return forked.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run("export", str(tmp_path / "sae.pt"), str(tmp_path / "out")).returncode == 0
    again = run("export", str(tmp_path / "sae.pt"), str(tmp_path / "out"))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1) and "exists already" in again.stderr
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


@pytest.mark.slow
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
@pytest.mark.parametrize("architecture", ["Standard", "TopK", "JumpReLU", "Gated"])
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


@pytest.mark.filterwarnings("ignore")
@each_cfg
def test_saelens_keeps_what_it_was_trained_on(cfg: config.Sae, tmp_path: pathlib.Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = make(cfg)
    sae.activations = TRAINED_ON
    saelens.export(sae, tmp_path / "a")
    sae_lens.SAE.load_from_disk(str(tmp_path / "a")).save_model(str(tmp_path / "b"))
    again = saelens.load(tmp_path / "b")
    assert again.activations == TRAINED_ON
    x_hat_BD, f_BS = again(batch())
    assert_same(f_BS, x_hat_BD, sae)


@pytest.mark.filterwarnings("ignore")
def test_before_version_6_as_saelens_reads_it(tmp_path: pathlib.Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "dtype": "float32"}
    dpath = folder(tmp_path, {**old, "hook_name": "blocks.8.hook_resid_pre"})
    theirs = sae_lens.SAE.load_from_disk(str(dpath))
    with torch.no_grad():
        f_BS = theirs.encode(batch())
        assert_same(f_BS, theirs.decode(f_BS), saelens.load(dpath))


@pytest.mark.filterwarnings("ignore")
def test_every_key_that_saelens_can_write_is_decided() -> None:
    """Used, known to have no effect, or part of a refused architecture."""
    sae_lens = pytest.importorskip("sae_lens")
    registry = pytest.importorskip("sae_lens.registry")
    read = ("standard", "gated", "topk", "jumprelu")
    classes = [sae_lens.config.LanguageModelSAERunnerConfig]
    for found in (registry.SAE_CLASS_REGISTRY, registry.SAE_TRAINING_CLASS_REGISTRY):
        classes += [cls for name, (_, cls) in found.items() if name in read]
    names = {field.name for cls in classes for field in dataclasses.fields(cls)}
    runners = {"sae"}  # the runner's nested config, which has its own file
    assert names - runners - saelens.USED <= known_keys.SAELENS
    assert not saelens.USED & known_keys.SAELENS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["SAE", "training", "inference"])
def test_every_architecture_is_read_as_saelens_does_or_refused(form: str, tmp_path: pathlib.Path) -> None:
    """As the library saves SAEs, training SAEs, and training SAEs for inference."""
    sae_lens = pytest.importorskip("sae_lens")
    registry = pytest.importorskip("sae_lens.registry")
    classes = registry.SAE_CLASS_REGISTRY if form == "SAE" else registry.SAE_TRAINING_CLASS_REGISTRY
    read, x_BD = [], batch()
    for name, (cls, cfg_cls) in classes.items():
        if name in ("temporal", "matching_pursuit"):  # (their own sizes)
            continue
        more = {"d_out": D, "apply_b_dec_to_input": False} if "transcoder" in name else {}
        more |= {"k": 3} if "topk" in name else {}
        more |= {"matryoshka_widths": [D, 4 * D]} if "matryoshka" in name else {}
        theirs = cls(cfg_cls(d_in=D, d_sae=4 * D, **more))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in theirs.parameters():
                p += torch.randn(p.shape, generator=generator)
            if hasattr(theirs, "topk_threshold"):
                theirs.topk_threshold.fill_(4.0)
        dpath = tmp_path / name
        (theirs.save_inference_model if form == "inference" else theirs.save_model)(dpath)
        try:
            ours = saelens.load(dpath)
        except errors.UserError:
            continue
        read.append(name)
        theirs = sae_lens.SAE.load_from_disk(str(dpath))
        with torch.no_grad():
            f_BS = theirs.encode(x_BD)
            assert_same(f_BS, theirs.decode(f_BS), ours)
    want = ["standard", "gated", "topk", "jumprelu"]
    assert read == want + ["batchtopk", "matryoshka_batchtopk"] * (form == "inference")
