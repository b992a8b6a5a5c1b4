"""The shard directory against its documented bytes, read with nothing but json and np.fromfile."""

import hashlib
import json
import pathlib
import resource
import shutil

import numpy as np
import pytest
from conftest import as_older

from saev import errors
from saev.data import activations, config
from saev.formats import shards

GOLDEN = pathlib.Path(__file__).parent / "data" / "shards_1_0_0"
GOLDEN_NLTD = np.arange(5 * 2 * 5 * 8, dtype=np.float32).reshape(5, 2, 5, 8) / 8


@pytest.fixture
def golden(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the golden directory, to damage."""
    return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def metadata(**changes: object) -> shards.Metadata:
    """Of 5 images, 2 a shard."""
    fields = json.loads((GOLDEN / "metadata.json").read_text()) | changes
    return shards.Metadata(**{**fields, "layers": tuple(fields["layers"])})


def records(n: int = 5) -> list[shards.Record]:
    return [shards.Record(f"a/{i}.jpg", "a") for i in range(n)]


def edit(fpath: pathlib.Path, **changes: object) -> None:
    fpath.write_text(json.dumps(json.loads(fpath.read_text()) | changes))


def read(dpath: pathlib.Path, layer: int = 7, patches: config.Patches = "image") -> np.ndarray:
    acts = activations.Activations(config.Shards(str(dpath), layer, patches))
    return acts.read(0, acts.n_imgs)


# ---- bytes ----


def test_bytes_on_disk_are_as_documented(make_shards) -> None:
    dpath, acts_NLTD = make_shards(n_imgs=10, n_patches=4, d_vit=8, layers=(3, 7), per_shard=3)
    index = json.loads((dpath / "shards.json").read_text())
    assert index == [{"name": f"acts00000{i}.bin", "n_imgs": n} for i, n in enumerate([3, 3, 3, 1])]
    for i, entry in enumerate(index):
        flat = np.fromfile(dpath / entry["name"], "<f4")
        shard_NLTD = flat.reshape(3, 2, 5, 8)
        n = entry["n_imgs"]
        np.testing.assert_array_equal(shard_NLTD[:n], acts_NLTD[3 * i : 3 * i + n])
        assert not shard_NLTD[n:].any(), "the last shard is padded with zeros"


def test_directory_is_named_by_the_hash_of_its_metadata(make_shards) -> None:
    dpath, _ = make_shards()
    fields = json.loads((dpath / "metadata.json").read_text())
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert dpath.name == hashlib.sha256(text.encode()).hexdigest()
    assert sorted(fields) == sorted(json.loads((GOLDEN / "metadata.json").read_text()))


def test_images_and_transform_files(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=2)
    lines = [json.loads(line) for line in (dpath / "images.jsonl").read_text().splitlines()]
    assert lines == [
        {"path": "class0/0000.jpg", "label": "class0"},
        {"path": "class1/0001.jpg", "label": "class1"},
    ]
    assert shards.ShardDir.open(dpath).records[1] == ("class1/0001.jpg", "class1")
    assert shards.ShardDir.open(dpath).transform() == {}


@pytest.mark.parametrize("path", ["a/ü\u2028\x85b.jpg", "a/\udce4.jpg", 'a/"\n\\.jpg'])
def test_odd_file_names_survive(path: str, tmp_path: pathlib.Path) -> None:
    """Line separators inside a name, and names that are not UTF-8 (Python's surrogates)."""
    want = [*records(4), shards.Record(path, path)]
    out = shards.ShardDir.create(tmp_path, metadata(), want, {})
    assert out.records == want
    assert shards.ShardDir.create(tmp_path, metadata(), want, {}).dpath == out.dpath


# ---- golden directory ----


@pytest.mark.parametrize("layer_i", [0, 1])
@pytest.mark.parametrize(
    ("patches", "tokens"), [("image", slice(1, 5)), ("cls", slice(0, 1)), ("all", slice(0, 5))]
)
def test_golden_directory_reads(layer_i: int, patches: config.Patches, tokens: slice) -> None:
    got_NTD = read(GOLDEN, layer=(3, 7)[layer_i], patches=patches)
    np.testing.assert_array_equal(got_NTD, GOLDEN_NLTD[:, layer_i, tokens])


def test_negative_layer_counts_from_the_last_recorded() -> None:
    np.testing.assert_array_equal(read(GOLDEN, layer=-1), GOLDEN_NLTD[:, 1, 1:])
    np.testing.assert_array_equal(read(GOLDEN, layer=-2), GOLDEN_NLTD[:, 0, 1:])


def test_golden_metadata_round_trips_to_its_documented_hash() -> None:
    fpath = GOLDEN / "metadata.json"
    got = shards.Metadata.loads(fpath.read_text(), fpath)
    assert got == metadata()
    text = json.dumps(json.loads(fpath.read_text()), sort_keys=True, separators=(",", ":"))
    assert got.hash == hashlib.sha256(text.encode()).hexdigest()


def test_last_file_of_exactly_its_images_reads(golden: pathlib.Path) -> None:
    fpath = golden / "acts000002.bin"
    fpath.write_bytes(fpath.read_bytes()[:320])
    np.testing.assert_array_equal(read(golden), GOLDEN_NLTD[:, 1, 1:])


def test_empty_last_shard_is_tolerated(golden: pathlib.Path) -> None:
    edit(golden / "metadata.json", n_imgs=4)
    index = [{"name": f"acts00000{i}.bin", "n_imgs": n} for i, n in enumerate([2, 2, 0])]
    (golden / "shards.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(read(golden), GOLDEN_NLTD[:4, 1, 1:])


def test_golden_directory_has_no_records() -> None:
    with pytest.raises(errors.UserError, match=r"has no images\.jsonl"):
        _ = shards.ShardDir.open(GOLDEN).records


# ---- refusals ----


def refuses(dpath: pathlib.Path, match: str, **kwargs: object) -> None:
    with pytest.raises(errors.UserError, match=match):
        read(dpath, **kwargs)


@pytest.mark.parametrize("n_listed", [0, 1, 2])
def test_index_that_lacks_shards(golden: pathlib.Path, n_listed: int) -> None:
    index = json.loads((golden / "shards.json").read_text())
    (golden / "shards.json").write_text(json.dumps(index[:n_listed]))
    refuses(golden, f"incomplete dump: {2 * n_listed} of 5 images")


def test_no_index(golden: pathlib.Path) -> None:
    (golden / "shards.json").unlink()
    refuses(golden, "incomplete dump: 4 of 5 images. Finish it with the tool that wrote it")


@pytest.mark.parametrize("text", ["", "[3]", '[{"name": "x"}]', '{"n_imgs": 5}', "7"])
def test_broken_index(golden: pathlib.Path, text: str) -> None:
    (golden / "shards.json").write_text(text)
    refuses(golden, r"shards.json: cannot be read")


def test_index_with_counts_that_do_not_fit(golden: pathlib.Path) -> None:
    index = [{"name": f"acts00000{i}.bin", "n_imgs": n} for i, n in enumerate([1, 2, 2])]
    (golden / "shards.json").write_text(json.dumps(index))
    refuses(golden, "shards.json: shard 0 holds 1 images, but 2 according to metadata.json")


def test_missing_acts_file(golden: pathlib.Path) -> None:
    (golden / "acts000001.bin").unlink()
    refuses(golden, "acts000001.bin is missing")


@pytest.mark.parametrize(("name", "n_bytes"), [("acts000000.bin", 639), ("acts000002.bin", 319)])
def test_truncated_acts_file(golden: pathlib.Path, name: str, n_bytes: int) -> None:
    (golden / name).write_bytes((golden / name).read_bytes()[:n_bytes])
    refuses(golden, rf"{name} is truncated \({n_bytes} of")


@pytest.mark.parametrize("layer", [5, -3, 0])
def test_layer_not_recorded(layer: int) -> None:
    refuses(GOLDEN, rf"layer {layer} was not recorded \(recorded: 3, 7\)", layer=layer)


def test_cls_of_a_model_without(make_shards) -> None:
    dpath, _ = make_shards(cls_token=False)
    refuses(dpath, r"made-up has no \[CLS\] token", patches="cls")


def test_missing_directory(tmp_path: pathlib.Path) -> None:
    refuses(tmp_path / "gone", "gone: no such shard directory")


def test_parent_directory_names_what_is_in_it(make_shards) -> None:
    dpath, _ = make_shards()
    refuses(dpath.parent, f"no metadata.json.*{dpath.name}")


def test_empty_directory(tmp_path: pathlib.Path) -> None:
    refuses(tmp_path, "not a shard directory.*Pass the directory that `python -m saev.data` printed")


@pytest.mark.parametrize("protocol", ["0.9", "1", "3.0", 2.1, None])
def test_other_protocol(golden: pathlib.Path, protocol: str | None) -> None:
    edit(golden / "metadata.json", protocol=protocol)
    refuses(golden, f"shard protocol {protocol!r} is not supported")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": "float64"}, "dtype 'float64' is not supported"),
        ({"layers": "3"}, "metadata.json"),
        ({"layers": []}, "metadata.json"),
        ({"layers": None}, "metadata.json"),
        ({"d_vit": "8"}, "metadata.json"),
        ({"n_imgs": 0}, "metadata.json"),
        ({"max_patches_per_shard": 9}, "9 is smaller than one image"),
    ],
)
def test_metadata_that_does_not_fit(golden: pathlib.Path, changes: dict, match: str) -> None:
    edit(golden / "metadata.json", **changes)
    refuses(golden, match)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_metadata_that_is_no_object(golden: pathlib.Path, text: str) -> None:
    (golden / "metadata.json").write_text(text)
    refuses(golden, "metadata.json: ")


def test_metadata_without_a_key(golden: pathlib.Path) -> None:
    fields = json.loads((golden / "metadata.json").read_text())
    del fields["d_vit"]
    (golden / "metadata.json").write_text(json.dumps(fields))
    refuses(golden, "keys missing: d_vit")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "2: cannot be read"),
        ("3", "2: cannot be read"),
        ('{"path": "x"}', "2: cannot be read"),
        ('{"path": null, "label": "y"}', "2: cannot be read .Expected `str`, got `null`"),
        ('{"path": "x", "label": ["y"]}', "2: cannot be read .Expected `str`, got `array`"),
        ("[" * 100_000, "2: cannot be read .too deeply nested"),
        ('{"path": "../x", "label": "y"}', r"2: the path '\.\./x' leaves the dataset's folder"),
        ('{"path": "a/../../x", "label": "y"}', "2: the path .* leaves the dataset's folder"),
        ('{"path": "/etc/passwd", "label": "y"}', "2: the path .* leaves the dataset's folder"),
        ('{"path": "", "label": "y"}', "2: the path .* leaves the dataset's folder"),
    ],
)
def test_a_bad_record_names_its_line(make_shards, line: str, match: str) -> None:
    """In an older dump, whose images.jsonl has no checksum; else the checksum says so before."""
    dpath, _ = make_shards(n_imgs=3)
    lines = (dpath / "images.jsonl").read_text().splitlines()
    (dpath / "images.jsonl").write_text("\n".join([lines[0], line, lines[2]]) + "\n")
    with pytest.raises(errors.UserError, match=r"images\.jsonl: differs from its checksum"):
        _ = shards.ShardDir.open(dpath).records
    with pytest.raises(errors.UserError, match=rf"images\.jsonl:{match}"):
        _ = shards.ShardDir.open(as_older(dpath)).records


