"""Running a stage, and ending with an exit code that tells the truth."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time

import beartype
import pytest

from saev import commands, console, errors, fields, helpers, jobs, launch, provenance, sweeps
from saev.data import config as data_config
from saev.formats import jsonfile
from saev.launch import queue, slurm, submissions, watch
from saev.launch.entry import ended_by_signals
from saev.training import config as training_config
from tests import inprocess

ROOT = pathlib.Path(__file__).parent.parent
LOCAL = launch.SlurmConfig()


def ends(raising: str) -> tuple[int, str]:
    """Exit code and stderr of an entry point that runs `raising`."""
    source = f"from saev import errors, launch\ndef main():\n    {raising}\nlaunch.entry(main)"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_entry() -> None:
    assert ends("pass") == (0, "")
    assert ends("raise errors.UserError('x.toml: bad. Do this.')") == (2, "error: x.toml: bad. Do this.\n")
    assert ends("raise KeyboardInterrupt") == (130, "interrupted; run the same command again to continue.\n")
    code, stderr = ends("raise RuntimeError('a bug')")
    assert code == 1 and "Traceback" in stderr  # our own bugs stay loud


def values(target: str, args: list[object], **kwargs: int) -> list[object]:
    return [outcome.get() for outcome in launch.run(target, args, LOCAL, "x", **kwargs)]


def test_local_results_are_in_order() -> None:
    assert values("operator:neg", [3, 1, 2]) == [-3, -1, -2]
    assert values("operator:neg", [3, 1, 2], n_processes=3) == [-3, -1, -2]


def test_local_errors_pass_through() -> None:
    with pytest.raises(errors.UserError, match="no such shard directory"):
        values("saev.data.activations:Activations", [data_config.Shards("gone")])


def test_one_that_fails_does_not_keep_the_others_from_running(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.npy").touch()
    gone, listed = launch.run("os:listdir", [str(tmp_path / "gone"), str(tmp_path)], LOCAL, "x")
    assert gone.failed and "No such file" in gone.error
    assert listed == launch.Outcome(["a.npy"])


def test_stages_run_here_when_their_outcome_is_asked_for(tmp_path: pathlib.Path) -> None:
    """So a command that stops at the first failure does not run the others."""
    outcomes = launch.run("os:mkdir", [str(tmp_path / "a"), str(tmp_path / "b")], LOCAL, "x")
    assert not next(outcomes).failed
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_a_process_that_fails_ends_the_others(tmp_path: pathlib.Path) -> None:
    args = ["time.sleep(60)", "raise SystemExit(3)"]
    started = time.monotonic()
    (lost,) = launch.run("tests.slurm.tasks:execute", args, LOCAL, "x", n_processes=2)
    assert time.monotonic() - started < 50
    assert lost == launch.Outcome(
        error="local job 1: died (exit code 3). Run the same command again; it continues."
    )


def test_what_was_done_before_a_failure_is_kept() -> None:
    """In a partial failure the message names no job, as it names what failed; the outcome holds the rest."""
    (outcome,) = launch.run("tests.slurm.tasks:half", [[1, 2]], LOCAL, "x", n_tasks=2)
    assert outcome == launch.Outcome([1], "2 is too large.") and not outcome.failed
    assert outcome.of("job 7") == outcome
    with pytest.raises(errors.UserError, match="2 is too large") as err:
        outcome.get()
    assert err.value.done == [1]


def test_importing_saev_changes_nothing() -> None:
    code = (
        "import os; before = dict(os.environ); import saev.launch, saev.nn; assert dict(os.environ) == before"
    )
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)


def test_commands_limit_how_long_openmp_spins() -> None:
    code = "import os; from saev import launch; launch.entry(lambda: print(os.environ['GOMP_SPINCOUNT']))"
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "10000\n"
    env["GOMP_SPINCOUNT"] = "7"  # the user's own stays
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "7\n"


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
    command = [sys.executable, "train.py", "--data.shard-root", str(dpath), "--ckpt-to", str(tmp_path / "ck")]
    command += ["--n-patches", "100_000_000", "--batch-size", "64", "--log-every", "1", "--wandb-project", ""]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (logs := list(tmp_path.glob("ck/*/metrics.jsonl"))) or not logs[0].stat().st_size:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "interrupted; run the same command again to continue."
    assert "Traceback" not in stderr
    config, metrics, state = sorted(p.name for p in logs[0].parent.iterdir())
    assert (config, metrics) == ("config.json", "metrics.jsonl") and state.startswith("state-")


def test_errors_of_the_operating_system_are_one_line() -> None:
    code, stderr = ends("open('/proc/nowhere', 'w')")
    assert (code, stderr.count("\n")) == (2, 1) and stderr.startswith("error: /proc/nowhere: No such file")
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
    assert submissions.exception_line(trace) == "ValueError: first"
    assert submissions.exception_line("nothing like a traceback") == "it raised an exception"


def test_dry_run_into_head() -> None:
    """A reader that stops early is no bug of ours."""
    code = "from saev import console, launch; launch.entry(lambda: console.show([launch.SlurmConfig()] * 10_000))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1"
    done = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("# 1 of 10000\n", "")


def test_each_process_of_a_job_gets_a_gpu() -> None:
    slurm_cfg = launch.SlurmConfig("A", slurm_gpu_type="a100", mem_gb=3)
    asked = slurm.parameters(slurm_cfg, "x", 4, 5, ROOT)
    assert (asked["gpus_per_node"], asked["ntasks_per_node"], asked["mem"]) == ("a100:4", 4, "3GB")
    no_gpus = slurm.parameters(launch.SlurmConfig("A", n_gpus=0), "x", 4, 5, ROOT)
    assert not {"gpus_per_node", "mem", "qos", "dependency"} & no_gpus.keys()
    assert (asked["nodes"], asked["signal_delay_s"]) == (1, 75)
    two = launch.SlurmConfig("A", n_nodes=2)
    asked = slurm.parameters(two, "x", 4, 60, ROOT)
    assert (asked["nodes"], asked["ntasks_per_node"], asked["gpus_per_node"]) == (2, 2, "2")
    assert asked["signal_delay_s"] == 90
    with pytest.raises(errors.UserError, match="--n-nodes 3: --data-parallel 4 must be a multiple of it"):
        training_config.Train(data_parallel=4, slurm=dataclasses.replace(two, n_nodes=3))


def test_wrong_slurm_flags() -> None:
    for hours in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(errors.UserError, match="--n-hours .* must be"):
            launch.SlurmConfig("A", n_hours=hours)
    with pytest.raises(errors.UserError, match="--slurm-extra '=lab': must be key=value"):
        launch.SlurmConfig("A", slurm_extra=("=lab",))


def test_job_ids_are_shown_in_few_words() -> None:
    assert slurm.shown(["7_0", "7_1", "7_2", "9", "8_4"]) == "7_[0-2], 9, 8_4"
    assert slurm.shown(["7_9", "7_0", "7_2", "7_0", "7_3"]) == "7_[0,2-3,9]"


def test_where_a_stage_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here; in processes of its own if several share the work; here again under torchrun, which started several."""
    target, here = "tests.slurm.tasks:process", os.getpid()
    assert values(target, [0]) == [here]
    assert values(target, [0], n_tasks=2) != [here]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert values(target, [0], n_tasks=2) == [here]


