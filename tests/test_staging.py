"""--stage-to: shards are read from a copy on a fast disk."""

import itertools
import multiprocessing
import os
import pathlib

import numpy as np
import pytest

from saev import errors, launch
from saev.data import activations, shuffled
from saev.data import config as data_config
from saev.formats import shards, staging
from saev.training import config as training_config


def copy_of(shards: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    with staging.to(str(folder)):
        return pathlib.Path(staging.local(str(shards)))


def test_a_copy_is_read_in_place_of_the_original(make_shards, tmp_path: pathlib.Path) -> None:
    shards, _ = make_shards(n_imgs=7, n_patches=4, d_vit=8, layers=(0,), per_shard=3)
    here = activations.Activations.open(data_config.Shards(str(shards)))
    with staging.to(str(tmp_path / "fast")):
        there = activations.Activations.open(data_config.Shards(str(shards)))
    copy = there.dirs[0].dpath
    assert copy.is_relative_to(tmp_path / "fast") and there.fingerprint == here.fingerprint
    np.testing.assert_array_equal(there.read(0, 7), here.read(0, 7))
    assert sorted(f.name for f in copy.iterdir()) == sorted(f.name for f in shards.iterdir())
    assert activations.Activations.open(data_config.Shards(str(shards))).dirs[0].dpath == shards


def test_it_continues_and_copies_nothing_twice(make_shards, tmp_path: pathlib.Path) -> None:
    shards, _ = make_shards(n_imgs=7, n_patches=4, d_vit=8, layers=(0,), per_shard=3)
    copy = copy_of(shards, tmp_path / "fast")
    times = {f.name: f.stat().st_ctime_ns for f in copy.iterdir()}
    (copy / "acts000001.bin").unlink()
    (copy / "acts000002.bin").write_bytes(b"cut short")
    (copy / "metadata.json").unlink()
    assert copy_of(shards, tmp_path / "fast") == copy
    changed = {f.name for f in copy.iterdir() if f.stat().st_ctime_ns != times[f.name]}
    assert changed == {"acts000001.bin", "acts000002.bin", "metadata.json"}
    assert all((copy / f.name).read_bytes() == f.read_bytes() for f in shards.iterdir())


def test_a_flipped_bit_in_the_original_is_found(make_shards, tmp_path: pathlib.Path) -> None:
    shards, _ = make_shards(n_imgs=7, n_patches=4, d_vit=8, layers=(0,), per_shard=3)
    flip(shards / "acts000001.bin")
    with pytest.raises(errors.UserError, match=r"acts000001.bin: differs from its checksum"):
        copy_of(shards, tmp_path / "fast")
    assert not [*tmp_path.glob("fast/**/acts000001.bin"), *tmp_path.glob("fast/**/metadata.json")]


def test_a_damaged_copy_is_replaced(
    make_shards, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the readers of whole images and of single activations, and by the shuffled loader."""
    shards, _ = make_shards(n_imgs=7, n_patches=4, d_vit=8, layers=(0,), per_shard=3)
    here = activations.Activations.open(data_config.Shards(str(shards)))
    with staging.to(str(tmp_path / "fast")):
        there = activations.Activations.open(data_config.Shards(str(shards)))
        damaged = there.dirs[0].dpath / "acts000001.bin"

        def one(acts: activations.Activations) -> bytes:
            data = bytearray(8 * 4)
            acts.read_extents(acts.extents(np.array([14]), np.array([1])), memoryview(data))
            return bytes(data)

        def shuffled_of(acts: activations.Activations) -> np.ndarray:
            batches = shuffled.Shuffled(acts, batch_size=4, seed=0, n_threads=2)
            return np.concatenate([np.asarray(batch.act_BD) for batch in itertools.islice(batches, 7)])

        for read in (lambda acts: acts.read(0, 7), one, shuffled_of):
            flip(damaged)
            caplog.clear()
            np.testing.assert_array_equal(read(there), read(here))
            assert caplog.text.count("acts000001.bin differed from its checksum, and was copied again") == 1
            assert damaged.read_bytes() == (shards / "acts000001.bin").read_bytes()


def test_a_copy_whose_original_is_damaged_too(make_shards, tmp_path: pathlib.Path) -> None:
    shards, _ = make_shards(n_imgs=7, n_patches=4, d_vit=8, layers=(0,), per_shard=3)
    with staging.to(str(tmp_path / "fast")):
        acts = activations.Activations.open(data_config.Shards(str(shards)))
        for dpath in (shards, acts.dirs[0].dpath):
            flip(dpath / "acts000001.bin")
        with pytest.raises(errors.UserError, match=rf"{shards}/acts000001.bin: differs from its checksum"):
            acts.read(0, 7)


def test_padding_takes_no_space(make_shards, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tools write shards of full length, of which the last may be mostly holes. The disk needs no room for them."""
    usage = type("Usage", (), {"free": 2**22})
    monkeypatch.setattr("saev.formats.staging.shutil.disk_usage", lambda _: usage)
    shards, _ = make_shards(n_imgs=7, n_patches=4, d_vit=8, layers=(0,), per_shard=3)
    last = shards / "acts000002.bin"
    data = last.read_bytes()
    os.truncate(last, 2**24)
    copy = copy_of(shards, tmp_path / "fast") / last.name
    assert copy.stat().st_size == 2**24 and copy.read_bytes() == data + bytes(2**24 - len(data))
    assert copy.stat().st_blocks * 512 < 2**22


def flip(fpath: pathlib.Path) -> None:
    data = bytearray(fpath.read_bytes())
    data[70] ^= 16  # in the third token
    fpath.write_bytes(data)


def test_a_disk_that_is_too_small(
    make_shards, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _ = make_shards(n_imgs=7, n_patches=4, d_vit=8, layers=(0,), per_shard=3)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("saev.formats.staging.shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        errors.UserError, match=r"--stage-to .*/fast: .* needs 0.0 GB there, and 0.0 GB are free"
    ):
        copy_of(shards, tmp_path / "fast")


def _copy(shards: str, folder: str) -> str:
    return str(copy_of(pathlib.Path(shards), pathlib.Path(folder)))


def test_several_processes_make_one_copy(make_shards, tmp_path: pathlib.Path) -> None:
    shards, _ = make_shards(n_imgs=7, n_patches=4, d_vit=8, layers=(0,), per_shard=3)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.starmap(_copy, [(str(shards), str(tmp_path / "fast"))] * 3)
    assert len(set(found)) == 1
    assert all((pathlib.Path(found[0]) / f.name).read_bytes() == f.read_bytes() for f in shards.iterdir())


def roots(cfgs: list[training_config.Train]) -> list[str]:
    return [str(activations.Activations.open(cfg.data).dirs[0].dpath) for cfg in cfgs]


def test_the_flag_expands_where_the_stage_runs(
    make_shards, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _ = make_shards(n_imgs=7, n_patches=4, d_vit=8, layers=(0,), per_shard=3)
    slurm = launch.SlurmConfig(stage_to="$OF_THE_NODE/x")
    cfg = training_config.Train(data=data_config.Shards(str(shards)), slurm=slurm)
    with pytest.raises(errors.UserError, match=r"--stage-to \$OF_THE_NODE/x: .* \$OF_THE_NODE is not set"):
        launch.Stage("tests.test_staging:roots", [cfg]).run()
    monkeypatch.setenv("OF_THE_NODE", str(tmp_path / "node"))
    (root,) = launch.Stage("tests.test_staging:roots", [cfg]).run()
    assert root.startswith(f"{tmp_path}/node/x/saev-staged/")


def test_a_damaged_copy_may_be_deleted_but_not_a_dump_in_a_folder_of_that_name(
    make_shards, tmp_path: pathlib.Path
) -> None:
    dpath, _ = make_shards()
    with staging.to(str(tmp_path / "node")):
        copy = shards.ShardDir.open(staging.local(str(dpath)))
    assert copy.remedy == f"Delete {copy.dpath}, a copy of --stage-to. The next job makes a new one."
    mine = tmp_path / shards.COPIES / dpath.name
    mine.parent.mkdir()
    dpath.rename(mine)
    assert "run the same `python -m saev.data` command again" in shards.ShardDir.open(mine).remedy
