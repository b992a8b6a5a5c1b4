"""Activation shards. All access to shard directories goes through this module (see docs/formats.md).

    <dump_to>/<HASH>/
        metadata.json    what was dumped (`metadata.Metadata`); HASH is the sha256 of its canonical JSON
        shards.json      [{"name": "acts000000.bin", "n_imgs": 937}, ...], the complete shards in order
        acts000000.bin   C-contiguous little-endian (images, layers, tokens, d_vit); the last is zero-padded

    and files that readers of plain protocol 1.0.0 ignore:
        images.jsonl     per image, in order, {"path": ..., "label": ...}; path is relative to the dataset
        transform.json   how an image became the ViT's input (for heat maps)
        acts000000.xxh3  checksums of the pieces of the shard (`pieces.Pieces`)
        acts000000.json  skipped images; checksums of the shard, its .xxh3 and the files about all images;
                         sizes of the photos, if the dump has padding (protocol 1.2.0)
        complete.json    the same for all shards
        code.json        which code dumped

A shard is complete once its acts000000.json exists, because that is written last. The directory is complete
when shards.json lists all images of metadata.json. Several processes may write different shards at the same
time. The activations of skipped images are zero.

The checksums form a tree. complete.json (or acts000000.json) holds its own checksum and those of the other
files; acts000000.xxh3 holds those of the pieces. Every reader compares activations with this tree, whose root
is `fingerprint`.
"""

import concurrent.futures
import functools
import json
import pathlib
import re

import beartype
import numpy as np
import xxhash
from jaxtyping import Int64

from saev import errors, fields, helpers
from saev.formats import firstuse, jsonfile, records
from saev.formats.dtypes import STORED, encode
from saev.formats.metadata import Metadata, stored_as
from saev.formats.pieces import SUM_BYTES, Piece
from saev.formats.records import Record
from saev.formats.shardfiles import MAX_BYTES, REMEDY
from saev.formats.sidecar import Complete, Sidecar, Skipped
from saev.formats.writing import ShardWriter, WritableShards

__all__ = ["STORED", "Metadata", "Record", "ShardDir", "ShardWriter", "Skipped", "encode", "stored_as"]

COPIES = "saev-staged"
"""Name of the folder of copies (`staging`)."""
AGAIN = "run the same `python -m saev.data` command again."
DUMP_ANEW = f"Delete it and its .json, and {AGAIN}"
N_THREADS = 4
"""Threads that compute checksums on first use."""


