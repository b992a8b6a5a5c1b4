"""CUB's labels against a plain loop over the files' lines. N images, T traits."""

import os
import pathlib
import random

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from saev import errors
from saev.data import cub

IMAGES = """\
7 002.Laysan/b.jpg
3 001.Black/a a.jpg
12 002.Laysan/c.jpg
"""
SPLIT = "3 1\n12 0\n7 0\n"
CLASSES = "12 2\n7 2\n3 1\n"
TRAITS = "1 has_bill_shape::curved_(up_or_down)\n2 has_wing_color::blue\n"
# Not sorted, 5 to 7 fields (in the archive a few lines carry stray numbers before the time), one pair annotated twice.
LABELS = """\
12 2 1 3 1.509
3 1 1 4 27.708
3 2 1 2 0 1.5
7 1 0 4 2.5
7 2 1 1 1 0 11.2
12 1 0 3 0.0
7 2 1 4 5.0
7 2 0 4 5.0
"""


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    return write(tmp_path / "CUB_200_2011", IMAGES, SPLIT, CLASSES, TRAITS, LABELS)


def write(
    dpath: pathlib.Path, images: str, split: str, classes: str, traits: str, labels: str
) -> pathlib.Path:
    (dpath / "attributes").mkdir(parents=True, exist_ok=True)
    (dpath / "images.txt").write_text(images)
    (dpath / "train_test_split.txt").write_text(split)
    (dpath / "image_class_labels.txt").write_text(classes)
    (dpath / "attributes" / "attributes.txt").write_text(traits)
    (dpath / "attributes" / "image_attribute_labels.txt").write_text(labels)
    return dpath


def by_path(root: pathlib.Path, min_certainty: int) -> dict[str, dict]:
    """Everything about each image, keyed by path: lines looked up one at a time, no arrays."""

    def lines(name: str) -> list[list[str]]:
        return [line.split() for line in (root / name).read_text().split("\n") if line.strip()]

    names = {int(t): name for t, name in lines("attributes/attributes.txt")}
    out = {}
    for image_id, *words in lines("images.txt"):
        traits = set()
        for i, t, present, certainty, *_ in lines("attributes/image_attribute_labels.txt"):
            if i == image_id and present == "1" and int(certainty) >= min_certainty:
                traits.add(names[int(t)])
        (is_train,) = (v == "1" for i, v in lines("train_test_split.txt") if i == image_id)
        (class_id,) = (int(v) for i, v in lines("image_class_labels.txt") if i == image_id)
        out[" ".join(words)] = {"traits": traits, "is_train": is_train, "class": class_id}
    return out


def flattened(labels: cub.Cub) -> dict[str, dict]:
    """The same from what was loaded."""
    return {
        path: {
            "traits": {labels.attribute_names_T[t] for t in np.flatnonzero(labels.labels_NT[i])},
            "is_train": bool(labels.is_train_N[i]),
            "class": int(labels.class_N[i]),
        }
        for i, path in enumerate(labels.paths_N)
    }


@pytest.mark.parametrize("min_certainty", [1, 3])
def test_the_last_annotation_counts_if_asked(root: pathlib.Path, min_certainty: int) -> None:
    fpath = root / "attributes/image_attribute_labels.txt"
    for more in ("", "3 2 1 4 1.0\n", "3 2 1 4 1.0\n3 2 1 2 1.0\n"):
        fpath.write_text(LABELS + more)
        last: dict[tuple[str, str], bool] = {}
        for line in (LABELS + more).splitlines():
            i, t, present, certainty, *_ = line.split()
            last[i, t] = present == "1" and int(certainty) >= min_certainty
        labels = cub.load(root, min_certainty=min_certainty, annotations="last")
        ids = [line.split()[0] for line in IMAGES.splitlines() if line.strip()]
        want = [[last[i, t] for t in "12"] for i in ids]
        assert labels.labels_NT.tolist() == want
    assert not last["7", "2"] and cub.load(root).labels_NT[ids.index("7"), 1]


