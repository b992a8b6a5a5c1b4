"""Heat of latents on one photo, for notebooks. P patches, D d_vit, K latents, L latents that are shown."""

import collections.abc
import math
import pathlib

import beartype
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from saev import errors, nn, scorers
from saev.data import pictures, pixels, vits
from saev.scorers import sae as scorers_sae

GAP, LINE, FONT = 8, 22, 14
"""Pixels between pictures, of a caption, and of its letters."""
COLUMNS = 5
"""Pictures in a row."""


@beartype.beartype
def show(
    scorer: nn.SparseAutoencoder | scorers_sae.SaeLatents | scorers.Prototypes,
    photo: PIL.Image.Image | pathlib.Path | str,
    vit: vits.Vit,
    *,
    latents: collections.abc.Sequence[int] | None = None,
    layer: int | None = None,
    n: int = 4,
    opacity: float = pictures.OPACITY,
    side: int = 224,
) -> PIL.Image.Image:
    """Draws the part of a photo that the ViT sees, and beside it the same with heat of each latent.

    Heat 1 is a latent's largest value on the photo, which the caption gives. Heat 0 is the value 0, or for
    prototypes the mean over the photo's patches.

    Args:
        scorer: an SAE, or what `saev.scorers.load` returned.
        photo: the path of a photo, or a decoded one.
        vit: the ViT of the scorer's activations.
        latents: the latents (or prototypes) to show. Default: the n with the largest values on this photo.
        layer: the ViT's layer, counted from 0, or from the end if negative. Default: the one that the SAE was
            trained on.
        n: number of latents, if none are named. Latents that do not fire are left out.
        opacity: of heat 1.
        side: longest side of a picture in pixels.

    Raises:
        UserError: the photo cannot be read, the scorer is of another ViT or layer, no layer is known, or
            there is no such latent.
    """
    sae = scorer.sae if isinstance(scorer, scorers_sae.SaeLatents) else scorer
    is_sae = isinstance(sae, nn.SparseAutoencoder)
    layer = _layer(sae) if layer is None else layer
    if is_sae:
        sae.check_fits(vit.space(layer), "the SAE", "vit and layer")
    img = pixels.opened(photo)
    placed = vit.layout(img)
    is_shown_P = placed.is_shown_P[: math.prod(placed.grid)]
    value_PK = _values(sae, vit.patches(img, layer))
    value_PK[~is_shown_P] = -np.inf if not is_sae else 0  # padding
    chosen_L = _strongest(value_PK, n, is_sae) if latents is None else _checked(latents, value_PK.shape[1])
    view = pictures.seen(img, vit.transform, placed.size, side)
    tiles = [("photo", view)]
    for latent in chosen_L:
        value_P = value_PK[:, latent]
        low, high = 0.0 if is_sae else value_P[is_shown_P].mean(), value_P.max()
        heat_P = (value_P - low) / max(high - low, 1e-30)
        picture = pictures.painted(view, heat_P, placed.grid, opacity)
        tiles.append((f"{'latent' if is_sae else 'prototype'} {latent}: {high:.3g}", picture))
    return _sheet(tiles)


def _layer(scorer: nn.SparseAutoencoder | scorers.Prototypes) -> int:
    """The layer that an SAE was trained on."""
    layers = scorer.activations.get("layers") if isinstance(scorer, nn.SparseAutoencoder) else None
    if not layers or len(layers) != 1:
        raise errors.UserError(
            "the scorer's file names no single layer. Pass layer=, as in its --data.layer."
        )
    return layers[0]


@torch.no_grad()
def _values(scorer: nn.SparseAutoencoder | scorers.Prototypes, acts_PD: torch.Tensor) -> np.ndarray:
    """(P, K) on the CPU. Scorers refuse activations of another width."""
    if isinstance(scorer, nn.SparseAutoencoder):
        return scorer.encode(acts_PD.to(scorer.W_enc.device)).float().cpu().numpy()
    return scorer(acts_PD.to(scorer.mean_D.device)).float().cpu().numpy()


def _strongest(value_PK: np.ndarray, n: int, is_sae: bool) -> list[int]:
    high_K = value_PK.max(axis=0)
    strongest = np.argsort(-high_K, kind="stable")[:n].tolist()
    return [latent for latent in strongest if high_K[latent] > 0 or not is_sae]


def _checked(latents: collections.abc.Sequence[int], n: int) -> list[int]:
    if bad := [latent for latent in latents if not 0 <= latent < n]:
        raise errors.UserError(f"latents: {bad[0]} is not one of the scorer's 0 to {n - 1}.")
    return list(latents)


def _sheet(tiles: list[tuple[str, PIL.Image.Image]]) -> PIL.Image.Image:
    """Pictures of one size in rows, each below its caption, which may be wider."""
    font = PIL.ImageFont.load_default(FONT)
    widths = [tiles[0][1].width, *(math.ceil(font.getlength(caption)) for caption, _ in tiles)]
    width, height = max(widths) + GAP, tiles[0][1].height + LINE + GAP
    columns = min(COLUMNS, len(tiles))
    n_rows = -(-len(tiles) // columns)
    sheet = PIL.Image.new("RGB", (columns * width - GAP, n_rows * height - GAP), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for i, (caption, picture) in enumerate(tiles):
        left, top = i % columns * width, i // columns * height
        draw.text((left, top + LINE // 2), caption, "black", font, anchor="lm")
        sheet.paste(picture, (left, top + LINE))
    return sheet
