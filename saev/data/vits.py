"""Pretrained vision transformers from open_clip and timm, behind one interface.

Recorded layer i is the residual stream after block i, taken from the library's own `forward_intermediates`, which
stops after the last block that is asked for. B images, L layers, T tokens, P patches, X prefix tokens, D d_vit.
"""

import collections.abc
import contextlib
import dataclasses
import hashlib
import inspect
import logging
import math
import pathlib
import types
import typing as tp
import warnings

import beartype
import torch
from jaxtyping import Float, Float32, jaxtyped
from torch import Tensor

from saev import errors
from saev.data import config, images

Intermediates = collections.abc.Callable[[Tensor, list[int]], list[tuple[Tensor, Tensor | None]]]
"""(images, sorted layers) -> per layer (patch tokens, prefix tokens)."""


class _Published(tp.NamedTuple):
    """Models that timm carries under other names than their authors'."""

    timm_names: dict[str, str]
    """The authors' name -> timm's."""
    side: int | None = None
    """Input side in pixels where none is asked for; None: timm's."""
    crop_pct: float | None = None
    """Input side / shorter side of the resized photo; None: timm's."""


PUBLISHED = {
    # The field's convention for DINOv2 features: 256 patches, although it was trained at up to 518 pixels.
    "dinov2": _Published(
        {
            "dinov2_vits14": "vit_small_patch14_dinov2",
            "dinov2_vitb14": "vit_base_patch14_dinov2",
            "dinov2_vitl14": "vit_large_patch14_dinov2",
            "dinov2_vitg14": "vit_giant_patch14_dinov2",
            "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2",
            "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2",
            "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2",
            "dinov2_vitg14_reg": "vit_giant_patch14_reg4_dinov2",
        },
        side=224,
        crop_pct=224 / 256,
    ),
    # The authors' evaluation crops 256 -> 224 pixels and asks that this ratio be kept at other sizes; timm crops
    # nothing. The side is timm's and that of the pretraining crops: 256 patches, as many as DINOv2 has at 224.
    "dinov3": _Published(
        {
            "dinov3_vits16": "vit_small_patch16_dinov3_qkvb.lvd1689m",
            "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
            "dinov3_vitb16": "vit_base_patch16_dinov3_qkvb.lvd1689m",
            "dinov3_vitl16": "vit_large_patch16_dinov3_qkvb.lvd1689m",
            "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3_qkvb.lvd1689m",
            "dinov3_vit7b16": "vit_7b_patch16_dinov3.lvd1689m",  # the one without qkv biases
            "dinov3_vitl16_sat493m": "vit_large_patch16_dinov3_qkvb.sat493m",
            "dinov3_vit7b16_sat493m": "vit_7b_patch16_dinov3.sat493m",
        },
        side=256,
        crop_pct=224 / 256,
    ),
    "mae": _Published(
        {
            "mae_vit_base_patch16": "vit_base_patch16_224.mae",
            "mae_vit_large_patch16": "vit_large_patch16_224.mae",
            "mae_vit_huge_patch14": "vit_huge_patch14_224.mae",
        }
    ),
}
"""family -> its models, of which none is reached by a branch of code."""


@dataclasses.dataclass(frozen=True)
class _Tower:
    """What the families have in common."""

    module: torch.nn.Module
    intermediates: Intermediates
    blocks: torch.nn.ModuleList | torch.nn.Sequential
    n_prefix: int
    """Tokens before the patches: [CLS], registers, distillation."""
    has_cls: bool
    grid: tuple[int, int]
    """(rows, columns) of the patches."""
    transform: images.Transform


