"""The pictures of a gallery: of each image the part that the patches cover, small, as WebP in base64."""

import base64
import collections.abc
import dataclasses
import io
import math
import os
import pathlib

import beartype
import numpy as np
import PIL.Image
from jaxtyping import Float, Int64

from saev import errors
from saev.data import activations, images, layout
from saev.data import config as data_config
from saev.formats import shards

QUALITY = 75
"""Of WebP: about 8 kB for 224 x 224 pixels of a photo."""
HUE, OPACITY = (255, 0, 128), 0.7
"""Of heat, as in page/heat.js."""
METHOD = 2
"""WebP's effort, 0 to 6. 2 takes half the time of 4, for files that are 4% larger."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Pictures:
    """Where the images come from, and what the ViT saw of them."""

    root: pathlib.Path
    records: list[shards.Record]
    transform: images.Transform | None
    """The ViT's image transform. None means a square centre crop."""
    grid: tuple[int, int]
    """(rows, columns) of the patches; with --resize flexible, of a photo of the input's aspect ratio."""
    patch: int
    """Side of a patch in pixels of the ViT's input; 0 if the transform is not known."""
    side: int
    """Longest side of a picture."""
    sizes_A2: Int64[np.ndarray, "A 2"] | None = None
    """(width, height) of each photo, by number, if the grid or padding depends on it."""

    @staticmethod
    def of(
        cfg: data_config.ImageFolder | data_config.Cub200, acts: activations.Activations, side: int
    ) -> "Pictures":
        """Raises a UserError if no root is given, or the patches do not form a grid."""
        if not cfg.root:
            raise errors.UserError("--images.root is missing: pass the folder that was dumped.")
        placed = layout.Layout.of(acts.photos.transform, acts.n_tokens)
        root, sizes_A2 = images.image_root(cfg), acts.photos.sizes_A2
        return Pictures(root, acts.records, acts.photos.transform, placed.grid, placed.patch, side, sizes_A2)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the part of the ViT's input that the patches cover."""
        if self.transform is None:
            return self.side, self.side
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def words(self) -> str:
        """What was done to the images."""
        if self.transform is None:
            return "transform not recorded: a square centre crop is assumed"
        height, width = self.transform.size
        if self.transform.fit == "flexible":
            return "resized whole to a grid of patches near their aspect ratio"
        how = "squashed" if self.transform.squash else "resized and centre-cropped"
        how = "resized and padded" if self.transform.fit == "pad" else how
        return f"{how} to {height} x {width} pixels"

    def layout(self, image_i: int) -> layout.Layout:
        """Where the patches of an image lie in its view."""
        width, height = (0, 0) if self.sizes_A2 is None else self.sizes_A2[image_i].tolist()
        return layout.Layout.of(self.transform, math.prod(self.grid), (width, height) if width else None)

    def own_grid(self, image_i: int) -> dict[str, object]:
        """An image's entry `grid` in a gallery, if it has another grid than most."""
        grid = self.layout(image_i).grid
        return {} if grid == self.grid else {"grid": list(grid)}

    def check(self, image_is: collections.abc.Iterable[int]) -> None:
        """Raises a UserError that names the first missing image."""
        for image_i in image_is:
            fpath = self.root / self.records[image_i].path
            if not fpath.is_file():
                raise errors.UserError(
                    f"{fpath}: no such image. Pass the folder that was dumped as --images.root."
                )

    def view(self, image_i: int) -> PIL.Image.Image:
        """The part of an image that the patches cover, at most `side` pixels a side.

        Raises:
            UserError: the image is missing or unreadable, or has another size than in the dump.
        """
        self.check([image_i])
        fpath = self.root / self.records[image_i].path
        img = images.open_rgb(fpath)
        if self.sizes_A2 is not None:
            layout.check_size(fpath, img.size, self.sizes_A2[image_i])
        size = self.size if self.transform is None else self.layout(image_i).size
        return seen(img, self.transform, size, self.side)

    def src(self, image_i: int) -> str:
        """The view as a data: URL."""
        out = io.BytesIO()
        self.view(image_i).save(out, "WEBP", quality=QUALITY, method=METHOD)
        return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def seen(
    img: PIL.Image.Image, transform: images.Transform | None, size: tuple[int, int], side: int
) -> PIL.Image.Image:
    """The part of a photo that the patches cover, at most `side` pixels a side.

    Args:
        size: (height, width) of this part in pixels of the ViT's input.
    """
    if transform is None:
        edge = min(img.size)
        left, top = (img.width - edge) // 2, (img.height - edge) // 2
        return img.crop((left, top, left + edge, top + edge)).resize((side, side))
    height, width = size  # patches begin at the upper left; a rest of less than a patch is not seen
    img = transform.geometry(img).crop((0, 0, width, height))
    img.thumbnail((side, side))
    return img


def painted(
    img: PIL.Image.Image, heat_P: Float[np.ndarray, " P"], grid: tuple[int, int], opacity: float = OPACITY
) -> PIL.Image.Image:
    """Heat over a picture, as the page paints it: exact rectangles in one hue, opacity linear in heat.

    Args:
        heat_P: from 0 to 1, in raster order. What follows the grid's patches is left out.
        grid: (rows, columns) of the patches.
        opacity: at heat 1.
    """
    heat_RC = np.rint(255 * opacity * heat_P[: math.prod(grid)].clip(0, 1)).astype(np.uint8).reshape(grid)
    mask = PIL.Image.fromarray(heat_RC).resize(img.size, PIL.Image.Resampling.NEAREST)
    return PIL.Image.composite(PIL.Image.new("RGB", img.size, HUE), img, mask)


def n_threads() -> int:
    """Threads that decode images."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
