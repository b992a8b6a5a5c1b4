"""One flipped bit in a file of a shard directory is refused, or changes nothing; never a traceback. Likewise crafted files."""

import collections.abc
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import shutil

import numpy as np
import pytest
from conftest import as_older

import saev
from saev import errors
from saev.data import activations, config, ordered, shuffled, verify
from saev.formats import shards

N_BITS = 100
"""Bits that are flipped in each small file, drawn with a fixed seed."""
GOLDEN = pathlib.Path(__file__).parent / "data" / "shards_1_0_0"


def all_that_it_says(dpath: pathlib.Path) -> object:
    """Activations by every loader, images, transform and fingerprint."""
    cfg = config.Shards(str(dpath), "all", "all")
    acts = activations.Activations(cfg)
    digest = hashlib.sha256(acts.read(0, acts.n_imgs).tobytes())
    digest.update(acts.image_is_N.tobytes())
    said = [acts.fingerprint, acts.records, acts.photos.described(), acts.space.describe(), acts.layers]
    return digest.hexdigest(), said


def result(call: collections.abc.Callable[[], object]) -> object:
    """What the call returns, or that it refuses. Any other error fails the test."""
    try:
        return call()
    except errors.UserError as err:
        assert "\n" not in str(err)
        return "refused"


def flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


@pytest.fixture
def tiny(make_shards) -> pathlib.Path:
    """3 images, the second left out, in two shards."""
    dpath, _ = make_shards(n_imgs=3, n_patches=2, d_vit=2, layers=(1, 3), per_shard=2, skip=(1,))
    return dpath


@pytest.mark.slow
@pytest.mark.parametrize("partial", [False, True])
def test_every_bit_of_every_small_file(tiny: pathlib.Path, partial: bool) -> None:
    """With `partial` complete.json is missing, as in a dump that was killed at the end."""
    if partial:
        (tiny / "complete.json").unlink()
    want, n_refused = all_that_it_says(tiny), 0
    assert list(verify.problems(tiny)) == []
    rng = random.Random(0)
    for fpath in sorted(p for p in tiny.iterdir() if p.suffix != ".bin"):
        data = fpath.read_bytes()
        bits = range(8 * len(data))
        for bit in rng.sample(bits, min(len(bits), N_BITS)):
            fpath.write_bytes(flipped(data, bit))
            got = result(lambda: all_that_it_says(tiny))
            assert got in (want, "refused"), f"{fpath.name}, bit {bit}"
            n_refused += got == "refused"
        fpath.write_bytes(data)
    assert n_refused > 4 * N_BITS


def test_every_bit_of_the_activations(tiny: pathlib.Path) -> None:
    """Every reader compares; verify names the bytes. Padding may hold anything."""
    (fpath, padded) = sorted(tiny.glob("acts*.bin"))
    cfg = config.Shards(str(tiny), "all", "all")
    calls: dict[str, collections.abc.Callable[[], object]] = {
        "read": lambda: activations.Activations(cfg).read(0, 2),
        "ordered": lambda: list(ordered.Ordered(cfg)),
        "shuffled": lambda: next(iter(shuffled.Shuffled(cfg, batch_size=12))),
        "indexed": lambda: [saev.data.Indexed(tiny, "all", "all")[i]["act"].tolist() for i in range(12)],
    }
    data = fpath.read_bytes()
    for byte in range(0, 48, 5):  # the first image; the second is left out, so that nobody reads it
        fpath.write_bytes(flipped(data, 8 * byte + byte % 8))
        for call in calls.values():
            with pytest.raises(errors.UserError, match=r"acts000000\.bin: bytes \d+ to \d+ differ"):
                call()
        (problem,) = verify.problems(tiny)
        start, stop = map(int, re.search(r"bytes (\d+) to (\d+) differ", problem).groups())
        assert start <= byte <= stop < start + 16
    fpath.write_bytes(data)
    data = padded.read_bytes()
    padded.write_bytes(data[:-1] + b"x")
    for call in calls.values():
        call()
    assert list(verify.problems(tiny)) == []


