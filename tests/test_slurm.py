"""Jobs on a real Slurm. Runs where one answers (tests/slurm/up brings up a one-node Slurm); skips elsewhere."""

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import torch

from saev import errors, launch, nn
from saev.demo import minicub
from tests import inprocess

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


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not slurm_answers(), reason="no test Slurm here; tests/slurm/up brings one up"),
]


@pytest.fixture
def slurm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> launch.SlurmConfig:
    monkeypatch.setenv("PYTHONPATH", str(TASKS))  # Slurm passes the environment on to the job
    monkeypatch.syspath_prepend(str(TASKS))
    return launch.SlurmConfig(
        "test", "nextgen", n_hours=0.2, n_cpus=2, n_gpus=0, log_to=str(tmp_path / "logs")
    )


def test_an_array_returns_its_results_in_order(slurm: launch.SlurmConfig) -> None:
    outcomes = launch.run("tasks:square", [3, 1, 2], slurm, "saev-test")
    assert [outcome.get() for outcome in outcomes] == [9, 1, 4]
    log = (pathlib.Path(slurm.log_to) / f"{submitted(slurm)[0]}_0_log.out").read_text().splitlines()
    assert log[0].endswith(f"] job {submitted(slurm)[0]}: argument = 3") and len(log) == len(set(log))
    (note,) = [json.loads(f.read_text()) for f in pathlib.Path(slurm.log_to).glob("*_submission.json")]
    assert [job["id"] for job in note["jobs"]] == submitted(slurm) and note["args"] == sys.argv
    assert [job["label"] for job in note["jobs"]] == ["argument = 3", "argument = 1", "argument = 2"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert note["code"]["commit"] == head.stdout.strip() and isinstance(note["code"]["is_changed"], bool)


def test_a_users_mistake_crosses_as_one_line(slurm: launch.SlurmConfig) -> None:
    with pytest.raises(
        errors.UserError, match=r"job \d+_0 \(argument = 7\): 7 is too large. Pass a smaller one"
    ) as err:
        next(launch.run("tasks:refuse", [7, 8], slurm, "saev-test")).get()
    assert "\n" not in str(err.value)


def test_a_crash_names_its_log(slurm: launch.SlurmConfig) -> None:
    with pytest.raises(
        errors.UserError, match=r"job \d+_0 \(argument = 7\) failed: .*bug at 7.* Its log: "
    ) as err:
        next(launch.run("tasks:crash", [7, 8], slurm, "saev-test")).get()
    assert "\n" not in str(err.value)
    assert "RuntimeError: bug at 7" in pathlib.Path(str(err.value).rpartition("Its log: ")[2]).read_text()


def test_a_job_that_is_killed_says_so(slurm: launch.SlurmConfig) -> None:
    with pytest.raises(
        errors.UserError, match=r"job \d+ was killed by the system, .* Raise --mem-gb. Its log: "
    ):
        next(launch.run("tasks:killed", [7], slurm, "saev-test")).get()


def test_a_job_that_takes_more_memory_than_it_asked_for(slurm: launch.SlurmConfig) -> None:
    """Slurm itself kills it."""
    (outcome,) = launch.run(
        "tasks:take_memory", [2_500_000_000], dataclasses.replace(slurm, mem_gb=1), "saev-test"
    )
    assert re.match(
        r"job \d+ was killed because it used more than its memory. Raise --mem-gb \(asked: 1.1 GB; last seen: "
        r"[0-9.]+ GB\). Its log: ",
        outcome.error,
    )


def test_a_partition_that_does_not_exist(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    wrong = launch.SlurmConfig("test", "nowhere", n_gpus=0, log_to=str(tmp_path / "logs"))
    with pytest.raises(errors.UserError, match="sbatch refused the job: .*Invalid partition"):
        launch.run("tasks:square", [1], wrong, "saev-test")


def test_ctrl_c_leaves_the_jobs_running_and_says_so(
    slurm: launch.SlurmConfig, tmp_path: pathlib.Path
) -> None:
    fpath = tmp_path / "done"
    source = (
        "from saev import launch\n"
        f"cfg = launch.SlurmConfig('test', 'nextgen', 0.2, n_gpus=0, n_cpus=1, log_to={slurm.log_to!r})\n"
        f"launch.entry(lambda: launch.run('tasks:touch_later', [{str(fpath)!r}], cfg, 'saev-test'))"
    )
    process = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: fpath.with_name("done.started").exists())
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "stopped waiting. These jobs keep running: " in stderr and "Cancel them with: scancel " in stderr
    assert not fpath.exists()
    wait_for(fpath.exists)


def test_a_command_that_is_terminated_says_so_too(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    """As when the job in which it runs is cancelled."""
    fpath = tmp_path / "done"
    source = (
        "from saev import launch\n"
        f"cfg = launch.SlurmConfig('test', 'nextgen', 0.2, n_gpus=0, n_cpus=1, log_to={slurm.log_to!r})\n"
        f"launch.entry(lambda: launch.run('tasks:touch_later', [{str(fpath)!r}], cfg, 'saev-test'))"
    )
    process = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: fpath.with_name("done.started").exists())
    process.terminate()
    _, stderr = process.communicate(timeout=30)
    (job_id,) = submitted(slurm)
    assert process.returncode == 143 and f"These jobs keep running: {job_id}. Cancel them with: " in stderr
    wait_for(fpath.exists)


def test_jobs_out_of_time_are_queued_again(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    """SIGUSR2 is how Slurm tells submitit that the time is nearly up."""
    fpaths = [tmp_path / "runs0", tmp_path / "runs1"]
    source = (
        "from saev import launch\n"
        f"cfg = launch.SlurmConfig('test', 'nextgen', 0.2, n_gpus=0, n_cpus=1, log_to={slurm.log_to!r})\n"
        f"print([o.get() for o in launch.run('tasks:second_time_lucky', {[str(f) for f in fpaths]}, cfg, 'saev-test')])"
    )
    process = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: all(f.exists() and f.read_text() for f in fpaths))
    (array_id,) = {f.read_text().strip() for f in fpaths}
    subprocess.run(["scancel", "--signal=USR2", array_id], check=True)
    stdout, _ = process.communicate(timeout=90)
    assert stdout.strip() == "[2, 2]"


def wait_for(condition: object, timeout_s: float = 60, every_s: float = 0.2) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every_s)


# ---- bad days ----


def errors_of(outcomes: collections.abc.Iterable[launch.Outcome]) -> list[str]:
    return [outcome.error for outcome in outcomes]


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


