"""Figures for a paper: a row of top images with heat for each latent, from a gallery's files.

P patches.
"""

import math
import pathlib
import typing as tp

import matplotlib.figure
import numpy as np
import PIL.Image

from saev import errors, helpers
from saev.data import pictures
from saev.formats import gallery as galleries
from saev.report import figures
from saev.visuals import config

IN_COLUMN = 5
"""So many images in a row fit into a column of a paper."""
WIDEST = 1.1
"""Most inches of a picture's width."""
LEAST_DPI = 250
"""Pictures are enlarged to at least this many pixels per inch."""
GAP, LINE, LEGEND = 0.04, 0.13, 0.8
"""Inches between pictures, of a line of text, and of the legend's width."""
GREYS = (0x20, 0x80, 0xE0)
"""The legend is painted over these, as in the page."""


class Sheet:
    """Pictures and lines of text from top to bottom, at whole pixels.

    Args:
        width: in inches.
        dpi: pixels per inch.
    """

    def __init__(self, width: float, dpi: float):
        self.width, self.dpi = round(width * dpi), dpi
        self.height = 0
        """So far, in pixels."""
        self._pictures: list[tuple[PIL.Image.Image, int, int]] = []
        self._texts: list[tuple[str, float, int, int]] = []

    def pixels(self, inches: float) -> int:
        return round(inches * self.dpi)

    def put(self, picture: PIL.Image.Image, x: int) -> None:
        """Puts a picture at the present height."""
        self._pictures.append((picture, x, self.height))

    def say(self, text: str, size: float, x: int = 0) -> None:
        """Writes a line of text of this size in points, and goes down by a line."""
        self._texts.append((text, size, x, self.height + self.pixels(LINE / 2)))
        self.down(self.pixels(LINE))

    def down(self, pixels: int) -> None:
        self.height += pixels

    def figure(self) -> matplotlib.figure.Figure:
        w, h = self.width, self.height
        # a little more than w and h, which matplotlib cuts to whole pixels
        figure = matplotlib.figure.Figure(((w + 0.01) / self.dpi, (h + 0.01) / self.dpi), self.dpi)
        for picture, x, y in self._pictures:
            place = (x / w, 1 - (y + picture.height) / h, picture.width / w, picture.height / h)
            axes = figure.add_axes(place)
            axes.imshow(np.asarray(picture), interpolation="none", aspect="auto")
            axes.set_axis_off()
        for text, size, x, y in self._texts:
            figure.text(x / w, 1 - y / h, text, fontsize=size, va="center")
        return figure


Shown = tuple[PIL.Image.Image, np.ndarray, tuple[int, int]]
"""The part of an image that the ViT saw, its heat (P,) from 0 to 1, and its (rows, columns) of patches."""


class Row(tp.NamedTuple):
    """A latent."""

    label: str
    low: float
    """The value with heat 0."""
    shown: list[Shown]


def write(cfg: config.Visuals) -> None:
    """Draws the latents of --figure from the gallery in --dump-to, and writes the file --out.

    Raises:
        UserError: the gallery is damaged, or of another scorer or layer; a latent is not in it or never
            fires.
    """
    remedy = "Run visuals.py again, without --figure."
    gallery = galleries.Gallery(pathlib.Path(cfg.dump_to), remedy)
    _check(cfg, gallery)
    figures.save(draw(gallery, cfg.figure, cfg.figure_images), pathlib.Path(cfg.out))


def _check(cfg: config.Visuals, gallery: galleries.Gallery) -> None:
    """Refuses a gallery of another scorer or layer than the flags name."""
    scorer, layer = gallery.stats.scorer, gallery.stats.source.layer
    remedy = "Pass the folder of its gallery, or a new one, as --dump-to."
    is_other = isinstance(cfg.shown, config.Units) and scorer.kind != "units"
    if is_other or (cfg.source and helpers.hash_file(pathlib.Path(cfg.source)) != scorer.sha256):
        what = cfg.source or "scorer:units"
        raise errors.UserError(f"{what}: the gallery {cfg.dump_to} shows another scorer. {remedy}")
    given = cfg.data.layer
    if cfg.data.shard_root and isinstance(given, int) and given >= 0 and given != layer:
        raise errors.UserError(
            f"--data.layer {given}: the gallery {cfg.dump_to} is of layer {layer}. {remedy}"
        )


# ---- what is drawn ----