def test_every_field_by_hand(root: pathlib.Path) -> None:
    labels = cub.load(str(root))
    assert labels.paths_N == ["002.Laysan/b.jpg", "001.Black/a a.jpg", "002.Laysan/c.jpg"]
    assert labels.is_train_N.tolist() == [False, True, False]
    assert labels.class_N.tolist() == [2, 1, 2]
    assert labels.attribute_names_T == ["has_bill_shape::curved_(up_or_down)", "has_wing_color::blue"]
    assert labels.labels_NT.tolist() == [[False, True], [True, False], [False, True]]


@pytest.mark.parametrize("min_certainty", [1, 2, 3, 4])
def test_labels_equal_a_plain_loop(root: pathlib.Path, min_certainty: int) -> None:
    got = flattened(cub.load(root, min_certainty=min_certainty))
    assert got == by_path(root, min_certainty)


def test_min_certainty_changes_what_counts(root: pathlib.Path) -> None:
    counts = [int(cub.load(root, min_certainty=c).labels_NT.sum()) for c in (1, 2, 3, 4)]
    assert counts == [4, 4, 3, 2]


@hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    ids=st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True),
    n_traits=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_any_archive_equals_a_plain_loop(
    tmp_path: pathlib.Path, ids: list[int], n_traits: int, seed: int
) -> None:
    """Ids with gaps, all files in orders of their own, several annotators."""
    rng = random.Random(seed)

    def shuffled(lines: list[str]) -> str:
        return "".join(f"{line}\n" for line in rng.sample(lines, len(lines)))

    pairs = [(i, t) for i in ids for t in range(1, n_traits + 1) for _ in range(rng.randint(1, 2))]
    root = write(
        tmp_path / "CUB_200_2011",
        shuffled([f"{i} dir/{i * 7 % 41}.jpg" for i in ids]),
        shuffled([f"{i} {rng.randint(0, 1)}" for i in ids]),
        shuffled([f"{i} {rng.randint(1, 200)}" for i in ids]),
        shuffled([f"{t} trait::{n_traits - t}" for t in range(1, n_traits + 1)]),
        shuffled(
            [
                f"{i} {t} {rng.randint(0, 1)} {rng.randint(1, 4)} {'0 ' * rng.randint(0, 2)}{rng.random():.3f}"
                for i, t in pairs
            ]
        ),
    )
    assert flattened(cub.load(root)) == by_path(root, 3)


@pytest.mark.parametrize("place", ["CUB_200_2011/attributes", "CUB_200_2011", "."])
def test_places_of_attributes_txt(root: pathlib.Path, place: str) -> None:
    want = cub.load(root)
    (root / "attributes" / "attributes.txt").rename(root.parent / place / "attributes.txt")
    assert flattened(cub.load(root)) == flattened(want)


def test_attributes_txt_inside_wins(root: pathlib.Path) -> None:
    (root.parent / "attributes.txt").write_text("1 other::trait\n")
    assert cub.load(root).attribute_names_T[1] == "has_wing_color::blue"


def test_beside_a_relative_root(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "attributes" / "attributes.txt").rename(root.parent / "attributes.txt")
    monkeypatch.chdir(root)
    assert len(cub.load(".").attribute_names_T) == 2


