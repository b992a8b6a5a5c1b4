"""Labels of class folders, tables and masks, and splits. N images, T traits, C classes, P patches, D d_vit, K prototypes."""

import collections
import dataclasses
import functools
import logging
import pathlib
import re
import typing as tp

import inprocess
import numpy as np
import polars as pl
import pytest
import sklearn.linear_model
import sklearn.metrics
import sklearn.pipeline
import sklearn.preprocessing
import torch

from saev import errors, scorers, sweeps
from saev.data import activations
from saev.data import config as data_config
from saev.data.traits import base, config, folders, masks, split, table
from saev.formats import patchlabels, shards
from saev.protoeval import check, choose, fit, labels, measure, probe, run, score
from saev.protoeval import config as protoeval_config
from saev.scorers import config as scorers_config

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = pathlib.Path(__file__).parent.parent
D = 6


def write_shards(
    dump_to: pathlib.Path, paths: list[str], acts_NPD: np.ndarray | None = None, skip: tuple[int, ...] = ()
) -> data_config.Shards:
    """One layer, no [CLS]; four patches of noise, if nothing else is given."""
    if acts_NPD is None:
        acts_NPD = np.random.default_rng(0).standard_normal((len(paths), 4, D))
    N, P, width = acts_NPD.shape
    data: dict[str, object] = {"__class__": "ImageFolder"}
    metadata = shards.Metadata("timm", "planted", (3,), P, False, width, N, N * P, data)
    out = shards.ShardDir.create(dump_to, metadata, [shards.Record(p, "") for p in paths], {})
    with out.writing(0) as writer:
        writer.skipped += [shards.Skipped(i, "corrupt") for i in skip]
        writer.write(np.ascontiguousarray(acts_NPD[:, None], np.float32))
    return data_config.Shards(str(out.dpath), 3)


def opened(data: data_config.Shards, test: data_config.Shards | None = None) -> dict:
    train = activations.Activations(data, "--train-data")
    return {"train": train, "test": activations.Activations(test, "--test-data") if test else train}


def dumped(tmp_path: pathlib.Path, paths: list[str], **kwargs: tp.Any) -> dict:
    return opened(write_shards(tmp_path / "shards", paths, **kwargs))


PATHS = [f"{'abc'[i % 3]}/{i}.jpg" for i in range(24)]

# ---- splits ----


def shares(paths: list[str], is_test_N: np.ndarray) -> dict[str, list[bool]]:
    out = collections.defaultdict(list)
    for path, is_test in zip(paths, is_test_N.tolist(), strict=True):
        out[path.partition("/")[0]].append(is_test)
    return out


@pytest.mark.parametrize("share", [0.5, 0.2, 1 / 3])
def test_a_drawn_split_has_the_share_of_each_class_and_no_order(share: float) -> None:
    sizes = {"a": 1, "b": 2, "c": 7, "d": 30, "e": 101}
    paths = [f"{name}/{i}.jpg" for name, n in sizes.items() for i in range(n)]
    class_N = np.array([ord(path[0]) for path in paths])
    is_test_N = split.drawn(paths, class_N, share, 3)
    assert abs(is_test_N.sum() - share * len(paths)) < 1
    for name, is_test in shares(paths, is_test_N).items():
        assert abs(sum(is_test) - share * sizes[name]) < 1 + 1e-9
    order = np.random.default_rng(0).permutation(len(paths))
    again_N = split.drawn([paths[i] for i in order], class_N[order], share, 3)
    np.testing.assert_array_equal(again_N, is_test_N[order])
    assert (split.drawn(paths, class_N, share, 4) != is_test_N).any()


def test_each_image_is_drawn_equally_often() -> None:
    paths, class_N = [f"{i}.jpg" for i in range(10)], np.repeat([0, 1], [3, 7])
    n_N = sum(split.drawn(paths, class_N, 0.3, seed).astype(int) for seed in range(2000))
    np.testing.assert_allclose(n_N / 2000, 0.3, atol=0.05)


def test_sources_of_the_same_images_have_the_same_drawn_split(tmp_path: pathlib.Path) -> None:
    acts = dumped(tmp_path, PATHS)
    one = folders.load(config.ClassFolders(split_seed=5), acts)
    shuffled = [PATHS[i] for i in np.random.default_rng(1).permutation(len(PATHS))]
    lines = [f"{path},{i % 2}" for i, path in enumerate(shuffled)]
    (tmp_path / "t.csv").write_text("\n".join(["path,x", *lines]))
    two = table.load(config.Table(file=str(tmp_path / "t.csv"), binary=("x",), split_seed=5), acts)
    assert two.paths_N == shuffled
    assert dict(zip(one.paths_N, one.is_train_N, strict=True)) == dict(
        zip(two.paths_N, two.is_train_N, strict=True)
    )


