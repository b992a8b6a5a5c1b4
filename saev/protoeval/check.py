"""Checks CUB's labels before anything is scored: counts, prevalences, classes.

This project's first table had an mAP of 0.86 for random vectors, because nearly every label had been loaded
as positive. A constant scorer got 0.83.

The archive's class_attribute_labels_continuous.txt says how often each trait was seen on each class. If it
exists, the labels are compared with it, which detects labels of other images, classes or traits. A shift by a
few images cannot be detected, because neighbours in images.txt have the same class. Labels are joined by id
and path, so only the archive itself could be shifted; its class ids are compared with the folders' names.

N images, T traits, C classes.
"""

import dataclasses
import re

import beartype
import numpy as np
import polars as pl
from jaxtyping import Bool

from saev import errors
from saev.data import cub
from saev.formats import results
from saev.report import tables

REAL, REAL_TRAIN, REAL_CLASSES = (11_788, 312), 5_994, 200
"""Images and attributes, train images, and classes of the real CUB-200-2011."""
SOME = 1000
"""At least this many images with CUB's number of attributes are taken for (a part of) CUB."""
REAL_MEAN, REAL_RANGE = 0.10, (0.05, 0.20)
"""Mean prevalence of CUB's traits, within about 0.01, and the accepted range."""
MOST = 0.6
"""Above this mean prevalence the labels are assumed wrong."""
AGREES = 0.5
"""Least correlation of the labels' class means with the archive's."""
CLEARLY, MISFITS = 0.1, 0.05
"""A class is a misfit if another class of the archive fits better by the first number. The second is the
largest accepted fraction of misfits."""
ENOUGH = 200
"""Least images of a split for its statistics to be checked."""
ARCHIVE = "class_attribute_labels_continuous.txt"


def problems(labels: cub.Cub) -> list[str]:
    """What is implausible: one clause per problem."""
    train_NT, test_NT = (labels.labels_NT[labels.is_train_N == is_train] for is_train in (True, False))
    if not len(train_NT) or not len(test_NT):
        return ["there are no train images or no test images"]
    n_N, n_T = labels.labels_NT.shape
    is_cub = n_T == REAL[1] and n_N >= SOME
    low, high = REAL_RANGE if is_cub else (0.0, MOST)
    out = []
    for name, split_NT in (("train", train_NT), ("test", test_NT)):
        if not low < (mean := constant_ap(split_NT)) <= high:
            expected = f"; CUB's is about {REAL_MEAN:.2f}" if is_cub else ""
            out.append(f"a constant scorer gets a mean AP of {mean:.2f} on the {name} images{expected}")
    if (n_N, n_T) == REAL and len(train_NT) != REAL_TRAIN:
        swapped = "; the split is the wrong way round" * (len(test_NT) == REAL_TRAIN)
        out.append(f"{len(train_NT):,} of the images are train images; CUB has {REAL_TRAIN:,}{swapped}")
    n_classes = len(np.unique(labels.class_N))
    if (n_N, n_T) == REAL and n_classes != REAL_CLASSES:
        out.append(f"the images are of {n_classes} classes; CUB has {REAL_CLASSES}")
    if (empty := int((~labels.labels_NT.any(axis=0)).sum())) * 2 > n_T:
        out.append(f"{empty} of {n_T} traits have no positive image")
    out += _split_problems(labels)
    return out + _class_problems(labels) + _archive_problems(labels)


@beartype.beartype
def constant_ap(labels_NT: Bool[np.ndarray, "N T"]) -> float:
    """mAP of a constant scorer: the mean prevalence of traits with a positive."""
    prevalence_T = labels_NT.mean(axis=0) if len(labels_NT) else np.zeros(labels_NT.shape[1])
    return float(prevalence_T[prevalence_T > 0].mean()) if prevalence_T.any() else 0.0


