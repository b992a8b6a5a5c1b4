"""Shards of codes: folders of raw little-endian arrays and shard.json, which has their lengths and checksums.

A shard holds the codes of consecutive images. It appears at once when it is complete, so a killed writer goes
on with the shards that are missing. `python -m saev.codes` writes them for others (`codes`), galleries and
comparisons for themselves (`saev.data.passes`).

Codes of a kind, such as "patch", are CSR arrays: patch_starts, patch_latents, patch_values. Without starts
and latents they are dense.

Shape letters: R rows (patches, image after image), K latents, n codes.
"""

import collections.abc
import contextlib
import functools
import logging
import os
import pathlib
import shutil
import typing as tp

import msgspec
import numpy as np
import xxhash

from saev import errors, helpers
from saev.formats import jsonfile

logger = logging.getLogger("saev")

STARTS, LATENTS, VALUES = np.dtype("<i8"), np.dtype("<i4"), np.dtype("<f4")
WRITTEN = 2**24
"""Bytes that are hashed and written at a time."""
N_OPEN = 8
"""Arrays of a folder that are mapped at a time, each with an open file."""


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

    def kept(self, is_kept_n: np.ndarray) -> "Csr":
        """Only the marked codes."""
        if is_kept_n.all():
            return self
        before_n1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept_n)])
        return Csr(before_n1[self.start_R1], self.latent_n[is_kept_n], self.value_n[is_kept_n])

    def of_rows(self, is_kept_R: np.ndarray | None) -> "Csr":
        """The same rows, without the codes of those that are not marked. None: with all."""
        return self if is_kept_R is None else self.kept(np.repeat(is_kept_R, np.diff(self.start_R1)))

    @staticmethod
    def joined(parts: list["Csr"], dtype: np.dtype) -> "Csr":
        """The rows of all parts. dtype: of the values if there are none."""
        if len(parts) == 1:
            return parts[0]
        ends = np.cumsum([0, *(len(part.latent_n) for part in parts)]).tolist()
        starts = [part.start_R1[1:] + end for part, end in zip(parts, ends, strict=False)]
        return Csr(
            np.concatenate([np.zeros(1, np.int64), *starts]),
            np.concatenate([np.empty(0, np.int32), *(part.latent_n for part in parts)]),
            np.concatenate([np.empty(0, dtype), *(part.value_n for part in parts)]),
        )


def csr(kind: str) -> dict[str, np.dtype]:
    """Name -> type of the arrays that say where the codes of a kind are."""
    return {f"{kind}_starts": STARTS, f"{kind}_latents": LATENTS}


class ShardWriter:
    """Writes the arrays of one shard, block by block."""

    def __init__(self, dpath: pathlib.Path, dtypes: dict[str, np.dtype]):
        self.dtypes = dtypes
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
        """Appends the places of codes to the CSR arrays of `kind`."""
        n_before = self.lengths[f"{kind}_latents"]
        if not self.lengths[f"{kind}_starts"]:
            self.add(f"{kind}_starts", np.zeros(1, STARTS))
        self.add(f"{kind}_starts", start_R1[1:].astype(STARTS) + n_before)
        self.add(f"{kind}_latents", latent_n)

    def add_codes(self, kind: str, rows: Csr) -> None:
        self.add_rows(kind, rows.start_R1, rows.latent_n)
        self.add(f"{kind}_values", rows.value_n)

    def close(self) -> dict[str, Array]:
        """Flushes the arrays to disk and describes them."""
        for fd in self.files.values():
            fd.flush()
            os.fsync(fd.fileno())
            fd.close()
        return {name: Array(self.lengths[name], self.sums[name].hexdigest()) for name in self.files}


