"""acts000000.json and complete.json: the checksums of shards, and the skipped images.

Both end with a checksum of their other fields. Older dumps of saev have no piece checksums: they lack this
field and the fields `pieces` and `files`. A file must have all three fields or none.
"""

import json
import pathlib
import typing as tp

import msgspec

from saev import errors
from saev.formats import jsonfile

REMEDY = "Delete it and run the same `python -m saev.data` command again."
Sum = tp.Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
"""XXH3, 128 bits, in hexadecimal digits."""


class Skipped(tp.NamedTuple):
    """A corrupt image. --skip-corrupt set its activations to zero."""

    image_i: int
    error: str


class _Skipped(msgspec.Struct, forbid_unknown_fields=True):
    """As JSON has it."""

    image_i: tp.Annotated[int, msgspec.Meta(ge=0)]
    error: str


class Sidecar(msgspec.Struct, frozen=True):
    """The contents of acts000000.json."""

    n_imgs: int
    xxh3_128: str
    """XXH3 (128 bits) of the bytes of all images."""
    skipped: tuple[Skipped, ...] = ()
    pieces: str = ""
    """XXH3 (128 bits) of acts000000.xxh3. Empty in older dumps."""
    files: dict[str, str] = {}
    """XXH3 (128 bits) of metadata.json, images.jsonl and transform.json. Empty in older dumps."""

    def dumps(self) -> str:
        fields = msgspec.structs.asdict(self)
        return _signed(fields | {"skipped": [s._asdict() for s in self.skipped]})

    @classmethod
    def loads(cls, fpath: pathlib.Path) -> "Sidecar":
        """Raises UserError when the file is damaged."""
        obj = _read(fpath, _Sidecar)
        return cls(obj.n_imgs, obj.xxh3_128, _tuples(obj.skipped), obj.pieces, obj.files)


class Complete(msgspec.Struct, frozen=True):
    """The contents of complete.json: the fields of Sidecar by the name of the shard."""

    xxh3_128: dict[str, str]
    skipped: tuple[Skipped, ...]
    pieces: dict[str, str]
    files: dict[str, str]

    @classmethod
    def of(cls, sidecars: dict[str, Sidecar]) -> "Complete":
        """Merges sidecars, given in order by the name of their shard."""
        return cls(
            {name: s.xxh3_128 for name, s in sidecars.items()},
            tuple(skipped for s in sidecars.values() for skipped in s.skipped),
            {name: s.pieces for name, s in sidecars.items()},
            next(iter(sidecars.values())).files,
        )

    def dumps(self) -> str:
        fields = msgspec.structs.asdict(self)
        return _signed(fields | {"skipped": [s._asdict() for s in self.skipped]})

    @classmethod
    def loads(cls, fpath: pathlib.Path) -> "Complete":
        """Raises UserError when the file is damaged."""
        obj = _read(fpath, _Complete)
        return cls(obj.xxh3_128, _tuples(obj.skipped), obj.pieces, obj.files)


class _Sidecar(msgspec.Struct, forbid_unknown_fields=True):
    """As JSON has it."""

    n_imgs: int
    xxh3_128: Sum
    skipped: list[_Skipped]
    pieces: Sum | tp.Literal[""] = ""
    files: dict[str, Sum] = {}
    checksum: Sum | tp.Literal[""] = ""


class _Complete(msgspec.Struct, forbid_unknown_fields=True):
    """As JSON has it."""

    xxh3_128: dict[str, Sum]
    skipped: list[_Skipped]
    pieces: dict[str, Sum] = {}
    files: dict[str, Sum] = {}
    checksum: Sum | tp.Literal[""] = ""


def _read(fpath: pathlib.Path, schema: type[msgspec.Struct]) -> tp.Any:
    obj = jsonfile.read(fpath, schema, REMEDY)
    has = [bool(obj.pieces), bool(obj.files), bool(obj.checksum)]
    if any(has) != all(has):
        raise errors.UserError(f"{fpath}: lacks one of the fields pieces, files and checksum. {REMEDY}")
    fields = msgspec.to_builtins(obj)
    if fields.pop("checksum") not in ("", jsonfile.checksum(fields)):
        raise errors.UserError(f"{fpath}: differs from its own checksum. {REMEDY}")
    return obj


def _signed(fields: dict[str, tp.Any]) -> str:
    return json.dumps(fields | {"checksum": jsonfile.checksum(fields)}, indent=2)


def _tuples(skipped: list[_Skipped]) -> tuple[Skipped, ...]:
    return tuple(Skipped(s.image_i, s.error) for s in skipped)
