"""Finds the photos below a folder and counts the entries that it ignores."""

import collections
import collections.abc
import contextlib
import errno
import os
import stat

from saev import errors
from saev.data import pixels

SYSTEM_FOLDERS = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "@tmp",
    "__macosx",
    "lost+found",
    "system volume information",
}
"""Folders with thumbnails, snapshots or deleted files of NAS boxes and operating systems, in lower case."""
HIDDEN = "hidden or system entries"
SPECIAL = "FIFOs, sockets or devices"
LOOPS = "circular links"


def walk(root: str) -> tuple[list[str], collections.Counter[str]]:
    """Returns the sorted relative paths of photos below `root`, and counts of ignored entries by kind.

    Links are followed, except back into a folder that is already on the path.

    Raises:
        UserError: a folder cannot be listed, or a link is broken (its disk may not be mounted).
    """
    paths: list[str] = []
    ignored: collections.Counter[str] = collections.Counter()
    known = set(pixels.suffixes())
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while todo:
        prefix, above = todo.pop()
        dpath = os.path.join(root, prefix)  # noqa: PTH118  (pathlib is slow)
        with _listed(dpath), os.scandir(dpath) as entries:
            info = os.stat(dpath)  # noqa: PTH116
            here = above | {(info.st_dev, info.st_ino)}
            if here == above:
                ignored[LOOPS] += 1
                continue
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
                kind = _kind(entry)
                if kind == "folder":
                    todo.append((f"{prefix}{entry.name}/", here))
                elif kind == "file" and suffix in known:
                    paths.append(prefix + entry.name)
                else:
                    ignored[(suffix or "no suffix") if kind == "file" else kind] += 1
    return sorted(paths), ignored


def _kind(entry: os.DirEntry[str]) -> str:
    """Returns "folder", "file", or why the entry is ignored. Only links cost a system call."""
    if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FOLDERS:
        return HIDDEN
    if entry.is_file(follow_symlinks=False):
        return "file"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    try:
        mode = entry.stat().st_mode
    except OSError as err:
        if err.errno == errno.ELOOP:
            return LOOPS
        raise errors.UserError(
            f"{entry.path}: broken link ({err.strerror}). Mount the disk that it points to, or remove it."
        ) from err
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else SPECIAL


@contextlib.contextmanager
def _listed(dpath: str) -> collections.abc.Generator[None]:
    try:
        yield
    except OSError as err:
        raise errors.UserError(
            f"{dpath}: cannot be listed ({err.strerror}). "
            "Check that the disk is mounted and that you may read the folder."
        ) from err


def describe(ignored: collections.Counter[str]) -> str:
    """Lists the counts for a log line, most frequent first."""
    most = [f"{n} {what}" for what, n in sorted(ignored.items(), key=lambda p: (-p[1], p[0]))]
    more = [f"and {len(most) - 12} other kinds"] if len(most) > 12 else []
    return ", ".join(most[:12] + more)