class Vit(torch.nn.Module):
    """An image tower in evaluation mode.

    Attributes:
        ckpt_id: name that tells these activations' model from others (it goes into the shards' metadata).
        d_vit, n_blocks, n_patches, grid (rows, columns), cls_token: its shape.
        transform: from a photo to its input.

    Raises:
        UserError: block 0 does not hold one token per patch of the grid, or the library reports others than it holds.
    """

    def __init__(self, tower: _Tower, cfg: config.Vit):
        super().__init__()
        self.ckpt_id = _ckpt_id(cfg)
        self.module = tower.module.eval().requires_grad_(False)
        self.intermediates = tower.intermediates
        self.n_blocks = len(tower.blocks)
        self.cls_token = tower.has_cls
        self.grid = tower.grid
        self.n_patches = math.prod(tower.grid)
        self.transform = tower.transform
        self.autocast = cfg.autocast != "off"
        self.d_vit = self._probe(tower, cfg)

    @torch.inference_mode()
    def _probe(self, tower: _Tower, cfg: config.Vit) -> int:
        """Width of block 0's output, having checked that we record just that: models that only look like a ViT end here."""
        seen: list[Tensor] = []
        hook = tower.blocks[0].register_forward_hook(lambda _module, _args, out: seen.append(out))
        height, width = self.transform.size
        ramp_BCHW = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
        (recorded,) = self.intermediates(ramp_BCHW, [0])
        hook.remove()
        if seen[0].shape[:-1] != (1, tower.n_prefix + self.n_patches):
            raise _not_a_vit(cfg)
        cls_BXD = seen[0][:, : int(self.cls_token)]
        want_BTD = torch.cat([cls_BXD, seen[0][:, tower.n_prefix :]], dim=1)
        if not torch.equal(self._tokens(*recorded), want_BTD):
            raise _not_a_vit(cfg)
        return want_BTD.shape[2]

    @jaxtyped(typechecker=beartype.beartype)
    def forward(
        self, imgs_BCHW: Float[Tensor, "B 3 H W"], layers: tuple[int, ...]
    ) -> Float32[Tensor, "B L T D"]:
        """Activations of the layers, in the order asked for; [CLS] first where there is one, registers dropped."""
        ordered = sorted(layers)
        with torch.autocast(imgs_BCHW.device.type, torch.bfloat16, enabled=self.autocast):
            acts = dict(zip(ordered, self.intermediates(imgs_BCHW, ordered), strict=True))
        return torch.stack([self._tokens(*acts[layer]) for layer in layers], dim=1).float()

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
        UserError: unknown model, one that is no ViT, weights that cannot be had or do not fit, or --img-size,
            --d-vit, --n-patches-per-img that the model cannot have.
    """
    with _quiet():
        vit = Vit(_open_clip(cfg) if cfg.vit_family in ("clip", "siglip") else _timm(cfg), cfg)
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


def _size(cfg: config.Vit) -> tuple[int, int] | None:
    """(height, width) that the user asked for."""
    return (cfg.img_size, cfg.img_size) if isinstance(cfg.img_size, int) else cfg.img_size


def _ckpt_id(cfg: config.Vit) -> str:
    suffix = ""
    if size := _size(cfg):
        suffix += f"@{size[0]}px" if size[0] == size[1] else f"@{size[0]}x{size[1]}px"
    if cfg.autocast == "bfloat16":
        suffix += "@bf16"
    if cfg.vit_weights == "hub":
        return cfg.vit_ckpt + suffix
    if cfg.vit_weights == "random":
        return f"{cfg.vit_ckpt}@random:{cfg.vit_seed}{suffix}"
    with pathlib.Path(cfg.vit_weights).open("rb") as fd:
        return f"{cfg.vit_ckpt}@sha256:{hashlib.file_digest(fd, 'sha256').hexdigest()[:16]}{suffix}"


# ---- open_clip ----


def _open_clip(cfg: config.Vit) -> _Tower:
    import open_clip

    name, tag = _split_ckpt(cfg)
    kwargs: dict[str, tp.Any] = {"pretrained_text": False, "force_image_size": _size(cfg)}
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
    shape = _open_clip_shape(visual, cfg)
    if not hub and cfg.vit_weights != "random":
        _load_file(visual, cfg)

    def intermediates(imgs_BCHW: Tensor, layers: list[int]) -> list[tuple[Tensor, Tensor | None]]:
        out = visual.forward_intermediates(
            imgs_BCHW,
            layers,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=shape["n_prefix"] > 0,
        )
        patches = out["image_intermediates"]
        return list(
            zip(patches, out.get("image_intermediates_prefix", [None] * len(patches)), strict=True)
        )

    return _Tower(visual, intermediates, **shape)


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


def _open_clip_shape(visual: torch.nn.Module, cfg: config.Vit) -> dict[str, tp.Any]:
    """The fields of _Tower that describe the model."""
    if not hasattr(visual, "trunk") and not hasattr(visual, "transformer"):
        raise _not_a_vit(cfg)
    transform = _open_clip_transform(visual.preprocess_cfg, cfg)
    if hasattr(visual, "trunk"):
        shape = _timm_shape(visual.trunk, transform, cfg)
        _check_size(visual.trunk.patch_embed.feat_ratio(as_scalar=False), cfg)
        return shape
    _check_size(visual.patch_size, cfg)
    return {
        "blocks": visual.transformer.resblocks,
        "n_prefix": 1,
        "has_cls": True,
        "grid": visual.grid_size,
        "transform": transform,
    }


def _open_clip_transform(prep: dict[str, tp.Any], cfg: config.Vit) -> images.Transform:
    """open_clip's evaluation transform; its cover resize for non-square inputs is bicubic, whatever the model says."""
    size = prep["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if prep["resize_mode"] not in ("shortest", "squash"):
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: resize mode {prep['resize_mode']!r} is not supported. Pass another model."
        )
    squash = prep["resize_mode"] == "squash"
    return images.Transform(
        size=(height, width),
        resize=height if height == width else (height, width),
        squash=squash,
        interpolation=prep["interpolation"] if squash or height == width else "bicubic",
        mean=tuple(map(float, prep["mean"])),
        std=tuple(map(float, prep["std"])),
    )