def test_blank_lines_windows_newlines_and_odd_bytes(root: pathlib.Path) -> None:
    want = cub.load(root)
    for fpath in [*root.glob("*.txt"), *root.glob("attributes/*.txt")]:
        fpath.write_bytes(b"\r\n" + fpath.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert flattened(cub.load(root)) == flattened(want)
    (root / "images.txt").write_bytes((root / "images.txt").read_bytes().replace(b"c.jpg", b"\xe4.jpg"))
    assert cub.load(root).paths_N[2] == "002.Laysan/\udce4.jpg"


# ---- refusals ----


def refuses(root: pathlib.Path, match: str) -> None:
    with pytest.raises(errors.UserError, match=match):
        cub.load(root)


@pytest.mark.parametrize(
    "name",
    [
        "images.txt",
        "train_test_split.txt",
        "image_class_labels.txt",
        "attributes/attributes.txt",
        "attributes/image_attribute_labels.txt",
    ],
)
def test_missing_and_empty_files(root: pathlib.Path, name: str) -> None:
    (root / name).write_text("")
    refuses(root, f"{name}: ")
    (root / name).unlink()
    refuses(root, f"{name}: missing")


def test_no_such_directory(tmp_path: pathlib.Path) -> None:
    refuses(tmp_path / "gone", "--cub-root .*gone: no such directory")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("images.txt", "x y.jpg"),
        ("images.txt", "4"),
        ("images.txt", "7 again.jpg"),
        ("images.txt", "4 002.Laysan/b.jpg"),
        ("images.txt", "-4 d.jpg"),
        ("images.txt", "² d.jpg"),
        ("train_test_split.txt", "7 2"),
        ("train_test_split.txt", "3 0"),
        ("train_test_split.txt", "4 1"),
        ("train_test_split.txt", "7"),
        ("train_test_split.txt", "7 1 1"),
        ("train_test_split.txt", "7 one"),
        ("image_class_labels.txt", "7 0"),
        ("image_class_labels.txt", "7 1.0"),
        ("attributes/attributes.txt", "2"),
        ("attributes/attributes.txt", "1 again"),
        ("attributes/image_attribute_labels.txt", "3 1 1"),
        ("attributes/image_attribute_labels.txt", "3 1 1 x 2.0"),
        ("attributes/image_attribute_labels.txt", "3 1 1.0 4 2.0"),
        ("attributes/image_attribute_labels.txt", "3,1,1,4 2.0 1 1"),
        ("attributes/image_attribute_labels.txt", "4 1 1 4 2.0"),
        ("attributes/image_attribute_labels.txt", "-1 1 1 4 2.0"),
        ("attributes/image_attribute_labels.txt", "13 1 1 4 2.0"),
        ("attributes/image_attribute_labels.txt", "999999999999 1 1 4 2.0"),
        ("attributes/image_attribute_labels.txt", "9999999999999999999999 1 1 4 2.0"),
        ("attributes/image_attribute_labels.txt", "3 0 1 4 2.0"),
        ("attributes/image_attribute_labels.txt", "3 3 1 4 2.0"),
        ("attributes/image_attribute_labels.txt", "3 1 2 4 2.0"),
        ("attributes/image_attribute_labels.txt", "3 1 -1 4 2.0"),
        ("attributes/image_attribute_labels.txt", "3 1 1 0 2.0"),
        ("attributes/image_attribute_labels.txt", "3 1 1 5 2.0"),
    ],
)
def test_bad_line_is_named(root: pathlib.Path, name: str, line: str) -> None:
    """The bad line replaces the second, after a blank one: it is line 3."""
    lines = (root / name).read_text().splitlines()
    (root / name).write_text("\n".join([lines[0], "", line, *lines[2:]]) + "\n")
    with pytest.raises(errors.UserError) as info:
        cub.load(root)
    assert f"{root / name}:3: {line!r} is not " in str(info.value)


@pytest.mark.parametrize("name", ["train_test_split.txt", "image_class_labels.txt"])
def test_image_without_a_line(root: pathlib.Path, name: str) -> None:
    lines = [line for line in (root / name).read_text().splitlines() if not line.startswith("7 ")]
    (root / name).write_text("\n".join(lines))
    refuses(root, rf"{name}: 1 images have no line \(first: ids 7\)")


def test_attribute_ids_with_a_gap(root: pathlib.Path) -> None:
    (root / "attributes" / "attributes.txt").write_text("1 a\n3 b\n")
    refuses(root, r"attributes.txt: attribute ids are not 1 \.\.\. 2")


def test_pair_without_a_line(root: pathlib.Path) -> None:
    """A cut file must not read as absent traits."""
    fpath = root / "attributes" / "image_attribute_labels.txt"
    fpath.write_text(LABELS.replace("12 1 0 3 0.0\n", "").replace("3 2 1 2 0 1.5\n", ""))
    refuses(
        root, r"2 image-attribute pairs have no line \(first: image 3 attribute 2, image 12 attribute 1\)"
    )


# ---- another layout, repeated annotations ----


