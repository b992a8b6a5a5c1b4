"""The Triton kernels against plain loops: in Triton's interpreter without a GPU, compiled with one."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from saev.nn import triton_kernels

ROOT = pathlib.Path(__file__).parent.parent

CASES = [
    # rows R, width D, codes of each output row, index dtype, table dtype
    (5, 16, (2, 0, 3), torch.int32, torch.float32),
    (7, 7, (0, 0, 1), torch.int64, torch.float32),
    (9, 384, (32, 1, 9, 8), torch.int32, torch.float32),
    (3, 300, (100, 0), torch.int64, torch.bfloat16),
    (4, 20, (0, 0), torch.int32, torch.float16),
]


def check(device: str) -> None:
    """Asserts both kernels on all cases."""
    for i, (R, D, lengths, index_dtype, dtype) in enumerate(CASES):
        generator = torch.Generator().manual_seed(i)
        n = sum(lengths)
        start = torch.tensor([sum(lengths[:o]) for o in range(len(lengths) + 1)]).int()
        index = torch.randint(R, (n,), generator=generator).to(index_dtype)
        weight = torch.randn(n, generator=generator)
        table = torch.randn(R, D, generator=generator).to(dtype)
        a = torch.randn(len(lengths), D, generator=generator)
        want_bag, want_dot = by_loops(table, index, weight, start, a)
        on = [t.to(device) for t in (table, index, weight, start, a)]
        for _ in range(2):
            got = triton_kernels.bag(*on[:4])
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.cpu().double(), want_bag, rtol=1e-4, atol=1e-4)
            got_dot = triton_kernels.bag_dot(on[4], on[0], on[1], on[3])
            torch.testing.assert_close(got_dot.cpu().double(), want_dot, rtol=1e-4, atol=1e-4)
            assert torch.equal(got, triton_kernels.bag(*on[:4])), "the same bits each time"


def by_loops(
    table: Tensor, index: Tensor, weight: Tensor, start: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    table, weight, a = table.double(), weight.double(), a.double()
    bag = torch.zeros(len(a), table.shape[1], dtype=torch.float64)
    dot = torch.zeros(len(index), dtype=torch.float64)
    for o in range(len(a)):
        for j in range(start[o], start[o + 1]):
            bag[o] += weight[j] * table[index[j]]
            dot[j] = a[o] @ table[index[j]]
    return bag, dot


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    code = "import sys; sys.path.insert(0, 'tests'); import test_nn_triton as t; t.check('cpu')"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    check("cuda")


def test_without_a_gpu_they_are_not_used() -> None:
    assert not triton_kernels.available(torch.zeros(2, 2))
