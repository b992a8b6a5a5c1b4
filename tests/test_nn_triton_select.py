"""The selection kernels against sorts and the CPU's kernels: in Triton's interpreter, compiled for GPUs, and run on one."""

import collections.abc
import functools
import os
import pathlib
import re
import typing as tp
import unittest.mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import kernel_resources
from saev.nn import activations, kernels, partsizes, sparse, triton_kernels, triton_select

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# ---- pre-activations with all kinds of ties ----


def normal(generator: torch.Generator, B: int, S: int) -> Tensor:
    return torch.randn(B, S, generator=generator)


def integers(generator: torch.Generator, B: int, S: int) -> Tensor:
    return torch.randint(-2, 3, (B, S), generator=generator).float()


def equal(generator: torch.Generator, B: int, S: int) -> Tensor:
    return torch.full((B, S), 1.5)


def mostly_zero(generator: torch.Generator, B: int, S: int) -> Tensor:
    """Of both signs, with a few positive values and a few subnormal ones."""
    x_BS = torch.zeros(B, S) * torch.randn(B, S, generator=generator).sign()
    few_BS = torch.rand(B, S, generator=generator)
    x_BS = torch.where(few_BS < 0.01, torch.randint(1, 4, (B, S), generator=generator).float(), x_BS)
    return torch.where(few_BS > 0.99, 1e-41, x_BS)


def negative(generator: torch.Generator, B: int, S: int) -> Tensor:
    return -1 - torch.randint(0, 9, (B, S), generator=generator).float()


def neighbours(generator: torch.Generator, B: int, S: int) -> Tensor:
    """All large values are in one group."""
    x_BS = torch.rand(B, S, generator=generator)
    x_BS[:, S // 2 : S // 2 + 64] += 1
    return x_BS


def infinite(generator: torch.Generator, B: int, S: int) -> Tensor:
    x_BS = torch.randn(B, S, generator=generator)
    x_BS[torch.rand(B, S, generator=generator) < 0.05] = torch.inf
    x_BS[torch.rand(B, S, generator=generator) < 0.05] = -torch.inf
    return x_BS


KINDS = (normal, integers, equal, mostly_zero, negative, neighbours, infinite)
SIZES = [  # rows, latents, k
    (1, 1, 1),
    (3, 7, 3),
    (2, 40, 50),
    (2, 1024, 32),
    (2, 1025, 1),
    (2, 1500, 700),
    (1, 2600, 2500),
    (2, 2999, 20),
]


def cases() -> collections.abc.Iterator[tuple[Tensor, int]]:
    for i, (B, S, k) in enumerate(SIZES):
        for j in range(2):  # each kind in several sizes
            kind = KINDS[(2 * i + j) % len(KINDS)]
            x_BS = kind(torch.Generator().manual_seed(100 * i + j), B, S)
            yield x_BS.to((F32, F32, BF16, F16)[(i + j) % 4]), k
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):  # random sizes
        B, S, k = (int(torch.randint(1, high, (), generator=generator)) for high in (4, 2000, 200))
        kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
        yield kind(generator, B, S), k


# ---- oracles ----


def largest(x_BS: Tensor, k: int) -> Tensor:
    """Latents of each row's k largest, the lowest of ties, sorted."""
    order_BS = x_BS.double().sort(dim=1, descending=True, stable=True).indices
    return order_BS[:, : min(k, x_BS.shape[1])].sort(dim=1).values


