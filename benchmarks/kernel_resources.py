"""Compiles the Triton kernels for GPUs, on a machine without one, and prints what each program needs.

    uv run python -m benchmarks.kernel_resources [--quick]

The kernels are those that a TopK and a BatchTopK step start, with the same argument types and constants: launches are
recorded instead of made. Registers and the stack (spilled registers) are read from the machine code by Triton's
cuobjdump; shared memory is what Triton asks for. `warps` is how many an SM can hold at once, of 64, as far as registers
(65,536) and shared memory (`SHARED_KIB`) allow.
"""

import argparse
import collections.abc
import inspect
import pathlib
import re
import subprocess
import tempfile
import typing as tp
import unittest.mock

import torch
from torch import Tensor

from saev.nn import triton_select

ARCHS = (80, 90, 100)
"""A100, H100, B200."""
SHARED_KIB = {80: 164, 90: 228, 100: 228}
"""Shared memory of an SM (CUDA C++ Programming Guide, compute capabilities)."""
SIZES = [(16384, 32), (32768, 32), (131072, 64), (131072, 1024), (2000, 500)]
"""Latents and k."""
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(tp.NamedTuple):
    """A kernel, the types of its arguments, which of them are multiples of 16, and its constants."""

    name: str
    types: tuple[tuple[str, str], ...]
    aligned: tuple[int, ...]
    constants: tuple[tuple[str, tp.Any], ...]


class Needs(tp.NamedTuple):
    registers: int
    """Per thread."""
    shared: int
    """Bytes of shared memory of a program."""
    stack: int
    """Bytes of a thread's stack: spilled registers, which go through memory."""
    n_warps: int
    ptx: str

    def resident(self, arch: int) -> int:
        """Warps that an SM can hold at once."""
        by_registers = 65536 // (32 * -(-self.registers // 8) * 8)
        n_programs = min(64, by_registers) // self.n_warps
        if self.shared:
            n_programs = min(n_programs, SHARED_KIB[arch] * 1024 // (self.shared + 1024))
        return n_programs * self.n_warps


def launches(S: int, k: int, dtype: torch.dtype) -> list[Launch]:
    """What `top_k` and `batch_top_k` start for two rows."""
    out: list[Launch] = []

    def record(name: str, grid: tuple[int, ...], *args: Tensor | int, **constants: int) -> None:
        from saev.nn import triton_programs

        names = [*inspect.signature(getattr(triton_programs, name).fn).parameters]
        types = [TYPES[arg.dtype] if isinstance(arg, Tensor) else "i32" for arg in args]
        aligned = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) or arg % 16 == 0]
        pairs = tuple(zip(names, types, strict=False))
        out.append(Launch(name, pairs, tuple(aligned), tuple(constants.items())))
        for arg in args:  # counts, which size the outputs
            if isinstance(arg, Tensor) and name == "reach":
                arg.zero_()

    pre_BS = torch.zeros(2, S, dtype=dtype)
    with unittest.mock.patch.object(triton_select, "launch", record):
        triton_select.top_k(pre_BS, k)
        triton_select.batch_top_k(pre_BS, 2 * k)
    return list(dict.fromkeys(out))


def compiled(launch: Launch, arch: int) -> Needs:
    """Compiles a kernel to machine code."""
    from saev.nn import triton_programs

    return compile_kernel(getattr(triton_programs, launch.name), launch, arch)


def compile_kernel(kernel: tp.Any, launch: Launch, arch: int) -> Needs:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [*inspect.signature(kernel.fn).parameters]
    constants = dict(launch.constants)
    options = {key: constants.pop(key) for key in [*constants] if key not in names}
    source = ASTSource(
        kernel,
        {**dict(launch.types), **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        text = subprocess.check_output([cuobjdump, "-res-usage", file.name], text=True)
    found = {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    stack = found["STACK"] + found["LOCAL"]
    return Needs(found["REG"], done.metadata.shared, stack, done.metadata.num_warps, done.asm["ptx"])


def cases(quick: bool = False) -> collections.abc.Iterator[tuple[int, str, Needs]]:
    """Architecture, kernel with its constants, needs."""
    sizes = SIZES[1:2] if quick else SIZES
    dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16]
    wanted = dict.fromkeys(x for S, k in sizes for dtype in dtypes for x in launches(S, k, dtype))
    by_arch = ARCHS[1:2] if quick else ARCHS
    seen: set[tuple[object, ...]] = set()
    for launch in wanted:
        for arch in by_arch:
            key = (launch, arch)
            if key not in seen:
                seen.add(key)
                constants = " ".join(
                    f"{k}={int(v)}" for k, v in launch.constants if k in ("L", "N", "IS_COUNT")
                )
                yield arch, f"{launch.name} {dict(launch.types)} {constants}", compiled(launch, arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size and one GPU")
    args = parser.parse_args()
    for arch, name, needs in cases(args.quick):
        print(arch, name, needs._replace(ptx=""), needs.resident(arch), flush=True)


if __name__ == "__main__":
    main()
