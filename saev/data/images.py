"""Image datasets and the transform from a photo to a ViT's input."""

import dataclasses
import functools
import logging
import math
import pathlib
import typing as tp

import beartype
import numpy as np
import PIL.Image
import torch
from jaxtyping import Float32, jaxtyped
from torch import Tensor

from saev import errors
from saev.data import config, cub, walk
from saev.data.pixels import BadImage, open_rgb
from saev.formats.shards import Record

__all__ = ["BadImage", "Transform", "flexible_grid", "grid", "image_root", "list_images", "open_rgb"]

logger = logging.getLogger("saev")

INTERPOLATIONS = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "lanczos": PIL.Image.Resampling.LANCZOS,
    "nearest": PIL.Image.Resampling.NEAREST,
}

MAX_SIDE = 8192
"""Largest side in pixels, both of the ViT's input and of the resized image."""
MAX_WHOLE = 2**22
"""Of resized images with more pixels (long photos), only the crop is computed, unless it is as large too."""
MAX_BETWEEN = 2**26
"""Most pixels between Pillow's two passes (rows, then columns). Above it, columns are resized first."""

USUAL = (8, 14, 16, 32)
"""Sides of usual ViTs' patches in pixels."""
LEAST_FILLED = 7 / 8
"""A flexible grid has at least this share of a dump's patches per image."""


# ---- datasets ----


def list_images(cfg: config.ImageFolder | config.Cub200) -> list[Record]:
    """Lists the path (relative to `image_root`) and label of every image, in a fixed order.

    ImageFolder sorts by path, labels by the path's first folder, and logs what it ignores. Cub200 keeps the
    order of images.txt.

    Raises:
        UserError: the root is missing or holds no images, or a CUB file has a bad line (which is named).
    """
    if not cfg.root:
        raise errors.UserError("--data.root is missing: pass the folder that holds the images.")
    if not pathlib.Path(cfg.root).is_dir():
        raise errors.UserError(
            f"--data.root {cfg.root}: no such directory. Pass the folder that holds the images."
        )
    is_cub = isinstance(cfg, config.Cub200)
    paths = _cub_paths(cfg) if is_cub else _folder_paths(cfg.root)
    keys = [cub.key(path) if is_cub else path for path in paths]
    return [
        Record(path, key.rpartition("/")[0].partition("/")[0]) for path, key in zip(paths, keys, strict=True)
    ]


def image_root(cfg: config.ImageFolder | config.Cub200) -> pathlib.Path:
    """Returns the folder that records' paths are relative to."""
    root = pathlib.Path(cfg.root)
    has_images = isinstance(cfg, config.Cub200) and not _is_split(root)
    return root / "images" if has_images else root


def _is_split(root: pathlib.Path) -> bool:
    """Whether CUB's photos are in train/ and test/ instead of images/."""
    return not (root / "images").is_dir() and (root / "train").is_dir()


def _folder_paths(root: str) -> list[str]:
    paths, ignored = walk.walk(root)
    found = f"ignored: {walk.describe(ignored)}" if ignored else "the folder is empty"
    if not paths:
        raise errors.UserError(
            f"--data.root {root}: no images found ({found}). Pass the folder that holds the images."
        )
    if ignored:
        logger.info("%s: %d photos; %s", root, len(paths), found)
    return paths


def _cub_paths(cfg: config.Cub200) -> list[str]:
    root = cub.metadata_root(pathlib.Path(cfg.root))
    paths = cub.image_paths(root)
    is_split = _is_split(pathlib.Path(cfg.root))
    if cfg.split == "all" and not is_split:
        return list(paths.values())
    is_train = cub.split(root, paths)
    return [
        f"{'train' if is_train[i] else 'test'}/{path}" if is_split else path
        for i, path in paths.items()
        if cfg.split == "all" or is_train[i] == (cfg.split == "train")
    ]


