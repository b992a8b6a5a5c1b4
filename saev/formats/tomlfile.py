"""Reads users' TOML files."""

import pathlib
import tomllib

from saev import errors
from saev.formats import textfile

MAX_BYTES = 2**20
"""Largest file that is read."""


def read(fpath: pathlib.Path, remedy: str) -> dict[str, object]:
    """Reads a file.

    Args:
        remedy: what the user should do if there is no such file: one sentence.

    Raises:
        UserError: the file is missing, cannot be read, or is not TOML.
    """
    text = textfile.read(fpath, remedy, MAX_BYTES)
    try:
        return tomllib.loads(text)
    except RecursionError as err:
        raise errors.UserError(f"{fpath}: not valid TOML: too deeply nested.") from err
    except ValueError as err:  # TOMLDecodeError, or an integer of thousands of digits
        raise errors.UserError(f"{fpath}: not valid TOML: {errors.first_line(err)}.") from err