def _split_problems(labels: cub.Cub) -> list[str]:
    """Compares train and test prevalences, after removing the effect of different class frequencies.

    They must differ by no more than chance, or by less than half as much as the prevalences of different
    traits.
    """
    is_train_N = labels.is_train_N
    if min(is_train_N.sum(), (~is_train_N).sum()) < ENOUGH:
        return []
    train_T, test_T = (labels.labels_NT[split_N].mean(axis=0) for split_N in (is_train_N, ~is_train_N))
    class_N, mean_CT = _means(labels)
    weight_C = np.bincount(class_N, np.where(is_train_N, 1 / is_train_N.sum(), -1 / (~is_train_N).sum()))
    gap_T = np.abs(train_T - test_T - weight_C @ mean_CT)
    p_T = (train_T + test_T) / 2
    by_chance = np.sqrt(2 / np.pi * p_T * (1 - p_T) * (1 / is_train_N.sum() + 1 / (~is_train_N).sum())).mean()
    of_others = float(np.abs(train_T[:, None] - test_T).mean())
    # the mean of |x| over T normal variables has a relative standard deviation of 0.76 / sqrt(T)
    if gap_T.mean() <= by_chance * (1 + 4 * 0.76 / np.sqrt(len(p_T))) or gap_T.mean() <= 0.5 * of_others:
        return []
    return [
        f"the traits' prevalences on train and test images hardly agree (they differ by {gap_T.mean():.3f} "
        f"on average, those of different traits by {of_others:.3f})"
    ]


def _means(labels: cub.Cub) -> tuple[np.ndarray, np.ndarray]:
    """(each image's class, renumbered from 0 without gaps; the labels' mean in each class)."""
    _, class_N, n_C = np.unique(labels.class_N, return_inverse=True, return_counts=True)
    mean_CT = np.zeros((len(n_C), labels.labels_NT.shape[1]))
    np.add.at(mean_CT, class_N, labels.labels_NT)
    return class_N, mean_CT / n_C[:, None]


def _class_problems(labels: cub.Cub) -> list[str]:
    """Compares class ids with the folders' names, and checks that images of a class share traits."""
    folders = [re.match(r"(\d+)\.", path) for path in labels.paths_N]
    if all(folders):
        folder_N = np.array([int(found[1]) for found in folders if found])
        if (wrong := folder_N != labels.class_N).any():
            first = int(wrong.argmax())
            return [
                f"{int(wrong.sum())} images have another class than their folder says (first: "
                f"{labels.paths_N[first]} has class {labels.class_N[first]})"
            ]
    explained, chance = between_classes(labels)
    if len(labels.class_N) >= ENOUGH and explained < 1.3 * chance and explained - chance < 0.02:
        return [
            "images of one class share their traits no more than any images do (classes explain "
            f"{explained:.1%} of the labels' variance, by chance {chance:.1%})"
        ]
    return []


def _archive_problems(labels: cub.Cub) -> list[str]:
    """Compares class means with the archive's, and with these shifted by one class or one trait."""
    if labels.shares_CT is None:
        return []
    own = agreement(labels)
    if not own >= AGREES:
        return [f"the labels' class means hardly agree with {ARCHIVE} (correlation {own:.2f})"]
    for axis, what in enumerate(("class", "trait")):
        for by in (-1, 1):
            shares_CT = np.roll(labels.shares_CT, by, axis)
            if (other := agreement(dataclasses.replace(labels, shares_CT=shares_CT))) >= own:
                return [
                    f"the labels agree better with {ARCHIVE} when that is shifted by one {what} "
                    f"(correlation {other:.2f} instead of {own:.2f})"
                ]
    wrong = misfits(labels)
    if len(wrong) > max(1, MISFITS * len(np.unique(labels.class_N))):
        first = ", ".join(map(str, wrong[:3]))
        return [
            f"the images of {len(wrong)} classes have traits that {ARCHIVE} gives to other classes "
            f"(first: classes {first})"
        ]
    return []


def agreement(labels: cub.Cub) -> float:
    """Correlation of the labels' class means with `shares_CT`, both minus each trait's mean over classes."""
    _, mean_CT, shares_CT = _class_means(labels)
    scale = float(np.linalg.norm(mean_CT) * np.linalg.norm(shares_CT))
    return float((mean_CT * shares_CT).sum()) / scale if scale else 0.0


