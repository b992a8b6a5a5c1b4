"""The commands of saev on a real Slurm: see test_slurm.py."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import forked
import numpy as np
import PIL.Image
import pytest
import torch
from slurm_cluster import (
    MARKS,
    ON_SLURM,
    ROOT,
    VIT,
    filled,
    of_job,
    page_commands,
    queue_says,
    saev,
    stages_of,
    stopped,
    submitted,
    submitted_to,
    train_command,
    wait_for,
    warn,
)

from saev import launch, nn
from saev.demo import minicub

pytest_plugins = ["slurm_fixtures"]
pytestmark = MARKS

# ---- python -m saev.jobs ----


def jobs(slurm: launch.SlurmConfig, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "saev.jobs", *args, "--log-to", slurm.log_to]
    return forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


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
    done = forked.run([sys.executable, "train.py", *train], cwd=ROOT, capture_output=True, text=True)
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
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    together = forked.Popen(command, **pipes)
    wait_for(lambda: [*tmp_path.glob("ck/*/metrics.jsonl")], every_s=0.01)
    (job_id,) = submitted(slurm)
    with stopped(*stages_of(job_id)):
        command[2:2] = ["--max-per-job", "1"]
        alone = forked.Popen(command, **pipes)
        assert any(f"1 job(s) in the queue, 0 done: {job_id}" in line for line in alone.stderr)
    found, stderr = alone.communicate(timeout=240)
    assert alone.returncode == 0 and len(found.split()) == 2 and submitted(slurm) == [job_id], stderr
    assert together.communicate(timeout=60)[0] == found
    command[2:2] = ["--retry-failed"]
    again = forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert again.stdout == found and submitted(slurm) == [job_id]


# ---- the commands ----


def test_a_dump_whose_tasks_are_killed_goes_on(tmp_path: pathlib.Path) -> None:
    """Both tasks get SIGKILL when some shards are there; the same command ends with the bytes of an undisturbed dump."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(120):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(root / f"{i:03}.png")
    dump = [sys.executable, "-m", "saev.data", *VIT, "--device", "cpu", "--vit-batch-size", "1"]
    dump += ["--max-patches-per-shard", "17"]  # an image a shard
    data = ["data:image-folder", "--data.root", str(root)]
    forked.run([*dump, "--dump-to", tmp_path / "here", *data], cwd=ROOT, check=True)

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
    process = forked.Popen(dump, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: submitted_to(tmp_path / "logs"))
    (array_id,) = {job_id.partition("_")[0] for job_id in submitted_to(tmp_path / "logs")}
    wait_for(lambda: len(stages_of(array_id)) == 2)
    pids = stages_of(array_id)
    wait_for(lambda: len(list(tmp_path.glob("there/*/acts*.json"))) > 5, every_s=0.002)
    for pid in pids:  # scancel would send SIGTERM first, and wait
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not stages_of(array_id))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and "Its log: " in stderr and "Traceback" not in stderr
    n_done = len(list(tmp_path.glob("there/*/acts*.json")))
    assert 5 < n_done < 120

    done = forked.run(dump, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    (here,) = (tmp_path / "here").iterdir()
    there = pathlib.Path(done.stdout.strip())
    assert sorted(f.name for f in here.iterdir()) == sorted(f.name for f in there.iterdir())
    assert [f.name for f in here.iterdir() if f.read_bytes() != (there / f.name).read_bytes()] == [
        "code.json"
    ]


# ---- training ----


def test_training_out_of_time_whose_node_then_dies_goes_on_to_the_same_weights(
    make_shards, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep of two, with wandb. SIGUSR2 in the middle: the states are saved, the job is queued again.

    Then everything on the node is killed, Slurm finds it down and queues the job again, and the node comes back.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    shards, _ = make_shards(n_imgs=100, n_patches=8, d_vit=16, layers=(0,), per_shard=20)
    (tmp_path / "two.toml").write_text("[[sae]]\ntype = 'batch-top-k'\n[[sae]]\ntype = 'relu'\n")
    sweep = ("--sweep", str(tmp_path / "two.toml"))
    of_sae = -5  # words of the command, which the sweep says instead
    here = saev(*train_command(shards, tmp_path / "here", *sweep)[1:of_sae])
    logs, node = tmp_path / "logs", f"{os.uname().nodename.partition('.')[0]}2"
    more = (*sweep, *ON_SLURM, "--slurm-partition", "other", "--log-to", str(logs), "--wandb-project", "p")
    command = train_command(shards, tmp_path / "there", *more)[:of_sae]
    process = forked.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def log() -> str:
        return "".join(f.read_text() for f in logs.glob("*.out"))

    def n_logged() -> int:
        return sum(f.stat().st_size > 0 for f in tmp_path.glob("there/*/metrics.jsonl"))

    wait_for(lambda: n_logged() == 2, every_s=0.005)
    (job_id,) = submitted_to(logs)
    (pid,) = stages_of(job_id)
    warn(job_id, pid)
    wait_for(lambda: "continuing after step" in log(), every_s=0.005)
    with stopped(*stages_of(job_id)):
        assert "SIGUSR2: saving after this step" in log() and queue_says(job_id, "RestartCnt") == 1
        config = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True)
        pid_fpath = re.search(r"^SlurmdPidFile\s*= (\S+)", config.stdout, re.M)[1].replace("%n", node)
        os.kill(int(pathlib.Path(pid_fpath).read_text()), signal.SIGKILL)
        for pid in of_job(job_id):
            os.kill(pid, signal.SIGKILL)
    try:
        subprocess.run(["scontrol", "update", f"node={node}", "state=down", "reason=test"], check=True)
    finally:
        subprocess.run(["slurmd", "-N", node], check=True)  # a node that was down comes back when it answers
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert log().count("continuing after step") >= 2 and queue_says(job_id, "RestartCnt") == 2
    there = [pathlib.Path(line) for line in stdout.split()]
    assert [fpath.read_bytes() for fpath in there] == [pathlib.Path(fpath).read_bytes() for fpath in here]
    assert all(len([*fpath.parent.glob("wandb/offline-run-*")]) in (2, 3) for fpath in there)


def test_two_tasks_share_the_batches_of_one_sae(
    make_shards, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one node, and on two."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shards, _ = make_shards(n_imgs=100, n_patches=8, d_vit=16, layers=(0,), per_shard=20)
    few = ("--n-patches", str(60 * 64))
    (here,) = saev(*train_command(shards, tmp_path / "here", *few)[1:])
    mine = nn.load(here).state_dict()

    def check(n_nodes: int, *nodes: str) -> None:
        logs = tmp_path / f"logs{n_nodes}"
        more = (*few, *ON_SLURM, "--log-to", str(logs), "--data-parallel", "2", *nodes)
        (there,) = saev(*train_command(shards, tmp_path / f"{n_nodes}", *more)[1:])
        theirs = nn.load(there).state_dict()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
        (job_id,) = submitted_to(logs)
        assert queue_says(job_id, "NumNodes") == n_nodes

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one = pool.submit(check, 1)
        two = pool.submit(check, 2, "--n-nodes", "2", "--slurm-partition", "pair")
        one.result(), two.result()


# ---- the page docs/slurm.md ----


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
    few = [*slurm, "--n-patches", 600, "--batch-size", 200, "--wandb-project", "", "--stage-to", "$TMPDIR"]
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
    done = forked.run(command, cwd=folder, capture_output=True, text=True)
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
