"""Imports go down only: DESIGN's floors, read from the source with ast."""

import ast
import functools
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent

FLOORS = {
    "saev": 5.0,  # the lazy package: nothing inside imports it
    "saev.errors": 0.0,
    "saev.helpers": 0.1,
    "saev.early": 0.0,
    "saev.lazy": 0.0,
    "saev.machine": 0.0,
    "saev.console": 0.25,
    "saev.fields": 0.25,
    "saev.formats": 0.5,
    "saev.cli": 0.75,
    "saev.provenance": 0.75,
    "saev.report": 1.0,
    "saev.launch": 1.0,
    "saev.sweeps": 1.0,
    "saev.tracking": 1.0,
    "saev.mirror": 1.0,
    "saev.compiled": 1.0,
    "saev.devices": 1.0,
    "saev.compat.checks": 1.0,
    "saev.compat.upstream": 1.5,
    "saev.nn": 2.0,
    "saev.data": 2.0,
    "saev.compat": 2.25,
    "saev.scorers": 2.5,
    "saev.codes": 3.0,
    "saev.training": 3.0,
    "saev.visuals": 3.0,
    "saev.protoeval": 3.0,
    "saev.labels": 3.0,
    "saev.compare": 3.0,
    "saev.commands": 3.5,  # imports the stages by name, when one is run
    "saev.jobs": 4.0,
    "saev.demo": 4.0,
    "train": 4.0,
    "visuals": 4.0,
    "protoeval": 4.0,
}
"""A package imports from lower floors and from itself; two packages of one floor do not know each other."""

HEAVY = {
    "torch",
    "numpy",
    "polars",
    "sklearn",
    "scipy",
    "PIL",
    "timm",
    "open_clip",
    "matplotlib",
    "submitit",
    "wandb",
}
"""Not to be waited for by --help, --dry-run and submission."""


def package(module: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    return max((p for p in FLOORS if module == p or module.startswith(f"{p}.")), key=len)


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    fpaths = [*ROOT.glob("saev/**/*.py"), *ROOT.glob("*.py")]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in fpaths]
    return dict(zip(names, fpaths, strict=True))


@functools.cache
def imports(source: str, top_level_only: bool = False) -> frozenset[str]:
    """Dotted names that a source imports; `from a import b` counts as a.b."""
    tree = ast.parse(source)
    out: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(out)


def upward(module: str, source: str) -> list[str]:
    """Imports of saev that do not go down."""
    mine = package(module)
    found = {name: package(name) for name in imports(source) if name.split(".")[0] == "saev"}
    return [name for name, theirs in found.items() if theirs != mine and FLOORS[theirs] >= FLOORS[mine]]


@pytest.mark.parametrize("module", modules())
def test_imports_go_down_only(module: str) -> None:
    # like root scripts, although they lie in packages
    packages = ("data", "compat", "labels", "codes", "compare")
    entry_points = {f"saev.{name}.__main__": "train" for name in packages}
    source = modules()[module].read_text()
    assert upward(entry_points.get(module, module), source) == []


def test_an_upward_import_is_caught() -> None:
    assert upward("saev.nn.sae", "from saev.data import activations") == ["saev.data.activations"]
    assert upward("saev.training.loop", "import saev.visuals.write") == ["saev.visuals.write"]
    assert upward("saev.launch", "from saev import nn") == ["saev.nn"]
    assert upward("saev.scorers.sae", "from saev import nn\nfrom saev.scorers import base") == []


def test_no_modules_import_one_another() -> None:
    """At module level; `from a import b` imports a.b, or a if b is in it."""
    names = {m: imports(fpath.read_text(), top_level_only=True) for m, fpath in modules().items()}
    graph = {
        m: {n if n in names else n.rpartition(".")[0] for n in found} & {*names} for m, found in names.items()
    }
    assert len([*graphlib.TopologicalSorter(graph).static_order()]) == len(names)
    graph["saev.errors"] = {"saev.helpers"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "module",
    [
        m
        for m in modules()
        if m.endswith((".config", ".cli", "__main__")) or "." not in m or m == "saev.training.report"
    ],
)
def test_configs_and_commands_import_nothing_heavy(module: str) -> None:
    """At module level, and through whatever of saev they import."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        seen.add(name)
        for imported in imports(modules()[name].read_text(), top_level_only=True):
            assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported}"
            parts = imported.split(".")
            known = [
                ".".join(parts[:i]) for i in range(1, len(parts) + 1) if ".".join(parts[:i]) in modules()
            ]
            todo += [m for m in known if m not in seen]


def test_an_ignored_type_error_has_its_kind_and_a_reason() -> None:
    """Nothing is ignored for a whole file or in all of its kinds; pyrefly reports ignores that are not needed."""
    lines = [line for fpath in modules().values() for line in fpath.read_text().splitlines()]
    found = [line for line in lines if re.search(r"pyrefly:|type: *ignore|@tp.no_type_check", line)]
    allowed = r".*# pyrefly: ignore\[[a-z-]+\]  # \w.*"
    assert found and [line for line in found if not re.fullmatch(allowed, line)] == []


def test_results_travel_as_frames() -> None:
    """No function of the package takes or returns rows as a list of dicts."""
    found = [name for name, fpath in modules().items() if "list[dict" in fpath.read_text()]
    assert found == []
