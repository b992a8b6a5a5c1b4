"""Check shard directories against their checksums: `python -m saev.data.verify DIR [DIR ...]`."""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import collections.abc
import concurrent.futures
import os
import pathlib
import typing as tp

import beartype
import tyro

from saev import cli, errors, fields, helpers, launch
from saev.formats import shards


@beartype.beartype
def problems(dpath: pathlib.Path | str, n_threads: int = 4) -> collections.abc.Iterator[str]:
    """Yields one line for each thing that is wrong with a shard directory.

    Every listed shard is read and compared with its checksum; of another tool's dump, which has none, only sizes
    can be checked.

    Raises:
        UserError: not a shard directory, or its metadata or index cannot be read.
    """
    found = shards.ShardDir.look(dpath)
    listed = set(found.shard_is)
    missing = [i for i in range(found.metadata.n_shards) if i not in listed]
    yield from (f"{found.acts_fpath(i)} is not dumped yet" for i in missing)
    sidecars = found.sidecars

    def check(shard_i: int) -> str | None:
        try:
            if problem := found.size_problem(shard_i):
                return problem
            if shard_i not in sidecars:
                return None
            is_right = found.checksum(shard_i) == sidecars[shard_i].xxh3_128
        except OSError as err:
            return f"{found.acts_fpath(shard_i)} cannot be read ({err.strerror})"
        return None if is_right else f"{found.acts_fpath(shard_i)} differs from its checksum"

    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        results = pool.map(check, found.shard_is)
        results = helpers.progress(results, "verify", len(found.shard_is), "shards")
        yield from (problem for problem in results if problem)


@beartype.beartype
def describe(dpath: pathlib.Path | str) -> str:
    """What a directory without problems holds, in one line."""
    found = shards.ShardDir.look(dpath)
    metadata, n_skipped = found.metadata, sum(len(s.skipped) for s in found.sidecars.values())
    sums = "checksums right" if found.sidecars else "no checksums recorded, sizes right"
    return (
        f"{dpath}: complete: {metadata.n_imgs:,} images ({n_skipped} left out as corrupt), "
        f"{len(found.shard_is)} shards, {metadata.n_imgs * metadata.img_bytes / 1e9:.2f} GB {metadata.dtype}, {sums}"
    )


def main() -> None:
    dpaths = cli.parse(
        tp.Annotated[
            tuple[str, ...],
            tyro.conf.arg(
                name="dirs", help="Shard directories, as `python -m saev.data` printed them."
            ),
            tyro.conf.Positional,
        ],
        description="Checks shard directories against their checksums.",
        prog="python -m saev.data.verify",
    )
    if not dpaths:
        raise errors.UserError("name at least one shard directory.")
    n_problems = 0
    for dpath in map(fields.path, dpaths):
        found = list(problems(dpath, os.cpu_count() or 1))
        n_problems += len(found)
        print("\n".join(found) if found else describe(dpath), flush=True)
    if n_problems:
        raise errors.UserError(
            f"{n_problems} problem(s). Delete the named files (and the .json beside each), then run the same `python -m saev.data` command again."
        )


if __name__ == "__main__":
    launch.entry(main)
