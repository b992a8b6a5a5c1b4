"""Reads a gallery that visuals.py wrote (docs/gallery.md).

C rows (shown latents), M pictures, n images of a group, m patches with heat.
"""

import base64
import collections.abc
import functools
import io
import pathlib
import typing as tp

import msgspec
import numpy as np
import PIL.Image

from saev import errors
from saev.formats import scripts

FORMAT = 2
"""Of data/stats.js and the page. Raise it when an older page cannot show the data."""
FILES = 8
"""Files of latents, and of pictures, that are held at a time."""
WEBP = "data:image/webp;base64,"


class Scorer(msgspec.Struct):
    """What is shown."""

    name: str = ""
    kind: str = ""
    n: int = 0
    noun: str = "latent"
    fires: str = ""
    """A sentence that says when one fires on a patch."""
    sha256: str = ""


Size = tp.Annotated[int, msgspec.Meta(ge=1, le=2**16)]


class Source(msgspec.Struct):
    """The activations."""

    vit: str
    layer: int
    n_patches: int
    """Per image."""
    grid: tuple[Size, Size]
    size: tuple[Size, Size]
    data: str = ""
    n_images: int = 0
    transform: str = ""
    """What was done to the images, in words."""
    padded: bool = False
    """Whether some images have fewer patches (--resize pad or flexible)."""


class Shown(msgspec.Struct):
    """Which latents are shown."""

    filters: str = ""


class Files(msgspec.Struct):
    """Entries of a file, and the number of pictures."""

    latents: tp.Annotated[int, msgspec.Meta(ge=1)]
    images: tp.Annotated[int, msgspec.Meta(ge=1)]
    n_images: tp.Annotated[int, msgspec.Meta(ge=0)]


class Stats(msgspec.Struct):
    """data/stats.js."""

    title: str
    scorer: Scorer
    source: Source
    files: Files
    columns: dict[str, tp.Any]
    """Packed."""
    format: int = 1
    classes: list[str] = []
    shown: Shown = msgspec.field(default_factory=Shown)


class Group(msgspec.Struct):
    """A row's images of one kind. The fields after `words` are packed."""

    name: str
    words: str
    image: tp.Any
    value: tp.Any
    start: tp.Any
    patch: tp.Any
    heat: tp.Any


class Latent(msgspec.Struct):
    """A row's entry in data/latents."""

    low: float
    high: float
    groups: list[Group]
    neighbours: list[tuple[int, int, float]] = []
    """Row or -1, number and cosine."""
    together: list[tuple[int, int, float]] = []
    """Row or -1, number and share."""
    classes: list[tuple[int, int, float]] = []
    """Place in `Stats.classes`, images and lift."""


class _Latents(msgspec.Struct):
    latents: list[Latent]


class Paths(msgspec.Struct):
    """data/paths.js: of each picture, its path and, packed, its class and its image's number in the dump."""

    path: list[str]
    class_: tp.Any = msgspec.field(name="class")
    n: tp.Any = None


class Image(msgspec.Struct):
    """An entry in data/images."""

    src: str
    path: str = ""
    class_: int = msgspec.field(name="class", default=-1)
    """Place in `Stats.classes`, or -1."""
    grid: tuple[Size, Size] | None = None
    """None: that of `Source`."""


class _Images(msgspec.Struct):
    images: list[Image]


class Trait(msgspec.Struct):
    name: str


class Traits(msgspec.Struct):
    """data/traits.js. Empty until `protoeval.py --gallery` writes it."""

    traits: list[Trait] = []
    columns: dict[str, tp.Any] = {}
    """Packed: each row's best traits, and their AP on the train images."""


class Gallery:
    """A gallery's files.

    Args:
        remedy: one sentence that ends error messages.

    Raises:
        UserError: it is not a gallery, or is damaged (the file is named).
    """

    def __init__(self, dpath: pathlib.Path, remedy: str):
        self.dpath, self.remedy = dpath, remedy
        self.raw: dict[str, tp.Any] = scripts.read(dpath, "stats", remedy)
        try:
            self.stats = msgspec.convert(self.raw, Stats)
        except ValueError as err:
            message = f"{self._fpath('stats')}: cannot be read ({errors.first_line(err)}). {remedy}"
            raise errors.UserError(message) from err
        self.id_C = self.column("id").astype(np.int64)
        self._file = functools.lru_cache(FILES)(self._read_latents)
        self._images = functools.lru_cache(FILES)(self._read_images)

    def _fpath(self, name: str) -> pathlib.Path:
        return self.dpath / "data" / f"{name}.js"

    def unpack(self, value: object, name: str = "latents") -> np.ndarray:
        return scripts.unpacked(value, str(self._fpath(name)), self.remedy)

    def column(self, name: str) -> np.ndarray:
        """A column of stats.js, over all rows."""
        found_C = self.unpack(self.stats.columns.get(name), "stats")
        if name != "id" and len(found_C) != len(self.id_C):
            raise self.damaged("stats", f"{len(found_C)} rows of {name} instead of {len(self.id_C)}")
        return found_C

    def paths(self) -> Paths:
        """What is known of each picture."""
        found = scripts.read(self.dpath, "paths", self.remedy, Paths)
        if len(found.path) != self.stats.files.n_images:
            raise self.damaged("paths", f"{len(found.path)} pictures instead of {self.stats.files.n_images}")
        return found

    def traits(self) -> Traits:
        return scripts.read(self.dpath, "traits", self.remedy, Traits)

    def latent(self, row: int) -> Latent:
        """The entry of a row in data/latents."""
        file, place = divmod(row, self.stats.files.latents)
        return self._file(file)[place]

    def latents(self) -> collections.abc.Iterator[Latent]:
        """The entries of all rows."""
        return (self.latent(row) for row in range(len(self.id_C)))

    def picture(self, place: int) -> PIL.Image.Image:
        """The picture at a place in data/images."""
        found = self.image(place)
        try:
            data = base64.b64decode(found.src.removeprefix(WEBP), validate=True)
            return PIL.Image.open(io.BytesIO(data), formats=["WEBP"]).convert("RGB")
        except (ValueError, OSError, PIL.Image.DecompressionBombError) as err:
            name = f"images/{place // self.stats.files.images:03}"
            raise self.damaged(name, f"a picture that cannot be read ({errors.first_line(err)})") from err

    def grid(self, place: int) -> tuple[int, int]:
        """(rows, columns) of the patches of that picture."""
        return self.image(place).grid or self.stats.source.grid

    def image(self, place: int) -> Image:
        """The entry at a place in data/images."""
        if place >= self.stats.files.n_images:
            raise self.damaged("stats", f"{self.stats.files.n_images} pictures, but number {place} is shown")
        file, i = divmod(place, self.stats.files.images)
        found = self._images(file)
        if i >= len(found):
            raise self.damaged(f"images/{file:03}", f"{len(found)} pictures instead of more than {i}")
        return found[i]

    def _read_images(self, file: int) -> list[Image]:
        return scripts.read(self.dpath, f"images/{file:03}", self.remedy, _Images).images

    def _read_latents(self, file: int) -> list[Latent]:
        name, n = f"latents/{file:03}", self.stats.files.latents
        found = scripts.read(self.dpath, name, self.remedy, _Latents).latents
        if len(found) != (n_rows := min(n, len(self.id_C) - n * file)):
            raise self.damaged(name, f"{len(found)} rows instead of {n_rows}")
        return found

    def damaged(self, name: str, what: str) -> errors.UserError:
        return errors.UserError(f"{self._fpath(name)}: holds {what}. {self.remedy}")
