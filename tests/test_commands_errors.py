"""What a user gets wrong ends in one line on stderr, exit code 2, no traceback, and what to do next.

Each case runs the real command, in this process; that a process ends in the same way is shown for one of them.
"""

import json
import pathlib
import re
import subprocess
import sys

import inprocess
import numpy as np
import PIL.Image
import pytest

from saev import nn
from saev.demo import minicub
from saev.nn import config as nn_config

ROOT = pathlib.Path(__file__).parent.parent
VIT = ["--vit-family", "timm", "--vit-ckpt", "vit_tiny_patch16_224", "--vit-weights", "random"]


def fails(*args: object) -> str:
    """Runs `python ARGS`, checks the manner of failing, and returns the line."""
    return failing(inprocess.run(*args))


def failing(done: inprocess.Done | subprocess.CompletedProcess[str]) -> str:
    """The line of a command that failed in the right manner (log lines aside)."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    (line,) = [line for line in lines if not re.match(r"\[\d\d:\d\d:\d\d\] ", line)]
    assert line.startswith("error: ") and "Traceback" not in done.stderr
    assert done.stdout == ""
    return line


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    rng = np.random.default_rng(0)
    for i in range(3):
        fpath = tmp_path / "imgs" / "a" / f"{i}.png"
        fpath.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(fpath)
    return tmp_path / "imgs"


@pytest.mark.slow
def test_no_such_shard_directory(tmp_path: pathlib.Path) -> None:
    line = fails("train.py", "--data.shard-root", tmp_path / "gone", "--ckpt-to", tmp_path / "ck")
    assert "gone: no such shard directory. Pass the directory" in line
    command = [sys.executable, "train.py", "--data.shard-root", str(tmp_path / "gone")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert failing(done) == line
    assert not (tmp_path / "ck").exists()


def test_layer_not_recorded(make_shards, tmp_path: pathlib.Path) -> None:
    dpath, _ = make_shards(n_imgs=4, n_patches=4, d_vit=8, layers=(3, 7))
    line = fails("train.py", "--data.shard-root", dpath, "--data.layer", 5, "--ckpt-to", tmp_path / "ck")
    assert "layer 5 was not recorded (recorded: 3, 7)" in line


@pytest.mark.slow
def test_root_without_images(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    args = ["-m", "saev.data", *VIT, "--dump-to", tmp_path / "s", "data:image-folder", "--data.root"]
    assert "no images found" in fails(*args, tmp_path / "empty")
    assert "--data.root" in fails(*args, tmp_path / "gone")
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_wrong_d_vit_of_the_dump(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    args = ["-m", "saev.data", *VIT, "--dump-to", tmp_path / "s", "--d-vit", 512]
    line = fails(*args, "data:image-folder", "--data.root", folder)
    assert "--d-vit 512" in line and "192" in line
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_corrupt_image_is_named_and_nothing_half_made_is_left(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (folder / "a" / "1.png").write_bytes((folder / "a" / "1.png").read_bytes()[:500])
    args = ["-m", "saev.data", *VIT, "--dump-to", tmp_path / "s", "--vit-layers", 0]
    assert "1.png" in fails(*args, "data:image-folder", "--data.root", folder)
    assert not list((tmp_path / "s").rglob("acts*")) and not list((tmp_path / "s").rglob("*.tmp"))


def test_wrong_d_vit_of_the_sae(make_shards, tmp_path: pathlib.Path) -> None:
    dpath, _ = make_shards(n_imgs=4, n_patches=4, d_vit=8, layers=(3,))
    args = [
        "train.py",
        "--data.shard-root",
        dpath,
        "--ckpt-to",
        tmp_path / "ck",
        "sae:relu",
        "--sae.d-vit",
        1024,
    ]
    assert "--sae.d-vit 1024" in fails(*args)


def test_unknown_sweep_key(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.toml").write_text("[sae]\ntopk = [16, 32]\n")
    line = fails("train.py", "--sweep", tmp_path / "x.toml", "sae:top-k")
    assert "x.toml: unknown key 'sae.topk'. Perhaps you meant 'sae.top_k'." in line


@pytest.mark.slow
def test_cub_without_attributes_and_a_line_that_cannot_be_parsed(tmp_path: pathlib.Path, make_shards) -> None:
    root = tmp_path / "CUB_200_2011"
    minicub.draw(root, n_imgs=40)
    dpath, _ = make_shards(n_imgs=4, n_patches=4, d_vit=8, layers=(3,))
    args = ["protoeval.py", "--cub-root", root, "--train-data.shard-root", dpath, "--dump-to", tmp_path / "r"]
    labels = root / "attributes" / "image_attribute_labels.txt"
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join([*lines[:6], "7 one 0 4 0.0", *lines[7:]]))
    assert f"{labels}:7: '7 one 0 4 0.0' is not" in fails(*args)
    labels.unlink()
    assert f"{labels}: missing" in fails(*args)
    assert not (tmp_path / "r").exists()


def gallery(
    ckpt: pathlib.Path, dump_to: pathlib.Path, shards: pathlib.Path, folder: pathlib.Path
) -> list[object]:
    """Arguments of a command that shows an SAE's latents."""
    out: list[object] = ["visuals.py", "--ckpt", ckpt, "--dump-to", dump_to]
    return [*out, "--data.shard-root", shards, "images:image-folder", "--images.root", folder]


def test_checkpoint_of_an_unknown_schema(tmp_path: pathlib.Path, make_shards, folder: pathlib.Path) -> None:
    (tmp_path / "sae.pt").write_bytes(json.dumps({"schema": 9000}).encode() + b"\n")
    dpath, _ = make_shards(n_imgs=4, n_patches=4, d_vit=8, layers=(3,))
    line = fails(*gallery(tmp_path / "sae.pt", tmp_path / "v", dpath, folder))
    assert "checkpoint schema 9000" in line and "is unknown to this version" in line


def test_ckpt_that_is_a_directory(tmp_path: pathlib.Path, make_shards, folder: pathlib.Path) -> None:
    nn.save(nn.SparseAutoencoder(nn_config.TopK(d_vit=8)), tmp_path / "run" / "sae.pt")
    dpath, _ = make_shards(n_imgs=4, n_patches=4, d_vit=8, layers=(3,))
    line = fails(*gallery(tmp_path / "run", tmp_path / "v", dpath, folder))
    assert "is a directory, not a checkpoint file. Did you mean" in line and "sae.pt" in line
