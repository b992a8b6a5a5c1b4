"""Activation shards: the one owner of the directory's paths, contents and checks.

    <dump_to>/<HASH>/
        metadata.json    what was dumped (`metadata.Metadata`); HASH is the sha256 of its canonical JSON
        shards.json      [{"name": "acts000000.bin", "n_imgs": 937}, ...], the complete shards in order
        acts000000.bin   C-contiguous little-endian (images, layers, tokens, d_vit); the last one is zero-padded

    and, to be ignored by readers that know protocol 1.0.0 alone:
        images.jsonl     per image, in order, {"path": ..., "label": ...}; path is relative to the dataset's root
        transform.json   how an image became the ViT's input (for heat maps)
        acts000000.json  {"n_imgs": ..., "xxh3_128": checksum of its images' bytes, "skipped": [...]}
        complete.json    the same of all shards: {"xxh3_128": {name: checksum}, "skipped": [{"image_i": ..., "error": ...}]}

A shard is complete when its acts000000.json is there: that is written last. The directory is complete when
shards.json lists all of metadata.json's images. Any number of processes may write different shards at a time.
The activations of skipped images are zero.
"""

import collections.abc
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import typing as tp

import beartype
import numpy as np
import xxhash
from jaxtyping import Float32, Int64, jaxtyped

from saev import errors, fields, helpers
from saev.formats.dtypes import STORED, decode, encode
from saev.formats.metadata import Metadata, stored_as
from saev.formats.sidecar import Sidecar, Skipped, readable

__all__ = [
    "STORED",
    "Metadata",
    "Record",
    "ShardDir",
    "ShardWriter",
    "Skipped",
    "decode",
    "encode",
    "stored_as",
]

SYNC_BYTES = 64 * 2**20
"""A shard in writing is flushed to the disk every so many bytes, so that its end costs no long wait."""
AGAIN = "Run the same `python -m saev.data` command again; it continues."


class Record(tp.NamedTuple):
    """One image of a dataset."""

    path: str
    """Relative to the dataset's root, with forward slashes."""
    label: str


class ShardWriter:
    """A shard in writing, image after image in order."""

    def __init__(self, fd: tp.BinaryIO, dtype: str):
        self.fd = fd
        self.dtype = dtype
        self.sum = xxhash.xxh3_128()
        self.skipped: list[Skipped] = []
        self.n_unsynced = 0

    @jaxtyped(typechecker=beartype.beartype)
    def write(self, acts_BLTD: Float32[np.ndarray, "B L T D"]) -> None:
        """Appends images."""
        stored = memoryview(encode(acts_BLTD, self.dtype)).cast("B")
        self.sum.update(stored)
        self.fd.write(stored)
        self.n_unsynced += len(stored)
        if self.n_unsynced >= SYNC_BYTES:
            self.fd.flush()
            os.fsync(self.fd.fileno())
            self.n_unsynced = 0


