"""The one exception that users see as one line."""

import collections.abc
import typing as tp

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


def no_type_check(function: F) -> F:
    """Keeps beartype and jaxtyping from a function that reports wrong arguments itself, on one line.

    `typing.no_type_check` would also hide its types from type checkers.
    """
    return tp.no_type_check(function)