@pytest.mark.parametrize("patches", ["image", "cls", "all"])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_reader_compares_what_it_reads_and_no_more(
    tiny: pathlib.Path, layer: int, patches: config.Patches
) -> None:
    """Image 0 is 2 layers x ([CLS] and 2 patches) x 8 bytes."""
    fpath = tiny / "acts000000.bin"
    data = fpath.read_bytes()
    for byte in range(48):
        fpath.write_bytes(flipped(data, 8 * byte))
        layer_i, token_i = divmod(byte // 8, 3)
        is_read = (1, 3)[layer_i] == layer and patches in ("all", "image" if token_i else "cls")
        got = result(lambda: activations.Activations(config.Shards(str(tiny), layer, patches)).read(0, 1))
        assert (isinstance(got, str) and got == "refused") == is_read


def test_verify_finds_every_bit_of_what_it_checks(tiny: pathlib.Path) -> None:
    rng = random.Random(1)
    for name in ("images.jsonl", "transform.json", "acts000000.xxh3", "acts000001.json"):
        data = (tiny / name).read_bytes()
        for bit in rng.sample(range(8 * len(data)), min(8 * len(data), 30)):
            (tiny / name).write_bytes(flipped(data, bit))
            assert len(list(verify.problems(tiny))) == 1, f"{name}, bit {bit}"
        (tiny / name).write_bytes(data)


def test_what_was_made_under_a_damaged_shard_is_not_found_again(tiny: pathlib.Path) -> None:
    """No id is made of a checksum that no reader compares: there is none for other bytes."""
    want = activations.Activations(config.Shards(str(tiny))).fingerprint
    old = as_older(pathlib.Path(shutil.copytree(tiny, tiny.parent / "copy" / tiny.name)))
    assert activations.Activations(config.Shards(str(old))).fingerprint == want
    fpath = old / "acts000000.bin"
    data = fpath.read_bytes()
    fpath.write_bytes(flipped(data, 77))
    for _ in range(2):
        with pytest.raises(errors.UserError, match=r"acts000000\.bin: differs from its checksum"):
            _ = activations.Activations(config.Shards(str(old))).fingerprint
    fpath.write_bytes(data)
    assert activations.Activations(config.Shards(str(old))).fingerprint == want


# ---- first use ----


def test_first_use_reads_a_shard_once_and_later_reads_compare(
    make_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpath, _ = make_shards()
    as_older(dpath)
    cfg, n_reads = config.Shards(str(dpath), 7), [0]
    checksums = shards.ShardDir.checksums

    def counted(self: shards.ShardDir, shard_i: int) -> tuple[bytes, str]:
        n_reads[0] += 1
        return checksums(self, shard_i)

    monkeypatch.setattr(shards.ShardDir, "checksums", counted)
    want = [activations.Activations(cfg).fingerprint for _ in range(3)]
    assert n_reads == [4] and len(set(want)) == 1
    fpath = dpath / "acts000001.bin"
    before, data = fpath.stat(), fpath.read_bytes()
    with fpath.open("rb+") as fd:  # the disk changes a bit: same inode, size and times
        fd.write(flipped(data, 5))
    os.utime(fpath, ns=(before.st_atime_ns, before.st_mtime_ns))
    acts = activations.Activations(config.Shards(str(dpath), "all", "all"))
    with pytest.raises(errors.UserError, match=r"acts000001\.bin: bytes 0 to 31 differ"):
        acts.read(0, 10)
    assert n_reads == [4]


def test_another_tools_dump_has_an_id_of_all_its_bytes(tmp_path: pathlib.Path) -> None:
    dpath = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    cfg, fpath = config.Shards(str(dpath)), dpath / "acts000001.bin"
    want, data = activations.Activations(cfg).fingerprint, fpath.read_bytes()
    fpath.write_bytes(flipped(data, 8 * 600))
    assert activations.Activations(cfg).fingerprint != want
    fpath.write_bytes(data)
    assert activations.Activations(cfg).fingerprint == want
    assert {p.name for p in dpath.iterdir()} == {p.name for p in GOLDEN.iterdir()}


def test_another_tools_dump_that_was_wrong_on_first_use(tmp_path: pathlib.Path) -> None:
    """A disk that heals itself leaves the times as they were."""
    dpath = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    cfg, fpath = config.Shards(str(dpath), 7), dpath / "acts000001.bin"
    want, data = activations.Activations(cfg).fingerprint, fpath.read_bytes()
    fpath.write_bytes(flipped(data, 8 * 600))
    assert activations.Activations(cfg).fingerprint != want
    before = fpath.stat()
    fpath.write_bytes(data)
    os.utime(fpath, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(errors.UserError, match="If they are right now .*, `touch` the file"):
        activations.Activations(cfg).read(0, 5)
    fpath.touch()
    acts = activations.Activations(cfg)
    assert acts.read(0, 5).shape == (5, 4, 8) and acts.fingerprint == want


def test_a_cache_that_cannot_be_written_costs_a_read_each_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert activations.Activations(config.Shards(str(GOLDEN), 7)).read(0, 5).shape == (5, 4, 8)
    assert "checksums cannot be cached" in caplog.text


def test_the_same_dump_command_gives_an_older_dump_its_checksums(make_shards) -> None:
    dpath, _ = make_shards(skip=(4,))
    want = {p.name: p.read_bytes() for p in dpath.iterdir()}
    as_older(dpath)
    shards.ShardDir.open_unchecked(dpath).finish()
    assert {p.name: p.read_bytes() for p in dpath.iterdir()} == want


# ---- names ----


def test_a_renamed_directory(make_shards) -> None:
    """A newer dump carries its own checksums. Of an older one only the name can tell whether metadata.json is right."""
    dpath, _ = make_shards()
    want = all_that_it_says(dpath)
    nice = dpath.rename(dpath.parent / "nice")
    assert all_that_it_says(nice) == want
    as_older(nice)
    with pytest.raises(errors.UserError, match=f"name it {dpath.name} again"):
        activations.Activations(config.Shards(str(nice)))
    nice.rename(dpath)
    nice.symlink_to(dpath)
    assert all_that_it_says(nice) == want
    edit(dpath / "metadata.json", d_vit=7)
    with pytest.raises(errors.UserError, match="its name is not the hash of its metadata"):
        activations.Activations(config.Shards(str(dpath)))


def test_another_tools_directory_that_is_named_by_its_hash(tmp_path: pathlib.Path) -> None:
    fields = json.loads((GOLDEN / "metadata.json").read_text())
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    name = hashlib.sha256(text.encode()).hexdigest()
    dpath = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / name))
    assert activations.Activations(config.Shards(str(dpath))).n_imgs == 5
    edit(dpath / "metadata.json", d_vit=9)
    with pytest.raises(errors.UserError, match="its name is not the hash of its metadata"):
        activations.Activations(config.Shards(str(dpath)))


@pytest.mark.parametrize("index", [True, False])
def test_directories_of_june_2025(tmp_path: pathlib.Path, index: bool) -> None:
    """No protocol, no dtype, a seed, `data` a string, and at first no shards.json."""
    dpath = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "june"))
    fields = json.loads((dpath / "metadata.json").read_text())
    del fields["protocol"], fields["dtype"]
    fields |= {"seed": 17, "data": "ImageFolder(root='/data')"}
    (dpath / "metadata.json").write_text(json.dumps(fields))
    if not index:
        (dpath / "shards.json").unlink()
    want_NLTD = np.arange(5 * 2 * 5 * 8, dtype=np.float32).reshape(5, 2, 5, 8) / 8
    acts = activations.Activations(config.Shards(str(dpath), 7))
    np.testing.assert_array_equal(acts.read(0, 5), want_NLTD[:, 1, 1:])
    if not index:  # a file made in full size, and not filled
        (dpath / "acts000002.bin").write_bytes(bytes(640))
        with pytest.raises(errors.UserError, match="incomplete dump: 4 of 5 images"):
            activations.Activations(config.Shards(str(dpath), 7))


