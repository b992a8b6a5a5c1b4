"""A folder of codes (docs/codes.md): metadata.json, images.jsonl, and shards of consecutive images.

A shard is a folder of raw little-endian arrays and shard.json, which has their lengths and checksums. It
appears at once when it is complete.

Shape letters: N images, R rows (patches, image after image), K latents, n codes.
"""

import collections.abc
import contextlib
import functools
import os
import pathlib
import typing as tp

import msgspec
import numpy as np
import xxhash

from saev import errors, helpers
from saev.formats import jsonfile

SCHEMA = 1
AGAIN = "Delete it and run `python -m saev.codes` again."
Layout = tp.Literal["csr", "dense"]
STARTS, LATENTS = np.dtype("<i8"), np.dtype("<i4")
WRITTEN = 2**24
"""Bytes that are hashed and written at a time."""


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the codes are of."""

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
        return helpers.hash_of(msgspec.structs.asdict(self) | {"scorer": ""})[:16]

    @property
    def n_shards(self) -> int:
        return -(-self.n_imgs // self.imgs_per_shard)

    def imgs_in(self, shard_i: int) -> range:
        """Positions of a shard's images."""
        start = shard_i * self.imgs_per_shard
        return range(start, min(start + self.imgs_per_shard, self.n_imgs))

    def arrays(self) -> dict[str, np.dtype]:
        """Name -> type of each array of a shard."""
        out = {}
        for kind, layout in (("patch", self.layout), ("image", self.image_layout)):
            if layout == "csr":
                out |= {f"{kind}_starts": STARTS, f"{kind}_latents": LATENTS}
            names = ("patch_values",) if kind == "patch" else ("image_max", "image_mean")
            dtype = np.dtype(self.dtype if kind == "patch" else "float32").newbyteorder("<")
            out |= dict.fromkeys(names, dtype)
        return out


class Image(msgspec.Struct, frozen=True):
    """One line of images.jsonl."""

    image_i: int
    """Number of the image in the dump."""
    path: str
    label: str


class Array(msgspec.Struct, frozen=True):
    length: tp.Annotated[int, msgspec.Meta(ge=0)]
    """Number of values."""
    xxh3_128: str


class Sidecar(msgspec.Struct, frozen=True):
    """shard.json."""

    n_imgs: int
    arrays: dict[str, Array]


class Csr(tp.NamedTuple):
    """Codes of consecutive rows. Row r has the codes start[r] to start[r + 1], sorted by latent."""

    start_R1: np.ndarray
    latent_n: np.ndarray
    value_n: np.ndarray


# ---- writing ----


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


def shard_dpath(dpath: pathlib.Path, shard_i: int) -> pathlib.Path:
    return dpath / f"shard{shard_i:06}"


