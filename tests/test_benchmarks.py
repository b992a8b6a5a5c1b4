"""Benchmarks are run by hand, so a test looks for names of saev that they use and that are gone."""

import ast
import importlib
import pathlib
import types

import pytest

FPATHS = sorted((pathlib.Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("fpath", FPATHS, ids=lambda fpath: fpath.stem)
def test_the_names_that_a_benchmark_uses_exist(fpath: pathlib.Path) -> None:
    names = vars(importlib.import_module(f"benchmarks.{fpath.stem}".removesuffix(".__init__")))
    gone = []
    for node in ast.walk(ast.parse(fpath.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            is_ours = isinstance(module, types.ModuleType) and module.__name__.startswith(
                ("saev", "benchmarks")
            )
            if is_ours and not hasattr(module, node.attr):
                gone.append(f"line {node.lineno}: {node.value.id}.{node.attr}")
    assert gone == []
