"""Helpers for all layers of the package: atomic files, locks, hashes, progress."""

import collections.abc
import contextlib
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import re
import shutil
import socket
import stat
import sys
import time
import typing as tp
import uuid

import tqdm

from saev import errors

logger = logging.getLogger("saev")

T = tp.TypeVar("T")


# ---- atomic files, and what killed writers leave ----

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?:(?P<host>[0-9a-f]{8})-)?[0-9a-f]{32}\.(?:tmp|old)", re.DOTALL)
"""Names of temporary files and folders. A running writer holds a lock (flock) on its own."""
ABANDONED_S = 24 * 3600.0
"""Seconds after which temporaries of other machines, whose locks may be invisible here, are removed."""


@contextlib.contextmanager
def atomic(fpath: pathlib.Path) -> collections.abc.Generator[pathlib.Path]:
    """Yields a temporary path beside `fpath`. On success it is fsynced and renamed to `fpath`; on an error it
    is removed.

    So a reader sees the old file, the complete new file, or none. If the process is killed, the temporary
    file stays until the next writer of the same file, or `sweep`, removes it.
    """
    with errors.naming(fpath), _temporary(fpath, is_folder=False) as tmp_fpath:
        yield tmp_fpath
        with tmp_fpath.open("rb+") as fd:
            os.fsync(fd.fileno())
        tmp_fpath.replace(fpath)
        folder = os.open(fpath.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # a rename is on disk only when its directory is
        finally:
            os.close(folder)


@contextlib.contextmanager
def atomic_folder(dpath: pathlib.Path) -> collections.abc.Generator[pathlib.Path]:
    """Like `atomic`, for a folder: yields an empty temporary folder that replaces `dpath` on success.

    An existing folder is first renamed and removed last. If the process is killed between the two renames,
    `sweep` renames it back.
    """
    with errors.naming(dpath), _temporary(dpath, is_folder=True) as tmp_dpath:
        yield tmp_dpath
        with _replacing(dpath):
            old_dpath = tmp_dpath.with_suffix(".old")
            if dpath.exists():
                dpath.rename(old_dpath)
            try:
                tmp_dpath.rename(dpath)
            except OSError:
                if old_dpath.exists():
                    old_dpath.rename(dpath)
                raise
            shutil.rmtree(old_dpath, ignore_errors=True)


def sweep(dpath: pathlib.Path, name: str = "") -> None:
    """Removes from a folder the temporaries and locks that killed processes of ours left there.

    What a running process holds stays. A folder that a killed `atomic_folder` had renamed gets its name back.

    Args:
        name: sweep only what belongs to the file or folder of this name. Empty means everything.
    """
    for path in sorted(dpath.glob(f".{glob.escape(name)}.*" if name else ".*")):
        match = TEMPORARY.fullmatch(path.name)
        if match and name in ("", match["name"]) and (match["host"] == _host() or _is_old(path)):
            if path.suffix == ".old":
                _put_back(path, dpath / match["name"])
            else:
                _remove_if_free(path)
        elif path.suffix == ".lock" and (not name or path.name == f".{name}.lock"):
            _remove_if_free(path)


def _put_back(old_dpath: pathlib.Path, dpath: pathlib.Path) -> None:
    with _replacing(dpath):
        if not dpath.exists():
            with contextlib.suppress(FileNotFoundError):  # its owner was faster
                old_dpath.rename(dpath)
        shutil.rmtree(old_dpath, ignore_errors=True)


def _replacing(dpath: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    return locked(dpath.with_name(f".{dpath.name}.lock"), f"it is replacing {dpath}")


def _remove_if_free(path: pathlib.Path) -> None:
    """Removes a temporary or a lock (an empty file) unless a process holds it."""
    is_folder = path.is_dir()
    access = os.O_RDONLY if is_folder else os.O_RDWR
    try:
        fd = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # gone, or not ours
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        info = os.fstat(fd)
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)
        elif stat.S_ISREG(info.st_mode) and (path.suffix != ".lock" or info.st_size == 0):
            path.unlink(missing_ok=True)
    except OSError:  # held, or a file system without locks
        pass
    finally:
        os.close(fd)


@contextlib.contextmanager
def _temporary(path: pathlib.Path, is_folder: bool) -> collections.abc.Generator[pathlib.Path]:
    """Yields a new, locked, empty file or folder beside `path`, and removes it unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    tmp_path = path.with_name(f".{path.name}.{_host()}-{uuid.uuid4().hex}.tmp")
    fd = None
    try:
        while fd is None:
            fd = _created(tmp_path, is_folder)
        yield tmp_path
    finally:
        if is_folder:
            shutil.rmtree(tmp_path, ignore_errors=True)
        else:
            tmp_path.unlink(missing_ok=True)
        if fd is not None:
            os.close(fd)


def _created(tmp_path: pathlib.Path, is_folder: bool) -> int | None:
    """Creates a file or folder and returns it open and locked, or None if a sweep was faster."""
    if is_folder:
        tmp_path.mkdir()
    try:
        new_file = os.O_RDWR | os.O_CREAT | os.O_EXCL
        fd = os.open(tmp_path, os.O_RDONLY if is_folder else new_file, 0o666)
    except FileNotFoundError:
        if is_folder and tmp_path.parent.is_dir():
            return None
        raise
    with contextlib.suppress(OSError):  # without locks nothing is swept either
        fcntl.flock(fd, fcntl.LOCK_SH)
    if _is_open_at(fd, tmp_path):
        return fd
    os.close(fd)
    return None


@functools.cache
def _host() -> str:
    """Identifies this machine by eight hex digits."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_old(path: pathlib.Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_S
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(fpath: pathlib.Path, what: str) -> collections.abc.Generator[None]:
    """Holds the lock file `fpath` exclusively. Another process waits here and logs `what` it waits for.

    A killed process releases the lock. On a file system without locks (some network ones), nobody waits.
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
        os.close(fd)  # the previous holder has removed it
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
        logger.warning("cannot lock against another process: %s (%s)", what, err)


def write_text(fpath: pathlib.Path, text: str) -> None:
    """Writes a text file atomically, as `printable` UTF-8."""
    with atomic(fpath) as tmp_fpath:
        tmp_fpath.write_text(printable(text), encoding="utf-8")


def printable(text: str) -> str:
    """Escapes surrogates (Python's form of file-name bytes that are not UTF-8) as \\udcXX."""
    return text.encode("utf-8", "backslashreplace").decode()


def canonical_json(obj: object) -> str:
    """Returns JSON with sorted keys and no spaces, so that equal objects give equal text, and hashes."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"))


def hash_of(obj: object) -> str:
    """Returns the sha256 hex digest of an object's canonical JSON."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def hash_file(fpath: pathlib.Path) -> str:
    """Returns the sha256 hex digest of a file's bytes."""
    with fpath.open("rb") as fd:
        return hashlib.file_digest(fd, "sha256").hexdigest()


def progress(
    iterable: collections.abc.Iterable[T], desc: str, total: int, unit: str, every_s: float = 30.0
) -> collections.abc.Iterator[T]:
    """Yields from `iterable` and shows the rate and the time left.

    On a terminal this is a progress bar. In a log, or in one of several processes that share a terminal, it
    is a line every `every_s` seconds.
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
