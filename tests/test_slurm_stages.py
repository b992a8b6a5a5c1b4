"""Signals in the middle of every stage, on a real Slurm: see test_slurm.py. (The demo's test is in test_demo.py.)"""

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys

import forked
from slurm_cluster import MARKS, ON_SLURM, ROOT, VIT, files_of, filled, queue_says, stages_of, wait_for, warn

from saev.demo import minicub
from tests import inprocess

pytestmark = MARKS

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
        wait_for(lambda: stages_of(job_id), 120)
        (pid,) = stages_of(job_id)
        wait_for(lambda: self.is_at_work(log), 120, 0.005)
        warn(job_id, pid)
        self.then()
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0 and log.read_text().count("Caught signal SIGUSR2") == 1, stderr
        assert queue_says(job_id, "RestartCnt") == 1


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
    train += ["sae:batch-top-k", "--sae.exp-factor", 8]
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
    evaluate += ["--n-prototypes", 8, 64, "--n-train", 8, -1, "--n-boot", 1000]
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
