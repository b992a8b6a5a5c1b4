"""Loads a weight file into a model: converts names, prefixes and position grids to its library's."""

import contextlib
import hashlib
import io
import logging
import math
import pathlib
import re
import sys
import types
import typing as tp

import torch
from torch import Tensor

from saev import errors
from saev.data import config
from saev.data.vits import base, files

logger = logging.getLogger("saev")

WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Name parts that torch.compile, FSDP and activation checkpointing insert anywhere."""
TRANSFORMERS = re.compile(r"(^|\.)(embeddings\.|vision_model\.|encoder\.layers?\.\d|layer\.\d+\.)")
"""Names of the transformers library."""
HARMLESS = {
    *("fc", "fc_norm", "classifier", "dino_loss", "ibot_patch_loss", "koleo_loss", "projector"),
    *("projectors", "predictor", "prototypes", "mask_token", "decoder_embed", "decoder_pos_embed"),
    *("decoder_blocks", "decoder_norm", "decoder_pred", "pre_logits", "n_averaged", "criterion"),
    *("loss", "loss_fn"),
}
"""First name parts of tensors that do not affect the image tower's activations. Heads have a pattern."""
TEXT_TOWER = {
    *("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection"),
    *("text", "text_decoder", "logit_scale", "logit_bias", "attn_mask", "input_resolution"),
    *("context_length", "vocab_size"),
}
"""The same, in CLIP models."""
AUTHORS_DINOV2 = {"register_tokens", "blocks.0.mlp.w12.weight"}
"""Names in the authors' DINOv2 files that timm renames."""
BETTER_TWIN = {"teacher": "student", "ema": "model", "model_ema": "model"}
"""If a state dict holds two models, the averaged one (key) is used instead of the other (value)."""


def apply(module: torch.nn.Module, cfg: config.Vit) -> str:
    """Loads the file given as --vit-weights, if any, and returns the model's name for the shards' metadata.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    name, config_bytes = cfg.vit_ckpt, b""
    if name.startswith("local-dir:"):
        folder = pathlib.Path(name.removeprefix("local-dir:"))
        name = f"local-dir:{folder.resolve().name}"
        config_bytes = (folder / "open_clip_config.json").read_bytes()
    if cfg.vit_weights == "hub":
        return name
    if cfg.vit_weights == "random":
        return f"{name}@random:{cfg.vit_seed}"
    fpath = pathlib.Path(cfg.vit_weights)
    _load(module, files.read(fpath), fpath, cfg)
    with fpath.open("rb") as fd:
        digest = hashlib.file_digest(fd, "sha256")
    digest.update(config_bytes)
    return f"{name}@sha256:{digest.hexdigest()[:16]}"


def _load(module: torch.nn.Module, state: dict[str, Tensor], fpath: pathlib.Path, cfg: config.Vit) -> None:
    wanted = module.state_dict()
    misfit = f"{fpath}: does not fit {cfg.vit_ckpt}"
    state, outside = _unwrapped(state, wanted, misfit)
    try:
        with base.quiet(), contextlib.redirect_stdout(io.StringIO()):
            state = _converted(state, module)
    except Exception as err:  # the libraries' conversions raise any type
        raise errors.UserError(f"{misfit} ({errors.first_line(err)[:200]}).") from err
    state = {k: v for k, v in state.items() if k in wanted or not _is_harmless(k.partition(".")[0])}
    unknown = sorted([*(state.keys() - wanted.keys()), *outside])
    problems = _named("missing", sorted(wanted.keys() - state.keys()))
    problems += _named("unknown", unknown)
    problems += _named(
        "of another shape or type",
        sorted(k for k in state.keys() & wanted.keys() if not _alike(state[k], wanted[k])),
    )
    if problems:
        hint = "Pass the state dict of that model."
        if any(map(TRANSFORMERS.search, unknown)):
            hint = (
                "These are names of the transformers library: "
                "pass the file of the model's authors, of open_clip or of timm instead."
            )
        raise errors.UserError(f"{misfit}: {'; '.join(problems)}. {hint}")
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise errors.UserError(f"{fpath}: {key} holds NaN or infinite weights. Download the file again.")
    module.load_state_dict(state)


def _named(what: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    tensors = "1 tensor is" if len(keys) == 1 else f"{len(keys)} tensors are"
    return [f"{tensors} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"]


def _alike(value: Tensor, wanted: Tensor) -> bool:
    """Whether copying `value` to `wanted` keeps its meaning. Half precision is exact in float32."""
    same_kind = value.is_floating_point() == wanted.is_floating_point() and not value.is_complex()
    has_data = value.layout == torch.strided and not value.is_meta
    return value.shape == wanted.shape and same_kind and has_data


# ---- prefixes ----


def _unwrapped(
    state: dict[str, Tensor], wanted: dict[str, Tensor], misfit: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the image tower's tensors without their common prefix, and names of other, unknown tensors."""
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    anchors = ("trunk.patch_embed.proj.weight", "patch_embed.proj.weight", "conv1.weight")
    anchor = next((a for a in anchors if a in wanted), "")
    prefix = _prefix(state, anchor, misfit) if anchor else ""
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    others = TEXT_TOWER if "visual." in prefix else set()
    others = others | {BETTER_TWIN[part] for part in prefix.split(".") if part in BETTER_TWIN}
    outside = [k for k in state if not k.startswith(prefix)]
    parts = {k: _first_own_part(k, prefix) for k in outside}
    return inside, [k for k, part in parts.items() if not _is_harmless(part) and part not in others]


