"""manifest.json: the checksums of a finished folder's files, for those that a later command reads and believes."""

import collections.abc
import pathlib

import beartype
import msgspec
import xxhash

from saev import errors, helpers
from saev.formats import jsonfile

NAME = "manifest.json"
MAX_BYTES = 2**34


class Manifest(msgspec.Struct):
    files: dict[str, str]
    """Name -> XXH3-128 of its bytes."""


@beartype.beartype
def write(dpath: pathlib.Path, names: collections.abc.Iterable[str]) -> None:
    """Writes a folder's manifest, atomically. Last: a folder without one is not finished."""
    sums = {name: _checksum((dpath / name).read_bytes()) for name in names}
    helpers.write_text(dpath / NAME, jsonfile.seal({"files": sums}))


@beartype.beartype
def read(
    dpath: pathlib.Path, names: collections.abc.Iterable[str], remedy: str
) -> dict[str, bytes]:
    """Name -> bytes of some of the files that a folder's manifest lists.

    Raises:
        UserError: no manifest, or one of the files is missing or not as it was written.
    """
    try:
        sums = jsonfile.read_sealed(dpath / NAME, Manifest, remedy).files
    except FileNotFoundError as err:
        raise errors.UserError(
            f"{dpath}: has no {NAME}: it is not finished, or an older version wrote it. {remedy}"
        ) from err
    out = {}
    for name in names:
        try:
            out[name] = jsonfile.read_bytes(dpath / name, remedy, MAX_BYTES)
        except FileNotFoundError as err:
            raise errors.UserError(f"{dpath / name}: is missing. {remedy}") from err
        if sums.get(name) != _checksum(out[name]):
            raise errors.UserError(f"{dpath / name}: is not as it was written (checksum). {remedy}")
    return out


def _checksum(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)
