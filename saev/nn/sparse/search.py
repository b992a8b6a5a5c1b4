"""Finds which latents fire. B batch, C part of a batch, R some rows, D d_vit, S latents, K top k, n codes."""

import collections.abc
import functools
import typing as tp

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saev import compiled
from saev.nn import kernels, partsizes, triton_select
from saev.nn.sparse.codes import Codes, Index

PART_BYTES, N_PARTS = 2 * 2**20, 16
"""A CPU searches a batch in parts. Their number is a multiple of N_PARTS, and a part's pre-activations take
at most PART_BYTES, so they stay in a core's cache. The parts do not depend on the number of threads, so no
result does.
"""

HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()
"""Can a product in bfloat16 be written in float32? Since torch 2.8, on a GPU."""

T = tp.TypeVar("T")

Gather = collections.abc.Callable[[Tensor], Tensor]
"""Values (n,) of this process -> those of all processes, concatenated."""


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Does this processor multiply bfloat16? Cached, because a run's rounding must not depend on the call."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


class Encoder(tp.NamedTuple):
    """An encoder's weights, W_enc transposed."""

    W_SD: Float[Tensor, "S D"]
    b_S: Float[Tensor, " S"]
    is_bfloat16: bool
    """Pre-activations are products in bfloat16, without exact rescoring. W may be in bfloat16 then."""
    part_bytes: int = 2**33
    """Most bytes of pre-activations that a GPU holds at once."""


class _Rows(tp.NamedTuple):
    """Pre-activations of some rows, and the bounds of their error if they are screened (see `kernels`)."""

    pre_BS: np.ndarray
    is_screened: bool
    x_BD: np.ndarray
    W_SD: np.ndarray
    b_S: np.ndarray
    norm_S: np.ndarray
    margin_B: np.ndarray