def _is_harmless(part: str) -> bool:
    return part in HARMLESS or re.fullmatch(r"heads?|head_.*|.*_heads?", part) is not None


def _prefix(state: dict[str, Tensor], anchor: str, misfit: str) -> str:
    """Returns the prefix of the patch embedding's name."""
    found = [k.removesuffix(anchor) for k in state if k == anchor or k.endswith(f".{anchor}")]
    twins = {
        p.replace(better, worse)
        for p in found
        for better, worse in BETTER_TWIN.items()
        if better in p.split(".")
    }
    if dropped := twins.intersection(found):
        found = [p for p in found if p not in dropped]
        logger.info("using the weights under %s, not those under %s", found, sorted(dropped))
    if len(found) > 1:
        names = ", ".join(sorted(p or "no prefix" for p in found)[:3])
        raise errors.UserError(
            f"{misfit}: holds several models ({names}). Save the state dict of one of them."
        )
    return found[0] if found else ""


def _first_own_part(key: str, prefix: str) -> str:
    """Returns the first part of a name after what it shares with the prefix.

    For model.head.weight and the prefix model.backbone. it is head.
    """
    parts, others = key.split("."), prefix.split(".")
    while len(parts) > 1 and others and parts[0] == others[0]:
        parts, others = parts[1:], others[1:]
    return parts[0]


# ---- names and grids ----


def _converted(state: dict[str, Tensor], module: torch.nn.Module) -> dict[str, Tensor]:
    """Converts names and the position grid as the model's library does."""
    if not hasattr(module, "trunk"):
        return _timm(state, module) if hasattr(module, "patch_embed") else _open_clip(state, module)
    trunk = {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
    rest = {k: v for k, v in state.items() if not k.startswith("trunk.")}
    return rest | {f"trunk.{k}": v for k, v in _timm(trunk, module.get_submodule("trunk")).items()}


def _timm(state: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    # DINOv2's training code splits its blocks into chunks: blocks.CHUNK.BLOCK.
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}
    wanted = model.state_dict()
    if "blocks.0.ls1.gamma" in wanted:  # DeiT III
        state = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", k): v for k, v in state.items()}
    library = type(model).__module__
    if library.endswith(".vision_transformer") and AUTHORS_DINOV2 & state.keys():
        state.setdefault("mask_token", torch.zeros(()))  # timm recognises these files by it
    if library.endswith(".eva") and "norm.weight" in wanted and "storage_tokens" not in state:
        state.pop("mask_token", None)  # otherwise timm mistakes `norm` for `fc_norm`
    convert = getattr(sys.modules[library], "checkpoint_filter_fn", None)
    return convert(state, model) if convert else state


def _open_clip(state: dict[str, Tensor], visual: tp.Any) -> dict[str, Tensor]:
    """Resamples positions of open_clip's own ViT. Its own function needs a whole CLIP."""
    import open_clip.model

    rows, columns = visual.grid_size
    n_positions = len(state.get("positional_embedding", ())) - 1
    if rows != columns and rows * columns == n_positions == math.isqrt(n_positions) ** 2:
        raise ValueError(
            f"its {n_positions} positions may be a square grid, not {rows} x {columns}; "
            "pass another --img-size"
        )
    whole = {f"visual.{k}": v for k, v in state.items()}
    open_clip.model.resize_pos_embed(whole, types.SimpleNamespace(visual=visual))
    return {k.removeprefix("visual."): v for k, v in whole.items()}
