"""Finds the photos below a folder, and counts what it passes over."""

import collections
import collections.abc
import contextlib
import errno
import os
import stat

import beartype

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
"""Thumbnails and wastebaskets of NAS boxes, archives and systems, in lower case."""
HIDDEN = "hidden or system entries"
SPECIAL = "FIFOs, sockets or devices"
LOOPS = "links that lead back to themselves"


@beartype.beartype
def walk(root: str) -> tuple[list[str], collections.Counter[str]]:
    """Relative paths of the photos below `root`, sorted, and how many entries were passed over, by suffix or kind.

    Links are followed, but never into a folder that the path has come through.

    Raises:
        UserError: a folder cannot be listed, or a link leads to nothing (its disk may be absent).
    """
    paths: list[str] = []
    passed: collections.Counter[str] = collections.Counter()
    known = set(pixels.suffixes())
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while todo:
        prefix, above = todo.pop()
        with _listed(root, prefix), os.scandir(os.path.join(root, prefix)) as entries:  # noqa: PTH118  (millions of files: pathlib is slow)
            info = os.stat(os.path.join(root, prefix))  # noqa: PTH116, PTH118
            here = above | {(info.st_dev, info.st_ino)}
            if here == above:
                passed[LOOPS] += 1
                continue
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
                kind = _kind(entry)
                if kind == "folder":
                    todo.append((f"{prefix}{entry.name}/", here))
                elif kind == "file" and suffix in known:
                    paths.append(prefix + entry.name)
                else:
                    passed[(suffix or "no suffix") if kind == "file" else kind] += 1
    return sorted(paths), passed


def _kind(entry: os.DirEntry[str]) -> str:
    """folder, file, or why it is passed over. Costs a system call for links alone."""
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
            f"{entry.path}: a link that leads to nothing ({err.strerror}). Mount the disk that it points to, or remove it."
        ) from err
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else SPECIAL


@contextlib.contextmanager
def _listed(root: str, prefix: str) -> collections.abc.Iterator[None]:
    try:
        yield
    except OSError as err:
        raise errors.UserError(
            f"{os.path.join(root, prefix)}: cannot be listed ({err.strerror}). Check that the disk is mounted and that you may read the folder."  # noqa: PTH118
        ) from err


@beartype.beartype
def describe(passed: collections.Counter[str]) -> str:
    """For a log line: the most frequent suffixes and kinds first."""
    most = [f"{n} {what}" for what, n in sorted(passed.items(), key=lambda p: (-p[1], p[0]))]
    more = [f"and {len(most) - 12} other kinds"] if len(most) > 12 else []
    return ", ".join(most[:12] + more)
