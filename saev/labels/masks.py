"""Reads segmentation masks: the class of each pixel of a photo.

Shape letters: H x W pixels of a photo.
"""

import collections.abc
import math
import pathlib
import typing as tp

import msgspec
import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import Int32

from saev import errors
from saev.data import pixels
from saev.formats import jsonfile, patchlabels, shards
from saev.labels import config

VOID = -1
"""A pixel without a class."""
MAX_BYTES = 2**32
"""Longest COCO file."""
Mask = Int32[np.ndarray, "H W"]


def open_source(cfg: config.Index | config.Coco) -> "Source":
    """Raises a UserError if there is no such folder or file, or if it cannot be read."""
    return Index(cfg) if isinstance(cfg, config.Index) else Coco(cfg)


# ---- index images ----


class Index:
    """One image file per photo, whose values are ids."""

    classes: dict[int, str] | None
    """Names by id. None: every id is a class, named by its number."""

    def __init__(self, cfg: config.Index):
        if not cfg.root:
            raise errors.UserError("--masks.root is missing: pass the folder of the masks.")
        self.cfg = cfg
        self.root = pathlib.Path(cfg.root)
        if not self.root.is_dir():
            raise errors.UserError(
                f"--masks.root {self.root}: no such directory. Pass the folder of the masks."
            )
        names = _names(pathlib.Path(cfg.names)) if cfg.names else None
        self.classes = names and {i: name for i, name in names.items() if i not in cfg.ignore}

    def where(self, record: shards.Record) -> str:
        """Where the mask of a photo should be, for messages."""
        return str(self._fpath(record))

    def _fpath(self, record: shards.Record) -> pathlib.Path:
        return self.root / (str(pathlib.PurePosixPath(record.path).with_suffix("")) + self.cfg.suffix)

    def of(self, record: shards.Record, size: tuple[int, int]) -> Mask | None:
        """The mask of a photo of `size` (width, height). None: there is none.

        Raises:
            UserError: the mask cannot be read, or does not fit the photo or the classes.
        """
        fpath = self._fpath(record)
        if not fpath.exists():
            return None
        mask_HW = read_index(fpath)
        if mask_HW.shape != size[::-1]:
            raise errors.UserError(
                f"{fpath}: has {mask_HW.shape[1]} x {mask_HW.shape[0]} pixels, but {record.path} has "
                f"{size[0]} x {size[1]}. Pass the masks of these images."
            )
        found = set(np.unique(mask_HW).tolist())
        if self.classes is not None and (unknown := sorted(found - {*self.classes, *self.cfg.ignore})):
            raise errors.UserError(
                f"{fpath}: has the id {unknown[0]}, which {self.cfg.names} does not name. Add it there, or "
                f"pass --masks.ignore {unknown[0]}."
            )
        if max(found - {*self.cfg.ignore}, default=0) > patchlabels.MAX_ID:
            raise errors.UserError(f"{fpath}: has the id {max(found)}, above the limit of 65,534. Change it.")
        for ignored in found & {*self.cfg.ignore}:
            mask_HW[mask_HW == ignored] = VOID
        return mask_HW

    def made(self) -> dict[str, tp.Any]:
        """Where the masks come from."""
        return {"masks": "index", "root": self.cfg.root, "ignore": list(self.cfg.ignore)}


def read_index(fpath: pathlib.Path) -> Mask:
    """Pixel values of a one-channel image; of a palette image, the indices.

    Raises:
        UserError: it cannot be read, or has colours.
    """
    try:
        with PIL.Image.open(fpath, formats=pixels.formats()) as img:
            if img.width * img.height > pixels.MAX_PIXELS:
                raise ValueError(f"{img.width} x {img.height} pixels")
            if img.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
                raise errors.UserError(
                    f"{fpath}: its pixels are colours ({img.mode}), not ids. Convert it to an image with one "
                    "number per pixel."
                )
            mask_HW = np.array(img, np.int32)
    except errors.UserError:
        raise
    except Exception as err:  # Pillow's plugins raise a dozen types for malformed bytes
        is_unknown = isinstance(err, PIL.UnidentifiedImageError)
        reason = "not an image format that Pillow decodes" if is_unknown else errors.first_line(err)
        raise errors.UserError(f"{fpath}: cannot be read as a mask ({reason}). Replace it.") from err
    if mask_HW.size and mask_HW.min() < 0:
        raise errors.UserError(f"{fpath}: has negative ids. Replace it.")
    return mask_HW


def _names(fpath: pathlib.Path) -> dict[int, str]:
    """Reads names by id: a JSON object in either direction, or lines of an id and a name.

    Tabs, semicolons, commas or spaces divide a line: the id is first, the name last. A first line that does
    not start with a number is a heading (ADE20K's objectInfo150.txt).

    Raises:
        UserError: the file is missing, a line has no id, or two names have one id.
    """
    try:
        text = jsonfile.read_bytes(fpath, "Pass a file of ids and names.").decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise errors.UserError(
            f"--masks.names {fpath}: cannot be read ({errors.first_line(err)}). Pass a file of ids and names."
        ) from err
    pairs = _json_names(fpath, text) if text.lstrip().startswith("{") else _line_names(fpath, text)
    out: dict[int, str] = {}
    for number, name in pairs:
        if not 0 <= number <= patchlabels.MAX_ID:
            raise errors.UserError(
                f"{fpath}: id {number} is not between 0 and 65,534. Change it here and in the masks."
            )
        if out.setdefault(number, name) != name:
            raise errors.UserError(f"{fpath}: id {number} has two names ({out[number]}, {name}). Keep one.")
    if not out:
        raise errors.UserError(f"{fpath}: names no class. Pass lines of an id and a name.")
    return out


