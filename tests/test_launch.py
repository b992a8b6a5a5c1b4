"""Running a stage, and ending with an exit code that tells the truth."""

import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from saev import console, errors, launch
from saev.data import config as data_config
from saev.training import config as training_config

ROOT = pathlib.Path(__file__).parent.parent
LOCAL = launch.SlurmConfig()


def ends(raising: str) -> tuple[int, str]:
    """Exit code and stderr of an entry point that runs `raising`."""
    source = f"from saev import errors, launch\ndef main():\n    {raising}\nlaunch.entry(main)"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_entry() -> None:
    assert ends("pass") == (0, "")
    assert ends("raise errors.UserError('x.toml: bad. Do this.')") == (
        2,
        "error: x.toml: bad. Do this.\n",
    )
    assert ends("raise KeyboardInterrupt") == (
        130,
        "interrupted; run the same command again to go on.\n",
    )
    code, stderr = ends("raise RuntimeError('a bug')")
    assert code == 1 and "Traceback" in stderr  # our own bugs stay loud


def test_local_results_are_in_order() -> None:
    assert launch.run("operator:neg", [3, 1, 2], LOCAL, "x") == [-3, -1, -2]


def test_local_errors_pass_through() -> None:
    with pytest.raises(errors.UserError, match="no such shard directory"):
        launch.run("saev.data.reader:Reader", [data_config.Shards("gone")], LOCAL, "x")


def test_one_that_fails_does_not_keep_the_others_from_running(tmp_path: pathlib.Path) -> None:
    got = launch.run("json:loads", ["[1]", "2"], LOCAL, "x", keeps_going=True)
    assert got == [[1], 2]
    (tmp_path / "a.npy").touch()
    gone, listed = launch.run(
        "os:listdir", [str(tmp_path / "gone"), str(tmp_path)], LOCAL, "x", keeps_going=True
    )
    assert isinstance(gone, errors.UserError) and "No such file" in str(gone)
    assert listed == ["a.npy"]


def test_slurm_without_sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.UserError, match="--slurm-acct A: no sbatch on this machine"):
        launch.run("operator:neg", [1], launch.SlurmConfig(slurm_acct="A"), "x")


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    console.show([training_config.Train(lr=0.5), training_config.Train(lr=0.25)])
    out = capsys.readouterr().out
    assert "# 2 of 2" in out and "lr = 0.25" in out and "sae: BatchTopK\n    d_vit = None" in out


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_training(make_shards, tmp_path: pathlib.Path) -> None:
    """A real SIGINT to a real process: exit code 130, one last line, a state to go on from, nothing half-written."""
    dpath, _ = make_shards(n_imgs=50, n_patches=16, d_vit=32, layers=(0,), per_shard=20)
    command = [
        sys.executable,
        "train.py",
        "--data.shard-root",
        str(dpath),
        "--ckpt-to",
        str(tmp_path / "ck"),
    ]
    command += [
        "--n-patches",
        "100_000_000",
        "--batch-size",
        "64",
        "--log-every",
        "1",
        "--wandb-project",
        "",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (logs := list(tmp_path.glob("ck/*/metrics.jsonl"))) or not logs[0].stat().st_size:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "interrupted; run the same command again to go on."
    assert "Traceback" not in stderr
    config, metrics, state = sorted(p.name for p in logs[0].parent.iterdir())
    assert (config, metrics) == ("config.json", "metrics.jsonl") and state.startswith("state-")


def test_errors_of_the_operating_system_are_one_line() -> None:
    code, stderr = ends("open('/proc/nowhere', 'w')")
    assert (code, stderr.count("\n")) == (2, 1) and stderr.startswith(
        "error: /proc/nowhere: No such file"
    )
    code, stderr = ends("raise OSError(28, 'No space left on device')")
    assert (code, stderr.count("\n")) == (2, 1) and "No space left on device" in stderr
    code, stderr = ends("raise ConnectionError('a bug')")
    assert code == 1 and "Traceback" in stderr


def test_the_exceptions_line_of_a_jobs_traceback() -> None:
    """Its first line, with the type; not the rest of the message, notes, or submitit's hint about logs."""
    trace = (
        "Job (task=0) failed during processing with trace:\n----------\nTraceback (most recent call last):\n"
        '  File "a.py", line 1, in f\n    raise ValueError(text)\nValueError: first\nsecond\n\n'
        "----------\nYou can check full logs with ...\n  - /logs/1_0_log.out"
    )
    assert launch._exception_line(trace) == "ValueError: first"
    assert launch._exception_line("nothing like a traceback") == "it raised an exception"


def test_dry_run_into_head() -> None:
    """A reader that stops early is no bug of ours."""
    code = "from saev import console, launch; launch.entry(lambda: console.show([launch.SlurmConfig()] * 10_000))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1"
    done = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("# 1 of 10000\n", "")
