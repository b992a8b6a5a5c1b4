"""Ways to damage a file in place, and to restore it: bytes, size and time of change."""

import collections.abc
import contextlib
import copy
import json
import os
import pathlib
import typing as tp

import numpy as np


@contextlib.contextmanager
def kept(fpath: pathlib.Path) -> collections.abc.Generator[bytes]:
    """Yields the file's bytes; afterwards the file is as it was."""
    data, info = fpath.read_bytes(), fpath.stat()
    try:
        yield data
    finally:
        if fpath.is_dir():
            fpath.rmdir()
        elif fpath.is_symlink() or not fpath.is_file():
            fpath.unlink(missing_ok=True)
        if not fpath.exists() or fpath.read_bytes() != data:
            fpath.write_bytes(data)
        os.utime(fpath, ns=(info.st_atime_ns, info.st_mtime_ns))


def overwrite(fpath: pathlib.Path, data: bytes) -> None:
    """As a failing disk does it: the time of change stays."""
    info = fpath.stat()
    fpath.write_bytes(data)
    os.utime(fpath, ns=(info.st_atime_ns, info.st_mtime_ns))


def flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def bits(n_bytes: int, n: int, seed: int) -> list[int]:
    """Which bits to flip: all, or n drawn ones, of which half lie among the first kilobyte, where headers are."""
    n_bits = 8 * n_bytes
    if n >= n_bits:
        return list(range(n_bits))
    rng = np.random.default_rng(seed)
    first = rng.integers(0, min(n_bits, 8 * 1024), n // 2)
    return sorted({*first.tolist(), *rng.integers(0, n_bits, n - n // 2).tolist()})


WHOLE: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"7",
    "string": b'"x"',
    "not JSON": b"{]",
    "cut object": b'{"a": 1',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 200_000,
    "NaN": b'{"a": NaN}',
    "twin keys": b'{"a": 1, "a": 2}',
    "zeros": b"\0" * 64,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "HTML": b"<!doctype html><html>not found</html>",
}
"""Contents that no file of ours has."""

VALUES: tuple[object, ...] = (
    *(None, True, -1, 0, 3, 10**18, 10**400, 1.5, float("nan"), float("inf")),
    *("", "x", "\udcff", "../../etc/passwd", "/etc/passwd", "9" * 5000),
    *([], {}, [[]], [None], ["x", 1], {"x": {"y": [1]}}),
)
"""Values to put in place of each value of a JSON file."""


def mutations(obj: object) -> collections.abc.Iterator[tuple[str, object]]:
    """(what was done, the value with one change): each value replaced by each of VALUES, each key dropped."""
    for path in _paths(obj):
        where = ".".join(map(str, path))
        for value in VALUES:
            yield f"{where} = {str(value)[:30]!r}", _with(obj, path, value)
        changed = copy.deepcopy(obj)
        parent = _at(changed, path[:-1])
        del parent[path[-1]]
        yield f"{where} left out", changed


def _paths(obj: object, prefix: tuple[tp.Any, ...] = ()) -> list[tuple[tp.Any, ...]]:
    items: list[tuple[tp.Any, object]] = []
    if isinstance(obj, dict):
        items = list(obj.items())
    elif isinstance(obj, list):
        items = list(enumerate(obj[:1]))  # one element stands for all
    return [p for key, value in items for p in ((*prefix, key), *_paths(value, (*prefix, key)))]


def _at(obj: tp.Any, path: tuple[tp.Any, ...]) -> tp.Any:
    for key in path:
        obj = obj[key]
    return obj


def _with(obj: object, path: tuple[tp.Any, ...], value: object) -> object:
    changed = copy.deepcopy(obj)
    _at(changed, path[:-1])[path[-1]] = value
    return changed


def to_bytes(obj: object) -> bytes:
    """JSON as an attacker or a bug writes it: NaN and lone surrogates included."""
    return json.dumps(obj).encode("utf-8", "surrogatepass")


def no_files(fpath: pathlib.Path) -> collections.abc.Iterator[str]:
    """Puts something that is no file in the file's place, and says what."""
    fpath.unlink()
    yield "missing"
    os.mkfifo(fpath)
    yield "a FIFO"
    fpath.unlink()
    fpath.symlink_to(fpath.name)
    yield "a link to itself"
    fpath.unlink()
    fpath.mkdir()
    yield "a folder"
    fpath.rmdir()
