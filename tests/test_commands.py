"""The command lines that the design and README promise parse as they stand."""

import pathlib
import re
import shlex
import subprocess
import sys

import forked
import pytest

from saev import cli, jobs, sweeps
from saev.protoeval import config as protoeval_config
from saev.training import config as training_config

ROOT = pathlib.Path(__file__).parent.parent

PROMISED = {
    "--slurm-acct PAS2136 --n-hours 48 --slurm-partition nextgen --vit-family clip --vit-ckpt hf-hub:imageomics/bioclip-2 "
    "--d-vit 1024 --n-patches-per-img 256 --vit-layers 13 15 17 19 21 23 --dump-to CACHE --max-patches-per-shard 500_000 "
    "data:image-folder --data.root inat21/train_mini/": "-m saev.data",
    "--vit-family dinov2 --vit-ckpt dinov2_vitl14_reg --vit-layers 23 --dump-to CACHE data:image-folder --data.root inat21": "-m saev.data",
    "--slurm-acct PAS2136 --slurm-partition nextgen --n-hours 12 --sweep configs/preprint/baseline.toml "
    "--data.shard-root SHARDS --data.patches image --data.layer 23 sae:relu --sae.d-vit 1024": "train.py",
    "--ckpt checkpoints/53fl3ysv/sae.pt --dump-to VISUALS --log-freq-range -3 -1 --log-value-range -1 3 "
    "--data.shard-root SHARDS --data.layer 13 images:image-folder --images.root inat21/train_mini/": "visuals.py",
    "--cub-root CUB_200_2011 --train-data.shard-root S1 --train-data.layer 23 --test-data.shard-root S2 --test-data.layer 23 "
    "--fit-data.shard-root S0 --n-prototypes 128 512 2048 8192 --n-train 16 64 256 1024 -1 --dump-to results scorer:random": "protoeval.py",
}

SHOWN = {
    "-m saev.data": [
        "max_patches_per_shard = 500000",
        "vit_layers = (13, 15, 17, 19, 21, 23)",
        "root = 'inat21/train_mini/'",
    ],
    "train.py": ["# 9 of 9", "sae: Relu", "d_vit = 1024", "layer = 23", "slurm_acct = 'PAS2136'"],
    "visuals.py": ["log_freq_range = (-3.0, -1.0)", "log_value_range = (-1.0, 3.0)", "layer = 13"],
    "protoeval.py": [
        "n_prototypes = (128, 512, 2048, 8192)",
        "n_train = (16, 64, 256, 1024, -1)",
        "scorer: Random",
    ],
}


GUARD = """
import os, runpy, sys
program, sys.argv = sys.argv[1], sys.argv[1:]
try:
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
finally:
    sys.stdout.flush()
    if {"torch", "numpy"} & sys.modules.keys():
        os._exit(99)
"""


def dry_run(program: str, args: str) -> str:
    """Output of the command with --dry-run, in a process that ends with 99 if torch or numpy were imported."""
    command = [sys.executable, "-c", GUARD, program.removeprefix("-m "), "--dry-run", *shlex.split(args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("args", PROMISED)
def test_promised_commands_parse_without_torch(args: str) -> None:
    program = PROMISED[args]
    out = dry_run(program, args)
    expected = SHOWN[program] if "dinov2" not in args else ["vit_ckpt = 'dinov2_vitl14_reg'"]
    assert [line for line in expected if line not in out] == []


def readme_commands() -> list[str]:
    """Indented `uv run ...` lines of README.md and some pages, continuation lines joined."""
    fpaths = (ROOT / "README.md", ROOT / "docs" / "slurm.md", ROOT / "docs" / "patch-labels.md")
    text = "".join(fpath.read_text() for fpath in fpaths).replace("\\\n", " ")
    return [
        c
        for c in re.findall(r"^    (?:pip install uv && )?uv run (.*)$", text, re.M)
        if not c.startswith("pytest")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", [pytest.param(c) if "benchmarks." in c else c for c in readme_commands()])
def test_readme_commands_parse(command: str, tmp_path: pathlib.Path) -> None:
    words = shlex.split(command)
    if words[2:3] == ["benchmarks.staging"]:  # which has none either
        small = [*words[1:], "--gb", "0.02", "--root", str(tmp_path), "--stage-to", str(tmp_path)]
        done = forked.run([sys.executable, *small], cwd=ROOT, capture_output=True, text=True)
        assert "epoch from the copy" in done.stdout and "--stage-to" in done.stdout, done.stderr
        return
    if words[:3] == ["python", "-m", "saev.jobs"]:  # which has no --dry-run
        assert cli.parse(jobs.Jobs, words[3:]).ids in ((), ("1234",))
        return
    program, args = (" ".join(words[1:3]), words[3:]) if words[0] == "python" else (words[0], words[1:])
    assert "= " in dry_run(program, shlex.join(args))


def test_readme_has_every_command() -> None:
    text = " ".join(readme_commands())
    for program in ("python -m saev.demo", "python -m saev.data", "train.py", "visuals.py", "protoeval.py"):
        assert program in text


@pytest.mark.parametrize("fpath", sorted(ROOT.glob("configs/**/*.toml")), ids=lambda p: p.name)
def test_config_files_parse_with_the_command_in_their_header(fpath: pathlib.Path) -> None:
    header = [line for line in fpath.read_text().splitlines() if line.startswith("# uv run ")]
    program, *args = shlex.split(header[0].removeprefix("# uv run "))
    assert args[:2] == ["--sweep", str(fpath.relative_to(ROOT))]
    cls = {"train.py": training_config.Train, "protoeval.py": protoeval_config.ProtoEval}[program]
    assert sweeps.parse(cls, "", [f"--sweep={fpath}", *args[2:]])


@pytest.mark.parametrize(
    "program", ["-m saev.data", "train.py", "visuals.py", "protoeval.py", "-m saev.demo"]
)
def test_help_and_wrong_flags(program: str) -> None:
    help_ = subprocess.run(
        [sys.executable, *program.split(), "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert help_.returncode == 0 and "--device" in help_.stdout
    wrong = subprocess.run(
        [sys.executable, *program.split(), "--devize", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and "--device" in wrong.stderr
