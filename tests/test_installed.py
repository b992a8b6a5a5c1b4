"""saev from a wheel, in an environment of its own, far from the repository."""

import collections.abc
import pathlib
import subprocess
import sys
import sysconfig

import pytest

import saev
from saev import commands

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
Run = collections.abc.Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of a new environment in an empty folder. What saev needs is borrowed from this one."""
    root = tmp_path_factory.mktemp("installed")
    (root / "empty").mkdir()

    def call(*args: object) -> subprocess.CompletedProcess[str]:
        words = [str(arg) for arg in args]
        return subprocess.run(words, cwd=root / "empty", capture_output=True, text=True)

    def must(*args: object) -> None:
        done = call(*args)
        assert done.returncode == 0, done.stderr

    must("uv", "build", "--wheel", "--out-dir", root / "dist", ROOT)
    must("uv", "venv", "--python", sys.executable, root / "venv")
    (wheel,) = (root / "dist").glob("*.whl")
    python = root / "venv" / "bin" / "python"
    must("uv", "pip", "install", "--no-deps", "--python", python, wheel)
    (site,) = (root / "venv").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return lambda program, *args: call(root / "venv" / "bin" / program, *args)


def test_it_is_the_installed_package_and_typed(run: Run) -> None:
    code = "import pathlib, saev; root = pathlib.Path(saev.__file__).parent\n"
    code += "assert (root / 'py.typed').exists(); print(root)\n"
    code += "assert len([*(root / 'visuals/page').rglob('*.js')]) == 12, 'the page of the gallery'"
    found = pathlib.Path(run("python", "-c", code).stdout.strip())
    assert "installed" in str(found) and ROOT not in found.parents


USER = """
import typing as tp
import numpy as np
import saev
import saev.nn
from saev.scorers import laod

tp.assert_type(saev.nn.load("sae.pt"), saev.nn.SparseAutoencoder)
tp.assert_type(saev.protoeval.average_precision(np.eye(2), np.eye(2)), np.ndarray)
saev.nn.load(3)
saev.data.Indexd("shards", layer=11)
saev.scorers.load("scorer.bin").prefix("5")
"""
MISTAKES = [
    (6, "Could not import `laod` from `saev.scorers` [missing-module-attribute]"),
    (10, "Argument `Literal[3]` is not assignable to parameter `fpath`"),
    (11, "No attribute `Indexd` in module `saev.data` [missing-attribute]"),
    (12, "Argument `Literal['5']` is not assignable to parameter `k` with type `int`"),
]


def test_a_type_checker_knows_the_public_names(run: Run, tmp_path: pathlib.Path) -> None:
    """And says what is wrong with a notebook, from the installed package alone."""
    (tmp_path / "user.py").write_text(USER)
    python = run("python", "-c", "import sys; print(sys.executable)").stdout.strip()
    checker = pathlib.Path(sysconfig.get_path("scripts")) / "pyrefly"
    options = ["--preset=default", "--output-format=min-text", "--python-interpreter-path", python]
    done = subprocess.run(
        [checker, "check", *options, "user.py"], cwd=tmp_path, capture_output=True, text=True
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("ERROR user.py:")]
    assert done.returncode == 1 and len(said) == len(MISTAKES), done.stdout
    for line, (number, what) in zip(said, MISTAKES, strict=True):
        assert line.startswith(f"ERROR user.py:{number}:") and what in line, done.stdout


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help(run: Run, command: str) -> None:
    done = run("saev", command, "--help")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")


def test_without_a_command_and_with_a_wrong_one(run: Run) -> None:
    for args in ([], ["--help"]):
        assert all(name in run("saev", *args).stdout for name in commands.COMMANDS)
    assert run("saev", "--version").stdout == f"{saev.__version__}\n"
    done = run("saev", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: saev trian: no such command. Commands: data, verify, ")


def test_a_command_reads_its_flags(run: Run) -> None:
    done = run("saev", "train", "--dry-run", "--data.layer", "7", "sae:top-k")
    assert done.returncode == 0 and "layer = 7" in done.stdout and "sae: TopK" in done.stdout