class ShardWriter:
    """Writes the arrays of one shard, block by block."""

    def __init__(self, dpath: pathlib.Path, metadata: Metadata):
        self.dtypes = metadata.arrays()
        self.files = {name: (dpath / f"{name}.bin").open("wb") for name in self.dtypes}
        self.sums = {name: xxhash.xxh3_128() for name in self.dtypes}
        self.lengths = dict.fromkeys(self.dtypes, 0)

    def add(self, name: str, values: np.ndarray) -> None:
        """Appends values to an array, row after row."""
        data = np.ascontiguousarray(values, self.dtypes[name]).reshape(-1)
        self.lengths[name] += len(data)
        for part in np.split(data, range(WRITTEN // data.itemsize, len(data), WRITTEN // data.itemsize)):
            self.sums[name].update(part.data)
            self.files[name].write(part.data)

    def add_rows(self, kind: str, start_R1: np.ndarray, latent_n: np.ndarray) -> None:
        """Appends the places of codes to the CSR arrays of `kind` ("patch" or "image")."""
        n_before = self.lengths[f"{kind}_latents"]
        if not self.lengths[f"{kind}_starts"]:
            self.add(f"{kind}_starts", np.zeros(1, STARTS))
        self.add(f"{kind}_starts", start_R1[1:].astype(STARTS) + n_before)
        self.add(f"{kind}_latents", latent_n)

    def close(self) -> dict[str, Array]:
        """Flushes the arrays to disk and describes them."""
        for fd in self.files.values():
            fd.flush()
            os.fsync(fd.fileno())
            fd.close()
        return {name: Array(self.lengths[name], self.sums[name].hexdigest()) for name in self.files}


@contextlib.contextmanager
def writing(dpath: pathlib.Path, metadata: Metadata, shard_i: int) -> collections.abc.Generator[ShardWriter]:
    """Yields a writer for a shard, which appears when the block ends without an error.

    Raises:
        OSError: it cannot be written (no space, no permission).
    """
    with helpers.atomic_folder(shard_dpath(dpath, shard_i)) as tmp_dpath:
        writer = ShardWriter(tmp_dpath, metadata)
        try:
            yield writer
        except BaseException:
            for fd in writer.files.values():
                with contextlib.suppress(OSError):  # the disk may be full
                    fd.close()
            raise
        sidecar = Sidecar(len(metadata.imgs_in(shard_i)), writer.close())
        helpers.write_text(tmp_dpath / "shard.json", jsonfile.seal(msgspec.to_builtins(sidecar)))


# ---- reading ----


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


def missing(dpath: pathlib.Path, metadata: Metadata) -> list[int]:
    """Numbers of the shards that are not complete."""
    return [i for i in range(metadata.n_shards) if not (shard_dpath(dpath, i) / "shard.json").exists()]


class Shard:
    """Reads one shard. Each array is compared with its checksum when it is first used.

    Raises:
        UserError: shard.json is damaged, or does not fit the metadata.
    """

    def __init__(self, dpath: pathlib.Path, metadata: Metadata, shard_i: int):
        self.dpath, self.metadata = shard_dpath(dpath, shard_i), metadata
        self.n_imgs = len(metadata.imgs_in(shard_i))
        self.again = f"Delete {self.dpath} and run the same `python -m saev.codes` again."
        fpath = self.dpath / "shard.json"
        try:
            self.sidecar: Sidecar = jsonfile.read_sealed(fpath, Sidecar, self.again)
        except FileNotFoundError as err:
            raise errors.UserError(f"{fpath}: is missing. {self.again}") from err
        if self.sidecar.n_imgs != self.n_imgs or self.sidecar.arrays.keys() != metadata.arrays().keys():
            raise errors.UserError(f"{fpath}: does not fit metadata.json. {self.again}")
        self.array = functools.cache(self._array)

    def _array(self, name: str) -> np.ndarray:
        """A checked array, memory-mapped.

        Raises:
            UserError: it is missing, or was truncated or changed.
        """
        fpath, dtype = self.dpath / f"{name}.bin", self.metadata.arrays()[name]
        want = self.sidecar.arrays[name]
        try:
            n_bytes, n_wanted = fpath.stat().st_size, want.length * dtype.itemsize
            if n_bytes != n_wanted:
                raise errors.UserError(
                    f"{fpath}: is {n_bytes:,} bytes long instead of {n_wanted:,}. {self.again}"
                )
            values = np.memmap(fpath, dtype, "r") if n_bytes else np.empty(0, dtype)
        except FileNotFoundError as err:
            raise errors.UserError(f"{fpath}: is missing. {self.again}") from err
        if xxhash.xxh3_128_hexdigest(values.data) != want.xxh3_128:
            raise errors.UserError(f"{fpath}: was changed after it was written (checksum). {self.again}")
        return values

    def rows(self, kind: str, values: str, first: int, last: int) -> Csr:
        """Codes of rows first ... last - 1.

        Args:
            kind: "patch" or "image".
            values: name of the array of values.
        """
        layout = self.metadata.layout if kind == "patch" else self.metadata.image_layout
        K = self.metadata.n_latents
        if layout == "dense":
            start_R1 = np.arange(0, (last - first) * K + 1, K, dtype=np.int64)
            latent_n = np.tile(np.arange(K, dtype=LATENTS), last - first)
            return Csr(start_R1, latent_n, self.array(values)[first * K : last * K])
        start_R1 = self.array(f"{kind}_starts")[first : last + 1]
        part = slice(int(start_R1[0]), int(start_R1[-1]))
        return Csr(start_R1 - start_R1[0], self.array(f"{kind}_latents")[part], self.array(values)[part])
