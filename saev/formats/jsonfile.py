"""Reads JSON files by a schema.

A schema is a type that msgspec understands: a dataclass, a msgspec.Struct, a TypedDict, `dict[str, int]`, or
a type with bounds such as `Annotated[int, msgspec.Meta(ge=1, le=2**31)]`. Anything else is a UserError that
names the file: a wrong type, a missing or repeated key, a number out of bounds, bytes that are not UTF-8,
deep nesting, a bare NaN.
"""

import collections.abc
import json
import math
import pathlib
import stat
import typing as tp

import msgspec
import xxhash

from saev import errors, helpers

SEALED, CHECKSUM = "sealed", "xxh3_128"
"""Keys of files with their own checksum. Two, so that damage to one cannot make a file pass as older."""
MAX_BYTES = 2**28
"""Larger files are refused before they are read. (JSON Lines have their own reader.)"""


def read(fpath: pathlib.Path, schema: tp.Any, remedy: str, max_bytes: int = MAX_BYTES) -> tp.Any:
    """Reads one JSON value.

    Args:
        fpath: a regular file. FIFOs and devices would block, so they are refused.
        schema: the type of the value. Unknown keys are ignored unless the schema forbids them.
        remedy: what the user should do: one sentence, the end of the error message.

    Raises:
        UserError: the file is not regular, is larger than `max_bytes`, or does not fit the schema.
        OSError: the file cannot be read (FileNotFoundError if it does not exist).
    """
    return parse(read_bytes(fpath, remedy, max_bytes), schema, str(fpath), remedy)


def read_bytes(fpath: pathlib.Path, remedy: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Reads the bytes of a regular file of bounded size. Raises the same errors as `read`."""
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
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        obj = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_float)
        return msgspec.convert(obj, schema, str_keys=True)
    except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as err:
        what = "too deeply nested" if isinstance(err, RecursionError) else errors.first_line(err)
        raise errors.UserError(f"{where}: cannot be read ({what}). {remedy}") from err


def parse_line(data: bytes | str, schema: tp.Any) -> tp.Any:
    """Parses one JSON value quickly, without checking for repeated keys. For files of millions of lines.

    Raises:
        ValueError (also msgspec's ValidationError), RecursionError, msgspec.MsgspecError: it does not fit.
    """
    return msgspec.json.decode(data, type=schema)


def dumps(obj: object, indent: int = 0) -> str:
    """Returns JSON text. NaN and infinities become null. An indent of 0 gives one line without spaces."""
    try:
        text = msgspec.json.encode(obj)
        return (msgspec.json.format(text, indent=indent) if indent else text).decode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: escape its surrogates as \udcXX
        plain = _with_nulls(msgspec.to_builtins(obj))
        return json.dumps(plain, indent=indent or None, separators=None if indent else (",", ":"))


# ---- files with a checksum of their own ----


def seal(obj: collections.abc.Mapping[str, object]) -> str:
    """Returns JSON text with a checksum of its own values, for `read_sealed`. Reformatting keeps it valid."""
    plain = json.loads(dumps({**obj, SEALED: 1}))
    return json.dumps(plain | {CHECKSUM: checksum(plain)}, indent=4)


def read_sealed(
    fpath: pathlib.Path, schema: tp.Any, remedy: str, max_bytes: int = MAX_BYTES, old: bool = False
) -> tp.Any:
    """Reads what `seal` wrote.

    Args:
        old: accept files of older versions, which have neither key.

    Raises:
        UserError, OSError: as `read`; also if the values changed since they were written.
    """
    data = read_bytes(fpath, remedy, max_bytes)
    obj = parse(data, dict[str, tp.Any], str(fpath), remedy)
    recorded, is_sealed = obj.pop(CHECKSUM, None), SEALED in obj
    is_old = old and recorded is None and not is_sealed
    if not is_old and (not is_sealed or recorded != checksum(obj)):
        raise errors.UserError(f"{fpath}: its values changed since they were written (checksum). {remedy}")
    obj.pop(SEALED, None)
    try:
        return msgspec.convert(obj, schema, str_keys=True)
    except ValueError as err:  # from msgspec, or for a lone surrogate
        raise errors.UserError(f"{fpath}: cannot be read ({errors.first_line(err)}). {remedy}") from err


def checksum(obj: dict[str, tp.Any], payload: bytes = b"") -> str:
    """Returns the XXH3-128 of an object's canonical JSON, a line feed, and `payload`."""
    digest = xxhash.xxh3_128(helpers.canonical_json(obj).encode() + b"\n")
    digest.update(payload)
    return digest.hexdigest()


def _with_nulls(obj: object) -> object:
    if isinstance(obj, dict):
        return {key: _with_nulls(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [_with_nulls(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} is repeated")
    return out


def _refuse_constant(token: str) -> tp.NoReturn:
    raise ValueError(f"{token} is not JSON")


def _float(token: str) -> float:
    if not math.isfinite(value := float(token)):
        raise ValueError(f"{token} is out of range")
    return value
