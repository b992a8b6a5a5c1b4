"""Sparse codes: found, decoded and differentiated without a dense code. Exact: a dense autograd step gives the same.

Of x_hat = f W_dec, only rows of W_dec whose latents fire are read; of its gradient, <g, W_dec[s]> is needed where
latent s fires; and the gradients of both weight matrices are sums over the samples on which a latent fired. So
besides the encoder's product nothing costs B x S.

Shape letters: B batch, D d_vit, S latents, O rows of codes (samples, or samples x prefixes), n codes.
"""

import collections.abc
import dataclasses
import functools
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from saev.nn import kernels, triton_kernels

PART_BYTES, N_PARTS = 2 * 2**20, 16
"""On a CPU a batch is searched in a multiple of N_PARTS parts, whose pre-activations (at most PART_BYTES) stay in its cache.

They do not depend on the number of threads, so that no result does.
"""

T = tp.TypeVar("T")

Joint = collections.abc.Callable[[Tensor], Tensor]
"""(n,) of this process -> those of all processes, one after the other."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Index:
    """Which latents fire in each row; row o's codes are start[o] to start[o + 1], by latent."""

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
        """The same codes in the order of their latents, rows rising within each."""
        if not uses_kernels(self.latent_n):
            order_n = torch.sort(self.latent_n, stable=True).indices
            n_S = torch.bincount(self.latent_n, minlength=self.n_latents)
            start_S1 = torch.nn.functional.pad(n_S.cumsum(0), (1, 0)).int()
            return ByLatent(order_n, self.row_n[order_n], start_S1)
        start_S1 = np.empty(self.n_latents + 1, np.int32)
        order_n, row_n = np.empty((2, len(self.latent_n)), np.int32)
        kernels.by_latent(self.start_O1.numpy(), self.latent_n.numpy(), start_S1, order_n, row_n)
        return ByLatent(*map(torch.from_numpy, (order_n, row_n, start_S1)))

    @property
    def n_fired_S(self) -> Int[Tensor, " S"]:
        """Rows in which each latent fires."""
        return self.by_latent.start_S1.diff()

    def split(self, end_P: Int[Tensor, " P"]) -> "Index":
        """The same codes as P rows for each row: of latents below end[0], from there below end[1], and so on."""
        P = len(end_P)
        block_n = torch.searchsorted(end_P, self.latent_n, right=True)
        key_n = self.row_n.long() * P + block_n
        keys = torch.arange(self.n_rows * P + 1, device=key_n.device)
        return Index(self.latent_n, torch.searchsorted(key_n, keys).int(), self.n_latents)


class ByLatent(tp.NamedTuple):
    """Codes in the order of their latents."""

    order_n: Int[Tensor, " n"]
    """Their numbers in row order."""
    row_n: Int[Tensor, " n"]
    """Their rows."""
    start_S1: Int[Tensor, " S1"]


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Codes:
    """A batch's sparse codes: value n is that of latent `index.latent_n[n]`."""

    value_n: Float[Tensor, " _"]
    index: Index

    @property
    def fired_S(self) -> Bool[Tensor, " S"]:
        """Latents with a value other than 0 somewhere."""
        fired_S = torch.zeros(self.index.n_latents, dtype=torch.uint8, device=self.value_n.device)
        fires_n = (self.value_n != 0).to(torch.uint8)
        return fired_S.scatter_reduce_(0, self.index.latent_n.long(), fires_n, "amax").bool()

    def dense(self) -> Float[Tensor, "O S"]:
        """The same codes with all their zeros."""
        f_OS = self.value_n.new_zeros(self.index.n_rows, self.index.n_latents)
        f_OS[self.index.row_n.long(), self.index.latent_n.long()] = self.value_n.detach()
        return f_OS


def uses_kernels(t: Tensor) -> bool:
    """Is this tensor handled by the compiled CPU kernels? Elsewhere the same is done by torch's operations (and Triton)."""
    return not t.is_cuda


def n_positive(f_BS: Float[Tensor, "B S"]) -> Int[Tensor, " S"]:
    """Of each latent: the samples in which it is positive."""
    if not uses_kernels(f_BS):
        return (f_BS > 0).sum(dim=0)
    array = f_BS.detach().numpy()
    parts = kernels.in_threads(lambda i, j: kernels.n_positive(array, i, j), len(array))
    return torch.from_numpy(np.sum(parts, axis=0))


