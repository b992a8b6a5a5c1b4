"""Reads codes for notebooks and other tools: scipy and torch are imported when they are asked for.

Shape letters: N images, P patches of an image, R = N P rows, K latents, C columns, n codes.
"""

import collections.abc
import dataclasses
import functools
import pathlib
import typing as tp

import beartype
import numpy as np
from jaxtyping import Float, Int, jaxtyped

from saev import errors, fields
from saev.formats import codes, codeshards

if tp.TYPE_CHECKING:
    import scipy.sparse
    import torch

PIECE = 2**24
"""Codes whose latents are compared at a time."""

Images = int | range | slice
Latents = int | collections.abc.Sequence[int] | None
Pooled = tp.Literal["max", "mean"]


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Codes of some rows and latents, in CSR form."""

    start_R1: Int[np.ndarray, " R1"]
    latent_n: Int[np.ndarray, " n"]
    """Columns, ascending within a row."""
    value_n: Float[np.ndarray, " n"]
    n_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.start_R1) - 1, self.n_columns

    def scipy(self) -> "scipy.sparse.csr_array":
        """A scipy CSR array, float32 (scipy has no float16)."""
        import scipy.sparse

        arrays = (self.value_n.astype(np.float32), self.latent_n, self.start_R1)
        return scipy.sparse.csr_array(arrays, shape=self.shape)

    def torch(self) -> "torch.Tensor":
        """A torch sparse CSR tensor, in the type that is stored, with int64 indices."""
        import warnings

        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            start_R1, latent_n = self.start_R1.astype(np.int64), self.latent_n.astype(np.int64)
            parts = (start_R1, latent_n, np.array(self.value_n))
            start, latent, value = map(torch.from_numpy, parts)
            return torch.sparse_csr_tensor(start, latent, value, size=self.shape, check_invariants=True)

    def dense(self) -> Float[np.ndarray, "R C"]:
        """All values, with zeros where there is no code, in the type that is stored."""
        out_RC = np.zeros(self.shape, self.value_n.dtype.newbyteorder("="))
        row_n = np.repeat(np.arange(len(self.start_R1) - 1), np.diff(self.start_R1))
        out_RC[row_n, self.latent_n] = self.value_n
        return out_RC


class Codes:
    """A folder of codes. Each file is compared with its checksum when it is first used.

    Row r is patch r % n_patches of image r // n_patches. Patches are in raster order, images in the order of
    `paths`. Images that the dump could not read are left out.

    Raises:
        UserError: there are no codes, or they are incomplete or damaged (the file is named).
    """

    def __init__(self, dpath: pathlib.Path):
        self.dpath = dpath
        self.metadata = codes.read_metadata(dpath)
        self._shards = codes.shards(dpath, self.metadata)
        if gone := self._shards.missing():
            raise errors.UserError(
                f"{dpath}: {len(gone)} of {len(self._shards)} shards are missing. Run the same "
                "`python -m saev.codes` again."
            )

    @property
    def n_imgs(self) -> int:
        return self.metadata.n_imgs

    @property
    def n_patches(self) -> int:
        """Rows of an image: its patches, and [CLS] first if --data.patches was all."""
        return self.metadata.n_patches

    @property
    def n_latents(self) -> int:
        return self.metadata.n_latents

    @functools.cached_property
    def images(self) -> list[codes.Image]:
        """Number in the dump, path and label of each image."""
        return codes.read_images(self.dpath)

    @functools.cached_property
    def paths(self) -> list[str]:
        """Path of each image, relative to the root of the dumped folder."""
        return [image.path for image in self.images]

    @functools.cached_property
    def labels(self) -> list[str]:
        return [image.label for image in self.images]

    def patches(self, imgs: Images = slice(None), latents: Latents = None) -> Rows:
        """Codes of the patches of images.

        Args:
            imgs: positions of consecutive images: a number, a range or a slice. Default: all.
            latents: the latents whose codes to read, in the order of the columns. Default: all.

        Raises:
            UserError: there is no such image or latent, or a file is damaged (named).
        """
        return self._read("patch", "patch_values", self.n_patches, imgs, latents)

    def pooled(self, kind: Pooled = "max", imgs: Images = slice(None), latents: Latents = None) -> Rows:
        """Codes of images: the maximum or mean over their patches. Arguments and errors as for `patches`."""
        return self._read("image", f"image_{kind}", 1, imgs, latents)

    def _read(self, kind: str, values: str, n_rows: int, imgs: Images, latents: Latents) -> Rows:
        """n_rows: rows of an image."""
        first, last = self._range(imgs)
        column_K = None if latents is None else self._columns(latents)
        found = (
            self._shards.rows(kind, values, n_rows, part) for part in self._shards.parts(range(first, last))
        )
        parts = [rows if column_K is None else _chosen(rows, column_K) for rows in found]
        width = self.n_latents if column_K is None else int((column_K >= 0).sum())
        return Rows(*codeshards.Csr.joined(parts, self.metadata.arrays()[values]), width)

    def _range(self, imgs: Images) -> tuple[int, int]:
        """First position, and the one after the last."""
        if isinstance(imgs, int):
            imgs = range(imgs, imgs + 1)
        found = range(self.n_imgs)[imgs] if isinstance(imgs, slice) else imgs
        if len(found) and (found.step != 1 or found[0] < 0 or found[-1] >= self.n_imgs):
            raise errors.UserError(
                f"images {found}: pass consecutive positions from 0 to {self.n_imgs - 1} of {self.dpath}."
            )
        return (found.start, found.stop) if len(found) else (0, 0)

    def _columns(self, latents: int | collections.abc.Sequence[int]) -> Int[np.ndarray, " K"]:
        """The column of each latent. -1: none."""
        chosen = np.atleast_1d(np.asarray(latents, np.int64))
        if bad := [k for k in chosen.tolist() if not 0 <= k < self.n_latents]:
            raise errors.UserError(f"latent {bad[0]}: {self.dpath} has latents 0 to {self.n_latents - 1}.")
        if len(np.unique(chosen)) < len(chosen):
            raise errors.UserError(f"latents {chosen.tolist()}: one is named twice. Name each once.")
        column_K = np.full(self.n_latents, -1, np.int32)
        column_K[chosen] = np.arange(len(chosen))
        return column_K


def _chosen(rows: codeshards.Csr, column_K: np.ndarray) -> codeshards.Csr:
    """The codes of chosen latents, with their columns."""
    places = [
        first + np.flatnonzero(column_K[rows.latent_n[first : first + PIECE]] >= 0)
        for first in range(0, len(rows.latent_n), PIECE)
    ]
    at_n = np.concatenate([*places, np.empty(0, np.int64)])
    start_R1 = np.searchsorted(at_n, rows.start_R1)
    column_n = column_K[rows.latent_n[at_n]]
    row_n = np.repeat(np.arange(len(start_R1) - 1), np.diff(start_R1))
    order_n = np.lexsort((column_n, row_n))
    return codeshards.Csr(start_R1, column_n[order_n], rows.value_n[at_n[order_n]])


@beartype.beartype
def open(path: pathlib.Path | str) -> Codes:  # noqa: A001 (used as saev.codes.open)
    """Opens the folder that `python -m saev.codes` printed.

    Raises:
        UserError: as `Codes`.
    """
    return Codes(fields.path(path))
