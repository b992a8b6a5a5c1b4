"""mini-CUB: CUB's layout, and attributes that can be seen."""

import inspect
import itertools
import pathlib

import numpy as np
import PIL.Image
import pytest
import sklearn.metrics

from saev.data import cub
from saev.demo import minicub

pytestmark = pytest.mark.slow

N = 60


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    dpath = tmp_path_factory.mktemp("minicub") / "CUB_200_2011"
    minicub.draw(dpath, n_imgs=N)
    return dpath


def lines(fpath: pathlib.Path) -> list[list[str]]:
    return [line.split() for line in fpath.read_text().splitlines()]


def test_layout_is_cubs(root: pathlib.Path) -> None:
    images = lines(root / "images.txt")
    assert [i for i, _ in images] == [str(i) for i in range(1, N + 1)]
    assert {p for _, p in images} == {
        p.relative_to(root / "images").as_posix() for p in root.glob("images/*/*.jpg")
    }
    classes = dict(lines(root / "classes.txt"))
    assert len(classes) == 20 and all(name.startswith(f"{int(i):03}.") for i, name in classes.items())
    class_of = dict(lines(root / "image_class_labels.txt"))
    assert all(classes[class_of[i]] == path.split("/")[0] for i, path in images)
    assert {v for _, v in lines(root / "train_test_split.txt")} == {"0", "1"}
    names = lines(root / "attributes" / "attributes.txt")
    assert len(names) >= 30 and all(name.startswith("has_") and "::" in name for _, name in names)
    assert len(lines(root / "attributes" / "certainties.txt")) == 4
    shares = lines(root / "attributes" / "class_attribute_labels_continuous.txt")
    assert len(shares) == 20 and {len(row) for row in shares} == {len(names)}


def test_labels_cover_every_pair_and_some_lines_have_extra_fields(root: pathlib.Path) -> None:
    rows = lines(root / "attributes" / "image_attribute_labels.txt")
    assert [(int(r[0]), int(r[1])) for r in rows] == [
        (i, t) for i in range(1, N + 1) for t in range(1, len(minicub.ATTRIBUTES) + 1)
    ]
    assert {len(r) for r in rows} == {5, 6, 7}
    assert {r[3] for r in rows if r[2] == "1"} == {"1", "2", "3", "4"}  # the certainty filter has work to do


def test_prevalences() -> None:
    rng = np.random.default_rng((0, 0xB12D))
    profiles = [{g: str(rng.choice(v)) for g, v in minicub.GROUPS.items()} for _ in range(20)]
    birds = [minicub._bird(rng, i % 20, profiles[i % 20]) for i in range(640)]
    present_NT = np.array([[minicub._present(b, name) for name in minicub.ATTRIBUTES] for b in birds])
    assert present_NT.mean(axis=0).min() > 0.04 and present_NT.mean(axis=0).max() < 0.58
    assert inspect.signature(minicub.draw).parameters["n_imgs"].default >= 600


def test_neighbouring_ids_are_unrelated_birds(root: pathlib.Path) -> None:
    """Else labels that slip by one image would still fit."""
    class_N = cub.load(root).class_N
    assert (class_N[1:] == class_N[:-1]).mean() < 0.25


def purple_pixels(fpath: pathlib.Path) -> int:
    """Only breasts are purple."""
    r, g, b = np.asarray(PIL.Image.open(fpath), np.int64).transpose(2, 0, 1)
    return int(((b - g > 50) & (r - g > 20) & (b > r)).sum())


def test_labels_on_disk_are_those_of_the_pictures(root: pathlib.Path) -> None:
    """And one line further they are not."""
    data = cub.load(root, min_certainty=1)
    purple_N = [purple_pixels(root / "images" / path) for path in data.paths_N]
    label_N = data.labels_NT[:, data.attribute_names_T.index("has_breast_color::purple")]
    assert sklearn.metrics.roc_auc_score(label_N, purple_N) > 0.9
    assert sklearn.metrics.roc_auc_score(np.roll(label_N, 1), purple_N) < 0.75


