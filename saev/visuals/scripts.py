"""The data files of a gallery: classic scripts, because a page on disk may not fetch (docs/gallery.md)."""

import base64
import pathlib
import shutil

import numpy as np

from saev import helpers
from saev.formats import jsonfile

TYPES = {
    "u1": np.uint8,
    "u2": np.dtype("<u2"),
    "u4": np.dtype("<u4"),
    "i4": np.dtype("<i4"),
    "f4": np.dtype("<f4"),
}
ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
"""Characters that would end a script, or a line of one."""
PAGE = pathlib.Path(__file__).parent / "page"
"""index.html, its style and its scripts, the same in every gallery."""


def packed(values: object, kind: str) -> dict[str, object]:
    """Numbers as base64 of little-endian bytes. kind: u1, u2, u4, i4 or f4.

    Raises:
        OverflowError: an integer does not fit.
    """
    given = np.asarray(values)
    array = given.astype(TYPES[kind])
    if kind != "f4" and not np.array_equal(array, given):
        raise OverflowError(f"numbers do not fit in {kind}")
    return {"t": kind, "n": list(array.shape), "b": base64.b64encode(array.tobytes()).decode()}


def write(dpath: pathlib.Path, name: str, value: dict[str, object]) -> None:
    """Writes data/<name>.js in the gallery `dpath`."""
    fpath = dpath / "data" / f"{name}.js"
    fpath.parent.mkdir(parents=True, exist_ok=True)
    body = jsonfile.dumps(value).strip().translate(ESCAPED)
    helpers.write_text(fpath, f'saev.put("{name}", {body});\n')


def copy_page(dpath: pathlib.Path) -> None:
    """Copies the page into the gallery `dpath`, which may exist."""
    for fpath in PAGE.rglob("*"):
        if fpath.suffix in (".html", ".css", ".js"):
            target = dpath / fpath.relative_to(PAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fpath, target)
