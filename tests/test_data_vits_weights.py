"""Local files of weights, as authors, libraries and training code save them: equal outputs, or one line that says why not."""

import argparse
import functools
import json
import logging
import os
import pathlib
import pickle
import re
import zipfile

import numpy as np
import open_clip
import pytest
import safetensors.torch
import shallow
import timm
import torch

from saev import errors
from saev.data import config, vits
from saev.data.vits import files, weights

pytestmark = pytest.mark.slow

State = dict[str, torch.Tensor]


@functools.lru_cache(maxsize=10)
def random(family: str, ckpt: str, **kwargs: object) -> vits.Vit:
    return vits.load(config.Vit(vit_family=family, vit_ckpt=ckpt, vit_weights="random", **kwargs))


def load(obj: object, fpath: pathlib.Path, family: str = "timm", ckpt: str = "test_vit") -> State:
    """The weights of a model that was loaded from `obj`, saved at `fpath`."""
    torch.save(obj, fpath)
    return vits.load(config.Vit(family, ckpt, str(fpath))).module.state_dict()


def refused(obj: object, fpath: pathlib.Path, match: str) -> None:
    with pytest.raises(errors.UserError, match=match):
        load(obj, fpath)


def equal(got: State, want: State) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm models of two narrow blocks."""
    shallow.towers(monkeypatch, 2, embed_dim=48, num_heads=3)


@pytest.fixture
def two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    shallow.towers(monkeypatch, 2)


@pytest.fixture(scope="module")
def state() -> State:
    """test_vit's weights under another seed than a model has before it is loaded."""
    return random("timm", "test_vit", vit_seed=5).module.state_dict()


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


# ---- what training code makes of a state dict ----


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "module._orig_mod.model."),
        *("_orig_mod.module.", "student_of_mine.vit.", "teacher.backbone.", "visual.trunk."),
    ],
)
def test_prefixes(state: State, prefix: str, tmp_path: pathlib.Path) -> None:
    assert equal(load({"state_dict": prefixed(prefix, state)}, tmp_path / "w.pt"), state)
    with_head = prefixed(prefix, state) | {f"{prefix}head.weight": torch.zeros(9, 64)}
    assert equal(load({"model": {"state_dict": with_head}, "epoch": 3}, tmp_path / "w.pt"), state)
    beside = f"{prefix.rstrip('.').rpartition('.')[0]}.head.mlp.0.weight".lstrip(".")
    with_head = prefixed(prefix, state) | {beside: torch.zeros(2, 2)}
    assert equal(load(with_head, tmp_path / "w.pt"), state)