@beartype.beartype
class ShardDir:
    """One shard directory, complete or being written. Nobody else joins its paths."""

    def __init__(self, dpath: pathlib.Path, metadata: Metadata):
        self.dpath = dpath
        self.metadata = metadata

    # ---- paths ----

    def acts_fpath(self, shard_i: int) -> pathlib.Path:
        return self.dpath / f"acts{shard_i:06}.bin"

    def sidecar_fpath(self, shard_i: int) -> pathlib.Path:
        return self.dpath / f"acts{shard_i:06}.json"

    @property
    def shards_fpath(self) -> pathlib.Path:
        return self.dpath / "shards.json"

    @property
    def images_fpath(self) -> pathlib.Path:
        return self.dpath / "images.jsonl"

    @property
    def transform_fpath(self) -> pathlib.Path:
        return self.dpath / "transform.json"

    @property
    def complete_fpath(self) -> pathlib.Path:
        return self.dpath / "complete.json"

    # ---- writing ----

    @classmethod
    def create(
        cls,
        dump_to: pathlib.Path,
        metadata: Metadata,
        records: list[Record],
        transform: dict[str, object],
    ) -> "ShardDir":
        """Makes the directory, or takes up an interrupted dump of the same images.

        Raises:
            UserError: the directory lists other images than `records` (the dataset changed since), or another transform.
        """
        shards = cls(dump_to / metadata.hash, metadata)
        shards.dpath.mkdir(parents=True, exist_ok=True)
        if shards.shards_fpath.exists() and not shards.images_fpath.exists():
            raise errors.UserError(
                f"{shards.dpath}: was written by another tool. It can be read as it is; pass another --dump-to to dump it anew."
            )
        # ASCII: names may hold line separators, or bytes that are not UTF-8 (Python's surrogates).
        text = "".join(json.dumps(r._asdict()) + "\n" for r in records)
        shards._write_once(shards.images_fpath, text, "other images than the dataset holds now")
        text = json.dumps(transform, indent=4)
        shards._write_once(shards.transform_fpath, text, "images transformed in another way")
        shards._write_once(shards.dpath / "metadata.json", metadata.dumps(), "another dataset")
        shards.write_index()
        return shards

    def _write_once(self, fpath: pathlib.Path, text: str, other: str) -> None:
        if not fpath.exists():
            helpers.write_text(fpath, text)
        elif fpath.read_text("utf-8") != text:
            raise errors.UserError(
                f"{self.dpath}: was dumped from {other} ({fpath.name} differs). Move that directory away, or pass another --dump-to."
            )

    def has(self, shard_i: int) -> bool:
        """Is this shard complete?"""
        return self.sidecar_fpath(shard_i).exists() and self.acts_fpath(shard_i).exists()

    @contextlib.contextmanager
    def writing(self, shard_i: int) -> collections.abc.Iterator[ShardWriter]:
        """Yields a writer for all images of the shard; the shard appears when the block ends well.

        Raises:
            UserError: it cannot be written (a full disk, a folder without permission).
        """
        fpath, n_imgs = self.acts_fpath(shard_i), len(self.metadata.imgs_in(shard_i))
        self._remove_temporaries(f".{fpath.name}.*.tmp")  # of a writer that was killed
        try:
            with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
                writer = ShardWriter(fd, self.metadata.dtype)
                yield writer
                assert fd.tell() == n_imgs * self.metadata.img_bytes
                fd.flush()
                fd.truncate(self.metadata.shard_bytes)
            sidecar = Sidecar(n_imgs, writer.sum.hexdigest(), tuple(writer.skipped))
            helpers.write_text(self.sidecar_fpath(shard_i), sidecar.dumps())
            self.write_index()
        except OSError as err:
            raise errors.UserError(
                f"{self.dpath}: shard {shard_i} cannot be written ({err.strerror}). "
                "Check the free space and the permissions, then run the same command again."
            ) from err

    def write_index(self) -> None:
        """Writes shards.json (and, once all is there, complete.json) from the shards that are there.

        Parallel writers may overtake each other: each looks again after it has written, so the last one to
        write has seen all.
        """
        written = None
        while (index := self._index()) != written:
            if len(index) == self.metadata.n_shards:
                self._write_complete()
            helpers.write_text(self.shards_fpath, json.dumps(index, indent=2))
            written = index

    def _index(self) -> list[dict[str, object]]:
        names = set(os.listdir(self.dpath))  # noqa: PTH208  (names only, thousands of them)
        return [
            {"name": self.acts_fpath(i).name, "n_imgs": len(self.metadata.imgs_in(i))}
            for i in range(self.metadata.n_shards)
            if {self.acts_fpath(i).name, self.sidecar_fpath(i).name} <= names
        ]

    def _write_complete(self) -> None:
        sidecars = {
            self.acts_fpath(i).name: Sidecar.loads(self.sidecar_fpath(i))
            for i in range(self.metadata.n_shards)
        }
        fields = {
            "xxh3_128": {name: sidecar.xxh3_128 for name, sidecar in sidecars.items()},
            "skipped": [s._asdict() for sidecar in sidecars.values() for s in sidecar.skipped],
        }
        helpers.write_text(self.complete_fpath, json.dumps(fields, indent=2))

    def finish(self) -> None:
        """Brings the index up to date and removes what killed writers left. Only when nobody writes any more."""
        self.write_index()
        self._remove_temporaries(".*.tmp")

    def _remove_temporaries(self, pattern: str) -> None:
        for fpath in self.dpath.glob(pattern):
            fpath.unlink(missing_ok=True)

    # ---- reading ----

    @classmethod
    def open(cls, dpath: pathlib.Path | str, *, partial: bool = False) -> "ShardDir":
        """Opens a complete directory; with `partial` also one whose dump was interrupted.

        Raises:
            UserError: no such directory, not a shard directory, incomplete, or a shard file missing or truncated.
        """
        shards = cls.look(dpath)
        if not partial:
            shards._check_complete()
        if not shards.shard_is:
            raise errors.UserError(f"{dpath}: holds no complete shard. {AGAIN}")
        for shard_i in shards.shard_is:
            if problem := shards.size_problem(shard_i):
                raise errors.UserError(
                    f"{problem}. Delete it and its .json, and run the same `python -m saev.data` command again."
                )
        return shards

    @classmethod
    def look(cls, dpath: pathlib.Path | str) -> "ShardDir":
        """Opens a directory without asking whether its shards are there and whole.

        Raises:
            UserError: no such directory, or not a shard directory.
        """
        dpath = fields.path(dpath)
        if not dpath.is_dir():
            raise errors.UserError(
                f"{dpath}: no such shard directory. Pass the directory that `python -m saev.data` printed."
            )
        fpath = dpath / "metadata.json"
        if not fpath.exists():
            inside = sorted(p.parent.name for p in dpath.glob("*/metadata.json"))
            hint = (
                f"Pass one of the shard directories in it: {', '.join(inside[:3])}."
                if inside
                else "Dump it first."
            )
            raise errors.UserError(f"{dpath}: not a shard directory (no metadata.json). {hint}")
        return cls(dpath, Metadata.loads(fpath.read_text("utf-8"), fpath))

    @functools.cached_property
    def shard_is(self) -> list[int]:
        """Numbers of the complete shards.

        An interrupted dump of another tool may have no shards.json; it wrote in order, so all but its last file are complete.

        Raises:
            UserError: shards.json cannot be read, or does not fit metadata.json.
        """
        if not self.shards_fpath.exists():
            return sorted(int(p.stem[4:]) for p in self.dpath.glob("acts*.bin"))[:-1]
        out = []
        with readable(self.shards_fpath):
            for entry in json.loads(self.shards_fpath.read_text("utf-8")):
                n_imgs = entry["n_imgs"] if "n_imgs" in entry else entry["n_examples"]
                shard_i = int(re.fullmatch(r"acts(\d+)\.bin", entry["name"])[1])
                if n_imgs == 0:  # other tools end with an empty shard
                    continue
                if n_imgs != (want := len(self.metadata.imgs_in(shard_i))):
                    raise errors.UserError(
                        f"{self.shards_fpath}: shard {shard_i} holds {n_imgs} images, but metadata.json gives it {want}. Dump the directory again."
                    )
                out.append(shard_i)
        return sorted(set(out))

    def _check_complete(self) -> None:
        found = sum(len(self.metadata.imgs_in(i)) for i in self.shard_is)
        if found != self.metadata.n_imgs or not self.shards_fpath.exists():
            ours = self.images_fpath.exists()
            raise errors.UserError(
                f"{self.dpath}: incomplete dump: {found} of {self.metadata.n_imgs} images. "
                f"{AGAIN if ours else 'Finish it with the tool that wrote it.'} (To read what is there: --data.partial.)"
            )

    def size_problem(self, shard_i: int) -> str | None:
        """What is wrong with a shard file's presence and size."""
        fpath = self.acts_fpath(shard_i)
        n_bytes = len(self.metadata.imgs_in(shard_i)) * self.metadata.img_bytes
        try:
            size = fpath.stat().st_size
        except FileNotFoundError:
            return f"{fpath} is missing"
        return None if size >= n_bytes else f"{fpath} is truncated ({size} of {n_bytes} bytes)"

    def checksum(self, shard_i: int) -> str:
        """XXH3 (128 bits, hex) of the bytes of the shard's images; its padding is left out."""
        left = len(self.metadata.imgs_in(shard_i)) * self.metadata.img_bytes
        buffer = memoryview(bytearray(min(left, 8 * 2**20)))
        digest = xxhash.xxh3_128()
        with self.acts_fpath(shard_i).open("rb", buffering=0) as fd:
            while left and (n := fd.readinto(buffer[:left])):
                digest.update(buffer[:n])
                left -= n
        return digest.hexdigest()

    @functools.cached_property
    def sidecars(self) -> dict[int, Sidecar]:
        """Checksum and skipped images of each complete shard; empty when another tool made the dump."""
        is_complete = len(self.shard_is) == self.metadata.n_shards
        if not is_complete or not self.complete_fpath.exists():
            fpaths = {i: self.sidecar_fpath(i) for i in self.shard_is}
            return {i: Sidecar.loads(fpath) for i, fpath in fpaths.items() if fpath.exists()}
        with readable(self.complete_fpath):
            obj = json.loads(self.complete_fpath.read_text("utf-8"))
            skipped: dict[int, list[Skipped]] = {i: [] for i in self.shard_is}
            for entry in obj["skipped"]:
                skipped[entry["image_i"] // self.metadata.imgs_per_shard].append(Skipped(**entry))
            return {
                i: Sidecar(
                    len(self.metadata.imgs_in(i)),
                    obj["xxh3_128"][self.acts_fpath(i).name],
                    tuple(skipped[i]),
                )
                for i in self.shard_is
            }

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of what the directory says and holds: results that are kept under it are found again only for the same activations.

        Of another tool's dump, which has no checksums, a sample of the bytes stands for all.
        """
        texts = [
            hashlib.sha256(fpath.read_bytes()).hexdigest()
            for fpath in (self.images_fpath, self.transform_fpath)
            if fpath.exists()
        ]
        sums = [[i, s.xxh3_128, s.skipped] for i, s in sorted(self.sidecars.items())]
        sample = (
            []
            if self.sidecars
            else [self._sample(i) for i in self.shard_is[:: -(-len(self.shard_is) // 64)]]
        )
        return helpers.hash_of([self.metadata.hash, texts, self.shard_is, sums, sample])

    def _sample(self, shard_i: int) -> str:
        with self.acts_fpath(shard_i).open("rb") as fd:
            return hashlib.sha256(fd.read(2**16)).hexdigest()

    @functools.cached_property
    def image_is_N(self) -> Int64[np.ndarray, " N"]:
        """Numbers of the images that can be read, in order: those of complete shards, without the skipped ones."""
        parts = [np.arange(r.start, r.stop) for r in map(self.metadata.imgs_in, self.shard_is)]
        image_is_N = np.concatenate([np.arange(0), *parts])
        skipped = [s.image_i for sidecar in self.sidecars.values() for s in sidecar.skipped]
        return image_is_N[~np.isin(image_is_N, skipped)] if skipped else image_is_N

    @functools.cached_property
    def records(self) -> list[Record]:
        """Path and label of each image, whether it can be read or not.

        Raises:
            UserError: the directory has no images.jsonl (dumped by another tool), or it does not fit the metadata.
        """
        if not self.images_fpath.exists():
            raise errors.UserError(
                f"{self.dpath}: has no images.jsonl, so its images cannot be told apart by path. Dump it again with `python -m saev.data`."
            )
        lines = self.images_fpath.read_text("utf-8").splitlines()
        if len(lines) != self.metadata.n_imgs:
            raise errors.UserError(
                f"{self.images_fpath}: {len(lines)} lines for {self.metadata.n_imgs} images. Dump the directory again."
            )
        return [_parse_record(line, i, self.images_fpath) for i, line in enumerate(lines, 1)]

    def transform(self) -> dict[str, object]:
        """The image transform's description; empty when another tool made the dump."""
        if not self.transform_fpath.exists():
            return {}
        with readable(self.transform_fpath):
            return json.loads(self.transform_fpath.read_text("utf-8"))

    def layer_i(self, layer: int) -> int:
        """Position of a recorded layer; a negative one counts from the last recorded.

        Raises:
            UserError: the layer was not recorded.
        """
        layers = self.metadata.layers
        if layer < 0 and -layer <= len(layers):
            return len(layers) + layer
        if layer not in layers:
            raise errors.UserError(
                f"{self.dpath}: layer {layer} was not recorded (recorded: {', '.join(map(str, layers))}). "
                "Pass one of these as --data.layer, or dump it with `python -m saev.data --vit-layers`."
            )
        return layers.index(layer)


def _parse_record(line: str, line_i: int, fpath: pathlib.Path) -> Record:
    try:
        obj = json.loads(line)
        return Record(path=obj["path"], label=obj["label"])
    except (ValueError, KeyError, TypeError) as err:
        raise errors.UserError(
            f"{fpath}:{line_i}: cannot be read ({err!r}). Dump the directory again."
        ) from err
