"""Triton kernels for the GPU that find the largest pre-activations of each row, or of a whole batch.

Pre-activations are B x S numbers, which is most of what a sparse step reads and writes. Both searches read
them once. That pass writes the maximum of each group of L neighbouring latents. Of equal values, the lowest
latent counts as larger, and so does the lower of two groups with equal maxima. Then the k largest values lie
in the k groups with the largest maxima: each of these holds a value that precedes every value outside them.

- A row's k largest (`top_k`): choose k of its maxima, then k of the L k values in these groups. A program
  holds a row's candidates in registers and finds the k-th largest by bisection of its bits. All shapes are
  known in advance, so the host does not wait.
- A batch's n largest (`batch_top_k`): the n-th largest maximum is a bound that at least n values reach, so
  all values that may be wanted, and all that equal the smallest of them, lie in groups whose maximum reaches
  it. These groups are listed. The n-th largest of their values is found digit by digit from histograms, and
  then the codes are counted and written. The host waits once, for their number.
- The same of a batch that comes in parts (`Candidates`): after each part, the groups so far and those of the
  part are reduced to those that reach the n-th largest maximum, with copies of their values.

Numbers are compared as integers of the same order (`key_of`), -0.0 as 0.0. A positive NaN counts as larger
than infinity. The only atomics add integers, so equal inputs give equal bits.

Shape letters: B batch, C part of a batch, S latents, L latents of a group, G groups of a row, K top k,
N candidates of a row, P programs, n codes or candidate groups.
"""

import collections.abc
import functools
import typing as tp

import beartype
import torch
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

from saev.nn import triton_kernels

MAX_N = 2**13
"""A program of `top_k` holds at most this many candidates: more would not fit its registers."""
FEW_LATENTS = 1024
"""A row of at most this many latents is searched without groups."""
TILE = 4096
"""Values of which a program takes the groups' maxima."""
BLOCK = 1024
"""Keys or values that a program that makes a list or a histogram holds at once."""
N_PROGRAMS = 1024
"""A list or histogram is made by at most this many programs, each of which reads a contiguous part."""
BATCH_GROUP = 32
"""Latents in a group of `batch_top_k`: 128 bytes of float32, what a GPU reads from memory at once."""
DIGIT_BITS = 8
"""Bits of the n-th largest key that one histogram determines."""


def available(pre_BS: Tensor, k: int = 1) -> bool:
    """Can the kernels search these pre-activations? Not float64; k up to 4,096, or rows up to 8,192."""
    if not triton_kernels.available(pre_BS):
        return False
    S = pre_BS.shape[1]
    return _group(S, min(k, S)) is not None


def pow2(n: int) -> int:
    """The smallest power of two that is at least n and 16."""
    return 1 << max(4, (n - 1).bit_length())