def test_names_of_compiled_and_checkpointed_blocks(state: State, tmp_path: pathlib.Path) -> None:
    names = {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", k): v for k, v in state.items()}
    assert names.keys() != state.keys()
    assert equal(load(names, tmp_path / "w.pt"), state)
    names = {k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): state[k] for k in state}
    assert equal(load(prefixed("_fsdp_wrapped_module.", names), tmp_path / "w.pt"), state)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        *(("teacher", "student"), ("state_dict_ema", "state_dict"), ("model_ema", "model")),
        ("model", "optimizer"),
    ],
)
def test_of_two_models_the_averaged_one_is_used(
    state: State, better: str, worse: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    obj = {worse: prefixed("backbone.", other), better: prefixed("backbone.", state)}
    obj[better]["dino_head.last_layer.weight_g"] = torch.zeros(3)
    with caplog.at_level(logging.INFO, "saev"):
        assert equal(load(obj, tmp_path / "w.pt"), state)
    assert (f"under {better!r}, not {[worse]}" in caplog.text) == (worse != "optimizer")
    refused({worse: {}, "epoch": 3}, tmp_path / "w.pt", "holds no state dict .found: ")


def test_teacher_and_student_in_one_state_dict(state: State, tmp_path: pathlib.Path) -> None:
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    flat = prefixed("teacher.backbone.", state) | prefixed("student.backbone.", other)
    assert equal(load({"state_dict": flat}, tmp_path / "w.pt"), state)
    twins = prefixed("base_encoder.", state) | prefixed("momentum_encoder.", other)
    refused(twins, tmp_path / "w.pt", r"holds several models .base_encoder., momentum_encoder..")


def test_tensors_that_are_not_known_to_be_harmless_are_named(state: State, tmp_path: pathlib.Path) -> None:
    fpath = tmp_path / "w.pt"
    refused(state | {"blocks.0.lora": torch.ones(1)}, fpath, r"1 tensor is unknown .blocks.0.lora.")
    moved = prefixed("model.", state) | {"adapter.weight": torch.ones(1)}
    refused(moved, fpath, r"1 tensor is unknown .adapter.weight.. Pass the state dict")
    wide = state | {"norm.weight": torch.ones(65)}
    refused(wide, fpath, r"1 tensor is of another shape or type .norm.weight.")
    whole = state | {"norm.weight": torch.ones(64, dtype=torch.int8)}
    refused(whole, fpath, r"1 tensor is of another shape or type .norm.weight.")
    few = {k: v for k, v in state.items() if not k.startswith("norm.")}
    refused(few, fpath, r"2 tensors are missing .norm.bias, norm.weight.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(state: State, value: float, tmp_path: pathlib.Path) -> None:
    bad = state["blocks.1.mlp.fc1.weight"].clone()
    bad[3, 4] = value
    bad = state | {"blocks.1.mlp.fc1.weight": bad}
    refused(bad, tmp_path / "w.pt", "blocks.1.mlp.fc1.weight holds NaN or infinite weights")


def test_half_precision_is_read_exactly(state: State, tmp_path: pathlib.Path) -> None:
    half = {key: value.half() for key, value in state.items()}
    want = {key: value.float() for key, value in half.items()}
    assert equal(load(half, tmp_path / "w.pt"), want)


# ---- files ----


def test_arguments_and_numbers_beside_the_weights(state: State, tmp_path: pathlib.Path) -> None:
    more = {"args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("x")), "acc": np.float64(0.5)}
    more |= {"best": np.float32(1), "step": np.int64(3), "epoch": 3, "name": "x"}
    assert equal(load({"model": state, **more}, tmp_path / "w.pt"), state)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('pwned').touch()",)


def test_pickled_code_is_named_and_not_run(
    state: State, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    match = r"holds pickled objects that could run code .*exec.*save only `model.state_dict"
    refused({"model": state, "evil": Evil()}, tmp_path / "w.pt", match)
    linear = torch.nn.Linear(2, 2)
    refused(linear, tmp_path / "w.pt", r"pickled objects .* .torch.nn.modules.linear.Linear.")
    torch.save(linear, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(errors.UserError, match=r"pickled objects .* .torch.nn.modules.linear.Line"):
        files.read(tmp_path / "old.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_archives_give_their_tensors(state: State, tmp_path: pathlib.Path) -> None:
    model = random("timm", "test_vit", vit_seed=5).module
    traced = torch.jit.trace(model, torch.zeros(1, 3, *random("timm", "test_vit").transform.size))
    traced.save(tmp_path / "w.pt")
    got = files.read(tmp_path / "w.pt")
    assert equal(got, traced.state_dict()) and equal(got, state)
    loaded = vits.load(config.Vit("timm", "test_vit", str(tmp_path / "w.pt")))
    assert equal(loaded.module.state_dict(), state)
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/constants.pkl", b"")
        archive.writestr("evil/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(errors.UserError, match="a TorchScript archive that holds builtins.exec"):
        files.read(tmp_path / "evil.pt")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer.*lfs pull"),
        (b'{"weight_map": {}}', "begins with JSON text, not weights. Pass a .safetensors"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"nothing at all", "cannot be read as weights"),
        (bytes(100), "cannot be read as weights"),
        (b"PK\x03\x04" + bytes(40), "cannot be read as weights"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_hold_no_weights(data: bytes, match: str, suffix: str, tmp_path: pathlib.Path) -> None:
    fpath = tmp_path / f"w{suffix}"
    fpath.write_bytes(data)
    with pytest.raises(errors.UserError, match=match) as caught:
        vits.load(config.Vit("timm", "test_vit", str(fpath)))
    message = str(caught.value)
    assert message.startswith(f"{fpath}: ") and "\n" not in message
    assert "--vit-weights" not in message  # it was passed


def test_cut_and_damaged_files(state: State, tmp_path: pathlib.Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "w.pt", "old.pt"):
        whole = (tmp_path / name).read_bytes()
        assert equal(files.read(tmp_path / name), state)
        if name == "w.pt":
            (tmp_path / name).write_bytes(whole[:-100])
            with pytest.raises(errors.UserError, match=f"{name}: .* .it is truncated or damaged"):
                files.read(tmp_path / name)
        for part in (whole[: len(whole) // 2], whole[:100], whole[:20] + bytes(80) + whole[100:]):
            (tmp_path / name).write_bytes(part)
            with pytest.raises(errors.UserError, match=f"{name}: cannot be read as weights"):
                files.read(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.pt")
    cases = {"gone.pt": "cannot be read as weights .No such file or directory"}
    cases |= {"pipe.pt": "is not a regular file", ".": "is not a regular file"}
    for name, match in cases.items():
        with pytest.raises(errors.UserError, match=match):
            files.read(tmp_path / name)


# ---- names of authors and libraries ----


def authors_dinov2(model: torch.nn.Module) -> State:
    """The names of facebookresearch/dinov2: registers stand apart, [CLS] has a position, SwiGLU's layers are w12 and w3."""
    out = dict(model.state_dict())
    if "reg_token" in out:
        cls_position = torch.randn(1, 1, model.embed_dim, generator=torch.Generator().manual_seed(1))
        out["register_tokens"] = out.pop("reg_token")
        out["pos_embed"] = torch.cat([cls_position, out["pos_embed"]], dim=1)
        out["cls_token"] = out["cls_token"] - cls_position
    if "vitg" in model.saev_name:
        out = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): out[k] for k in out}
    return out | {"mask_token": torch.zeros(1, model.embed_dim)}


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg", "dinov2_vitg14_reg"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_authors_dinov2_file_loads(name: str, wrapped: bool, tmp_path: pathlib.Path) -> None:
    """Outputs as timm's own loading of the file gives them; its positions are those of 518 pixels, 37 x 37."""
    torch.manual_seed(0)
    timm_name = vits.timm.PUBLISHED["dinov2"].timm_names[name]
    source = timm.create_model(timm_name, num_classes=0)
    source.saev_name = name
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    file = authors_dinov2(source)
    assert ("blocks.0.mlp.w12.weight" in file) == ("vitg" in name)
    want = timm.create_model(timm_name, num_classes=0, img_size=224).eval()
    convert = timm.models.vision_transformer.checkpoint_filter_fn
    want.load_state_dict(convert(dict(file), want))
    if wrapped:  # as the training code saves it, with its blocks in chunks
        chunks = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", k): v for k, v in file.items()}
        heads = {"dino_head.mlp.0.weight": torch.zeros(1), "ibot_head.mlp.0.weight": torch.zeros(1)}
        del chunks["mask_token"]
        file = {"teacher": prefixed("backbone.", chunks) | heads}
    torch.save(file, tmp_path / "w.pth")
    vit = vits.load(config.Vit("dinov2", name, str(tmp_path / "w.pth")))
    x_BCHW = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (want_BPD,) = want.forward_intermediates(x_BCHW, [1], intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(vit(x_BCHW, (1,))[:, 0, 1:], want_BPD, rtol=0, atol=0)


@pytest.mark.usefixtures("narrow")
def test_an_authors_dinov3_file_loads(tmp_path: pathlib.Path) -> None:
    source = vits.load(config.Vit("dinov3", "dinov3_vits16", "random", 5))
    state = {}
    for key, value in source.module.state_dict().items():
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        if not key.endswith("_bias"):
            state[key.replace("reg_token", "storage_tokens")] = value
    for i in range(source.n_blocks):
        state[f"blocks.{i}.attn.qkv.bias"] = torch.zeros(3 * source.d_vit)
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.zeros(3 * source.d_vit)
    state |= {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.zeros(16)}
    torch.save(state, tmp_path / "dinov3.pth")
    vit = vits.load(config.Vit("dinov3", "dinov3_vits16", str(tmp_path / "dinov3.pth")))
    imgs_BCHW = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vit(imgs_BCHW, (1,)), source(imgs_BCHW, (1,)))


def test_deit(tmp_path: pathlib.Path) -> None:
    """timm's own files hold both heads; the authors' DeiT III calls its layer scales gamma_1 and gamma_2."""
    name = "deit_tiny_distilled_patch16_224"
    file = timm.create_model(name).state_dict()
    assert "head_dist.weight" in file
    got = load(file, tmp_path / "w.pt", ckpt=name)
    assert equal(got, {k: v for k, v in file.items() if not k.startswith("head")})


@pytest.mark.usefixtures("narrow")
def test_deit_iii(tmp_path: pathlib.Path) -> None:
    name = "deit3_small_patch16_224"
    want = random("timm", name, vit_seed=9).module.state_dict()
    file = {re.sub(r"ls([12])\.gamma", r"gamma_\1", k): v for k, v in want.items()}
    assert "blocks.1.gamma_2" in file
    assert equal(load({"model": file}, tmp_path / "w.pt", ckpt=name), want)


def test_mae_pretraining_files_lose_their_decoder(state: State, tmp_path: pathlib.Path) -> None:
    decoder = {"mask_token": torch.zeros(1), "decoder_embed.weight": torch.zeros(1)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.zeros(1), "decoder_pos_embed": torch.ones(1)}
    assert equal(load({"model": state | decoder}, tmp_path / "w.pt"), state)


TRANSFORMERS = {
    "ViT": "vit.encoder.layer.0.attention.attention.query.weight",
    "DINOv2": "embeddings.register_tokens",
    "DINOv3": "layer.0.attention.q_proj.weight",
    "CLIP": "vision_model.encoder.layers.0.self_attn.q_proj.weight",
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_names_are_called_so(kind: str, tmp_path: pathlib.Path) -> None:
    file = {TRANSFORMERS[kind]: torch.zeros(1)}
    refused(
        file, tmp_path / "w.bin", "These are names of the transformers library: pass the file of the model's"
    )


def test_openai_names_in_a_timm_model(tmp_path: pathlib.Path) -> None:
    """A whole CLIP of OpenAI's names, as timm itself converts it."""
    name = "vit_xsmall_patch16_clip_224"
    want = timm.create_model(name, num_classes=0, img_size=32).state_dict()
    swaps = {"patch_embed.proj": "conv1", "norm_pre": "ln_pre", "blocks.": "transformer.resblocks."}
    swaps |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "qkv.": "in_proj_"}
    swaps |= {"attn.proj": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2"}
    file = {}
    for key, value in want.items():
        for ours, theirs in swaps.items():
            key = key.replace(ours, theirs)
        key = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}.get(key, key)
        key = re.sub("^norm", "ln_post", key)
        is_token = key in ("class_embedding", "positional_embedding")
        file[f"visual.{key}"] = value.reshape(-1, value.shape[-1]).squeeze(0) if is_token else value
    file |= {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.zeros(1)}
    torch.save(file, tmp_path / "w.pt")
    vit = vits.load(config.Vit("timm", name, str(tmp_path / "w.pt"), img_size=32))
    assert equal(vit.module.state_dict(), want)


# ---- open_clip ----

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A small CLIP as a folder of the hub holds it."""
    dpath = tmp_path / "small-clip"
    dpath.mkdir()
    prep = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    text = json.dumps({"model_cfg": SMALL, "preprocess_cfg": prep})
    (dpath / "open_clip_config.json").write_text(text)
    torch.manual_seed(3)
    clip = open_clip.model.CLIP(**SMALL)
    safetensors.torch.save_file(clip.state_dict(), dpath / "open_clip_model.safetensors")
    return dpath


def test_a_folder_of_open_clip(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As open_clip itself loads it; its name is that of its files' contents, wherever the folder lies."""
    vit = vits.load(config.Vit("clip", f"local-dir:{folder}"))
    want, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    x_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out = want.visual.eval().forward_intermediates(x_BCHW, [1], output_fmt="NLC")
    torch.testing.assert_close(vit(x_BCHW, (1,))[:, 0, 1:], out["image_intermediates"][0], rtol=0, atol=0)
    assert vit.transform.mean == (0.4, 0.5, 0.6) and vit.transform.size == (32, 32)
    assert re.fullmatch("local-dir:small-clip@sha256:[0-9a-f]{16}", vit.ckpt_id)
    monkeypatch.setenv("SAEV_MODELS", str(folder.parent))
    again = vits.load(config.Vit("clip", "local-dir:$SAEV_MODELS/small-clip"))
    assert again.ckpt_id == vit.ckpt_id
    text = (folder / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(text.replace("0.4", "0.3"))
    assert vits.load(config.Vit("clip", f"local-dir:{folder}")).ckpt_id != vit.ckpt_id


def test_folders_that_are_not_open_clips(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def refused(ckpt: str, match: str) -> None:
        with pytest.raises(errors.UserError, match=match):
            vits.load(config.Vit("clip", ckpt))

    refused(f"local-dir:{tmp_path}", "no open_clip_config.json in that folder")
    (folder / "open_clip_model.safetensors").unlink()
    refused(f"local-dir:{folder}", "no weights in that folder .looked for open_clip_model.safeten")
    assert vits.load(config.Vit("clip", f"local-dir:{folder}", "random")).d_vit == 32
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    refused(f"local-dir:{folder}", "model.safetensors: is a git-lfs pointer")
    (folder / "open_clip_config.json").write_text("[1")
    refused(f"local-dir:{folder}", "cannot be built .*Check its open_clip_config.json")


def test_open_clips_training_checkpoints(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """epoch_N.pt: DDP's prefix, the text tower, the optimizer."""
    whole = safetensors.torch.load_file(folder / "open_clip_model.safetensors")
    assert "positional_embedding" in whole and "visual.positional_embedding" in whole
    want = vits.load(config.Vit("clip", f"local-dir:{folder}")).module.state_dict()
    for i, prefix in enumerate(("module.", "", "_orig_mod.", "module._orig_mod.")):
        file = {"epoch": 3, "name": "run", "state_dict": prefixed(prefix, whole), "scaler": {"a": 1}}
        file["optimizer"] = {"state": {}, "param_groups": [{"lr": 0.1}]}
        torch.save(file, tmp_path / f"epoch_{i}.pt")
        cfg = config.Vit("clip", f"local-dir:{folder}", str(tmp_path / f"epoch_{i}.pt"))
        assert equal(vits.load(cfg).module.state_dict(), want)
    odd = prefixed("module.", whole | {"audio.proj": torch.zeros(1)})
    torch.save({"state_dict": odd}, tmp_path / "odd.pt")
    with pytest.raises(errors.UserError, match="1 tensor is unknown .module.audio.proj"):
        vits.load(config.Vit("clip", f"local-dir:{folder}", str(tmp_path / "odd.pt")))


@pytest.mark.parametrize("n_positions", [15, 17])
def test_a_grid_that_is_not_square_is_refused(
    state: State, folder: pathlib.Path, n_positions: int, tmp_path: pathlib.Path
) -> None:
    file = state | {"pos_embed": torch.zeros(1, 1 + n_positions, 64)}
    refused(file, tmp_path / "w.pt", "does not fit test_vit")
    whole = safetensors.torch.load_file(folder / "open_clip_model.safetensors")
    whole["visual.positional_embedding"] = torch.zeros(1 + n_positions, 32)
    torch.save(whole, tmp_path / "w.pt")
    with pytest.raises(errors.UserError, match="does not fit local-dir:"):
        vits.load(config.Vit("clip", f"local-dir:{folder}", str(tmp_path / "w.pt")))


def test_a_grid_of_as_many_patches_is_told_from_a_square_one(
    state: State, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """10 x 10 positions on 5 x 20 patches, and 4 x 4 on 2 x 8: timm resamples them, open_clip would leave them as they are."""
    torch.save(state, tmp_path / "w.pt")
    vit = vits.load(config.Vit("timm", "test_vit", str(tmp_path / "w.pt"), img_size=(80, 320)))
    want = timm.layers.resample_abs_pos_embed(state["pos_embed"], [5, 20], [10, 10], 1)
    assert vit.grid == (5, 20) and want.shape == state["pos_embed"].shape
    torch.testing.assert_close(vit.module.state_dict()["pos_embed"], want)
    for given in ("hub", str(folder / "open_clip_model.safetensors")):
        cfg = config.Vit("clip", f"local-dir:{folder}", given, img_size=(16, 64))
        with pytest.raises(errors.UserError, match="16 positions may be a square grid, not 2 x 8"):
            vits.load(cfg)
    with pytest.raises(errors.UserError, match="--img-size .16, 64.: open_clip cannot tell a grid"):
        vits.open_clip._check_grid((2, 8), config.Vit(img_size=(16, 64)))


def test_masked_image_models_of_eva_keep_their_norm(tmp_path: pathlib.Path) -> None:
    want = random("timm", "eva02_tiny_patch14_224", vit_seed=5).module.state_dict()
    assert "norm.weight" in want or "fc_norm.weight" in want
    got = load(want | {"mask_token": torch.zeros(1)}, tmp_path / "w.pt", ckpt="eva02_tiny_patch14_224")
    assert equal(got, want)


def test_names_of_heads_are_no_names_of_a_tower() -> None:
    """What is ignored outside the tower must not be wanted inside of one."""
    wanted = random("timm", "test_vit").module.state_dict()
    assert not any(weights._is_harmless(k.partition(".")[0]) for k in wanted)
    for part in ("head", "heads", "head_dist", "mlp_head", "dino_head", "classifier", "fc"):
        assert weights._is_harmless(part)
    for part in ("blocks", "headless", "ahead", "adapter"):
        assert not weights._is_harmless(part)


# ---- round trips and position grids ----


def test_local_weights_round_trip_and_are_named_by_their_hash(tmp_path: pathlib.Path) -> None:
    source = random("timm", "vit_tiny_patch16_224", vit_seed=5)
    head = {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    safetensors.torch.save_file(source.module.state_dict() | head, tmp_path / "w.safetensors")
    torch.save({"state_dict": source.module.state_dict()}, tmp_path / "w.pt")
    imgs_BCHW = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for fpath in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        vit = vits.load(config.Vit("timm", "vit_tiny_patch16_224", str(fpath)))
        torch.testing.assert_close(vit(imgs_BCHW, (11,)), source(imgs_BCHW, (11,)), rtol=0, atol=0)
        assert vit.ckpt_id.startswith("vit_tiny_patch16_224@sha256:")


@pytest.mark.usefixtures("two_blocks")
def test_a_whole_clip_checkpoint_gives_its_image_tower(tmp_path: pathlib.Path) -> None:
    source = random("clip", "ViT-B-32/openai", vit_seed=5)
    state = {f"visual.{k}": v for k, v in source.module.state_dict().items()} | {
        "logit_scale": torch.zeros(())
    }
    safetensors.torch.save_file(state, tmp_path / "clip.safetensors")
    vit = vits.load(config.Vit("clip", "ViT-B-32/openai", str(tmp_path / "clip.safetensors")))
    assert torch.equal(vit.module.conv1.weight, source.module.conv1.weight)


def test_another_position_grid_is_resampled_as_timm_does(tmp_path: pathlib.Path) -> None:
    large = timm.create_model("vit_small_patch14_dinov2", num_classes=0)  # 37 x 37
    torch.nn.init.normal_(large.pos_embed)
    safetensors.torch.save_file(large.state_dict(), tmp_path / "w.safetensors")
    vit = vits.load(config.Vit("dinov2", "dinov2_vits14", str(tmp_path / "w.safetensors")))
    want = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224)
    resample = timm.models.vision_transformer.checkpoint_filter_fn
    timm.models.load_checkpoint(want, str(tmp_path / "w.safetensors"), filter_fn=resample)
    torch.testing.assert_close(vit.module.pos_embed, want.pos_embed)


@pytest.mark.usefixtures("two_blocks")
def test_open_clips_own_position_grid_is_resampled_as_open_clip_does(tmp_path: pathlib.Path) -> None:
    source = random("clip", "ViT-B-32/openai", vit_seed=5)
    state = {f"visual.{k}": v for k, v in source.module.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "clip.safetensors")
    weights = str(tmp_path / "clip.safetensors")
    vit = vits.load(config.Vit("clip", "ViT-B-32/openai", weights, img_size=(96, 160)))
    own = source.module.positional_embedding
    grid_1DYX = own[1:].T.reshape(1, -1, 7, 7)
    want_1DYX = torch.nn.functional.interpolate(grid_1DYX, (3, 5), mode="bicubic", antialias=True)
    want_PD = torch.cat([own[:1], want_1DYX.flatten(2)[0].T])
    torch.testing.assert_close(vit.module.positional_embedding, want_PD)


@pytest.mark.usefixtures("two_blocks")
def test_a_timm_tower_of_open_clip_is_resampled_too(tmp_path: pathlib.Path) -> None:
    source = random("siglip", "ViT-B-16-SigLIP/webli")
    state = {f"visual.{k}": v for k, v in source.module.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "siglip.safetensors")
    weights = str(tmp_path / "siglip.safetensors")
    vit = vits.load(config.Vit("siglip", "ViT-B-16-SigLIP/webli", weights, img_size=(32, 48)))
    want = timm.layers.resample_abs_pos_embed(source.module.trunk.pos_embed, [2, 3], None, 0)
    torch.testing.assert_close(vit.module.trunk.pos_embed, want)


def test_weights_that_cannot_be_had(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.UserError, match=r"gone\.pt: cannot be read"):
        vits.load(config.Vit("timm", "vit_tiny_patch16_224", str(tmp_path / "gone.pt")))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(errors.UserError, match=r"bad\.safetensors: cannot be read"):
        vits.load(config.Vit("timm", "vit_tiny_patch16_224", str(tmp_path / "bad.safetensors")))
    safetensors.torch.save_file({"blocks.0.norm1.weight": torch.zeros(192)}, tmp_path / "few.safetensors")
    with pytest.raises(errors.UserError, match=r"does not fit vit_tiny_patch16_224: 1.. tensors are missing"):
        vits.load(config.Vit("timm", "vit_tiny_patch16_224", str(tmp_path / "few.safetensors")))