# ---- timm ----


def _timm(cfg: config.Vit) -> _Tower:
    import timm

    name, size, crop_pct = _timm_name(cfg)
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name}*")[:3]) or "see timm.list_models()"
        raise errors.UserError(f"--vit-ckpt {cfg.vit_ckpt}: timm knows no such model ({close}).")
    if cfg.img_size:
        _check_timm_size(name, cfg)
    hub, kwargs = cfg.vit_weights == "hub", {"img_size": size} if size else {}
    with _seeded(cfg), _hub_errors(cfg):
        model = timm.create_model(name, pretrained=hub, num_classes=0, **kwargs)
    if cfg.vit_family == "dinov3":
        # The authors' weights hold the rotary periods in bfloat16, which timm computes anew in float32.
        model.rope.periods.copy_(model.rope.periods.bfloat16())
    shape = _timm_shape(model, _timm_transform(model, size, crop_pct, cfg), cfg)
    if not hub and cfg.vit_weights != "random":
        _load_file(model, cfg)

    def intermediates(imgs_BCHW: Tensor, layers: list[int]) -> list[tuple[Tensor, Tensor | None]]:
        out = model.forward_intermediates(
            imgs_BCHW,
            layers,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            return_prefix_tokens=shape["n_prefix"] > 0,
        )
        return [o if isinstance(o, tuple) else (o, None) for o in out]

    return _Tower(model, intermediates, **shape)


def _timm_name(cfg: config.Vit) -> tuple[str, tuple[int, int] | None, float | None]:
    """timm's name of the model, its input size and crop_pct; None stands for timm's own."""
    if cfg.vit_family == "timm":
        return cfg.vit_ckpt, _size(cfg), None
    family = PUBLISHED[cfg.vit_family]
    if cfg.vit_ckpt not in family.timm_names:
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: family {cfg.vit_family} has {', '.join(family.timm_names)}."
        )
    size = _size(cfg) or (family.side and (family.side, family.side))
    return family.timm_names[cfg.vit_ckpt], size, family.crop_pct


