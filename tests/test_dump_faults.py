"""The dump command when its processes, its disk or its user give up on it."""

import collections.abc
import os
import pathlib
import signal
import subprocess
import sys
import time

import inprocess
import numpy as np
import PIL.Image
import pytest

from saev.data import config, dump
from saev.formats import shards

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
N = 100


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


def processes_of(dump_to: str) -> list[int]:
    """Processes whose environment carries this dump's mark: the command and all its children."""
    mark = f"SAEV_TEST={dump_to}".encode()
    found = []
    for fpath in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in fpath.read_bytes().split(b"\0"):
                found.append(int(fpath.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_jobs_end_with_their_parent_and_the_dump_goes_on(
    photos: pathlib.Path, undisturbed: dict[str, bytes], tmp_path: pathlib.Path, how: str
) -> None:
    cfg = config_of(photos, tmp_path)
    process = subprocess.Popen(
        command(cfg, "--n-jobs", "2"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SAEV_TEST": cfg.dump_to},
        start_new_session=True,
    )
    wait_for(lambda: len(list(tmp_path.glob("*/acts*.json"))) >= 10)
    assert len(processes_of(cfg.dump_to)) >= 3
    if how == "kill":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    wait_for(lambda: not processes_of(cfg.dump_to), timeout_s=60)
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
        done = subprocess.run(
            command(cfg, "--n-jobs", "2"), cwd=ROOT, capture_output=True, text=True, timeout=120
        )
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
