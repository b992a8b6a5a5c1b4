"""The gallery: heat-mapped images as PNG, a table of the latents, and one static page. P patches."""

import csv
import dataclasses
import html
import math
import pathlib
import shutil
import tempfile
import typing as tp

import beartype
import matplotlib
import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from saev import errors, helpers
from saev.data import images
from saev.formats import shards

SIDE = 224
"""Largest side of a shown image, in pixels."""
OPACITY = 0.75
COLORS = matplotlib.colormaps["plasma"]


class Shown(tp.NamedTuple):
    """One image of a latent."""

    image_i: int
    value: float
    """Largest value over the image's patches."""
    heat_P: Float32[np.ndarray, " P"]
    """The latent's value on each patch, in raster order."""


class Page(tp.NamedTuple):
    """One latent."""

    latent: int
    freq: float
    mean: float
    shown: list[Shown]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Where the images come from."""

    ckpt: str
    root: pathlib.Path
    records: list[shards.Record]
    transform: images.Transform | None
    """What the ViT saw of an image; None stands for a square centre crop."""


@beartype.beartype
def check_target(dpath: pathlib.Path) -> None:
    """Raises UserError if `dpath` holds something that is not a gallery: it would be replaced."""
    if (
        dpath.exists()
        and not (dpath / "latents.csv").exists()
        and (dpath.is_file() or any(dpath.iterdir()))
    ):
        raise errors.UserError(
            f"--dump-to {dpath}: exists and is not a gallery. Pass a folder of its own."
        )


@beartype.beartype
def write(dpath: pathlib.Path, gallery: Gallery, pages: list[Page]) -> None:
    """Makes the gallery in a temporary folder and puts it in the place of `dpath` when it is complete.

    Raises:
        UserError: an image cannot be read; names it.
    """
    dpath.parent.mkdir(parents=True, exist_ok=True)
    tmp_dpath = pathlib.Path(tempfile.mkdtemp(prefix=f".{dpath.name}.", dir=dpath.parent))
    try:
        _write(tmp_dpath, gallery, pages)
        tmp_dpath.chmod(0o755)
        _swap(tmp_dpath, dpath)
    finally:
        shutil.rmtree(tmp_dpath, ignore_errors=True)


def _swap(new_dpath: pathlib.Path, dpath: pathlib.Path) -> None:
    """Renames; an older gallery steps aside first and is removed last."""
    old_dpath = new_dpath.with_name(f"{new_dpath.name}.old")
    if dpath.exists():
        dpath.rename(old_dpath)
    new_dpath.rename(dpath)
    shutil.rmtree(old_dpath, ignore_errors=True)


def _write(dpath: pathlib.Path, gallery: Gallery, pages: list[Page]) -> None:
    (dpath / "images").mkdir()
    for image_i in helpers.progress(*_plain_work(pages), "images"):
        _view(gallery, image_i).save(dpath / "images" / f"{image_i:06}.png")
    for page in pages:
        (dpath / _folder(page)).mkdir()
        for rank, shown in enumerate(page.shown):
            with PIL.Image.open(dpath / "images" / f"{shown.image_i:06}.png") as view:
                peak = page.shown[0].value
                overlay(view.convert("RGB"), shown.heat_P / peak).save(
                    dpath / _heat_fname(page, rank)
                )
    _write_table(dpath / "latents.csv", pages)
    helpers.write_text(dpath / "index.html", _index(gallery, pages))


def _plain_work(pages: list[Page]) -> tuple[list[int], str, int]:
    """Arguments of `progress` for the images without heat maps, each once."""
    image_is = sorted({shown.image_i for page in pages for shown in page.shown})
    return image_is, "render", len(image_is)


def _folder(page: Page) -> str:
    return f"latent_{page.latent:06}"


def _heat_fname(page: Page, rank: int) -> str:
    return f"{_folder(page)}/{rank:02}_{page.shown[rank].image_i:06}.png"


def _view(gallery: Gallery, image_i: int) -> PIL.Image.Image:
    """The part of the image that the ViT saw, at most SIDE pixels large."""
    img = images.open_rgb(gallery.root / gallery.records[image_i].path)
    if gallery.transform is None:
        side = min(img.size)
        left, top = (img.width - side) // 2, (img.height - side) // 2
        img = img.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    else:
        img = gallery.transform.geometry(img)
    img.thumbnail((SIDE, SIDE))
    return img


@beartype.beartype
def overlay(img: PIL.Image.Image, heat_P: Float32[np.ndarray, " P"]) -> PIL.Image.Image:
    """The image, paled, under a heat map (0 to 1, a square grid in raster order): opaque where it is hot."""
    heat_HW = _upsample(heat_P, img.size)
    gray_HW3 = np.asarray(img.convert("L").convert("RGB"), np.float32)
    pale_HW3 = 0.85 * (0.5 * gray_HW3 + 0.5 * np.asarray(img, np.float32))
    alpha_HW1 = OPACITY * np.sqrt(heat_HW)[..., None]
    mixed_HW3 = (1 - alpha_HW1) * pale_HW3 + alpha_HW1 * 255 * COLORS(heat_HW)[..., :3]
    return PIL.Image.fromarray(_bytes(mixed_HW3))


def _upsample(heat_P: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(P,) -> (height, width), smoothly."""
    side = math.isqrt(len(heat_P))
    if side * side != len(heat_P):
        raise errors.UserError(
            f"{len(heat_P)} patches are not a square grid: heat maps cannot be drawn."
        )
    grid = PIL.Image.fromarray(heat_P.reshape(side, side))
    return np.asarray(grid.resize(size, PIL.Image.Resampling.BILINEAR)).clip(0, 1)


