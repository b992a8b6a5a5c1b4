"""The check of shard directories: every kind of damage is named, nothing else is."""

import json
import pathlib
import subprocess
import sys

import pytest

from saev import errors
from saev.data import verify

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / "data" / "shards_1_0_0"


def flip(fpath: pathlib.Path, at: int) -> None:
    data = bytearray(fpath.read_bytes())
    data[at] ^= 1
    fpath.write_bytes(data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_directory_has_no_problems(make_shards, dtype: str) -> None:
    dpath, _ = make_shards(dtype=dtype, skip=(4,))
    assert list(verify.problems(dpath)) == []
    line = verify.describe(dpath)
    assert "complete: 10 images (1 left out as corrupt), 4 shards" in line
    assert line.endswith(f"{dtype}, checksums right")


def test_every_bad_shard_is_named_and_no_other(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=20, per_shard=2)
    files = [dpath / f"acts{i:06}.bin" for i in range(10)]
    flip(files[1], 0)
    flip(files[8], files[8].stat().st_size - 1)
    files[3].unlink()
    files[5].write_bytes(files[5].read_bytes()[:-1])
    assert list(verify.problems(dpath)) == [
        f"{files[1]} differs from its checksum",
        f"{files[3]} is missing",
        f"{files[5]} is truncated (639 of 640 bytes)",
        f"{files[8]} differs from its checksum",
    ]


def test_padding_does_not_count(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=4, per_shard=3)
    last = dpath / "acts000001.bin"
    flip(last, last.stat().st_size - 1)
    assert list(verify.problems(dpath)) == []
    last.write_bytes(last.read_bytes()[:320])
    assert list(verify.problems(dpath)) == []


def test_a_wrong_checksum(make_shards) -> None:
    dpath, _ = make_shards()
    text = json.loads((dpath / "complete.json").read_text())
    text["xxh3_128"]["acts000002.bin"] = "0" * 32
    (dpath / "complete.json").write_text(json.dumps(text))
    assert list(verify.problems(dpath)) == [f"{dpath / 'acts000002.bin'} differs from its checksum"]


def test_shards_that_are_not_dumped_yet(make_shards) -> None:
    dpath, _ = make_shards()
    index = json.loads((dpath / "shards.json").read_text())
    (dpath / "shards.json").write_text(json.dumps(index[:2]))
    flip(dpath / "acts000001.bin", 7)
    assert list(verify.problems(dpath)) == [
        f"{dpath / 'acts000002.bin'} is not dumped yet",
        f"{dpath / 'acts000003.bin'} is not dumped yet",
        f"{dpath / 'acts000001.bin'} differs from its checksum",
    ]


def test_another_tools_dump_has_sizes_only() -> None:
    assert list(verify.problems(GOLDEN)) == []
    assert verify.describe(GOLDEN).endswith("float32, no checksums recorded, sizes right")


@pytest.mark.parametrize("name", ["metadata.json", "complete.json"])
def test_a_damaged_json_is_one_error(make_shards, name: str) -> None:
    dpath, _ = make_shards()
    (dpath / name).write_text("{")
    with pytest.raises(errors.UserError, match=name):
        list(verify.problems(dpath))


def test_the_command(make_shards) -> None:
    good, _ = make_shards()
    bad, _ = make_shards(seed=1)
    flip(bad / "acts000000.bin", 9)
    command = [sys.executable, "-m", "saev.data.verify", str(good), str(bad)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        verify.describe(good),
        f"{bad / 'acts000000.bin'} differs from its checksum",
    ]
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: 1 problem(s). Delete the named files")