# ---- crafted files ----

BAD_JSON = [b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b"{}", b"7", b'"x"', b"[null]", b"[[]]"]
NAMES = [
    "metadata.json",
    "shards.json",
    "images.jsonl",
    "transform.json",
    "complete.json",
    "acts000000.json",
    "acts000000.xxh3",
]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_crafted_files_are_one_line(make_shards, name: str, older: bool) -> None:
    dpath, _ = make_shards(n_imgs=3, n_patches=2, d_vit=2)
    if older:
        as_older(dpath)
    want, fpath = all_that_it_says(dpath), dpath / name

    def check() -> None:
        got = result(lambda: all_that_it_says(dpath))
        assert got in (want, "refused") or (older and name == "transform.json")
        result(lambda: list(verify.problems(dpath)))

    for bad in BAD_JSON:
        fpath.write_bytes(bad)
        check()
    fpath.unlink()
    check()
    os.mkfifo(fpath)
    check()


def edit(fpath: pathlib.Path, **changes: object) -> None:
    fpath.write_text(json.dumps(json.loads(fpath.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_imgs": 10**18},
        {"d_vit": 10**12},
        {"n_patches_per_img": 10**15},
        {"max_patches_per_shard": 10**30},
        {"layers": [3, 3]},
        {"layers": [-1, 7]},
        {"layers": [3, None]},
        {"layers": list(range(10_000))},
        {"cls_token": 1},
        {"n_imgs": 5.5},
        {"vit_ckpt": None},
        {"vit_family": ["timm"]},
        {"data": [1]},
        {"dtype": None},
        {"protocol": ["1.0.0"]},
    ],
)
def test_metadata_of_other_types_and_sizes(tmp_path: pathlib.Path, changes: dict) -> None:
    dpath = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    edit(dpath / "metadata.json", **changes)
    for call in (
        lambda: activations.Activations(config.Shards(str(dpath))),
        lambda: list(verify.problems(dpath)),
    ):
        with pytest.raises(errors.UserError, match="metadata.json"):
            call()


def test_a_key_that_comes_twice(tmp_path: pathlib.Path) -> None:
    dpath = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    text = (dpath / "metadata.json").read_text()
    for twin, match in (('"d_vit": 4, ', "'d_vit' is repeated"), ('"d_model": 4, ', "two names")):
        (dpath / "metadata.json").write_text(text.replace("{", "{" + twin, 1))
        with pytest.raises(errors.UserError, match=match):
            activations.Activations(config.Shards(str(dpath)))


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_a_shard_that_is_no_file(tmp_path: pathlib.Path, kind: str) -> None:
    dpath = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "golden"))
    fpath = dpath / "acts000001.bin"
    fpath.unlink()
    make = {"fifo": os.mkfifo, "folder": os.mkdir, "loop": lambda path: path.symlink_to(path)}
    make[kind](fpath)
    with pytest.raises(errors.UserError, match=r"acts000001\.bin"):
        activations.Activations(config.Shards(str(dpath)))
    assert any("acts000001.bin" in problem for problem in verify.problems(dpath))


def test_a_shard_that_is_listed_in_another_place(make_shards) -> None:
    dpath, _ = make_shards()
    index = json.loads((dpath / "shards.json").read_text())
    for order in itertools.permutations(range(4)):
        (dpath / "shards.json").write_text(json.dumps([index[i] for i in order]))
        if list(order) != sorted(order):
            with pytest.raises(errors.UserError, match="is out of order"):
                activations.Activations(config.Shards(str(dpath)))
