"""Pearson correlations of two dictionaries' latents, in exact sums over sparse codes, in bounded memory.

S latents of the first dictionary, Z of the second, T some of S (a tile), R rows (patches or images),
N images, n codes.
"""

import collections.abc
import dataclasses
import functools
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, jaxtyped

from saev import compiled
from saev.compare import memory, store
from saev.formats import codeshards
from saev.nn import kernels

CONSTANT = 1e-13
"""A latent is constant if its variance is at most this fraction of its mean square."""
DENSE = 0.025
"""Dense matrices are multiplied if the product of both densities is larger (logbook 034)."""
DENSE_ROWS = 2048
"""Rows that are made dense at a time."""
MOST_CODES = 2**30
"""Codes are numbered in 32 bits."""
PART = 32
"""Latents that a thread takes at a time."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Moments:
    """Of each latent's values over all rows."""

    n_rows: int
    n_fired_S: Int64[np.ndarray, " S"]
    mean_S: Float64[np.ndarray, " S"]
    variance_S: Float64[np.ndarray, " S"]

    @property
    def is_live_S(self) -> Bool[np.ndarray, " S"]:
        """Whether its value varies, without which it has no correlation."""
        return self.variance_S > CONSTANT * (self.variance_S + self.mean_S**2)


def moments(codes: store.Store) -> Moments:
    """Sums in float64."""
    S, n_rows = codes.n_latents, codes.n_rows
    n_fired_S, sum_S, square_S = np.zeros(S, np.int64), np.zeros(S), np.zeros(S)
    for latent_n, value_n in codes.blocks():
        value_n = value_n.astype(np.float64)
        n_fired_S += np.bincount(latent_n, minlength=S)
        sum_S += np.bincount(latent_n, value_n, S)
        square_S += np.bincount(latent_n, value_n**2, S)
    mean_S = sum_S / n_rows
    return Moments(n_rows, n_fired_S, mean_S, np.maximum(square_S / n_rows - mean_S**2, 0.0))


class Tile(tp.NamedTuple):
    """Correlations of consecutive latents of the first dictionary."""

    first: int
    corr_TZ: Float64[np.ndarray, "T Z"]
    """-inf where a latent is constant. Overwritten when the next tile is asked for."""


def tiles(
    one: store.Store,
    two: store.Store,
    images: tuple[np.ndarray, np.ndarray],
    stats: tuple[Moments, Moments],
    memory_gb: float,
) -> collections.abc.Iterator[Tile]:
    """Correlations of all latents of `one` with all of `two`, some of the first at a time.

    Args:
        images: the places of the same N images in each store. A permutation of one of them is the null.
        memory_gb: memory for the sums of products and for codes.
    """
    n_bytes = 1e9 * memory_gb
    Z = two.n_latents
    n_tile = int(np.clip(n_bytes / 2 // (8 * Z), 1, one.n_latents))
    per_image = (one.n_codes + two.n_codes) / one.n_images
    n_codes = min(n_bytes / 4 / memory.CODE_BYTES, MOST_CODES)
    n_images = int(np.clip(n_codes / max(1.0, per_image), 1, len(images[0])))
    add = _add_dense if one.density * two.density > DENSE else _add_sparse
    sum_TZ = np.empty((n_tile, Z))
    for first in range(0, one.n_latents, n_tile):
        part_TZ = sum_TZ[: one.n_latents - first]
        part_TZ[:] = 0
        for at in range(0, len(images[0]), n_images):
            rows = [s.rows(i[at : at + n_images]) for s, i in zip((one, two), images, strict=True)]
            add(part_TZ, first, *rows)
        compiled.in_threads(functools.partial(_normalise, part_TZ, first, *stats), len(part_TZ))
        yield Tile(first, part_TZ)


def _normalise(sum_TZ: np.ndarray, first: int, one: Moments, two: Moments, start: int, stop: int) -> None:
    """Sums of products -> correlations, in place."""
    part_TZ, at = sum_TZ[start:stop], slice(first + start, first + stop)
    part_TZ /= one.n_rows
    part_TZ -= np.multiply.outer(one.mean_S[at], two.mean_S)
    with np.errstate(divide="ignore", invalid="ignore"):
        part_TZ /= np.sqrt(one.variance_S[at])[:, None]
        part_TZ /= np.sqrt(two.variance_S)
    part_TZ[~one.is_live_S[at]] = -np.inf
    part_TZ[:, ~two.is_live_S] = -np.inf


# ---- sums of products ----


def _add_sparse(sum_TZ: np.ndarray, first: int, one: codeshards.Csr, two: codeshards.Csr) -> None:
    """Each latent's sums stay in the cache: its rows, and in each of these the other dictionary's codes."""
    T = len(sum_TZ)
    n_latents = max(first + T, int(one.latent_n.max(initial=-1)) + 1)
    start_S1 = np.empty(n_latents + 1, np.int32)
    order_n, row_n = np.empty((2, len(one.latent_n)), np.int32)
    kernels.by_latent(one.start_R1, one.latent_n, start_S1, order_n, row_n)
    sorted_n = one.value_n[order_n]
    given = (start_S1[first : first + T + 1], row_n, sorted_n, two.start_R1, two.latent_n, two.value_n)
    compiled.each_in_threads(
        lambda at: _add_products(sum_TZ, *given, at, min(at + PART, T)), list(range(0, T, PART))
    )


@compiled.jit
def _add_products(sum_TZ, start_T1, row_n, value_n, start_R1, latent_n, other_n, first, last):
    """Adds the products of latents first to last of the tile with all codes of the same rows."""
    for t in range(first, last):
        for i in range(start_T1[t], start_T1[t + 1]):
            value = np.float64(value_n[i])
            for j in range(start_R1[row_n[i]], start_R1[row_n[i] + 1]):
                sum_TZ[t, latent_n[j]] += value * other_n[j]


def _add_dense(sum_TZ: np.ndarray, first: int, one: codeshards.Csr, two: codeshards.Csr) -> None:
    sums_TZ = torch.from_numpy(sum_TZ)
    T, Z = sum_TZ.shape
    for at in range(0, len(one.start_R1) - 1, DENSE_ROWS):
        f_RT, g_RZ = (_dense(rows, at, start, n) for rows, start, n in ((one, first, T), (two, 0, Z)))
        sums_TZ.addmm_(f_RT.T, g_RZ)


def _dense(rows: codeshards.Csr, at: int, first: int, n_latents: int) -> torch.Tensor:
    """DENSE_ROWS rows from row `at` on, of latents from `first` on, in float64."""
    start_R1 = rows.start_R1[at : at + DENSE_ROWS + 1]
    part = slice(start_R1[0], start_R1[-1])
    row_n = np.repeat(np.arange(len(start_R1) - 1), np.diff(start_R1))
    latent_n = rows.latent_n[part].astype(np.int64) - first
    is_mine_n = (latent_n >= 0) & (latent_n < n_latents)
    out = np.zeros((len(start_R1) - 1, n_latents))
    out[row_n[is_mine_n], latent_n[is_mine_n]] = rows.value_n[part][is_mine_n]
    return torch.from_numpy(out)
