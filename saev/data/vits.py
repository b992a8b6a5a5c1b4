"""Pretrained vision transformers from open_clip and timm, behind one interface.

Recorded layer i is the residual stream after block i, taken from the library's own `forward_intermediates`, which
stops after the last block that is asked for. B images, L layers, T tokens, D d_vit.
"""

import collections.abc
import contextlib
import dataclasses
import hashlib
import logging
import math
import pathlib
import re
import typing as tp
import warnings

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev import errors
from saev.data import config, images

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
DINOV2_IMG_SIZE = 224
"""The field's convention for DINOv2 features: 256 patches, although it was trained at up to 518 pixels."""

Intermediates = collections.abc.Callable[[Tensor, list[int]], list[tuple[Tensor, Tensor | None]]]
"""(images, sorted layers) -> per layer (patch tokens, prefix tokens)."""


@dataclasses.dataclass(frozen=True)
class _Tower:
    """What the families have in common."""

    module: torch.nn.Module
    intermediates: Intermediates
    n_blocks: int
    has_cls: bool
    transform: images.Transform


class Vit(torch.nn.Module):
    """An image tower in evaluation mode.

    Attributes:
        ckpt_id: name that tells these weights from others (it goes into the shards' metadata).
        d_vit, n_blocks, n_patches, cls_token: its shape.
        transform: from a photo to its input.
    """

    def __init__(self, tower: _Tower, ckpt_id: str):
        super().__init__()
        self.ckpt_id = ckpt_id
        self.module = tower.module.eval().requires_grad_(False)
        self.intermediates = tower.intermediates
        self.n_blocks = tower.n_blocks
        self.cls_token = tower.has_cls
        self.transform = tower.transform
        with torch.inference_mode():
            acts_BLTD = self(torch.zeros(1, 3, *self.transform.size), (0,))
        self.d_vit = acts_BLTD.shape[3]
        self.n_patches = acts_BLTD.shape[2] - int(self.cls_token)

    @jaxtyped(typechecker=beartype.beartype)
    def forward(
        self, imgs_BCHW: Float[Tensor, "B 3 H W"], layers: tuple[int, ...]
    ) -> Float[Tensor, "B L T D"]:
        """Activations of the layers, in the order asked for; [CLS] first where there is one, registers dropped."""
        ordered = sorted(layers)
        acts = dict(zip(ordered, self.intermediates(imgs_BCHW, ordered), strict=True))
        return torch.stack([self._tokens(*acts[layer]) for layer in layers], dim=1)

    def _tokens(self, patches_BPD: Tensor, prefix_BXD: Tensor | None) -> Tensor:
        """[CLS] is the first prefix token; the others are registers or a distillation token."""
        return torch.cat([prefix_BXD[:, :1], patches_BPD], dim=1) if self.cls_token else patches_BPD


@beartype.beartype
def resolve_layers(layers: tuple[int, ...], n_blocks: int) -> tuple[int, ...]:
    """Negative layers count from the end.

    Raises:
        UserError: the model has no such block, or a layer is named twice.
    """
    out = tuple(layer + n_blocks if layer < 0 else layer for layer in layers)
    if bad := [layer for layer, i in zip(layers, out, strict=True) if not 0 <= i < n_blocks]:
        raise errors.UserError(
            f"--vit-layers {bad[0]}: the model has {n_blocks} blocks. Pass layers from 0 to {n_blocks - 1} (or -{n_blocks} to -1)."
        )
    if len(set(out)) < len(out):
        raise errors.UserError(f"--vit-layers {layers}: a layer is named twice.")
    return out


@beartype.beartype
def load(cfg: config.Vit) -> Vit:
    """Builds the model on the CPU, in float32.

    Raises:
        UserError: unknown model, weights that cannot be had or do not fit, or --d-vit / --n-patches-per-img that
            the model does not have.
    """
    build = {"clip": _open_clip, "siglip": _open_clip, "dinov2": _dinov2, "timm": _timm}[
        cfg.vit_family
    ]
    with _quiet():
        vit = Vit(build(cfg), _ckpt_id(cfg))
    _check(cfg, "--d-vit", cfg.d_vit, vit.d_vit, "wide")
    _check(cfg, "--n-patches-per-img", cfg.n_patches_per_img, vit.n_patches, "patches per image")
    return vit


def _check(cfg: config.Vit, flag: str, given: int | None, actual: int, what: str) -> None:
    if given not in (None, actual):
        raise errors.UserError(
            f"{flag} {given}: {cfg.vit_ckpt} gives {actual} {what}. Pass {flag} {actual} or leave it out."
        )


