"""What the tests of jobs on a real Slurm share. Their fixture is in slurm_fixtures.py."""

import collections.abc
import concurrent.futures
import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import forked
import pytest

from saev import launch
from saev.launch.executor import START

ROOT = pathlib.Path(__file__).parent.parent
TASKS = ROOT / "tests" / "slurm"


def slurm_answers() -> bool:
    """Does the Slurm of tests/slurm/up run here? A real cluster gets no jobs from a test run."""
    if shutil.which("sbatch") is None:
        return False
    try:
        # ping answers at once; the config of a Slurm that is down takes 9 s
        command = ["sh", "-c", "scontrol ping | grep -q 'is UP' && scontrol show config"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return re.search(r"^ClusterName\s*= test$", done.stdout, re.M) is not None


def wait_for(
    condition: collections.abc.Callable[[], object], timeout_s: float = 60, every_s: float = 0.2
) -> None:
    """Returns once the condition is true. Looks so seldom that this takes at most a twentieth of a core."""
    deadline = time.monotonic() + timeout_s
    start_s = time.thread_time()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(max(every_s, 20 * (time.thread_time() - start_s)))
        start_s = time.thread_time()


def in_thread(
    args: list[str], slurm: launch.SlurmConfig, target: str = "tasks:touch_later"
) -> concurrent.futures.Future[list[launch.Outcome]]:
    """A command that waits for its jobs, while the test goes on."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    return pool.submit(lambda: list(launch.run(target, args, slurm, "saev-test")))


def submitted(slurm: launch.SlurmConfig) -> list[str]:
    """Ids of all jobs that were submitted."""
    return submitted_to(pathlib.Path(slurm.log_to))


def submitted_to(log_to: pathlib.Path) -> list[str]:
    return sorted(p.stem.removesuffix("_submitted") for p in log_to.glob("*submitted.pkl"))


def saev(*args: object, cwd: pathlib.Path = ROOT) -> list[str]:
    """Lines that the command prints."""
    command = [sys.executable, *map(str, args)]
    done = forked.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


VIT = [
    "--vit-family",
    "timm",
    "--vit-ckpt",
    "vit_tiny_patch16_224",
    "--vit-weights",
    "random",
    "--img-size",
    "64",
    "--vit-layers",
    "1",
]


def train_command(shards: pathlib.Path, ckpt_to: pathlib.Path, *more: str) -> list[str]:
    """A second or two of training."""
    return [
        *(sys.executable, "train.py", "--data.shard-root", str(shards)),
        *("--n-patches", str(300 * 64), "--batch-size", "64", "--log-every", "20"),
        *("--lr", "1e-3", "--wandb-project", "", "--device", "cpu", "--ckpt-to", str(ckpt_to)),
        *(*more, "sae:batch-top-k", "--sae.exp-factor", "4", "--sae.top-k", "4"),
    ]


ON_SLURM = (
    *("--slurm-acct", "test", "--slurm-partition", "nextgen", "--n-gpus", "0"),
    *("--n-cpus", "1", "--n-hours", "0.2"),
)


def queue_says(job_id: str, name: str, kind: type = int) -> object:
    shown = subprocess.run(
        ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--Format={name}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return kind(shown.stdout.strip())


def of_job(job_id: str) -> list[int]:
    """The processes of a job (or array) and the one of Slurm that watches them."""
    found, marks = [], {f"SLURM_{name}JOB_ID={job_id}".encode() for name in ("", "ARRAY_")}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        is_mine = not marks.isdisjoint(environment.split(b"\0"))
        if is_mine or command.startswith(f"slurmstepd: [{job_id}.".encode()):
            found.append(int(folder.name))
    return found


def stages_of(job_id: str) -> list[int]:
    """The processes of the tasks of a job (or array), which start all others of its Pythons. Empty: none has begun."""
    found = []
    for pid in sorted(of_job(job_id)):
        with contextlib.suppress(OSError):
            command = pathlib.Path(f"/proc/{pid}/cmdline").read_text()
            if command.startswith(sys.executable) and START in command:
                found.append(pid)
    return found


@contextlib.contextmanager
def stopped(*pids: int) -> collections.abc.Generator[None]:
    """Inside, the processes do nothing."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def warn(job_id: str, pid: int) -> None:
    """Sends Slurm's warning to a job, whose process is stopped until it has it."""

    def has_it() -> int:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"^ShdPnd:\s*(\w+)", status, re.M)[1], 16) >> (signal.SIGUSR2 - 1) & 1

    with stopped(pid):
        subprocess.run(["scancel", "--signal=USR2", job_id], check=True)
        deadline = time.monotonic() + 10  # or a thread of its took it while the process was being stopped
        while not has_it() and time.monotonic() < deadline:
            time.sleep(0.1)


def files_of(dpath: pathlib.Path, pattern: str) -> dict[str, bytes]:
    fpaths = (fpath for fpath in dpath.glob(pattern) if fpath.is_file())
    return {str(fpath.relative_to(dpath)): fpath.read_bytes() for fpath in fpaths}


PLACEHOLDERS = {"lab": "test", "gpu": "nextgen", "train.py": str(ROOT / "train.py")}


def page_commands() -> list[list[str]]:
    """The words of the page's `uv run` commands, without `uv run` and `python`."""
    text = (ROOT / "docs" / "slurm.md").read_text().replace("\\\n", " ")
    return [shlex.split(c) for c in re.findall(r"^    uv run (?:python )?(.*)$", text, re.M)]


def filled(words: list[str], values: dict[str, object], *more: object) -> list[str]:
    """A command for this machine. values: for placeholders. more: flags, which come before its subcommands."""
    words = [str((PLACEHOLDERS | values).get(word, word)) for word in words]
    at = next((i for i, word in enumerate(words) if re.fullmatch(r"\w+:[\w-]+", word)), len(words))
    return [*words[:at], *map(str, more), *words[at:]]


MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(not slurm_answers(), reason="no test Slurm here; tests/slurm/up brings one up"),
]