class Shards:
    """The shards of a folder.

    Args:
        dtypes: name -> type of each array of a shard.
        command: what the user runs again if a shard is damaged.
    """

    def __init__(
        self, dpath: pathlib.Path, n_imgs: int, imgs_per_shard: int, dtypes: dict[str, np.dtype], command: str
    ):
        self.dpath, self.n_imgs, self.imgs_per_shard = dpath, n_imgs, imgs_per_shard
        self.dtypes, self.command = dtypes, command
        self.sidecar = functools.cache(self._sidecar)
        self.array = functools.lru_cache(N_OPEN)(self._array)
        self._checked: set[tuple[int, str]] = set()

    def __len__(self) -> int:
        return len(range(0, self.n_imgs, self.imgs_per_shard))

    def imgs_in(self, shard_i: int) -> range:
        """Positions of a shard's images."""
        start = shard_i * self.imgs_per_shard
        return range(start, min(start + self.imgs_per_shard, self.n_imgs))

    def parts(self, imgs: range, n: int = 2**62) -> list[range]:
        """Divides consecutive images into ranges of at most n, each within a shard."""
        starts = range(imgs.start - imgs.start % self.imgs_per_shard, imgs.stop, self.imgs_per_shard)
        mine = (range(max(a, imgs.start), min(a + self.imgs_per_shard, imgs.stop)) for a in starts)
        return [part[at : at + n] for part in mine for at in range(0, len(part), n)]

    def dpath_of(self, shard_i: int) -> pathlib.Path:
        return self.dpath / f"shard{shard_i:06}"

    def missing(self) -> list[int]:
        """Numbers of the shards that are not complete."""
        return [i for i in range(len(self)) if not (self.dpath_of(i) / "shard.json").exists()]

    def remove_damaged(self) -> None:
        """Compares all complete shards with their checksums. Removes those that differ, with a warning."""
        complete = sorted(set(range(len(self))).difference(self.missing()))
        for shard_i in helpers.progress(complete, "check", len(complete), "shards"):
            try:
                for name in self.dtypes:
                    self.array(shard_i, name)
            except errors.UserError:
                logger.warning("%s: was changed (checksum); it is encoded again", self.dpath_of(shard_i))
                for cached in (self.array.cache_clear, self.sidecar.cache_clear, self._checked.clear):
                    cached()
                shutil.rmtree(self.dpath_of(shard_i))

    @contextlib.contextmanager
    def writing(self, shard_i: int) -> collections.abc.Generator[ShardWriter]:
        """Yields a writer for a shard, which appears when the block ends without an error.

        Raises:
            OSError: it cannot be written (no space, no permission).
        """
        with helpers.atomic_folder(self.dpath_of(shard_i)) as tmp_dpath:
            writer = ShardWriter(tmp_dpath, self.dtypes)
            try:
                yield writer
            except BaseException:
                for fd in writer.files.values():
                    with contextlib.suppress(OSError):  # the disk may be full
                        fd.close()
                raise
            sidecar = Sidecar(len(self.imgs_in(shard_i)), writer.close())
            helpers.write_text(tmp_dpath / "shard.json", jsonfile.seal(msgspec.to_builtins(sidecar)))

    def _sidecar(self, shard_i: int) -> Sidecar:
        """A shard's lengths and checksums.

        Raises:
            UserError: shard.json is missing or damaged, or does not fit the folder.
        """
        fpath, again = self.dpath_of(shard_i) / "shard.json", self._again(shard_i)
        try:
            found: Sidecar = jsonfile.read_sealed(fpath, Sidecar, again)
        except FileNotFoundError as err:
            raise errors.UserError(f"{fpath}: is missing. {again}") from err
        if found.n_imgs != len(self.imgs_in(shard_i)) or found.arrays.keys() != self.dtypes.keys():
            raise errors.UserError(f"{fpath}: does not fit its folder. {again}")
        return found

    def _again(self, shard_i: int) -> str:
        return f"Delete {self.dpath_of(shard_i)} and run the same {self.command} again."

    def _array(self, shard_i: int, name: str) -> np.ndarray:
        """An array of a shard, memory-mapped. It is compared with its checksum when it is first used.

        Raises:
            UserError: it is missing, or was truncated or changed.
        """
        fpath, dtype = self.dpath_of(shard_i) / f"{name}.bin", self.dtypes[name]
        want, again = self.sidecar(shard_i).arrays[name], self._again(shard_i)
        try:
            n_bytes, n_wanted = fpath.stat().st_size, want.length * dtype.itemsize
            if n_bytes != n_wanted:
                raise errors.UserError(f"{fpath}: is {n_bytes:,} bytes long instead of {n_wanted:,}. {again}")
            values = np.asarray(np.memmap(fpath, dtype, "r")) if n_bytes else np.empty(0, dtype)
        except FileNotFoundError as err:
            raise errors.UserError(f"{fpath}: is missing. {again}") from err
        if (shard_i, name) not in self._checked and xxhash.xxh3_128_hexdigest(values.data) != want.xxh3_128:
            raise errors.UserError(f"{fpath}: was changed after it was written (checksum). {again}")
        self._checked.add((shard_i, name))
        return values

    def rows(self, kind: str, values: str, n_rows: int, imgs: range) -> Csr:
        """Codes of images of one shard, copied to memory.

        Args:
            kind: such as "patch" or "image".
            values: name of the array of values.
            n_rows: rows of an image.
            imgs: positions of consecutive images of one shard.
        """
        shard_i = imgs.start // self.imgs_per_shard
        first, last = ((i - self.imgs_in(shard_i).start) * n_rows for i in (imgs.start, imgs.stop))
        value_n = self.array(shard_i, values)
        if f"{kind}_starts" not in self.dtypes:  # dense
            K = len(value_n) // (n_rows * len(self.imgs_in(shard_i)))
            start_R1 = np.arange(0, (last - first) * K + 1, K, dtype=np.int64)
            latent_n = np.tile(np.arange(K, dtype=LATENTS), last - first)
            return Csr(start_R1, latent_n, value_n[first * K : last * K].copy())
        start_R1 = self.array(shard_i, f"{kind}_starts")[first : last + 1]
        part = slice(int(start_R1[0]), int(start_R1[-1]))
        latent_n = self.array(shard_i, f"{kind}_latents")[part]
        return Csr(start_R1 - start_R1[0], latent_n.copy(), value_n[part].copy())
