"""Where the patches of a photo lie, and which patches of a dump are padding (--resize pad and flexible).

N images, P patches of an image.
"""

import math
import pathlib
import typing as tp

import numpy as np
from jaxtyping import Bool, Int64

from saev import errors
from saev.data import images
from saev.formats import shards


class Layout(tp.NamedTuple):
    """The patches of one photo. They are numbered in raster order."""

    grid: tuple[int, int]
    """(rows, columns)."""
    patch: int
    """Side in pixels of the ViT's input; 0 if the transform is not known."""
    n_patches: int
    """That a dump holds of an image. Those after the grid's own are empty."""
    shown: tuple[int, int, int, int]
    """(first row, row after the last, first column, column after the last) of the patches that show the
    photo. The others are padding."""

    @staticmethod
    def of(
        transform: images.Transform | None, n_patches: int, size: tuple[int, int] | None = None
    ) -> "Layout":
        """The layout of a photo.

        Args:
            transform: None means a square centre crop.
            n_patches: that a dump holds of an image.
            size: (width, height) of the photo. Only --resize pad and flexible need it.

        Raises:
            UserError: see `images.grid`.
        """
        if transform is None or transform.fit == "cover" or size is None:
            rows, columns, patch = images.grid(n_patches, transform.size if transform else None)
            return Layout((rows, columns), patch, n_patches, (0, rows, 0, columns))
        patch = transform.patch
        rows, columns = (n // patch for n in transform.input_size(*size))
        left, top, right, bottom = transform.box(*size)
        shown = (top // patch, -(-bottom // patch), left // patch, -(-right // patch))
        return Layout((rows, columns), patch, n_patches, shown)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the part of the ViT's input that the patches cover."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def is_shown_P(self) -> Bool[np.ndarray, " P"]:
        """Whether a patch shows some of the photo."""
        first_row, last_row, first_column, last_column = self.shown
        is_shown_P = np.zeros(self.n_patches, bool)
        is_shown_RC = is_shown_P[: math.prod(self.grid)].reshape(self.grid)
        is_shown_RC[first_row:last_row, first_column:last_column] = True
        return is_shown_P


def shown(part: shards.ShardDir) -> Bool[np.ndarray, "N P"] | None:
    """Whether each patch of a dump shows some of its photo. None: all do. True for skipped images.

    Raises:
        UserError: a file of the dump is damaged.
    """
    if not part.metadata.has_padding:
        return None
    transform, n_patches = images.Transform.from_dict(part.transform()), part.metadata.n_patches_per_img
    size_n2, n_N = np.unique(part.sizes_N2, axis=0, return_inverse=True)
    is_shown_nP = np.ones((len(size_n2), n_patches), bool)
    for i, (width, height) in enumerate(size_n2.tolist()):
        if width:
            is_shown_nP[i] = Layout.of(transform, n_patches, (width, height)).is_shown_P
    return is_shown_nP[n_N]


def check_size(fpath: pathlib.Path, size: tuple[int, int], dumped_2: Int64[np.ndarray, " 2"]) -> None:
    """Raises a UserError if a photo has another (width, height) than it had in the dump."""
    if size != tuple(dumped_2.tolist()):
        raise errors.UserError(
            f"{fpath}: has {size[0]} x {size[1]} pixels, but {dumped_2[0]} x {dumped_2[1]} in the dump, so "
            "where its patches lie is unknown. Pass the folder that was dumped."
        )