# ---- transform ----


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Transform:
    """Resizes, centre-crops and normalises an image as the ViT's own library does."""

    size: tuple[int, int]
    """(height, width) of the ViT's input, in pixels."""
    resize: int | tuple[int, int]
    """Size before the crop: the shorter side, or a box (height, width) that the resized image just covers."""
    squash: bool
    """Resize to exactly `resize` (an int means a square), ignoring the aspect ratio."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: tp.Literal["cover", "pad", "flexible"] = "cover"
    """cover: crop or squash, as above. pad: the whole photo, with borders of the mean colour; its upper left
    corner is a patch's. flexible: the whole photo, in a grid of patches of its own (`flexible_grid`)."""
    patch: int = 0
    """Side of a patch in pixels. 0 where `fit` does not need it."""

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise errors.UserError(
                f"transform: interpolation {self.interpolation!r} is not supported "
                f"(supported: {', '.join(INTERPOLATIONS)})."
            )
        sides = *self.size, *self._cover()
        if min(sides) < 1 or max(sides) > MAX_SIDE:
            raise errors.UserError(
                f"transform: size {self.size}, resize {self.resize}: "
                f"sides must be from 1 to {MAX_SIDE} pixels."
            )
        if any(have < want for have, want in zip(self._cover(), self.size, strict=True)):
            raise errors.UserError(
                f"transform: cannot crop {self.size} from an image resized to {self.resize}."
            )
        if self.fit != "cover" and not 1 <= self.patch <= min(self.size):
            raise errors.UserError(
                f"transform: patch side {self.patch} does not fit into {self.size} pixels."
            )

    def with_resize(self, mode: config.Resize | None, n_patches: int) -> "Transform":
        """The same transform with another geometry. None: itself. The family's own mode: itself too.

        Args:
            n_patches: the number of patches of an input of `size`.

        Raises:
            UserError: pad or flexible, and it is unknown where the patches lie.
        """
        if mode is None or (mode in ("crop", "squash") and self.squash == (mode == "squash")):
            return self
        resize = self.size[0] if self.size[0] == self.size[1] else self.size
        out = dataclasses.replace(self, resize=resize, squash=mode == "squash")
        if mode in ("crop", "squash"):
            return out
        _, _, patch = grid(n_patches, self.size)
        return dataclasses.replace(out, fit=mode, patch=patch)

    def input_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) in pixels of the ViT's input for a photo: `size`, unless the grid is flexible."""
        if self.fit != "flexible":
            return self.size
        rows, columns = flexible_grid(math.prod(n // self.patch for n in self.size), height / width)
        return rows * self.patch, columns * self.patch

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a photo in the ViT's input. What is outside is padding."""
        if self.fit != "pad":
            rows, columns = self.input_size(width, height)
            return 0, 0, columns, rows
        covered = [n // self.patch * self.patch for n in self.size]  # patches see no more
        scale = min(covered[0] / height, covered[1] / width)
        h, w = (min(max(1, round(n * scale)), most) for n, most in zip((height, width), covered, strict=True))
        top, left = (
            (most - n) // 2 // self.patch * self.patch for n, most in zip((h, w), covered, strict=True)
        )
        return left, top, left + w, top + h

    def geometry(self, img: PIL.Image.Image, ground: int | None = None) -> PIL.Image.Image:
        """Returns what the ViT sees of an image, as large as its input. Heat maps are drawn on it.

        Args:
            ground: value of padding's pixels. Default: the mean colour.
        """
        if self.fit != "cover":
            left, top, right, bottom = self.box(img.width, img.height)
            photo = _resize(img, (right - left, bottom - top), INTERPOLATIONS[self.interpolation])
            height, width = self.input_size(img.width, img.height)
            mean = tuple(round(255 * v) for v in self.mean)
            out = PIL.Image.new(img.mode, (width, height), mean if ground is None else ground)
            out.paste(photo, (left, top))
            return out
        height, width = self.size
        whole = self._resized(img.width, img.height)
        left, top = round((whole[0] - width) / 2.0), round((whole[1] - height) / 2.0)
        part = (left, top, left + width, top + height)
        resample = INTERPOLATIONS[self.interpolation]
        if math.prod(whole) > max(MAX_WHOLE, 4 * math.prod(self._cover())):
            return _resize_part(img, whole, part, resample)
        return _resize(img, whole, resample).crop(part)

    def _cover(self) -> tuple[int, int]:
        """Returns the least (height, width) of the resized image."""
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Returns (width, height) of the resized image. An int `resize` rounds the longer side down."""
        if self.squash:
            return self._cover()[::-1]
        if isinstance(self.resize, tuple):
            scale = min(height / self.resize[0], width / self.resize[1])
            return round(width / scale), round(height / scale)
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize

    @jaxtyped(typechecker=beartype.beartype)
    def __call__(self, img: PIL.Image.Image) -> Float32[Tensor, "3 H W"]:
        """Turns a photo into the ViT's input."""
        pixels_HW3 = torch.from_numpy(np.asarray(self.geometry(img)).copy())
        mean_3, std_3 = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (self.mean, self.std))
        return (pixels_HW3.permute(2, 0, 1).float().div(255) - mean_3) / std_3

    def to_dict(self) -> dict[str, tp.Any]:
        """Returns plain JSON values, without `fit` and `patch` where older dumps had none."""
        found = dataclasses.asdict(self)
        return found if self.fit != "cover" else {k: v for k, v in found.items() if k not in ("fit", "patch")}

    @classmethod
    def from_dict(cls, obj: object) -> "Transform":
        """Inverts `to_dict`. Lists that JSON made of tuples are accepted.

        Raises:
            UserError: wrong keys or types.
        """
        try:
            assert isinstance(obj, dict), "not a JSON object"
            plain = {k: tuple(v) if isinstance(v, list) else v for k, v in obj.items()}
            return cls(**tp.cast(dict[str, tp.Any], plain))
        except Exception as err:  # TypeError for keys, beartype's own for types
            if isinstance(err, errors.UserError):
                raise
            raise errors.UserError(
                f"transform.json: not a transform ({errors.first_line(err)}). Dump again."
            ) from err


def grid(n_patches: int, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Returns (rows, columns, side in pixels) of square patches on an input of `size` (height, width).

    Rows and columns are unique, because both fall as the side grows. If several sides give them, it is the
    one without a rest (there is at most one), else the largest usual one, else the largest. None means a
    square input of unknown size: the side is 0.

    Raises:
        UserError: no such grid has `n_patches` patches.
    """
    if size is None:
        if (side := math.isqrt(n_patches)) ** 2 == n_patches:
            return side, side, 0
    else:
        sides = [s for s in range(1, min(size) + 1) if (size[0] // s) * (size[1] // s) == n_patches]
        if sides:
            whole = [s for s in sides if size[0] % s == 0 and size[1] % s == 0]
            side = max(whole or [s for s in sides if s in USUAL] or sides)
            return size[0] // side, size[1] // side, side
    what = f"an input of {size[0]} x {size[1]} pixels" if size else "a square input"
    raise errors.UserError(
        f"{n_patches} patches do not form a grid on {what}, so it is unknown where they lie. "
        "Dump the images again."
    )


@functools.cache
def _flexible_grids(n_patches: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """(rows, columns) of all grids with enough patches, those with the most first; log(rows / columns)."""
    least = math.ceil(LEAST_FILLED * n_patches)
    grids = [
        (rows, columns)
        for rows in range(1, n_patches + 1)
        for columns in range(-(-least // rows), n_patches // rows + 1)
    ]
    grids.sort(key=lambda grid: (-grid[0] * grid[1], grid))
    return grids, np.log([rows / columns for rows, columns in grids])


def flexible_grid(n_patches: int, aspect: float) -> tuple[int, int]:
    """(rows, columns) of the grid that distorts an image least.

    Its rows / columns are nearest to `aspect` (as a ratio), among the grids with at most `n_patches` patches
    and at least LEAST_FILLED of them. Of equally near ones, it has the most patches.

    Args:
        aspect: height / width.
    """
    grids, log_G = _flexible_grids(n_patches)
    return grids[int(np.abs(log_G - math.log(aspect)).argmin())]


def _resize(img: PIL.Image.Image, size: tuple[int, int], resample: PIL.Image.Resampling) -> PIL.Image.Image:
    """Resizes with Pillow, as the libraries do, but in bounded memory for tall images."""
    if size[0] * img.height > MAX_BETWEEN:
        img = img.resize((img.width, size[1]), resample)
    return img.resize(size, resample)


def _resize_part(
    img: PIL.Image.Image,
    whole: tuple[int, int],
    part: tuple[int, int, int, int],
    resample: PIL.Image.Resampling,
) -> PIL.Image.Image:
    """Computes `part` (left, top, right, bottom) of the image resized to `whole`, from the pixels it needs.

    The result equals resizing everything and cropping, up to rounding by one level. Where a filter
    overshoots, the order of Pillow's two passes, which depends on the sizes, may also show.
    """

    def along(axis: int) -> tuple[int, int, float, float]:
        """What to crop, and the part's place within it."""
        side = img.size[axis]
        scale = side / whole[axis]
        start, end = part[axis] * scale, part[axis + 2] * scale
        margin = math.ceil(3 * max(scale, 1)) + 1  # Lanczos, the widest filter, reaches 3 pixels
        first, last = max(0, math.floor(start) - margin), min(side, math.ceil(end) + margin)
        return first, last, start - first, float(min(end, side) - first)

    (left, right, x0, x1), (top, bottom, y0, y1) = along(0), along(1)
    size = part[2] - part[0], part[3] - part[1]
    return img.crop((left, top, right, bottom)).resize(size, resample, (x0, y0, x1, y1))
