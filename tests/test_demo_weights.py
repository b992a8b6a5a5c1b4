"""The real DINOv2 ViT-S/14 weights out of a package. B images, D d_vit."""

import pathlib
import re
import types

import numpy as np
import onnx
import onnx.reference
import onnx.utils
import PIL.Image
import pytest
import sklearn.datasets
import torch

from saev import errors
from saev.data import config, vits
from saev.demo import weights


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
    onnx.utils.extract_model(
        str(source), str(tmp_path / "cut.onnx"), ["input_image"], [last.output[0]]
    )
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
        q, k, v = (
            constants[f"{prefix}{i}.attention.attention.{n}.bias"]
            for n in ("query", "key", "value")
        )
        np.testing.assert_array_equal(state[f"blocks.{i}.attn.qkv.bias"], np.concatenate([q, k, v]))
        np.testing.assert_array_equal(
            state[f"blocks.{i}.ls1.gamma"], constants[f"{prefix}{i}.layer_scale1.lambda1"]
        )
    kernel = constants["backbone.embeddings.patch_embeddings.projection.weight"]
    np.testing.assert_array_equal(state["patch_embed.proj.weight"], kernel)
    assert sum(v.size for v in state.values()) == 22_056_192 - (37 * 37 - 16 * 16) * 384


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
    with pytest.raises(errors.UserError, match="sha256 is .* not 198644e37de36674"):
        weights.unpack(tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


def test_a_missing_package_says_how_to_get_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(errors.UserError, match="uv sync --group demo"):
        weights.unpack(tmp_path / "w.safetensors")
