"""Compiles the Triton kernels for GPUs, on a machine without one, and prints what their programs need.

    uv run python -m benchmarks.kernel_resources [--quick]

The kernels are those that TopK's and BatchTopK's steps start, with the same types and constants: launches are recorded
instead of made. Registers (per thread) and the stack (bytes per thread, spilled registers) are read from the machine
code by Triton's cuobjdump; shared memory (bytes per program) is what Triton asks for. `resident`: how many warps an SM
holds at once, of 64, as far as registers and shared memory allow.
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

from saev.nn import optim, triton_kernels, triton_select

ARCHS = {80: "A100", 90: "H100", 100: "B200"}
SHARED_KIB = {80: 164, 90: 228, 100: 228}
"""Shared memory of an SM (CUDA C++ Programming Guide, table of compute capabilities)."""
SIZES = [(16384, 32), (32768, 32), (131072, 64), (131072, 1024), (8192, 1), (5000, 4500)]
"""Latents and k."""
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


class Launch(tp.NamedTuple):
    """A kernel with the types of its arguments, which of them are multiples of 16, and its constants."""

    name: str
    types: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, tp.Any], ...]

    @property
    def label(self) -> str:
        shown = [
            f"{key}={int(value)}" for key, value in self.constants if key in ("L", "N", "IS_COUNT", "IS_UNIT")
        ]
        pointers = [kind for _, kind in self.types if kind.startswith("*f") or kind.startswith("*b")]
        return " ".join([self.name, *pointers[:1], *shown])


class Needs(tp.NamedTuple):
    """What a compiled program needs."""

    registers: int
    shared: int
    stack: int
    n_warps: int
    ptx: str

    def resident(self, arch: int) -> int:
        """Warps that an SM holds at once. A program takes 1 KiB more shared memory than it asks for."""
        n_programs = min(64, 65536 // (32 * 8 * -(-self.registers // 8))) // self.n_warps
        return self.n_warps * min(n_programs, SHARED_KIB[arch] * 1024 // (self.shared + 1024))


def kernels() -> dict[str, tp.Any]:
    from saev.nn import triton_programs

    names = ("group_max", "select", "histogram", "pick", "reach", "merge", "row_dots", "adam_rows")
    found = {name: getattr(triton_programs, name) for name in names}
    return found | dict(zip(("bag", "bag_dot"), triton_kernels._kernels(), strict=True))


def launches(S: int, k: int, dtype: torch.dtype) -> list[Launch]:
    """What `top_k`, `batch_top_k` and `Candidates` start for two rows of S pre-activations, each kernel once."""
    out: list[Launch] = []

    def record(name: str, grid: tuple[int, ...], *args: Tensor | int, **constants: tp.Any) -> None:
        kernel = kernels()[name]
        named = dict(zip(inspect.signature(kernel.fn).parameters, args, strict=False))
        types = {key: TYPES[arg.dtype] if isinstance(arg, Tensor) else "i32" for key, arg in named.items()}
        special = {key: arg for key, arg in named.items() if key not in (kernel.do_not_specialize or [])}
        constants |= {key: arg for key, arg in special.items() if type(arg) is int and arg == 1}
        aligned = [key for key, arg in special.items() if isinstance(arg, Tensor) or arg % 16 == 0]
        pairs = tuple((key, kind) for key, kind in types.items() if key not in constants)
        out.append(Launch(name, pairs, tuple(aligned), tuple(constants.items())))
        if name == "reach":  # its counts size the outputs
            for arg in args:
                if isinstance(arg, Tensor):
                    arg.zero_()

    pre_BS = torch.zeros(2, S, dtype=dtype)
    with unittest.mock.patch.object(triton_select, "launch", record):
        triton_select.top_k(pre_BS, k)
        triton_select.batch_top_k(pre_BS, 2 * k)
        candidates = triton_select.Candidates(S, pre_BS, 2 * k, capacity=3 * k)
        candidates.add(pre_BS)
        candidates.codes()
    return list(dict.fromkeys(out))


def adam(d_vit: int) -> list[Launch]:
    """Adam on both matrices."""
    tensors = [(name, "*fp32") for name in ("w", "g", "m", "v", "along", "clip")]
    rest = [("step", "fp32"), ("correction", "fp32"), ("D", "i32")]
    block = ("BLOCK", min(1024, triton_select.pow2(d_vit)))
    constants = (("BETA1", optim.BETA1), ("BETA2", optim.BETA2), ("EPS", optim.EPS), block)
    dots = [(name, "*fp32") for name in ("w", "g", "along", "square")]
    aligned = ("w", "g", "m", "v", "along", "clip", "D")
    return [
        Launch("row_dots", (*dots, rest[2]), ("w", "g", "along", "square", "D"), (block,)),
        *(
            Launch("adam_rows", (*tensors, *rest), aligned, (("IS_UNIT", is_unit), *constants))
            for is_unit in (False, True)
        ),
    ]


def bags(dtype: str) -> list[Launch]:
    """The products of sparse codes with a table of this type."""
    constants = (("ROWS", triton_kernels.ROWS), ("BLOCK", 256), *triton_kernels.OPTIONS.items())
    codes = [("table", dtype), ("index", "*i32")]
    rest = [("start", "*i32"), ("out", "*fp32"), ("D", "i32")]
    names = ("a", "table", "index", "weight", "start", "out", "D")
    bag = Launch("bag", (*codes, ("weight", "*fp32"), *rest), names[1:], constants)
    return [bag, Launch("bag_dot", (("a", "*fp32"), *codes, *rest), names[:3] + names[4:], constants)]


def compiled(launch: Launch, arch: int) -> Needs:
    """Compiles a kernel to machine code of an architecture (90: sm_90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernels()[launch.name]
    names = [*inspect.signature(kernel.fn).parameters]
    constants = {key: value for key, value in launch.constants if key in names}
    options = {key: value for key, value in launch.constants if key not in names}
    source = ASTSource(
        kernel,
        {name: dict(launch.types).get(name, "constexpr") for name in names},
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(names.index(key),): [["tt.divisibility", 16]] for key in launch.aligned},
    )
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        text = subprocess.check_output([cuobjdump, "-res-usage", file.name], text=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    stack = found["STACK"] + found["LOCAL"]
    return Needs(found["REG"], done.metadata.shared, stack, done.metadata.num_warps, done.asm["ptx"])


def cases(sizes: list[tuple[int, int]]) -> collections.abc.Iterator[Launch]:
    """The distinct kernels of these sizes, for float32 and bfloat16."""
    wanted: dict[tuple[tp.Any, ...], Launch] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for launch in (*bags(TYPES[dtype]), *(x for S, k in sizes for x in launches(S, k, dtype))):
            wanted.setdefault(launch, launch)
    yield from (*wanted.values(), *adam(1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size and one GPU")
    args = parser.parse_args()
    print(f"{'GPU':6}{'kernel':36}{'registers':>10}{'shared':>8}{'stack':>6}{'warps':>6}{'resident':>9}")
    for launch in cases(SIZES[1:2] if args.quick else SIZES):
        for arch in [90] if args.quick else ARCHS:
            needs = compiled(launch, arch)
            row = f"{needs.registers:10}{needs.shared:8}{needs.stack:6}{needs.n_warps:6}{needs.resident(arch):9}"
            print(f"{ARCHS[arch]:6}{launch.label:36}{row}", flush=True)


if __name__ == "__main__":
    main()
