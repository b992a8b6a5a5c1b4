"""Pretrained vision transformers from open_clip and timm, behind one interface."""

from saev import errors
from saev.data import config
from saev.data.vits import base, open_clip, timm
from saev.data.vits.base import Vit, resolve_layers

__all__ = ["Vit", "load", "resolve_layers"]


def load(cfg: config.Vit) -> Vit:
    """Builds the model on the CPU, in float32.

    Raises:
        UserError: the model is unknown or not a ViT, its weights are unavailable or do not fit, or it does
            not support the given --img-size, --d-vit or --n-patches-per-img.
    """
    tower = (open_clip if cfg.vit_family in ("clip", "siglip") else timm).build(cfg)
    with base.quiet():
        vit = Vit(tower, cfg)
    _check(cfg, "--d-vit", cfg.d_vit, vit.d_vit, "wide")
    _check(cfg, "--n-patches-per-img", cfg.n_patches_per_img, vit.n_patches, "patches per image")
    return vit


def _check(cfg: config.Vit, flag: str, given: int | None, actual: int, what: str) -> None:
    if given not in (None, actual):
        raise errors.UserError(
            f"{flag} {given}: {cfg.vit_ckpt} gives {actual} {what}. Pass {flag} {actual} or leave it out."
        )
