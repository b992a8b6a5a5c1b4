"""Activation shards, protocol 1.0.0: the one owner of the directory's paths, contents and checks.

    <dump_to>/<HASH>/
        metadata.json    what was dumped; HASH is the sha256 of its canonical JSON
        shards.json      [{"name": "acts000000.bin", "n_imgs": 937}, ...], the complete shards in order
        acts000000.bin   C-contiguous little-endian float32 (images, layers, tokens, d_vit); the last one is zero-padded
        images.jsonl     ours: per image, in order, {"path": ..., "label": ...}; path is relative to the dataset's root
        transform.json   ours: how an image became the ViT's input (for heat maps)

Readers that know only protocol 1.0.0 can ignore images.jsonl and transform.json.
"""

import collections.abc
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import typing as tp

import beartype
import numpy as np

from saev import errors, helpers

PROTOCOL = "1.0.0"


class Record(tp.NamedTuple):
    """One image of a dataset."""

    path: str
    """Relative to the dataset's root, with forward slashes."""
    label: str


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Metadata:
    """metadata.json, key for key."""

    vit_family: str
    vit_ckpt: str
    layers: tuple[int, ...]
    n_patches_per_img: int
    cls_token: bool
    d_vit: int
    n_imgs: int
    max_patches_per_shard: int
    data: dict[str, object]
    dtype: str = "float32"
    protocol: str = PROTOCOL

    def __post_init__(self) -> None:
        if self.imgs_per_shard < 1:
            raise errors.UserError(
                f"--max-patches-per-shard {self.max_patches_per_shard} holds not one image "
                f"({self.n_tokens} tokens x {len(self.layers)} layers). Pass at least {self.n_tokens * len(self.layers)}."
            )

    @property
    def n_tokens(self) -> int:
        """Tokens per image, [CLS] included."""
        return self.n_patches_per_img + int(self.cls_token)

    @property
    def imgs_per_shard(self) -> int:
        return self.max_patches_per_shard // (self.n_tokens * len(self.layers))

    @property
    def n_shards(self) -> int:
        return -(-self.n_imgs // self.imgs_per_shard)

    @property
    def shard_shape(self) -> tuple[int, int, int, int]:
        """(images, layers, tokens, d_vit) of a full shard."""
        return self.imgs_per_shard, len(self.layers), self.n_tokens, self.d_vit

    @property
    def img_bytes(self) -> int:
        return 4 * len(self.layers) * self.n_tokens * self.d_vit

    @property
    def hash(self) -> str:
        """Full sha256 hex digest of the canonical JSON: the directory's name."""
        return hashlib.sha256(helpers.canonical_json(self._fields()).encode()).hexdigest()

    def _fields(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "layers": list(self.layers)}

    def dumps(self) -> str:
        return json.dumps(self._fields(), indent=4)

    @classmethod
    def loads(cls, text: str, fpath: pathlib.Path) -> "Metadata":
        """Parses metadata.json.

        Raises:
            UserError: not JSON, another protocol or dtype, or missing keys or values of a wrong type; names them.
        """
        try:
            obj = json.loads(text)
        except ValueError as err:
            raise errors.UserError(f"{fpath}: not JSON ({err}). Dump the directory again.") from err
        protocol = obj.get("protocol") if isinstance(obj, dict) else None
        if protocol != PROTOCOL:
            raise errors.UserError(
                f"{fpath}: shard protocol {protocol!r} is not supported (supported: {PROTOCOL}). Dump the activations again."
            )
        names = {f.name for f in dataclasses.fields(cls)}
        if missing := sorted(names - obj.keys()):
            raise errors.UserError(
                f"{fpath}: keys missing: {', '.join(missing)}. Dump the directory again."
            )
        if obj["dtype"] != "float32":
            raise errors.UserError(
                f"{fpath}: dtype {obj['dtype']!r} is not supported (supported: float32)."
            )
        try:
            if min(obj["n_imgs"], len(obj["layers"])) < 1:
                raise ValueError("no images or no layers")
            return cls(
                **{k: tuple(v) if k == "layers" else v for k, v in obj.items() if k in names}
            )
        except errors.UserError:
            raise
        except Exception as err:  # wrong types, whatever the file holds
            raise errors.UserError(
                f"{fpath}: its values do not fit protocol {PROTOCOL} ({errors.first_line(err)}). Dump the directory again."
            ) from err


@beartype.beartype
class ShardDir:
    """One shard directory, complete or being written. Nobody else joins its paths."""

    def __init__(self, dpath: pathlib.Path, metadata: Metadata):
        self.dpath = dpath
        self.metadata = metadata

    # ---- paths ----

    def acts_fpath(self, shard_i: int) -> pathlib.Path:
        return self.dpath / f"acts{shard_i:06}.bin"

    @property
    def shards_fpath(self) -> pathlib.Path:
        return self.dpath / "shards.json"

    @property
    def images_fpath(self) -> pathlib.Path:
        return self.dpath / "images.jsonl"

    @property
    def transform_fpath(self) -> pathlib.Path:
        return self.dpath / "transform.json"

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
            UserError: the directory lists other images than `records` (the dataset changed since).
        """
        shards = cls(dump_to / metadata.hash, metadata)
        shards.dpath.mkdir(parents=True, exist_ok=True)
        # ASCII: names may hold line separators, or bytes that are not UTF-8 (Python's surrogates).
        text = "".join(json.dumps(r._asdict()) + "\n" for r in records)
        if shards.images_fpath.exists() and shards.images_fpath.read_text("utf-8") != text:
            raise errors.UserError(
                f"{shards.dpath}: was dumped from other images than the dataset holds now (images.jsonl differs). "
                "Move that directory away, or pass another --dump-to."
            )
        helpers.write_text(shards.images_fpath, text)
        helpers.write_text(shards.transform_fpath, json.dumps(transform, indent=4))
        helpers.write_text(shards.dpath / "metadata.json", metadata.dumps())
        shards.write_index()
        return shards

    def imgs_in(self, shard_i: int) -> range:
        """Image numbers that shard `shard_i` holds."""
        n = self.metadata.imgs_per_shard
        return range(shard_i * n, min((shard_i + 1) * n, self.metadata.n_imgs))

    def has(self, shard_i: int) -> bool:
        """Is this shard there? Shards appear whole or not at all."""
        return self.acts_fpath(shard_i).exists()

    @contextlib.contextmanager
    def writing(self, shard_i: int) -> collections.abc.Iterator[np.memmap]:
        """Yields the zero-filled shard (images, layers, tokens, d_vit) to write into; it appears when the block ends well."""
        with helpers.atomic(self.acts_fpath(shard_i)) as tmp_fpath:
            self._allocate(tmp_fpath, len(self.imgs_in(shard_i)))
            acts_NLTD = np.memmap(tmp_fpath, "<f4", "r+", shape=self.metadata.shard_shape)
            yield acts_NLTD
            acts_NLTD.flush()
        self.write_index()

    def _allocate(self, fpath: pathlib.Path, n_imgs: int) -> None:
        """Makes a full shard of zeros and reserves the disk space of its images (the padding stays a hole).

        So a full disk is an error now, not a crash (SIGBUS) while writing into the map.
        """
        n_bytes = n_imgs * self.metadata.img_bytes
        with fpath.open("wb") as fd:
            try:
                os.posix_fallocate(fd.fileno(), 0, n_bytes)
                fd.truncate(self.metadata.imgs_per_shard * self.metadata.img_bytes)
            except OSError as err:
                raise errors.UserError(
                    f"{self.dpath}: cannot reserve {n_bytes:,} bytes for a shard ({err.strerror}). "
                    "Free space and run the same command again, or lower --max-patches-per-shard."
                ) from err

    def write_index(self) -> None:
        """Writes shards.json from the shards that are there."""
        done = [i for i in range(self.metadata.n_shards) if self.has(i)]
        index = [{"name": self.acts_fpath(i).name, "n_imgs": len(self.imgs_in(i))} for i in done]
        helpers.write_text(self.shards_fpath, json.dumps(index, indent=2))

    # ---- reading ----

    @classmethod
    def open(cls, dpath: pathlib.Path | str) -> "ShardDir":
        """Opens a complete directory.

        Raises:
            UserError: no such directory, not a shard directory, incomplete, or a shard file missing or truncated.
        """
        dpath = pathlib.Path(dpath)
        if not dpath.is_dir():
            raise errors.UserError(
                f"{dpath}: no such shard directory. Pass as --data.shard-root the directory that `python -m saev.data` printed."
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
        shards = cls(dpath, Metadata.loads(fpath.read_text("utf-8"), fpath))
        shards._check_complete()
        return shards

    @functools.cached_property
    def n_imgs_per_file(self) -> list[int]:
        """Images in each listed shard file, in order."""
        if not self.shards_fpath.exists():
            return []
        try:
            return [
                int(s["n_imgs"])
                for s in json.loads(self.shards_fpath.read_text("utf-8"))
                if s["n_imgs"]
            ]
        except (ValueError, KeyError, TypeError) as err:
            raise errors.UserError(
                f"{self.shards_fpath}: cannot be read ({err!r}). Run the same dump again."
            ) from err

    def _check_complete(self) -> None:
        found, want = sum(self.n_imgs_per_file), self.metadata.n_imgs
        if found != want:
            raise errors.UserError(
                f"{self.dpath}: incomplete dump: {found} of {want} images. Run the same `python -m saev.data` command again; it continues."
            )
        wanted = [len(self.imgs_in(i)) for i in range(self.metadata.n_shards)]
        for i, (listed, n) in enumerate(zip(self.n_imgs_per_file, wanted, strict=False)):
            if listed != n:
                raise errors.UserError(
                    f"{self.shards_fpath}: shard {i} holds {listed} images, but metadata.json gives it {n}. Dump the directory again."
                )
            fpath = self.acts_fpath(i)
            size = fpath.stat().st_size if fpath.exists() else -1
            if size < n * self.metadata.img_bytes:
                what = (
                    "is missing"
                    if size < 0
                    else f"is truncated ({size} of {n * self.metadata.img_bytes} bytes)"
                )
                raise errors.UserError(
                    f"{fpath} {what}. Delete it and run the same `python -m saev.data` command again."
                )

    def acts(self, shard_i: int) -> np.memmap:
        """Shard `shard_i` as a read-only memory map (images, layers, tokens, d_vit)."""
        shape = (self.n_imgs_per_file[shard_i], *self.metadata.shard_shape[1:])
        return np.memmap(self.acts_fpath(shard_i), "<f4", "r", shape=shape)

    @functools.cached_property
    def records(self) -> list[Record]:
        """Path and label of each image.

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
