"""Vision transformers of timm: the families dinov2, dinov3, mae and timm."""

import inspect
import math
import typing as tp

import torch
from torch import Tensor

from saev import early, errors
from saev.data import config, images
from saev.data.vits import base, weights


class Published(tp.NamedTuple):
    """A family of models that timm names differently from their authors."""

    timm_names: dict[str, str]
    """Maps the authors' names to timm's."""
    side: int | None = None
    """Default input side in pixels. None means timm's."""
    crop_pct: float | None = None
    """Input side / shorter side of the resized photo. None means timm's."""


PUBLISHED = {
    # 224 pixels (256 patches) is the usual choice for DINOv2, which was trained at up to 518 pixels.
    "dinov2": Published(
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
    # The authors' evaluation crops 256 to 224 pixels and keeps this ratio at other sizes; timm does not crop.
    # Side 256 is timm's default and that of the pretraining crops. It gives 256 patches, like DINOv2 at 224.
    "dinov3": Published(
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
    "mae": Published(
        {
            "mae_vit_base_patch16": "vit_base_patch16_224.mae",
            "mae_vit_large_patch16": "vit_large_patch16_224.mae",
            "mae_vit_huge_patch14": "vit_huge_patch14_224.mae",
        }
    ),
}
"""The models of each family. Only this table names them."""


def build(cfg: config.Vit) -> base.Tower:
    with early.without_gc():
        import timm

    name, size, crop_pct = _name(cfg)
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name}*")[:3]) or "see timm.list_models()"
        raise errors.UserError(f"--vit-ckpt {cfg.vit_ckpt}: timm knows no such model ({close}).")
    if cfg.img_size or cfg.resize == "flexible":
        _check_without_weights(name, cfg)
    hub = cfg.vit_weights == "hub"
    kwargs: dict[str, tp.Any] = {"img_size": size} if size else {}
    if cfg.resize == "flexible":
        kwargs["dynamic_img_size"] = True
    with base.building(cfg):
        model: tp.Any = timm.create_model(name, pretrained=hub, num_classes=0, **kwargs)
    if cfg.vit_family == "dinov3":
        # The authors' weights store the rotary periods in bfloat16; timm recomputes them in float32.
        model.rope.periods.copy_(model.rope.periods.bfloat16())
    shape = shape_of(model, transform_of(model, size, crop_pct, cfg), cfg)
    ckpt_id = weights.apply(model, cfg)

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

    return base.Tower(model, intermediates, ckpt_id=ckpt_id, **shape)


def _name(cfg: config.Vit) -> tuple[str, tuple[int, int] | None, float | None]:
    """Returns timm's name of the model, the input size and crop_pct. None means timm's default."""
    if cfg.vit_family == "timm":
        return cfg.vit_ckpt, base.asked_size(cfg), None
    family = PUBLISHED[cfg.vit_family]
    if cfg.vit_ckpt not in family.timm_names:
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: family {cfg.vit_family} has {', '.join(family.timm_names)}."
        )
    size = base.asked_size(cfg) or ((family.side, family.side) if family.side else None)
    return family.timm_names[cfg.vit_ckpt], size, family.crop_pct


def shape_of(model: tp.Any, transform: images.Transform, cfg: config.Vit) -> dict[str, tp.Any]:
    """Returns the fields of `Tower` that describe the model."""
    embed = getattr(model, "patch_embed", None)
    if not (
        hasattr(model, "blocks")
        and hasattr(model, "num_prefix_tokens")
        and hasattr(embed, "dynamic_feat_size")
        and "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    ):
        raise base.not_a_vit(cfg)
    return {
        "blocks": model.blocks,
        "n_prefix": model.num_prefix_tokens,
        "has_cls": getattr(model, "cls_token", None) is not None,
        "grid": tuple(embed.dynamic_feat_size(transform.size)),
        "transform": transform,
    }


def _check_without_weights(name: str, cfg: config.Vit) -> None:
    """Checks --img-size and --resize flexible on a model without weights, before any are downloaded."""
    import timm

    with base.building(cfg), torch.device("meta"):
        model = timm.create_model(name)
    embed = getattr(model, "patch_embed", None)
    if hasattr(embed, "feat_ratio"):
        base.check_size(embed.feat_ratio(as_scalar=False), cfg)
    if cfg.resize == "flexible" and not hasattr(model, "dynamic_img_size"):
        raise base.not_flexible(cfg)


def transform_of(
    model: torch.nn.Module, size: tuple[int, int] | None, crop_pct: float | None, cfg: config.Vit
) -> images.Transform:
    """Returns timm's evaluation transform: resize (or squash) to size / crop_pct, then crop the centre."""
    import timm.data

    data: dict[str, tp.Any] = timm.data.resolve_data_config({"crop_pct": crop_pct}, model=model)
    if data["crop_mode"] not in ("center", "squash"):
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: crop mode {data['crop_mode']!r} is not supported. "
            "Pass another model."
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