def _row(gallery: galleries.Gallery, latent: int, n_images: int) -> Row:
    noun, n, filters = gallery.stats.scorer.noun, gallery.stats.scorer.n, gallery.stats.shown.filters
    if latent >= n:
        raise errors.UserError(f"--figure {latent}: the scorer has {noun}s 0 to {n - 1}.")
    never = f"--figure {latent}: this {noun} never fires on the images, so there is nothing to draw."
    if not (place := np.flatnonzero(gallery.id_C == latent)).size:
        if filters == f"all {noun}s that fire":
            raise errors.UserError(never)
        raise errors.UserError(
            f"--figure {latent}: not in the gallery {gallery.dpath}, which shows {filters}. Make another one "
            f"with --include-latents {latent} and another --dump-to."
        )
    row = int(place[0])
    found = gallery.latent(row)
    shown = [_shown(gallery, group, n_images) for group in found.groups if group.name == "top"]
    if not any(shown):
        raise errors.UserError(never)
    freq, mean, most = (float(gallery.column(name)[row]) for name in ("freq", "mean", "max"))
    label = f"{noun} {latent}: fires on {100 * freq:.3g}% of patches, "
    label += f"mean {mean:.3g}, " * (freq > 0) + f"largest {most:.3g}"
    return Row(label, found.low, shown[0])


def _shown(gallery: galleries.Gallery, group: galleries.Group, n_images: int) -> list[Shown]:
    image_N, start_N1, patch_m, heat_m = map(
        gallery.unpack, (group.image, group.start, group.patch, group.heat)
    )
    out = []
    for i, place in enumerate(image_N[:n_images].tolist()):
        part, heat_P = slice(start_N1[i], start_N1[i + 1]), np.zeros(gallery.stats.source.n_patches)
        heat_P[patch_m[part]] = heat_m[part] / 255
        out.append((gallery.picture(place), heat_P, gallery.grid(place)))
    return out


def _caption(gallery: galleries.Gallery) -> str:
    scorer, source = gallery.stats.scorer, gallery.stats.source
    most = "at most " * source.padded
    return (
        f"Images with the largest values, from {gallery.stats.title} ({scorer.name}). {source.vit}, layer "
        f"{source.layer}; {source.data}: {source.n_images:,} images of {most}"
        f"{source.n_patches:,} patches. "
        f"{scorer.fires} Mean: over the patches that it fires on. Largest: on any patch."
    )


# ---- drawing ----


@figures.styled()
def draw(gallery: galleries.Gallery, latents: tuple[int, ...], n_images: int) -> matplotlib.figure.Figure:
    """A row for each latent. In a PNG file, each patch is the same whole number of pixels.

    Raises:
        UserError: a latent is not in the gallery or never fires, or a file is damaged.
    """
    rows = [_row(gallery, latent, n_images) for latent in dict.fromkeys(latents)]
    n_down, n_across = np.max([grid for row in rows for *_, grid in row.shown], axis=0).tolist()
    n = max(len(row.shown) for row in rows)
    width = figures.COLUMN if n <= IN_COLUMN else figures.PAGE
    inches = min((width - (n - 1) * GAP) / n, WIDEST)
    picture, _, (_, columns) = rows[0].shown[0]
    patch = max(math.ceil(LEAST_DPI * inches / n_across), round(picture.width / columns))
    side, dpi = (patch * n_across, patch * n_down), patch * n_across / inches
    start = "0" if all(row.low == 0 for row in rows) else "mean score"
    scale = f"heat: {start} to the {gallery.stats.scorer.noun}'s largest value"
    sheet = Sheet(width, dpi)
    for row in rows:
        for line in figures.wrapped(row.label, width, figures.FONT).splitlines():
            sheet.say(line, figures.FONT)
        for i, (picture, heat_P, grid) in enumerate(row.shown):
            sized = picture.resize((patch * grid[1], patch * grid[0]), PIL.Image.Resampling.LANCZOS)
            sheet.put(pictures.painted(sized, heat_P, grid), i * (side[0] + sheet.pixels(GAP)))
        sheet.down(side[1] + 2 * sheet.pixels(GAP))
    sheet.put(_legend(sheet.pixels(LEGEND), sheet.pixels(LINE)), 0)
    sheet.say(scale, figures.SMALL, sheet.pixels(LEGEND + GAP))
    sheet.down(sheet.pixels(GAP))
    for line in figures.wrapped(_caption(gallery), width).splitlines():
        sheet.say(line, figures.SMALL)
    return sheet.figure()


def _legend(width: int, height: int) -> PIL.Image.Image:
    """Heat from 0 to 1 over dark, middle and light grey, painted as over pictures."""
    grey_HW = np.repeat(np.array(GREYS, np.uint8), -(-height // len(GREYS)))[:height, None].repeat(
        width, axis=1
    )
    return pictures.painted(PIL.Image.fromarray(grey_HW).convert("RGB"), np.linspace(0, 1, width), (1, width))
