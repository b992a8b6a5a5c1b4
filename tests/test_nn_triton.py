"""The Triton kernels against plain loops: in Triton's interpreter, compiled for a GPU, and run on one if there is one."""

import collections.abc
import os
import pathlib
import re
import subprocess
import sys
import unittest.mock

import jaxtyping
import pytest
import torch
from torch import Tensor

from saev.nn import kernels, triton_kernels

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
I32, I64 = torch.int32, torch.int64
ROUNDOFF = {F32: 2.0**-24, BF16: 2.0**-7, F16: 2.0**-11}
"""Relative error of a stored result. (The interpreter truncates to bfloat16; a GPU rounds, with half that error.)"""

CASES = [
    # rows R, width D, codes of each segment, dtype of indices, of starts, of tables, of results
    (5, 16, (2, 0, 3), I32, I32, F32, F32),
    (7, 7, (0, 0, 1), I64, I64, F32, F32),
    (3, 1, (8, 9), I32, I64, F32, F32),
    (9, 384, (32, 1, 9, 8), I32, I32, F32, BF16),
    (3, 300, (100, 0), I64, I32, BF16, F32),
    (6, 257, (7, 16), I64, I64, F16, F16),
    (11, 40, (0, 500, 0, 3), I32, I32, F32, F32),
    (4, 20, (0, 0), I32, I32, F16, F32),
    (4, 20, (), I64, I64, F32, F32),
]


def make(
    i: int, R: int, D: int, lengths: tuple[int, ...], index: torch.dtype, start: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random table, indices, weights, starts, and a row for each segment."""
    generator = torch.Generator().manual_seed(i)
    n = sum(lengths)
    return (
        torch.randn(R, D, generator=generator),
        torch.randint(R, (n,), generator=generator).to(index),
        torch.randn(n, generator=generator),
        torch.tensor([sum(lengths[:o]) for o in range(len(lengths) + 1)], dtype=start),
        torch.randn(len(lengths), D, generator=generator),
    )


def by_loops(table: Tensor, index: Tensor, weight: Tensor, start: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    table, weight, a = table.double(), weight.double(), a.double()
    bag = torch.zeros(len(a), table.shape[1], dtype=torch.float64)
    dot = torch.zeros(len(index), dtype=torch.float64)
    for o in range(len(a)):
        for j in range(start[o], start[o + 1]):
            bag[o] += weight[j] * table[index[j]]
            dot[j] = a[o] @ table[index[j]]
    return bag, dot


def assert_within(got: Tensor, want: Tensor, size: Tensor, n_terms: int) -> None:
    """Float32's bound for a sum of n terms in any order, sum |term| = size, and one rounding to the result's dtype."""
    error = (got.cpu().double() - want).abs()
    bound = (n_terms + 1) * ROUNDOFF[F32] * size + ROUNDOFF[got.dtype] * want.abs() + 1e-7
    assert (error <= bound).all(), (error - bound).max()


def check_case(device: str, i: int) -> None:
    R, D, lengths, index_dtype, start_dtype, dtype, out_dtype = CASES[i]
    table, index, weight, start, a = make(i, R, D, lengths, index_dtype, start_dtype)
    table, a = table.to(dtype), a.to(dtype)
    want_bag, want_dot = by_loops(table, index, weight, start, a)
    size_bag, size_dot = by_loops(table.abs(), index, weight.abs(), start, a.abs())
    table, index, weight, start, a = (t.to(device) for t in (table, index, weight, start, a))

    got = triton_kernels.bag(table, index, weight, start, out_dtype=out_dtype)
    got_dot = triton_kernels.bag_dot(a, table, index, start, out_dtype=out_dtype)
    assert got.dtype == got_dot.dtype == out_dtype
    assert got.device == got_dot.device == table.device
    assert got.shape == want_bag.shape and got_dot.shape == want_dot.shape
    assert_within(got, want_bag, size_bag, max(lengths, default=0))
    assert_within(got_dot, want_dot, size_dot, D)
    assert torch.equal(got, triton_kernels.bag(table, index, weight, start, out_dtype=out_dtype))
    again = triton_kernels.bag_dot(a, table, index, start, out_dtype=out_dtype)
    assert torch.equal(got_dot, again)


def check_layouts(device: str) -> None:
    """Transposed tables and strided vectors give the bits of their contiguous copies; float32 is the default."""
    made = make(0, 12, 18, (5, 0, 20), I32, I32)
    table, index, weight, start, a = (t.to(device) for t in made)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in (index, weight, start)]
    table_T, a_T = table.T.contiguous().T, a.T.contiguous().T
    assert not any(t.is_contiguous() for t in (*strided, table_T, a_T))
    bag = triton_kernels.bag(table, index, weight, start)
    dot = triton_kernels.bag_dot(a, table, index, start)
    assert bag.dtype == dot.dtype == F32
    assert torch.equal(bag, triton_kernels.bag(table_T, *strided))
    assert torch.equal(dot, triton_kernels.bag_dot(a_T, table_T, strided[0], strided[2]))


def check_codes_of_no_segment(device: str) -> None:
    table, index, _, _, a = (t.to(device) for t in make(1, 4, 6, (1, 1), I32, I32))
    none = triton_kernels.bag_dot(a, table, index, torch.zeros(3, dtype=I32, device=device))
    assert torch.equal(none.cpu(), torch.zeros(2))


def check_rows_not_asked_for(device: str) -> None:
    """Row 0, which masked places point to, never affects a result, even if it holds NaN."""
    table, _, weight, start, a = (t.to(device) for t in make(2, 4, 6, (3, 0, 9), I32, I32))
    index = 1 + torch.arange(12, device=device, dtype=I32) % 3
    table[0] = torch.nan
    assert triton_kernels.bag(table, index, weight, start).isfinite().all()
    assert triton_kernels.bag_dot(a, table, index, start).isfinite().all()


def check(device: str) -> None:
    for i in range(len(CASES)):
        check_case(device, i)
    check_layouts(device)
    check_codes_of_no_segment(device)
    check_rows_not_asked_for(device)


def check_precision() -> None:
    """Sparse codes on tables in bfloat16, as the device code of a GPU computes them."""
    import test_precision  # not where it is collected

    with (
        unittest.mock.patch.object(triton_kernels, "available", lambda t: True),
        unittest.mock.patch.object(kernels, "available", lambda t: False),
    ):
        test_precision.check_tables()


@pytest.fixture
def compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> collections.abc.Callable[[int, dict[str, str]], str]:
    """Compiles kernel 0 or 1, given its arguments' types, for an H100 (no GPU needed); returns its assembly."""
    triton = pytest.importorskip("triton", minversion="3.3")  # the compiler's interface changed
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def assembly(i_kernel: int, types: dict[str, str]) -> str:
        source = ASTSource(
            triton_kernels._kernels()[i_kernel],
            {**types, "D": "i32", "ROWS": "constexpr", "BLOCK": "constexpr"},
            constexprs={(6,): triton_kernels.ROWS, (7,): 256},
            attrs={(i,): [["tt.divisibility", 16]] for i in range(6)},  # aligned, as torch's are
        )
        options = triton_kernels.OPTIONS
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]
        return compiled.asm["ptx"]

    return assembly


