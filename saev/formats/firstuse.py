"""Computes piece checksums for shards that lack them, on first use, and keeps them in the user's cache.

The cache key is the shard's path, size, modification time and inode, and the checksum that its dump recorded.
So a rewritten shard is read again, and a shard whose bytes change silently is refused.
"""

import collections.abc
import contextlib
import logging
import os
import pathlib

import xxhash

from saev import errors, helpers

logger = logging.getLogger("saev")

N_SUM = 16
"""Bytes of the checksum at the end of a cached file."""


def cache_dpath() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
    return pathlib.Path(home) / "saev" / "checksums"


def kept(fpath: pathlib.Path, recorded: str, take: collections.abc.Callable[[], bytes]) -> bytes:
    """Returns the cached checksums of the shard `fpath`, or computes them with `take`.

    Args:
        recorded: the checksum that the dump recorded, part of the cache key.
    """
    name = _name(fpath, recorded)
    kept_fpath = cache_dpath() / name
    if (found := _read(kept_fpath)) is not None:
        return found
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written
            lock_fpath = kept_fpath.with_name(f".{name}.lock")
            stack.enter_context(helpers.locked(lock_fpath, f"it is reading {fpath}"))
        if (found := _read(kept_fpath)) is not None:  # the process that held the lock wrote it
            return found
        taken = take()
        if _name(fpath, recorded) != name:
            raise errors.UserError(
                f"{fpath}: changed while it was read. Run the command again when no process writes to it."
            )
        try:
            with helpers.atomic(kept_fpath) as tmp_fpath:
                tmp_fpath.write_bytes(taken + _sum(name, taken))
        except OSError as err:
            logger.warning(
                "%s: its checksums cannot be cached in %s (%s), so every command reads it in full. "
                "Set XDG_CACHE_HOME to a writable folder.",
                fpath,
                cache_dpath(),
                err.strerror,
            )
        return taken


def _name(fpath: pathlib.Path, recorded: str) -> str:
    info = fpath.stat()
    key = [str(fpath.resolve()), info.st_size, info.st_mtime_ns, info.st_ino, recorded]
    return helpers.hash_of(key)


def _read(kept_fpath: pathlib.Path) -> bytes | None:
    """Returns the cached checksums, or None if they are missing or damaged."""
    try:
        data = kept_fpath.read_bytes()
    except OSError:
        return None
    taken = data[:-N_SUM]
    return taken if data[-N_SUM:] == _sum(kept_fpath.name, taken) else None


def _sum(name: str, taken: bytes) -> bytes:
    return xxhash.xxh3_128_digest(name.encode() + taken)