# ---- sums of rows ----


def bag(
    table_RD: Tensor, index_n: Tensor, weight_n: Tensor, start_O1: Tensor
) -> Float[Tensor, "O D"]:
    """out[o] = sum over j in start[o] .. start[o + 1] of weight[j] table[index[j]]."""
    if triton_kernels.available(table_RD):
        return triton_kernels.bag(table_RD, index_n, weight_n, start_O1)
    if len(index_n) == 0:  # embedding_bag wants one
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
    if not uses_kernels(table_RD):
        return (a_OD[index.row_n] * table_RD[index.latent_n]).sum(dim=1)
    out_n = np.empty(len(index.latent_n), table_RD.detach().numpy().dtype)
    a, table = a_OD.detach().contiguous().numpy(), table_RD.detach().contiguous().numpy()
    latent_n, start_O1 = index.latent_n.numpy(), index.start_O1.numpy()
    kernels.in_threads(
        lambda first, last: kernels.bag_dot(a, table, latent_n, start_O1, first, last, out_n),
        index.n_rows,
    )
    return torch.from_numpy(out_n)


def _by_latent_sums(table_OD: Tensor, weight_n: Tensor, index: Index) -> Float[Tensor, "S D"]:
    """Of each latent: the sum of weight x table row over the rows in which it fires."""
    order_n, row_n, start_S1 = index.by_latent
    return bag(table_OD, row_n, weight_n[order_n], start_S1)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: tp.Any, value_n: Tensor, W_dec: Tensor, index: Index) -> Tensor:
        ctx.save_for_backward(value_n, W_dec)
        ctx.index = index
        return bag(W_dec, index.latent_n, value_n, index.start_O1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: tp.Any, g_OD: Tensor) -> tuple[Tensor, Tensor, None]:
        value_n, W_dec = ctx.saved_tensors
        g_OD = g_OD.contiguous()
        g_n = bag_dot(g_OD, W_dec, ctx.index)
        return g_n, _by_latent_sums(g_OD, value_n, ctx.index), None


@jaxtyped(typechecker=beartype.beartype)
def decode(
    value_n: Float[Tensor, " n"], W_dec: Float[Tensor, "S D"], index: Index
) -> Float[Tensor, "O D"]:
    """f W_dec. Differentiable in both."""
    return _Decode.apply(value_n, W_dec, index)


class _Reconstruct(torch.autograd.Function):
    """On a CPU: everything that needs the rows of W_dec that a sample fires, while they are in the cache."""

    @staticmethod
    def forward(
        ctx: tp.Any,
        value_n: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        x_BD: Tensor,
        index: Index,
        end_P: Tensor,
    ) -> tuple[Tensor, Tensor]:
        (B, D), P = x_BD.shape, len(end_P)
        x_hat_BD, error_B = torch.empty_like(x_BD), x_BD.new_empty(B)
        g_BPD, g_n = x_BD.new_empty(B, P, D), torch.empty_like(value_n)
        inputs = (x_BD, value_n, index.latent_n, index.start_O1, W_dec.contiguous(), b_dec, end_P)
        arrays = [t.detach().numpy() for t in inputs]
        outputs = [t.numpy() for t in (x_hat_BD, error_B, g_BPD, g_n)]
        kernels.in_threads(
            lambda first, last: kernels.reconstruct(*arrays, first, last, *outputs), B
        )
        ctx.save_for_backward(value_n, g_BPD, g_n, end_P)
        ctx.index = index
        ctx.mark_non_differentiable(x_hat_BD)
        return error_B.sum() / g_BPD.numel(), x_hat_BD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: tp.Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        value_n, g_BPD, g_n, end_P = ctx.saved_tensors
        factor = g * 2 / g_BPD.numel()
        order_n, row_n, start_S1 = ctx.index.by_latent
        if len(end_P) > 1:  # a latent's samples are those rows of g that belong to its block
            latents_S = torch.arange(ctx.index.n_latents)
            block_S = torch.searchsorted(end_P, latents_S, right=True).int()
            row_n = row_n * len(end_P) + block_S.repeat_interleave(start_S1.diff())
        grad_SD = bag(g_BPD.flatten(0, 1), row_n, (value_n * factor)[order_n], start_S1)
        return g_n * factor, grad_SD, g_BPD[:, 0].sum(dim=0) * factor, None, None, None