def _json_names(fpath: pathlib.Path, text: str) -> list[tuple[int, str]]:
    found = jsonfile.parse(text, dict[str, str | int], str(fpath), "Pass a file of ids and names.")
    if all(isinstance(value, int) for value in found.values()):
        return [(int(value), key) for key, value in found.items()]
    if bad := [key for key in found if not key.isdecimal()]:
        raise errors.UserError(f'{fpath}: {bad[0]!r} is not an id. Pass an object such as {{"1": "wall"}}.')
    return [(int(key), str(value)) for key, value in found.items()]


def _line_names(fpath: pathlib.Path, text: str) -> collections.abc.Iterator[tuple[int, str]]:
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        mark = next((mark for mark in "\t;," if mark in line), None)
        parts = [part.strip() for part in line.split(mark)] if mark else line.strip().split(maxsplit=1)
        if len(parts) > 1 and parts[0].isdecimal() and parts[-1]:
            yield int(parts[0]), parts[-1]
        elif i > 1:
            raise errors.UserError(f"{fpath}:{i}: {line.strip()!r} is not an id and a name.")


# ---- COCO ----


class _Image(msgspec.Struct):
    id: int
    file_name: str
    width: int
    height: int


class _Category(msgspec.Struct):
    id: int
    name: str


class _Runs(msgspec.Struct):
    """Uncompressed run lengths, column by column, background first."""

    size: tuple[int, int]
    counts: list[int] | str


class _Annotation(msgspec.Struct):
    image_id: int
    category_id: int
    segmentation: list[list[float]] | _Runs


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class Coco:
    """Polygons and uncompressed run lengths of a COCO-style file. Pixels without any are background."""

    def __init__(self, cfg: config.Coco):
        if not cfg.file:
            raise errors.UserError("--masks.file is missing: pass the JSON file with the polygons.")
        self.fpath = fpath = pathlib.Path(cfg.file)
        try:
            data = jsonfile.read_bytes(fpath, "Pass a COCO-style JSON file.", MAX_BYTES)
        except OSError as err:
            raise errors.UserError(
                f"--masks.file {fpath}: cannot be read ({err.strerror}). Pass a COCO-style JSON file."
            ) from err
        try:
            found = msgspec.json.decode(data, type=_File)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as err:
            raise errors.UserError(
                f"{fpath}: is not a COCO-style file ({errors.first_line(err)}). Pass one with images, "
                "annotations and categories."
            ) from err
        names = {category.id: category.name for category in found.categories}
        if bad := [i for i in names if not 0 <= i <= patchlabels.MAX_ID]:
            raise errors.UserError(f"{fpath}: category id {bad[0]} is not between 0 and 65,534. Change it.")
        self.background = next(i for i in range(len(names) + 1) if i not in names)
        self.classes = {self.background: "background", **names}
        self.images = {image.file_name: image for image in found.images}
        by_name: dict[str, list[_Image]] = {}
        for image in found.images:
            by_name.setdefault(pathlib.PurePosixPath(image.file_name).name, []).append(image)
        self.by_name = {name: images[0] for name, images in by_name.items() if len(images) == 1}
        self.of_image: dict[int, list[_Annotation]] = {}
        for annotation in found.annotations:
            if annotation.category_id not in names:
                raise errors.UserError(
                    f"{fpath}: an annotation of image {annotation.image_id} has category "
                    f"{annotation.category_id}, which `categories` does not name. Add it there."
                )
            self.of_image.setdefault(annotation.image_id, []).append(annotation)

    def where(self, record: shards.Record) -> str:
        return f"{record.path} in `images` of {self.fpath}"

    def of(self, record: shards.Record, size: tuple[int, int]) -> Mask | None:
        """As `Index.of`. Finds an image by its whole path, else by its file name if only one image has it."""
        image = self.images.get(record.path) or self.by_name.get(pathlib.PurePosixPath(record.path).name)
        if image is None:
            return None
        if (image.width, image.height) != size:
            raise errors.UserError(
                f"{self.fpath}: {image.file_name} has {image.width} x {image.height} pixels there, but the "
                f"photo has {size[0]} x {size[1]}. Pass the file of these images."
            )
        mask_HW = np.full(size[::-1], self.background, np.int32)
        parts = [(self._drawn(a, image), a.category_id) for a in self.of_image.get(image.id, [])]
        for is_in_HW, category in sorted(parts, key=lambda part: -int(part[0].sum())):
            mask_HW[is_in_HW] = category
        return mask_HW

    def _drawn(self, annotation: _Annotation, image: _Image) -> np.ndarray:
        """(H, W) bool: the pixels of an annotation."""
        shape, where = annotation.segmentation, f"{self.fpath}: an annotation of {image.file_name}"
        if isinstance(shape, _Runs):
            if isinstance(shape.counts, str):
                raise errors.UserError(
                    f"{where} has compressed run lengths. Write polygons or index images instead."
                )
            if sum(shape.counts) != image.width * image.height or min(shape.counts, default=0) < 0:
                raise errors.UserError(f"{where} has run lengths that do not fill the image. Correct it.")
            is_in = np.repeat(np.arange(len(shape.counts)) % 2 == 1, shape.counts)
            return is_in.reshape(image.width, image.height).T
        canvas = PIL.Image.new("1", (image.width, image.height))
        pen = PIL.ImageDraw.Draw(canvas)
        for polygon in shape:
            if len(polygon) < 6 or len(polygon) % 2 or not all(map(math.isfinite, polygon)):
                raise errors.UserError(f"{where} has a polygon of {len(polygon)} numbers. Pass x y pairs.")
            pen.polygon(polygon, fill=1)
        return np.array(canvas)

    def made(self) -> dict[str, tp.Any]:
        return {"masks": "coco", "file": str(self.fpath)}


Source = Index | Coco
"""Masks of many photos."""