def misfits(labels: cub.Cub) -> list[int]:
    """Classes whose labels correlate clearly better with another class of the archive."""
    class_C, mean_CT, shares_CT = _class_means(labels)
    mean_CT, shares_CT = (
        x_CT / np.maximum(np.linalg.norm(x_CT, axis=1, keepdims=True), 1e-12) for x_CT in (mean_CT, shares_CT)
    )
    fit_CC = mean_CT @ shares_CT.T
    return class_C[fit_CC.max(axis=1) > np.diag(fit_CC) + CLEARLY].tolist()


def _class_means(labels: cub.Cub) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(classes with images; their labels' means; their shares), both minus each trait's mean over classes."""
    assert labels.shares_CT is not None
    class_C, (_, mean_CT) = np.unique(labels.class_N), _means(labels)
    shares_CT = labels.shares_CT[class_C - 1]
    return class_C, mean_CT - mean_CT.mean(axis=0), shares_CT - shares_CT.mean(axis=0)


def between_classes(labels: cub.Cub) -> tuple[float, float]:
    """(share of the labels' variance that lies between classes, share expected for unrelated labels)."""
    class_N, mean_CT = _means(labels)
    n_C, p_T = np.bincount(class_N), labels.labels_NT.mean(axis=0)
    total = len(class_N) * float((p_T * (1 - p_T)).sum())
    if total == 0:
        return 0.0, 0.0
    between = float((n_C @ (mean_CT - p_T) ** 2).sum())
    return between / total, (len(n_C) - 1) / max(len(class_N) - 1, 1)


def describe(labels: cub.Cub) -> str:
    """Counts, prevalences by group of traits, and the constant scorer's mAP, as Markdown."""
    n_N, n_T = labels.labels_NT.shape
    train_NT, test_NT = (labels.labels_NT[labels.is_train_N == is_train] for is_train in (True, False))
    explained, chance = between_classes(labels)
    archive = f"no {ARCHIVE} to compare class means with"
    if labels.shares_CT is not None:
        archive = f"their class means correlate {agreement(labels):.2f} with {ARCHIVE}"
    lines = [
        f"{n_N:,} images of {len(set(labels.class_N.tolist())):,} classes, {n_T} traits: {len(train_NT):,} "
        f"train images (1 in train_test_split.txt), {len(test_NT):,} test images (0)",
        f"{labels.n_lines:,} annotations; {labels.n_repeated:,} image x trait pairs were annotated more than "
        f"once ({labels.n_disputed:,} with both answers); {labels.n_uncertain:,} positives are not certain "
        "enough",
        f"classes explain {explained:.1%} of the labels' variance (by chance {chance:.1%}); {archive}",
        "",
    ]
    groups = [results.group(name) for name in labels.attribute_names_T]
    header, cells = ["Group", "Traits", "Prevalence, train", "Prevalence, test"], []
    for group in dict.fromkeys(groups):
        mine = np.array([g == group for g in groups])
        prevalences = (
            f"{split_NT[:, mine].mean():.3f}" if len(split_NT) else "" for split_NT in (train_NT, test_NT)
        )
        cells.append((group, str(int(mine.sum())), *prevalences))
    lines.append(tables.markdown(pl.DataFrame(cells, header, orient="row")))
    if len(train_NT) and len(test_NT):
        gap_T = np.abs(train_NT.mean(axis=0) - test_NT.mean(axis=0))
        widest = int(gap_T.argmax())
        lines.append(
            f"Train and test prevalences differ by {gap_T.mean():.3f} on average, most for "
            f"{labels.attribute_names_T[widest]} ({gap_T[widest]:.3f})."
        )
    n_seen = int(test_NT.any(axis=0).sum())
    lines.append(
        f"A constant scorer's mean AP: {constant_ap(train_NT):.3f} on the train images, "
        f"{constant_ap(test_NT):.3f} on the test images (over {n_seen} traits; the real CUB's is about "
        f"{REAL_MEAN:.2f})."
    )
    return "\n".join(lines)


def refuse_implausible(labels: cub.Cub, root: str) -> None:
    """Raises a UserError that names what is implausible."""
    if found := problems(labels):
        raise errors.UserError(
            f"--cub-root {root}: these labels are implausible: {'; '.join(found)}. Inspect them with "
            "--check, or pass --force to use them."
        )