@functools.cache
def _group(S: int, k: int) -> int | None:
    """Latents in a group of `top_k`: the number that makes the larger of its two searches smallest.

    1: no groups; None: k is too large.
    """
    if S <= FEW_LATENTS:
        return 1
    sizes = {L: max(pow2(-(-S // L)), pow2(k * L)) for L in (2, 4, 8, 16, 32, 64) if k <= S // L}
    fits = {L: size for L, size in sizes.items() if pow2(k * L) <= MAX_N}
    if not fits:
        return 1 if S <= MAX_N else None
    return min(fits, key=lambda L: fits[L])


def launch(name: str, grid: tuple[int, ...], *args: tp.Any, **constants: tp.Any) -> None:
    """Starts a kernel on the GPU of its first tensor, which may be another than the current one."""
    from saev.nn import triton_programs  # here, so that this module can be imported without Triton

    with torch.cuda.device_of(args[0]):
        getattr(triton_programs, name)[grid](*args, **constants)


def _group_max(source_BS: Tensor, L: int) -> Tensor:
    """Keys (int32) of the maxima of groups of L neighbouring values, which may be keys."""
    B, S = source_BS.shape
    G = -(-S // L)
    max_BG = torch.empty(B, G, dtype=torch.int32, device=source_BS.device)
    tile = min(TILE // L, pow2(G))
    is_key = not source_BS.is_floating_point()
    launch("group_max", (B, -(-G // tile)), source_BS, max_BG, S, G, L=L, TILE=tile, IS_KEY=is_key)
    return max_BG


# ---- rows ----


@jaxtyped(typechecker=beartype.beartype)
def top_k(pre_BS: Float[Tensor, "B S"], k: int) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Finds the k largest values of each row and their latents (int32), sorted by latent.

    Of ties, the lowest latents. The size must be one that `available` accepts.
    """
    pre_BS = pre_BS.contiguous()
    B, S = pre_BS.shape
    k = min(k, S)
    value_BK = pre_BS.new_empty(B, k)
    if value_BK.numel() == 0:
        return value_BK, torch.empty(B, k, dtype=torch.int32, device=pre_BS.device)
    return value_BK, _places(pre_BS, k, value_BK)


def _places(source_BS: Tensor, k: int, value_BK: Tensor | None) -> Tensor:
    """The places (int32) of each row's k largest, in order.

    Their values go to `value_BK`, except from keys.
    """
    B, S = source_BS.shape
    L = _group(S, k)
    if L is None:
        raise ValueError(f"k = {k} of {S} latents is too large for these kernels")
    place_BK = torch.empty(B, k, dtype=torch.int32, device=source_BS.device)
    group_BK = _places(_group_max(source_BS, L), k, None) if L > 1 else place_BK
    n = k * L if L > 1 else S
    args = (source_BS, group_BK, place_BK, place_BK if value_BK is None else value_BK, S, n, k)
    constants = {"L": L, "N": pow2(n), "IS_KEY": value_BK is None, "num_warps": n_warps(pow2(n))}
    launch("select", (B,), *args, **constants)
    return place_BK


def n_warps(N: int) -> int:
    """Warps of a program of `select` that holds N candidates."""
    return 4 if N <= 1024 else 8


# ---- batch ----


class _Source(tp.NamedTuple):
    """Where the batch's candidates are: in a list of keys (L = 0), or in the listed groups."""

    key_n: Tensor
    size: Tensor
    """The number of keys, or of groups, on the GPU."""
    pre_BS: Tensor
    listed_n: Tensor
    S: int
    G: int
    capacity: int
    """The largest number of keys or groups that there can be."""
    constants: dict[str, int]

    @classmethod
    def keys(cls, key_n: Tensor) -> "_Source":
        size = torch.full((1,), len(key_n), dtype=torch.int32, device=key_n.device)
        return cls(key_n, size, key_n, key_n, 0, 0, len(key_n), {"L": 0, "BLOCK": BLOCK})

    @classmethod
    def groups(cls, pre_BS: Tensor, listed_n: Tensor, size: Tensor, L: int) -> "_Source":
        S = pre_BS.shape[1]
        constants = {"L": L, "BLOCK": BLOCK // L}
        return cls(listed_n, size, pre_BS, listed_n, S, -(-S // L), len(listed_n), constants)

    @property
    def n_programs(self) -> int:
        return max(1, min(N_PROGRAMS, -(-self.capacity // self.constants["BLOCK"])))

    def nth_largest(self, n: int) -> Tensor:
        """The n-th largest positive key; 0 if there are fewer."""
        device = self.key_n.device
        state = torch.zeros(2, dtype=torch.int32, device=device)
        state[1].fill_(n)  # a copy from the host would wait
        count_d = torch.zeros(1 << DIGIT_BITS, dtype=torch.int32, device=device)
        constants = {**self.constants, "DIGITS": 1 << DIGIT_BITS}
        for shift in reversed(range(0, 32, DIGIT_BITS)):
            launch("histogram", (self.n_programs,), *self[:6], state, count_d, shift, **constants)
            launch("pick", (1,), state, count_d, DIGITS=1 << DIGIT_BITS)
        return state[0]

    def ends(self, bound: Tensor) -> Tensor:
        """How many reach the bound up to each program's part, inclusive."""
        count_P = torch.zeros(self.n_programs, dtype=torch.int32, device=bound.device)
        self._reach(bound, count_P, count_P, count_P, count_P, is_count=True)
        return count_P.cumsum(0, dtype=torch.int32)

    def places(self, bound: Tensor, end_P: Tensor, n: int) -> Tensor:
        """Positions of the keys that reach the bound."""
        place_n = torch.empty(n, dtype=torch.int32, device=bound.device)
        self._reach(bound, end_P, place_n, place_n, place_n, is_count=False)
        return place_n

    def codes(self, bound: Tensor, is_over: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Values, latents and rows that reach the bound; None if `is_over`. Waits for their number."""
        end_P = self.ends(bound)
        n = int((end_P[-1] if is_over is None else torch.where(is_over, -1, end_P[-1])).item())
        if n < 0:
            return None
        row_n, latent_n = torch.empty(2, n, dtype=torch.int32, device=bound.device)
        value_n = self.pre_BS.new_empty(n)
        self._reach(bound, end_P, row_n, latent_n, value_n, is_count=False)
        return value_n, latent_n, row_n

    def _reach(self, bound: Tensor, *outs: Tensor, is_count: bool) -> None:
        constants = {**self.constants, "IS_COUNT": is_count}
        launch("reach", (self.n_programs,), *self[:6], bound, *outs, **constants)


@jaxtyped(typechecker=beartype.beartype)
def batch_top_k(
    pre_BS: Float[Tensor, "B S"],
    n: int,
    gather: collections.abc.Callable[[Tensor], Tensor] = lambda value_n: value_n,
    n_processes: int = 1,
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " B1"]]:
    """Finds the n largest positive values of the batch, and all that equal the smallest of them.

    Args:
        n: at least 1.
        gather: with several processes, each of which has such a batch, collects the numbers of all. Then
            the n x `n_processes` largest of all batches are found.

    Returns:
        Values and latents (int32) by row, then latent; and where each row starts.
    """
    pre_BS = pre_BS.contiguous()
    max_BG = _group_max(pre_BS, BATCH_GROUP)
    maxima = _Source.keys(max_BG.flatten())
    bound = maxima.nth_largest(n)
    if n_processes > 1:  # all processes need candidates down to the same bound
        bound = gather(bound[None]).min()
    end_P = maxima.ends(bound)
    listed_n = maxima.places(bound, end_P, max_BG.numel())
    groups = _Source.groups(pre_BS, listed_n, end_P[-1:], BATCH_GROUP)
    found = groups.codes(groups.nth_largest(n) if n_processes == 1 else bound)
    value_n, latent_n, row_n = tp.cast(tuple[Tensor, Tensor, Tensor], found)
    if n_processes > 1:
        smallest = _Source.keys(_keys(gather(value_n))).nth_largest(n * n_processes)
        is_kept_n = _keys(value_n) >= smallest
        value_n, latent_n, row_n = value_n[is_kept_n], latent_n[is_kept_n], row_n[is_kept_n]
    return value_n, latent_n, _starts(row_n, len(pre_BS))


class Candidates:
    """Finds the n largest positive values of a batch that comes in parts, and all ties with the smallest.

    After each part it holds the groups, of all parts so far, whose maximum reaches the n-th largest maximum.
    The n largest values lie in these. Without ties they are at most n groups.

    Args:
        S: latents of a row.
        like: has the values' dtype and device.
        n: at least 1.
        capacity: most groups that it holds.
    """

    def __init__(self, S: int, like: Tensor, n: int, capacity: int):
        self.S, self.n, self.capacity = S, n, capacity
        self.G = -(-S // BATCH_GROUP)
        self.n_rows = 0
        self.value_nL = like.new_empty(capacity, BATCH_GROUP)
        self.key_n = torch.zeros(capacity, dtype=torch.int32, device=like.device)
        """0 beyond the last group."""
        self.place_n = torch.empty_like(self.key_n)
        """A group's number in the whole batch: row x G + its number in the row."""
        self.size = torch.zeros(1, dtype=torch.int32, device=like.device)
        self.is_over = torch.zeros((), dtype=torch.bool, device=like.device)
        """So many groups tied that there was no room for all."""

    def add(self, pre_CS: Tensor) -> None:
        """Adds the next rows."""
        pre_CS = pre_CS.contiguous()
        found = _Source.keys(torch.cat([self.key_n, _group_max(pre_CS, BATCH_GROUP).flatten()]))
        bound = found.nth_largest(self.n)
        end_P = found.ends(bound)
        self.size = end_P[-1:]
        self.is_over |= self.size[0] > self.capacity
        listed_n = found.places(bound, end_P, len(found.key_n))
        kept = (self.value_nL, self.place_n)
        outs = (torch.zeros_like(self.key_n), *map(torch.empty_like, kept))
        sizes = (self.capacity, self.S, self.G, self.n_rows * self.G)
        block = BLOCK // BATCH_GROUP
        launch(
            "merge", (-(-self.capacity // block),), listed_n, self.size, found.key_n, *kept, pre_CS, *outs,
            *sizes, L=BATCH_GROUP, BLOCK=block,
        )  # fmt: skip
        self.key_n, self.value_nL, self.place_n = outs
        self.n_rows += len(pre_CS)

    def codes(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """As `batch_top_k`, of all rows; waits once. None if too many groups tied."""
        all_n = torch.arange(self.capacity, dtype=torch.int32, device=self.size.device)
        size = self.size.clamp(max=self.capacity)
        groups = _Source.groups(self.value_nL, all_n, size, BATCH_GROUP)
        found = groups.codes(groups.nth_largest(self.n), self.is_over)
        if found is None:
            return None
        value_n, latent_n, candidate_n = found
        group_n = self.place_n.index_select(0, candidate_n)
        row_n = group_n // self.G
        latent_n = latent_n + (group_n - row_n * self.G) * BATCH_GROUP
        return value_n, latent_n, _starts(row_n, self.n_rows)


def _starts(row_n: Tensor, n_rows: int) -> Tensor:
    """Where each of the sorted rows starts."""
    rows_B1 = torch.arange(n_rows + 1, dtype=torch.int32, device=row_n.device)
    return torch.searchsorted(row_n, rows_B1, out_int32=True)


def _keys(value_n: Tensor) -> Tensor:
    """`key_of` of positive values."""
    return value_n.float().view(torch.int32)
