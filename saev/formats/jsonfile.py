"""JSON from disk, read by a schema: the one door through which JSON files enter.

A schema is a type that msgspec understands: a dataclass, a msgspec.Struct, a TypedDict, `dict[str, int]`, or a type with
bounds such as `Annotated[int, msgspec.Meta(ge=1, le=2**31)]`. What does not fit it (another type, a missing key, a number out
of bounds, bytes that are not UTF-8, endless brackets, a bare NaN, a key that comes twice) is one UserError that names the file.
"""

import json
import pathlib
import stat
import typing as tp

import msgspec

from saev import errors

MAX_BYTES = 2**28
"""Larger files are refused before they are read; JSON Lines have a reader of their own."""


def read(fpath: pathlib.Path, schema: tp.Any, remedy: str, max_bytes: int = MAX_BYTES) -> tp.Any:
    """Reads one JSON value.

    Args:
        fpath: a regular file; a FIFO or a device would block, and is refused.
        schema: what the value must be; unknown keys are ignored unless the schema forbids them.
        remedy: one sentence that ends the error message: what the user should do.

    Raises:
        UserError: the file is not a regular one, is larger than `max_bytes`, or does not hold what the schema asks for.
        OSError: the file cannot be read (FileNotFoundError: there is none).
    """
    return parse(read_bytes(fpath, remedy, max_bytes), schema, str(fpath), remedy)


def read_bytes(fpath: pathlib.Path, remedy: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of bounded size. Raises as `read`."""
    info = fpath.stat()
    if not stat.S_ISREG(info.st_mode):
        raise errors.UserError(f"{fpath}: is not a regular file. {remedy}")
    if info.st_size > max_bytes:
        raise errors.UserError(
            f"{fpath}: is {info.st_size:,} bytes long; at most {max_bytes:,} are expected. {remedy}"
        )
    return fpath.read_bytes()


def parse(data: bytes | str, schema: tp.Any, where: str, remedy: str) -> tp.Any:
    """Parses one JSON value; `where` (a path, or path:line) begins the error message.

    Raises:
        UserError: as `read`.
    """
    try:
        json.loads(data, object_pairs_hook=_without_twins, parse_constant=_no_constant)
        return parse_line(data, schema)
    except (ValueError, RecursionError, msgspec.MsgspecError) as err:
        what = "too deeply nested" if isinstance(err, RecursionError) else errors.first_line(err)
        raise errors.UserError(f"{where}: cannot be read ({what}). {remedy}") from err


def parse_line(data: bytes | str, schema: tp.Any) -> tp.Any:
    """Parses one JSON value without the search for keys that come twice: for files of millions of lines.

    Raises:
        ValueError, RecursionError, msgspec.MsgspecError: it does not fit. (`msgspec.ValidationError` is a ValueError.)
    """
    return msgspec.json.decode(data, type=schema)


def dumps(obj: object, indent: int = 0) -> str:
    """JSON text; NaN and infinities become null, because JSON has neither. indent 0: one line, without spaces."""
    text = msgspec.json.encode(obj)
    return (msgspec.json.format(text, indent=indent) if indent else text).decode()


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twin!r} comes twice")
    return out


def _no_constant(token: str) -> tp.NoReturn:
    raise ValueError(f"{token} is not JSON")
