"""The check of shard directories: every kind of damage is named, nothing else is."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import forked
import pytest
from conftest import as_older

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
    assert line.endswith(f"{dtype}, checksums match")


def test_every_bad_shard_is_named_and_no_other(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=20, per_shard=2)
    files = [dpath / f"acts{i:06}.bin" for i in range(10)]
    flip(files[1], 0)
    flip(files[8], files[8].stat().st_size - 1)
    files[3].unlink()
    files[5].write_bytes(files[5].read_bytes()[:-1])
    assert list(verify.problems(dpath)) == [
        f"{files[1]}: bytes 0 to 31 differ from their checksum",
        f"{files[3]} is missing",
        f"{files[5]} is truncated (639 of 640 bytes)",
        f"{files[8]}: bytes 512 to 639 differ from their checksum",
    ]


def test_padding_does_not_count(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=4, per_shard=3)
    last = dpath / "acts000001.bin"
    flip(last, last.stat().st_size - 1)
    assert list(verify.problems(dpath)) == []
    last.write_bytes(last.read_bytes()[:320])
    assert list(verify.problems(dpath)) == []


def test_a_checksum_that_does_not_fit(make_shards) -> None:
    """The files that hold checksums are covered by checksums too."""
    dpath, _ = make_shards()
    flip(dpath / "acts000001.xxh3", 3)
    edit(dpath / "acts000002.json", n_imgs=2)
    (first, second) = verify.problems(dpath)
    assert first.startswith(f"{dpath / 'acts000001.xxh3'}: differs from its checksum")
    assert second.startswith(f"{dpath / 'acts000002.json'}: differs from its own checksum")
    edit(dpath / "complete.json", pieces={})
    with pytest.raises(errors.UserError, match="complete.json: lacks one of the fields"):
        list(verify.problems(dpath))


def test_an_older_dump_without_checksums_of_pieces(make_shards) -> None:
    dpath = as_older(make_shards()[0])
    assert list(verify.problems(dpath)) == []
    edit(dpath / "complete.json", xxh3_128=sums(dpath) | {"acts000002.bin": "0" * 32})
    (dpath / "acts000002.json").unlink()
    (problem,) = verify.problems(dpath)
    assert problem.startswith(f"{dpath / 'acts000002.bin'}: differs from its checksum (bytes 0 to")


def edit(fpath: pathlib.Path, **changes: object) -> None:
    fpath.write_text(json.dumps(json.loads(fpath.read_text()) | changes))


def sums(dpath: pathlib.Path) -> dict[str, str]:
    return json.loads((dpath / "complete.json").read_text())["xxh3_128"]


def test_shards_that_are_not_dumped_yet(make_shards) -> None:
    dpath, _ = make_shards()
    index = json.loads((dpath / "shards.json").read_text())
    (dpath / "shards.json").write_text(json.dumps(index[:2]))
    flip(dpath / "acts000001.bin", 7)
    assert list(verify.problems(dpath)) == [
        f"{dpath / 'acts000002.bin'} is not dumped yet",
        f"{dpath / 'acts000003.bin'} is not dumped yet",
        f"{dpath / 'acts000001.bin'}: bytes 0 to 31 differ from their checksum",
    ]


def test_millions_of_missing_shards_are_not_listed_one_by_one(tmp_path: pathlib.Path) -> None:
    dpath = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    edit(dpath / "metadata.json", n_imgs=4_000_000_001)
    index = json.loads((dpath / "shards.json").read_text())[:2]
    (dpath / "shards.json").write_text(json.dumps(index))
    lines = list(verify.problems(dpath))
    assert len(lines) == 21 and lines[-1].endswith("1,999,999,979 more shards are not dumped yet")


def test_another_tools_dump_has_sizes_only() -> None:
    assert list(verify.problems(GOLDEN)) == []
    assert verify.describe(GOLDEN).endswith("float32, sizes match, no checksums recorded")


@pytest.mark.parametrize("name", ["metadata.json", "complete.json"])
def test_a_damaged_json_is_one_error(make_shards, name: str) -> None:
    dpath, _ = make_shards()
    (dpath / name).write_text("{")
    with pytest.raises(errors.UserError, match=name):
        list(verify.problems(dpath))


@pytest.mark.slow
def test_the_command(make_shards) -> None:
    good, _ = make_shards()
    bad, _ = make_shards(seed=1)
    flip(bad / "acts000000.bin", 9)
    command = [sys.executable, "-m", "saev.data.verify", str(good), str(bad)]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        verify.describe(good),
        f"{bad / 'acts000000.bin'}: bytes 0 to 31 differ from their checksum",
    ]
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: 1 problem(s). Delete the damaged files")
    for name in ("complete.json", "acts000000.bin", "acts000000.json"):
        (bad / name).unlink()
    (bad / "shards.json").write_text(json.dumps(json.loads((bad / "shards.json").read_text())[1:]))
    read, write = os.pipe()
    os.close(read)  # a reader that stopped changes nothing else
    done = forked.run([*command[:3], str(bad)], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    again = "Run the same `python -m saev.data` command again."
    assert (done.returncode, done.stderr) == (2, f"error: the dump is not complete. {again}\n")