@contextlib.contextmanager
def _quiet() -> collections.abc.Iterator[None]:
    """open_clip warns about random weights that were asked for; both libraries about their own deprecations."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)


def _ckpt_id(cfg: config.Vit) -> str:
    size = f"@{cfg.img_size}px" if cfg.img_size else ""
    if cfg.vit_weights == "hub":
        return cfg.vit_ckpt + size
    if cfg.vit_weights == "random":
        return f"{cfg.vit_ckpt}@random:{cfg.vit_seed}{size}"
    with pathlib.Path(cfg.vit_weights).open("rb") as fd:
        return f"{cfg.vit_ckpt}@sha256:{hashlib.file_digest(fd, 'sha256').hexdigest()[:16]}{size}"


# ---- open_clip ----


def _open_clip(cfg: config.Vit) -> _Tower:
    import open_clip

    name, tag = _split_ckpt(cfg)
    kwargs: dict[str, tp.Any] = {"pretrained_text": False, "force_image_size": cfg.img_size}
    if tag is not None:
        known = open_clip.get_pretrained_cfg(name, tag)
        if name not in open_clip.list_models() or not known:
            raise errors.UserError(
                f"--vit-ckpt {cfg.vit_ckpt}: open_clip knows no such model (tags of {name}: "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}). Pass ARCH/PRETRAINED or hf-hub:ORG/NAME."
            )
        shown = {k: known[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in known}
        kwargs |= {"force_quick_gelu": bool(known.get("quick_gelu")), "force_preprocess_cfg": shown}
    hub = cfg.vit_weights == "hub"
    with _seeded(cfg), _hub_errors(cfg):
        model = open_clip.create_model(
            name,
            pretrained=tag if hub else None,
            load_weights=hub,
            require_pretrained=hub,
            **kwargs,
        )
    visual = model.visual
    blocks = _open_clip_blocks(visual, cfg)
    if not hub and cfg.vit_weights != "random":
        _load_file(visual, cfg)

    def intermediates(imgs_BCHW: Tensor, layers: list[int]) -> list[tuple[Tensor, Tensor | None]]:
        out = visual.forward_intermediates(
            imgs_BCHW,
            layers,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        patches = out["image_intermediates"]
        return list(
            zip(patches, out.get("image_intermediates_prefix", [None] * len(patches)), strict=True)
        )

    has_cls = not hasattr(visual, "trunk") or _has_cls(visual.trunk)
    return _Tower(
        visual,
        intermediates,
        len(blocks),
        has_cls,
        _open_clip_transform(visual.preprocess_cfg, cfg),
    )


def _split_ckpt(cfg: config.Vit) -> tuple[str, str | None]:
    """ARCH/PRETRAINED -> (ARCH, PRETRAINED); hf-hub:ORG/NAME -> (itself, None)."""
    if cfg.vit_ckpt.startswith("hf-hub:"):
        return cfg.vit_ckpt, None
    name, slash, tag = cfg.vit_ckpt.partition("/")
    if not slash:
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: family {cfg.vit_family} wants ARCH/PRETRAINED (such as ViT-L-14/openai) or hf-hub:ORG/NAME."
        )
    return name, tag


def _open_clip_blocks(visual: torch.nn.Module, cfg: config.Vit) -> collections.abc.Sized:
    if hasattr(visual, "trunk"):
        return _timm_blocks(visual.trunk, cfg)
    if hasattr(visual, "transformer"):
        return visual.transformer.resblocks
    raise _not_a_vit(cfg)


def _open_clip_transform(prep: dict[str, tp.Any], cfg: config.Vit) -> images.Transform:
    size = prep["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if prep["resize_mode"] not in ("shortest", "squash") or height != width:
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: resize mode {prep['resize_mode']!r} to {size} is not supported. Pass another model."
        )
    return images.Transform(
        size=(height, width),
        resize=height,
        squash=prep["resize_mode"] == "squash",
        interpolation=prep["interpolation"],
        mean=tuple(prep["mean"]),
        std=tuple(prep["std"]),
    )


# ---- timm ----


def _dinov2(cfg: config.Vit) -> _Tower:
    match = re.fullmatch(r"dinov2_vit([sblg])14(_reg)?", cfg.vit_ckpt)
    if match is None:
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: family dinov2 has dinov2_vits14, dinov2_vitb14, dinov2_vitl14, dinov2_vitg14, each also with _reg."
        )
    name = f"vit_{DINOV2_SIZES[match[1]]}_patch14_{'reg4_' if match[2] else ''}dinov2"
    size = cfg.img_size or DINOV2_IMG_SIZE
    # The official evaluation transform: 256 -> 224, scaled with the size.
    resize = round(size * 256 / 224)
    transform = images.Transform(
        (size, size), resize, False, "bicubic", IMAGENET_MEAN, IMAGENET_STD
    )
    return _timm_tower(name, size, cfg, transform)


def _timm(cfg: config.Vit) -> _Tower:
    return _timm_tower(cfg.vit_ckpt, cfg.img_size, cfg, None)


def _timm_tower(
    name: str, size: int | None, cfg: config.Vit, transform: images.Transform | None
) -> _Tower:
    import timm

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name}*")[:3]) or "see timm.list_models()"
        raise errors.UserError(f"--vit-ckpt {cfg.vit_ckpt}: timm knows no such model ({close}).")
    hub, kwargs = cfg.vit_weights == "hub", {"img_size": size} if size else {}
    with _seeded(cfg), _hub_errors(cfg):
        model = timm.create_model(name, pretrained=hub, num_classes=0, **kwargs)
    blocks = _timm_blocks(model, cfg)
    if not hub and cfg.vit_weights != "random":
        _load_file(model, cfg)

    def intermediates(imgs_BCHW: Tensor, layers: list[int]) -> list[tuple[Tensor, Tensor | None]]:
        out = model.forward_intermediates(
            imgs_BCHW,
            layers,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
        )
        return [o if isinstance(o, tuple) else (o, None) for o in out]

    return _Tower(
        model,
        intermediates,
        len(blocks),
        _has_cls(model),
        transform or _timm_transform(model, size, cfg),
    )


def _timm_blocks(model: torch.nn.Module, cfg: config.Vit) -> collections.abc.Sized:
    if not (
        hasattr(model, "blocks")
        and hasattr(model, "patch_embed")
        and hasattr(model, "num_prefix_tokens")
    ):
        raise _not_a_vit(cfg)
    return model.blocks


def _has_cls(model: torch.nn.Module) -> bool:
    return getattr(model, "cls_token", None) is not None


def _not_a_vit(cfg: config.Vit) -> errors.UserError:
    return errors.UserError(
        f"--vit-ckpt {cfg.vit_ckpt}: not a vision transformer with blocks and patches. Pass a ViT."
    )


def _timm_transform(model: torch.nn.Module, size: int | None, cfg: config.Vit) -> images.Transform:
    """timm's evaluation transform: resize to size / crop_pct, crop the centre."""
    import timm.data

    data = timm.data.resolve_data_config({}, model=model)
    height, width = (size, size) if size else data["input_size"][1:]
    squash = data["crop_mode"] == "squash" and data["crop_pct"] == 1
    if height != width or (data["crop_mode"] != "center" and not squash):
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: input {height} x {width} with crop mode {data['crop_mode']!r} is not supported. Pass another model."
        )
    resize = math.floor(height / data["crop_pct"])
    mean, std = tuple(data["mean"]), tuple(data["std"])
    return images.Transform((height, width), resize, squash, data["interpolation"], mean, std)


