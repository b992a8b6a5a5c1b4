"""The dump command when its processes, its disk or its user give up on it."""

import collections.abc
import os
import pathlib
import signal
import subprocess
import sys
import time

import forked
import inprocess
import numpy as np
import PIL.Image
import pytest

from saev.data import config, dump
from saev.formats import shards

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
N = 60
IMPORTED = ("saev.data.dump",)
"""What each job of a dump imports."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(N):
        img = PIL.Image.fromarray(rng.integers(0, 255, (30, 30, 3), dtype=np.uint8))
        img.save(root / f"{i:03}.png")
    return root


def config_of(photos: pathlib.Path, dump_to: pathlib.Path) -> config.Dump:
    """One image a shard."""
    return config.Dump(
        vit=config.Vit(vit_family="timm", vit_ckpt="test_vit", vit_weights="random"),
        data=config.ImageFolder(str(photos)),
        vit_layers=(1,),
        max_patches_per_shard=101,
        device="cpu",
        dump_to=str(dump_to),
    )


def command(cfg: config.Dump, *more: str) -> list[str]:
    flags = ["--vit-family", "timm", "--vit-ckpt", "test_vit", "--vit-weights", "random"]
    flags += ["--vit-layers", "1", "--max-patches-per-shard", "101", "--device", "cpu"]
    flags += ["--dump-to", cfg.dump_to, *more, "data:image-folder", "--data.root", cfg.data.root]
    return [sys.executable, "-m", "saev.data", *flags]


@pytest.fixture(scope="module")
def undisturbed(photos: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(dump.main(config_of(photos, tmp_path_factory.mktemp("undisturbed"))))


def contents(dpath: str | pathlib.Path) -> dict[str, bytes]:
    """Everything in a directory, hidden files too, but for code.json, which names the command."""
    return {p.name: p.read_bytes() for p in pathlib.Path(dpath).iterdir() if p.name != "code.json"}


def wait_for(condition: collections.abc.Callable[[], bool], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(p for child in map(int, children) for p in family(child))]


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_jobs_end_with_their_parent_and_the_dump_goes_on(
    photos: pathlib.Path, undisturbed: dict[str, bytes], tmp_path: pathlib.Path, how: str
) -> None:
    cfg = config_of(photos, tmp_path)
    two = command(cfg, "--n-jobs", "2")
    process = forked.Popen(two, cwd=ROOT, stderr=subprocess.PIPE, text=True, also=IMPORTED)
    wait_for(lambda: len(list(tmp_path.glob("*/acts*.json"))) >= 10)
    all_pids = family(process.pid)
    assert len(all_pids) >= 3
    if how == "kill":
        process.kill()
    for pid in all_pids if how == "interrupt" else ():  # as a terminal does
        os.kill(pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    wait_for(lambda: not any(map(is_alive, all_pids)), timeout_s=60)
    assert "Traceback" not in stderr
    assert process.returncode == (-signal.SIGKILL if how == "kill" else 130)
    if how == "interrupt":
        assert stderr.splitlines()[-1] == "interrupted; run the same command again to continue."
    (out,) = tmp_path.iterdir()
    assert 10 <= len(list(out.glob("acts*.json"))) < N
    done = inprocess.run(*command(cfg)[1:])  # any number of jobs goes on from any other's shards
    assert done.returncode == 0 and done.stdout.strip() == str(out)
    assert contents(out) == undisturbed


def test_the_first_job_to_fail_ends_the_others(photos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    bad, good = photos / "009.png", (photos / "009.png").read_bytes()
    cfg = config_of(photos, tmp_path)
    try:
        bad.write_bytes(b"no image")
        two = command(cfg, "--n-jobs", "2")
        done = forked.run(two, cwd=ROOT, capture_output=True, text=True, timeout=120, also=IMPORTED)
    finally:
        bad.write_bytes(good)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = [s for s in done.stderr.splitlines() if not s.startswith("[")]
    assert line.startswith("error: local job 1: ") and "009.png: cannot be read as an image" in line


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    """A file system of its own, of 2 MB."""
    dpath = tmp_path / "disk"
    dpath.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", dpath], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield dpath
    subprocess.run(["umount", dpath], check=True)


def remount(dpath: pathlib.Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", dpath], check=True)


def test_a_full_disk(photos: pathlib.Path, undisturbed: dict[str, bytes], small_disk: pathlib.Path) -> None:
    cfg = config_of(photos, small_disk)
    with pytest.raises(OSError, match=r"No space left.*acts\d+\.bin"):
        dump.main(cfg)
    (out,) = small_disk.iterdir()
    found = shards.ShardDir.open_unchecked(out)
    assert 0 < len(found.shard_is) < N
    assert all(
        found.acts_fpath(i).read_bytes() == undisturbed[found.acts_fpath(i).name] for i in found.shard_is
    )
    remount(small_disk, "size=100m")
    dump.main(cfg)
    shards.ShardDir.open_unchecked(out).finish()
    assert contents(out) == undisturbed


def test_a_read_only_target(photos: pathlib.Path, small_disk: pathlib.Path) -> None:
    cfg = config_of(photos, small_disk / "shards")
    remount(small_disk, "ro")
    done = inprocess.run(*command(cfg)[1:])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "Read-only file system" in line
