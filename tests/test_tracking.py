"""metrics.jsonl, and when wandb talks to its server."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from saev import tracking

ROOT = pathlib.Path(__file__).parent.parent
KEY = "a" * 40


def test_json_lines_are_on_disk_at_once(tmp_path: pathlib.Path) -> None:
    """A killed run keeps what it logged."""
    tracker = tracking.start(tmp_path / "run", name="run", config={}, wandb_project="")
    assert isinstance(tracker, tracking.JsonLines) and isinstance(tracker, tracking.Tracker)
    tracker.log(0, {"mse": 0.5, "l0": 3})
    tracker.log(50, {"mse": 0.25})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "mse": 0.5, "l0": 3},
        {"step": 50, "mse": 0.25},
    ]
    tracker.finish()


def test_both_hand_on_everything(tmp_path: pathlib.Path) -> None:
    fpaths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    both = tracking.Both(*map(tracking.JsonLines, fpaths))
    both.log(3, {"mse": 0.5})
    both.finish()
    assert [f.read_text() for f in fpaths] == ['{"step":3,"mse":0.5}\n'] * 2


def run(code: str, home: pathlib.Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a process that has `home` and `env` only, and nothing to answer a prompt with."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), **env},
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


@pytest.mark.parametrize("case", MODES)
def test_wandb_mode(case: str, tmp_path: pathlib.Path) -> None:
    env, netrc, mode = MODES[case]
    if netrc:
        fpath = tmp_path / netrc
        fpath.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
        fpath.chmod(0o600)
    done = run("from saev import tracking; print(tracking.wandb_mode())", tmp_path, env)
    assert (done.stdout, done.stderr) == (f"{mode}\n", "")


def test_a_netrc_that_cannot_be_read_is_no_key(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad").write_text("machina api.wandb.ai")
    for name in ("bad", "gone", "."):
        monkeypatch.setenv("NETRC", str(tmp_path / name))
        assert tracking._netrc_hosts() == set()


def test_a_bad_key_is_one_line_and_says_what_to_do(tmp_path: pathlib.Path) -> None:
    code = "import pathlib; from saev import launch, tracking; launch.entry(lambda: tracking.start(pathlib.Path('run'), name='n', config={}, wandb_project='p'))"
    done = run(code, tmp_path, {"WANDB_API_KEY": "too-short"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: wandb: ") and "Set WANDB_MODE=offline" in last
