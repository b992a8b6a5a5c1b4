"""The GPU's programs in Triton's interpreter: the checks of test_nn_triton, _adam and _select, in one process."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
CHECKS = {
    "sums of rows": "test_nn_triton.check('cpu')",
    "tables in bfloat16": "test_nn_triton.check_precision()",
    "Adam": "test_nn_triton_adam.check('cpu')",
    "selection": "test_nn_triton_select.check('cpu')",
    "searches": "test_nn_triton_select.check_search()",
}
RUN = """
import sys, traceback
sys.path[:0] = ['.', 'tests']
import test_nn_triton, test_nn_triton_adam, test_nn_triton_select
for name, check in %r.items():
    try:
        exec(check)
        print('passed', name)
    except BaseException:
        print(name, file=sys.stderr)
        traceback.print_exc()
"""


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess:
    """In a separate process, because Triton chooses its interpreter at import."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", RUN % CHECKS], cwd=ROOT, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(done: subprocess.CompletedProcess, name: str) -> None:
    assert done.returncode == 0 and f"passed {name}\n" in done.stdout, done.stderr
