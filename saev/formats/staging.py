"""Copies of shard directories on a fast disk, such as a node's own (--stage-to).

A copy is shared by all processes of the machine. After a kill it continues with the first missing file.
"""

import collections.abc
import contextlib
import logging
import pathlib
import shutil

import beartype
import xxhash

from saev import errors, fields, helpers
from saev.formats import shards

logger = logging.getLogger("saev")

_folder: pathlib.Path | None = None
_sources: dict[pathlib.Path, shards.ShardDir] = {}
"""Copy -> its original."""
BLOCK = 2**20
"""Bytes that are read at once."""
ZEROS = bytes(BLOCK)


@contextlib.contextmanager
def to(typed: str) -> collections.abc.Generator[None]:
    """Inside, shard directories are copied to this folder before they are read. Empty: no change.

    typed: the folder. `~` and `$VAR` are expanded here, on the machine that runs the stage.
    """
    global _folder
    before = _folder
    if typed:
        _folder = pathlib.Path(fields.expand(typed, "--stage-to"))
    try:
        yield
    finally:
        _folder = before


@beartype.beartype
def local(root: str, partial: bool = False, flag: str = "--data") -> str:
    """Copies a shard directory, unless it was copied before, and returns the copy's path.

    Without --stage-to, or for a dump that may still grow (`partial`), returns `root`. flag: for messages.

    Raises:
        UserError: it is an incomplete shard directory, a shard differs from its checksum, or the disk has too
            little space.
    """
    if _folder is None or partial:
        return root
    source = shards.ShardDir.open(root, flag=flag)
    # The fingerprint is of the contents, so a dump made anew gets a new copy. The name is a hash of metadata.
    dpath = _folder / shards.COPIES / source.fingerprint[:16] / source.metadata.hash
    with helpers.locked(dpath.with_name(".copying.lock"), f"it copies {root} to {dpath}"):
        dpath.mkdir(exist_ok=True)
        helpers.sweep(dpath)
        todo = [f for f in sorted(source.dpath.iterdir()) if f.is_file() and not _is_copied(f, dpath)]
        # metadata.json last, because it makes the copy a shard directory.
        todo.sort(key=lambda fpath: fpath.name == "metadata.json")
        todo = [fpath for fpath in todo if not fpath.name.startswith(".")]
        n_bytes, free = sum(_allocated(f) for f in todo), shutil.disk_usage(dpath).free
        if n_bytes > free:
            raise errors.UserError(
                f"--stage-to {_folder}: {root} needs {n_bytes / 1e9:,.1f} GB there, and {free / 1e9:,.1f} GB "
                "are free. Free some space, pass another folder, or leave the flag out."
            )
        for fpath in helpers.progress(todo, f"copy to {_folder}", len(todo), "files"):
            _copy(source, fpath, dpath / fpath.name)
    _sources[dpath] = source
    if todo:
        logger.info("--stage-to: copied %.2f GB of %s to %s", n_bytes / 1e9, root, dpath)
    return str(dpath)


@beartype.beartype
def original(copy: shards.ShardDir) -> shards.ShardDir:
    """The directory that was copied, where files may have been added since. Itself if it is not a copy."""
    return _sources.get(copy.dpath, copy)


@beartype.beartype
def renew(copy: shards.ShardDir, shard_i: int, is_right: collections.abc.Callable[[], bool]) -> bool:
    """Copies a damaged shard again, unless another thread or process has done so.

    Args:
        is_right: reads the copy anew and compares it with its checksums.

    Returns:
        Whether it is right now. False also if this process did not ask for the copy.

    Raises:
        UserError: the original differs from its checksum too.
    """
    if (source := _sources.get(copy.dpath)) is None:
        return False
    fpath = copy.acts_fpath(shard_i)
    with helpers.locked(copy.dpath.with_name(".copying.lock"), f"it copies {source.dpath} to {copy.dpath}"):
        if is_right():
            return True
        _copy(source, source.acts_fpath(shard_i), fpath)
    logger.warning("--stage-to: %s differed from its checksum, and was copied again", fpath)
    return is_right()


def _allocated(fpath: pathlib.Path) -> int:
    """Bytes that a file takes on its disk, but not more than its length. Holes stay holes in a copy."""
    stat = fpath.stat()
    return min(stat.st_size, 512 * stat.st_blocks)


def _is_copied(fpath: pathlib.Path, dpath: pathlib.Path) -> bool:
    """Whether the copy exists. Its readers compare it with the checksums, so its size is enough here."""
    copy = dpath / fpath.name
    return copy.exists() and copy.stat().st_size == fpath.stat().st_size


def _copy(source: shards.ShardDir, fpath: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file atomically. What was read of a shard is compared with the shard's checksum.

    Blocks of zeros become holes, so that padding takes no space.
    """
    shard_i = next((i for i in source.shard_is if source.acts_fpath(i) == fpath), None)
    total, left = xxhash.xxh3_128(), 0 if shard_i is None else source.n_bytes(shard_i)
    with helpers.atomic(target) as tmp_fpath, fpath.open("rb") as fd, tmp_fpath.open("wb") as out:
        while block := fd.read(BLOCK):
            if block == ZEROS[: len(block)]:
                out.seek(len(block), 1)
            else:
                out.write(block)
            total.update(block[:left])  # a shard's padding is not in its checksum
            left -= min(left, len(block))
        out.truncate()
        sidecar = None if shard_i is None else source.sidecars.get(shard_i)
        if sidecar and sidecar.xxh3_128 != total.hexdigest():
            raise errors.UserError(f"{fpath}: differs from its checksum. {source.remedy}")
    shutil.copystat(fpath, target)