def test_split_by_folders_and_other_names(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """The class is the next folder; images of a third split are left out, and nobody asks for their labels."""
    paths = [f"{part}/{c}/{i}.jpg" for part in ("train", "val", "extra") for c in "ab" for i in range(2)]
    acts = dumped(tmp_path, paths)
    cfg = config.ClassFolders(split="folders", split_names=("train", "val"))
    with caplog.at_level(logging.INFO, "saev"):
        got = folders.load(cfg, acts)
    assert got.attribute_names_T == ["class::a", "class::b"]
    assert got.paths_N == paths[:8] and got.is_train_N.tolist() == [True] * 4 + [False] * 4
    assert got.left_out == {*paths[8:]} and "4 images are neither train nor val" in caplog.text
    np.testing.assert_array_equal(got.labels_NT[:, 0], [p.split("/")[1] == "a" for p in got.paths_N])
    with pytest.raises(errors.UserError, match=r"folders: no image is named 'test'; the names are 'extra', "):
        folders.load(config.ClassFolders(split="folders"), acts)


def test_split_by_dumps(tmp_path: pathlib.Path) -> None:
    train = write_shards(tmp_path / "1", PATHS[:9])
    test = write_shards(tmp_path / "2", PATHS[9:])
    got = folders.load(config.ClassFolders(split="dumps"), opened(train, test))
    assert [p for p, is_train in zip(got.paths_N, got.is_train_N, strict=True) if is_train] == PATHS[:9]
    with pytest.raises(errors.UserError, match="--labels.split dumps: pass the train images' dump"):
        folders.load(config.ClassFolders(split="dumps"), opened(train))
    (tmp_path / "t.csv").write_text("path,x\nz/1.jpg,1\nz/2.jpg,0\n")
    rows = config.Table(file=str(tmp_path / "t.csv"), binary=("x",), split="dumps")
    text = "no image with labels is in the dumps, by path .first: z/1.jpg, of --train-data: a/0.jpg"
    with pytest.raises(errors.UserError, match=text):
        table.load(rows, opened(train, test))
    both = write_shards(tmp_path / "3", PATHS[8:])
    with pytest.raises(
        errors.UserError, match=r"--test-data.shard-root .*: 1 of its images are in --train.*c/8"
    ):
        folders.load(config.ClassFolders(split="dumps"), opened(train, both))


def test_split_by_a_file(tmp_path: pathlib.Path) -> None:
    acts = dumped(tmp_path, PATHS)
    names = ["fit", "rest", "other"]
    frame = pl.DataFrame({"path": PATHS, "part": [names[i // 3 % 3] for i in range(24)]}).reverse()
    frame.write_parquet(tmp_path / "s.parquet")
    cfg = config.ClassFolders(
        split="file", split_file=str(tmp_path / "s.parquet"), split_column="part", split_names=("fit", "rest")
    )
    got = folders.load(cfg, acts)
    assert got.paths_N == [p for i, p in enumerate(PATHS) if i // 3 % 3 < 2]
    assert got.is_train_N.tolist() == [i // 3 % 3 == 0 for i in range(24) if i // 3 % 3 < 2]
    frame.head(20).write_parquet(tmp_path / "s.parquet")
    with pytest.raises(
        errors.UserError, match=r"s.parquet: 4 of 24 images have no row there \(first: a/0.jpg; "
    ):
        folders.load(cfg, acts)
    frame.with_columns(part=pl.when(pl.col("path") != "b/1.jpg").then("part")).write_parquet(
        tmp_path / "s.parquet"
    )
    with pytest.raises(errors.UserError, match=r"s.parquet: row 23 \(b/1.jpg\) has no 'part'. Fill it in"):
        folders.load(cfg, acts)
    with pytest.raises(errors.UserError, match="--labels.split-file is missing"):
        folders.load(config.ClassFolders(split="file"), acts)
    with pytest.raises(errors.UserError, match="--labels.split-file x: needs --labels.split file"):
        config.ClassFolders(split_file="x")


# ---- class folders ----


def test_groups_are_unions_of_classes(tmp_path: pathlib.Path) -> None:
    fpath = tmp_path / "g.toml"
    fpath.write_text('"long bill" = ["heron", "s*"]\nwader = ["heron"]\n"[odd]" = ["[x]", "?ern"]')
    names = ["[x]", "gull", "heron", "snipe", "stork", "tern"]
    got, has_TC = folders.groups(fpath, names)
    want = {"long bill": {"heron", "snipe", "stork"}, "wader": {"heron"}, "[odd]": {"[x]", "tern"}}
    assert {
        g: {n for n, has in zip(names, has_C, strict=True) if has}
        for g, has_C in zip(got, has_TC, strict=True)
    } == want
    fpath.write_text('x = ["b"]')
    labels_NT = folders.load(config.ClassFolders(groups=str(fpath)), dumped(tmp_path, PATHS)).labels_NT
    np.testing.assert_array_equal(labels_NT, [[path[0] == "b"] for path in PATHS])


BAD_GROUPS = {
    'x = ["a", "dog"]': r"g.toml: x has 'dog', but no class has that name. The classes are a, b, c\.",
    'x = ["*"]': r"g.toml: x has all classes, so it does not vary",
    "x = 3": r"g.toml: x is not a list of class names; write lines such as",
    "x = []": r"g.toml: x is not a list",
    "": r"g.toml: has no groups; write lines",
    "x = [": r"g.toml: not valid TOML",
}


@pytest.mark.parametrize("text", BAD_GROUPS)
def test_bad_groups(text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "g.toml").write_text(text)
    with pytest.raises(errors.UserError, match=BAD_GROUPS[text]) as caught:
        folders.load(config.ClassFolders(groups=str(tmp_path / "g.toml")), dumped(tmp_path, PATHS))
    assert "\n" not in str(caught.value)


def test_bad_class_folders(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config.ClassFolders()
    with pytest.raises(errors.UserError, match="--train-data.shard-root is missing: the class folders are"):
        folders.load(cfg, {})
    with pytest.raises(errors.UserError, match=r"c.jpg: lies in no class folder"):
        folders.load(cfg, dumped(tmp_path, [*PATHS, "c.jpg"]))
    with pytest.raises(errors.UserError, match=r"all images are of one class \(a\)"):
        folders.load(cfg, dumped(tmp_path / "one", PATHS[::3]))
    monkeypatch.setattr(base, "MAX_CELLS", 71)
    with pytest.raises(
        errors.UserError, match=r"24 images x 3 traits need .* Merge classes with --labels.groups"
    ):
        folders.load(cfg, dumped(tmp_path / "large", PATHS))


# ---- tables ----

TABLE = [
    ("a/0.jpg", "1", "red", "1.5"),
    ("b/1.jpg", "No", "blue", "2"),
    ("c/2.jpg", "", "NA", "-3e1"),
    ("a/3.jpg", "TRUE", " red  one", "nan"),
    ("b/4.jpg", "n/a", "red", "2.0000"),
    ("c/5.jpg", "0", "blue", ""),
]
WANT = {
    "bin": [1, 0, -1, 1, -1, 0],
    "col::blue": [0, 1, -1, 0, 0, 1],
    "col::red": [1, 0, -1, 0, 1, 0],
    "col::red one": [0, 0, -1, 1, 0, 0],
    "num::at least 2": [0, 1, 0, -1, 1, -1],
    "num::at least 1.5": [1, 1, 0, -1, 1, -1],
}


def write_table(fpath: pathlib.Path, form: str) -> None:
    rows = [("path", "bin", "col", "num"), *TABLE]
    match form:
        case "parquet":
            pl.DataFrame(TABLE, ["path", "bin", "col", "num"], orient="row").write_parquet(fpath)
        case "typed parquet":
            typed = {
                "path": [row[0] for row in TABLE],
                "bin": [True, False, None, True, None, False],
                "col": pl.Series(
                    [row[2].strip() if row[2] != "NA" else None for row in TABLE], dtype=pl.Categorical
                ),
                "num": [1.5, 2.0, -30.0, float("nan"), 2.0, None],
                "unused": [[1], [2], [3], [4], [5], [6]],
            }
            pl.DataFrame(typed).write_parquet(fpath)
        case "quoted":
            fpath.write_text("\n".join(",".join(f'"{cell}"' for cell in row) for row in rows))
        case "bom":
            text = "\r\n".join(";".join(row) for row in rows)
            fpath.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n\r\n".encode())
        case mark:
            fpath.write_text("\n".join(mark.join([*row[:3], row[3], "x"]) for row in rows) + "\n")


@pytest.mark.parametrize("form", ["parquet", "typed parquet", "quoted", "bom", ",", ";", "\t"])
def test_columns_become_traits(form: str, tmp_path: pathlib.Path) -> None:
    write_table(tmp_path / "t", form)
    cfg = config.Table(
        file=str(tmp_path / "t"), binary=("bin",), categorical=("col",), numeric=("num=2", "num=1.5")
    )
    got = table.load(cfg, {})
    assert got.paths_N == [row[0] for row in TABLE] and got.attribute_names_T == list(WANT)
    want_NT = np.stack(list(WANT.values()), axis=1)
    np.testing.assert_array_equal(got.labels_NT, want_NT == 1)
    np.testing.assert_array_equal(got.known_NT, want_NT >= 0)


def test_a_table_without_missing_values_and_other_names(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "file,x,kind,fold\n./p/1.jpg,0,u,a\np/2.jpg,1,u,b\np/3.jpg,1,v,a\np/4.jpg,0,v,b\np/5.jpg,1,w,c\n"
    (tmp_path / "t.csv").write_text(text)
    cfg = config.Table(file=str(tmp_path / "t.csv"), path_column="file", binary=("x",), class_column="kind")
    got = table.load(cfg, {})
    assert got.known_NT is None and got.class_N.tolist() == [0, 0, 1, 1, 2]
    assert got.is_train_N.sum() in (2, 3) and got.words.listed == str(tmp_path / "t.csv")
    cfg = dataclasses.replace(cfg, split="file", split_column="fold", split_names=("b", "a"))
    got = table.load(cfg, {})
    assert got.paths_N == [f"p/{i}.jpg" for i in (1, 2, 3, 4)] and got.left_out == {"p/5.jpg"}
    assert got.is_train_N.tolist() == [False, True, False, True]
    got = table.load(dataclasses.replace(cfg, categorical=("kind",)), {})
    assert got.attribute_names_T == ["x", "kind::u", "kind::v"]  # w is only on the image that is left out
    monkeypatch.setattr(base, "MAX_CELLS", 14)
    with pytest.raises(
        errors.UserError, match=r"t.csv: 5 images x 3 traits need .*Is kind a column of names\?"
    ):
        table.load(dataclasses.replace(cfg, categorical=("kind",)), {})


Change = dict[str, tp.Any]
BAD_TABLES: dict[str, tuple[Change, str, str]] = {
    "no file": ({"file": ""}, "", r"--labels.file is missing: pass a CSV or Parquet"),
    "gone": ({"file": "/nowhere/t.csv"}, "", r"/nowhere/t.csv: no such file. Pass a CSV or Parquet"),
    "no columns": ({"binary": ()}, "", r"t.csv: name the columns that are traits with --labels.binary"),
    "unknown": ({"binary": ("y",)}, "", r"t.csv: has no column 'y'. Its columns are path, x, z, split\."),
    "unknown path": ({"path_column": "file"}, "", r"t.csv: has no column 'file'"),
    "unknown class": ({"class_column": "kind"}, "", r"t.csv: has no column 'kind'"),
    "unknown split": ({"split": "file", "split_column": "s"}, "", r"t.csv: has no column 's'"),
    "duplicate": ({}, "a/1.jpg,1,2,train\n", r"t.csv: rows 3 and 6 have the same path a/1.jpg. Keep one"),
    "no path": ({}, ",1,2,train\n", r"t.csv: row 6 has no 'path'. Fill it in"),
    "not binary": (
        {},
        "a/7.jpg,maybe,2,test\n",
        r"t.csv: row 6: x is 'maybe', not 0 or 1 \(or empty\). Correct",
    ),
    "several": ({"binary": ("z",)}, "a/7.jpg,0,7,test\n", r"row 2: z is '2', not 0 or 1 .*\(5 such rows\)"),
    "no number": ({"numeric": ("x=0.5",), "binary": ()}, "a/7.jpg,u,2,test\n", r"row 6: x is 'u', no number"),
    "one value": (
        {"numeric": ("z=2",)},
        "",
        r"t.csv: the trait 'z::at least 2' does not vary: every labelled .* has",
    ),
    "never": (
        {"numeric": ("z=9",)},
        "",
        r"the trait 'z::at least 9' does not vary: no labelled image has it",
    ),
    "no label": ({"binary": ("x", "e")}, "EMPTY", r"the trait 'e' does not vary: no labelled image has it"),
    "twice": ({"binary": ("x", "x")}, "", r"t.csv: the trait 'x' is given twice"),
    "no split": ({"split": "file"}, "a/7.jpg,0,2,\n", r"t.csv: row 6 \(a/7.jpg\) has no 'split'"),
    "one split": (
        {"split": "file", "split_names": ("train", "val")},
        "",
        r"split file: no image is named 'val'; the names are 'test', 'train'. Pass",
    ),
    "ragged": ({}, "a/7.jpg,0,2,test,5,6\n", r"t.csv: is not a table \(.*\). Pass a CSV or Parquet"),
    "bytes": ({}, "BYTES", r"t.csv:6: holds the byte 0xff, which is not UTF-8"),
    "two columns": ({}, "HEADER", r"t.csv: has two columns 'x'. Rename one"),
    "only a header": ({}, "NOTHING", r"t.csv: has no rows"),
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_bad_tables(what: str, tmp_path: pathlib.Path) -> None:
    change, line, message = BAD_TABLES[what]
    fpath = tmp_path / "t.csv"
    text = "path,x,z,split\na/0.jpg,1,2,train\na/1.jpg,0,2,test\na/2.jpg,1,2,train\na/3.jpg,0,2,test\n"
    text = {
        "EMPTY": text.replace(",2,", ",")
        .replace(",z,", ",")
        .replace("\n", ",\n")
        .replace("split,", "split,e"),
        "BYTES": text,
        "HEADER": text.replace("z", "x"),
        "NOTHING": text.partition("\n")[0],
    }.get(line, text + line)
    fpath.write_bytes(text.encode() + b"\xff" * (line == "BYTES"))
    cfg = dataclasses.replace(config.Table(file=str(fpath), binary=("x",)), **change)
    with pytest.raises(errors.UserError, match=message) as caught:
        table.load(cfg, {})
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_is_cut(tmp_path: pathlib.Path) -> None:
    write_table(tmp_path / "t", "parquet")
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-9])
    with pytest.raises(errors.UserError, match=r"/t: is not a table \(.*\). Pass a CSV or Parquet file"):
        table.load(config.Table(file=str(tmp_path / "t"), binary=("bin",)), {})


# ---- masks ----


def label_patches(data: data_config.Shards, id_NP: np.ndarray, name: str = "") -> None:
    classes = {0: "background", 3: "bill", 4: "leg", 9: "horn"}
    patchlabels.write(shards.ShardDir.open(data.shard_root), name, id_NP, classes, {})


def test_parts_become_traits(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    id_NP = np.random.default_rng(4).choice([0, 0, 0, 3, 4], (24, 4))
    id_NP[:, 0], id_NP[7] = 0, -1
    id_NP[8] = [0, -1, -1, 3]
    data = write_shards(tmp_path, PATHS, skip=(5,))
    label_patches(data, id_NP, "x")
    cfg = config.Masks(label_name="x", min_patches=2)
    with caplog.at_level(logging.INFO, "saev"):
        got = masks.load(cfg, opened(data))
    assert "because all images or none have them: horn" in caplog.text
    assert got.paths_N == PATHS and got.attribute_names_T == ["part::bill", "part::leg"]
    want_NT = np.array([[list(row).count(i) >= 2 for i in (3, 4)] for row in id_NP])
    np.testing.assert_array_equal(got.labels_NT, want_NT)
    assert got.known_NT is not None and np.flatnonzero(~got.known_NT.all(axis=1)).tolist() == [7]
    named = masks.load(dataclasses.replace(cfg, parts=("background",)), opened(data))
    assert named.labels_NT[[7, 8]].tolist() == [[False], [False]]  # not twice in image 8
    one = masks.load(dataclasses.replace(cfg, min_patches=1, parts=("leg",)), opened(data))
    np.testing.assert_array_equal(one.labels_NT[:, 0], (id_NP == 4).any(axis=1))


def test_bad_parts(tmp_path: pathlib.Path) -> None:
    id_NP = np.tile([0, 0, 3, 4], (24, 1))
    id_NP[:8, 3] = 0
    data = write_shards(tmp_path / "1", PATHS)
    with pytest.raises(
        errors.UserError, match=r"labels.bin: no such file.* Label the patches with `python -m"
    ):
        masks.load(config.Masks(), opened(data))
    label_patches(data, id_NP)
    assert masks.load(config.Masks(), opened(data)).attribute_names_T == ["part::leg"]
    for part, text in (
        ("wing", "no such class. The classes are background, bill, leg, horn"),
        ("bill", "all images have it"),
        ("horn", "no image has it"),
    ):
        with pytest.raises(errors.UserError, match=f"--labels.parts {part}: {text}"):
            masks.load(config.Masks(parts=("leg", part)), opened(data))
    with pytest.raises(errors.UserError, match="all images have the same parts. Change --labels.min-patches"):
        masks.load(config.Masks(min_patches=4), opened(data))
    label_patches(data, np.full((24, 4), -1))
    with pytest.raises(errors.UserError, match="no image has a labelled patch. Make them with"):
        masks.load(config.Masks(), opened(data))


def test_parts_of_two_dumps_are_joined_by_name(tmp_path: pathlib.Path) -> None:
    id_NP = np.tile([0, 0, 3, 4], (24, 1))
    id_NP[:8, 3] = 0
    data, other = (write_shards(tmp_path / name, [f"{name}{path}" for path in PATHS]) for name in "xy")
    label_patches(data, id_NP)
    patchlabels.write(shards.ShardDir.open(other.shard_root), "", id_NP, {0: "sky", 3: "u", 4: "leg"}, {})
    got = masks.load(config.Masks(split="dumps", parts=("leg", "u")), opened(data, other))
    want_NT = [
        [4 in row, path[0] == "y"] for path, row in zip(got.paths_N, np.tile(id_NP, (2, 1)), strict=True)
    ]
    assert got.labels_NT.tolist() == want_NT and got.is_train_N.tolist() == [True] * 24 + [False] * 24


# ---- missing labels ----


def test_every_cell_equals_sklearn_on_the_images_that_have_the_label() -> None:
    """Choice, constant scorer and linear probe, each on its trait's known labels."""
    rng, n_traits = np.random.default_rng(3), 6
    splits = []
    for n in (60, 50):
        labels_NT, known_NT = rng.random((n, n_traits)) < 0.4, rng.random((n, n_traits)) < 0.7
        known_NT[:, 0] = True
        known_NT[:, 2] = known_NT[:, 1]
        scores_KN = rng.integers(-4, 4, (9, n)).astype(np.float32)
        mean_ND, max_ND = rng.standard_normal((2, n, D)).astype(np.float32)
        made = score.Scores(scores_KN, mean_ND, max_ND, np.arange(n))
        splits.append(score.Split(made, np.arange(n), labels_NT & known_NT, known_NT))
    train, test = splits
    bank = fit.Bank("a", scorers.Prototypes.of(torch.zeros(9, D), torch.zeros(D), "dot"), (9,))
    cfg = protoeval_config.ProtoEval(n_train=(20, -1), n_boot=0)
    cells = choose.choose(train, [bank], cfg)
    constant, *probes, few, every, null = measure.measure(cells, train, test, cfg)
    ap = sklearn.metrics.average_precision_score
    order = choose.permutation(60, 0)
    for n, of_probes, row in ((20, probes[::2], few), (60, probes[1::2], every)):
        drawn = choose.train_subset(60, n, 0)
        for t in range(n_traits):
            rows = drawn[train.known_NT[drawn, t]]
            seen, y = test.known_NT[:, t], test.labels_NT[test.known_NT[:, t], t]
            aps = [ap(train.labels_NT[rows, t], scores_N[rows]) for scores_N in train.scores.scores_KN]
            assert row.best_RT[0][t] == np.argmax(np.round(aps, 12))
            assert row.train_ap_RT[0][t] == pytest.approx(max(aps), abs=1e-12)
            want = ap(y, test.scores.scores_KN[row.best_RT[0][t], seen])
            assert row.test_ap_RT[0][t] == pytest.approx(want, abs=1e-12)
            assert constant.test_ap_RT[0][t] == pytest.approx(y.mean(), abs=1e-12)
            for of_probe, name in zip(of_probes, ("mean_ND", "max_ND"), strict=True):
                scaler = sklearn.preprocessing.StandardScaler().fit(getattr(train, name)[drawn].astype(float))
                x_nD, x_ND = (scaler.transform(getattr(s, name).astype(float)) for s in (train, test))
                labels, known = (of[drawn][:, t : t + 1] for of in (train.labels_NT, train.known_NT))
                x_nE = torch.from_numpy(np.column_stack([x_nD[drawn], np.ones(n)]))
                (penalty,) = probe.choose_penalties(x_nE, labels, known, 0)
                model = sklearn.linear_model.LogisticRegression(
                    C=1 / penalty, tol=1e-12, solver="newton-cholesky"
                )
                model.fit(x_nD[rows], train.labels_NT[rows, t])
                assert of_probe.test_ap_RT[0][t] == pytest.approx(
                    ap(y, model.decision_function(x_ND[seen])), abs=1e-9
                )
    for t in range(n_traits):  # labels and whether they are known move together
        y, rows = train.labels_NT[order, t], train.known_NT[order, t]
        aps = [ap(y[rows], scores_N[rows]) for scores_N in train.scores.scores_KN]
        assert null.best_RT[0][t] == np.argmax(np.round(aps, 12))
        assert null.train_ap_RT[0][t] == pytest.approx(max(aps), abs=1e-12)
        seen = test.known_NT[:, t]
        want = ap(test.labels_NT[seen, t], test.scores.scores_KN[null.best_RT[0][t], seen])
        assert null.test_ap_RT[0][t] == pytest.approx(want, abs=1e-12)


# ---- the command ----


def lines_of(labels_NT: np.ndarray, paths: list[str], names: list[str]) -> list[str]:
    cells = np.where(labels_NT, "1", "0").tolist()
    return [",".join(["path", *names]), *(",".join([p, *row]) for p, row in zip(paths, cells, strict=True))]


@pytest.fixture
def planted(tmp_path: pathlib.Path) -> protoeval_config.ProtoEval:
    """A table of 300 images of 10 folders in random order, three traits that depend on the folder, and activations
    that show trait t in dimension t of a patch."""
    rng = np.random.default_rng(8)
    paths = [f"c{i % 10}/{i}.jpg" for i in rng.permutation(300)]
    has_CT = rng.random((10, 3)) < [0.3, 0.5, 0.4]
    labels_NT = has_CT[[int(path[1]) for path in paths]] ^ (rng.random((300, 3)) < 0.1)
    (tmp_path / "t.csv").write_text("\n".join(lines_of(labels_NT, paths, ["u", "v", "w"])))
    acts_NPD = 0.1 * rng.standard_normal((300, 4, D))
    acts_NPD[:, 2, :3] += 5 * labels_NT
    order = rng.permutation(300)  # of the dump
    data = write_shards(tmp_path / "shards", [paths[i] for i in order], acts_NPD[order])
    return protoeval_config.ProtoEval(
        scorer=scorers_config.Pca(both_signs=True),
        labels=config.Table(file=str(tmp_path / "t.csv"), binary=("u", "v", "w")),
        train_data=data,
        n_prototypes=(12,),
        n_train=(-1,),
        n_boot=20,
        dump_to=str(tmp_path / "results"),
        scorers_to=str(tmp_path / "scorers"),
        device="cpu",
    )


def summary(dpath: str) -> dict[str, float]:
    frame = pl.read_csv(pathlib.Path(dpath) / "summary.csv")
    return dict(frame.select("scorer", "map").iter_rows())


@pytest.mark.slow
def test_labels_follow_their_images(planted: protoeval_config.ProtoEval, tmp_path: pathlib.Path) -> None:
    """Shuffled rows give the same numbers; labels of other rows do not, and are refused."""
    want = summary(run.main([planted]))
    assert want["Logistic probe (max)"] > 0.95 and want["Pca"] > want["constant"] + 0.2
    header, *rows = (tmp_path / "t.csv").read_text().splitlines()
    np.random.default_rng(1).shuffle(rows)
    (tmp_path / "t.csv").write_text("\n".join([header, *rows]))
    again = summary(run.main([planted]))  # what permuted labels give depends on the rows' order
    assert {name: again[name] for name in again if "permuted" not in name} == pytest.approx(
        {name: want[name] for name in want if "permuted" not in name}, abs=1e-9
    )
    paths, cells = zip(*(row.split(",", 1) for row in rows), strict=True)
    for by, whose in ((1, "next"), (-1, "previous")):
        moved = [f"{p},{c}" for p, c in zip(paths, [*cells[-by:], *cells[:-by]], strict=True)]
        (tmp_path / "t.csv").write_text("\n".join([header, *moved]))
        text = f"t.csv: these labels are implausible: the folders explain .*the {whose} row's labels. Inspect"
        with pytest.raises(errors.UserError, match=text):
            run.main([planted])
        forced = pathlib.Path(run.main([dataclasses.replace(planted, force=True)]))
        assert f"if each image gets the {whose} row's labels.**" in (forced / "table.md").read_text()
        wrong = summary(str(forced))
        assert wrong["constant"] == pytest.approx(want["constant"], abs=0.03)
        assert max(wrong.values()) < wrong["constant"] + 0.1


@pytest.mark.parametrize("n_folders", [2, 30])
def test_unrelated_labels_and_sorted_ones_do_not_look_moved(n_folders: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        number_N = np.sort(rng.integers(0, n_folders, 240)) if seed % 2 else rng.integers(0, n_folders, 240)
        has_C = rng.random(n_folders) < 0.5
        labels_N = rng.random(240) < 0.5 if seed % 4 < 2 else has_C[number_N]
        paths = [f"{c}/{i}.jpg" for i, c in enumerate(number_N)]
        made = base.Traits(paths, np.arange(240) % 2 == 0, ["t"], labels_N[:, None], number_N)
        assert check._shift_problems(made) == []


def test_check_says_what_is_missing(
    planted: protoeval_config.ProtoEval, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tmp_path / "t.csv").read_text().splitlines()
    text[1:31] = [line[:-1] for line in text[1:31]]  # no w
    (tmp_path / "t.csv").write_text("\n".join(text))
    labels.describe([planted])
    got = capsys.readouterr().out
    made = labels.load(planted, opened(planted.train_data))
    w_N, known_N = made.labels_NT[:, 2], made.known_NT[:, 2]
    parts = [f"{w_N[known_N & side].mean():.3f}" for side in (made.is_train_N, ~made.is_train_N)]
    assert f"| w | 1 | {parts[0]} | {parts[1]} |" in got
    assert "t.csv, split drawn with seed 0: 300 images of 10 classes, 3 traits: 150 train images, 150" in got
    assert "30 of 900 labels are missing; classes explain" in got and "CUB" not in got
    assert "holds all 150 train images" in got
    table_md = (pathlib.Path(run.main([planted])) / "table.md").read_text()
    assert "30 of 900 labels are missing; each trait's AP is over the images" in table_md
    assert "t.csv, split drawn with seed 0; seed 0." in table_md and "certainty" not in table_md
    run.main([dataclasses.replace(planted, seed=1)])
    out = inprocess.run("protoeval.py", "--report", planted.dump_to).stdout
    assert re.search(r"Labels \w{8}, t.csv, split drawn with seed 0:", out)


def test_a_split_that_was_written_can_be_used_again(planted: protoeval_config.ProtoEval) -> None:
    dpath = run.main([planted])
    fpath = pathlib.Path(dpath) / "split.csv"
    made = labels.load(planted, opened(planted.train_data))
    assert pl.read_csv(fpath).rows() == [
        (p, "train" if is_train else "test")
        for p, is_train in zip(made.paths_N, made.is_train_N, strict=True)
    ]
    source = dataclasses.replace(
        tp.cast(config.Table, planted.labels), split="file", split_file=str(fpath), split_seed=99
    )
    assert run.main([dataclasses.replace(planted, labels=source)]) == dpath  # the same labels and split
    other = dataclasses.replace(tp.cast(config.Table, planted.labels), split_seed=99)
    assert run.main([dataclasses.replace(planted, labels=other)]) != dpath


def test_a_table_of_other_images(planted: protoeval_config.ProtoEval, tmp_path: pathlib.Path) -> None:
    header, *rows = (tmp_path / "t.csv").read_text().splitlines()
    dump = planted.train_data.shard_root
    first = activations.Activations(planted.train_data).records[0].path

    def fails(rows: list[str], text: str, **change: object) -> None:
        (tmp_path / "t.csv").write_text("\n".join([header, *rows]))
        with pytest.raises(errors.UserError, match=text) as caught:
            run.main([dataclasses.replace(planted, **change)])
        assert "\n" not in str(caught.value)

    elsewhere = [f"photos/{row}" for row in rows]
    text = f"{dump}: none of its images is in .*t.csv, joined by path. Its first path is {first}, that of .*t.csv is "
    fails(elsewhere, f"{text}photos/{rows[0].split(',')[0]}. Write paths relative to")
    fails(
        [*rows, "c1/x.jpg,1,0,1"],
        r"1 of t.csv's t\w+ images are not in these shards.*first: c1/x.jpg",
        force=True,
    )
    fails(
        rows[1:],
        rf"1 of 300 images have no row in .*t.csv \(first: {rows[0].split(',')[0]}\). Add them there",
    )


def test_a_table_of_cubs_attributes_is_cub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal labels have equal results, wherever they come from: even the folder's name is the same."""
    import PIL.Image

    from saev.data import cub
    from saev.demo import minicub

    monkeypatch.setattr(minicub, "picture", lambda bird, rng: (PIL.Image.new("RGB", (8, 8)),) * 2)
    minicub.draw(tmp_path / "cub", n_imgs=80)
    found = cub.load(tmp_path / "cub")
    names = found.attribute_names_T
    header, *rows = lines_of(found.labels_NT, found.paths_N, names)
    part = ["train" if is_train else "test" for is_train in found.is_train_N]
    (tmp_path / "t.csv").write_text("\n".join([f"{header},split", *map("{},{}".format, rows, part)]))
    cfg = protoeval_config.ProtoEval(
        scorer=scorers_config.Random(),
        cub_root=str(tmp_path / "cub"),
        train_data=write_shards(tmp_path / "shards", found.paths_N),
        n_prototypes=(4,),
        n_train=(-1,),
        n_boot=0,
        force=True,
        dump_to=str(tmp_path / "results"),
        scorers_to=str(tmp_path / "scorers"),
        device="cpu",
    )
    source = config.Table(file=str(tmp_path / "t.csv"), binary=tuple(names), split="file")
    as_table = dataclasses.replace(cfg, cub_root="", labels=source)
    as_cub = dataclasses.replace(cfg, cub_root="", labels=config.Cub(cfg.cub_root))
    assert run.main([cfg]) == run.main([as_cub]) == run.main([as_table])


@pytest.mark.slow
def test_several_sources_share_one_pass(
    planted: protoeval_config.ProtoEval, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files as one by one; each image is read once for the fit and once for all scores."""
    n_imgs = 300
    sources = [planted.labels, config.ClassFolders(), config.ClassFolders(split_seed=1)]
    cfgs = [
        dataclasses.replace(planted, labels=source, scorer=scorer)
        for source in sources[:2]
        for scorer in (scorers_config.Pca(), scorers_config.Random())
    ]
    assert len(sweeps.group(cfgs)) == 1
    want = [
        (pathlib.Path(run.main([c for c in cfgs if c.labels == source])) / "summary.csv").read_text()
        for source in sources[:2]
    ]
    n_read = collections.Counter()
    read = activations.Activations.read

    def counting(self: activations.Activations, start: int, stop: int) -> np.ndarray:
        n_read[self.n_imgs] += stop - start
        return read(self, start, stop)

    monkeypatch.setattr(activations.Activations, "read", counting)
    other = [dataclasses.replace(c, dump_to=str(tmp_path / "other")) for c in cfgs]
    got = run.each(other)
    assert [(pathlib.Path(dpath) / "summary.csv").read_text() for dpath in got] == want
    assert n_read[n_imgs] == n_imgs
    assert {p.name for p in (tmp_path / "other").iterdir()} == {pathlib.Path(dpath).name for dpath in got}
    n_read.clear()
    apart = [dataclasses.replace(planted, labels=s, dump_to=str(tmp_path / "apart")) for s in sources]
    run.each(apart)
    assert n_read[n_imgs] == 2 * n_imgs  # another split has scorers of its own


def test_one_source_only(tmp_path: pathlib.Path) -> None:
    assert protoeval_config.ProtoEval(cub_root="x").source == config.Cub("x")
    assert protoeval_config.ProtoEval(labels=config.Masks()).source == config.Masks()
    with pytest.raises(errors.UserError, match="--cub-root x: other labels are given too"):
        protoeval_config.ProtoEval(cub_root="x", labels=config.Table())


# ---- docs/labels.md ----


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs/labels.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path: pathlib.Path) -> None:
    groups, sweep = blocks("toml")
    (rows,) = blocks("csv")
    paths = [line.partition(",")[0] for line in rows.splitlines()[1:]]
    assert len(paths) == 12
    data = write_shards(tmp_path / "shards", paths)
    id_NP = np.zeros((12, 4), np.int32)
    id_NP[:6, :2], id_NP[6:9, 2:] = 3, 4
    label_patches(data, id_NP)
    files = {"traits.csv": rows, "groups.toml": groups, "several.toml": sweep}
    for name, text in files.items():
        (tmp_path / name).write_text(text.replace("groups.toml", str(tmp_path / "groups.toml")))
    page = (ROOT / "docs/labels.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    uv run (protoeval.py .*)$", page, re.MULTILINE)
    assert len(commands) == 6
    shown = functools.partial(re.sub, r"\b(traits.csv|groups.toml|several.toml)", rf"{tmp_path}/\1")
    for command in commands:
        words = shown(command.replace("shards/HASH", data.shard_root)).split()
        out = inprocess.run(
            *words, "--dump-to", tmp_path / "r", "--scorers-to", tmp_path / "s", "--device", "cpu"
        )
        assert out.returncode == 0, (command, out.stderr)
        assert ("A constant scorer's mean AP" if "--check" in command else "| constant |") in out.stdout
    made = {
        path
        for fpath in (tmp_path / "r").glob("*/traits.parquet")
        for path in pl.read_parquet(fpath)["trait"]
    }
    assert {*re.findall(r"`((?:class|part|habitat|bill_mm)::[^`]+)`", page)} <= made
    assert {"waterbird", "has a long bill", "wading"} <= made
