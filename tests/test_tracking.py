"""metrics.jsonl is the record; what wandb does wrong is one line and decides nothing."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from saev import errors, tracking
from saev.formats import metricslog

ROOT = pathlib.Path(__file__).parent.parent
KEY = "a" * 40


def test_json_lines_are_on_disk_at_once(tmp_path: pathlib.Path) -> None:
    """A killed run keeps what it logged."""
    tracker = tracking.start(tmp_path / "run", wandb_project="")
    assert isinstance(tracker, tracking.JsonLines) and isinstance(tracker, tracking.Tracker)
    tracker.log(0, {"mse": 0.5, "l0": 3})
    tracker.log(50, {"mse": 0.25})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [metricslog.parse(line) for line in lines] == [
        {"step": 0, "mse": 0.5, "l0": 3},
        {"step": 50, "mse": 0.25},
    ]
    tracker.finish()


def run(
    code: str, home: pathlib.Path, env: dict[str, str], path: pathlib.Path | None = None
) -> subprocess.CompletedProcess[str]:
    """In a process that has `home` and `env` only, and nothing to answer a prompt with. path: modules found first."""
    paths = [str(p) for p in (path, ROOT) if p]
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": ":".join(paths), **env},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


MODES = {
    "nobody logged in": ({}, "", "offline"),
    "key in the environment": ({"WANDB_API_KEY": KEY}, "", "online"),
    "key in netrc": ({}, ".netrc", "online"),
    "key in another netrc": ({"NETRC": "~/elsewhere"}, "elsewhere", "online"),
    "key of another server": ({"WANDB_BASE_URL": "http://localhost:9"}, ".netrc", "offline"),
    "told to stay offline": ({"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "", "offline"),
    "told to go online": ({"WANDB_MODE": "online"}, "", "online"),
    "told to be quiet": ({"WANDB_MODE": "disabled"}, ".netrc", "disabled"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MODES)
def test_wandb_mode(case: str, tmp_path: pathlib.Path) -> None:
    env, netrc, mode = MODES[case]
    if netrc:
        fpath = tmp_path / netrc
        fpath.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
        fpath.chmod(0o600)
    done = run("from saev import mirror; print(mirror.wandb_mode())", tmp_path, env)
    assert (done.stdout, done.stderr) == (f"{mode}\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bad", "gone", "."])
def test_a_netrc_that_cannot_be_read_is_no_key(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / "bad").write_text("machina api.wandb.ai")
    done = run("from saev import mirror; print(mirror.wandb_mode())", tmp_path, {"NETRC": f"~/{name}"})
    assert (done.stdout, done.stderr) == ("offline\n", "")


# ---- what wandb does wrong ----

FAKE = """
import atexit, os, pathlib, sys, time, types
wrong = os.environ["WRONG"]
class MailboxClosedError(BaseException): pass
def go_wrong(where):
    at, _, how = wrong.partition(" ")
    if at != where: return
    if how == "raises": raise MailboxClosedError("closed\\nsecond line")
    if how == "exits": sys.exit(1)
    if how == "hangs": time.sleep(1000)
    if how == "dies": os.kill(os.getpid(), 9)
    if how == "prints": os.write(1, b"noise"); os.write(2, b"noise")
go_wrong("import")
Error = Exception
Settings = dict
def note(*what):
    with open("calls", "a") as fd: print(*what, file=fd)
class Run:
    def log(self, metrics, step):
        go_wrong("log"); note("log", step, metrics)
    def finish(self):
        go_wrong("finish"); note("finish")
def init(**kwargs):
    go_wrong("init"); note("init", kwargs["name"], kwargs["project"], kwargs["config"], kwargs["resume"]); return Run()
def setup(): return types.SimpleNamespace(settings=types.SimpleNamespace(mode="online", api_key="k"))
def teardown(): go_wrong("teardown")
atexit.register(lambda: go_wrong("atexit"))
"""
TRAIN = """
import logging, pathlib, sys, time
from saev import tracking
from saev.formats import jsonfile
logging.basicConfig(format="%(message)s")
tracking.FINISH_S = float(sys.argv[1]) if sys.argv[1:] else 20.0
dpath = pathlib.Path("ck/run")
dpath.mkdir(parents=True, exist_ok=True)
(dpath / "config.json").write_text(jsonfile.seal({"lr": 1.0}))
tracker = tracking.start(dpath, wandb_project="p", from_step=FROM)
for step in range(FROM, FROM + 2):
    tracker.log(step, {"mse": step / 2, "gone": float("nan")})
    time.sleep(0.05)
tracker.flush()
start_s = time.monotonic()
try:
    sys.exit(7)
finally:
    tracker.finish()
    print(time.monotonic() - start_s < 15)