@jaxtyped(typechecker=beartype.beartype)
def reconstruct(
    value_n: Float[Tensor, " n"],
    W_dec: Float[Tensor, "S D"],
    b_dec: Float[Tensor, " D"],
    x_BD: Float[Tensor, "B D"],
    index: Index,
    end_P: Int[Tensor, " P"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "B D"]]:
    """(mean squared error over samples, prefixes and dimensions; reconstructions by the longest prefix, the whole dictionary).

    Differentiable in the codes, W_dec and b_dec, through the error alone.
    """
    if not uses_kernels(x_BD):
        B, P = len(x_BD), len(end_P)
        parts = index.split(end_P) if P > 1 else index
        x_hat_BPD = decode(value_n, W_dec, parts).unflatten(0, (B, P)).cumsum(dim=1) + b_dec
        return (x_hat_BPD - x_BD[:, None]).square().mean(), x_hat_BPD[:, -1].detach()
    return _Reconstruct.apply(value_n, W_dec, b_dec, x_BD, index, end_P)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: tp.Any,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        xc_BD: Tensor,
        index: Index,
        value_n: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(W_enc, xc_BD)
        ctx.index = index
        if value_n is None:
            value_n = bag_dot(xc_BD, W_enc.T, index) + b_enc[index.latent_n]
        return value_n.view_as(value_n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: tp.Any, g_n: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        W_enc, xc_BD = ctx.saved_tensors
        grad_SD = _by_latent_sums(xc_BD, g_n, ctx.index)
        grad_S = _sums(g_n, ctx.index)
        return grad_SD.T, grad_S, -(W_enc @ grad_S), None, None, None


def _sums(g_n: Tensor, index: Index) -> Float[Tensor, " S"]:
    """Sum over each latent's codes."""
    order_n, _, start_S1 = index.by_latent
    return torch.segment_reduce(g_n[order_n], "sum", offsets=start_S1.long(), initial=0)


@jaxtyped(typechecker=beartype.beartype)
def encode_at(
    W_enc: Float[Tensor, "D S"],
    b_enc: Float[Tensor, " S"],
    b_dec: Float[Tensor, " D"],
    x_BD: Float[Tensor, "B D"],
    index: Index,
    value_n: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """(x - b_dec) W_enc + b_enc at the index's places. Differentiable in the parameters, not in x.

    Args:
        value_n: the result, where it is known already.
    """
    return _Encode.apply(W_enc, b_enc, b_dec, x_BD - b_dec.detach(), index, value_n)


class _Linear(torch.autograd.Function):
    """(x - b_dec) W_enc + b_enc, with the gradient of W_enc in the layout of its transpose and none for x."""

    @staticmethod
    def forward(
        ctx: tp.Any,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        x_BD: Tensor,
        is_bfloat16: bool,
    ) -> Tensor:
        xc_BD = x_BD - b_dec
        ctx.save_for_backward(W_enc, xc_BD)
        return _dense(Encoder(W_enc.T, b_enc, is_bfloat16), xc_BD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: tp.Any, g_BS: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        W_enc, xc_BD = ctx.saved_tensors
        grad_S = g_BS.sum(dim=0)
        return (g_BS.T @ xc_BD).T, grad_S, -(W_enc @ grad_S), None, None


@jaxtyped(typechecker=beartype.beartype)
def pre_activations(
    W_enc: Float[Tensor, "D S"],
    b_enc: Float[Tensor, " S"],
    b_dec: Float[Tensor, " D"],
    x_BD: Float[Tensor, "B D"],
    is_bfloat16: bool = False,
) -> Float[Tensor, "B S"]:
    """(x - b_dec) W_enc + b_enc. Differentiable in the parameters, not in x. The product is float32's own or bfloat16's."""
    return _Linear.apply(W_enc, b_enc, b_dec, x_BD, is_bfloat16)


# ---- which latents fire ----


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Has this processor instructions for it? (The same answer at every call: it decides how values are rounded.)"""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


class Encoder(tp.NamedTuple):
    """An encoder's weights as the search needs them."""

    W_SD: Float[Tensor, "S D"]
    b_S: Float[Tensor, " S"]
    is_bfloat16: bool
    """Compute pre-activations in bfloat16 and leave it at that."""


class _Rows(tp.NamedTuple):
    """Pre-activations of some rows, and what bounds their error where they are screened."""

    pre_BS: np.ndarray
    is_screened: bool
    x_BD: np.ndarray
    W_SD: np.ndarray
    b_S: np.ndarray
    norm_S: np.ndarray
    margin_B: np.ndarray


def _search(
    encoder: Encoder, xc_BD: Tensor, find: collections.abc.Callable[[int, int, _Rows], T]
) -> list[T]:
    """`find(first, last, rows)` on the pre-activations of all rows of a batch on a CPU, some at a time, in threads."""
    W_SD, b_S, is_bfloat16 = encoder
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

    return kernels.each_in_threads(part, list(range(0, B, size)))


def _index(latent_n: np.ndarray, n_B: np.ndarray, n_latents: int) -> Index:
    start_B1 = np.concatenate([[0], np.cumsum(n_B)]).astype(np.int32)
    return Index(torch.from_numpy(latent_n), torch.from_numpy(start_B1), n_latents)


@torch.no_grad()
def top_k(
    encoder: Encoder, xc_BD: Float[Tensor, "B D"], k: int, keep_negative: bool = False
) -> Codes:
    """The k largest pre-activations of each row, if positive or if negative ones are kept. Of equal ones a CPU keeps the lowest latents."""
    B, S = len(xc_BD), len(encoder.W_SD)
    k = min(k, S)
    if not uses_kernels(xc_BD):
        value_BK, latent_BK = _dense_top_k(encoder, xc_BD, k)
        return _of_places(value_BK if keep_negative else value_BK.relu(), latent_BK, S)
    n_B = np.empty(B, np.int32)
    value_BK = np.empty((B, k), xc_BD.numpy().dtype)
    latent_BK = np.empty((B, k), np.int32)

    def find(first: int, last: int, rows: _Rows) -> None:
        mine = slice(first, last)
        kernels.top_k(*rows, k, n_B[mine], value_BK[mine], latent_BK[mine])

    _search(encoder, xc_BD, find)
    if keep_negative:  # the search finds positive ones: rows that have fewer are few
        short_R = np.flatnonzero(n_B < k)
        for part_R in np.array_split(short_R, -(-len(short_R) * S * 4 // PART_BYTES) or 1):
            value_RK, latent_RK = _dense_top_k(encoder, xc_BD[part_R], k)
            value_BK[part_R], latent_BK[part_R], n_B[part_R] = (
                value_RK.numpy(),
                latent_RK.numpy(),
                k,
            )
    if B == 0 or n_B.min() == k:
        return Codes(torch.from_numpy(value_BK.ravel()), _index(latent_BK.ravel(), n_B, S))
    fires_BK = np.arange(k) < n_B[:, None]
    return Codes(torch.from_numpy(value_BK[fires_BK]), _index(latent_BK[fires_BK], n_B, S))


def _dense_top_k(encoder: Encoder, xc_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, latents) of the k largest pre-activations of each row, by latent."""
    value_BK, latent_BK = _dense(encoder, xc_BD).topk(k, dim=1, sorted=False)
    latent_BK, order_BK = latent_BK.int().sort(dim=1)
    return value_BK.gather(1, order_BK), latent_BK


def _of_places(value_BK: Tensor, latent_BK: Tensor, n_latents: int) -> Codes:
    """Codes of a GPU: places where nothing fires are kept as zeros (no need to wait for their number)."""
    B, K = value_BK.shape
    start_B1 = torch.arange(0, B * K + 1, K, dtype=torch.int32, device=value_BK.device)
    return Codes(value_BK.flatten(), Index(latent_BK.flatten(), start_B1, n_latents))


@torch.no_grad()
def above(
    encoder: Encoder, xc_BD: Float[Tensor, "B D"], least_S: Float[Tensor, " S"], n_likely: int
) -> Codes:
    """Pre-activations above their latent's least.

    Args:
        n_likely: about how many there are in the batch (memory is taken for twice as many, and more when needed).
    """
    S = len(encoder.W_SD)
    if not uses_kernels(xc_BD):
        pre_BS = _dense(encoder, xc_BD)
        return _where(pre_BS, pre_BS > least_S)
    n_B = np.empty(len(xc_BD), np.int32)
    least = least_S.to(xc_BD.dtype).numpy()

    def find(first: int, last: int, rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
        size = 64 + 2 * n_likely * (last - first) // len(xc_BD)
        while True:
            value_n, latent_n = np.empty(size, least.dtype), np.empty(size, np.int32)
            n = kernels.above(*rows, least, n_B[first:last], value_n, latent_n)
            if n >= 0:
                return value_n[:n], latent_n[:n]
            size *= 2

    found = _search(encoder, xc_BD, find)
    value_n, latent_n = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Codes(torch.from_numpy(value_n), _index(latent_n, n_B, S))


def _where(pre_BS: Tensor, fires_BS: Tensor) -> Codes:
    row_n, latent_n = fires_BS.nonzero(as_tuple=True)
    start_B1 = torch.nn.functional.pad(fires_BS.sum(dim=1).cumsum(0), (1, 0)).int()
    return Codes(pre_BS[row_n, latent_n], Index(latent_n.int(), start_B1, pre_BS.shape[1]))


def _dense(encoder: Encoder, xc_BD: Tensor) -> Float[Tensor, "B S"]:
    if encoder.is_bfloat16:
        return (xc_BD.bfloat16() @ encoder.W_SD.bfloat16().T).float() + encoder.b_S
    return torch.addmm(encoder.b_S, xc_BD, encoder.W_SD.T)


class BatchSearch:
    """Finds the k x B largest pre-activations of batches, if positive; of those equal to the least, all.

    From batch to batch it remembers about where their least lies. That changes the time a search takes and nothing else.
    """

    def __init__(self, joint: Joint = lambda value_n: value_n, n_processes: int = 1):
        self.guess = -1.0
        self.slack = 0.03
        self.joint = joint
        self.n_processes = n_processes

    @torch.no_grad()
    def __call__(self, encoder: Encoder, xc_BD: Float[Tensor, "B D"], k: int) -> Codes:
        B, S = len(xc_BD), len(encoder.W_SD)
        n_wanted = min(k, S) * B * self.n_processes
        if self.guess < 0:
            self.guess = self._sampled(encoder, xc_BD, min(k, S))
        guess = self.guess
        while True:
            least_S = torch.full((S,), guess, dtype=xc_BD.dtype, device=xc_BD.device)
            codes = above(encoder, xc_BD, least_S, n_wanted // self.n_processes)
            joint_n = self.joint(codes.value_n)
            if len(joint_n) >= n_wanted or guess == 0:
                break
            self.slack = min(0.5, 2 * self.slack)
            guess = 0.0 if guess < 1e-3 else guess * (1 - self.slack)
        least = 0.0
        if len(joint_n) >= n_wanted:
            least = joint_n.kthvalue(len(joint_n) - n_wanted + 1).values.item()
            codes = _from(codes, least)
        self.slack = max(0.02, 0.9 * self.slack)
        self.guess = max(0.0, least * (1 - self.slack))
        return codes

    def _sampled(self, encoder: Encoder, xc_BD: Tensor, k: int) -> float:
        """A guess below the least of half as many again in the batch's first rows."""
        pre_bS = _dense(encoder, xc_BD[:64])
        n_drop = max(0, pre_bS.numel() - 3 * k * len(pre_bS) // 2)
        guess = pre_bS.flatten().kthvalue(n_drop + 1).values
        return max(0.0, self.joint(guess[None]).min().item())


def _from(codes: Codes, least: float) -> Codes:
    """The codes that are not below `least`."""
    index = codes.index
    if not uses_kernels(codes.value_n):
        keep_n = codes.value_n >= least
        n_B = torch.segment_reduce(keep_n.float(), "sum", offsets=index.start_O1.long(), initial=0)
        start_B1 = torch.nn.functional.pad(n_B.cumsum(0), (1, 0)).int()
        kept = Index(index.latent_n[keep_n], start_B1, index.n_latents)
        return Codes(codes.value_n[keep_n], kept)
    value_n, latent_n = codes.value_n.numpy(), index.latent_n.numpy()
    n_B = index.start_O1.diff().numpy()
    n = kernels.keep_from(value_n, latent_n, n_B, value_n.dtype.type(least))
    return Codes(torch.from_numpy(value_n[:n]), _index(latent_n[:n], n_B, index.n_latents))
