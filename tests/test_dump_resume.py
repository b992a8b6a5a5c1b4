"""A dump killed at any moment, divided among jobs, or stopped by an image, ends with the bytes of an undisturbed one."""

import dataclasses
import itertools
import json
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
import time

import forked
import numpy as np
import PIL.Image
import pytest
from torch import Tensor

from saev import errors
from saev.data import config, dump, pixels, verify, vits
from saev.formats import shards

ROOT = pathlib.Path(__file__).parent.parent
N_KILLS = 20

IMPORTED = ("saev.data.dump",)
"""What each dump imports. Twenty of them, which are killed, do it once."""


def config_of(root: str, dump_to: str) -> config.Dump:
    """48 shards of one image."""
    vit = config.Vit(vit_family="timm", vit_ckpt="test_vit", vit_weights="random")
    return config.Dump(
        vit=vit,
        data=config.ImageFolder(root),
        vit_layers=(0, 2),
        max_patches_per_shard=202,
        vit_batch_size=4,
        n_workers=2,
        device="cpu",
        dump_to=dump_to,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(48):
        img = PIL.Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
        img.save(root / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def undisturbed(photos: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = dump.main(config_of(str(photos), str(tmp_path_factory.mktemp("undisturbed"))))
    assert not list(verify.problems(out))
    return pathlib.Path(out)


def contents(dpath: pathlib.Path) -> dict[str, bytes]:
    """Everything in a directory, hidden files too, but for code.json, which names the command."""
    names = sorted(set(os.listdir(dpath)) - {"code.json"})  # noqa: PTH208
    return {name: (dpath / name).read_bytes() for name in names}


def start(cfg: config.Dump) -> forked.Popen:
    """A process that dumps."""
    code = (
        "import pickle, sys; from saev.data import dump; dump.main(pickle.loads(bytes.fromhex(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, pickle.dumps(cfg).hex()]
    return forked.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, also=IMPORTED)


def run_killed(cfg: config.Dump, dpath: pathlib.Path, n_new: int, delay_s: float) -> int:
    """The dump's exit status. It gets SIGKILL `delay_s` after it made `n_new` files in `dpath`.

    Counting files instead of seconds kills it in the middle on a machine of any speed.
    """
    n_before = n_files(dpath)
    process = start(cfg)
    while n_files(dpath) < n_before + n_new and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay_s)
    process.kill()
    return process.wait()


def n_files(dpath: pathlib.Path) -> int:
    return len(os.listdir(dpath)) if dpath.exists() else 0  # noqa: PTH208


@pytest.mark.slow
def test_killed_at_twenty_moments(
    photos: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    want, rng = contents(undisturbed), random.Random(0)
    n_kills, n_listed = 0, []
    for attempt in itertools.count():
        cfg = config_of(str(photos), str(tmp_path / f"{attempt}"))
        dpath = pathlib.Path(cfg.dump_to) / undisturbed.name
        kept: dict[str, tuple[int, int]] = {}
        status = -signal.SIGKILL
        while status == -signal.SIGKILL and n_kills < N_KILLS:
            status = run_killed(cfg, dpath, rng.randrange(12), rng.uniform(0, 0.03))
            n_kills += status == -signal.SIGKILL
            kept = check_listed(dpath, want, kept)
            n_listed.append(len(kept))
        assert start(cfg).wait() == 0
        out = shards.ShardDir.open_unchecked(dpath)
        out.finish()
        assert contents(out.dpath) == want
        check_listed(out.dpath, want, kept)
        if n_kills == N_KILLS:
            break
        assert attempt < N_KILLS, f"{n_kills} kills in {attempt + 1} dumps"
    assert any(0 < n < 48 for n in n_listed), "some kills hit a dump in the middle"


def check_listed(
    dpath: pathlib.Path, want: dict[str, bytes], kept: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """Every shard that shards.json lists is there and right, and was not written again since the last look."""
    if not (dpath / "shards.json").exists():
        return {}
    index = json.loads((dpath / "shards.json").read_text())
    now = {}
    for name in (entry["name"] for entry in index):
        assert (dpath / name).read_bytes() == want[name]
        stat = (dpath / name).stat()
        now[name] = (stat.st_ino, stat.st_mtime_ns)
    assert now == now | kept
    return now


@pytest.mark.parametrize("n_jobs", [2, 5, 100])
def test_any_number_of_jobs_in_any_order_gives_the_same_bytes(
    photos: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path, n_jobs: int
) -> None:
    cfg = dataclasses.replace(config_of(str(photos), str(tmp_path)), n_jobs=n_jobs)
    order = list(range(min(n_jobs, 49)))
    random.Random(1).shuffle(order)
    for job_i in order[:3] if n_jobs == 100 else order:
        out = dump.job(config.DumpJob(cfg, job_i))
    if n_jobs == 100:  # three tasks of a hundred, then one process for the rest
        out = dump.main(dataclasses.replace(cfg, n_jobs=1))
    assert contents(pathlib.Path(out)) == contents(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_two_dumps_at_once_end_with_the_same_bytes(
    photos: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path, n_jobs: int
) -> None:
    """The same command twice: the second waits, then finds all done. Divided otherwise, both write, and neither disturbs the other."""
    cfg = config_of(str(photos), str(tmp_path))
    both = [start(cfg), start(dataclasses.replace(cfg, n_jobs=n_jobs))]
    assert [process.wait() for process in both] == [0, 0]
    out = shards.ShardDir.open_unchecked(tmp_path / undisturbed.name)
    out.finish()
    assert contents(out.dpath) == contents(undisturbed)


def test_a_corrupt_image_is_left_out_everywhere(
    photos: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """And once it is mended, its shard alone is dumped again."""
    import saev
    from saev.data import ordered, shuffled

    bad, good = photos / "07.png", (photos / "07.png").read_bytes()
    cfg = config_of(str(photos), str(tmp_path))
    try:
        bad.write_bytes(good[:100])
        with pytest.raises(errors.UserError, match=r"07\.png: cannot be read as an image"):
            dump.main(cfg)
        out = pathlib.Path(dump.main(dataclasses.replace(cfg, skip_corrupt=True)))
    finally:
        bad.write_bytes(good)
    (skipped,) = json.loads((out / "complete.json").read_text())["skipped"]
    assert skipped["image_i"] == 7 and "07.png" in skipped["error"]
    assert not any((out / "acts000007.bin").read_bytes())
    others = [i for i in range(48) if i != 7]

    data = config.Shards(str(out), 2)
    want_NXD = np.concatenate([b.act_NXD for b in ordered.Ordered(config.Shards(str(undisturbed), 2))])
    blocks = list(ordered.Ordered(data, n_imgs=5))
    assert np.concatenate([b.image_i_N for b in blocks]).tolist() == others
    np.testing.assert_array_equal(np.concatenate([b.act_NXD for b in blocks]), want_NXD[others])
    acts = saev.data.Indexed(out, 2)
    n_tokens = want_NXD.shape[1]
    assert len(acts) == 47 * n_tokens and len(acts.images) == 48
    assert acts[7 * n_tokens]["image_i"] == 8
    assert acts.images[acts[7 * n_tokens]["image_i"]].path == "08.png"
    batch = next(iter(shuffled.Shuffled(data, batch_size=47 * n_tokens)))
    assert set(batch.image_i_B.tolist()) == set(others)
    np.testing.assert_array_equal(batch.act_BD, want_NXD[batch.image_i_B, batch.patch_i_B])

    for suffix in (".bin", ".json"):
        (out / f"acts000007{suffix}").unlink()
    dump.main(cfg)
    assert contents(out) == contents(undisturbed)


def test_a_photo_that_the_disk_refuses_is_never_left_out(
    photos: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk goes while the dump runs; once it is back, the same command ends well."""
    cfg = dataclasses.replace(config_of(str(photos), str(tmp_path)), skip_corrupt=True)
    read = pixels._read

    def refused(fpath: pathlib.Path) -> bytes:
        return read(fpath.with_name("gone") if fpath.name == "30.png" else fpath)

    monkeypatch.setattr(pixels, "_read", refused)
    with pytest.raises(errors.UserError, match="gone: cannot be read .No such file or directory"):
        dump.main(cfg)
    monkeypatch.undo()
    out = pathlib.Path(dump.main(cfg))
    assert contents(out) == contents(undisturbed)


def test_an_earlier_dump_of_fewer_images_is_named(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    cfg = config_of(str(tmp_path / "in"), str(tmp_path / "out"))
    img = PIL.Image.new("RGB", (20, 20), (9, 99, 199))
    img.save(tmp_path / "in" / "a.png")
    first = dump.main(cfg)
    assert "earlier dump" not in caplog.text
    img.save(tmp_path / "in" / "b.jfif", "JPEG")
    second = dump.main(cfg)
    want = f"{first}: an earlier dump of this folder listed 1 images; now there are 2, so a new dump"
    assert caplog.text.count(want) == 1 and second != first
    dump.main(cfg)
    assert caplog.text.count("earlier dump") == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_torchs_rounding(
    photos: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path, dtype: str
) -> None:
    import torch

    from saev.data import activations

    out = dump.main(dataclasses.replace(config_of(str(photos), str(tmp_path)), dtype=dtype))
    (want, got) = (activations.Activations(config.Shards(str(d), 2)).read(0, 48) for d in (undisturbed, out))
    rounded = torch.from_numpy(want).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(got, rounded)
    assert (got != want).any()
    fields = json.loads((pathlib.Path(out) / "metadata.json").read_text())
    assert (fields["dtype"], fields["protocol"]) == (dtype, "1.0.1")
    sizes = [(pathlib.Path(d) / "acts000000.bin").stat().st_size for d in (undisturbed, out)]
    assert sizes[0] == 2 * sizes[1]


@pytest.mark.parametrize(
    ("dtype", "value", "match"),
    [
        ("float32", np.nan, r"03\.png: the ViT gives NaN or infinite"),
        ("bfloat16", np.inf, r"03\.png: the ViT gives NaN or infinite"),
        ("float16", 70_000.0, r"03\.png: an activation is too large for float16 .*bfloat16"),
    ],
)
def test_bad_activations_stop_the_dump_and_name_the_image(
    photos: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    value: float,
    match: str,
) -> None:
    forward, batches = vits.Vit.forward, itertools.count()

    def spoilt(self: vits.Vit, imgs_BCHW: Tensor, layers: tuple[int, ...]) -> Tensor:
        acts_BLTD = forward(self, imgs_BCHW, layers)
        if next(batches) == 3:  # one image a shard, so one a batch
            acts_BLTD[0, 1, 5, 7] = value
        return acts_BLTD

    monkeypatch.setattr(vits.Vit, "forward", spoilt)
    cfg = dataclasses.replace(config_of(str(photos), str(tmp_path)), dtype=dtype)
    with pytest.raises(errors.UserError, match=match):
        dump.main(cfg)
    (out,) = tmp_path.iterdir()
    assert sorted(p.name for p in out.glob("acts*.bin")) == [f"acts00000{i}.bin" for i in range(3)]