# ---- the user's defaults ----


def defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, text: str) -> launch.SlurmConfig:
    (tmp_path / "saev").mkdir(exist_ok=True)
    (tmp_path / "saev" / "slurm.toml").write_text(text)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return launch.of_user()


def test_defaults_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    text = 'slurm_acct = "lab"\nslurm_partition = "gpu"\nn_hours = 2\nslurm_setup = ["module load cuda"]\n'
    cfg = defaults(monkeypatch, tmp_path, text)
    assert (cfg.n_hours, cfg.slurm_setup) == (2.0, ("module load cuda",))
    assert not cfg.is_on and not cfg.slurm_acct  # the file alone sends nothing to Slurm
    assert launch.SlurmConfig(on_slurm=True).slurm_acct == "lab"
    typed = launch.SlurmConfig(slurm_partition="cpu")
    assert (typed.slurm_acct, typed.slurm_partition) == ("lab", "cpu")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "gone"))
    assert launch.of_user() == launch.SlurmConfig()


def test_the_defaults_that_the_docs_show(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    page = (ROOT / "docs" / "slurm.md").read_text()
    (shown,) = re.findall(r"^(?:    \w+ = .*\n)+", page, re.M)
    cfg = defaults(monkeypatch, tmp_path, shown)
    assert (cfg.n_hours, cfg.slurm_setup) == (12.0, ("module load cuda",))
    assert launch.SlurmConfig(on_slurm=True).slurm_partition == "gpu"


def test_defaults_are_shown_by_dry_run(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    defaults(monkeypatch, tmp_path, "mem_gb = 77\n")
    done = subprocess.run([sys.executable, "train.py", "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert "    mem_gb = 77\n" in done.stdout


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("mem_gb = ", r"slurm.toml: cannot be read \("),
        ("mem = 3", "slurm.toml: unknown key 'mem'. Valid keys: slurm_acct, "),
        ("on_slurm = true", "slurm.toml: unknown key 'on_slurm'"),
        ("mem_gb = 'much'", "slurm.toml: mem_gb = 'much': must be int"),
        ("slurm_setup = 'module load cuda'", "must be a list of texts"),
        ("n_hours = -1", "slurm.toml: --n-hours -1.0: must be more than 0"),
    ],
)
def test_wrong_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, text: str, error: str
) -> None:
    with pytest.raises(errors.UserError, match=error):
        defaults(monkeypatch, tmp_path, text)


@pytest.mark.parametrize("command", ["train", "jobs"])
def test_help_with_wrong_defaults(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """The help comes first, then what is wrong. Another command refuses."""
    (tmp_path / "saev").mkdir()
    (tmp_path / "saev" / "slurm.toml").write_text("mem = 3")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    line = [sys.executable, "-m", "saev", command]
    shown = subprocess.run([*line, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "--log-to" in shown.stdout
    assert re.fullmatch(r"warning: \S+slurm.toml: unknown key 'mem'. Valid keys: .*\n", shown.stderr)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and re.match(r"error: \S+slurm.toml: unknown key 'mem'.", done.stderr)


def test_jobs_reads_the_users_log_to(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    defaults(monkeypatch, tmp_path, f"log_to = '{tmp_path}/mine'\n")
    assert jobs.Jobs().log_to == f"{tmp_path}/mine"


# ---- names ----


def test_what_distinguishes_jobs() -> None:
    cfgs = [training_config.Train(lr=lr) for lr in (0.5, 0.25, 0.125)]
    assert submissions.labels([[cfgs[0]], [cfgs[1], cfgs[2]]]) == ["lr = 0.5", "lr = 0.25 ... lr = 0.125"]
    dump = data_config.Dump(slurm=launch.SlurmConfig("A"))
    parts = [data_config.DumpJob(dump, i) for i in (0, 1)]
    assert submissions.labels(parts) == ["job_i = 0", "job_i = 1"]
    assert submissions.labels([3, 4]) == ["argument = 3", "argument = 4"]


def test_names_of_jobs() -> None:
    cfg = training_config.Train()
    assert sweeps.title("train", cfg, cfg.sae) == "saev-train-batch-top-k"
    assert sweeps.title("train", training_config.Train(sweep="a/lr 1.toml"), cfg.sae) == "saev-train-lr-1"
    assert sweeps.title("data", data_config.Dump(), "dinov2_vits14") == "saev-data-dinov2_vits14"


def test_groups_are_divided_evenly() -> None:
    cfgs = [training_config.Train(lr=0.1 / (i + 1)) for i in range(7)]
    assert [len(group) for group in sweeps.group(cfgs)] == [7]
    assert [len(group) for group in sweeps.group(cfgs, 3)] == [2, 2, 3]
    assert [cfg for group in sweeps.group(cfgs, 3) for cfg in group] == cfgs
    other = training_config.Train(seed=1)
    assert [len(group) for group in sweeps.group([*cfgs, other], 7)] == [7, 1]


def test_dry_run_tells_how_many_jobs(tmp_path: pathlib.Path) -> None:
    (tmp_path / "lr.toml").write_text(f"lr = {[1e-4 * (i + 1) for i in range(40)]}")
    command = [
        sys.executable,
        "train.py",
        "--sweep",
        str(tmp_path / "lr.toml"),
        "--dry-run",
        "--slurm-acct",
        "A",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("# 40 config(s) in 3 Slurm job(s)\n")


def test_many_errors_are_shortened() -> None:
    outcomes = [launch.Outcome(error=f"{i} is bad.") for i in range(5)]
    with pytest.raises(errors.UserError, match=r"^0 is bad. 1 is bad. 2 is bad. 2 more failed; see above.$"):
        launch.check(outcomes)
    launch.check([launch.Outcome(1)])


def test_failed_jobs_are_named() -> None:
    outcomes = [
        launch.Outcome(None, f"job {i} (lr = {i}) failed: x.", f"job {i} (lr = {i})") for i in range(25)
    ]
    with pytest.raises(
        errors.UserError, match=r"^2 of 3 jobs failed, as shown above: job 0 \(lr = 0\), job 1 \("
    ):
        launch.check([*outcomes[:2], launch.Outcome(1)])
    with pytest.raises(
        errors.UserError, match=r"job 19 \(lr = 19\) and 5 more. To submit only what failed again, add "
    ):
        launch.check(outcomes)


def test_an_error_is_shown_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """As it happens and, at the end, by the job's name; if there is only one job, at the end."""
    jobs = [submissions.Job("7_0", "a", "lr = 1"), submissions.Job("7_1", "b", "lr = 2")]
    for job, outcome in zip(jobs, (launch.Outcome(error="x is bad."), launch.Outcome(1)), strict=True):
        submissions.result_fpath(job.id, tmp_path).write_bytes(pickle.dumps(("success", outcome)))
    with pytest.raises(
        errors.UserError, match=r"^1 of 2 jobs failed, as shown above: job 7_0 \(lr = 1\). To"
    ):
        launch.check(watch.wait(jobs, tmp_path))
    assert caplog.text.count("job 7_0 (lr = 1): x is bad.") == 1
    caplog.clear()
    with pytest.raises(errors.UserError, match=r"^job 7_0 \(lr = 1\): x is bad.$"):
        launch.check(watch.wait(jobs[:1], tmp_path))
    assert not caplog.text


@pytest.mark.parametrize(
    ("message", "flags"),
    [
        ("Invalid account or account/partition combination specified", "--slurm-acct, --slurm-partition"),
        ("Batch job submission failed: Invalid partition name specified", "--slurm-partition"),
        ("Invalid qos specification", "--slurm-qos"),
        ("Invalid feature specification", "--slurm-constraint"),
        ("Memory specification can not be satisfied", "--mem-gb"),
        ("unrecognized option '--x=3'\nTry sbatch --help for more", "--slurm-extra"),
        ("I/O error writing script", "the flags that say where it runs .*"),
    ],
)
def test_a_refusal_names_the_flags(message: str, flags: str) -> None:
    why = queue.why_refused(f"sbatch: error: {message}\n")
    assert re.fullmatch(rf"{re.escape(message.splitlines()[0])}\. Check {flags}\.", why)


# ---- every stage ----

STAGES = ("data", "labels", "train", "visuals", "codes", "compare", "protoeval", "demo")
"""Commands that run as Slurm jobs. A new one belongs here."""
SLURM_FLAGS = {
    "slurm_acct": "lab",
    "slurm_partition": "gpu",
    "n_hours": 3.5,
    "mem_gb": 77,
    "n_cpus": 3,
    "n_gpus": 2,
    "log_to": "my logs",
    "slurm_qos": "high",
    "slurm_constraint": "a100",
    "slurm_gpu_type": "a100",
    "slurm_exclude": "node7",
    "slurm_setup": ("module load cuda",),
    "slurm_extra": ("nice=100",),
    "n_nodes": 1,
    "stage_to": "$TMPDIR",
    "max_parallel": 5,
    "max_per_job": 4,
    "after": ("7",),
}


@pytest.mark.parametrize("command", STAGES)
def test_every_stage_has_the_flags_of_slurm(command: str) -> None:
    switches = {"on_slurm": True, "slurm_wait": False, "retry_failed": True}
    assert {field.name for field in dataclasses.fields(launch.SlurmConfig)} == {*SLURM_FLAGS, *switches}
    words = ["--on-slurm", "--no-slurm-wait", "--retry-failed"]
    for name, value in SLURM_FLAGS.items():
        words += [fields.flag(name), *(value if isinstance(value, tuple) else [value])]
    done = inprocess.run("-m", "saev", command, "--dry-run", *words)
    assert re.match(r"# 1 config\(s\) in \d Slurm job\(s\)\n", done.stdout), done.stderr
    for name, value in (SLURM_FLAGS | switches).items():
        assert f"    {name} = {value!r}\n" in done.stdout


def test_all_stages_are_listed() -> None:
    cli = {name for name, (module, _) in commands.COMMANDS.items() if "launch.run(" in source_of(module)}
    assert cli | {"demo"} == {*STAGES}


def source_of(module: str) -> str:
    return (ROOT / f"{module.replace('.', '/')}.py").read_text()


# ---- what is shown while jobs run ----


def test_live_lines_are_replaced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    live = console.Live()
    live.show(["nowhere"])
    assert not live.is_on and capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    live = console.Live()
    live.show(["3 pending", "1 running"])
    live.show(["4 done"])
    live.clear()
    assert capsys.readouterr().err == "3 pending\n1 running\n\x1b[2F\x1b[J4 done\n\x1b[1F\x1b[J"


def test_states_of_jobs(tmp_path: pathlib.Path) -> None:
    jobs = [
        submissions.Job(job_id, job_id or "none", "") for job_id in ("1_0", "1_1", "1_2", "1_3", "1_4", "")
    ]
    outcomes = {"1_0": launch.Outcome(3), "1_1": launch.Outcome(error="bad")}
    rows = {
        "1_2": queue.Queued("PENDING", "Priority"),
        "1_3": queue.Queued("PENDING", "BeginTime", n_restarts=1),
        "1_4": queue.Queued("RUNNING"),
    }
    assert watch.count(jobs, outcomes, rows) == {
        "done": 1,
        "failed": 1,
        "not submitted yet (Slurm accepts no more)": 1,
        "pending (Priority)": 1,
        "requeued (BeginTime)": 1,
        "running": 1,
    }


def test_progress_is_read_from_the_logs(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    jobs = [submissions.Job(f"1_{i}", str(i), "") for i in range(3)]
    rows = {job.id: queue.Queued("RUNNING") for job in jobs}
    line = "[10:00:00] train 1 SAE(s): {}/800 steps, 87.4/s, {} s left\n"
    (tmp_path / "1_0_0_log.out").write_text(line.format(10, 600) + line.format(80, 240))
    (tmp_path / "1_1_0_log.out").write_text("x" * 9000 + line.format(400, 125))
    with caplog.at_level("INFO", "saev"):
        assert watch.States(tmp_path).show(jobs, {}, rows)
    assert "3 job(s): 3 running, 10 to 50% done, 4 min left" in caplog.text


def test_a_line_of_progress_is_what_is_read(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "saev"):
        list(helpers.progress(range(3), "dump", 3, "batches", every_s=0.0))
    assert re.search(watch.PROGRESS, caplog.messages[-1])


def test_a_job_that_never_begins_is_not_queued_again_for_ever() -> None:
    source = (
        "import os\nfrom saev import errors, launch\n"
        "stage = launch.Stage('operator:neg', 3)\n"
        "assert stage.checkpoint().function == stage\n"
        "os.environ['SLURM_RESTART_COUNT'] = '3'\n"
        "try:\n    stage.checkpoint()\nexcept errors.UserError as err:\n    print(err)\n"
        "print(stage.run(), stage.checkpoint().function == stage)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "the time limit is shorter than the job's start-up. Raise --n-hours\n-3 True\n"


def test_what_queues_a_job_again_outlives_it() -> None:
    """Slurm ends a requeued job's processes, scontrol among them, with SIGTERM. A real one of its own."""
    source = (
        "import subprocess\nfrom saev import launch\n"
        "launch.Stage('operator:neg', 3).checkpoint()\n"
        "subprocess.check_call(['sh', '-c', 'kill -TERM $$; echo returned'])"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "returned\n"), done.stderr


# ---- why a job ended ----


def slurm_prints(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """Puts a command of Slurm's into PATH that prints this. It is no Slurm: see test_slurm.py for a real one."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def test_a_memory_kill_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm with cgroups records it (the step, not the job, is OUT_OF_MEMORY), and as others write it to the log."""
    log, raise_it = tmp_path / "log", "was killed because it used more than its memory. Raise --mem-gb"
    slurm_prints(tmp_path, monkeypatch, "sacct", "FAILED|4G|\nFAILED||12K\nOUT_OF_MEMORY||4190208K\n")
    assert queue.why_lost("7", "FAILED", log) == f"{raise_it} (asked: 4G; last seen: 4190208K)"
    slurm_prints(tmp_path, monkeypatch, "sacct", "CANCELLED by 0|4G|\n")
    assert queue.why_lost("7", "", log).startswith("was cancelled. ")
    slurm_prints(tmp_path, monkeypatch, "sacct", "")
    assert queue.why_lost("7", "NODE_FAIL", log).startswith("ended with its node. ")
    assert queue.why_lost("7", "", log).startswith("left the queue before it began, ")
    log.write_text("a line\n")
    assert queue.why_lost("7", "", log) == "left the queue without a result"
    log.write_text(
        "slurmstepd-n1: error: StepId=7.0 exceeded memory limit (513683456 > 209715200), being killed\n"
    )
    assert queue.why_lost("7", "", log) == f"{raise_it} (asked: 0.2 GB; last seen: 0.5 GB)"
    log.write_text(
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.batch. Some of the step tasks have\n"
    )
    assert queue.why_lost("7", "FAILED", log) == f"{raise_it} (asked: unknown; last seen: unknown)"
    log.write_text("a line of a stage about oom_kill\nsrun: error: n1: task 0: Killed\n")
    assert queue.why_lost("7", "FAILED", log).startswith("was killed by the system, as when a node has no")


def test_jobs_that_were_cancelled_before_they_began(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue lists such an array as one job, and accounting such tasks as one row."""
    rows = {"7": queue.Queued("CANCELLED", "JobHeldUser"), "8_1": queue.Queued("RUNNING")}
    assert queue.row_of("7_3", rows).state == "CANCELLED" and queue.row_of("7", rows).is_over
    assert queue.row_of("8_1", rows).state == "RUNNING" and queue.row_of("8_2", rows) == queue.Queued("")
    text = "7_0|COMPLETED\n7_[2-4,6%2]|CANCELLED by 0\n"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sacct").write_text(f"#!/bin/sh\ncase $* in *JobID*) printf '%s' '{text}'; esac\n")
    (tmp_path / "bin" / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    found = [queue.why_lost(f"7_{i}", "", tmp_path / "log").startswith("was cancelled") for i in range(8)]
    assert found == [False, False, True, True, True, False, True, False]


def test_a_full_disk_of_the_logs_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_prints(tmp_path, monkeypatch, "squeue", "")
    slurm_prints(tmp_path, monkeypatch, "sacct", "")
    job = submissions.Job("7", "k", "lr = 0.5")
    submissions.log(job, tmp_path).touch()
    error = f"job 7 (lr = 0.5) left the queue without a result. Its log: {tmp_path}/7_0_log.out"
    assert watch.look([job], tmp_path) == ({"7": launch.Outcome(error=error)}, {})
    monkeypatch.setattr("saev.launch.watch.shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    (outcome,) = watch.look([job], tmp_path)[0].values()
    assert f"without a result. The disk of {tmp_path} is full. Its log: " in outcome.error


def test_rows_of_squeue(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {
        "JobArrayID": "7_3",
        "State": "PENDING",
        "RestartCnt": "2",
        "UserName": "ann",
        "Name": "saev-train",
        "Reason": "ReqNodeNotAvail, Unavail",
    }
    slurm_prints(
        tmp_path, monkeypatch, "squeue", "".join(cells[c].ljust(w) for c, w in queue.COLUMNS.items()) + "\n"
    )
    assert queue.squeue(["7_3"]) == {
        "7_3": queue.Queued("PENDING", "ReqNodeNotAvail, Unavail", 2, "ann", "saev-train")
    }
    slurm_prints(tmp_path, monkeypatch, "squeue", "")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert queue.squeue(["7_3"]) is None


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Reads:
    """A config with a path."""

    root: fields.Path = ""
    n: int = 0


def test_the_same_words_elsewhere_are_another_job(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path in another folder, and a link that leads elsewhere."""
    for name in ("a", "b"):
        (tmp_path / name / "shards").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "shards")

    def key(folder: str, root: str) -> str:
        monkeypatch.chdir(tmp_path / folder)
        return submissions.key(launch.Stage("m:f", Reads(root)))

    a, b = key("a", "shards"), key("b", "shards")
    assert a != b and key("a", "../a/shards/") == a == key("b", "../link")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "b" / "shards")
    assert key("a", "../link") == b and key("a", "") not in (a, b)


def test_a_folder_that_took_anothers_place_is_new(tmp_path: pathlib.Path) -> None:
    old, new, made = (tmp_path / name for name in ("old", "new", "made"))
    for dpath in (old, new, made):
        dpath.mkdir()
        os.utime(dpath, (0, 0))  # as if years ago
    time.sleep(0.05)
    outcome, stage = launch.Outcome([str(made)]), launch.Stage("m:f", Reads(str(old)))
    written_s = time.time()
    assert submissions.is_current(outcome, written_s, stage)
    time.sleep(0.05)
    old.rename(tmp_path / "aside")
    new.rename(old)
    assert not submissions.is_current(outcome, written_s, stage)


# ---- jobs of earlier commands ----

TASK = "tests.slurm.tasks:square"


def batch(
    monkeypatch: pytest.MonkeyPatch, log_to: pathlib.Path, groups: list[list[int]], **more: object
) -> slurm.Batch:
    monkeypatch.setattr("saev.launch.slurm.shutil.which", lambda _: "sbatch")
    cfg = launch.SlurmConfig("A", log_to=str(log_to), **more)  # pyrefly: ignore[bad-argument-type]
    return slurm.Batch([launch.Stage(TASK, group) for group in groups], cfg, "saev-train-x", is_lasting=True)


def note(log_to: pathlib.Path, batch: slurm.Batch, array: int) -> list[str]:
    """As if Slurm had taken the new jobs."""
    ids = {job.key: f"{array}_{i}" for i, job in enumerate(job for job in batch.jobs if not job.id)}
    batch._note(ids)
    batch.submission.write(log_to)
    return [*ids.values()]


def squeue_says(monkeypatch: pytest.MonkeyPatch, rows: dict[str, queue.Queued]) -> None:
    monkeypatch.setattr("saev.launch.queue.squeue", lambda _: rows)


def found(batch: slurm.Batch) -> list[tuple[str, int]]:
    """Id and number of configs of each job."""
    return [(job.id, len(job.parts)) for job in batch.jobs]


def test_running_jobs_are_found_by_config(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Also where the same configs are divided among jobs in another way (--max-per-job)."""
    note(tmp_path, batch(monkeypatch, tmp_path, [[1, 2], [3, 4]]), 7)
    squeue_says(monkeypatch, {"7_0": queue.Queued("RUNNING"), "7_1": queue.Queued("RUNNING")})
    assert found(batch(monkeypatch, tmp_path, [[1, 2, 3, 4]])) == [("7_0", 2), ("7_1", 2)]
    assert found(batch(monkeypatch, tmp_path, [[4], [3], [2], [1]])) == [("7_1", 2), ("7_0", 2)]
    more = batch(monkeypatch, tmp_path, [[1, 2, 5], [3, 4, 6]])
    assert found(more) == [("7_0", 2), ("", 1), ("7_1", 2), ("", 1)]
    assert [more.stages[job.key].arg for job in more.jobs if not job.id] == [[5], [6]]
    assert [job.label for job in more.jobs if not job.id] == ["argument = 5", "argument = 6"]


def test_another_job_with_an_earlier_jobs_id(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """As where two clusters share --log-to: the id is of a job that this one's Slurm gave to other work."""
    note(tmp_path, batch(monkeypatch, tmp_path, [[1]]), 7)
    user = submissions.user()
    for name, is_found in (
        ("saev-train-x", True),
        ("saev-tr", True),
        ("notebook", False),
        ("saev-data-x", False),
    ):
        squeue_says(monkeypatch, {"7_0": queue.Queued("RUNNING", "", 0, user, name)})
        assert found(batch(monkeypatch, tmp_path, [[1]])) == [("7_0" if is_found else "", 1)]
    squeue_says(monkeypatch, {"7_0": queue.Queued("RUNNING", "", 0, "another", "saev-train-x")})
    assert found(batch(monkeypatch, tmp_path, [[1]])) == [("", 1)]


def test_a_job_that_also_does_other_work_is_named_and_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its result would hold what was not asked for."""
    note(tmp_path, batch(monkeypatch, tmp_path, [[1, 2]]), 7)
    squeue_says(monkeypatch, {"7_0": queue.Queued("RUNNING")})
    assert found(batch(monkeypatch, tmp_path, [[1]])) == [("", 1)]
    assert "do part of this, along with other work: 7_0. New jobs wait" in caplog.text


def test_retry_failed_looks_at_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """What is done is not submitted again, whatever jobs it is divided among now."""
    ids = note(tmp_path, batch(monkeypatch, tmp_path, [[1, 2], [3, 4]]), 7)
    squeue_says(monkeypatch, {})
    for job_id, outcome in zip(ids, (launch.Outcome(["a"]), launch.Outcome(error="bad")), strict=True):
        submissions.result_fpath(job_id, tmp_path).write_bytes(pickle.dumps(("success", outcome)))
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a").touch()
    again = batch(monkeypatch, tmp_path, [[1], [2], [3], [4]], retry_failed=True)
    assert found(again) == [("7_0", 2), ("", 1), ("", 1)]
    with pytest.raises(
        errors.UserError, match="has no earlier submission of these configs. Pass its --log-to"
    ):
        batch(monkeypatch, tmp_path, [[9]], retry_failed=True)


def test_max_parallel_holds_over_several_arrays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Slurm applies it to each array, so a part waits for the one before if both together were too many."""
    large = batch(monkeypatch, tmp_path, [[i] for i in range(5)], max_parallel=4, after=("3",))
    squeue_says(monkeypatch, {"7": queue.Queued("PENDING")})
    assert large._dependency(3) == "afterok:3"
    large._note({job.key: f"7_{i}" for i, job in enumerate(large.jobs[:3])})
    assert large._dependency(1) == "afterok:3" and large._dependency(2) == "afterok:3,afterany:7"
    for i in range(3):
        fpath = submissions.result_fpath(f"7_{i}", tmp_path)
        fpath.write_bytes(pickle.dumps(("success", launch.Outcome(1))))
    assert large._dependency(2) == "afterok:3"


def test_max_parallel_counts_jobs_of_earlier_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Those that still run and do part of this command's work."""
    note(tmp_path, batch(monkeypatch, tmp_path, [[1], [2], [3]]), 7)
    rows = {f"7_{i}": queue.Queued("RUNNING") for i in range(3)}
    squeue_says(monkeypatch, rows)
    more = batch(monkeypatch, tmp_path, [[1], [2], [3], [4], [5]], max_parallel=4)
    assert found(more) == [("7_0", 1), ("7_1", 1), ("7_2", 1), ("", 1), ("", 1)]
    assert more._dependency(1) == "" and more._dependency(2) == "afterany:7"
    squeue_says(monkeypatch, rows | {"7_1": queue.Queued("CANCELLED")})
    assert more._dependency(2) == ""


def test_jobs_of_earlier_commands_while_slurm_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """They may still run, so nothing is submitted a second time."""
    note(tmp_path, batch(monkeypatch, tmp_path, [[1]]), 7)
    monkeypatch.setattr("saev.launch.queue.squeue", lambda _: None)
    with pytest.raises(errors.UserError, match="squeue does not answer, .* Run the same command again later"):
        batch(monkeypatch, tmp_path, [[1]])


# ---- commands that were killed after Slurm took their jobs, before they noted the ids ----


def planned(log_to: pathlib.Path, batch: slurm.Batch) -> pathlib.Path:
    """A plan as such a command leaves it, with the files of its jobs' stages."""
    names = [f"stage{i}.pkl" for i in range(len(batch.jobs))]
    for name in (*names, ".submission_file_x.sh"):
        (log_to / name).write_text(name)
    plan = submissions.Plan(batch._planned(batch.jobs), names)
    (log_to / ".submission_file_x.json").write_text(jsonfile.dumps(plan, indent=4))
    return log_to / ".submission_file_x.json"


def test_such_jobs_are_found_by_their_batch_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    fpath = planned(tmp_path, batch(monkeypatch, tmp_path, [[1], [2]]))
    for name in ("7_0_0_result.pkl", "7_1_0_result.pkl"):  # of another job with this id
        (tmp_path / name).touch()
    rows = "".join(
        f"{job_id.ljust(40)}{path}\n" for job_id, path in (("7", fpath.with_suffix(".sh")), ("8", "x"))
    )
    slurm_prints(tmp_path, monkeypatch, "squeue", rows)
    submissions.recover(tmp_path)
    assert not fpath.exists() and not [*tmp_path.glob("*_result.pkl")]
    assert [(tmp_path / f"7_{i}_submitted.pkl").read_text() for i in (0, 1)] == ["stage0.pkl", "stage1.pkl"]
    squeue_says(monkeypatch, {"7_0": queue.Queued("RUNNING"), "7_1": queue.Queued("RUNNING")})
    assert found(batch(monkeypatch, tmp_path, [[1], [2], [3]])) == [("7_0", 1), ("7_1", 1), ("", 1)]


def test_a_second_kill_while_such_jobs_are_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """What jobs have written meanwhile stays."""
    fpath = planned(tmp_path, batch(monkeypatch, tmp_path, [[1], [2]]))
    (tmp_path / "stage0.pkl").rename(tmp_path / "7_0_submitted.pkl")
    (tmp_path / "7_0_0_result.pkl").touch()
    assert submissions.finish(fpath, "7") == ["7_0", "7_1"]
    assert (tmp_path / "7_0_0_result.pkl").exists() and (tmp_path / "7_1_submitted.pkl").exists()
    assert [job.id for job in submissions.read_all(tmp_path)[0].jobs] == ["7_0", "7_1"]


def test_plans_of_jobs_that_slurm_never_took(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """They are kept for an hour, as Slurm may be slow, or silent."""
    fpath = planned(tmp_path, batch(monkeypatch, tmp_path, [[1], [2]]))
    slurm_prints(tmp_path, monkeypatch, "squeue", "")
    submissions.recover(tmp_path)
    assert fpath.exists()
    os.utime(fpath, (0, 0))
    monkeypatch.setattr("saev.launch.queue.scripts", lambda _: None)
    submissions.recover(tmp_path)
    assert fpath.exists()
    monkeypatch.setattr("saev.launch.queue.scripts", lambda _: {})
    submissions.recover(tmp_path)
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == []


def test_submissions_of_older_versions_are_read(tmp_path: pathlib.Path) -> None:
    submission = submissions.Submission.new("saev-test")
    submission.jobs = [submissions.Job("7", "k", "")]
    submission.write(tmp_path)
    fpath = tmp_path / "7_submission.json"
    data = json.loads(fpath.read_text())
    del data["jobs"][0]["parts"]
    fpath.write_text(json.dumps(data))
    assert submissions.read_all(tmp_path)[0].jobs[0].parts == ["k"]


def test_what_was_submitted_again_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`jobs collect 7` gives what a later retry made, and `list` says that its failed job was submitted again."""
    outcomes = {"7_0": launch.Outcome("a"), "7_1": launch.Outcome(error="bad"), "8_0": launch.Outcome("b")}
    for array, keys in ((7, ["x", "y"]), (8, ["y"])):
        submission = submissions.Submission.new("saev-test")
        submission.jobs = [submissions.Job(f"{array}_{i}", key, "") for i, key in enumerate(keys)]
        submission.write(tmp_path)
        time.sleep(0.01)
    for job_id, outcome in outcomes.items():
        submissions.result_fpath(job_id, tmp_path).write_bytes(pickle.dumps(("success", outcome)))
    squeue_says(monkeypatch, {})

    def say(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["jobs", *words, "--log-to", str(tmp_path)])
        jobs.main()
        return capsys.readouterr().out

    assert say("collect", "7") == say("attach", "7") == "a\nb\n"
    assert re.search(r"^7  .*: 1 done; 1 submitted again as 8_0$", say("list", "7"), re.M)
    assert "bad" not in say("list")


def test_results_say_which_command_made_them(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.5"])
    monkeypatch.chdir(tmp_path)
    stage = launch.Stage("saev.provenance:write", tmp_path)
    monkeypatch.setattr(sys, "argv", ["-c"])
    monkeypatch.setattr(provenance, "command", [])
    assert stage() == launch.Outcome()
    made = json.loads((tmp_path / "code.json").read_text())
    assert (made["command"], made["folder"]) == (["train.py", "--lr", "0.5"], str(tmp_path))


@pytest.mark.parametrize("name", ["12:30", "%j", ""])
def test_logs_in_a_folder_that_jobs_cannot_use(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.UserError, match="--log-to .*: must be a folder without : and %"):
        launch.run("m:f", [1], launch.SlurmConfig("a", log_to=name), "saev-test")
    assert list(tmp_path.iterdir()) == []


def test_options_that_saev_sets() -> None:
    for option in ("array=0-1", "job_name=x", "--output=y"):
        with pytest.raises(errors.UserError, match="saev sets this itself"):
            launch.SlurmConfig("a", slurm_extra=(option,))


def test_a_cut_result_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "7_0_result.pkl").touch()
    outcome = submissions.result(submissions.Job("7", "k", ""), tmp_path)
    assert outcome is not None and "7_0_result.pkl is cut off. Run the same command again" in outcome.error


def test_a_closed_terminal_ends_a_command_when_the_id_is_noted() -> None:
    source = (
        "import signal\nfrom saev.launch import slurm\nwith slurm.interrupted_later():\n"
        "    signal.raise_signal(signal.SIGHUP)\n    print('noted', flush=True)\nprint('never')"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGHUP, "noted\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_wait_for_the_id_and_name_the_jobs(
    signum: int, code: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal while sbatch runs is taken when the id is noted. Then the command says which jobs go on."""
    job = submissions.Job("", "k", "")
    with (
        pytest.raises(SystemExit) as ended,
        ended_by_signals(),
        slurm.leaving([job], str(tmp_path)),
        slurm.interrupted_later(),
    ):
        signal.raise_signal(signum)
        job.id = "7"
    assert ended.value.code == code
    assert re.search(
        rf"stopped waiting. These jobs keep running: 7. Cancel them with: scancel 7. .*attach --log-to {tmp_path}",
        capsys.readouterr().err,
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_is_said_of_jobs_that_are_over(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submissions.result_fpath("7", tmp_path).write_bytes(pickle.dumps(("success", launch.Outcome(1))))
    waiting = [submissions.Job("7", "k", ""), submissions.Job("", "l", "")]
    with pytest.raises(KeyboardInterrupt), slurm.leaving(waiting, str(tmp_path)):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


def test_retry_needs_one_command(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """The demo submits each step by itself; they are one command."""

    class StartedError(Exception):
        pass

    def execv(_: str, words: list[str]) -> None:
        raise StartedError(*words)

    monkeypatch.setattr("saev.jobs.os.execv", execv)
    monkeypatch.chdir(tmp_path)
    steps = [submissions.Submission.new(f"saev-demo-{step}") for step in ("dump", "train")]
    for i, submission in enumerate(steps):
        submission.args, submission.jobs = ["demo", "--n-imgs", "40"], [submissions.Job(str(i), "k", "")]
    with pytest.raises(StartedError) as started:
        jobs.retry(steps)
    assert started.value.args[2:] == ("saev", "demo", "--n-imgs", "40", "--retry-failed")
    steps[1].args = ["demo", "--n-imgs", "80"]
    with pytest.raises(errors.UserError, match="retry: name one of the submissions 0, 1"):
        jobs.retry(steps)
