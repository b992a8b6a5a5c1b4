"""Writes shard directories. A shard is complete once its acts000000.json exists."""

import collections.abc
import contextlib
import json
import os
import pathlib
import typing as tp

import beartype
import numpy as np
import xxhash
from jaxtyping import Float32, jaxtyped

from saev import errors, helpers
from saev.formats import jsonfile, records
from saev.formats.dtypes import encode
from saev.formats.metadata import Metadata
from saev.formats.pieces import Pieces
from saev.formats.shardfiles import MAX_BYTES, REMEDY, ShardFiles
from saev.formats.sidecar import Complete, Sidecar, Skipped

W = tp.TypeVar("W", bound="WritableShards")

SYNC_BYTES = 64 * 2**20
"""A shard is flushed to disk each time this many bytes were written, so that the final flush is short."""


class ShardWriter:
    """Writes the images of one shard in order."""

    def __init__(self, fd: tp.BinaryIO, metadata: Metadata):
        self.fd = fd
        self.dtype = metadata.dtype
        self.pieces = Pieces(metadata)
        self.sum = xxhash.xxh3_128()
        self.sums = bytearray()
        """Checksums of the pieces."""
        self.skipped: list[Skipped] = []
        self.sizes: list[tuple[int, int]] = []
        """(width, height) of each photo, if the dump has padding."""
        self.n_unsynced = 0

    @jaxtyped(typechecker=beartype.beartype)
    def write(self, acts_BLTD: Float32[np.ndarray, "B L T D"]) -> None:
        """Appends the activations of images."""
        stored = encode(acts_BLTD, self.dtype).data.cast("B")
        self.sum.update(stored)
        self.sums += self.pieces.sums(stored, range(len(acts_BLTD) * self.pieces.n_per_img))
        self.fd.write(stored)
        self.n_unsynced += len(stored)
        if self.n_unsynced >= SYNC_BYTES:
            self.fd.flush()
            os.fsync(self.fd.fileno())
            self.n_unsynced = 0


@beartype.beartype
class WritableShards(ShardFiles):
    """A shard directory that a dump writes."""

    @classmethod
    def create(
        cls: type[W],
        dump_to: pathlib.Path,
        metadata: Metadata,
        images: list[records.Record],
        transform: dict[str, object],
    ) -> W:
        """Creates the directory, or resumes an interrupted dump of the same images.

        Raises:
            UserError: the directory lists other images (the dataset changed) or another transform.
            OSError: it cannot be written.
        """
        shards = cls(dump_to / metadata.hash, metadata)
        if shards.shards_fpath.exists() and not shards.images_fpath.exists():
            raise errors.UserError(
                f"{shards.dpath}: was written by another tool. It can be read as it is. "
                "To dump it again, pass another --dump-to."
            )
        text = records.dumps(images)
        shards._write_once(shards.images_fpath, text, "other images than the dataset holds now")
        text = json.dumps(transform, indent=4)
        shards._write_once(shards.transform_fpath, text, "images transformed in another way")
        shards._write_once(shards.dpath / "metadata.json", metadata.dumps(), "another dataset")
        shards.write_index()
        return shards

    def _write_once(self, fpath: pathlib.Path, text: str, other: str) -> None:
        if not fpath.exists():
            helpers.write_text(fpath, text)
        elif jsonfile.read_bytes(fpath, REMEDY, MAX_BYTES) != text.encode():
            raise errors.UserError(
                f"{self.dpath}: was dumped from {other} ({fpath.name} differs). "
                "Move that directory away, or pass another --dump-to."
            )

    def has(self, shard_i: int) -> bool:
        """Whether this shard is complete."""
        return self.sidecar_fpath(shard_i).exists() and self.acts_fpath(shard_i).exists()

    @contextlib.contextmanager
    def writing(self, shard_i: int) -> collections.abc.Generator[ShardWriter]:
        """Yields a writer for all images of the shard, which appears when the block ends without an error.

        Raises:
            OSError: the shard cannot be written (no space, no permission).
        """
        fpath = self.acts_fpath(shard_i)
        helpers.sweep(self.dpath, fpath.name)  # what a killed writer left
        with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
            writer = ShardWriter(fd, self.metadata)
            yield writer
            assert fd.tell() == self.n_bytes(shard_i)
            fd.truncate(self.metadata.imgs_per_shard * self.metadata.img_bytes)  # pads the last shard
        sizes = " ".join(f"{width}x{height}" for width, height in writer.sizes)
        self._write_sums(shard_i, bytes(writer.sums), writer.sum.hexdigest(), writer.skipped, sizes)
        self.write_index()

    def _write_sums(
        self, shard_i: int, sums: bytes, xxh3_128: str, skipped: collections.abc.Iterable[Skipped], sizes: str
    ) -> None:
        with helpers.atomic(self.sums_fpath(shard_i)) as tmp_fpath:
            tmp_fpath.write_bytes(sums)
        sidecar = Sidecar(
            n_imgs=len(self.metadata.imgs_in(shard_i)),
            xxh3_128=xxh3_128,
            skipped=tuple(skipped),
            pieces=xxhash.xxh3_128_hexdigest(sums),
            files=self.tables,
            sizes=sizes,
        )
        helpers.write_text(self.sidecar_fpath(shard_i), sidecar.dumps())

    def write_index(self) -> None:
        """Writes shards.json from the complete shards and, when all are complete, also complete.json.

        Parallel writers may overwrite each other's index. Each checks again, so the last has seen all shards.
        """
        written = None
        while (found := self.complete_shards()) != written:
            if len(found) == self.metadata.n_shards:
                sidecars = {self.acts_fpath(i).name: self._upgraded(i) for i in found}
                helpers.write_text(self.complete_fpath, Complete.of(sidecars).dumps())
            index = [
                {"name": self.acts_fpath(i).name, "n_imgs": len(self.metadata.imgs_in(i))} for i in found
            ]
            helpers.write_text(self.shards_fpath, json.dumps(index, indent=2))
            written = found

    def _upgraded(self, shard_i: int) -> Sidecar:
        """Returns a shard's sidecar. A shard of an older dump first gets piece checksums."""
        fpath = self.sidecar_fpath(shard_i)
        sidecar = Sidecar.loads(fpath)
        if sidecar.pieces and self.sums_fpath(shard_i).exists():
            return sidecar
        sums, xxh3_128 = self.checksums(shard_i)
        if xxh3_128 != sidecar.xxh3_128:
            raise errors.UserError(
                f"{self.acts_fpath(shard_i)}: differs from its checksum. "
                f"Delete it and {fpath.name}, and run the same command again."
            )
        self._write_sums(shard_i, sums, xxh3_128, sidecar.skipped, sidecar.sizes)
        return Sidecar.loads(fpath)

    def finish(self) -> None:
        """Updates the index and removes what killed writers left."""
        self.write_index()
        helpers.sweep(self.dpath)
