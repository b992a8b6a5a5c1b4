"""Sparse codes, and sums of the table rows that they select.

Shape letters: B batch, D d_vit, S latents, O rows of codes, P parts of a row, R table rows, n codes.
"""

import dataclasses
import functools
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from saev import compiled
from saev.nn import kernels, triton_kernels


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Index:
    """Which latents fire in each row. Row o's codes are start[o] to start[o + 1], sorted by latent."""

    latent_n: Int[Tensor, " _"]
    start_O1: Int[Tensor, " _"]
    n_latents: int

    @property
    def n_rows(self) -> int:
        return len(self.start_O1) - 1

    @functools.cached_property
    def row_n(self) -> Int[Tensor, " n"]:
        rows_O = torch.arange(self.n_rows, device=self.latent_n.device, dtype=torch.int32)
        return rows_O.repeat_interleave(self.start_O1.diff(), output_size=len(self.latent_n))

    @functools.cached_property
    def by_latent(self) -> "ByLatent":
        """The same codes sorted by latent, then by row."""
        if not kernels.available(self.latent_n):
            sorted_n, order_n = torch.sort(self.latent_n, stable=True)
            # not bincount, which waits for the GPU
            latent_S1 = torch.arange(self.n_latents + 1, dtype=sorted_n.dtype, device=sorted_n.device)
            start_S1 = torch.searchsorted(sorted_n, latent_S1, out_int32=True)
            return ByLatent(order_n, self.row_n[order_n], start_S1)
        start_S1 = np.empty(self.n_latents + 1, np.int32)
        order_n, row_n = np.empty((2, len(self.latent_n)), np.int32)
        kernels.by_latent(self.start_O1.numpy(), self.latent_n.numpy(), start_S1, order_n, row_n)
        return ByLatent(*map(torch.from_numpy, (order_n, row_n, start_S1)))

    def split(self, end_P: Int[Tensor, " P"]) -> "Index":
        """Splits each row into P rows: latents below end[0], from there below end[1], and so on."""
        P = len(end_P)
        block_n = torch.searchsorted(end_P, self.latent_n, right=True)
        key_n = self.row_n.long() * P + block_n
        keys = torch.arange(self.n_rows * P + 1, device=key_n.device)
        return Index(self.latent_n, torch.searchsorted(key_n, keys).int(), self.n_latents)


class ByLatent(tp.NamedTuple):
    """Codes sorted by latent."""

    order_n: Int[Tensor, " n"]
    """Position of each code in row order."""
    row_n: Int[Tensor, " n"]
    """Row of each code."""
    start_S1: Int[Tensor, " S1"]
    """Latent s has codes start[s] to start[s + 1]."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Codes:
    """Sparse codes of a batch. Value n belongs to latent `index.latent_n[n]`."""

    value_n: Float[Tensor, " _"]
    index: Index

    @property
    def fired_S(self) -> Bool[Tensor, " S"]:
        """Does each latent have a value other than 0 in any row?"""
        fired_S = torch.zeros(self.index.n_latents, dtype=torch.uint8, device=self.value_n.device)
        fires_n = (self.value_n != 0).to(torch.uint8)
        return fired_S.scatter_reduce_(0, self.index.latent_n.long(), fires_n, "amax").bool()

    def dense(self) -> Float[Tensor, "O S"]:
        """The same codes with their zeros. Not differentiable."""
        f_OS = self.value_n.new_zeros(self.index.n_rows, self.index.n_latents)
        f_OS[self.index.row_n.long(), self.index.latent_n.long()] = self.value_n.detach()
        return f_OS

    def columns(self, latent_C: Int[Tensor, " C"]) -> Float[Tensor, "O C"]:
        """The codes of some latents, with their zeros. Not differentiable."""
        C = len(latent_C)
        column_S = torch.full((self.index.n_latents,), C, device=self.value_n.device)  # C: of all others
        column_S[latent_C] = torch.arange(C, device=self.value_n.device)
        f_OC1 = self.value_n.new_zeros(self.index.n_rows, C + 1)
        f_OC1[self.index.row_n.long(), column_S[self.index.latent_n.long()]] = self.value_n.detach()
        return f_OC1[:, :C]


def n_positive(f_BS: Float[Tensor, "B S"]) -> Int[Tensor, " S"]:
    """Counts, for each latent, the samples in which it is positive."""
    if not kernels.available(f_BS):
        return (f_BS > 0).sum(dim=0)
    array = f_BS.detach().numpy()
    parts = compiled.in_threads(functools.partial(kernels.n_positive, array), len(array))
    return torch.from_numpy(np.sum(parts, axis=0))


def bag(table_RD: Tensor, index_n: Tensor, weight_n: Tensor, start_O1: Tensor) -> Float[Tensor, "O D"]:
    """out[o] = sum over j in start[o] .. start[o + 1] of weight[j] table[index[j]], in the weights' dtype."""
    if triton_kernels.available(table_RD):
        return triton_kernels.bag(table_RD, index_n, weight_n, start_O1)
    table_RD = table_RD.to(weight_n.dtype)
    if len(index_n) == 0:  # embedding_bag refuses an empty index
        return table_RD.new_zeros(len(start_O1) - 1, table_RD.shape[1])
    return torch.nn.functional.embedding_bag(
        index_n,
        table_RD,
        start_O1.to(index_n.dtype),
        mode="sum",
        per_sample_weights=weight_n,
        include_last_offset=True,
    )


def bag_dot(a_OD: Tensor, table_RD: Tensor, index: Index) -> Float[Tensor, " n"]:
    """<a[o], table[latent[j]]> for each code j of row o."""
    if triton_kernels.available(table_RD):
        return triton_kernels.bag_dot(a_OD, table_RD, index.latent_n, index.start_O1)
    if not kernels.available(table_RD):
        return (a_OD[index.row_n] * table_RD[index.latent_n]).sum(dim=1)
    out_n = table_RD.new_empty(len(index.latent_n))
    inputs = (a_OD.contiguous(), table_RD.contiguous(), index.latent_n, index.start_O1, out_n)
    arrays = [t.detach().numpy() for t in inputs]
    compiled.in_threads(functools.partial(kernels.bag_dot, *arrays), index.n_rows)
    return out_n


def latent_bags(table_OD: Tensor, weight_n: Tensor, index: Index) -> Float[Tensor, "S D"]:
    """Sums, for each latent, weight x table row over the rows in which the latent fires."""
    order_n, row_n, start_S1 = index.by_latent
    return bag(table_OD, row_n, weight_n[order_n], start_S1)
