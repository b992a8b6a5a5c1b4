"""Image towers of open_clip: the families clip and siglip."""

import dataclasses
import math
import typing as tp

from torch import Tensor

from saev import early, errors, fields
from saev.data import config, images
from saev.data.vits import base, timm, weights


def build(cfg: config.Vit) -> base.Tower:
    with early.without_gc():
        import open_clip

    if cfg.resize == "flexible":
        raise base.not_flexible(cfg)
    cfg = _with_folder(cfg)
    name, tag = _split_ckpt(cfg)
    kwargs: dict[str, tp.Any] = {"pretrained_text": False, "force_image_size": base.asked_size(cfg)}
    if tag is not None:
        known = open_clip.get_pretrained_cfg(name, tag)
        if name not in open_clip.list_models() or not known:
            raise errors.UserError(
                f"--vit-ckpt {cfg.vit_ckpt}: open_clip knows no such model (tags of {name}: "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}). "
                "Pass ARCH/PRETRAINED, hf-hub:ORG/NAME or local-dir:FOLDER."
            )
        shown = {k: known[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in known}
        kwargs |= {"force_quick_gelu": bool(known.get("quick_gelu")), "force_preprocess_cfg": shown}
    hub = cfg.vit_weights == "hub"
    with base.building(cfg):
        model = open_clip.create_model(
            name, pretrained=tag if hub else None, load_weights=hub, require_pretrained=hub, **kwargs
        )
    visual: tp.Any = model.visual
    shape = _shape_of(visual, cfg)
    if hub:
        _check_grid(shape["grid"], cfg)
    ckpt_id = weights.apply(visual, cfg)

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
        return list(zip(patches, out.get("image_intermediates_prefix", [None] * len(patches)), strict=True))

    return base.Tower(visual, intermediates, ckpt_id=ckpt_id, **shape)


WEIGHT_FILES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)
"""Weight files in a model's folder, in open_clip's order of preference."""


def _with_folder(cfg: config.Vit) -> config.Vit:
    """For --vit-ckpt local-dir:FOLDER: resolves the folder and names its weight file as vit_weights."""
    if not cfg.vit_ckpt.startswith("local-dir:"):
        return cfg
    folder = fields.path(cfg.vit_ckpt.removeprefix("local-dir:"))
    if not (folder / "open_clip_config.json").is_file():
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: no open_clip_config.json in that folder. "
            "Pass a copy of an open_clip model's files from the hub."
        )
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if cfg.vit_weights == "hub" and not found:
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: no weights in that folder (looked for "
            f"{', '.join(WEIGHT_FILES)}). Name the file as --vit-weights."
        )
    file = str(found[0]) if cfg.vit_weights == "hub" else cfg.vit_weights
    return dataclasses.replace(cfg, vit_ckpt=f"local-dir:{folder}", vit_weights=file)


def _split_ckpt(cfg: config.Vit) -> tuple[str, str | None]:
    """Splits ARCH/PRETRAINED into its parts. hf-hub:ORG/NAME and local-dir:FOLDER give (itself, None)."""
    if cfg.vit_ckpt.startswith(("hf-hub:", "local-dir:")):
        return cfg.vit_ckpt, None
    name, slash, tag = cfg.vit_ckpt.partition("/")
    if not slash:
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: family {cfg.vit_family} wants ARCH/PRETRAINED "
            "(such as ViT-L-14/openai), hf-hub:ORG/NAME or local-dir:FOLDER."
        )
    return name, tag


def _shape_of(visual: tp.Any, cfg: config.Vit) -> dict[str, tp.Any]:
    """Returns the fields of `Tower` that describe the model."""
    if not hasattr(visual, "trunk") and not hasattr(visual, "transformer"):
        raise base.not_a_vit(cfg)
    transform = transform_of(visual.preprocess_cfg, cfg)
    if hasattr(visual, "trunk"):
        shape = timm.shape_of(visual.trunk, transform, cfg)
        base.check_size(visual.trunk.patch_embed.feat_ratio(as_scalar=False), cfg)
        return shape
    base.check_size(visual.patch_size, cfg)
    return {
        "blocks": visual.transformer.resblocks,
        "n_prefix": 1,
        "has_cls": True,
        "grid": visual.grid_size,
        "transform": transform,
    }


def _check_grid(grid: tuple[int, int], cfg: config.Vit) -> None:
    """Refuses grids that open_clip, which compares only numbers of positions, takes for square: 8 x 32."""
    rows, columns = grid
    if rows != columns and math.isqrt(rows * columns) ** 2 == rows * columns:
        raise errors.UserError(
            f"--img-size {cfg.img_size}: open_clip cannot tell a grid of {rows} x {columns} patches "
            "from a square one and may not resample its positions. Pass another --img-size."
        )


def transform_of(prep: dict[str, tp.Any], cfg: config.Vit) -> images.Transform:
    """Returns open_clip's evaluation transform, which resizes to non-square inputs with bicubic."""
    size = prep["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if prep["resize_mode"] not in ("shortest", "squash"):
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: resize mode {prep['resize_mode']!r} is not supported. "
            "Pass another model."
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
