"""The files of a gallery's page; its data files are written by `saev.formats.scripts`."""

import pathlib
import shutil

from saev.formats.scripts import packed, write

__all__ = ["copy_page", "packed", "write"]

PAGE = pathlib.Path(__file__).parent / "page"
"""index.html, its style and its scripts, the same in every gallery."""


def copy_page(dpath: pathlib.Path) -> None:
    """Copies the page into the gallery `dpath`, which may exist."""
    for fpath in PAGE.rglob("*"):
        if fpath.suffix in (".html", ".css", ".js"):
            target = dpath / fpath.relative_to(PAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fpath, target)
