"""Image datasets and the transform from a photo to a ViT's input."""

import collections.abc
import dataclasses
import os
import pathlib
import typing as tp

import beartype
import numpy as np
import PIL.Image
import torch
from jaxtyping import Float32, jaxtyped
from torch import Tensor

from saev import errors
from saev.data import config, cub
from saev.formats.shards import Record

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

INTERPOLATIONS = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "lanczos": PIL.Image.Resampling.LANCZOS,
    "nearest": PIL.Image.Resampling.NEAREST,
}


# ---- datasets ----


@beartype.beartype
def list_images(cfg: config.ImageFolder | config.Cub200) -> list[Record]:
    """Path (relative to `image_root`) and label of every image, in a fixed order.

    ImageFolder: sorted by path; the label is the path's first folder. Cub200: the order of images.txt.

    Raises:
        UserError: the root is missing or holds no images, or a CUB file has a bad line (names file and line).
    """
    if not cfg.root:
        raise errors.UserError("--data.root is missing: pass the folder that holds the images.")
    if not pathlib.Path(cfg.root).is_dir():
        raise errors.UserError(
            f"--data.root {cfg.root}: no such directory. Pass the folder that holds the images."
        )
    paths = _cub_paths(cfg) if isinstance(cfg, config.Cub200) else sorted(_walk(cfg.root, ""))
    if not paths:
        raise errors.UserError(
            f"--data.root {cfg.root}: no images found (looked for {' '.join(SUFFIXES)}). Pass the folder that holds the images."
        )
    is_cub = isinstance(cfg, config.Cub200)
    keys = [cub.key(path) if is_cub else path for path in paths]
    return [
        Record(path, key.rpartition("/")[0].partition("/")[0])
        for path, key in zip(paths, keys, strict=True)
    ]


@beartype.beartype
def image_root(cfg: config.ImageFolder | config.Cub200) -> pathlib.Path:
    """The folder that the records' paths start from."""
    root = pathlib.Path(cfg.root)
    has_images = isinstance(cfg, config.Cub200) and not _is_split(root)
    return root / "images" if has_images else root


def _is_split(root: pathlib.Path) -> bool:
    """Are CUB's photos in train/ and test/ instead of images/?"""
    return not (root / "images").is_dir() and (root / "train").is_dir()


def _walk(root: str, prefix: str) -> collections.abc.Iterator[str]:
    """Relative paths of image files below root; hidden files and folders are skipped."""
    with os.scandir(os.path.join(root, prefix)) as entries:  # noqa: PTH118  (millions of files: pathlib is slow)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(root, f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(SUFFIXES):
                yield prefix + entry.name


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


@beartype.beartype
def open_rgb(fpath: pathlib.Path) -> PIL.Image.Image:
    """Reads an image as RGB, as the ViT libraries do (no EXIF rotation).

    Raises:
        UserError: missing, corrupt or truncated; names the path.
    """
    try:
        with PIL.Image.open(fpath) as img:
            return img.convert("RGB")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as err:
        raise errors.UserError(
            f"{fpath}: cannot be read as an image ({err}). Replace or remove it."
        ) from err


# ---- transform ----


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Transform:
    """Resize, centre crop, normalise: what the ViT's own library prescribes, described by plain values."""

    size: tuple[int, int]
    """(height, width) of the ViT's input, in pixels."""
    resize: int | tuple[int, int]
    """Before the centre is cropped, the shorter side is resized to this; (height, width): the image is resized to just cover it."""
    squash: bool
    """Resize to exactly `resize` (of an int: a square) whatever the aspect ratio."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise errors.UserError(
                f"transform: interpolation {self.interpolation!r} is not supported (supported: {', '.join(INTERPOLATIONS)})."
            )
        if any(have < want for have, want in zip(self._cover(), self.size, strict=True)):
            raise errors.UserError(
                f"transform: cannot crop {self.size} from an image resized to {self.resize}."
            )

    def geometry(self, img: PIL.Image.Image) -> PIL.Image.Image:
        """The part of the image that the ViT sees, `size` pixels large: heat maps lie on exactly this."""
        height, width = self.size
        resample = INTERPOLATIONS[self.interpolation]
        img = img.resize(self._resized(img.width, img.height), resample)
        left, top = round((img.width - width) / 2.0), round((img.height - height) / 2.0)
        return img.crop((left, top, left + width, top + height))

    def _cover(self) -> tuple[int, int]:
        """(height, width) that the resized image has at least."""
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the resized image; the libraries round the longer side down where `resize` is an int."""
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
        """The ViT's input."""
        pixels_HW3 = torch.from_numpy(np.asarray(self.geometry(img)).copy())
        mean_3, std_3 = (
            torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (self.mean, self.std)
        )
        return (pixels_HW3.permute(2, 0, 1).float().div(255) - mean_3) / std_3

    def to_dict(self) -> dict[str, tp.Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, obj: dict[str, tp.Any]) -> "Transform":
        """Inverse of `to_dict`, also after JSON made lists of the tuples.

        Raises:
            UserError: wrong keys or types.
        """
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in obj.items()})
        except Exception as err:  # TypeError for keys, beartype's own for types
            if isinstance(err, errors.UserError):
                raise
            raise errors.UserError(
                f"transform.json: not a transform ({str(err).splitlines()[0]}). Dump again."
            ) from err
