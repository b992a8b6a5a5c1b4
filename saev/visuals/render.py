"""Writes the gallery: images with heat maps as PNG, a table of the latents, and one static page.

Shape letters: P patches in Y rows and X columns, H x W pixels.
"""

import collections.abc
import csv
import dataclasses
import html
import math
import pathlib
import typing as tp

import beartype
import matplotlib
import matplotlib.colors
import numpy as np
import PIL.Image
from jaxtyping import Float32, jaxtyped

from saev import errors, helpers, provenance
from saev.data import images
from saev.formats import jsonfile, shards

SIDE = 224
"""Largest side of a shown image, in pixels."""
OPACITY = 0.75
MARKERS = ("index.html", "latents.csv")
"""A folder with these files is a gallery and may be replaced."""
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


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Gallery:
    """Where the images come from."""

    ckpt: str
    source: str
    """The activations that the SAE was run on, for the page's header."""
    root: pathlib.Path
    records: list[shards.Record]
    transform: images.Transform | None
    """The ViT's image transform. None means a square centre crop."""
    grid: tuple[int, int]
    """(rows, columns) of the patches."""
    sha256: str = ""
    """sha256 of the checkpoint's bytes."""


def grid(n_patches: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the (rows, columns) of square patches on an input of `size` (height, width). None means a
    square input.

    Raises:
        UserError: no such grid has `n_patches` patches.
    """
    height, width = size or (math.isqrt(n_patches), math.isqrt(n_patches))
    for side in range(1, min(height, width) + 1):
        if (height // side) * (width // side) == n_patches:
            return height // side, width // side
    what = f"an input of {height} x {width} pixels" if size else "a square input"
    raise errors.UserError(
        f"{n_patches} patches do not form a grid on {what}, so heat maps cannot be drawn. "
        "Dump the images again."
    )


def check_target(dpath: pathlib.Path) -> None:
    """Creates the parent folder of `dpath` and checks that `dpath` may be replaced.

    Raises:
        UserError: the folder cannot be created, or `dpath` exists and is not a gallery.
    """
    try:
        dpath.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise errors.UserError(f"--dump-to {dpath}: cannot be created ({err}).") from err
    if not dpath.exists() or all((dpath / name).is_file() for name in MARKERS):
        return
    if dpath.is_file() or any(dpath.iterdir()):
        raise errors.UserError(f"--dump-to {dpath}: exists and is not a gallery. Pass a new folder.")


def check_images(gallery: Gallery, image_is: collections.abc.Iterable[int]) -> None:
    """Raises a UserError that names the first missing image."""
    for image_i in image_is:
        fpath = gallery.root / gallery.records[image_i].path
        if not fpath.is_file():
            raise errors.UserError(
                f"{fpath}: no such image. Pass the folder that was dumped as --images.root."
            )


def write(dpath: pathlib.Path, gallery: Gallery, pages: list[Page]) -> None:
    """Writes the gallery to a temporary folder and replaces `dpath` with it when it is complete.

    Raises:
        UserError: an image is missing or unreadable (named), or `dpath` exists and is not a gallery.
    """
    check_target(dpath)
    with helpers.atomic_folder(dpath) as tmp_dpath:
        _write(tmp_dpath, gallery, pages)
        check_target(dpath)  # someone may have written to it in the meantime


def _write(dpath: pathlib.Path, gallery: Gallery, pages: list[Page]) -> None:
    (dpath / "images").mkdir()
    for page in pages:
        (dpath / _folder(page)).mkdir()
    places = _places(pages)
    check_images(gallery, places)
    for image_i in helpers.progress(places, "render", len(places), "images"):
        view = _view(gallery, image_i)
        _save(view, dpath / "images" / f"{image_i:06}.png")
        for page, rank in places[image_i]:
            heat_P = page.shown[rank].heat_P / page.shown[0].value
            heat = overlay(view, heat_P.reshape(gallery.grid))
            _save(heat, dpath / _heat_fname(page, rank))
    _write_table(dpath / "latents.csv", pages)
    latents = [page.latent for page in pages]
    shown = {"ckpt": gallery.ckpt, "sha256": gallery.sha256, "latents": latents}
    helpers.write_text(dpath / "gallery.json", jsonfile.seal(shown))
    provenance.write(dpath)
    helpers.write_text(dpath / "index.html", _index(gallery, pages))


def _places(pages: list[Page]) -> dict[int, list[tuple[Page, int]]]:
    """Maps image numbers, in ascending order, to where they are shown, so that each image is opened once."""
    places: dict[int, list[tuple[Page, int]]] = {}
    for page in pages:
        for rank, shown in enumerate(page.shown):
            places.setdefault(shown.image_i, []).append((page, rank))
    return dict(sorted(places.items()))


def _save(img: PIL.Image.Image, fpath: pathlib.Path) -> None:
    """Saves a PNG with an octree palette: a third of the size. (Median cut would lose small hot spots.)"""
    img.quantize(256, method=PIL.Image.Quantize.FASTOCTREE).save(fpath)


def _folder(page: Page) -> str:
    return f"latent_{page.latent:06}"


def _heat_fname(page: Page, rank: int) -> str:
    return f"{_folder(page)}/{rank:02}_{page.shown[rank].image_i:06}.png"


def _view(gallery: Gallery, image_i: int) -> PIL.Image.Image:
    """Returns the part of the image that the ViT saw, at most SIDE pixels a side."""
    img = images.open_rgb(gallery.root / gallery.records[image_i].path)
    if gallery.transform is None:
        side = min(img.size)
        left, top = (img.width - side) // 2, (img.height - side) // 2
        img = img.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    else:
        img = gallery.transform.geometry(img)
    img.thumbnail((SIDE, SIDE))
    return img


@jaxtyped(typechecker=beartype.beartype)
def overlay(img: PIL.Image.Image, heat_YX: Float32[np.ndarray, "Y X"]) -> PIL.Image.Image:
    """Overlays a heat map (0 to 1 on each patch) on the paled image. Hotter patches are more opaque."""
    heat_img = PIL.Image.fromarray(np.ascontiguousarray(heat_YX))
    heat_HW = np.asarray(heat_img.resize(img.size, PIL.Image.Resampling.BILINEAR)).clip(0, 1)
    gray_HW3 = np.asarray(img.convert("L").convert("RGB"), np.float32)
    pale_HW3 = 0.85 * (0.5 * gray_HW3 + 0.5 * np.asarray(img, np.float32))
    alpha_HW1 = OPACITY * np.sqrt(heat_HW)[..., None]
    mixed_HW3 = (1 - alpha_HW1) * pale_HW3 + alpha_HW1 * 255 * COLORS(heat_HW)[..., :3]
    return PIL.Image.fromarray(mixed_HW3.round().clip(0, 255).astype(np.uint8))


def _write_table(fpath: pathlib.Path, pages: list[Page]) -> None:
    with fpath.open("w", newline="", encoding="utf-8") as fd:
        writer = csv.writer(fd)
        writer.writerow(["latent", "freq", "mean", "max", "n_images"])
        for page in pages:
            writer.writerow([page.latent, page.freq, page.mean, _peak(page), len(page.shown)])


def _peak(page: Page) -> float:
    return page.shown[0].value if page.shown else 0.0


# ---- page ----

STOPS = ", ".join(matplotlib.colors.to_hex(COLORS(i / 8)) for i in range(9))
STYLE = f"""
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem;
  color: #222; background: #f5f5f3; }}
h1 {{ font-size: 1.35rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 0; }}
p {{ margin: .2rem 0 .6rem; color: #555; }}
nav {{ font-size: 13px; margin: .6rem 0 1rem; }}
nav a {{ color: #46c; margin-right: .7em; text-decoration: none; }}
section {{ background: #fff; border: 1px solid #e2e2de; border-radius: 8px;
  padding: .8rem 1rem; margin: 0 0 1rem; }}
.scale {{ display: inline-block; width: 120px; height: .7em; border-radius: 3px; margin: 0 .4em;
  background: linear-gradient(90deg, {STOPS}); }}
.row {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(124px, 1fr)); gap: 8px; }}
figure {{ margin: 0; min-width: 0; position: relative; }}
img {{ width: 100%; aspect-ratio: 1; object-fit: contain; display: block;
  border-radius: 3px; background: #eee; }}
figure .plain {{ position: absolute; top: 0; left: 0; opacity: 0; }} figure:hover .plain {{ opacity: 1; }}
figcaption {{ font-size: 11px; color: #666; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
b {{ color: #222; }}
"""


def _index(gallery: Gallery, pages: list[Page]) -> str:
    links = "".join(f"<a href='#{_folder(page)}'>{page.latent}</a>" for page in pages)
    sections = "\n".join(_section(gallery, page) for page in pages)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>saev: latents</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>{len(pages)} latents of {_text(gallery.ckpt)}</h1>\n"
        f"<p>Run on {_text(gallery.source)}. Each card shows the latent's top images, "
        "ranked by their largest patch value. Hover over an image to hide the heat map.<br>"
        "Heat: 0<span class='scale'></span>the latent's maximum over all images.</p>\n"
        f"<nav>{links}</nav>\n{sections}\n</body></html>\n"
    )


def _section(gallery: Gallery, page: Page) -> str:
    figures = "".join(_figure(gallery, page, rank) for rank in range(len(page.shown)))
    facts = f"fires on {page.freq:.3%} of patches, mean value {page.mean:.3g}, max {_peak(page):.3g}"
    body = f"<div class='row'>{figures}</div>" if page.shown else "<p>It fires on no image.</p>"
    return f"<section id='{_folder(page)}'><h2>Latent {page.latent}</h2><p>{facts}</p>{body}</section>"


def _figure(gallery: Gallery, page: Page, rank: int) -> str:
    shown = page.shown[rank]
    record = gallery.records[shown.image_i]
    title = _text(f"{record.path} ({record.label}): {shown.value:.3g}")
    label = _text(record.label or record.path)
    return (
        f"<figure title='{title}'><img src='{_heat_fname(page, rank)}' alt='' loading='lazy'>"
        f"<img class='plain' src='images/{shown.image_i:06}.png' alt='' loading='lazy'>"
        f"<figcaption><b>{shown.value:.3g}</b> {label}</figcaption></figure>"
    )


def _text(text: str) -> str:
    """Escapes text for HTML and its attributes."""
    return helpers.printable(html.escape(text, quote=True))
