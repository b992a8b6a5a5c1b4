"""What a user's shell may do to a command: Ctrl-C while it starts, closed streams, pipes that end, odd terminals and folders."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = [
    "-m saev.data",
    "-m saev.data.verify",
    "train.py",
    "-m saev.training.report",
    "visuals.py",
    "-m saev.codes",
    "protoeval.py",
    "-m saev.compat",
    "-m saev.compare",
    "-m saev.demo",
    "-m saev.jobs",
    "-m saev.labels",
]
OTHERS = ["-m saev"]


def shell(line: str, cwd: pathlib.Path = ROOT, **env: str | None) -> subprocess.CompletedProcess[bytes]:
    """Runs a line of shell in which PY stands for this Python."""
    set_ = {k: v for k, v in {**os.environ, "PYTHONPATH": str(ROOT), **env}.items() if v is not None}
    line = line.replace("PY", shlex.quote(sys.executable))
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=set_, capture_output=True, timeout=120)


@pytest.mark.parametrize(
    ("command", "delay_s"),
    list(zip(COMMANDS, (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0, 0.1, 0.2, 0.3, 0.4), strict=True)),
)
def test_ctrl_c_while_a_command_starts(command: str, delay_s: float) -> None:
    """A real SIGINT, from the moment that our first module is there (before, Python itself answers)."""
    args = [sys.executable, "-X", "importtime", *command.split(), "--nonsense"]
    with subprocess.Popen(args, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.rstrip().endswith(" saev.early"))
        time.sleep(0.01 + delay_s)
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    interrupted = ["interrupted; run the same command again to continue.\n"]
    if process.returncode == 130 or rest == interrupted:
        # Python turns 130 into the signal, which a shell shows as 130, where the signal came in an exec of a string (dataclasses)
        assert rest == interrupted and process.returncode in (130, -signal.SIGINT)
    else:  # it was faster
        assert process.returncode in (2, -signal.SIGINT)
        assert len(rest) == 1 and rest[0].startswith("error: ")


INTERNAL = ("saev.mirror",)
"""Run by saev, not by people."""


def test_every_command_is_tried() -> None:
    found = [f for f in ROOT.glob("saev/**/*.py") if '__name__ == "__main__"' in f.read_text()]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in found]
    modules = {f"-m {name.removesuffix('.__main__')}" for name in names if name not in INTERNAL}
    assert modules | {f.name for f in ROOT.glob("*.py")} == {*COMMANDS, *OTHERS}


@pytest.mark.parametrize("command", [*COMMANDS, *OTHERS])
def test_help_into_a_pipe_that_ends(command: str) -> None:
    """One that reads a line, and one that is closed before anything is printed."""
    done = shell(f"PY {command} --help | head -1; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.startswith(b"usage: ") and done.stdout.splitlines()[1:] == [b"0"]
    assert done.stderr == b""
    done = shell(f"(sleep 0.1; PY {command} --help) | exec 0<&-; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == (b"0\n", b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str, tmp_path: pathlib.Path) -> None:
    """Files that are opened later do not get their numbers, so nothing is printed into them."""
    assert shell(f"PY train.py --dry-run {closed}").returncode == 0
    code = f"""
import os, subprocess, sys
from saev import early
early.install()
print("lost"), print("lost", file=sys.stderr)
child = "import os; print(os.open(os.devnull, 0), file=open({str(tmp_path / "child")!r}, 'w'))"
subprocess.run([sys.executable, "-c", child], check=True)
with open({str(tmp_path / "mine")!r}, "w") as fd:
    print(fd.fileno(), file=fd)
"""
    assert shell(f"PY -c {shlex.quote(code)} {closed}").returncode == 0
    assert int((tmp_path / "mine").read_text()) > 2 and int((tmp_path / "child").read_text()) > 2


def test_no_search_for_garbage_at_the_end() -> None:
    code = "from saev import early; early.install(); print('end')\n"
    code += "class Loud:\n def __del__(self): print('searched')\nloud = Loud(); loud.itself = loud"
    assert shell(f"PY -c {shlex.quote(code)}").stdout == b"end\n"


IMPORTS = """
import gc, weakref
from saev import early
class Loop: pass
def loop():
    loop = Loop()
    loop.itself = loop
    return weakref.ref(loop)
if not {is_on}: gc.disable()
before = loop()
with early.importing():
    assert not gc.isenabled() and before() is None, "garbage of an earlier stage is freed"
    inside, n = Loop(), gc.get_freeze_count()
assert gc.get_freeze_count() > n and not any(o is inside for o in gc.get_objects()), "is searched no more"
after = loop()
gc.collect()
assert gc.isenabled() == {is_on} and after() is None
"""


@pytest.mark.parametrize("is_on", [True, False])
def test_no_search_for_garbage_during_imports(is_on: bool) -> None:
    code = IMPORTS.replace("{is_on}", str(is_on))
    done = shell(f"PY -c {shlex.quote(code)}")
    assert done.returncode == 0, done.stderr


def test_a_full_disk_behind_the_output() -> None:
    for command, where in (("train.py --help", b""), ("train.py --dry-run", b"standard output: ")):
        done = shell(f"PY {command} > /dev/full")
        assert done.returncode == 2
        assert done.stderr.startswith(b"error: " + where + b"No space left on device.")
        assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {}])
def test_names_that_the_terminal_cannot_show(env: dict[str, str]) -> None:
    """A path comes out as it went in, so that a script can use it."""
    done = shell("PY train.py --dry-run --ckpt-to $'a\\xff\\xc3\\xa9'", **env)
    assert done.returncode == 0 and done.stderr == b""
    assert b"ckpt_to = 'a" in done.stdout
    code = "from saev import launch; launch.entry(lambda: print('a\\udcff\\u00e9\\ud83d'))"
    printed = shell(f'PY -c "{code}"', **env).stdout
    assert printed == b"a\xff\xc3\xa9\\ud83d\n"


@pytest.mark.parametrize("command", ["visuals.py", "-m saev.data"])
def test_odd_surroundings(command: str, tmp_path: pathlib.Path) -> None:
    """No home folder, no folder for temporary files; no working directory any more."""
    program = command if command.startswith("-m") else str(ROOT / command)
    env = {"HOME": None, "TMPDIR": "/nowhere", "TMP": None, "USER": None}
    done = shell(f"PY {program} --help", tmp_path, **env)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"usage: ")
    done = shell(f"mkdir x; cd x; rmdir ../x; PY {program} --help", tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: the working folder has been removed. Change to another one.\n"
