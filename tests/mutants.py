"""Mutation testing: changes one operator, constant, condition or call of the package at a time, and runs its tests.

A mutant that no test notices (a survivor) is a behaviour without a test, or a change without effect. The sample depends on
the seed and on the source alone, so that two versions of the tests can be compared:

    uv run python tests/mutants.py --n 40
"""

import argparse
import ast
import collections.abc
import concurrent.futures
import copy
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
TESTED = {
    "saev/formats/shards.py": "test_formats_shards test_data_verify test_shards_flips",
    "saev/formats/jsonfile.py": "test_formats_jsonfile",
    "saev/formats/checkpoint.py": "test_formats_checkpoint test_nn_sae",
    "saev/formats/metricslog.py": "test_formats_metricslog",
    "saev/formats/space.py": "test_space test_nn_sae",
    "saev/protoeval/ap.py": "test_protoeval_ap",
    "saev/data/cub.py": "test_data_cub test_protoeval_check",
    "saev/data/traits/split.py": "test_traits",
    "saev/data/traits/table.py": "test_traits",
    "saev/protoeval/check.py": "test_protoeval_check test_traits",
    "saev/nn/kernels.py": "test_nn_sparse test_nn_sae",
    "saev/launch/__init__.py": "test_launch",
    "saev/launch/local.py": "test_launch",
    "saev/launch/slurm.py": "test_launch test_slurm test_slurm_commands test_slurm_stages",
    "saev/launch/submissions.py": "test_slurm test_slurm_commands",
}
"""Module -> names of its test files."""
SWAPS: dict[type, type] = {
    **{
        ast.Lt: ast.LtE,
        ast.LtE: ast.Lt,
        ast.Gt: ast.GtE,
        ast.GtE: ast.Gt,
        ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq,
    },
    **{
        ast.Is: ast.IsNot,
        ast.IsNot: ast.Is,
        ast.In: ast.NotIn,
        ast.NotIn: ast.In,
        ast.And: ast.Or,
        ast.Or: ast.And,
    },
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult},
}


def mutations(
    tree: ast.Module,
) -> collections.abc.Iterator[tuple[ast.AST, collections.abc.Callable[[], str]]]:
    """Places of a module that can be mutated, and the functions that mutate them (each returns what it did)."""
    for node in code(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, lambda n=node: swap(n.ops, 0)
        elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in SWAPS:
            yield node, lambda n=node: swap(vars(n), "op")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, lambda n=node: change(n, "op", ast.UAdd())
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, lambda n=node: change(n, "value", not n.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node, lambda n=node: change(n, "value", n.value + 1)
        elif isinstance(node, ast.If | ast.IfExp):
            yield node, lambda n=node: change(n, "test", ast.Constant(False))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, lambda n=node: change(n, "value", ast.Constant(None))


def code(node: ast.AST) -> collections.abc.Iterator[ast.AST]:
    """The nodes below that are executed: no annotations, decorators, docstrings, and no text of messages."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or isinstance(
            value, ast.JoinedStr | ast.Raise
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr | ast.Raise | ast.Assert):
                yield child
                yield from code(child)


def swap(holder, key) -> str:
    old, holder[key] = holder[key], SWAPS[type(holder[key])]()
    return f"{type(old).__name__} -> {type(holder[key]).__name__}"


def change(node: ast.AST, name: str, new: object) -> str:
    old = getattr(node, name)
    setattr(node, name, new)
    words = (
        ast.unparse(x) if isinstance(x, ast.expr) else type(x).__name__ if isinstance(x, ast.AST) else repr(x)
        for x in (old, new)
    )
    return " -> ".join(words)


def sample(module: str, n: int, seed: int) -> list[tuple[str, str]]:
    """Up to n mutants of a module: (line and change, source)."""
    tree = ast.parse((ROOT / module).read_text())
    n_places = len([*mutations(tree)])
    out = []
    for i in sorted(random.Random(f"{module} {seed}").sample(range(n_places), min(n, n_places))):
        mutant = copy.deepcopy(tree)
        node, mutate = [*mutations(mutant)][i]
        out.append((f"{module}:{node.lineno} {mutate()}", ast.unparse(mutant)))
    return out


def survives(job: tuple[str, str]) -> bool:
    """Whether the tests of a mutant pass. It lies in a copy of the repository."""
    what, source = job
    module = what.split(":")[0]
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        for folder in ("saev", "tests"):
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for fpath in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(fpath, root)
        (root / module).write_text(source)
        command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", f"--basetemp={root}/tmp"]
        command += [f"tests/{test}.py" for test in TESTED[module].split()]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            done = subprocess.run(command, cwd=root, timeout=600, **quiet)
        except subprocess.TimeoutExpired:  # it loops for ever
            return False
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", default=[*TESTED], help=" ".join(TESTED))
    args = parser.parse_args()
    jobs = [job for module in args.modules for job in sample(module, args.n, args.seed)]
    start, survivors = time.time(), 0
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": cache}
        for (what, _), alive in zip(jobs, pool.map(survives, jobs), strict=True):
            survivors += alive
            if alive:
                print(f"survived  {what}", flush=True)
    print(f"{survivors} of {len(jobs)} mutants survived ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    main()
