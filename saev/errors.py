"""The one exception that users see as one line."""


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