@pytest.mark.parametrize("is_flat", [False, True])
def test_metadata_folder(root: pathlib.Path, tmp_path: pathlib.Path, is_flat: bool) -> None:
    want = cub.load(root)
    copy = tmp_path / "copy"
    copy.mkdir()
    root.rename(copy / "metadata")
    if is_flat:
        for fpath in (copy / "metadata" / "attributes").iterdir():
            fpath.rename(copy / "metadata" / fpath.name)
    got = cub.load(copy)
    assert got.paths_N == want.paths_N and got.attribute_names_T == want.attribute_names_T
    np.testing.assert_array_equal(got.labels_NT, want.labels_NT)


def test_keys_of_dumped_paths() -> None:
    path = "001.Black/a a.jpg"
    for place in ("", "images/", "train/", "test/"):
        assert cub.key(place + path) == path


def test_counts_of_annotations(root: pathlib.Path) -> None:
    labels = cub.load(root)
    assert (labels.n_lines, labels.n_repeated) == (8, 1)
    assert labels.n_disputed == 1  # 7 2
    assert labels.n_uncertain == 2  # 3 2 1 2 and 7 2 1 1
    assert cub.load(root, min_certainty=1).n_uncertain == 0


def test_shares_of_classes(root: pathlib.Path) -> None:
    assert cub.load(root).shares_CT is None
    fpath = root / "attributes" / "class_attribute_labels_continuous.txt"
    fpath.write_text("0.0 1.25\n100 33\n")
    np.testing.assert_allclose(cub.load(root).shares_CT, [[0, 0.0125], [1, 0.33]])
    for text, match in (
        ("0 1\n", r"1 x 2 numbers .* not \(at least\) 2 classes x 2 attributes"),
        ("0 1 2\n3 4 5\n", "2 x 3 numbers"),
        ("0 1\n2 101\n", "up to 101"),
        ("0 1\n2 nan\n", "up to nan"),
        ("0 1\n2 many\n", "is not a table of numbers"),
        ("", "0 x 0|0 x 1|1 x 0"),
    ):
        fpath.write_text(text)
        refuses(root, match)


# ---- what a review found ----


def test_two_lines_run_together_are_named(root: pathlib.Path) -> None:
    fpath = root / "attributes" / "image_attribute_labels.txt"
    fpath.write_text(LABELS.replace("5.0\n7 2 0 4 5.0", "5.0 7 2 0 4 5.0"))
    with pytest.raises(errors.UserError, match=r"labels\.txt:7: .* of 4 to 7 fields"):
        cub.load(root)


@pytest.mark.parametrize("line", ["3 1 1.0 4 27.7", "3 1 0.9 4 27.7", "3 1 1 2.9 27.7"])
def test_fractions_are_no_labels(root: pathlib.Path, line: str) -> None:
    fpath = root / "attributes" / "image_attribute_labels.txt"
    fpath.write_text(LABELS.replace("3 1 1 4 27.708", line))
    with pytest.raises(errors.UserError, match=r"labels\.txt:2: "):
        cub.load(root)


@pytest.mark.parametrize("prefix", ["images/", "./", "./images/"])
def test_paths_of_images_txt_may_begin_at_the_archives_root(root: pathlib.Path, prefix: str) -> None:
    want = cub.load(root)
    lines = [line.partition(" ") for line in IMAGES.splitlines()]
    (root / "images.txt").write_text("".join(f"{i} {prefix}{path}\n" for i, _, path in lines))
    assert cub.load(root).paths_N == want.paths_N


def test_a_subset_of_classes_may_come_with_the_archives_own_shares(root: pathlib.Path) -> None:
    fpath = root / "attributes" / "class_attribute_labels_continuous.txt"
    fpath.write_text("0 1.25\n100 33\n5 5\n")
    assert cub.load(root).shares_CT.shape == (3, 2)


@pytest.mark.parametrize("place", ["beside", "attributes"])
def test_metadata_with_the_attributes_outside(root: pathlib.Path, place: str) -> None:
    want, copy = cub.load(root), root.parent / "copy"
    (copy / "metadata").mkdir(parents=True)
    for fpath in [*root.glob("*.txt"), root / "attributes" / "image_attribute_labels.txt"]:
        (copy / "metadata" / fpath.name).write_bytes(fpath.read_bytes())
    target = copy.parent if place == "beside" else copy / "attributes"
    target.mkdir(exist_ok=True)
    (target / "attributes.txt").write_text(TRAITS)
    assert flattened(cub.load(copy)) == flattened(want)


