"""The data files of a gallery: classic scripts, because a page on disk may not fetch (docs/gallery.md)."""

import base64
import math
import pathlib
import re
import typing as tp

import msgspec
import numpy as np
import xxhash

from saev import errors, helpers
from saev.formats import jsonfile

TYPES = {
    "u1": np.dtype(np.uint8),
    "u2": np.dtype("<u2"),
    "u4": np.dtype("<u4"),
    "i4": np.dtype("<i4"),
    "f4": np.dtype("<f4"),
}
SUM = re.compile(rb', "([0-9a-f]{32})"')
"""The checksum at a file's end. Files of older versions have none; damage does not make a file into one."""
SUM_BYTES = 36
ESCAPED = {c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
"""Characters that would end a script, or a line of one."""


class Packed(msgspec.Struct, frozen=True, gc=False):
    """Numbers, as msgspec writes them: {"t": type, "n": shape, "b": base64}. A gallery has half a million."""

    t: str
    n: tuple[int, ...]
    b: bytes


def packed(values: object, kind: str) -> Packed:
    """Numbers as base64 of little-endian bytes. kind: u1, u2, u4, i4 or f4.

    Raises:
        OverflowError: an integer does not fit.
    """
    array, dtype = np.asarray(values), TYPES[kind]
    if array.dtype != dtype:
        given, array = array, array.astype(dtype)
        is_exact = kind == "f4" or np.can_cast(given.dtype, dtype, "safe")
        if not is_exact and not np.array_equal(array, given):
            raise OverflowError(f"numbers do not fit in {kind}")
    return Packed(kind, array.shape, array.tobytes())


class Column:
    """Numbers of which many small parts are packed, without a copy of the whole."""

    def __init__(self, values_n: np.ndarray, kind: str):
        """values_n: already of this kind."""
        assert values_n.dtype == TYPES[kind] and values_n.ndim == 1, (values_n.dtype, kind)
        self._kind, self._size = kind, values_n.itemsize
        self._bytes = np.ascontiguousarray(values_n).view(np.uint8)

    def part(self, start: int, stop: int) -> Packed:
        """`packed` of values_n[start:stop], which exist."""
        data = self._bytes[self._size * start : self._size * stop].tobytes()
        return Packed(self._kind, (stop - start,), data)


def write(dpath: pathlib.Path, name: str, value: dict[str, object]) -> None:
    """Writes data/<name>.js in the gallery `dpath`."""
    fpath = dpath / "data" / f"{name}.js"
    fpath.parent.mkdir(parents=True, exist_ok=True)
    write_at(fpath, name, value)


def write_at(fpath: pathlib.Path, name: str, value: dict[str, object]) -> None:
    """Writes the data file of this name to another place, from which it is moved later.

    The file ends with the XXH3-128 of the JSON text.
    """
    body = helpers.printable(jsonfile.dumps(value).strip())
    for char, escaped in ESCAPED.items():  # much faster than str.translate
        body = body.replace(char, escaped)
    digest = xxhash.xxh3_128_hexdigest(body.encode())
    helpers.write_text(fpath, f'saev.put("{name}", {body}, "{digest}");\n')


def read(dpath: pathlib.Path, name: str, remedy: str, schema: tp.Any = dict[str, tp.Any]) -> tp.Any:
    """Reads data/<name>.js of the gallery `dpath`. Its text is parsed as JSON and never run.

    Args:
        schema: the type of the value, as for `jsonfile.read`.

    Raises:
        UserError: it is missing, damaged, or differs from its checksum. `remedy` ends the message.
    """
    fpath = dpath / "data" / f"{name}.js"
    try:
        data = jsonfile.read_bytes(fpath, remedy)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise errors.UserError(f"{fpath}: no such file. {remedy}") from err
    start, end = f'saev.put("{name}", '.encode(), b");\n"
    if not (data.startswith(start) and data.endswith(end)):
        raise errors.UserError(f"{fpath}: is not a gallery's data file. {remedy}")
    body = data[len(start) : -len(end)]
    if found := SUM.fullmatch(body[-SUM_BYTES:]):
        body = body[:-SUM_BYTES]
        if xxhash.xxh3_128_hexdigest(body).encode() != found[1]:
            raise errors.UserError(f"{fpath}: was changed after it was written (checksum). {remedy}")
    return jsonfile.parse(body, schema, str(fpath), remedy)


def unpacked(value: tp.Any, where: str, remedy: str) -> np.ndarray:
    """Inverts `packed`.

    Raises:
        UserError: it is not what `packed` made. `where` names the file.
    """
    try:
        data, shape = base64.b64decode(value["b"], validate=True), tuple(value["n"])
        array = np.frombuffer(data, TYPES[value["t"]])
        if math.prod(shape) != len(array):
            raise ValueError(f"{len(array)} numbers instead of {math.prod(shape)}")
        return array.reshape(shape)
    except (KeyError, TypeError, ValueError) as err:
        raise errors.UserError(
            f"{where}: its numbers cannot be read ({errors.first_line(err)}). {remedy}"
        ) from err
