"""Labels that cannot be wrong in silence. N images, T traits."""

import dataclasses
import pathlib

import numpy as np
import PIL.Image
import pytest

from saev import errors
from saev.data import config as data_config
from saev.data import cub, images
from saev.demo import minicub
from saev.protoeval import check, config, labels


def planted(n_images: int = 600, n_traits: int = 40, n_classes: int = 20, seed: int = 0) -> cub.Cub:
    """Each class has its traits; prevalences as CUB's, of mean 0.1 or so."""
    rng = np.random.default_rng(seed)
    class_N = np.sort(rng.integers(1, n_classes + 1, n_images))
    p_CT = rng.beta(0.3, 2.4, (n_classes + 1, n_traits))
    return cub.Cub(
        [f"{c:03}.Bird_{c}/{i}.jpg" for i, c in enumerate(class_N)],
        rng.random(n_images) < 0.5,
        [f"has_{'wing' if t % 2 else 'bill'}_color::{t}" for t in range(n_traits)],
        rng.random((n_images, n_traits)) < p_CT[class_N],
        class_N,
    )


def test_plausible_labels_pass() -> None:
    assert check.problems(planted()) == []


def witnessed() -> cub.Cub:
    """With what other annotators saw: a share of each class's images, certain or not."""
    labels, rng = planted(n_images=1200), np.random.default_rng(2)
    mean_CT = np.stack([labels.labels_NT[labels.class_N == c].mean(axis=0) for c in range(1, 21)])
    shares_CT = np.clip(1.3 * mean_CT + 0.05 * rng.random(mean_CT.shape), 0, 1)
    return dataclasses.replace(labels, shares_CT=shares_CT)


def test_labels_that_agree_with_the_archives_class_means_pass() -> None:
    labels = witnessed()
    assert check.problems(labels) == []
    want = np.corrcoef(
        *(
            (x_CT - x_CT.mean(axis=0)).ravel()
            for x_CT in (
                np.stack([labels.labels_NT[labels.class_N == c].mean(axis=0) for c in range(1, 21)]),
                labels.shares_CT,
            )
        )
    )[0, 1]
    assert check.agreement(labels) == pytest.approx(want)
    assert f"correlate {want:.2f} with class_attribute" in check.describe(labels)
    assert "no class_attribute_labels_continuous.txt" in check.describe(planted())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("by", [-1, 1, 7])
def test_labels_shifted_by_a_class_or_a_trait_disagree_with_them(axis: int, by: int) -> None:
    labels = witnessed()
    if axis:
        wrong = dataclasses.replace(labels, labels_NT=np.roll(labels.labels_NT, by, axis=1))
    else:
        start = np.searchsorted(labels.class_N, (labels.class_N - 1 + by) % 20 + 1)
        wrong = dataclasses.replace(labels, labels_NT=labels.labels_NT[start])
    assert any("class_attribute_labels_continuous" in problem for problem in check.problems(wrong))


def test_alike_classes_shifted_by_one_disagree_too() -> None:
    """Neighbours in the list of classes are alike in CUB: the agreement stays high, but is better one class further."""
    labels, rng = planted(n_images=6000), np.random.default_rng(3)
    p_CT = np.clip(0.15 + np.cumsum(0.03 * rng.standard_normal((21, 40)), axis=0), 0, 1)
    labels_NT = rng.random(labels.labels_NT.shape) < p_CT[labels.class_N]
    labels = dataclasses.replace(labels, labels_NT=labels_NT, shares_CT=p_CT[1:])
    assert check.problems(labels) == []
    (problem,) = check.problems(dataclasses.replace(labels, shares_CT=np.roll(p_CT[1:], 1, axis=0)))
    assert "shifted by one class" in problem


def test_the_bug_that_made_a_table_of_0_86() -> None:
    """Nearly every label loaded as positive: a constant scorer gets 0.83."""
    labels = planted()
    rng = np.random.default_rng(1)
    wrong = dataclasses.replace(labels, labels_NT=rng.random(labels.labels_NT.shape) < 0.83)
    assert any("constant scorer gets a mean AP of 0.83" in problem for problem in check.problems(wrong))
    with pytest.raises(errors.UserError, match=r"implausible: .*0\.83.*--force"):
        check.refuse_implausible(wrong, "cub")


