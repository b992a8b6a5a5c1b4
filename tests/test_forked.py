"""Forks are what new Pythons would be."""

import os
import pathlib
import signal
import subprocess
import sys

import forked
import pytest

KERNEL = """
import numba

@numba.njit(cache=True)
def total(x_N):
    out = 0.0
    for x in x_N:
        out += x ** 3
    return out
"""
CALL = """
import made_up, numpy as np
made_up.total(np.ones(5))
print(sum(made_up.total.stats.cache_misses.values()), sum(made_up.total.stats.cache_hits.values()))
"""


@pytest.fixture
def env(tmp_path: pathlib.Path) -> dict[str, str]:
    """With a folder of modules that this process does not have."""
    (tmp_path / "made_up.py").write_text(KERNEL)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


def test_a_kernel_is_compiled_by_one_of_several_processes(env: dict[str, str]) -> None:
    command = [sys.executable, "-c", CALL]
    running = [forked.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(process.communicate(timeout=60)[0].split() for process in running)
    assert said == [["0", "1"], ["0", "1"], ["1", "0"]]  # compiled, read from the disk


def test_ctrl_c_ends_a_fork_and_not_its_server() -> None:
    code = "import time; print('here', flush=True)\nwhile True: time.sleep(0.1)"
    command = [sys.executable, "-c", code]  # a signal just before a long sleep would be seen only after it
    process = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    server = int(pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (server, process.pid):
        os.kill(pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and stderr.endswith("KeyboardInterrupt\n")
    assert forked.run([sys.executable, "-c", "print(1)"], capture_output=True, text=True).stdout == "1\n"


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code(code: int) -> None:
    assert forked.run([sys.executable, "-c", f"import sys; sys.exit({code})"]).returncode == code


def test_a_fork_ends_by_a_signal() -> None:
    done = forked.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"])
    assert done.returncode == -signal.SIGTERM