"""


def fake(tmp_path: pathlib.Path, wrong: str, code: str = TRAIN) -> tuple[list[str], list[str]]:
    """Runs the code beside a wandb that goes wrong; returns (lines on stderr, calls of wandb)."""
    (tmp_path / "fake").mkdir(exist_ok=True)
    (tmp_path / "fake" / "wandb.py").write_text(FAKE)
    done = run(code, tmp_path, {"WRONG": wrong}, tmp_path / "fake")
    assert (done.returncode, done.stdout) == (7, "True\n"), done.stderr
    assert "Traceback" not in done.stderr
    calls = tmp_path / "calls"
    return done.stderr.splitlines(), calls.read_text().splitlines() if calls.exists() else []


def test_wandb_gets_what_metrics_jsonl_gets(tmp_path: pathlib.Path) -> None:
    stderr, calls = fake(tmp_path, "", TRAIN.replace("FROM", "0"))
    want = [
        "init run p {'lr': 1.0} None",
        "log 0 {'mse': 0.0, 'gone': None}",
        "log 1 {'mse': 0.5, 'gone': None}",
        "finish",
    ]
    assert (stderr, calls) == ([], want)
    stderr, calls = fake(tmp_path, "", TRAIN.replace("FROM", "1"))
    assert stderr == []
    assert calls[4:] == [
        "init run p {'lr': 1.0} allow",
        "log 1 {'mse': 0.5, 'gone': None}",
        "log 2 {'mse': 1.0, 'gone': None}",
        "finish",
    ]
    lines = (tmp_path / "ck/run/metrics.jsonl").read_text().splitlines()
    assert [metricslog.parse(line) for line in lines] == [
        {"step": i, "mse": i / 2, "gone": None} for i in range(3)
    ]


def test_a_damaged_line_is_left_out_when_a_run_goes_on(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    fpath = tmp_path / "metrics.jsonl"
    tracker = tracking.JsonLines(fpath)
    for step in range(3):
        tracker.log(step, {"mse": 0.5})
    tracker.finish()
    fpath.write_text(fpath.read_text().replace('"step":1,"mse":0.5', '"step":1,"mse":0.4'))
    tracking.JsonLines(fpath, from_step=3).finish()
    lines = fpath.read_text().splitlines()
    assert [metricslog.parse(line) for line in lines] == [{"step": 0, "mse": 0.5}, {"step": 2, "mse": 0.5}]
    assert f"{fpath}:2: is damaged" in caplog.text


WRONGS = [
    *("import raises", "init raises", "init exits", "log raises", "finish raises", "finish exits"),
    *("init dies", "log dies", "init prints", "teardown raises", "atexit hangs"),
]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONGS)
def test_whatever_wandb_does_wrong_decides_nothing(tmp_path: pathlib.Path, wrong: str) -> None:
    """The exit code is the trainer's own, metrics.jsonl is whole, and at most one line says what happened."""
    stderr, calls = fake(tmp_path, wrong, TRAIN.replace("FROM", "0"))
    assert len((tmp_path / "ck/run/metrics.jsonl").read_text().splitlines()) == 2
    at, how = wrong.split()
    if how in ("raises", "exits") and at not in ("teardown", "atexit"):
        (line,) = stderr
        assert "wandb: closed. Run run continues" in line or "wandb: 1. Run run continues" in line
        assert line.count("ck/run/metrics.jsonl has all its metrics") == 1
    elif how != "dies":
        assert stderr == [] and calls[-1] == "finish"


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["init hangs", "finish hangs"])
def test_a_wandb_that_hangs_is_waited_for_a_bounded_time(tmp_path: pathlib.Path, wrong: str) -> None:
    code = TRAIN.replace("FROM", "0").replace("else 20.0", "else 2.0")
    (line,), _ = fake(tmp_path, wrong, code)
    assert line.startswith("wandb: did not finish within 2 s") and "wandb sync ck/run/wandb/" in line


@pytest.mark.slow
def test_a_bad_key_is_one_line_and_says_what_to_do(tmp_path: pathlib.Path) -> None:
    done = run(TRAIN.replace("FROM", "0"), tmp_path, {"WANDB_API_KEY": "too-short"})
    assert done.returncode == 7
    (line,) = done.stderr.splitlines()
    assert "wandb: " in line and "WANDB_MODE=offline" in line and "continues" in line


def descendants(pid: int) -> list[int]:
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(d for child in map(int, children) for d in descendants(child))]


@pytest.mark.slow
def test_a_sigterm_to_the_whole_job_ends_it_with_its_own_exit_code(tmp_path: pathlib.Path) -> None:
    """As Slurm sends it at a time limit: to wandb's own processes too. The data lies where the line said."""
    code = TRAIN.replace("FROM", "0").replace("sys.exit(7)", "print('up', flush=True); time.sleep(50)")
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n" + code
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**env, "WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "up\n"
        line = process.stderr.readline()
        assert "to upload: wandb sync ck/*/wandb/offline-run-*" in line
        assert list(tmp_path.glob("ck/*/wandb/offline-run-*/*.wandb"))
        for pid in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=40)
    assert (process.returncode, stdout) == (143, "True\n"), stderr
    assert len(stderr.splitlines()) <= 1 and "Traceback" not in stderr
    assert len((tmp_path / "ck/run/metrics.jsonl").read_text().splitlines()) == 2


# ---- the file ----


def test_a_removed_file_is_an_error(tmp_path: pathlib.Path) -> None:
    for how in ("removed", "replaced"):
        tracker = tracking.JsonLines(tmp_path / how / "metrics.jsonl")
        tracker.log(0, {"mse": 1.0})
        (tmp_path / how / "metrics.jsonl").unlink()
        if how == "replaced":
            (tmp_path / how / "metrics.jsonl").write_text("")
        for use in (tracker.flush, lambda t=tracker: t.log(1, {"mse": 1.0})):
            with pytest.raises(errors.UserError, match=f"{how}/metrics.jsonl: was removed, moved"):
                use()
        tracker.finish()


def test_no_room_names_the_file(tmp_path: pathlib.Path) -> None:
    code = """
import pathlib, resource
from saev import launch, tracking
def main():
    tracker = tracking.JsonLines(pathlib.Path("ck/metrics.jsonl"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    for step in range(100):
        tracker.log(step, {"mse": 1.0})
launch.entry(main)
"""
    done = run(code, tmp_path, {})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ck/metrics.jsonl: File too large. Check")
