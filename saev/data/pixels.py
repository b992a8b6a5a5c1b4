"""Decodes photos to 8-bit RGB. docs/images-and-weights.md has the table of modes.

Reading and decoding are separate steps. A read error is the disk's fault and stops a dump. A decoding error
is the photo's fault (`BadImage`), and `--skip-corrupt` leaves that photo out.
"""

import collections.abc
import functools
import io
import os
import pathlib
import stat
import typing as tp
import warnings

import numpy as np
import PIL.Image
import PIL.ImageCms

from saev import errors

NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
"""Formats that Pillow only identifies, and EPS, for which it would run Ghostscript."""
MAX_BYTES = 2**30
"""Larger files are refused."""
MAX_PIXELS = 178_956_970
"""Larger photos are refused. This is Pillow's own limit."""
FLAT = 16
"""Colours that span fewer levels than this count as a blank image."""

# Pillow warns from half of MAX_PIXELS on.
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


class BadImage(errors.UserError):
    """The file was read, but it is not a usable image."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Lists the formats that the installed Pillow can decode."""
    PIL.Image.init()
    return tuple(name for name in PIL.Image.ID if name not in NOT_DECODED)


@functools.cache
def suffixes() -> tuple[str, ...]:
    """Lists the lower-case suffixes of those formats. MPO (two JPEGs in one file) is decoded as JPEG."""
    known = {*formats(), "MPO"}
    return tuple(sorted(s for s, f in PIL.Image.registered_extensions().items() if f in known))


def open_rgb(fpath: pathlib.Path) -> PIL.Image.Image:
    """Reads a photo as RGB (of animations, the first frame), without EXIF rotation and colour profiles.

    Raises:
        BadImage: the file is empty, truncated, too large, of unknown format, or its mode defines no white.
        UserError: the file cannot be read, or there is not enough memory.
    """
    data = _read(fpath)
    try:
        if not data:
            raise ValueError("the file is empty")
        with PIL.Image.open(io.BytesIO(data), formats=formats()) as img:
            if img.width * img.height > MAX_PIXELS:
                raise ValueError(f"{img.width} x {img.height} pixels; at most {MAX_PIXELS:,} are decoded")
            img.load()
            return to_rgb(img)
    except Exception as err:  # Pillow's plugins raise a dozen types for malformed bytes
        if isinstance(err, MemoryError) or "out of memory" in str(err):
            raise errors.UserError(
                f"{fpath}: not enough memory to decode it. Pass a smaller --n-workers, or remove the photo."
            ) from err
        is_unknown = isinstance(err, PIL.UnidentifiedImageError)  # its message holds a memory address
        reason = "not an image format that Pillow decodes" if is_unknown else errors.first_line(err)
        raise BadImage(f"{fpath}: cannot be read as an image ({reason}). Replace or remove it.") from err


def opened(photo: PIL.Image.Image | pathlib.Path | str) -> PIL.Image.Image:
    """A photo as RGB, from its path (as `open_rgb`) or decoded (as `to_rgb`).

    Raises:
        UserError: as `open_rgb`, or the decoded image's mode defines no white.
    """
    if not isinstance(photo, PIL.Image.Image):
        return open_rgb(pathlib.Path(photo))
    try:
        return to_rgb(photo)
    except ValueError as err:
        raise BadImage(f"the image cannot be used ({err}). Convert it to RGB.") from err


def _read(fpath: pathlib.Path) -> bytes:
    """Reads a regular file. It opens without blocking, so a FIFO cannot make it hang."""
    try:
        number = os.open(fpath, os.O_RDONLY | os.O_NONBLOCK)
        info = os.fstat(number)
        if not stat.S_ISREG(info.st_mode):
            os.close(number)
            raise errors.UserError(f"{fpath}: is not a regular file. Remove it.")
        with open(number, "rb") as fd:  # noqa: PTH123
            if info.st_size > MAX_BYTES:
                raise BadImage(
                    f"{fpath}: is {info.st_size:,} bytes long; the limit is {MAX_BYTES:,}. "
                    "Replace or remove it."
                )
            data = fd.read(MAX_BYTES)
    except (OSError, ValueError) as err:  # ValueError: a NUL in the path
        reason = getattr(err, "strerror", None) or errors.first_line(err)
        raise errors.UserError(
            f"{fpath}: cannot be read ({reason}). Check that the disk is mounted and that you "
            "may read the file, then run the same command again."
        ) from err
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        raise errors.UserError(
            f"{fpath}: is a git-lfs pointer, not the photo. Run `git lfs pull` in its repository."
        )
    return data


# ---- modes ----


def to_rgb(img: PIL.Image.Image) -> PIL.Image.Image:
    """Converts a decoded image of any Pillow mode to 8-bit RGB.

    Raises:
        ValueError: the mode does not define which value is white.
    """
    if set(_tiff_tags(img).get(339, ())) & {2, 3}:  # SampleFormat
        raise ValueError(f"mode {img.mode} of signed or float samples has no defined white")
    if img.mode.startswith("I;16") or img.mode == "I":
        return _from_16_bits(img)
    if img.mode == "LAB":
        lab, srgb = (PIL.ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
        return PIL.ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(img)
    if img.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return _without_alpha(img)
    if img.mode == "P" and "transparency" in img.info:
        return _without_alpha(img)
    if img.mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        return img.convert("RGB")
    raise ValueError(f"mode {img.mode} has no defined white")


def _tiff_tags(img: PIL.Image.Image) -> collections.abc.Mapping[int, tp.Any]:
    return getattr(img, "tag_v2", {}) if img.format == "TIFF" else {}


def _from_16_bits(img: PIL.Image.Image) -> PIL.Image.Image:
    """Scales grey values from 0 to 65535 (for a TIFF: to the maximum of its bit depth) to 0 to 255."""
    tags = _tiff_tags(img)
    unsigned = ("PPM", "PNG") if img.mode == "I" else ("PPM", "PNG", "TIFF", "JPEG2000")
    if img.format not in unsigned:
        raise ValueError(f"mode {img.mode} of {img.format} has no defined white")
    white = 2 ** tags.get(258, (16,))[0] - 1  # BitsPerSample
    grey_HW = (np.asarray(img).astype(np.int64) * 255 + white // 2) // white
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        grey_HW = 255 - grey_HW
    return PIL.Image.fromarray(grey_HW.astype(np.uint8)).convert("RGB")


def _without_alpha(img: PIL.Image.Image) -> PIL.Image.Image:
    """Drops the alpha channel, as the ViT libraries do.

    If the colours are blank and only alpha has content, the image is composited on white or black.
    """
    straight = {"La": "LA", "RGBa": "RGBA"}.get(img.mode)
    rgba = (img.convert(straight) if straight else img).convert("RGBA")
    rgb = rgba.convert("RGB")
    extrema: tp.Any = rgba.getextrema()  # a pair for each band
    *colours, (low, high) = extrema
    if any(top - bottom >= FLAT for bottom, top in colours) or high - low < FLAT:
        return rgb
    is_dark = sum(top for _, top in colours) < 3 * 128
    ground = PIL.Image.new("RGBA", rgba.size, "white" if is_dark else "black")
    return PIL.Image.alpha_composite(ground, rgba).convert("RGB")