def _search(encoder: Encoder, xc_BD: Tensor, find: collections.abc.Callable[[int, int, _Rows], T]) -> list[T]:
    """Calls `find(first, last, rows)` on parts of a batch on a CPU, in threads."""
    W_SD, b_S, is_bfloat16, _ = encoder
    is_screened = xc_BD.dtype == torch.float32 and _multiplies_bfloat16() and not is_bfloat16
    low = is_screened or is_bfloat16
    w_SD, x_BD = (W_SD.bfloat16(), xc_BD.bfloat16()) if low else (W_SD, xc_BD)
    norm_S = W_SD.norm(dim=1).numpy()
    margin_B = (kernels.MARGIN * xc_BD.norm(dim=1)).numpy()
    B, S = len(xc_BD), len(W_SD)
    n_parts = N_PARTS * -(-B * S * w_SD.element_size() // (N_PARTS * PART_BYTES))
    size = max(16, -(-B // n_parts))

    def part(first: int) -> T:
        last = min(first + size, B)
        x_CD = x_BD[first:last]
        if low:
            pre_CS = torch.mm(x_CD, w_SD.T)
            pre_CS = pre_CS.view(torch.uint16) if is_screened else pre_CS.float().add_(b_S)
        else:
            pre_CS = torch.addmm(b_S, x_CD, w_SD.T)
        exact = (xc_BD[first:last].numpy(), W_SD.numpy(), b_S.numpy(), norm_S)
        return find(first, last, _Rows(pre_CS.numpy(), is_screened, *exact, margin_B[first:last]))

    return compiled.each_in_threads(part, list(range(0, B, size)))


def _codes(value_n: np.ndarray, latent_n: np.ndarray, n_B: np.ndarray, n_latents: int) -> Codes:
    start_B1 = np.concatenate([[0], np.cumsum(n_B)]).astype(np.int32)
    index = Index(torch.from_numpy(latent_n), torch.from_numpy(start_B1), n_latents)
    return Codes(torch.from_numpy(value_n), index)


@torch.no_grad()
def top_k(encoder: Encoder, xc_BD: Float[Tensor, "B D"], k: int, keep_negative: bool = False) -> Codes:
    """Finds the k largest pre-activations of each row; only positive ones unless `keep_negative`.

    Ties: the lowest latents are kept, except on a GPU where `triton_select` is not available: it keeps any.
    """
    B, S = len(xc_BD), len(encoder.W_SD)
    k = min(k, S)
    if not kernels.available(xc_BD):
        found = [_dense_top_k(encoder, x_CD, k) for x_CD in parts(encoder, xc_BD)]
        value_BK, latent_BK = (torch.cat(each) for each in zip(*found, strict=True))
        value_BK = value_BK if keep_negative else value_BK.relu()
        # Places that do not fire stay as zeros: counting the others would wait for the GPU.
        start_B1 = torch.arange(0, B * k + 1, k, dtype=torch.int32, device=xc_BD.device)
        return Codes(value_BK.flatten(), Index(latent_BK.flatten(), start_B1, S))
    n_B = np.empty(B, np.int32)
    value_BK = np.empty((B, k), xc_BD.numpy().dtype)
    latent_BK = np.empty((B, k), np.int32)

    def find(first: int, last: int, rows: _Rows) -> None:
        at = slice(first, last)
        kernels.top_k(*rows, k, n_B[at], value_BK[at], latent_BK[at])

    _search(encoder, xc_BD, find)
    if keep_negative:  # recompute the few rows with fewer than k positive values
        short_R = np.flatnonzero(n_B < k)
        for part_R in np.array_split(short_R, -(-len(short_R) * S * 4 // PART_BYTES) or 1):
            value_RK, latent_RK = _dense_top_k(encoder, xc_BD[part_R], k)
            value_BK[part_R], latent_BK[part_R], n_B[part_R] = (value_RK.numpy(), latent_RK.numpy(), k)
    fires_BK = np.arange(k) < n_B[:, None]
    return _codes(value_BK[fires_BK], latent_BK[fires_BK], n_B, S)


def _dense_top_k(encoder: Encoder, xc_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and latents of the k largest pre-activations of each row, sorted by latent."""
    pre_BS = dense(encoder, xc_BD)
    if triton_select.available(pre_BS, k):
        return triton_select.top_k(pre_BS, k)
    if kernels.available(pre_BS):
        latent_BK = pre_BS.sort(dim=1, descending=True, stable=True).indices[:, :k]
    else:
        latent_BK = pre_BS.topk(k, dim=1, sorted=False).indices
    latent_BK = latent_BK.sort(dim=1).values
    return pre_BS.gather(1, latent_BK), latent_BK.int()


@torch.no_grad()
def above(
    encoder: Encoder, xc_BD: Float[Tensor, "B D"], cutoff_S: Float[Tensor, " S"], n_expected: int
) -> Codes:
    """Finds the pre-activations above `cutoff_S`.

    Args:
        n_expected: about how many there are in the batch. Buffers start at twice that size and grow.
    """
    S = len(encoder.W_SD)
    if not kernels.available(xc_BD):
        found = [_dense_above(encoder, x_CD, cutoff_S) for x_CD in parts(encoder, xc_BD)]
        value_n, latent_n, n_B = (torch.cat(each) for each in zip(*found, strict=True))
        start_B1 = torch.nn.functional.pad(n_B.cumsum(0), (1, 0)).int()
        return Codes(value_n, Index(latent_n, start_B1, S))
    n_B = np.empty(len(xc_BD), np.int32)
    cutoff = cutoff_S.to(xc_BD.dtype).numpy()

    def find(first: int, last: int, rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
        size = 64 + 2 * n_expected * (last - first) // len(xc_BD)
        while True:
            value_n, latent_n = np.empty(size, cutoff.dtype), np.empty(size, np.int32)
            n = kernels.above(*rows, cutoff, n_B[first:last], value_n, latent_n)
            if n >= 0:
                return value_n[:n], latent_n[:n]
            size *= 2

    found = _search(encoder, xc_BD, find)
    value_n, latent_n = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _codes(value_n, latent_n, n_B, S)


def _dense_above(encoder: Encoder, xc_BD: Tensor, cutoff_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values and latents above the cutoff, and their number in each row. Waits for the GPU once."""
    pre_BS = dense(encoder, xc_BD)
    fires_BS = pre_BS > cutoff_S
    row_n, latent_n = fires_BS.nonzero(as_tuple=True)
    return pre_BS[row_n, latent_n], latent_n.int(), fires_BS.sum(dim=1)


def parts(encoder: Encoder, xc_BD: Tensor) -> tuple[Tensor, ...]:
    """Divides a batch into parts, which a GPU searches one after the other."""
    return xc_BD.split(partsizes.n_rows(len(xc_BD), len(encoder.W_SD), encoder.part_bytes))


def dense(encoder: Encoder, xc_BD: Tensor) -> Float[Tensor, "B S"]:
    """Computes the pre-activations of all latents. In bfloat16, a CPU rounds the products, a GPU does not."""
    if encoder.is_bfloat16:
        x_BD, W_DS = xc_BD.bfloat16(), encoder.W_SD.bfloat16().T
        if xc_BD.is_cuda and HAS_OUT_DTYPE:  # torch.addmm would copy the bias to all rows first
            return torch.mm(x_BD, W_DS, out_dtype=torch.float32).add_(encoder.b_S)
        return (x_BD @ W_DS).float().add_(encoder.b_S)
    return torch.addmm(encoder.b_S, xc_BD, encoder.W_SD.T)


class BatchSearch:
    """Finds the k x B largest positive pre-activations of a batch, and all ties with the smallest of them.

    It starts from about the smallest one of the last batch, which saves time and does not change the result.
    Triton's kernels need no start. Where `_by_triton` returns None, the search starts so on a GPU too.

    Args:
        gather: with several processes, each of which has a part of the batch, collects the values of all.
    """

    def __init__(self, gather: Gather = lambda value_n: value_n, n_processes: int = 1):
        self.guess: float | Tensor | None = None
        self.slack = 0.03
        self.gather = gather
        self.n_processes = n_processes

    @torch.no_grad()
    def __call__(self, encoder: Encoder, xc_BD: Float[Tensor, "B D"], k: int) -> Codes:
        B, S = len(xc_BD), len(encoder.W_SD)
        if triton_select.available(xc_BD):
            codes = self._by_triton(encoder, xc_BD, min(k, S) * B)
            if codes is not None:
                return codes
        n_wanted = min(k, S) * B * self.n_processes
        if self.guess is None:
            self.guess = self._sampled(encoder, xc_BD, min(k, S))
        guess = self.guess
        while True:
            cutoff_S = xc_BD.new_zeros(S) + guess
            codes = above(encoder, xc_BD, cutoff_S, n_wanted // self.n_processes)
            all_n = self.gather(codes.value_n)
            if len(all_n) >= n_wanted or guess == 0:
                break
            self.slack = min(0.5, 2 * self.slack)
            guess = 0.0 if guess < 1e-3 else guess * (1 - self.slack)
        smallest = 0.0
        if len(all_n) >= n_wanted:
            smallest = _number(all_n.kthvalue(len(all_n) - n_wanted + 1).values)
            codes = _at_least(codes, smallest)
        self.slack = max(0.02, 0.9 * self.slack)
        self.guess = smallest * (1 - self.slack)
        return codes

    def _by_triton(self, encoder: Encoder, xc_BD: Tensor, n: int) -> Codes | None:
        """Finds n codes and waits for the GPU once.

        None for a batch in parts if several processes share it, if the candidates would take too much
        memory, or if too many tie.
        """
        S, parts_of_x = len(encoder.W_SD), parts(encoder, xc_BD)
        if len(parts_of_x) == 1:
            found = triton_select.batch_top_k(dense(encoder, xc_BD), n, self.gather, self.n_processes)
            return Codes(found[0], Index(*found[1:], S))
        room = partsizes.n_candidates(n, encoder.part_bytes)
        if not room or self.n_processes > 1 or len(xc_BD) * -(-S // triton_select.BATCH_GROUP) >= 2**31:
            return None
        candidates = triton_select.Candidates(S, encoder.b_S, n, room)
        for x_CD in parts_of_x:
            candidates.add(dense(encoder, x_CD))
        found = candidates.codes()
        return None if found is None else Codes(found[0], Index(*found[1:], S))

    def _sampled(self, encoder: Encoder, xc_BD: Tensor, k: int) -> float | Tensor:
        """A guess from the first 64 rows: the smallest of their 1.5 k largest values per row."""
        pre_bS = dense(encoder, xc_BD[:64])
        n_drop = max(0, pre_bS.numel() - 3 * k * len(pre_bS) // 2)
        guess = pre_bS.flatten().kthvalue(n_drop + 1).values
        return _number(self.gather(guess[None]).min().clamp(min=0))


def _number(value: Tensor) -> float | Tensor:
    """A number as it is compared with codes. A GPU keeps it, because reading it would wait."""
    return value.item() if kernels.available(value) else value


def _at_least(codes: Codes, smallest: float | Tensor) -> Codes:
    """Keeps the codes whose value is at least `smallest`. Reuses their memory on a CPU.

    On a GPU the others stay as zeros: counting those that are kept would wait for it.
    """
    index = codes.index
    if not kernels.available(codes.value_n):
        return Codes(torch.where(codes.value_n >= smallest, codes.value_n, 0.0), index)
    value_n, latent_n = codes.value_n.numpy(), index.latent_n.numpy()
    n_B = index.start_O1.diff().numpy()
    n = kernels.keep_from(value_n, latent_n, n_B, value_n.dtype.type(smallest))
    return _codes(value_n[:n], latent_n[:n], n_B, index.n_latents)