def _bytes(pixels_HW3: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    return pixels_HW3.round().clip(0, 255).astype(np.uint8)


def _write_table(fpath: pathlib.Path, pages: list[Page]) -> None:
    with fpath.open("w", newline="", encoding="utf-8") as fd:
        writer = csv.writer(fd)
        writer.writerow(["latent", "freq", "mean", "max", "n_images"])
        for page in pages:
            writer.writerow([page.latent, page.freq, page.mean, _peak(page), len(page.shown)])


def _peak(page: Page) -> float:
    return page.shown[0].value if page.shown else 0.0


# ---- page ----

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 1160px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 0; }
section { border-top: 1px solid #ddd; padding: 1rem 0; }
p { margin: .2rem 0 .6rem; color: #555; }
.row { display: flex; flex-wrap: wrap; gap: 6px; }
figure { margin: 0; width: 136px; position: relative; }
img { width: 136px; height: 136px; object-fit: contain; display: block; border-radius: 3px; }
figure .plain { position: absolute; inset: 0; opacity: 0; } figure:hover .plain { opacity: 1; }
figcaption { font-size: 11px; color: #666; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
"""


def _index(gallery: Gallery, pages: list[Page]) -> str:
    sections = "\n".join(_section(gallery, page) for page in pages)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>saev: latents</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>{len(pages)} latents of {html.escape(gallery.ckpt)}</h1>\n"
        "<p>Each row: the images that fire the latent most, hottest where it fires; point at one to see it plain.</p>\n"
        f"{sections}\n</body></html>\n"
    )


def _section(gallery: Gallery, page: Page) -> str:
    figures = "".join(_figure(gallery, page, rank) for rank in range(len(page.shown)))
    facts = (
        f"fires on {page.freq:.3%} of patches, mean value {page.mean:.3g}, max {_peak(page):.3g}"
    )
    body = f"<div class='row'>{figures}</div>" if page.shown else "<p>It fires on no image.</p>"
    return (
        f"<section id='{_folder(page)}'><h2>Latent {page.latent}</h2><p>{facts}</p>{body}</section>"
    )


def _figure(gallery: Gallery, page: Page, rank: int) -> str:
    shown = page.shown[rank]
    record = gallery.records[shown.image_i]
    title = html.escape(f"{record.path} ({record.label}): {shown.value:.3g}", quote=True)
    label = html.escape(record.label or record.path)
    return (
        f"<figure title='{title}'><img src='{_heat_fname(page, rank)}' alt='' loading='lazy'>"
        f"<img class='plain' src='images/{shown.image_i:06}.png' alt='' loading='lazy'>"
        f"<figcaption>{label}</figcaption></figure>"
    )