@pytest.mark.slow
def test_the_real_set_has_a_narrow_window() -> None:
    labels = planted(*check.REAL, n_classes=200)
    is_train_N = np.random.default_rng(0).permutation(len(labels.class_N)) < check.REAL_TRAIN
    labels = dataclasses.replace(labels, is_train_N=is_train_N)
    assert check.problems(labels) == []
    inverted = dataclasses.replace(labels, is_train_N=~is_train_N)
    assert check.problems(inverted) == [
        "5,794 of the images are train images; CUB has 5,994; the split is the wrong way round"
    ]
    one_less = cub.Cub(
        labels.paths_N[1:],
        is_train_N[1:],
        labels.attribute_names_T,
        labels.labels_NT[1:] | (np.arange(312) < 80),
        labels.class_N[1:],
    )
    assert any("CUB's is about 0.10" in problem for problem in check.problems(one_less))
    rng = np.random.default_rng(1)
    more = dataclasses.replace(labels, labels_NT=labels.labels_NT | (rng.random(check.REAL) < 0.15))
    assert any("0.2" in p and "CUB's is about 0.10" in p for p in check.problems(more))


@pytest.mark.parametrize("value", [True, False])
def test_a_split_whose_labels_are_all_alike(value: bool) -> None:
    """The same bug, in the train images alone."""
    labels = planted()
    labels_NT = np.where(labels.is_train_N[:, None], value, labels.labels_NT)
    found = check.problems(dataclasses.replace(labels, labels_NT=labels_NT))
    assert any(f"mean AP of {value:.2f} on the train images" in problem for problem in found)


def test_traits_that_are_equally_frequent_are_no_mistake() -> None:
    """Prevalences that do not differ between traits do not correlate between splits either."""
    labels, rng = planted(), np.random.default_rng(0)
    order_CT = np.stack([rng.permutation(40) for _ in range(21)])
    for n_traits in (2, 10, 40):
        p_NT = np.where(order_CT[labels.class_N] < 20, 0.45, 0.05)[:, :n_traits]
        alike = dataclasses.replace(
            labels,
            labels_NT=rng.random(p_NT.shape) < p_NT,
            attribute_names_T=labels.attribute_names_T[:n_traits],
        )
        assert check.problems(alike) == []


def test_labels_of_other_classes_for_some_images() -> None:
    """The last 40% of the images have the labels of images some places further."""
    labels = witnessed()
    order = np.arange(1200)
    order[720:] = np.roll(order[720:], 60)
    wrong = dataclasses.replace(labels, labels_NT=labels.labels_NT[order])
    assert any("gives to other classes" in problem for problem in check.problems(wrong))
    assert check.misfits(labels) == []


def test_labels_of_permuted_images() -> None:
    labels = planted()
    order = np.random.default_rng(2).permutation(len(labels.labels_NT))
    wrong = dataclasses.replace(labels, labels_NT=labels.labels_NT[order])
    assert any("share their traits no more" in problem for problem in check.problems(wrong))


def test_classes_that_are_not_their_folders() -> None:
    labels = planted()
    wrong = dataclasses.replace(labels, class_N=np.roll(labels.class_N, 1))
    (problem,) = check.problems(wrong)
    assert problem.startswith("19 images have another class") or "have another class" in problem


def test_train_and_test_that_do_not_agree() -> None:
    labels = planted()
    labels_NT = labels.labels_NT.copy()
    labels_NT[labels.is_train_N] = labels_NT[labels.is_train_N][:, np.random.default_rng(0).permutation(40)]
    wrong = dataclasses.replace(labels, labels_NT=labels_NT)
    assert any("hardly agree" in problem for problem in check.problems(wrong))


def test_traits_without_positives_and_a_missing_split() -> None:
    labels = planted()
    labels_NT = labels.labels_NT & (np.arange(40) < 10)
    assert any(
        "30 of 40 traits" in p for p in check.problems(dataclasses.replace(labels, labels_NT=labels_NT))
    )
    no_test = dataclasses.replace(labels, is_train_N=np.ones(600, bool))
    assert check.problems(no_test) == ["there are no train images or no test images"]