def test_a_warning_before_the_stage_begins(
    slurm: launch.SlurmConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a short time limit: the job is queued again, but not for ever."""
    (tmp_path / "sitecustomize.py").write_text(EARLY_WARNING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{TASKS}")
    monkeypatch.setenv("N_WARNINGS", "1")
    (outcome,) = launch.run("tasks:square", [3], slurm, "saev-test")
    (job_id,) = submitted(slurm)
    assert outcome.get() == 9 and queue_says(job_id, "RestartCnt") == 1
    monkeypatch.setenv("N_WARNINGS", "9")
    (outcome,) = launch.run("tasks:square", [4], slurm, "saev-test")
    assert (
        " failed: the time limit is shorter than the start of the job. Raise --n-hours. Its" in outcome.error
    )
    assert queue_says(max(submitted(slurm), key=int), "RestartCnt") == 3


def test_a_time_limit_of_a_minute(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    """Slurm itself sends its warning, 15 s or more before the end, so one start is never enough for 60 s."""
    short = dataclasses.replace(slurm, slurm_partition="short", n_hours=1 / 60)
    (outcome,) = launch.run("tasks:sixty_seconds", [str(tmp_path / "seconds")], short, "saev-test")
    assert outcome.get() >= 2 and (tmp_path / "seconds").stat().st_size == 60


def test_the_disk_of_the_logs_is_full(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    disk, fpath = tmp_path / "disk", tmp_path / "done"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("needs to mount a small disk, which is not allowed here")
    try:
        full = dataclasses.replace(slurm, log_to=str(disk / "logs"))
        waiting = in_thread([str(fpath)], full)
        wait_for(pathlib.Path(f"{fpath}.started").exists)
        with contextlib.suppress(OSError), (disk / "large").open("wb", buffering=0) as fd:
            while True:
                fd.write(bytes(2**12))
        (outcome,) = waiting.result(timeout=90)
        assert (
            outcome.error.startswith("job ")
            and f"The disk of {disk / 'logs'} is full. Its log" in outcome.error
        )
        (disk / "large").unlink()
        (outcome,) = launch.run("tasks:touch_later", [str(fpath)], full, "saev-test")
        assert outcome.get() == str(fpath)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # Slurm may close a log a moment later


EARLY_WARNING = """
import os, subprocess
if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(os.environ["N_WARNINGS"]):
    wait = f"until grep -q '^SigBlk:[^1-9a-f]*800$' /proc/{os.getpid()}/status; do sleep 0.01; done"
    subprocess.Popen(["sh", "-c", f"{wait}; kill -USR2 {os.getpid()}"])
"""
"""Python runs this when it starts. The job's first line blocks the signal."""


@pytest.mark.parametrize("accounting", [True, False])
def test_a_cancelled_job_is_over_for_who_waits(
    slurm: launch.SlurmConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, accounting: bool
) -> None:
    """Also without accounting. The other job of the array gives its result."""
    if not accounting:
        fake(tmp_path, "sacct", "exit 1", monkeypatch)
    sources = [
        f"import time; open({str(tmp_path / n)!r}, 'w'); time.sleep({s})" for n, s in (("a", 600), ("b", 20))
    ]
    waiting = in_thread(sources, slurm, "tasks:execute")
    wait_for(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    subprocess.run(["scancel", submitted(slurm)[0]], check=True)
    start_s = time.monotonic()
    cancelled, done = waiting.result(timeout=60)
    assert time.monotonic() - start_s < 40
    assert re.fullmatch(
        r"job \d+_0 \(argument = .*\) was cancelled. Run the same .*continues. Its log: \S+", cancelled.error
    )
    assert done == launch.Outcome()


@pytest.mark.parametrize("accounting", [True, False])
def test_an_array_that_is_cancelled_before_it_begins(
    slurm: launch.SlurmConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, accounting: bool
) -> None:
    """Slurm then lists the array as one job."""
    if not accounting:
        fake(tmp_path, "sacct", "exit 1", monkeypatch)
    held = dataclasses.replace(slurm, slurm_extra=("hold",))
    waiting = in_thread([1, 2, 3], held, "tasks:square")
    wait_for(lambda: len(submitted(slurm)) == 3)
    subprocess.run(["scancel", submitted(slurm)[0].partition("_")[0]], check=True)
    found = errors_of(waiting.result(timeout=60))
    assert len(found) == 3
    assert all(
        re.match(r"job \d+_\d \(argument = \d\) was cancelled. Run the same ", error) for error in found
    )


def test_a_job_that_is_preempted_for_good_is_over(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    """PreemptMode=CANCEL: Slurm does not queue it again."""
    low = dataclasses.replace(slurm, slurm_partition="preemptible", n_cpus=16)
    waiting = in_thread([str(tmp_path / "low")], low, "tasks:wait_for_ever")
    wait_for((tmp_path / "low.started").exists)
    (high,) = launch.run("tasks:square", [3], dataclasses.replace(slurm, n_cpus=16), "saev-test")
    assert high.get() == 9
    (outcome,) = waiting.result(timeout=60)
    assert re.match(
        r"job \d+ was (preempted|cancelled). Run the same command again; it continues", outcome.error
    )


def test_a_time_limit_above_the_partitions(slurm: launch.SlurmConfig) -> None:
    """Slurm would let it wait for ever."""
    short = dataclasses.replace(slurm, slurm_partition="short", n_hours=2.0)
    (error,) = errors_of(launch.run("tasks:square", [3], short, "saev-test"))
    assert re.search(
        r"was cancelled, because --n-hours is above the partition's limit \(PartitionTimeLimit", error
    )
    assert (
        submitted(short) and not subprocess.run(["squeue", "-h", "-p", "short"], capture_output=True).stdout
    )


def test_a_command_that_was_killed_finds_its_jobs(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    files = [str(tmp_path / name) for name in ("a", "b")]
    source = (
        "from saev import launch\n"
        f"cfg = launch.SlurmConfig('test', 'nextgen', 0.2, n_gpus=0, n_cpus=1, log_to={slurm.log_to!r})\n"
        f"print([o.get() for o in launch.run('tasks:touch_later', {files!r}, cfg, 'saev-test')])"
    )
    process = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT)
    wait_for(lambda: all(pathlib.Path(f + ".started").exists() for f in files))
    process.kill()
    process.wait()
    again = dataclasses.replace(slurm, n_hours=0.3)  # another time limit is no other work
    more = [*files, str(tmp_path / "c")]
    assert [o.get() for o in launch.run("tasks:touch_later", more, again, "saev-test")] == more
    assert len(submitted(slurm)) == 3


def test_a_command_that_is_killed_before_it_knows_its_jobs(
    slurm: launch.SlurmConfig, tmp_path: pathlib.Path
) -> None:
    """SIGKILL between sbatch's answer and the note of it. The jobs run all the same, and the same command finds them."""
    files = [str(tmp_path / name) for name in ("a", "b")]
    source = (
        "from saev import launch\n"
        f"cfg = launch.SlurmConfig('test', 'nextgen', 0.2, n_gpus=0, n_cpus=1, log_to={slurm.log_to!r}, slurm_extra={{}})\n"
        f"launch.run('tasks:write', {{}}, cfg, 'saev-test', is_lasting=True)"
    )
    with pytest.MonkeyPatch.context() as patch:
        fake(tmp_path, "sbatch", f'{shutil.which("sbatch")} "$@"; kill -KILL $PPID; sleep 1', patch)
        for hold, names in (((), files), (("hold",), [str(tmp_path / "c")])):
            command = [sys.executable, "-c", source.format(hold, names)]
            assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    wait_for(lambda: all(pathlib.Path(f).exists() for f in files))  # without any command
    held = in_thread([str(tmp_path / "c")], slurm, "tasks:write")
    wait_for(lambda: len(submitted(slurm)) == 3)
    (job_id,) = [i for i in submitted(slurm) if "_" not in i]
    assert queue_says(job_id, "State", str) == "PENDING"
    subprocess.run(["scontrol", "release", job_id], check=True)
    assert [outcome.get() for outcome in held.result(60)] == [str(tmp_path / "c")]
    outcomes = launch.run("tasks:write", files, slurm, "saev-test", is_lasting=True)
    assert [outcome.get() for outcome in outcomes] == files
    assert len(submitted(slurm)) == 3 and not [*pathlib.Path(slurm.log_to).glob(".submission_file_*.json")]


def fake(tmp_path: pathlib.Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a script of this name before the real command."""
    script = tmp_path / "bin" / name
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"#!/bin/sh\n{code}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


def test_from_inside_a_job_and_through_a_talking_sbatch(
    slurm: launch.SlurmConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables of the job around this process do not reach the new one; a banner is no job id."""
    inside = {"SLURM_ARRAY_JOB_ID": "999", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "999"}
    inside |= {"SLURM_MEM_PER_CPU": "100", "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SBATCH_EXPORT": "NONE"}
    for name, value in inside.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MINE", "kept")
    fake(tmp_path, "sbatch", f'echo "Welcome, job 24"; exec {shutil.which("sbatch")} "$@"', monkeypatch)
    outcomes = launch.run("tasks:variable", ["MINE", "SLURM_ARRAY_TASK_ID"], slurm, "saev-test")
    assert [outcome.get() for outcome in outcomes] == ["kept", "1"]


def test_what_else_a_cluster_asks_for(slurm: launch.SlurmConfig) -> None:
    more = dataclasses.replace(
        slurm,
        slurm_acct="",
        slurm_setup=("export SET_UP='by a line'",),
        slurm_extra=("comment=of ours", "nice=7"),
    )
    (outcome,) = launch.run("tasks:variable", ["SET_UP"], more, "saev-test")
    assert outcome.get() == "by a line"
    shown = subprocess.run(
        ["scontrol", "show", "job", *submitted(slurm)], capture_output=True, text=True
    ).stdout
    assert "Comment=of ours" in shown and "Nice=7" in shown and "Partition=nextgen" in shown


def test_no_wait(
    slurm: launch.SlurmConfig, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaving = dataclasses.replace(slurm, slurm_wait=False)
    with pytest.raises(SystemExit) as err:
        launch.run("tasks:touch_later", [str(tmp_path / "a")], leaving, "saev-test")
    (job_id,) = submitted(slurm)
    assert err.value.code == 0 and f"cancel them with: scancel {job_id};" in capsys.readouterr().err
    (outcome,) = launch.run("tasks:touch_later", [str(tmp_path / "a")], slurm, "saev-test")
    assert outcome.get() == str(tmp_path / "a") and submitted(slurm) == [job_id]


def test_more_jobs_than_an_array_may_have(slurm: launch.SlurmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saev.launch.queue.max_array_size", lambda: 2)
    outcomes = launch.run("tasks:square", [1, 2, 3], dataclasses.replace(slurm, max_parallel=1), "saev-test")
    assert [outcome.get() for outcome in outcomes] == [1, 4, 9]
    assert len({job_id.partition("_")[0] for job_id in submitted(slurm)}) == 2


def test_max_parallel_holds_over_several_arrays(
    slurm: launch.SlurmConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two of these jobs run at the same time, although they are three arrays, one of an earlier command."""
    monkeypatch.setattr("saev.launch.queue.max_array_size", lambda: 2)
    note = tmp_path / "running"
    source = "import os, pathlib, time; f = pathlib.Path({0!r}); f.touch(exist_ok=False); time.sleep(2); f.unlink()"
    one = dataclasses.replace(slurm, max_parallel=1, n_cpus=1)
    sources = [source.format(str(note)) + f"  # {i}" for i in range(5)]
    with pytest.raises(SystemExit):
        launch.run("tasks:execute", sources[:2], dataclasses.replace(one, slurm_wait=False), "saev-test")
    assert errors_of(launch.run("tasks:execute", sources, one, "saev-test")) == [""] * 5
    assert len(submitted(slurm)) == 5 and len({job_id.partition("_")[0] for job_id in submitted(slurm)}) == 3


def test_a_refused_job_leaves_no_files(slurm: launch.SlurmConfig) -> None:
    """Files of another command, which is submitting to the same folder, stay."""
    other = pathlib.Path(slurm.log_to) / ".submission_file_of_another.sh"
    other.parent.mkdir()
    other.touch()
    wrong = dataclasses.replace(slurm, slurm_partition="nowhere")
    with pytest.raises(errors.UserError, match="Invalid partition"):
        launch.run("tasks:square", [1, 2], wrong, "saev-test")
    assert [f for f in pathlib.Path(slurm.log_to).iterdir() if f.is_file()] == [other]


# ---- large and repeated submissions ----


def test_only_what_is_missing_is_submitted_again(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    files = [str(tmp_path / name) for name in ("a", "b")]
    (tmp_path / "b.guarded").touch()
    good, bad = launch.run("tasks:write", files, slurm, "saev-test", is_lasting=True)
    assert good.get() == files[0] and re.fullmatch(
        r"job \d+_1 \(argument = .*b\): b is not allowed.", bad.error
    )
    (tmp_path / "b.allowed").touch()
    again = launch.run("tasks:write", files, slurm, "saev-test", is_lasting=True)
    assert [outcome.get() for outcome in again] == files
    assert [pathlib.Path(f).read_text() for f in files] == ["x", "x"] and len(submitted(slurm)) == 3
    pathlib.Path(files[0]).unlink()  # what a job made must be there
    again = launch.run("tasks:write", files, slurm, "saev-test", is_lasting=True)
    assert [outcome.get() for outcome in again] == files and len(submitted(slurm)) == 4
    again = launch.run("tasks:write", files, slurm, "saev-test")  # an outcome that may not last
    assert [outcome.get() for outcome in again] == files and len(submitted(slurm)) == 6


def test_a_cancelled_task_of_an_array_is_submitted_again(
    slurm: launch.SlurmConfig, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It alone; the command that waits notices within 30 s."""
    files = [str(tmp_path / name) for name in ("a", "b")]
    held = dataclasses.replace(slurm, slurm_extra=("hold",))
    with pytest.raises(SystemExit):
        launch.run("tasks:write", files, dataclasses.replace(held, slurm_wait=False), "saev-test")
    first, second = submitted(slurm)
    caplog.set_level("INFO", "saev")
    waiting = in_thread(files, held, "tasks:write")
    wait_for(lambda: "2 job(s): 2 pending" in caplog.text)
    subprocess.run(["scancel", second], check=True)
    try:  # Slurm says nothing of such a task any more
        wait_for(
            lambda: f"job {second} (argument = {files[1]}) left the queue before it began" in caplog.text, 30
        )
    finally:
        subprocess.run(["scontrol", "release", first], check=True)
    assert [bool(outcome.error) for outcome in waiting.result(60)] == [False, True]
    again = launch.run("tasks:write", files, slurm, "saev-test", is_lasting=True)
    assert [outcome.get() for outcome in again] == files and len(submitted(slurm)) == 3
    assert [pathlib.Path(f).read_text() for f in files] == ["x", "x"]


def test_retry_failed(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    files = [str(tmp_path / name) for name in ("a", "b")]
    retry = dataclasses.replace(slurm, retry_failed=True)
    with pytest.raises(
        errors.UserError, match="--retry-failed: .* has no earlier submission of these configs"
    ):
        launch.run("tasks:write", files, retry, "saev-test")
    (tmp_path / "b.guarded").touch()
    assert [bool(o.error) for o in launch.run("tasks:write", files, slurm, "saev-test")] == [False, True]
    (tmp_path / "b.allowed").touch()
    assert [o.get() for o in launch.run("tasks:write", files, retry, "saev-test")] == files
    assert (tmp_path / "a").read_text() == "x" and len(submitted(slurm)) == 3


def test_more_jobs_than_the_user_may_submit(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    """Quality of service "few": at most 4 at a time. The others follow as these end."""
    few = dataclasses.replace(slurm, slurm_qos="few", n_cpus=1)
    files = [str(tmp_path / f"{i}") for i in range(7)]
    outcomes = launch.run("tasks:write", files, few, "saev-test")
    assert [outcome.get() for outcome in outcomes] == files
    assert [pathlib.Path(f).read_text() for f in files] == ["x"] * 7
    assert len(submitted(slurm)) == 7 and len({j.partition("_")[0] for j in submitted(slurm)}) > 1


def test_more_jobs_than_the_user_may_submit_without_waiting(slurm: launch.SlurmConfig) -> None:
    few = dataclasses.replace(slurm, slurm_qos="few", slurm_wait=False, n_cpus=1)
    with pytest.raises(
        errors.UserError, match=r"2 of 6 were not submitted. Run the same command again later"
    ):
        launch.run("tasks:square", [1, 2, 3, 4, 5, 6], few, "saev-test")
    assert len(submitted(slurm)) == 4


def test_jobs_run_the_code_that_was_submitted(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    """Code that is edited while the job is pending is not run."""
    repo = tmp_path / "a repo"
    shutil.copytree(ROOT / "saev", repo / "saev")
    (repo / "saev" / "edited.py").write_text("def value(x):\n    return 'as submitted'\n")
    cfg = f"launch.SlurmConfig('test', 'nextgen', 0.2, n_gpus=0, n_cpus=1, log_to={slurm.log_to!r}"
    source = (
        "from saev import launch\n[o] = launch.run('saev.edited:value', [1], {}, 'saev-test')\nprint(o.get())"
    )
    late = f"{cfg}, slurm_wait=False, slurm_extra=('begin=now+6',))"
    subprocess.run([sys.executable, "-c", source.format(late)], cwd=repo, check=True, capture_output=True)
    (repo / "saev" / "edited.py").write_text("def value(x):\n    return 'edited'\n")
    command = [sys.executable, "-c", source.format(f"{cfg})")]
    done = subprocess.run(command, cwd=repo, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "as submitted\n"
    (job_id,) = submitted(slurm)
    assert f"in {slurm.log_to}/code/" in (pathlib.Path(slurm.log_to) / f"{job_id}_0_log.out").read_text()


def test_dependent_jobs(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    steps = {"first": (), "second": ("first",)}
    outcomes = launch.pipeline("tasks", steps, str(tmp_path), slurm, "saev-test")
    assert [outcome.get() for outcome in outcomes] == [f"{tmp_path}/first", f"{tmp_path}/second"]


def test_a_job_whose_predecessor_fails_does_not_run(
    slurm: launch.SlurmConfig, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "first.guarded").touch()
    steps = {"first": (), "second": ("first",)}
    first, second = launch.pipeline("tasks", steps, str(tmp_path), slurm, "saev-test")
    assert "first is not allowed" in first.error
    assert re.search(r"cancelled, because a job that it was to follow failed \(Depend", second.error)


def test_the_queue_is_shown_while_a_node_is_drained(
    slurm: launch.SlurmConfig, caplog: pytest.LogCaptureFixture
) -> None:
    host = os.uname().nodename.partition(".")[0]
    subprocess.run(["scontrol", "update", f"node={host}", "state=drain", "reason=test"], check=True)
    caplog.set_level("INFO", "saev")
    try:
        waiting = in_thread([3], slurm, "tasks:square")
        wait_for(lambda: re.search(r"1 job\(s\): 1 pending \(.*(Drain|DRAINED|NotAvail)", caplog.text), 90)
    finally:
        subprocess.run(["scontrol", "update", f"node={host}", "state=resume"], check=True)
    (outcome,) = waiting.result(timeout=90)
    assert outcome.get() == 9 and "1 job(s): 1 done" in caplog.text


def test_a_preempted_job_is_queued_again(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    """PreemptMode=REQUEUE, as in the partition debug: nextgen's job takes all cores, then the first goes on."""
    low = dataclasses.replace(slurm, slurm_partition="debug", n_cpus=16)
    waiting = in_thread([str(tmp_path / "runs")], low, "tasks:second_time")
    wait_for((tmp_path / "runs").exists)
    (high,) = launch.run("tasks:square", [3], dataclasses.replace(slurm, n_cpus=16), "saev-test")
    (outcome,) = waiting.result(timeout=120)
    assert (high.get(), outcome.get()) == (9, 2)


def test_from_a_real_allocation(slurm: launch.SlurmConfig) -> None:
    source = (
        "from saev import launch\n"
        f"cfg = launch.SlurmConfig('test', 'nextgen', 0.2, n_gpus=0, n_cpus=1, log_to={slurm.log_to!r})\n"
        "print([o.get() for o in launch.run('tasks:square', [2, 3], cfg, 'saev-test')])"
    )
    command = ["salloc", "--account=test", "--partition=debug", "--ntasks=1", "--mem-per-cpu=300"]
    done = subprocess.run([*command, sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[4, 9]\n", done.stderr


# ---- what was submitted is what a result is of ----


def test_results_of_another_job_with_the_same_id(slurm: launch.SlurmConfig) -> None:
    """As where two clusters share a disk, or Slurm counts anew."""
    (outcome,) = launch.run("tasks:square", [5], slurm, "saev-test")
    (job_id,) = submitted(slurm)
    log_to = pathlib.Path(slurm.log_to)
    for i in range(1, 30):
        shutil.copy(log_to / f"{job_id}_0_result.pkl", log_to / f"{int(job_id) + i}_0_result.pkl")
    (other,) = launch.run("tasks:square", [9], slurm, "saev-test")
    assert (outcome.get(), other.get()) == (25, 81)


def test_only_jobs_that_can_be_waited_for(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    list(launch.run("tasks:square", [3], slurm, "saev-test"))
    list(launch.run("tasks:crash", [3], slurm, "saev-test"))
    right, failed = sorted(submitted(slurm), key=int)

    def after(job_id: str) -> list[launch.Outcome]:
        return list(launch.run("tasks:square", [4], dataclasses.replace(slurm, after=(job_id,)), "saev-test"))

    assert after(right)[0].get() == 16
    for job_id, why in (("99999999", "knows no such job"), (f"{right}_7", "knows no"), (failed, "this job")):
        with pytest.raises(errors.UserError, match=f"--after {job_id}: .*{why}"):
            after(job_id)


def test_two_equal_commands_at_once_submit_one_job(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    fpath = tmp_path / "done"
    both = [in_thread([str(fpath)], slurm) for _ in range(2)]
    assert [outcome.get() for waiting in both for outcome in waiting.result(60)] == [str(fpath)] * 2
    assert len(submitted(slurm)) == 1


def test_a_task_that_dies_fails_its_job(slurm: launch.SlurmConfig) -> None:
    for argument, why in (
        ("killed", "was killed by the system|without a result"),
        ("refused", "is too large"),
    ):
        (outcome,) = launch.run("tasks:second_task", [argument], slurm, "saev-test", n_tasks=2)
        assert re.search(why, outcome.error) and outcome.value is None


def test_variables_of_sbatch_do_not_override_flags(
    slurm: launch.SlurmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "7")
    (outcome,) = launch.run("tasks:variable", ["SLURM_JOB_PARTITION"], slurm, "saev-test")
    assert outcome.get() == "nextgen"
    unsaid = dataclasses.replace(slurm, slurm_partition="")
    (outcome,) = launch.run("tasks:variable", ["SLURM_JOB_PARTITION"], unsaid, "saev-test")
    assert outcome.get() == "other"


def test_a_job_that_no_node_can_run(slurm: launch.SlurmConfig) -> None:
    """It is cancelled; where nobody waited, the command with the right flag cancels it and submits another."""
    large = dataclasses.replace(slurm, n_cpus=64)
    (outcome,) = launch.run("tasks:square", [3], large, "saev-test")
    assert (
        "was cancelled, because the partition has less than" in outcome.error and "--n-cpus" in outcome.error
    )
    with pytest.raises(SystemExit):
        launch.run("tasks:square", [4], dataclasses.replace(large, slurm_wait=False), "saev-test")
    wait_for(lambda: queue_says(max(submitted(slurm), key=int), "Reason", str) == "PartitionConfig")
    (outcome,) = launch.run("tasks:square", [4], slurm, "saev-test")
    assert outcome.get() == 16


# ---- python -m saev.jobs ----


def jobs(slurm: launch.SlurmConfig, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "saev.jobs", *args, "--log-to", slurm.log_to]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_jobs_lists_attaches_and_collects(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    assert "no submissions here" in jobs(slurm).stderr
    files = [str(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(SystemExit):
        launch.run("tasks:touch_later", files, dataclasses.replace(slurm, slurm_wait=False), "saev-test")
    (array_id,) = {job_id.partition("_")[0] for job_id in submitted(slurm)}
    early = jobs(slurm, "collect")
    assert early.returncode == 2 and "error: not finished: 2 " in early.stderr
    done = jobs(slurm, "attach", array_id)
    assert done.returncode == 0 and done.stdout.split() == files
    assert jobs(slurm, "collect").stdout.split() == files
    assert re.match(rf"{array_id}  \S+ \S+  saev-test: 2 done\n    in ", jobs(slurm).stdout)
    assert "7: no such submission" in jobs(slurm, "collect", "7").stderr
    assert jobs(slurm, "cancel").stdout == "no job is left to cancel\n"


def test_jobs_retries_a_sweep(make_shards, slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    """One of two runs diverges, and does so again; the other is not trained again."""
    shards, _ = make_shards(n_imgs=30, n_patches=8, d_vit=16, layers=(0,), per_shard=10)
    (tmp_path / "sweep.toml").write_text("lr = [1e-3, 1e20]")
    train = [
        "--n-patches",
        "2000",
        "--batch-size",
        "200",
        "--ckpt-to",
        str(tmp_path / "ck"),
        "--wandb-project",
        "",
    ]
    train += ["--sweep", str(tmp_path / "sweep.toml"), "--data.shard-root", str(shards), "--device", "cpu"]
    train += ["--max-per-job", "1", *ON_SLURM, "--log-to", slurm.log_to, "sae:relu"]
    done = subprocess.run([sys.executable, "train.py", *train], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.strip().endswith("sae.pt") and "is not finite" in done.stderr
    assert re.search(r"1 done; 1 failed", done.stderr) and len(submitted(slurm)) == 2
    (name,) = {line.split()[3] for line in jobs(slurm).stdout.splitlines() if line[0] != " "}
    assert name == "saev-train-sweep:"
    again = jobs(slurm, "retry")
    assert again.returncode == 2 and again.stdout == done.stdout and len(submitted(slurm)) == 3
    run = json.loads((pathlib.Path(done.stdout.strip()).parent / "config.json").read_text())
    assert run["code"]["job"] == submitted(slurm)[0] and len(run["code"]["commit"]) == 40
    assert run["code"]["command"] == ["train.py", *train] and run["code"]["folder"] == str(ROOT)


def test_the_same_sweep_divided_in_another_way(
    make_shards, slurm: launch.SlurmConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running jobs are found by config (--max-per-job), and so is what is done (--retry-failed)."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shards, _ = make_shards(n_imgs=100, n_patches=8, d_vit=16, layers=(0,), per_shard=20)
    (tmp_path / "sweep.toml").write_text("max_grad_norm = [1.0, 2.0]")
    more = ("--sweep", str(tmp_path / "sweep.toml"), *ON_SLURM, "--log-to", slurm.log_to)
    command = train_command(shards, tmp_path / "ck", *more)
    together = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: [*tmp_path.glob("ck/*/metrics.jsonl")])
    (job_id,) = submitted(slurm)
    command[2:2] = ["--max-per-job", "1"]
    alone = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert f"1 job(s) in the queue, 0 done: {job_id}" in alone.stderr and submitted(slurm) == [job_id]
    assert alone.returncode == 0 and len(alone.stdout.split()) == 2, alone.stderr
    assert together.communicate(timeout=60)[0] == alone.stdout
    command[2:2] = ["--retry-failed"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert again.stdout == alone.stdout and submitted(slurm) == [job_id]


# ---- the commands ----


def saev(*args: object, cwd: pathlib.Path = ROOT) -> list[str]:
    """Lines that the command prints."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
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


def pipeline(dpath: pathlib.Path, cub: pathlib.Path, n_jobs: int, *where: object) -> dict[str, bytes]:
    """Dump (4 shards) and a sweep of two; the contents of what they made, by name."""
    dump = ["--device", "cpu", "--dump-to", dpath / "shards", "--max-patches-per-shard", 170]
    dump += ["--n-jobs", n_jobs, *where]
    (shards,) = saev("-m", "saev.data", *VIT, *dump, "data:cub200", "--data.root", cub)
    (dpath / "sweep.toml").write_text("[[sae]]\ntype = 'top-k'\n[[sae]]\ntype = 'relu'\n")
    train = ["--n-patches", 2000, "--batch-size", 200, "--ckpt-to", dpath / "ck", "--wandb-project", ""]
    train += ["--sweep", dpath / "sweep.toml", "--data.shard-root", shards, "--device", "cpu", *where]
    ckpts = saev("train.py", *train)
    assert len(ckpts) == 2
    made = {f.name: f.read_bytes() for f in pathlib.Path(shards).iterdir() if f.name != "code.json"}
    return made | {pathlib.Path(c).parent.name: pathlib.Path(c).read_bytes() for c in ckpts}


def test_the_commands_give_on_slurm_what_they_give_here(tmp_path: pathlib.Path) -> None:
    cub = tmp_path / "CUB_200_2011"
    minicub.draw(cub, n_imgs=40)
    where = ["--slurm-acct", "test", "--slurm-partition", "nextgen", "--n-gpus", 0, "--n-cpus", 2]
    here = pipeline(tmp_path / "here", cub, 1)
    there = pipeline(tmp_path / "there", cub, 3, *where, "--n-hours", 0.2, "--log-to", tmp_path / "logs")
    assert len(list((tmp_path / "logs").glob("*.pkl"))) > 0
    assert here.keys() == there.keys() and "acts000003.bin" in here and len(here) > 10
    assert [name for name in here if here[name] != there[name]] == []


def test_a_dump_whose_tasks_are_killed_goes_on(tmp_path: pathlib.Path) -> None:
    """Both tasks get SIGKILL when some shards are there; the same command ends with the bytes of an undisturbed dump."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(240):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(root / f"{i:03}.png")
    dump = [sys.executable, "-m", "saev.data", *VIT, "--device", "cpu", "--vit-batch-size", "1"]
    dump += ["--max-patches-per-shard", "17"]  # an image a shard
    data = ["data:image-folder", "--data.root", str(root)]
    subprocess.run([*dump, "--dump-to", tmp_path / "here", *data], cwd=ROOT, check=True)

    dump += [
        "--n-jobs",
        "2",
        "--slurm-acct",
        "test",
        "--slurm-partition",
        "nextgen",
        "--n-gpus",
        "0",
        "--n-cpus",
        "1",
    ]
    dump += ["--dump-to", str(tmp_path / "there"), "--log-to", str(tmp_path / "logs"), *data]
    process = subprocess.Popen(dump, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(tmp_path.glob("there/*/acts*.json"))) > 5)
    (array_id,) = {p.stem.split("_")[0] for p in (tmp_path / "logs").glob("*submitted.pkl")}
    subprocess.run(["scancel", "--full", "--signal=KILL", array_id], check=True)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and "Its log: " in stderr and "Traceback" not in stderr
    n_done = len(list(tmp_path.glob("there/*/acts*.json")))
    assert 5 < n_done < 240

    done = subprocess.run(dump, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    (here,) = (tmp_path / "here").iterdir()
    there = pathlib.Path(done.stdout.strip())
    assert sorted(f.name for f in here.iterdir()) == sorted(f.name for f in there.iterdir())
    assert [f.name for f in here.iterdir() if f.read_bytes() != (there / f.name).read_bytes()] == [
        "code.json"
    ]


# ---- training ----


def train_command(shards: pathlib.Path, ckpt_to: pathlib.Path, *more: str) -> list[str]:
    """Some 10 to 30 seconds of training, two processes at most."""
    return [
        *(sys.executable, "train.py", "--data.shard-root", str(shards)),
        *("--n-patches", str(3000 * 64), "--batch-size", "64", "--log-every", "500"),
        *("--lr", "1e-3", "--wandb-project", "", "--device", "cpu", "--ckpt-to", str(ckpt_to)),
        *(*more, "sae:batch-top-k", "--sae.exp-factor", "4", "--sae.top-k", "4"),
    ]


ON_SLURM = (
    *("--slurm-acct", "test", "--slurm-partition", "nextgen", "--n-gpus", "0"),
    *("--n-cpus", "1", "--n-hours", "0.2"),
)


def test_training_out_of_time_goes_on_to_the_same_weights(
    make_shards, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR2 in the middle, with wandb: the state is saved, the job queued again, and nothing is trained twice."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    shards, _ = make_shards(n_imgs=100, n_patches=8, d_vit=16, layers=(0,), per_shard=20)
    (here,) = saev(*train_command(shards, tmp_path / "here")[1:])
    logs = tmp_path / "logs"
    command = train_command(
        shards, tmp_path / "there", *ON_SLURM, "--log-to", str(logs), "--wandb-project", "p"
    )
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(f.stat().st_size for f in tmp_path.glob("there/*/metrics.jsonl")))
    (job_id,) = {p.stem.removesuffix("_submitted") for p in logs.glob("*submitted.pkl")}
    subprocess.run(["scancel", "--signal=USR2", job_id.split("_")[0]], check=True)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    there = pathlib.Path(stdout.strip())
    log = "".join(f.read_text() for f in logs.glob("*.out"))
    assert "SIGUSR2: saving after this step" in log and "continuing after step" in log
    assert there.read_bytes() == pathlib.Path(here).read_bytes()
    assert len([*there.parent.glob("wandb/offline-run-*")]) == 2


@pytest.mark.parametrize("nodes", [(), ("--n-nodes", "2", "--slurm-partition", "pair")])
def test_two_tasks_share_the_batches_of_one_sae(
    nodes: tuple[str, ...], make_shards, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one node, and on two."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shards, _ = make_shards(n_imgs=100, n_patches=8, d_vit=16, layers=(0,), per_shard=20)
    few = ("--n-patches", str(60 * 64))
    (here,) = saev(*train_command(shards, tmp_path / "here", *few)[1:])
    more = (*few, *ON_SLURM, "--log-to", str(tmp_path / "logs"), "--data-parallel", "2", *nodes)
    (there,) = saev(*train_command(shards, tmp_path / "there", *more)[1:])
    mine, theirs = nn.load(here).state_dict(), nn.load(there).state_dict()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
    (job_id,) = submitted_to(tmp_path / "logs")
    assert queue_says(job_id, "NumNodes") == (2 if nodes else 1)


def queue_says(job_id: str, name: str, kind: type = int) -> object:
    shown = subprocess.run(
        ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--Format={name}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return kind(shown.stdout.strip())


def test_training_goes_on_when_its_node_dies(
    make_shards, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything on the node is killed, Slurm finds it down and queues the job again, and the node comes back."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shards, _ = make_shards(n_imgs=100, n_patches=8, d_vit=16, layers=(0,), per_shard=20)
    (here,) = saev(*train_command(shards, tmp_path / "here")[1:])
    logs, node = tmp_path / "logs", f"{os.uname().nodename.partition('.')[0]}2"
    command = train_command(
        shards, tmp_path / "there", *ON_SLURM, "--slurm-partition", "other", "--log-to", str(logs)
    )
    command[4:4] = ["--save-every", "0.01"]  # minutes
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: [*tmp_path.glob("there/*/state-*.pt")])
    (job_id,) = submitted_to(logs)
    state = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True).stdout
    pid_fpath = pathlib.Path(re.search(r"^SlurmdPidFile\s*= (\S+)", state, re.M)[1].replace("%n", node))
    os.kill(int(pid_fpath.read_text()), signal.SIGKILL)
    for pid in of_job(job_id):
        os.kill(pid, signal.SIGKILL)
    try:
        subprocess.run(["scontrol", "update", f"node={node}", "state=down", "reason=test"], check=True)
    finally:
        subprocess.run(["slurmd", "-N", node], check=True)  # a node that was down comes back when it answers
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert "continuing after step" in "".join(f.read_text() for f in logs.glob("*.out"))
    assert pathlib.Path(stdout.strip()).read_bytes() == pathlib.Path(here).read_bytes()
    assert queue_says(job_id, "RestartCnt") == 1


def of_job(job_id: str) -> list[int]:
    """The processes of a job and the one of Slurm that watches them."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        is_mine = f"SLURM_JOB_ID={job_id}".encode() in environment.split(b"\0")
        if is_mine or command.startswith(f"slurmstepd: [{job_id}.".encode()):
            found.append(int(folder.name))
    return found


# ---- the demo ----


def test_the_demo_as_dependent_jobs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its artefacts are those of the same steps here, in the same folder, which is part of the dump's hash."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ["--n-imgs", "40", "--n-patches", "20000", "--device", "cpu", "--dump-to", "demo"]
    (words,) = [words for words in page_commands() if "saev.demo" in words]
    shown = saev(*filled(words, {}, "--n-gpus", 0, "--n-cpus", 2, *small), cwd=tmp_path)
    names = {json.loads(f.read_text())["name"] for f in (tmp_path / "logs").glob("*_submission.json")}
    assert names == {f"saev-demo-{step}" for step in ("dump", "label", "train", "fit", "show", "evaluate")}
    (tmp_path / "demo").rename(tmp_path / "there")
    again = saev("-m", "saev.demo", *small, cwd=tmp_path)
    (tmp_path / "demo").rename(tmp_path / "here")
    tables, tables_here = ([line for line in lines if line.startswith("|")] for lines in (shown, again))
    assert len(tables) > 20 and tables == tables_here
    for pattern in (
        "shards/*/acts*",
        "checkpoints/*/sae.pt",
        "visuals/*/latents.csv",
        "visuals/*/data/**/*.js",
    ):
        there, here = (files_of(tmp_path / side, pattern) for side in ("there", "here"))
        assert there.keys() == here.keys() and there, pattern
        assert [name for name in here if here[name] != there[name]] == []


def files_of(dpath: pathlib.Path, pattern: str) -> dict[str, bytes]:
    fpaths = (fpath for fpath in dpath.glob(pattern) if fpath.is_file())
    return {str(fpath.relative_to(dpath)): fpath.read_bytes() for fpath in fpaths}


# ---- the page docs/slurm.md ----

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


def test_the_commands_of_the_page(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs as it stands, with other names and smaller numbers. (The demo's runs in a test of its own.)

    The first one's terminal is closed while it waits.
    """
    sweep, _, jobs, attach, collect, cancel, retry, dump, train, staging = page_commands()
    folder, disk = tmp_path / "a user's folder", tmp_path / "node"
    folder.mkdir()
    disk.mkdir()
    monkeypatch.setenv("TMPDIR", str(disk))
    (folder / "configs").symlink_to(ROOT / "configs")
    minicub.draw(tmp_path / "cub", n_imgs=20)
    (folder / "photos").symlink_to(tmp_path / "cub" / "images")
    slurm = ["--device", "cpu", "--n-gpus", 0, "--n-cpus", 1, "--log-to", "logs"]
    few = [*slurm, "--n-patches", 2000, "--batch-size", 200, "--wandb-project", "", "--stage-to", "$TMPDIR"]
    logs = folder / "logs"

    def run(words: list[str], values: dict[str, object], *more: object) -> list[str]:
        return saev(*filled(words, values, *more), cwd=folder)

    def newest() -> str:
        return max((f.name.partition("_")[0] for f in logs.glob("*_submission.json")), key=int)

    # dumped here first, so that the folder's name is known while the job waits
    at = dump.index("--slurm-acct")
    (shards,) = run([*dump[:at], *dump[at + 3 :]], {}, *VIT, "--device", "cpu")
    names: dict[str, object] = {"shards/HASH": shards}

    terminal, theirs = os.openpty()
    command = ["setsid", "--ctty", sys.executable, *filled(sweep, names, *few)]
    waiting = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while not re.search(rb"\b1 (pending|running)", shown):
        shown += os.read(terminal, 4096)
    os.close(terminal)
    assert waiting.wait(30) == -signal.SIGHUP
    first = newest()
    assert re.match(rf"{first}  \S+ \S+  saev-train-baseline: 1 (pending|running)", run(jobs, {})[0])
    ckpts = run(attach, {"1234": first})
    assert len(ckpts) == 9

    run(dump, names, *VIT, *slurm, "--slurm-extra", "hold")
    dumping = newest()
    run(train, names | {"1234": dumping}, *few)
    training = newest()
    assert queue_says(training, "Dependency:80", str) == f"afterok:{dumping}(unfulfilled)"
    assert run(cancel, {"1234": training}) == [f"cancelled {training}"]
    wait_for(lambda: f"    job {training} was cancelled" in "\n".join(run(jobs, {})))
    command = [sys.executable, *filled(collect, {})]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and f"job {training} was cancelled. Run the same command" in done.stderr
    run(retry, {"1234": training})
    subprocess.run(["scontrol", "release", dumping], check=True)
    (ckpt,) = run(attach, {"1234": newest()})
    assert newest() != training and set(run(collect, {})) == {*ckpts, ckpt, shards}

    copied = [f.name for f in logs.glob("*_log.out") if "--stage-to: copied" in f.read_text()]
    assert copied == [f"{first}_0_log.out"] and [*disk.glob("saev-staged/*/*/metadata.json")]
    job = ["srun", "--account=test", "--partition=nextgen", sys.executable]
    done = subprocess.run(
        [*job, *filled(staging, {"/scratch/me": tmp_path, "$TMPDIR": disk}, "--gb", "0.02")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "epoch from the copy" in done.stdout, done.stderr
    page = (ROOT / "docs" / "slurm.md").read_text()
    for command in re.findall("`((?:sacctmgr|sinfo)[^`]*)`", page):
        done = subprocess.run(
            command, shell=True, capture_output=True, text=True, env=os.environ | {"USER": "root"}
        )
        assert re.search("test.*normal" if "sacctmgr" in command else "nextgen.*infinite", done.stdout)


# ---- signals in the middle of every stage ----


@dataclasses.dataclass
class Interrupted:
    """A command on Slurm, whose job gets Slurm's warning in the middle of its work."""

    command: list[object]
    """With {} for "here" or "there" in the names of what it makes."""
    is_at_work: collections.abc.Callable[[pathlib.Path], object]
    """Whether the job with this log is."""
    then: collections.abc.Callable[[], object] = lambda: None
    """Called when the job has the warning."""

    def of(self, side: str, *more: object) -> list[str]:
        return filled([str(word).replace("{}", side) for word in self.command], {}, *more)

    def run(self, logs: pathlib.Path) -> None:
        command = [sys.executable, *self.of("there", *ON_SLURM, "--log-to", logs)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: [*logs.glob("*_log.out")], 120)
        (log,) = logs.glob("*_log.out")
        job_id = log.name.partition("_")[0]
        wait_for(lambda: pid_of_stage(job_id), 120)
        pid = pid_of_stage(job_id)
        wait_for(lambda: self.is_at_work(log), 120, 0.005)
        warn(job_id, pid)
        self.then()
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0 and log.read_text().count("Caught signal SIGUSR2") == 1, stderr
        assert queue_says(job_id, "RestartCnt") == 1


def pid_of_stage(job_id: str) -> int:
    """The process of a job's task, which starts all others of its Pythons. 0: it has not begun."""
    for pid in sorted(of_job(job_id)):
        with contextlib.suppress(OSError):
            if pathlib.Path(f"/proc/{pid}/cmdline").read_text().startswith(sys.executable):
                return pid
    return 0


def warn(job_id: str, pid: int) -> None:
    """Sends Slurm's warning to a job, whose process is stopped until it has it."""

    def has_it() -> int:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"^ShdPnd:\s*(\w+)", status, re.M)[1], 16) >> (signal.SIGUSR2 - 1) & 1

    os.kill(pid, signal.SIGSTOP)
    try:
        subprocess.run(["scancel", "--signal=USR2", job_id], check=True)
        wait_for(has_it)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_stages_out_of_time_end_with_the_same_files(tmp_path: pathlib.Path) -> None:
    """All stages but training get Slurm's warning while they work, and are queued again."""
    cub, masks = tmp_path / "CUB_200_2011", tmp_path / "masks"
    minicub.draw(cub, n_imgs=60)
    minicub.draw_parts(masks, n_imgs=60)
    data = ["data:cub200", "--data.root", cub]
    (shards,) = here("-m", "saev.data", *VIT, "--device", "cpu", "--dump-to", tmp_path / "shards", *data)
    (tmp_path / "two.toml").write_text("seed = [0, 1]")
    train = ["--n-patches", 2000, "--batch-size", 200, "--ckpt-to", tmp_path / "ck", "--wandb-project", ""]
    train += ["--sweep", tmp_path / "two.toml", "--data.shard-root", shards, "--device", "cpu"]
    ckpt, other = here("train.py", *train)

    def writes_to_log(log: pathlib.Path) -> bool:
        return "memory: about" in log.read_text()

    def writes(pattern: str) -> collections.abc.Callable[[pathlib.Path], object]:
        return lambda _: [*(tmp_path / "there").glob(pattern)]

    def reads_pipe(_: pathlib.Path) -> bool:
        with contextlib.suppress(OSError):  # nobody reads
            writer.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writer)

    def mend_pipe() -> None:
        mask.replace(pipe)
        os.close(*writer)

    to = ["--device", "cpu", "--dump-to", tmp_path / "{}"]
    dump = ["-m", "saev.data", *VIT, "--vit-batch-size", 1, "--max-patches-per-shard", 17, *to, *data]
    label = [
        "-m",
        "saev.labels",
        "--shard-root",
        shards,
        "--name",
        "{}",
        "masks:index",
        "--masks.root",
        masks,
    ]
    label += ["images:cub200", "--images.root", cub]
    to += ["--data.shard-root", shards]
    codes = ["-m", "saev.codes", "--scorer", ckpt, *to, "--max-patches-per-shard", 16]
    compare = ["-m", "saev.compare", "--scorer", ckpt, "--other", other, *to]
    show = ["visuals.py", "--ckpt", ckpt, *to, "--dump-to", tmp_path / "{}" / "gallery", "--n-images", 10]
    show += ["images:cub200", "--images.root", cub]
    evaluate = ["protoeval.py", "--cub-root", cub, "--train-data.shard-root", shards, *to[:-2]]
    evaluate += ["--n-prototypes", 8, 64, "--n-train", 8, -1, "--n-boot", 20000]
    evaluate += ["--scorers-to", tmp_path / "scorers", "scorer:sae", "--scorer.ckpt", ckpt]
    stages = {
        "dump": Interrupted(dump, writes("*/acts*.json")),
        "labels": Interrupted(label, reads_pipe, mend_pipe),
        "codes": Interrupted(codes, writes("*/*/shard.json")),
        "compare": Interrupted(compare, writes(".*.partial/*")),
        "show": Interrupted(show, writes_to_log),
        "evaluate": Interrupted(evaluate, writes_to_log),
    }
    for stage in stages.values():
        here(*stage.of("here"))
    pipe = max(masks.rglob("*.png"))
    mask, writer = pipe.rename(tmp_path / "mask.png"), []
    os.mkfifo(pipe)
    with concurrent.futures.ThreadPoolExecutor(len(stages)) as pool:
        for done in [pool.submit(stage.run, tmp_path / name) for name, stage in stages.items()]:
            done.result()
    made = {side: files_of(tmp_path / side, "**/*.*") for side in ("here", "there")}
    for side, files in made.items():
        files["labels"] = (pathlib.Path(shards) / f"labels-{side}.bin").read_bytes()
    assert made["here"].keys() == made["there"].keys() and len(made["here"]) > 100
    differ = {pathlib.Path(f).name for f in made["here"] if made["here"][f] != made["there"][f]}
    assert differ == {"code.json", "config.json", "about.json", "manifest.json"}  # which name the commands


def here(*args: object) -> list[str]:
    """Lines that a command prints in this process."""
    done = inprocess.run(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()
