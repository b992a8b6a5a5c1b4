"""The files of one shard directory: names, sizes and checksums."""

import collections.abc
import functools
import os
import pathlib
import stat

import beartype
import xxhash

from saev.formats import jsonfile
from saev.formats.metadata import Metadata
from saev.formats.pieces import Pieces

READ_BYTES = 2**20
"""Approximate size of the portions in which a whole shard is read."""
MAX_BYTES = 2**34
"""Largest images.jsonl."""
REMEDY = "Run the same `python -m saev.data` command again; it continues."
TABLES = ("images.jsonl", "transform.json", "metadata.json")
"""The files about all images. metadata.json is written last and makes the directory a shard directory."""


@beartype.beartype
class ShardFiles:
    """Paths and bytes of a shard directory."""

    def __init__(self, dpath: pathlib.Path, metadata: Metadata):
        self.dpath = dpath
        self.metadata = metadata
        self.pieces = Pieces(metadata)
        self.shards_fpath = dpath / "shards.json"
        self.images_fpath = dpath / "images.jsonl"
        self.transform_fpath = dpath / "transform.json"
        self.complete_fpath = dpath / "complete.json"

    def acts_fpath(self, shard_i: int) -> pathlib.Path:
        return self.dpath / f"acts{shard_i:06}.bin"

    def sums_fpath(self, shard_i: int) -> pathlib.Path:
        return self.dpath / f"acts{shard_i:06}.xxh3"

    def sidecar_fpath(self, shard_i: int) -> pathlib.Path:
        return self.dpath / f"acts{shard_i:06}.json"

    @functools.cached_property
    def tables(self) -> dict[str, str]:
        """XXH3 (128 bits, hex) of each existing file of TABLES."""
        return {
            name: xxhash.xxh3_128_hexdigest(jsonfile.read_bytes(self.dpath / name, REMEDY, MAX_BYTES))
            for name in TABLES
            if (self.dpath / name).exists()
        }

    def n_bytes(self, shard_i: int) -> int:
        """Returns the size of a shard's images, without padding."""
        return len(self.metadata.imgs_in(shard_i)) * self.metadata.img_bytes

    def n_pieces(self, shard_i: int) -> int:
        return len(self.metadata.imgs_in(shard_i)) * self.pieces.n_per_img

    def size_problem(self, shard_i: int) -> str | None:
        """Describes why a shard file is missing, unreadable or too short; None if it is fine."""
        fpath, n_bytes = self.acts_fpath(shard_i), self.n_bytes(shard_i)
        try:
            info = fpath.stat()
        except FileNotFoundError:
            return f"{fpath} is missing"
        except OSError as err:
            return f"{fpath} cannot be read ({err.strerror})"
        if not stat.S_ISREG(info.st_mode):
            return f"{fpath} is not a regular file"
        if info.st_size < n_bytes:
            return f"{fpath} is truncated ({info.st_size} of {n_bytes} bytes)"
        return None

    def checksums(self, shard_i: int) -> tuple[bytes, str]:
        """Reads a whole shard. Returns its pieces' checksums and the XXH3 (128 bits, hex) of its images.

        Raises:
            OSError: it cannot be read.
        """
        whole, sums = xxhash.xxh3_128(), bytearray()
        for portion, data in self._portions(shard_i):
            whole.update(data)
            sums += self.pieces.sums(data, portion)
        return bytes(sums), whole.hexdigest()

    def _portions(self, shard_i: int) -> collections.abc.Iterator[tuple[range, memoryview]]:
        """Yields runs of consecutive pieces and their bytes. A truncated file gives fewer bytes."""
        n, longest = self.n_pieces(shard_i), self.pieces.max_bytes
        step = max(1, READ_BYTES // longest)
        buffer = memoryview(bytearray(min(step, n) * longest))
        with self.acts_fpath(shard_i).open("rb", buffering=0) as fd:
            for first in range(0, n, step):
                portion = range(first, min(first + step, n))
                length = self.pieces.start(portion.stop) - self.pieces.start(first)
                at = 0
                while at < length and (n_read := fd.readinto(buffer[at:length])):
                    at += n_read
                yield portion, buffer[:at]

    def complete_shards(self) -> list[int]:
        """Returns the numbers of the complete shards, judged by file names."""
        names = set(os.listdir(self.dpath))  # noqa: PTH208  (thousands of names)
        return [
            i
            for i in range(self.metadata.n_shards)
            if {self.acts_fpath(i).name, self.sidecar_fpath(i).name} <= names
        ]
