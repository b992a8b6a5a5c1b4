"""Benchmarks are run by hand, so tests look for names of saev that are gone, and run what a GPU would be asked."""

import ast
import importlib
import json
import pathlib
import sys
import types

import forked
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FPATHS = sorted((ROOT / "benchmarks").glob("*.py"))


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


def test_a_case_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """benchmarks.gpu prints every case, and ends with 1 if one failed or was not run."""
    from benchmarks import gpu

    def fails() -> dict[str, object]:
        raise RuntimeError("out of\nmemory")

    def section(_: object) -> gpu.Cases:
        yield "first", fails
        yield "second", lambda: {"ratio": 1.5, "reference": "a product"}

    monkeypatch.setattr(gpu, "SECTIONS", {"a": section})
    fpath = tmp_path / "cases.jsonl"
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--json", str(fpath)])
    assert gpu.main() == 1
    shown = capsys.readouterr().out
    assert "(a) first" in shown and "FAILED memory" in shown and "1 of 2 cases" in shown
    first, second = map(json.loads, fpath.read_text().splitlines())
    assert first["error"] == "RuntimeError: out of\nmemory" and second["ratio"] == 1.5
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--minutes", "0"])
    assert gpu.main() == 1 and capsys.readouterr().out.count("FAILED not run: --minutes are over") == 2


@pytest.mark.slow
def test_cases_of_a_gpu_run_on_a_cpu() -> None:
    """At toy sizes: many SAEs on one stream."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--device", "cpu", "--only", "d"]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "CPU: 6 of 6 cases" in done.stdout, done.stdout + done.stderr