def test_attributes_beside_a_link_to_the_archive(root: pathlib.Path) -> None:
    (root / "attributes" / "attributes.txt").unlink()
    linked = root.parent / "elsewhere" / "CUB"
    linked.parent.mkdir()
    linked.symlink_to(root)
    (linked.parent / "attributes.txt").write_text(TRAITS)
    assert cub.load(linked).attribute_names_T[1] == "has_wing_color::blue"


# ---- files as people have them ----

NAMES = (
    "images.txt",
    "train_test_split.txt",
    "image_class_labels.txt",
    "attributes/attributes.txt",
    "attributes/image_attribute_labels.txt",
    "attributes/class_attribute_labels_continuous.txt",
)
AS_PEOPLE_HAVE_THEM = {
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "tabs": lambda data: data.replace(b" ", b"\t").replace(b"a\ta", b"a a"),
    "several blanks": lambda data: data.replace(b" ", b" \t ").replace(b"a \t a", b"a a"),
    "Windows": lambda data: data.replace(b"\n", b"\r\n"),
    "old Macs": lambda data: data.replace(b"\n", b"\r"),
    "blanks around": lambda data: b"  " + data.replace(b"\n", b" \t\n  "),
    "no last newline": bytes.rstrip,
    "empty lines": lambda data: data.replace(b"\n", b"\n\n \n"),
    "all at once": lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"  \r\n").rstrip(),
}


@pytest.mark.parametrize("change", AS_PEOPLE_HAVE_THEM)
@pytest.mark.parametrize("name", NAMES)
def test_files_as_people_have_them(root: pathlib.Path, name: str, change: str) -> None:
    (root / NAMES[-1]).write_text("0 1.5\n100 33\n")
    want, shares_CT = flattened(cub.load(root)), cub.load(root).shares_CT
    data = (root / name).read_bytes()
    (root / name).write_bytes(AS_PEOPLE_HAVE_THEM[change](data))
    got = cub.load(root)
    assert flattened(got) == want and got.n_lines == 8
    np.testing.assert_array_equal(got.shares_CT, shares_CT)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_no_text_are_refused(root: pathlib.Path, name: str) -> None:
    """At once: opening a FIFO would wait for somebody to write into it."""
    text = (root / name).read_text() if name != NAMES[-1] else "0 1\n1 0\n"
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        (root / name).write_bytes(text.encode(encoding))
        refuses(root, rf"{name}: is UTF-16 or not text\. Save it as UTF-8")
    (root / name).unlink()
    os.mkfifo(root / name)
    refuses(root, f"{name}: is not a regular file")
    (root / name).unlink()
    (root / name).symlink_to(root / name)
    refuses(root, f"{name}: cannot be read .Too many levels of symbolic links")
    (root / name).unlink()
    (root / name).mkdir()
    refuses(root, f"{name}: is not a regular file")


@pytest.mark.parametrize(
    "path", ["../b.jpg", "a/../../b.jpg", "/etc/passwd", "images//etc/passwd", "images/../b.jpg"]
)
def test_paths_that_leave_the_images_folder_are_refused(root: pathlib.Path, path: str) -> None:
    (root / "images.txt").write_text(IMAGES.replace("002.Laysan/c.jpg", path))
    refuses(root, r"images\.txt: the path .* leaves the image folder")


def test_names_keep_their_bytes(root: pathlib.Path) -> None:
    """Latin-1, quotes, tabs inside: the path is what the file system has."""
    names = [b'002.L\xe9/"b" \'.jpg', b"001.Black/a\ta.jpg", "002.\u2028\x85/c.jpg".encode()]
    lines = [b"%d\t%s" % pair for pair in zip((7, 3, 12), names, strict=True)]
    (root / "images.txt").write_bytes(b"\n".join(lines))
    assert [os.fsencode(path) for path in cub.load(root).paths_N] == names


def test_the_home_folder(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("NAME", root.name)
    assert cub.load("~/$NAME").paths_N == cub.load(root).paths_N