# ---- weights ----


@contextlib.contextmanager
def _seeded(cfg: config.Vit) -> collections.abc.Iterator[None]:
    """Random weights depend on --vit-seed alone, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.vit_seed)
        yield


@contextlib.contextmanager
def _hub_errors(cfg: config.Vit) -> collections.abc.Iterator[None]:
    """Whatever goes wrong in a download (many libraries, many exception types) becomes one line."""
    try:
        yield
    except Exception as err:
        first_line = (str(err).strip().splitlines() or [repr(err)])[0][:200]
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: cannot be built with weights from {cfg.vit_weights!r} ({first_line}). "
            "Check the name and the network, or pass a local file as --vit-weights."
        ) from err


def _load_file(module: torch.nn.Module, cfg: config.Vit) -> None:
    """Loads a local state dict strictly; head keys and a CLIP's text tower are dropped, another position grid is resampled as timm does."""
    state = _read_file(pathlib.Path(cfg.vit_weights))
    if any(k.startswith("visual.") for k in state):
        state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    wanted = module.state_dict()
    state = {
        k: v
        for k, v in state.items()
        if k in wanted or not k.startswith(("head.", "fc_norm.", "mask_token"))
    }
    position = state.get("pos_embed")
    if (
        position is not None
        and "pos_embed" in wanted
        and position.shape != wanted["pos_embed"].shape
    ):
        state["pos_embed"] = _resample(position, module)
    wrong = sorted(state.keys() ^ wanted.keys())
    wrong += sorted(k for k in state.keys() & wanted.keys() if state[k].shape != wanted[k].shape)
    if wrong:
        raise errors.UserError(
            f"--vit-weights {cfg.vit_weights}: does not fit {cfg.vit_ckpt}: {len(wrong)} tensors are missing, unknown or of another shape "
            f"(first: {', '.join(wrong[:3])}). Pass the state dict of that model."
        )
    module.load_state_dict(state)


def _read_file(fpath: pathlib.Path) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        if fpath.suffix == ".safetensors":
            return safetensors.torch.load_file(fpath)
        state = torch.load(fpath, map_location="cpu", weights_only=True)
        return state.get("state_dict", state)
    except Exception as err:  # each reader has its own exception types
        first_line = (str(err).strip().splitlines() or [repr(err)])[0][:200]
        raise errors.UserError(
            f"--vit-weights {fpath}: cannot be read ({first_line}). Pass 'hub', 'random', or a .safetensors or .pt state dict."
        ) from err


def _resample(position: Tensor, module: torch.nn.Module) -> Tensor:
    from timm.layers import resample_abs_pos_embed

    n_prefix = 0 if getattr(module, "no_embed_class", False) else module.num_prefix_tokens
    return resample_abs_pos_embed(
        position, list(module.patch_embed.grid_size), num_prefix_tokens=n_prefix
    )