def by_cpu_kernel(x_BS: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and latent of each code that the CPU finds."""
    (B, S), k = x_BS.shape, min(k, x_BS.shape[1])
    n_B, value_BK, latent_BK = np.empty(B, np.int32), np.empty((B, k), np.float32), np.empty((B, k), np.int32)
    one, none = np.ones((B, 1), np.float32), np.zeros(S, np.float32)
    exact = (one, np.ones((S, 1), np.float32), none, none, one[:, 0])
    kernels.top_k(x_BS.float().numpy(), False, *exact, k, n_B, value_BK, latent_BK)
    fires_BK = np.arange(k) < n_B[:, None]
    return np.nonzero(fires_BK)[0], latent_BK[fires_BK]


def check_rows(device: str, x_BS: Tensor, k: int) -> None:
    value_BK, latent_BK = triton_select.top_k(x_BS.to(device), k)
    value_BK, latent_BK = value_BK.cpu(), latent_BK.cpu()
    want_BK = largest(x_BS, k)
    assert torch.equal(latent_BK.long(), want_BK)
    assert value_BK.dtype == x_BS.dtype and torch.equal(value_BK, x_BS.gather(1, want_BK))
    row_n, latent_n = by_cpu_kernel(x_BS, k)
    b, j = (value_BK > 0).nonzero(as_tuple=True)
    assert np.array_equal(b, row_n) and np.array_equal(latent_BK[b, j], latent_n)


def as_dense(x_BS: Tensor, value_n: Tensor, latent_n: Tensor, start_B1: Tensor) -> Tensor:
    """Also checks that latents increase in each row."""
    row_n = torch.arange(len(x_BS)).repeat_interleave(start_B1.cpu().long().diff())
    place_n = row_n * x_BS.shape[1] + latent_n.cpu()
    assert (place_n.diff() > 0).all() and start_B1[0] == 0 and len(row_n) == len(value_n)
    out_BS = torch.zeros_like(x_BS)
    out_BS[row_n, latent_n.cpu().long()] = value_n.cpu()
    return out_BS


def check_batch(device: str, x_BS: Tensor, k: int) -> None:
    n = min(k, x_BS.shape[1]) * len(x_BS)
    found = triton_select.batch_top_k(x_BS.to(device), n)
    assert found[0].dtype == x_BS.dtype and (found[0] > 0).all()
    assert torch.equal(as_dense(x_BS, *found), activations.batch_top_k(x_BS, k))


def check_parts(device: str, x_BS: Tensor, k: int) -> None:
    """Two rows at a time: the same bits as at once."""
    n = min(k, x_BS.shape[1]) * len(x_BS)
    want = triton_select.batch_top_k(x_BS.to(device), n)
    candidates = triton_select.Candidates(x_BS.shape[1], want[0], n, capacity=n + 32)
    for x_CS in x_BS.split(2):
        candidates.add(x_CS.to(device))
    found = candidates.codes()
    assert found is not None
    assert all(torch.equal(got, w) and got.dtype == w.dtype for got, w in zip(found, want, strict=True))


def check_more_ties_than_there_is_room_for(device: str) -> None:
    """Which is found out, whenever it happens; as many as there is room for are found."""
    ties_BS, rising_BS = torch.ones(2, 320), torch.arange(640.0).view(2, 320)
    for x_BS, n, capacity, n_found in ((ties_BS, 8, 20, 640), (ties_BS, 8, 19, None), (rising_BS, 1, 1, 1)):
        candidates = triton_select.Candidates(320, x_BS.to(device), n, capacity)
        for x_CS in (x_BS[:1], x_BS[1:], -x_BS[:1]):
            candidates.add(x_CS.to(device))
        found = candidates.codes()
        assert (found and len(found[0])) == n_found


def check_processes(device: str, x_BS: Tensor, k: int) -> None:
    """Two processes find together what one finds in both batches."""
    n = min(k, x_BS.shape[1]) * len(x_BS)
    both_PBS = torch.stack([x_BS, 2 * x_BS.flip(1) - 1])
    gathered: list[Tensor] = []

    class Asked(Exception):  # noqa: N818
        pass

    def run(pre_BS: Tensor) -> tuple[Tensor, ...] | Tensor:
        """The result, or what this process wants to be gathered next."""
        answers = iter(gathered)

        def gather(value_n: Tensor) -> Tensor:
            for answer in answers:
                return answer
            raise Asked(value_n)

        try:
            return triton_select.batch_top_k(pre_BS.to(device), n, gather, 2)
        except Asked as asked:
            return asked.args[0]

    while True:
        done = [run(pre_BS) for pre_BS in both_PBS]
        if not isinstance(done[0], Tensor):
            break
        gathered.append(torch.cat(done))
    got = torch.cat([as_dense(x, *found) for x, found in zip(both_PBS, done, strict=True)])
    assert torch.equal(got, activations.batch_top_k(both_PBS.flatten(0, 1), k))
    assert len(gathered) == 2


def check_bits(device: str) -> None:
    """Equal inputs give equal bits; a strided input gives those of its copy; -0.0 equals 0.0."""
    x_BS = integers(torch.Generator().manual_seed(3), 4, 1300).to(device)
    for search in (triton_select.top_k, functools.partial(triton_select.batch_top_k)):
        for got, again in zip(search(x_BS, 30), search(x_BS.T.contiguous().T, 30), strict=True):
            assert torch.equal(got, again)
    zeros_BS = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0]], device=device)
    assert triton_select.top_k(zeros_BS, 3)[1].tolist() == [[1, 2, 3]]
    assert triton_select.top_k(zeros_BS.expand(1, 5).repeat(1, 400), 2)[1].tolist() == [[1, 2]]
    assert len(triton_select.batch_top_k(zeros_BS, 2)[0]) == 0
    assert triton_select.top_k(zeros_BS[:0], 3)[0].shape == (0, 3)


def check_ends_of_rows(device: str) -> None:
    """The last group of a row is shorter; the next row's large values are not in it."""
    x_BS = torch.zeros(2, 1500)
    x_BS[0, 1499] = 1
    x_BS[1, :10] = 5
    check_rows(device, x_BS, 3)
    check_batch(device, x_BS[:, :1499], 3)
    assert triton_select.batch_top_k(x_BS.to(device), 11)[1].tolist() == [1499, *range(10)]
    x_BS[0] = torch.where(torch.arange(1500) < 1400, -1.0, -3.0)  # what is beyond it is not larger
    check_rows(device, x_BS, 1)
    check_rows(device, x_BS[:1], 1)


def check_not_a_number(device: str) -> None:
    """NaN is found, so that a run that diverges is noticed, and nothing else goes wrong."""
    x_BS = normal(torch.Generator().manual_seed(4), 2, 1100)
    x_BS[1, 700] = torch.nan
    value_BK, latent_BK = triton_select.top_k(x_BS.to(device), 2)
    assert 700 in latent_BK[1].tolist() and value_BK.isnan().sum() == 1
    value_n, latent_n, start_B1 = triton_select.batch_top_k(x_BS.to(device), 4)
    assert value_n.isnan().sum() == 1 and len(latent_n) == start_B1[-1] == 4


def check_levels(device: str) -> None:
    """Groups of groups, where a row has too many of them for one program."""
    x_BS = integers(torch.Generator().manual_seed(5), 2, 2000)
    few = {"MAX_N": 64, "FEW_LATENTS": 16}
    triton_select._group.cache_clear()
    with unittest.mock.patch.multiple(triton_select, **few):
        assert triton_select._group(2000, 4) == 16 and triton_select._group(125, 4) == 4
        assert triton_select._group(2000, 40) is None
        check_rows(device, x_BS, 4)
        with pytest.raises(ValueError, match="too large"):
            triton_select.top_k(x_BS.to(device), 40)
    triton_select._group.cache_clear()


def check_programs(device: str, n_programs: int) -> None:
    """Lists do not depend on how many programs make them."""
    with unittest.mock.patch.multiple(triton_select, N_PROGRAMS=n_programs, BLOCK=64):
        check_batch(device, integers(torch.Generator().manual_seed(6), 5, 333), 40)


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU."""

    n = 0

    def __torch_dispatch__(
        self, func: tp.Any, types: tp.Any, args: tp.Any = (), kwargs: tp.Any = None
    ) -> tp.Any:
        self.n += str(func).startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.bincount"))
        return func(*args, **(kwargs or {}))


def check_search() -> None:
    """`sparse.top_k` and `BatchSearch` use the kernels, find what a CPU finds, and wait 0 and 1 times."""
    generator = torch.Generator().manual_seed(8)
    encoder = sparse.Encoder(integers(generator, 1100, 20), integers(generator, 1, 1100)[0], False)
    x_BD = integers(generator, 2, 20)
    gpu = (
        unittest.mock.patch.object(triton_kernels, "available", lambda t: t.dtype != torch.float64),
        unittest.mock.patch.object(kernels, "available", lambda t: False),
    )
    want = [sparse.top_k(encoder, x_BD, 9, signed).dense() for signed in (False, True)]
    want.append(sparse.BatchSearch()(encoder, x_BD, 9).dense())
    divided = encoder._replace(part_bytes=1100 * partsizes.PRE_BYTES)
    few = sparse.Encoder(encoder.W_SD, encoder.b_S - 25, False)  # few positive ones
    want_few = sparse.top_k(few, x_BD[:1], 30, True).dense()
    with gpu[0], gpu[1]:
        with Waits() as row_waits:
            found = [sparse.top_k(encoder, x_BD, 9, signed) for signed in (False, True)]
        with Waits() as batch_waits:
            found.append(sparse.BatchSearch()(encoder, x_BD, 9))
        for more in (10, -10, 1024):  # enough room; too many tie; too much memory
            with unittest.mock.patch.object(partsizes, "MORE_GROUPS", more), Waits() as parts_waits:
                found.append(sparse.BatchSearch()(divided, x_BD, 9))
            assert (parts_waits.n == 1) == (more == 10)
        found_few = sparse.top_k(few, x_BD[:1], 30, True)
        double = sparse.Encoder(encoder.W_SD.double(), encoder.b_S.double(), False)
        sparse.top_k(double, x_BD.double(), 9)  # torch's
    want += 3 * want[2:]
    assert all(torch.equal(got.dense(), w) for got, w in zip(found, want, strict=True))
    assert len(sparse.search.parts(divided, x_BD)) == 2
    assert torch.equal(found_few.dense(), want_few)
    assert len(found[0].value_n) == 2 * 9
    assert (row_waits.n, batch_waits.n) == (0, 1)


def check(device: str) -> None:
    for x_BS, k in cases():
        check_rows(device, x_BS, k)
        check_batch(device, x_BS, k)
    kinds = ((integers, 20, F32), (equal, 80, BF16), (mostly_zero, 4, F16), (negative, 1, F32))
    for i, (kind, k, dtype) in enumerate(kinds):  # the last part has one row
        check_parts(device, kind(torch.Generator().manual_seed(i), 5, 70 + i).to(dtype), k)
    check_more_ties_than_there_is_room_for(device)
    for kind in KINDS[:2]:
        check_processes(device, kind(torch.Generator().manual_seed(9), 3, 500), 8)
    check_bits(device)
    check_ends_of_rows(device)
    check_not_a_number(device)
    check_levels(device)
    for n_programs in (1, 3):
        check_programs(device, n_programs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    check("cuda")
    x_BS = torch.randn(4096, 32768, device="cuda")
    assert torch.equal(triton_select.top_k(x_BS, 32)[1].long(), x_BS.topk(32).indices.sort(dim=1).values)
    assert triton_select.batch_top_k(x_BS, 32 * 4096)[0].numel() == 32 * 4096


# ---- compiled ----


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("triton", minversion="3.3")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize(
    ("arch", "dtype", "sizes"),
    [
        (80, F32, [(32768, 32)]),
        (90, F32, [(32768, 32), (131072, 1024), (5000, 4500)]),
        (90, BF16, [(32768, 32)]),
        (100, F32, [(32768, 32), (131072, 1024)]),
    ],
)
def test_programs_fit_a_gpu(compiles, arch: int, dtype: torch.dtype, sizes: list[tuple[int, int]]) -> None:
    """No spilled registers, little shared memory, exact subnormal numbers, atomics only on integers."""
    launches = dict.fromkeys(x for S, k in sizes for x in kernel_resources.launches(S, k, dtype))
    assert {x.name for x in launches} == {"group_max", "select", "histogram", "pick", "reach", "merge"}
    for launch in launches:
        needs = kernel_resources.compiled(launch, arch)
        assert needs.stack == 0, launch
        assert needs.shared <= 16 * 1024, launch
        assert needs.registers <= 192, launch
        assert needs.resident(arch) >= 8, launch
        assert ".ftz" not in needs.ptx
        atomics = set(re.findall(r"^\s*(?:@\S+ )?((?:atom|red)\.\S+)", needs.ptx, re.MULTILINE))
        assert all(re.search(r"\.add\.[su]32$", name) for name in atomics), (launch, atomics)
        assert bool(atomics) == (launch.name == "histogram")
        if launch.name == "group_max" and "*fp32" in str(launch.types) and "S" in launch.aligned:
            assert "ld.global.v4.b32" in needs.ptx, launch
        if launch.name in ("group_max", "select") or "*f" in str(launch.types):
            wide = r"m(ul|ad)\.lo\.s64|m(ul|ad)\.wide\.s32\s+%rd\d+, %r\d+, %r\d+"  # of two registers
            assert re.search(wide, needs.ptx) or launch.name == "histogram", launch


def test_a_spilled_register_would_be_seen(compiles) -> None:
    """8,192 candidates do not fit the registers of 4 warps."""
    launch = next(
        x for x in kernel_resources.launches(131072, 1024, F32) if dict(x.constants).get("N") == 8192
    )
    few = {**dict(launch.constants), "num_warps": 4}
    assert kernel_resources.compiled(launch._replace(constants=tuple(few.items())), 90).stack > 0


def test_sizes_that_are_available() -> None:
    assert not triton_select.available(torch.zeros(2, 2))
    with unittest.mock.patch.object(triton_kernels, "available", lambda t: True):
        assert triton_select.available(torch.zeros(1, 2**20), 1024)
        assert triton_select.available(torch.zeros(1, 2**18), 4096)
        assert not triton_select.available(torch.zeros(1, 2**18), 4097)
        assert triton_select.available(torch.zeros(1, 8192), 8192)
