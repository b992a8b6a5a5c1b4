"""manifest.json: checksums of the files in a finished folder, which later commands check."""

import collections.abc
import pathlib

import msgspec
import xxhash

from saev import errors, helpers
from saev.formats import jsonfile

NAME = "manifest.json"
MAX_BYTES = 2**34


class Manifest(msgspec.Struct):
    files: dict[str, str]
    """Name -> XXH3-128 of the bytes."""


def write(dpath: pathlib.Path, names: collections.abc.Iterable[str]) -> None:
    """Writes a folder's manifest atomically. Call it last: a folder without one is unfinished."""
    sums = {name: xxhash.xxh3_128_hexdigest((dpath / name).read_bytes()) for name in names}
    helpers.write_text(dpath / NAME, jsonfile.seal({"files": sums}))


def read(dpath: pathlib.Path, names: collections.abc.Iterable[str], remedy: str) -> dict[str, bytes]:
    """Reads files that a folder's manifest lists: name -> bytes.

    Raises:
        UserError: there is no manifest, or a file is missing or was changed.
    """
    try:
        sums = jsonfile.read_sealed(dpath / NAME, Manifest, remedy).files
    except FileNotFoundError as err:
        raise errors.UserError(
            f"{dpath}: has no {NAME}; it is unfinished, or from an older version. {remedy}"
        ) from err
    out = {}
    for name in names:
        try:
            out[name] = jsonfile.read_bytes(dpath / name, remedy, MAX_BYTES)
        except FileNotFoundError as err:
            raise errors.UserError(f"{dpath / name}: is missing. {remedy}") from err
        if sums.get(name) != xxhash.xxh3_128_hexdigest(out[name]):
            raise errors.UserError(f"{dpath / name}: was changed after it was written (checksum). {remedy}")
    return out
