"""The folder that `python -m saev.codes` writes (docs/codes.md): metadata.json, images.jsonl, and shards of
codes (`codeshards`).
"""

import collections.abc
import pathlib
import typing as tp

import msgspec
import numpy as np
import xxhash

from saev import errors, helpers
from saev.formats import codeshards, jsonfile

SCHEMA = 1
AGAIN = "Delete it and run `python -m saev.codes` again."
Layout = tp.Literal["csr", "dense"]


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the codes are of. A new field needs a default, at which it does not change the folder's name."""

    scorer: str
    """Path of the scorer, as it was given."""
    digest: str
    """Hash of everything in the scorer that affects codes."""
    activations: str
    """Hash of the activations and of their images' order."""
    vit_family: str
    vit_ckpt: str
    layer: int
    patches: str
    n_latents: int
    n_imgs: int
    n_patches: int
    """Rows of an image: its patches, and [CLS] first where it was asked for."""
    imgs_per_shard: int
    dtype: tp.Literal["float16", "float32"]
    layout: Layout
    """Of the patches' codes."""
    image_layout: Layout
    top_n: int
    """Codes kept for each patch. 0: all."""
    schema: int = SCHEMA

    @property
    def hash(self) -> str:
        """The folder's name: a hash of all except the scorer's path."""
        return helpers.hash_of(msgspec.to_builtins(self) | {"scorer": "", "schema": self.schema})[:16]

    def arrays(self) -> dict[str, np.dtype]:
        """Name -> type of each array of a shard."""
        out = {}
        for kind, layout in (("patch", self.layout), ("image", self.image_layout)):
            if layout == "csr":
                out |= codeshards.csr(kind)
            names = ("patch_values",) if kind == "patch" else ("image_max", "image_mean")
            dtype = np.dtype(self.dtype if kind == "patch" else "float32").newbyteorder("<")
            out |= dict.fromkeys(names, dtype)
        return out


class Image(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of images.jsonl."""

    image_i: int
    """Number of the image in the dump."""
    path: str
    label: str
    grid: tuple[int, int] | None = None
    """Rows and columns of its patches, in a dump with --resize pad or flexible."""
    shown: tuple[int, int, int, int] | None = None
    """There too: first row, row after the last, first column and column after the last of the patches that
    show the photo. The others are padding and have no codes."""


def create(
    dump_to: pathlib.Path, metadata: Metadata, images: collections.abc.Iterable[Image]
) -> pathlib.Path:
    """Creates the folder of codes, unless it is there, and returns it.

    Raises:
        OSError: it cannot be written.
    """
    dpath = dump_to / metadata.hash
    dpath.mkdir(parents=True, exist_ok=True)
    helpers.sweep(dpath)
    if not (dpath / "metadata.json").exists():
        text = "".join(jsonfile.dumps(image) + "\n" for image in images)
        helpers.write_text(dpath / "images.jsonl", text)
        sums = {"images": xxhash.xxh3_128_hexdigest((dpath / "images.jsonl").read_bytes())}
        helpers.write_text(dpath / "metadata.json", jsonfile.seal(msgspec.structs.asdict(metadata) | sums))
    return dpath


def shards(dpath: pathlib.Path, metadata: Metadata) -> codeshards.Shards:
    """The shards of a folder."""
    return codeshards.Shards(
        dpath, metadata.n_imgs, metadata.imgs_per_shard, metadata.arrays(), "`python -m saev.codes`"
    )


class _Sealed(Metadata, frozen=True, forbid_unknown_fields=True, kw_only=True):
    images: str
    """XXH3-128 of images.jsonl."""


def read_metadata(dpath: pathlib.Path) -> Metadata:
    """Reads metadata.json.

    Raises:
        UserError: the folder holds no codes, or those of a newer version, or the file is damaged.
    """
    return _sealed(dpath)


def _sealed(dpath: pathlib.Path) -> _Sealed:
    fpath = dpath / "metadata.json"
    try:
        found = jsonfile.read_sealed(fpath, _Sealed, AGAIN)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise errors.UserError(
            f"{dpath}: holds no codes (metadata.json is missing). Pass the folder that "
            "`python -m saev.codes` printed."
        ) from err
    if found.schema != SCHEMA:
        raise errors.UserError(f"{fpath}: schema {found.schema} is unknown. Use the saev that wrote it.")
    return found


def read_images(dpath: pathlib.Path) -> list[Image]:
    """Reads images.jsonl: the images in the order of the rows.

    Raises:
        UserError: it is missing or was changed.
    """
    fpath = dpath / "images.jsonl"
    try:
        data = jsonfile.read_bytes(fpath, AGAIN, 2**34)
    except FileNotFoundError as err:
        raise errors.UserError(f"{fpath}: is missing. {AGAIN}") from err
    if xxhash.xxh3_128_hexdigest(data) != _sealed(dpath).images:
        raise errors.UserError(f"{fpath}: was changed after it was written (checksum). {AGAIN}")
    return [msgspec.json.decode(line, type=Image) for line in data.splitlines()]