def test_variance_between_classes_equals_a_loop() -> None:
    labels = planted(n_images=90, n_classes=5)
    x_NT = labels.labels_NT.astype(float)
    total = ((x_NT - x_NT.mean(axis=0)) ** 2).sum()
    between = sum(
        (labels.class_N == c).sum()
        * ((x_NT[labels.class_N == c].mean(axis=0) - x_NT.mean(axis=0)) ** 2).sum()
        for c in set(labels.class_N)
    )
    explained, chance = check.between_classes(labels)
    assert explained == pytest.approx(between / total)
    assert chance == pytest.approx((len(set(labels.class_N)) - 1) / 89)


def test_what_is_printed() -> None:
    text = check.describe(dataclasses.replace(planted(), n_lines=24_000, n_repeated=3, n_uncertain=17))
    labels = planted()
    assert "600 images" in text and "24,000 annotations; 3 image x trait pairs" in text
    wing = labels.labels_NT[labels.is_train_N][:, 1::2].mean()
    assert f"| has_wing_color | 20 | {wing:.3f} |" in text
    test_T = labels.labels_NT[~labels.is_train_N].mean(axis=0)
    assert f"{test_T[test_T > 0].mean():.3f} on the test images" in text


# ---- the command, and photos in train/ and test/ ----


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    dpath = tmp_path_factory.mktemp("check") / "CUB_200_2011"
    with pytest.MonkeyPatch.context() as patch:  # the labels matter here, not the photos
        patch.setattr(minicub, "picture", lambda bird, rng: (PIL.Image.new("RGB", (8, 8)),) * 2)
        minicub.draw(dpath, n_imgs=240)
    return dpath


@pytest.mark.slow
def test_minicub_is_plausible_and_the_wrong_column_is_not(
    cub_root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = config.ProtoEval(cub_root=str(cub_root))
    labels.describe([good, dataclasses.replace(good, min_certainty=4)])
    text = capsys.readouterr().out
    assert text.count("constant scorer's mean AP") == 2 and "certainty from 4" in text
    copy = tmp_path / "CUB_200_2011"
    (copy / "attributes").mkdir(parents=True)
    for name in ("images.txt", "train_test_split.txt", "image_class_labels.txt"):
        (copy / name).write_text((cub_root / name).read_text())
    names = next(cub_root.parent.rglob("attributes.txt"))
    (copy / "attributes" / "attributes.txt").write_text(names.read_text())
    lines = (cub_root / "attributes" / "image_attribute_labels.txt").read_text().splitlines()
    flipped = []
    for line in lines:  # "not visible" and "absent" taken for "present"
        image, trait, present, *rest = line.split()
        flipped.append(" ".join([image, trait, str(1 - int(present)), "4", *rest[1:]]))
    (copy / "attributes" / "image_attribute_labels.txt").write_text("\n".join(flipped) + "\n")
    cfg = config.ProtoEval(cub_root=str(copy))
    with pytest.raises(errors.UserError, match="implausible: a constant scorer gets a mean AP of 0"):
        labels.describe([cfg])
    text = capsys.readouterr().out  # what is wrong can be looked at
    assert "| has_wing_color |" in text and "Implausible: a constant scorer" in text
    labels.describe([dataclasses.replace(cfg, force=True)])
    assert "Implausible: a constant scorer" in capsys.readouterr().out


def test_photos_in_train_and_test_folders(cub_root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The same images in the same order, from either layout."""
    labels = cub.load(cub_root)
    copy = tmp_path / "copy"
    (copy / "metadata" / "attributes").mkdir(parents=True)
    for fpath in [*cub_root.glob("*.txt"), *cub_root.glob("attributes/*.txt")]:
        (copy / "metadata" / fpath.relative_to(cub_root)).write_bytes(fpath.read_bytes())
    for path, is_train in zip(labels.paths_N, labels.is_train_N, strict=True):
        target = copy / ("train" if is_train else "test") / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(cub_root / "images" / path)
    for split in ("all", "train", "test"):
        a, b = (data_config.Cub200(str(root), split) for root in (cub_root, copy))
        want, got = images.list_images(a), images.list_images(b)
        assert [cub.key(r.path) for r in got] == [r.path for r in want]
        assert [r.label for r in got] == [r.label for r in want]
        assert all((images.image_root(b) / r.path).is_file() for r in got)