def colour_at(bird: minicub.Bird, x: int, y: int) -> np.ndarray:
    """Median RGB around a point of the bird's own canvas."""
    layer = np.asarray(minicub._plumage(bird, np.random.default_rng(0))[0])
    return np.median(layer[y - 9 : y + 9, x - 9 : x + 9, :3].reshape(-1, 3), axis=0)


@pytest.mark.parametrize(
    ("group", "at"),
    [
        ("has_wing_color", (230, 250)),
        ("has_breast_color", (330, 280)),
        ("has_crown_color", (365, 150)),
        ("has_bill_color", (430, 190)),
    ],
)
def test_colours_are_seen_where_they_are_named(group: str, at: tuple[int, int]) -> None:
    traits = {g: v[0] for g, v in minicub.GROUPS.items()} | {
        "has_wing_pattern": "solid",
        "has_breast_pattern": "solid",
    }
    for value in minicub.GROUPS[group]:
        seen = colour_at(minicub.Bird(0, traits | {group: value}, None), *at)
        distance = {name: np.abs(seen - np.array(rgb)).sum() for name, rgb in minicub.PALETTE.items()}
        assert min(distance, key=distance.__getitem__) == value


@pytest.mark.parametrize("group", ["has_wing_color", "has_breast_color", "has_crown_color"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_colours_differ_in_the_finished_picture(group: str, size: str) -> None:
    """Values of a group, all else and all chance equal: the mean RGB of the pixels that change, pair by pair."""
    traits = {g: v[0] for g, v in minicub.GROUPS.items()} | {"has_size": size}
    birds = [minicub.Bird(0, traits | {group: value}, None) for value in minicub.GROUPS[group]]
    pictures = [np.asarray(minicub.picture(b, np.random.default_rng(4))[0], np.int64) for b in birds]
    changed = (np.ptp(pictures, axis=0) > 60).any(axis=2)
    assert changed.sum() >= 256  # one 14 x 14 patch at 224 pixels
    means = [picture[changed].mean(axis=0) for picture in pictures]
    assert all(np.abs(a - b).max() > 40 for a, b in itertools.combinations(means, 2))


@pytest.mark.parametrize("group", [g for g in minicub.GROUPS if "color" not in g])
def test_every_other_attribute_changes_the_picture(group: str) -> None:
    """At least 200 of its 65,536 pixels, much."""
    traits = {g: v[0] for g, v in minicub.GROUPS.items()} | {"has_size": "large"}
    birds = [minicub.Bird(0, traits | {group: value}, None) for value in minicub.GROUPS[group]]
    pictures = [np.asarray(minicub.picture(b, np.random.default_rng(4))[0], np.int64) for b in birds]
    for a, b in itertools.pairwise(pictures):
        assert (np.abs(a - b).sum(axis=2) > 90).sum() >= 200


def test_same_seed_same_files(tmp_path: pathlib.Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        minicub.draw(tmp_path / name, n_imgs=20, seed=seed)
    one, again, other = (
        {f.relative_to(dpath): f.read_bytes() for f in dpath.rglob("*") if f.is_file()}
        for dpath in (tmp_path / name for name in ("one", "again", "other"))
    )
    assert again == one and len([fpath for fpath in one if fpath.suffix == ".jpg"]) == 20
    assert other[pathlib.Path("images.txt")] != one[pathlib.Path("images.txt")]


def test_whole_or_not_at_all(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    before = (root / "images.txt").stat().st_mtime_ns
    minicub.draw(root, n_imgs=5)  # exists: left alone
    assert (root / "images.txt").stat().st_mtime_ns == before
    monkeypatch.setattr(minicub, "_write_attributes", fail)
    with pytest.raises(KeyboardInterrupt):
        minicub.draw(tmp_path / "CUB_200_2011", n_imgs=5)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_small_photos(root: pathlib.Path) -> None:
    fpath = next(root.glob("images/*/*.jpg"))
    with PIL.Image.open(fpath) as img:
        assert (img.size, img.mode, img.format) == ((256, 256), "RGB", "JPEG")
