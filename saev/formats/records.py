"""images.jsonl and shards.json of a shard directory: its images and its complete shards."""

import json
import pathlib
import re
import typing as tp

import msgspec

from saev import errors
from saev.formats import jsonfile
from saev.formats.metadata import AGAIN, Metadata


class Record(tp.NamedTuple):
    """One image of a dataset."""

    path: str
    """Relative to the dataset's root, with forward slashes."""
    label: str


class _Line(msgspec.Struct):
    """A record in JSON."""

    path: str
    label: str


def dumps(records: list[Record]) -> str:
    """Returns ASCII text, because names may hold line separators or surrogates (bytes that are not UTF-8)."""
    return "".join(json.dumps(r._asdict()) + "\n" for r in records)


def loads(data: bytes, fpath: pathlib.Path, n_imgs: int) -> list[Record]:
    """Parses images.jsonl.

    Raises:
        UserError: the number of records is wrong, or a line is damaged or its path leaves the root (named).
    """
    try:
        lines = msgspec.json.Decoder(_Line).decode_lines(data)
    except (ValueError, RecursionError):  # a damaged line, or a name that is not UTF-8
        numbered = enumerate(data.splitlines(), 1)
        lines = [jsonfile.parse(line, _Line, f"{fpath}:{i}", AGAIN) for i, line in numbered]
    out = [Record(line.path, line.label) for line in lines]
    if len(out) != n_imgs:
        raise errors.UserError(f"{fpath}: {len(out)} lines for {n_imgs} images. {AGAIN}")
    for i, record in enumerate(out, 1):
        if (".." in record.path or record.path[:1] in ("", "/", "\0")) and leaves(record.path):
            raise errors.UserError(
                f"{fpath}:{i}: the path {record.path!r} leaves the dataset's folder. {AGAIN}"
            )
    return out


def leaves(path: str) -> bool:
    """Whether a relative path leaves its folder, is empty, or holds NUL."""
    return not path or path.startswith("/") or ".." in path.split("/") or "\0" in path


class _Entry(msgspec.Struct):
    """A shard in shards.json. Other tools write n_examples."""

    name: str
    n_imgs: int | None = None
    n_examples: int | None = None


def read_index(fpath: pathlib.Path, metadata: Metadata) -> list[int]:
    """Returns the numbers of the shards in shards.json.

    Raises:
        UserError: it cannot be read, lists a shard twice, or does not fit metadata.json.
    """
    out: list[int] = []
    for entry in jsonfile.read(fpath, list[_Entry], AGAIN):
        match = re.fullmatch(r"acts([0-9]{6,12})\.bin", entry.name)
        n_imgs = entry.n_examples if entry.n_imgs is None else entry.n_imgs
        if not match or n_imgs is None:
            raise errors.UserError(f"{fpath}: cannot be read (entry {entry}). {AGAIN}")
        shard_i = int(match[1])
        if n_imgs == 0 and shard_i >= metadata.n_shards:  # other tools end with an empty shard
            continue
        if n_imgs != (want := len(metadata.imgs_in(shard_i))):
            raise errors.UserError(
                f"{fpath}: shard {shard_i} holds {n_imgs} images, "
                f"but {want} according to metadata.json. {AGAIN}"
            )
        if out and shard_i <= out[-1]:
            raise errors.UserError(f"{fpath}: shard {shard_i} is out of order. {AGAIN}")
        out.append(shard_i)
    return out
