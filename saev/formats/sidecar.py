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

F = tp.TypeVar("F", bound="_File")
REMEDY = "Delete it and run the same `python -m saev.data` command again."
Sum = tp.Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
"""XXH3, 128 bits, in hexadecimal digits."""


class Skipped(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A corrupt image. --skip-corrupt set its activations to zero."""

    image_i: tp.Annotated[int, msgspec.Meta(ge=0)]
    error: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both files have. `checksum` is set in the file only."""

    skipped: tuple[Skipped, ...]
    files: dict[str, Sum] = {}
    """XXH3 of metadata.json, images.jsonl and transform.json. Empty in older dumps."""
    checksum: Sum | tp.Literal[""] = ""

    def dumps(self) -> str:
        fields = _fields(self)
        return json.dumps(fields | {"checksum": jsonfile.checksum(fields)}, indent=2)

    @classmethod
    def loads(cls: type[F], fpath: pathlib.Path) -> F:
        """Raises UserError when the file is damaged."""
        obj = jsonfile.read(fpath, cls, REMEDY)
        has = [bool(obj.pieces), bool(obj.files), bool(obj.checksum)]
        if any(has) != all(has):
            raise errors.UserError(f"{fpath}: lacks one of the fields pieces, files and checksum. {REMEDY}")
        if obj.checksum not in ("", jsonfile.checksum(_fields(obj))):
            raise errors.UserError(f"{fpath}: differs from its own checksum. {REMEDY}")
        return msgspec.structs.replace(obj, checksum="")


class Sidecar(_File, frozen=True, kw_only=True):
    """The contents of acts000000.json."""

    n_imgs: int
    xxh3_128: Sum
    """Of the bytes of all images."""
    pieces: Sum | tp.Literal[""] = ""
    """XXH3 of acts000000.xxh3. Empty in older dumps."""
    sizes: str = ""
    """Width and height of each photo, "500x375 333x500 ..."; 0x0 for a skipped one. Empty in dumps without
    padding."""

    def size_n2(self, fpath: pathlib.Path) -> list[tuple[int, int]]:
        """`sizes` as numbers. Raises UserError unless there is one for each image."""
        found = [part.partition("x") for part in self.sizes.split()]
        if len(found) != self.n_imgs or not all(w.isdecimal() and h.isdecimal() for w, _, h in found):
            raise errors.UserError(f"{fpath}: lacks the sizes of its photos. {REMEDY}")
        return [(int(w), int(h)) for w, _, h in found]


class Complete(_File, frozen=True, kw_only=True):
    """The contents of complete.json: the fields of Sidecar by the name of the shard."""

    xxh3_128: dict[str, Sum]
    pieces: dict[str, Sum] = {}
    sizes: dict[str, str] = {}

    @classmethod
    def of(cls, sidecars: dict[str, Sidecar]) -> "Complete":
        """Merges sidecars, given in order by the name of their shard."""
        return cls(
            xxh3_128={name: s.xxh3_128 for name, s in sidecars.items()},
            skipped=tuple(skipped for s in sidecars.values() for skipped in s.skipped),
            pieces={name: s.pieces for name, s in sidecars.items()},
            files=next(iter(sidecars.values())).files,
            sizes={name: s.sizes for name, s in sidecars.items() if s.sizes},
        )


def _fields(file: _File) -> dict[str, tp.Any]:
    """In the order in which they are written. Dumps without padding have no `sizes`."""
    fields = msgspec.to_builtins(file)
    order = ("n_imgs", "xxh3_128", "skipped", "pieces", "files", *["sizes"] * bool(fields["sizes"]))
    return {name: fields[name] for name in order if name in fields}
