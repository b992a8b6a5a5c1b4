"""Jobs on a real Slurm. Runs where one answers (tests/slurm/up brings up a small Slurm); skips elsewhere.

Commands: test_slurm_commands.py, and longer ones: test_slurm_stages.py. The three run at the same time, so only this file
fills or drains a node (the third), and only test_slurm_commands.py takes one down (the second).
"""

import collections.abc
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from slurm_cluster import MARKS, ROOT, TASKS, in_thread, queue_says, submitted, wait_for

from saev import errors, launch

pytest_plugins = ["slurm_fixtures"]
pytestmark = MARKS


Minute = tuple[collections.abc.Callable[..., collections.abc.Iterator[launch.Outcome]], pathlib.Path]


@pytest.fixture(scope="module")
def minute(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[Minute]:
    """A command that waits for a job of more than a minute, and the job's file. The job begins with the first test, so
    that the last need not wait."""
    folder = tmp_path_factory.mktemp("minute")
    cfg = launch.SlurmConfig("test", "short", n_hours=1 / 60, n_cpus=1, n_gpus=0, log_to=str(folder / "logs"))

    def run(**changes: bool) -> collections.abc.Iterator[launch.Outcome]:
        now = dataclasses.replace(cfg, **changes)
        return launch.run("tasks:sixty_seconds", [str(folder / "seconds")], now, "saev-test", is_lasting=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TASKS))
        with pytest.raises(SystemExit):
            run(slurm_wait=False)
    yield run, folder / "seconds"
    subprocess.run(["scancel", *submitted(cfg)], capture_output=True, check=False)


def test_an_array_returns_its_results_in_order(minute: Minute, slurm: launch.SlurmConfig) -> None:
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


# ---- bad days ----


def errors_of(outcomes: collections.abc.Iterable[launch.Outcome]) -> list[str]:
    return [outcome.error for outcome in outcomes]


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
    assert " failed: the time limit is shorter than the job's start-up. Raise --n-hours. Its" in outcome.error
    assert queue_says(max(submitted(slurm), key=int), "RestartCnt") == 3


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
        f"import time; open({str(tmp_path / n)!r}, 'w'); time.sleep({s})" for n, s in (("a", 600), ("b", 6))
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
    (high,) = launch.run("tasks:square", [3], dataclasses.replace(low, slurm_partition="high"), "saev-test")
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
    (job_id,) = submitted(short)
    assert queue_says(job_id, "State", str) == "CANCELLED"


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
    node = f"{os.uname().nodename.partition('.')[0]}3"
    subprocess.run(["scontrol", "update", f"node={node}", "state=drain", "reason=test"], check=True)
    caplog.set_level("INFO", "saev")
    try:
        waiting = in_thread([3], dataclasses.replace(slurm, slurm_partition="high"), "tasks:square")
        wait_for(lambda: re.search(r"1 job\(s\): 1 pending \(.*(Drain|DRAINED|NotAvail)", caplog.text), 90)
    finally:
        subprocess.run(["scontrol", "update", f"node={node}", "state=resume"], check=True)
    (outcome,) = waiting.result(timeout=90)
    assert outcome.get() == 9 and "1 job(s): 1 done" in caplog.text


def test_a_preempted_job_is_queued_again(slurm: launch.SlurmConfig, tmp_path: pathlib.Path) -> None:
    """PreemptMode=REQUEUE, as in the partition low: high's job takes all cores, then the first goes on."""
    low = dataclasses.replace(slurm, slurm_partition="low", n_cpus=16)
    waiting = in_thread([str(tmp_path / "runs")], low, "tasks:second_time")
    wait_for((tmp_path / "runs").exists)
    (high,) = launch.run("tasks:square", [3], dataclasses.replace(low, slurm_partition="high"), "saev-test")
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


def test_a_time_limit_of_a_minute(minute: Minute, slurm: launch.SlurmConfig) -> None:
    """Slurm itself sends its warning, 15 s or more before the end, so one start is never enough for 60 s."""
    run, seconds = minute
    (outcome,) = run()
    assert outcome.get() >= 2 and seconds.stat().st_size == 60