@pytest.mark.parametrize("path", ["a..b/c.jpg", "..a.jpg", "a/..b/c.jpg"])
def test_two_dots_within_a_name_are_a_name(path: str, tmp_path: pathlib.Path) -> None:
    want = [*records(4), shards.Record(path, "a")]
    assert shards.ShardDir.create(tmp_path, metadata(), want, {}).records == want


def test_too_few_records(make_shards) -> None:
    dpath = as_older(make_shards(n_imgs=3)[0])
    (dpath / "images.jsonl").write_text('{"path": "x", "label": "y"}\n')
    with pytest.raises(errors.UserError, match="1 lines for 3 images"):
        _ = shards.ShardDir.open(dpath).records


# ---- interrupted writing ----


def names(dpath: pathlib.Path) -> list[str]:
    return sorted(p.name for p in dpath.iterdir())


def write(out: shards.ShardDir, shard_i: int) -> None:
    image_is = out.metadata.imgs_in(shard_i)
    with out.writing(shard_i) as writer:
        for image_i in image_is:  # in any portions
            writer.write(GOLDEN_NLTD[image_i : image_i + 1])


def test_interrupted_write_leaves_nothing_and_resumes(tmp_path: pathlib.Path) -> None:
    out = shards.ShardDir.create(tmp_path, metadata(), records(), {})
    before = names(out.dpath)
    with pytest.raises(KeyboardInterrupt), out.writing(0) as writer:
        writer.write(GOLDEN_NLTD[:1])
        raise KeyboardInterrupt
    assert names(out.dpath) == before
    assert not out.has(0)
    refuses(out.dpath, "incomplete dump: 0 of 5")

    again = shards.ShardDir.create(tmp_path, metadata(), records(), {})
    for shard_i in (2, 0, 1):  # in any order
        write(again, shard_i)
        assert again.has(shard_i)
    np.testing.assert_array_equal(read(again.dpath, layer=3), GOLDEN_NLTD[:, 0, 1:])
    for name in ("acts000000.bin", "acts000001.bin", "acts000002.bin", "shards.json"):
        assert (again.dpath / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_resuming_with_other_images_is_refused(tmp_path: pathlib.Path) -> None:
    shards.ShardDir.create(tmp_path, metadata(), records(), {})
    other = [*records(4), shards.Record("a/other.jpg", "a")]
    with pytest.raises(errors.UserError, match="was dumped from other images"):
        shards.ShardDir.create(tmp_path, metadata(), other, {})


def test_shard_too_small_for_one_image() -> None:
    with pytest.raises(errors.UserError, match=r"--max-patches-per-shard 9 .* Pass at least 10"):
        metadata(max_patches_per_shard=9)


@pytest.mark.parametrize("limit", [100, 400])
def test_no_space_is_one_error_and_leaves_nothing(tmp_path: pathlib.Path, limit: int) -> None:
    """The kernel's file size limit stands in for a full disk: in the images, and in the padding."""
    out = shards.ShardDir.create(tmp_path, metadata(n_imgs=3), records(3), {})
    before = names(out.dpath)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        match = r"File too large.*acts000001\.bin"
        with pytest.raises(OSError, match=match), out.writing(1) as writer:
            writer.write(GOLDEN_NLTD[:1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(out.dpath) == before


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path: pathlib.Path) -> None:
    """An image that cannot be read while a shard is written is no full disk."""
    out = shards.ShardDir.create(tmp_path, metadata(), records(), {})
    with pytest.raises(FileNotFoundError, match="photo.jpg"), out.writing(0):
        (tmp_path / "photo.jpg").read_bytes()


def test_padding_takes_no_disk_space(tmp_path: pathlib.Path) -> None:
    large = metadata(n_imgs=1, max_patches_per_shard=10_000_000)
    out = shards.ShardDir.create(tmp_path, large, [shards.Record("0.png", "")], {})
    with out.writing(0) as writer:
        writer.write(GOLDEN_NLTD[:1])
    stat = out.acts_fpath(0).stat()
    assert stat.st_size == large.imgs_per_shard * large.img_bytes
    assert stat.st_blocks * 512 < 100_000
