"""Checks shard directories against their checksums: `python -m saev.data.verify DIR [DIR ...]`."""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import collections.abc
import concurrent.futures
import os
import pathlib
import typing as tp

import tyro

from saev import cli, console, errors, fields, helpers, launch
from saev.formats import shards
from saev.formats.sidecar import Sidecar

MAX_LINES = 20
"""Lines printed at most for undumped shards, and for the differing bytes of one shard."""


def problems(dpath: pathlib.Path | str, n_threads: int = 4) -> collections.abc.Iterator[str]:
    """Yields one line for each problem of a shard directory.

    Reads every file and compares it with its checksums. Dumps of other tools have no checksums: their sizes
    are checked, and their bytes are compared with those seen on first use.

    Raises:
        UserError: this is not a shard directory, or its metadata or index cannot be read.
    """
    found = shards.ShardDir.open_unchecked(dpath)
    yield from _missing(found)
    yield from _damaged(found, n_threads)


def _damaged(found: shards.ShardDir, n_threads: int) -> collections.abc.Iterator[str]:
    _ = found.sidecars
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        results = pool.map(lambda i: _shard_problems(found, i), found.shard_is)
        results = helpers.progress(results, "verify", len(found.shard_is), "shards")
        for result in results:
            yield from result
    if found.is_ours:
        for read in (lambda: found.records, found.transform):
            try:
                read()
            except errors.UserError as err:
                yield str(err)


def _missing(found: shards.ShardDir) -> collections.abc.Iterator[str]:
    n_missing, listed = found.metadata.n_shards - len(found.shard_is), set(found.shard_is)
    shown = (i for i in range(found.metadata.n_shards) if i not in listed)
    for _, i in zip(range(min(n_missing, MAX_LINES)), shown, strict=False):
        yield f"{found.acts_fpath(i)} is not dumped yet"
    if n_missing > MAX_LINES:
        yield f"{found.dpath}: {n_missing - MAX_LINES:,} more shards are not dumped yet"


def _shard_problems(found: shards.ShardDir, shard_i: int) -> list[str]:
    """Compares one shard and its sidecar with every checksum recorded for it."""
    if problem := found.size_problem(shard_i):
        return [problem]
    try:
        sidecar, want = found.sidecars.get(shard_i), found.sums(shard_i)
        fpath = found.sidecar_fpath(shard_i)
        if sidecar and fpath.exists() and Sidecar.loads(fpath) != sidecar:
            return [f"{fpath}: disagrees with complete.json. Delete complete.json."]
        have, xxh3_128 = found.checksums(shard_i)
    except errors.UserError as err:
        return [str(err)]
    except OSError as err:
        return [f"{found.acts_fpath(shard_i)} cannot be read ({err.strerror})"]
    pieces = found.pieces.differing(have, want)
    out = [f"{found.acts_fpath(shard_i)}: {piece} differ from their checksum" for piece in pieces]
    if len(out) > MAX_LINES:
        out[MAX_LINES:] = [f"{found.acts_fpath(shard_i)}: {len(out) - MAX_LINES:,} more ranges"]
    if not out and sidecar and xxh3_128 != sidecar.xxh3_128:
        out = [f"{found.acts_fpath(shard_i)} differs from its checksum"]
    return out


def describe(dpath: pathlib.Path | str) -> str:
    """Describes a directory without problems in one line."""
    found = shards.ShardDir.open_unchecked(dpath)
    metadata, n_skipped = found.metadata, sum(len(s.skipped) for s in found.sidecars.values())
    sums = "checksums match" if found.sidecars else "sizes match, no checksums recorded"
    n_bytes = metadata.n_imgs * metadata.img_bytes
    return (
        f"{dpath}: complete: {metadata.n_imgs:,} images ({n_skipped} left out as corrupt), "
        f"{len(found.shard_is)} shards, {n_bytes / 1e9:.2f} GB {metadata.dtype}, {sums}"
    )


def main() -> None:
    dpaths = cli.parse(
        tp.Annotated[
            tuple[str, ...],
            tyro.conf.arg(
                name="dirs",
                metavar="DIR [DIR ...]",
                help="Shard directories, as printed by `python -m saev.data`.",
                help_behavior_hint="",
            ),
            tyro.conf.Positional,
        ],
        description="Checks shard directories against their checksums.",
    )
    if not dpaths:
        raise errors.UserError("name at least one shard directory.")
    n_missing, n_damaged = 0, 0
    for dpath in map(fields.path, dpaths):
        found = shards.ShardDir.open_unchecked(dpath)
        missing, damaged = list(_missing(found)), list(_damaged(found, os.cpu_count() or 1))
        n_missing, n_damaged = n_missing + len(missing), n_damaged + len(damaged)
        console.say("\n".join([*missing, *damaged]) or describe(dpath))
    again = "un the same `python -m saev.data` command again."
    if n_damaged:
        raise errors.UserError(
            f"{n_missing + n_damaged} problem(s). Delete the damaged files (and the .json beside each), "
            f"then r{again}"
        )
    if n_missing:
        raise errors.UserError(f"the dump is not complete. R{again}")


if __name__ == "__main__":
    launch.entry(main)
