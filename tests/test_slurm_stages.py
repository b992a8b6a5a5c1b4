"""The demo as dependent jobs, and signals in the middle of every stage, on a real Slurm: see test_slurm.py."""

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import forked
import pytest
from slurm_cluster import (
    MARKS,
    ON_SLURM,
    ROOT,
    VIT,
    files_of,
    filled,
    of_job,
    page_commands,
    queue_says,
    saev,
    wait_for,
)

from saev.demo import minicub
from tests import inprocess

pytestmark = MARKS

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
        process = forked.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
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
    minicub.draw(None, parts=masks, n_imgs=60)
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
