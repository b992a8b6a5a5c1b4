"""Text files as people have them: a byte order mark, Windows' or old Macs' ends of lines, no last newline."""

import pathlib

import beartype

from saev import errors
from saev.formats import jsonfile


@beartype.beartype
def read(fpath: pathlib.Path, remedy: str, max_bytes: int, on_error: str = "strict") -> str:
    r"""The text of a UTF-8 file, each line ended by "\n", without a byte order mark.

    Args:
        fpath: a regular file; a folder, a FIFO or a device is refused.
        remedy: one sentence that ends the error message: what the user should do.
        max_bytes: a larger file is refused before it is read.
        on_error: "strict" refuses bytes that are not UTF-8; "surrogateescape" keeps them as Python keeps them in paths.

    Raises:
        UserError: there is no such file, it cannot be read, or it holds no UTF-8.
    """
    try:
        data = jsonfile.read_bytes(fpath, remedy, max_bytes)
    except FileNotFoundError as err:
        raise errors.UserError(f"{fpath}: no such file. {remedy}") from err
    except OSError as err:  # a loop of links, no permission
        raise errors.UserError(f"{fpath}: cannot be read ({err.strerror}). {remedy}") from err
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4096]:
        raise errors.UserError(f"{fpath}: is UTF-16 or no text at all. Save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig", on_error)
    except UnicodeDecodeError as err:
        line_i = data.count(b"\n", 0, err.start) + 1
        raise errors.UserError(
            f"{fpath}:{line_i}: holds the byte 0x{data[err.start]:02x}, which is not UTF-8. Save it as UTF-8."
        ) from err
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