@beartype.beartype
class ShardDir(WritableShards):
    """One shard directory, complete or being written. Its paths are built only here."""

    has_index = True
    """June 2025's directories have no shards.json (and no protocol in metadata.json)."""

    @classmethod
    def open(cls, dpath: pathlib.Path | str, *, partial: bool = False, flag: str = "--data") -> "ShardDir":
        """Opens a complete directory or, with `partial`, also one whose dump was interrupted.

        flag: prefix of the flags that chose the directory, for messages.

        Raises:
            UserError: there is no such directory, or it is not a shard directory, is incomplete, or has a
                missing, truncated or damaged file.
        """
        shards = cls.open_unchecked(dpath)
        if not partial:
            shards._check_complete(flag)
        if not shards.shard_is:
            raise errors.UserError(f"{dpath}: holds no complete shard. {REMEDY}")
        for shard_i in shards.shard_is:
            if problem := shards.size_problem(shard_i):
                raise errors.UserError(f"{problem}. {shards.remedy}")
        return shards

    @classmethod
    def open_unchecked(cls, dpath: pathlib.Path | str) -> "ShardDir":
        """Opens a directory without checking that its shards are complete.

        Raises:
            UserError: there is no such directory, it is not a shard directory, or metadata.json is damaged.
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
                else "Pass the directory that `python -m saev.data` printed."
            )
            raise errors.UserError(f"{dpath}: not a shard directory (no metadata.json). {hint}")
        data = jsonfile.read_bytes(fpath, REMEDY)
        shards = cls(dpath, Metadata.loads(data, fpath))
        shards._check_metadata(data)
        return shards

    # ---- checks ----

    @functools.cached_property
    def is_ours(self) -> bool:
        """Whether saev wrote this directory. Other tools do not write these files."""
        fpaths = (self.images_fpath, self.transform_fpath, self.complete_fpath)
        return any(fpath.exists() for fpath in fpaths)

    @property
    def remedy(self) -> str:
        """What the user should do about a damaged shard."""
        if self.dpath.parent.parent.name == COPIES:
            return f"Delete {self.dpath}, a copy of --stage-to. The next job makes a new one."
        return DUMP_ANEW if self.is_ours else "Restore it, or dump it again."

    def _check_metadata(self, data: bytes) -> None:
        """Compares metadata.json (`data`) with its recorded checksum, or with the directory's name.

        Other tools also name directories by this hash, but users rename them.
        """
        obj = json.loads(data)
        self.has_index = "protocol" in obj
        if self.is_ours and (recorded := self._any_files()):
            return self._compare("metadata.json", data, recorded)
        name, right = self.dpath.resolve().name, helpers.hash_of(obj)
        is_hash = re.fullmatch("[0-9a-f]{64}", name) and self.metadata.protocol.startswith("1.0")
        if name != right and (self.is_ours or (is_hash and self.has_index)):
            raise errors.UserError(
                f"{self.dpath}: its name is not the hash of its metadata.json, so one of them was "
                f"changed. If you renamed the directory, name it {right} again "
                "(a symbolic link to it may have any name); else dump it again."
            )

    def _any_files(self) -> dict[str, str]:
        """Reads the checksums of the files about all images, if any, from complete.json or a sidecar."""
        if self.complete_fpath.exists():
            return Complete.loads(self.complete_fpath).files
        fpath = next(iter(sorted(self.dpath.glob("acts*.json"))), None)
        return Sidecar.loads(fpath).files if fpath else {}

    def _compare(self, name: str, data: bytes, recorded: dict[str, str]) -> None:
        if xxhash.xxh3_128_hexdigest(data) != recorded.get(name):
            raise errors.UserError(
                f"{self.dpath / name}: differs from its checksum. Restore it, or dump the directory again."
            )

    def _check_complete(self, flag: str) -> None:
        found = sum(len(self.metadata.imgs_in(i)) for i in self.shard_is)
        is_listed = self.shards_fpath.exists() or not self.has_index
        if found != self.metadata.n_imgs or not is_listed:
            remedy = REMEDY if self.is_ours else "Finish it with the tool that wrote it."
            raise errors.UserError(
                f"{self.dpath}: incomplete dump: {found} of {self.metadata.n_imgs} images. "
                f"{remedy} (Or read the existing images with {flag}.partial.)"
            )

    @functools.cached_property
    def shard_is(self) -> list[int]:
        """Numbers of the complete shards, in ascending order.

        Raises:
            UserError: shards.json cannot be read, or does not fit metadata.json.
        """
        if self.shards_fpath.exists():
            return records.read_index(self.shards_fpath, self.metadata)
        return [] if self.is_ours else self._unlisted()

    def _unlisted(self) -> list[int]:
        """Finds the complete shards of another tool's directory without shards.json.

        That tool writes in order, so all files but the last are complete. In June 2025 it created files at
        full size and then filled them, so there the last file is complete if its last image is not all zero.
        """
        found = [p for p in self.dpath.glob("acts*.bin") if re.fullmatch(r"acts\d{6,12}", p.stem)]
        shard_is = sorted(int(p.stem[4:]) for p in found)
        shard_is = [i for i in shard_is if i < self.metadata.n_shards]
        if shard_is != list(range(len(shard_is))):
            raise errors.UserError(
                f"{self.dpath}: the numbers of its acts files have gaps. Restore the missing files."
            )
        is_all = len(shard_is) == self.metadata.n_shards and not self.size_problem(shard_is[-1])
        if self.has_index or not is_all:
            return shard_is[:-1]
        with self.acts_fpath(shard_is[-1]).open("rb") as fd:
            fd.seek(self.n_bytes(shard_is[-1]) - self.metadata.img_bytes)
            return shard_is if any(fd.read(self.metadata.img_bytes)) else shard_is[:-1]

    @functools.cached_property
    def sidecars(self) -> dict[int, Sidecar]:
        """Checksums and skipped images of each complete shard. Empty if another tool wrote the directory.

        Raises:
            UserError: a sidecar is missing or damaged, or does not fit the directory.
        """
        if not self.is_ours:
            return {}
        if len(self.shard_is) == self.metadata.n_shards and self.complete_fpath.exists():
            return self._all_sidecars()
        out, files = {}, self._any_files()
        for i in self.shard_is:
            fpath, image_is = self.sidecar_fpath(i), self.metadata.imgs_in(i)
            remedy = f"Delete {self.acts_fpath(i).name} and its .json, and {AGAIN}"
            if not fpath.exists():
                raise errors.UserError(f"{fpath} is missing. {remedy}")
            out[i] = Sidecar.loads(fpath)
            is_alike = out[i].files in ({}, files)
            is_right = out[i].n_imgs == len(image_is)
            is_right &= all(s.image_i in image_is for s in out[i].skipped)
            if not (is_alike and is_right):
                raise errors.UserError(f"{fpath}: does not fit the directory's other files. {remedy}")
        return out

    def _all_sidecars(self) -> dict[int, Sidecar]:
        """Reads all sidecars from complete.json."""
        complete = Complete.loads(self.complete_fpath)
        names = {self.acts_fpath(i).name: i for i in self.shard_is}
        skipped: dict[int, list[Skipped]] = {i: [] for i in self.shard_is}
        is_right = complete.xxh3_128.keys() == names.keys()
        is_right &= not complete.pieces or complete.pieces.keys() == names.keys()
        for s in complete.skipped:
            shard_i = s.image_i // self.metadata.imgs_per_shard
            is_right &= s.image_i < self.metadata.n_imgs
            skipped.setdefault(shard_i, []).append(s)
        if not is_right:
            raise errors.UserError(f"{self.complete_fpath}: does not fit metadata.json. Delete it. {REMEDY}")
        return {
            i: Sidecar(
                n_imgs=len(self.metadata.imgs_in(i)),
                xxh3_128=complete.xxh3_128[name],
                skipped=tuple(skipped[i]),
                pieces=complete.pieces.get(name, ""),
                sizes=complete.sizes.get(name, ""),
                files=complete.files,
            )
            for name, i in names.items()
        }

    # ---- checksums ----

    def sums(self, shard_i: int) -> bytes:
        """Returns the concatenated checksums of a shard's pieces.

        A shard without .xxh3 is read once (`firstuse`) and compared with its recorded checksum, if any.

        Raises:
            UserError: the checksums or the shard are damaged.
        """
        sidecar, fpath = self.sidecars.get(shard_i), self.sums_fpath(shard_i)
        if sidecar and sidecar.pieces and fpath.exists():
            sums = jsonfile.read_bytes(fpath, REMEDY, SUM_BYTES * self.n_pieces(shard_i))
            if xxhash.xxh3_128_hexdigest(sums) != sidecar.pieces:
                raise errors.UserError(
                    f"{fpath}: differs from its checksum. "
                    "Delete it: it is recomputed from the shard, which has its own checksum."
                )
            return sums
        recorded = sidecar.xxh3_128 if sidecar else ""
        return firstuse.kept(self.acts_fpath(shard_i), recorded, lambda: self._take(shard_i, recorded))

    def _take(self, shard_i: int, recorded: str) -> bytes:
        sums, xxh3_128 = self.checksums(shard_i)
        if recorded not in ("", xxh3_128):
            raise errors.UserError(
                f"{self.acts_fpath(shard_i)}: differs from its checksum "
                f"(bytes 0 to {self.n_bytes(shard_i) - 1:,}). {self.remedy}"
            )
        return sums

    def _root(self, shard_i: int) -> str:
        """Returns the checksum of a shard's piece checksums."""
        sidecar = self.sidecars.get(shard_i)
        if sidecar and sidecar.pieces:
            return sidecar.pieces
        return xxhash.xxh3_128_hexdigest(self.sums(shard_i))

    def differs(self, shard_i: int, piece: Piece) -> errors.UserError:
        """Returns the error for bytes that changed since the dump, or since first use without checksums."""
        fpath, remedy = self.acts_fpath(shard_i), self.remedy
        if not self.is_ours:
            remedy += " If they are right now and were wrong on first use, `touch` the file."
        return errors.UserError(f"{fpath}: {piece} differ from their checksum. {remedy}")

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the directory's contents, under which results are cached.

        It combines the checksums that readers compare. Raises the same errors as `sums`.
        """
        todo = [i for i in self.shard_is if not (i in self.sidecars and self.sidecars[i].pieces)]
        with concurrent.futures.ThreadPoolExecutor(N_THREADS) as pool:
            taken = pool.map(self._root, todo)
            taken = helpers.progress(taken, f"checksums of {self.dpath}", len(todo), "shards")
            roots = dict(zip(todo, taken, strict=True))
        sums = [[i, roots.get(i) or self._root(i)] for i in self.shard_is]
        skipped = [[s.image_i, s.error] for _, x in sorted(self.sidecars.items()) for s in x.skipped]
        tables = [self._digest(fpath) for fpath in (self.images_fpath, self.transform_fpath) if self.is_ours]
        sizes = [[s.sizes for _, s in sorted(self.sidecars.items())]] if self.metadata.has_padding else []
        return helpers.hash_of([self.metadata.hash, tables, sums, skipped, *sizes])

    # ---- contents ----

    @functools.cached_property
    def image_is_N(self) -> Int64[np.ndarray, " N"]:
        """Numbers of the readable images, in order: those of complete shards, without the skipped ones."""
        parts = [np.arange(r.start, r.stop) for r in map(self.metadata.imgs_in, self.shard_is)]
        image_is_N = np.concatenate([np.arange(0), *parts])
        skipped = [s.image_i for sidecar in self.sidecars.values() for s in sidecar.skipped]
        return image_is_N[~np.isin(image_is_N, skipped)] if skipped else image_is_N

    @functools.cached_property
    def sizes_N2(self) -> Int64[np.ndarray, "N 2"]:
        """(width, height) of each photo of a dump with padding; 0 if it was skipped or is not dumped yet.

        Raises:
            UserError: a sidecar is damaged.
        """
        out_N2 = np.zeros((self.metadata.n_imgs, 2), np.int64)
        for i, sidecar in self.sidecars.items():
            r = self.metadata.imgs_in(i)
            out_N2[r.start : r.stop] = sidecar.size_n2(self.sidecar_fpath(i))
        return out_N2

    def _table(self, fpath: pathlib.Path) -> bytes:
        """Reads a file about all images and compares it with its checksum, if one is recorded."""
        if not fpath.exists():
            raise errors.UserError(f"{fpath} is missing. Restore it, or dump the directory again.")
        data = jsonfile.read_bytes(fpath, REMEDY, MAX_BYTES)
        if recorded := next((s.files for s in self.sidecars.values() if s.files), None):
            self._compare(fpath.name, data, recorded)
        self._digests[fpath.name] = xxhash.xxh3_128_hexdigest(data)
        return data

    def _digest(self, fpath: pathlib.Path) -> str:
        """The checksum of a file about all images; reads the file if it was not read before."""
        if fpath.name not in self._digests:
            self._table(fpath)
        return self._digests[fpath.name]

    @functools.cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    @functools.cached_property
    def records(self) -> list[Record]:
        """Path and label of each image, whether it can be read or not.

        Raises:
            UserError: there is no images.jsonl (another tool's dump), or it does not fit the metadata.
        """
        if not self.images_fpath.exists():
            raise errors.UserError(
                f"{self.dpath}: has no images.jsonl, so the paths of its images are unknown. "
                "Dump it again with `python -m saev.data`."
            )
        data = self._table(self.images_fpath)
        return records.loads(data, self.images_fpath, self.metadata.n_imgs)

    def transform(self) -> dict[str, object]:
        """Returns the description of the image transform. Empty if another tool wrote the directory."""
        if not self.is_ours:
            return {}
        data = self._table(self.transform_fpath)
        return jsonfile.parse(data, dict[str, object], str(self.transform_fpath), REMEDY)

    def layer_i(self, layer: int, flag: str = "--data") -> int:
        """Returns the position of a recorded layer. Negative layers count from the last recorded one.

        Raises:
            UserError: the layer was not recorded.
        """
        layers = self.metadata.layers
        if layer < 0 and -layer <= len(layers):
            return len(layers) + layer
        if layer not in layers:
            raise errors.UserError(
                f"{self.dpath}: layer {layer} was not recorded "
                f"(recorded: {', '.join(map(str, layers))}). Pass one of these as {flag}.layer, "
                "or dump it with `python -m saev.data --vit-layers`."
            )
        return layers.index(layer)