@pytest.mark.parametrize(
    ("table", "index", "start", "out"),
    [
        ("*fp32", "*i32", "*i32", "*fp32"),
        ("*bf16", "*i64", "*i32", "*fp32"),
        ("*fp16", "*i32", "*i64", "*bf16"),
    ],
)
def test_they_compile_for_a_gpu(compiler, table: str, index: str, start: str, out: str) -> None:
    """To machine code, without a warning; 16 bytes of a row are one load; no atomics."""
    bag = {"table": table, "index": index, "weight": "*fp32", "start": start, "out": out}
    dot = {"a": "*fp32", "table": table, "index": index, "start": start, "out": out}
    for ptx in (compiler(0, bag), compiler(1, dot)):
        assert "ld.global.v4.b32" in ptx
        assert not re.search(r"^\s*(@\S+ )?(atom|red)\.", ptx, re.MULTILINE)


def test_offsets_are_64_bit(compiler) -> None:
    """Row x D and segment x D are products of 64-bit numbers, though rows and D come as int32."""
    bag = {"table": "*fp32", "index": "*i32", "weight": "*fp32", "start": "*i32", "out": "*fp32"}
    dot = {"a": "*fp32", "table": "*fp32", "index": "*i32", "start": "*i32", "out": "*fp32"}
    for ptx in (compiler(0, bag), compiler(1, dot)):
        assert "mul.lo.s64" in ptx
        assert "mul.lo.s32" not in ptx and "mad.lo.s32" not in ptx


@pytest.mark.parametrize("n_starts", [2, 4])
def test_starts_that_do_not_fit_are_refused(n_starts: int) -> None:
    table, index, _, _, a = make(0, 4, 6, (1, 1), I32, I32)
    with pytest.raises(jaxtyping.TypeCheckError):
        triton_kernels.bag_dot(a, table, index, torch.zeros(n_starts, dtype=I32))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [384, 768, 1024, 1280])
def test_on_a_gpu_they_equal_embedding_bag(D: int) -> None:
    lengths = (32,) * 200 + (0, 5000, 1)
    table, index, weight, start, a = (t.cuda() for t in make(D, 3000, D, lengths, I64, I64))
    assert triton_kernels.available(table)
    want = torch.nn.functional.embedding_bag(
        index, table, start, mode="sum", per_sample_weights=weight, include_last_offset=True
    )
    torch.testing.assert_close(triton_kernels.bag(table, index, weight, start), want, rtol=1e-4, atol=1e-3)
    rows = a.repeat_interleave(start.diff(), dim=0)
    torch.testing.assert_close(
        triton_kernels.bag_dot(a, table, index, start), (rows * table[index]).sum(dim=1), rtol=1e-4, atol=1e-3
    )


def test_without_a_gpu_they_are_not_used() -> None:
    assert not triton_kernels.available(torch.zeros(2, 2))


def test_the_module_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import saev.nn.triton_kernels as t, saev.nn.triton_select as u; t.available; u.available"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
