"""Small things that several floors need: atomic files, progress."""

import collections.abc
import contextlib
import errno
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

import beartype
import tqdm

logger = logging.getLogger("saev")

T = tp.TypeVar("T")


# ---- files that appear whole, and what killed writers leave ----

TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?:(?P<host>[0-9a-f]{8})-)?[0-9a-f]{32}\.(?:tmp|old)", re.DOTALL
)
"""Names of temporary files and folders: a living writer holds a lock (flock) on its own."""
ABANDONED_S = 24 * 3600.0
"""Another machine's temporaries are removed after this age: its locks may not be seen from here."""


@contextlib.contextmanager
def atomic(fpath: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    """Yields a temporary path beside `fpath`; on success it is fsynced and renamed to `fpath`, on any error removed.

    A reader therefore sees the old file, the whole new file, or none; never a part. A killed process leaves the temporary
    file; the next writer of the same file, or `sweep`, removes it.
    """
    with naming(fpath), _temporary(fpath, is_folder=False) as tmp_fpath:
        yield tmp_fpath
        with tmp_fpath.open("rb+") as fd:
            os.fsync(fd.fileno())
        tmp_fpath.replace(fpath)
        _sync_directory(fpath.parent)


@contextlib.contextmanager
def naming(fpath: pathlib.Path) -> collections.abc.Iterator[None]:
    """Inside, an error that there is no room (disk, quota, file size) says of which file, which the system leaves out."""
    try:
        yield
    except OSError as err:
        if err.filename is None and err.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
        ):
            err.filename = str(fpath)
        raise


@contextlib.contextmanager
def atomic_folder(dpath: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    """As `atomic`, for a folder: yields an empty temporary one, which takes the place of `dpath` on success.

    An older folder steps aside first and is removed last. A process killed between the two renames leaves it aside;
    `sweep` puts it back.
    """
    with naming(dpath), _temporary(dpath, is_folder=True) as tmp_dpath:
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


@beartype.beartype
def sweep(dpath: pathlib.Path, name: str = "") -> None:
    """Removes from a folder what killed processes of ours left there: temporaries of `atomic` and `atomic_folder`, and locks.

    What a living process holds stays. An older folder that a killed `atomic_folder` had put aside goes back to its place.

    Args:
        name: look only at what belongs to the file or folder of this name. Empty: at all.
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
            with contextlib.suppress(FileNotFoundError):  # whose it was has done so
                old_dpath.rename(dpath)
        shutil.rmtree(old_dpath, ignore_errors=True)


def _replacing(dpath: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    return locked(dpath.with_name(f".{dpath.name}.lock"), f"it replaces {dpath}")


def _remove_if_free(path: pathlib.Path) -> None:
    """Removes a temporary, or a lock (an empty file), that no process holds."""
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
def _temporary(path: pathlib.Path, is_folder: bool) -> collections.abc.Iterator[pathlib.Path]:
    """A new, locked, empty file or folder beside `path`; at the end it is removed, unless it was renamed."""
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
    """Makes a file or folder and returns it open and locked; None where a sweep removed it before it was locked."""
    if is_folder:
        tmp_path.mkdir()
    try:
        new_file = os.O_RDWR | os.O_CREAT | os.O_EXCL
        fd = os.open(tmp_path, os.O_RDONLY if is_folder else new_file, 0o666)
    except FileNotFoundError:
        if is_folder and tmp_path.parent.is_dir():
            return None
        raise
    with contextlib.suppress(OSError):  # where there are no locks nothing is swept
        fcntl.flock(fd, fcntl.LOCK_SH)
    if _is_open_at(fd, tmp_path):
        return fd
    os.close(fd)
    return None


@functools.cache
def _host() -> str:
    """This machine, in eight hex digits."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_old(path: pathlib.Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_S
    except FileNotFoundError:
        return False


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
    """Writes a text file atomically, as `printable` UTF-8."""
    with atomic(fpath) as tmp_fpath:
        tmp_fpath.write_text(printable(text), encoding="utf-8")


def printable(text: str) -> str:
    """The text with bytes of a file name that are not UTF-8 (Python's surrogates) spelt out: \\udcXX."""
    return text.encode("utf-8", "backslashreplace").decode()


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
