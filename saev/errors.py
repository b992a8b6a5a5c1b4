"""The one exception that users see as one line."""

import collections.abc
import contextlib
import errno
import pathlib
import typing as tp

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)
"""Errors of full or broken disks and network file systems. They have no file name."""
F = tp.TypeVar("F", bound=collections.abc.Callable[..., object])


class UserError(Exception):
    """Something the user gave (a path, a flag, a file) is wrong.

    The message names the thing, the values seen, and what to do next. `saev.launch` prints it as one
    line and exits with code 2; notebooks see an ordinary exception.

    Args:
        done: results of the part of the work that did not fail.
    """

    def __init__(self, message: str = "", done: object = None):
        super().__init__(message)
        self.done = done


def first_line(err: BaseException) -> str:
    """Returns the first line of an exception's message, or the name of its type if it has no message."""
    return next(iter(str(err).splitlines()), type(err).__name__)


@contextlib.contextmanager
def naming(fpath: pathlib.Path) -> collections.abc.Generator[None]:
    """Adds the path to disk errors raised inside, which lack it."""
    try:
        yield
    except OSError as err:
        if err.filename is None and err.errno in DISK:
            err.filename = str(fpath)
        raise


@contextlib.contextmanager
def of_files() -> collections.abc.Generator[None]:
    """Turns an OSError about a file (no permission, a full disk) into a UserError."""
    try:
        yield
    except OSError as err:
        if err.filename is None and err.errno not in DISK:
            raise
        where = f"{err.filename}: " if err.filename is not None else ""
        raise UserError(
            f"{where}{err.strerror}. Check the path, its permissions and the free space, then run the same "
            "command again."
        ) from err


def no_type_check(function: F) -> F:
    """Keeps beartype and jaxtyping from a function that reports wrong arguments itself, on one line.

    `typing.no_type_check` would also hide its types from type checkers.
    """
    return tp.no_type_check(function)
