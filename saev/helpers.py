"""Small things that several floors need: atomic files, progress, lazy package attributes."""

import collections.abc
import contextlib
import fcntl
import hashlib
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import sys
import time
import typing as tp
import uuid

import tqdm

logger = logging.getLogger("saev")

T = tp.TypeVar("T")


@contextlib.contextmanager
def atomic(fpath: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    """Yields a temporary path beside `fpath`; on success it is fsynced and renamed to `fpath`, on any error removed.

    A reader therefore sees the old file, the whole new file, or none; never a part.
    """
    fpath.parent.mkdir(parents=True, exist_ok=True)
    tmp_fpath = fpath.with_name(f".{fpath.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield tmp_fpath
        with tmp_fpath.open("rb+") as fd:
            os.fsync(fd.fileno())
        tmp_fpath.replace(fpath)
        _sync_directory(fpath.parent)
    finally:
        tmp_fpath.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(fpath: pathlib.Path, what: str) -> collections.abc.Iterator[None]:
    """Holds the lock file `fpath` alone: a second process waits here, and says for `what`. A killed process lets go.

    On a file system without locks (some network ones) nobody waits.
    """
    fpath.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(fpath, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(fd, what)
            if _is_open_at(fd, fpath):
                break
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # who held it has removed it
    try:
        yield
    finally:
        fpath.unlink(missing_ok=True)
        os.close(fd)


def _is_open_at(fd: int, fpath: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), fpath.stat())
    except FileNotFoundError:
        return False


def _lock(fd: int, what: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process: %s", what)
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as err:
        logger.warning("no lock: %s (%s)", what, err)


def _sync_directory(dpath: pathlib.Path) -> None:
    """A rename is on the disk once its directory is."""
    fd = os.open(dpath, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(fpath: pathlib.Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic(fpath) as tmp_fpath:
        tmp_fpath.write_text(text, encoding="utf-8")


def canonical_json(obj: object) -> str:
    """JSON with sorted keys and no spaces: equal objects give equal text, so its hash names the object."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"))


def hash_of(obj: object) -> str:
    """sha256 hex digest of an object's canonical JSON."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def hash_file(fpath: pathlib.Path) -> str:
    """sha256 hex digest of a file's bytes."""
    with fpath.open("rb") as fd:
        return hashlib.file_digest(fd, "sha256").hexdigest()


def progress(
    iterable: collections.abc.Iterable[T], desc: str, total: int, unit: str, every_s: float = 30.0
) -> collections.abc.Iterator[T]:
    """Yields from `iterable` and shows rate and time left: a bar on a terminal, a plain line each `every_s` seconds in a log.

    One of several processes that share a terminal writes plain lines too.
    """
    if sys.stderr.isatty() and multiprocessing.parent_process() is None:
        yield from tqdm.tqdm(iterable, desc=desc, total=total, unit=f" {unit}", dynamic_ncols=True)
        return
    start_s = last_s = time.monotonic()
    for done, item in zip(itertools.count(), iterable):
        now_s = time.monotonic()
        if now_s - last_s >= every_s and done:
            rate = done / (now_s - start_s)
            left = f"{(total - done) / rate:.0f} s left"
            logger.info("%s: %d/%d %s, %.1f/s, %s", desc, done, total, unit, rate, left)
            last_s = now_s
        yield item


def lazy_attributes(package: str, table: dict[str, str]) -> collections.abc.Callable[[str], object]:
    """Returns a module `__getattr__` (PEP 562): `table` maps a public name to the submodule that defines it.

    An empty submodule name stands for the submodule of that very name. Importing the package then costs
    nothing (no torch) until a name is used.
    """

    def __getattr__(name: str) -> object:  # noqa: N807
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{table[name] or name}")
        return getattr(module, name) if table[name] else module

    return __getattr__
