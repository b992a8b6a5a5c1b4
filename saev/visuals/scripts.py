"""The data files of a gallery: how they are written (`saev.formats.scripts`)."""

from saev.formats.scripts import packed, write

__all__ = ["packed", "write"]