def _timm_shape(
    model: torch.nn.Module, transform: images.Transform, cfg: config.Vit
) -> dict[str, tp.Any]:
    """The fields of _Tower that describe the model."""
    embed = getattr(model, "patch_embed", None)
    if not (
        hasattr(model, "blocks")
        and hasattr(model, "num_prefix_tokens")
        and hasattr(embed, "dynamic_feat_size")
        and "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    ):
        raise _not_a_vit(cfg)
    return {
        "blocks": model.blocks,
        "n_prefix": model.num_prefix_tokens,
        "has_cls": getattr(model, "cls_token", None) is not None,
        "grid": tuple(embed.dynamic_feat_size(transform.size)),
        "transform": transform,
    }


def _check_timm_size(name: str, cfg: config.Vit) -> None:
    """Looks at the model at its own size and without weights, before any are fetched."""
    import timm

    with _seeded(cfg), _hub_errors(cfg), torch.device("meta"):
        embed = getattr(timm.create_model(name), "patch_embed", None)
    if hasattr(embed, "feat_ratio"):
        _check_size(embed.feat_ratio(as_scalar=False), cfg)


def _check_size(patch: tuple[int, int], cfg: config.Vit) -> None:
    """Only of a size that was asked for: some models' own leave a margin (SigLIP So400m: 384 pixels, patches of 14)."""
    size = _size(cfg)
    if size and (size[0] % patch[0] or size[1] % patch[1]):
        near = " ".join(str(max(1, round(n / p)) * p) for n, p in zip(size, patch, strict=True))
        raise errors.UserError(
            f"--img-size {size[0]} {size[1]}: not a multiple of the {patch[0]} x {patch[1]} pixel patches of {cfg.vit_ckpt}. Pass --img-size {near}."
        )


def _not_a_vit(cfg: config.Vit) -> errors.UserError:
    return errors.UserError(
        f"--vit-ckpt {cfg.vit_ckpt}: not a vision transformer whose blocks all hold one token per patch. Pass a plain ViT."
    )


def _timm_transform(
    model: torch.nn.Module,
    size: tuple[int, int] | None,
    crop_pct: float | None,
    cfg: config.Vit,
) -> images.Transform:
    """timm's evaluation transform: resize (or squash) to size / crop_pct, crop the centre."""
    import timm.data

    data = timm.data.resolve_data_config({"crop_pct": crop_pct}, model=model)
    if data["crop_mode"] not in ("center", "squash"):
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: crop mode {data['crop_mode']!r} is not supported. Pass another model."
        )
    height, width = size or data["input_size"][1:]
    resize = (math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"]))
    return images.Transform(
        size=(height, width),
        resize=resize[0] if resize[0] == resize[1] else resize,
        squash=data["crop_mode"] == "squash",
        interpolation=data["interpolation"],
        mean=tuple(map(float, data["mean"])),
        std=tuple(map(float, data["std"])),
    )


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
    """Loads a local state dict strictly; head keys and a CLIP's text tower are dropped, another position grid is resampled as the library does."""
    state = _read_file(pathlib.Path(cfg.vit_weights))
    if any(k.startswith("visual.") for k in state):
        state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    if "storage_tokens" in state:
        state = _rename_dinov3(state, module)
    wanted = module.state_dict()
    state = {
        k: v
        for k, v in state.items()
        if k in wanted or not k.startswith(("head.", "fc_norm.", "mask_token"))
    }
    for key in ("pos_embed", "trunk.pos_embed", "positional_embedding"):
        if key in state and key in wanted and state[key].shape != wanted[key].shape:
            state[key] = _resample(state[key], module)
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
        return state.get("state_dict", state.get("model", state))
    except Exception as err:  # each reader has its own exception types
        first_line = (str(err).strip().splitlines() or [repr(err)])[0][:200]
        raise errors.UserError(
            f"--vit-weights {fpath}: cannot be read ({first_line}). Pass 'hub', 'random', or a .safetensors or .pt state dict."
        ) from err


def _rename_dinov3(state: dict[str, Tensor], module: torch.nn.Module) -> dict[str, Tensor]:
    """The names that timm gives to the tensors of the authors' own file."""
    import timm.models.eva

    return timm.models.eva.checkpoint_filter_fn(state, module)


def _resample(position: Tensor, module: torch.nn.Module) -> Tensor:
    """Position embeddings of a square grid on the module's grid; of any other grid as they are, which will not fit."""
    if not hasattr(module, "trunk") and not hasattr(module, "patch_embed"):
        return _resample_open_clip(position, module)
    from timm.layers import resample_abs_pos_embed

    model = getattr(module, "trunk", module)
    n_prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    n_patches = position.shape[1] - n_prefix
    if math.isqrt(n_patches) ** 2 != n_patches:
        return position
    grid = list(model.patch_embed.grid_size)
    return resample_abs_pos_embed(position, grid, num_prefix_tokens=n_prefix)


def _resample_open_clip(position: Tensor, visual: torch.nn.Module) -> Tensor:
    """The same for open_clip's own ViT, whose resampling works on a whole CLIP."""
    import open_clip.model

    state = {"visual.positional_embedding": position}
    open_clip.model.resize_pos_embed(state, types.SimpleNamespace(visual=visual))
    return state["visual.positional_embedding"]
