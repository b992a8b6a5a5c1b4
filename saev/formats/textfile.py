"""Reads users' text files: a byte order mark, any line endings and no final newline are accepted."""

import pathlib

from saev import errors
from saev.formats import jsonfile


def read(fpath: pathlib.Path, remedy: str, max_bytes: int, on_error: str = "strict") -> str:
    r"""Reads a UTF-8 file. Removes a byte order mark and converts line endings to "\n".

    Args:
        fpath: a regular file. Folders, FIFOs and devices are refused.
        remedy: what the user should do: one sentence, the end of the error message.
        max_bytes: larger files are refused before they are read.
        on_error: "strict" refuses bytes that are not UTF-8; "surrogateescape" keeps them, as in paths.

    Raises:
        UserError: the file is missing, cannot be read, or is not UTF-8.
    """
    try:
        data = jsonfile.read_bytes(fpath, remedy, max_bytes)
    except FileNotFoundError as err:
        raise errors.UserError(f"{fpath}: no such file. {remedy}") from err
    except OSError as err:  # a loop of links, no permission
        raise errors.UserError(f"{fpath}: cannot be read ({err.strerror}). {remedy}") from err
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4096]:
        raise errors.UserError(f"{fpath}: is UTF-16 or not text. Save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig", on_error)
    except UnicodeDecodeError as err:
        line_i = data.count(b"\n", 0, err.start) + 1
        raise errors.UserError(
            f"{fpath}:{line_i}: holds the byte 0x{data[err.start]:02x}, which is not UTF-8. Save it as UTF-8."
        ) from err
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
