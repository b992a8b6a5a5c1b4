"""Where the patches of a photo lie, and which patches of a dump are padding (--resize pad and flexible).

A images of all directories, N of one, P patches of an image.
"""

import functools
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


class Photos:
    """How the photos of shard directories lie in their patches."""

    def __init__(self, dirs: list[shards.ShardDir]):
        self.dirs = dirs
        self.has_padding = any(part.metadata.has_padding for part in dirs)

    def described(self) -> dict[str, object]:
        """The description of the image transform. Empty for dumps of other tools.

        Raises:
            UserError: the directories have different transforms.
        """
        first, *others = [part.transform() for part in self.dirs]
        if any(other != first for other in others):
            raise errors.UserError(
                f"{self.dirs[0].dpath} and the other shard directories were made with different image "
                "transforms. Read them one by one."
            )
        return first

    @functools.cached_property
    def transform(self) -> images.Transform | None:
        """The image transform. None for dumps of other tools. Raises as `described`."""
        found = self.described()
        return images.Transform.from_dict(found) if found else None

    @property
    def resize(self) -> str:
        """--resize of the dumps, for messages; "default" where it was not named."""
        data = [part.metadata.data for part in self.dirs]
        return " and ".join(
            dict.fromkeys(str(d.get("resize", "default")) if isinstance(d, dict) else "default" for d in data)
        )

    @functools.cached_property
    def sizes_A2(self) -> Int64[np.ndarray, "A 2"] | None:
        """(width, height) of each photo, by number; 0 if it was skipped or does not matter. None: it does not
        matter for any, because no dump has padding."""
        if not self.has_padding:
            return None
        empty = (np.zeros((part.metadata.n_imgs, 2), np.int64) for part in self.dirs)
        pairs = zip(self.dirs, empty, strict=True)
        return np.concatenate([part.sizes_N2 if part.metadata.has_padding else zero for part, zero in pairs])

    @property
    def shown_AP(self) -> Bool[np.ndarray, "A P"] | None:
        """Whether each patch shows some of its photo. None: all do. True for skipped images.

        Raises:
            UserError: a file of a dump is damaged.
        """
        return np.concatenate([_shown(part) for part in self.dirs]) if self.has_padding else None

    def layout(self, image_i: int) -> Layout:
        """Where the patches of an image lie.

        Raises:
            UserError: as `described`, or the patches form no grid.
        """
        width, height = (0, 0) if self.sizes_A2 is None else self.sizes_A2[image_i].tolist()
        size = (width, height) if width else None
        return Layout.of(self.transform, self.dirs[0].metadata.n_patches_per_img, size)


def _shown(part: shards.ShardDir) -> Bool[np.ndarray, "N P"]:
    n_patches = part.metadata.n_patches_per_img
    if not part.metadata.has_padding:
        return np.ones((part.metadata.n_imgs, n_patches), bool)
    transform = images.Transform.from_dict(part.transform())
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
