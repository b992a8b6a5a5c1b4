"""Checks labels before anything is scored: counts, prevalences, classes.

This project's first table had an mAP of 0.86 for random vectors, because nearly every label had been loaded
as positive. A constant scorer got 0.83.

CUB: the archive's class_attribute_labels_continuous.txt says how often each trait was seen on each class. If
it exists, the labels are compared with it, which detects labels of other images, classes or traits. A shift
by a few images cannot be detected, because neighbours in images.txt have the same class. Labels are joined by
id and path, so only the archive itself could be shifted; its class ids are compared with the folders' names.

Other sources: if images of one folder have more alike labels once all labels are moved by one image, the
labels probably belong to the neighbours (a column pasted one row off).

N images, T traits, C classes.
"""

import dataclasses
import re
import typing as tp

import numpy as np
import polars as pl
import scipy.sparse

from saev import errors
from saev.data import cub
from saev.data.traits import base
from saev.formats import results
from saev.report import tables

REAL, REAL_TRAIN, REAL_CLASSES = (11_788, 312), 5_994, 200
"""Images and attributes, train images, and classes of the real CUB-200-2011."""
SOME = 1000
"""At least this many images with CUB's number of attributes are taken for (a part of) CUB."""
REAL_MEAN, REAL_RANGE = 0.10, (0.05, 0.20)
"""Mean prevalence of CUB's traits, within about 0.01, and the accepted range."""
SHIFT = 6.0
"""Labels are taken for moved if that explains more, by this many standard deviations of unrelated labels."""
MOST = 0.6
"""Above this mean prevalence the labels are assumed wrong."""
AGREES = 0.5
"""Least correlation of the labels' class means with the archive's."""
CLEARLY, MISFITS = 0.1, 0.05
"""A class is a misfit if another class of the archive fits better by the first number. The second is the
largest accepted fraction of misfits."""
BLOCK = 2**24
"""Labels that are added up at a time."""
ENOUGH = 200
"""Least images of a split for its statistics to be checked."""
ARCHIVE = "class_attribute_labels_continuous.txt"


def problems(labels: base.Traits) -> list[str]:
    """What is implausible: one clause per problem."""
    train, test = _splits(labels)
    if not train.n or not test.n:
        return ["there are no train images or no test images"]
    n_N, n_T = labels.labels_NT.shape
    is_cub = isinstance(labels, cub.Cub) and n_T == REAL[1] and n_N >= SOME
    low, high = REAL_RANGE if is_cub else (0.0, MOST)
    out = []
    for name, split in (("train", train), ("test", test)):
        if not low < split.constant_ap <= high:
            expected = f"; CUB's is about {REAL_MEAN:.2f}" if is_cub else ""
            out.append(
                f"a constant scorer gets a mean AP of {split.constant_ap:.2f} on the {name} images{expected}"
            )
    if is_cub and n_N == REAL[0] and train.n != REAL_TRAIN:
        swapped = "; the split is the wrong way round" * (test.n == REAL_TRAIN)
        out.append(f"{train.n:,} of the images are train images; CUB has {REAL_TRAIN:,}{swapped}")
    n_classes = len(np.unique(labels.class_N))
    if is_cub and n_N == REAL[0] and n_classes != REAL_CLASSES:
        out.append(f"the images are of {n_classes} classes; CUB has {REAL_CLASSES}")
    if (empty := int((~labels.labels_NT.any(axis=0)).sum())) * 2 > n_T:
        out.append(f"{empty} of {n_T} traits have no positive image")
    out += _split_problems(labels)
    if isinstance(labels, cub.Cub):
        return out + _class_problems(labels) + _archive_problems(labels)
    return out + _shift_problems(labels)


class _Split(tp.NamedTuple):
    """One split's labels, counted per trait."""

    n: int
    """Images."""
    positive_T: np.ndarray
    known_T: np.ndarray

    @classmethod
    def of(cls, labels: base.Traits, rows_N: np.ndarray) -> "_Split":
        labels_NT, known_NT = labels.labels_NT[rows_N], labels.known_of(rows_N)
        n, n_T = labels_NT.shape
        return cls(n, labels_NT.sum(axis=0), np.full(n_T, n) if known_NT is None else known_NT.sum(axis=0))

    @property
    def prevalence_T(self) -> np.ndarray:
        """Among known labels; 0 without any."""
        return self.positive_T / np.maximum(self.known_T, 1)

    @property
    def constant_ap(self) -> float:
        """mAP of a constant scorer: the mean prevalence of traits with a positive."""
        return float(self.prevalence_T[self.positive_T > 0].mean()) if self.positive_T.any() else 0.0


def _splits(labels: base.Traits) -> tuple[_Split, _Split]:
    """Train and test images."""
    return _Split.of(labels, labels.is_train_N), _Split.of(labels, ~labels.is_train_N)


def _split_problems(labels: base.Traits) -> list[str]:
    """Compares train and test prevalences, after removing the effect of different class frequencies.

    They must differ by no more than chance, or by less than half as much as the prevalences of different
    traits.
    """
    train, test = _splits(labels)
    if min(train.n, test.n) < ENOUGH:
        return []
    train_T, test_T, mean_CT = train.prevalence_T, test.prevalence_T, _Classes.of(labels).mean_CT
    by_classes_T = np.zeros(len(train_T))
    for split, rows_N, sign in ((train, labels.is_train_N, 1), (test, ~labels.is_train_N, -1)):
        share_CT = _Classes.of(labels, rows_N).n_CT / np.maximum(split.known_T, 1)
        by_classes_T += sign * (share_CT * mean_CT).sum(axis=0)
    gap_T = np.abs(train_T - test_T - by_classes_T)
    p_T = (train_T + test_T) / 2
    per_image_T = 1 / np.maximum(train.known_T, 1) + 1 / np.maximum(test.known_T, 1)
    by_chance = np.sqrt(2 / np.pi * p_T * (1 - p_T) * per_image_T).mean()
    of_others = float(np.abs(train_T[:, None] - test_T).mean())
    # the mean of |x| over T normal variables has a relative standard deviation of 0.76 / sqrt(T)
    if gap_T.mean() <= by_chance * (1 + 4 * 0.76 / np.sqrt(len(p_T))) or gap_T.mean() <= 0.5 * of_others:
        return []
    return [
        f"the traits' prevalences on train and test images hardly agree (they differ by {gap_T.mean():.3f} "
        f"on average, those of different traits by {of_others:.3f})"
    ]


class _Classes(tp.NamedTuple):
    """The labels of each class, counted per trait."""

    n_CT: np.ndarray
    """Known labels."""
    positive_CT: np.ndarray

    @classmethod
    def of(cls, labels: base.Traits, rows: np.ndarray | slice = slice(None)) -> "_Classes":
        """Counts of some images, for the classes of all, which are renumbered from 0 without gaps."""
        _, class_N = np.unique(labels.class_N, return_inverse=True)
        n_C, class_N = int(class_N.max(initial=-1)) + 1, class_N[rows]
        # a sparse matrix (classes, images) adds up the rows of each class
        ones = np.ones(len(class_N)), (class_N, np.arange(len(class_N)))
        adds_CN = scipy.sparse.csr_array(ones, shape=(n_C, len(class_N)))
        labels_NT, known_NT = labels.labels_NT[rows], labels.known_of(rows)
        every = max(1, BLOCK // max(1, len(class_N)))  # traits at a time, because the product converts them

        def added(x_NT: np.ndarray) -> np.ndarray:
            blocks = (x_NT[:, t : t + every] for t in range(0, x_NT.shape[1], every))
            return np.concatenate([np.asarray(adds_CN @ x_NB) for x_NB in blocks], axis=1)

        n_CT = added(np.ones((len(class_N), 1), bool) if known_NT is None else known_NT)
        return cls(np.broadcast_to(n_CT, (n_C, labels_NT.shape[1])), added(labels_NT))

    @property
    def mean_CT(self) -> np.ndarray:
        """Means. That of a class without known labels is the mean over all images."""
        p_T = self.positive_CT.sum(axis=0) / np.maximum(self.n_CT.sum(axis=0), 1)
        return np.where(self.n_CT > 0, self.positive_CT / np.maximum(self.n_CT, 1), p_T)


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


def _shift_problems(labels: base.Traits) -> list[str]:
    """Compares what folders explain of the labels with what they explain of labels moved by one image.

    The share that C folders explain of unrelated labels of N images has the standard deviation
    sqrt(2 (C - 1)) / N.
    """
    folders, class_N = np.unique([path.rpartition("/")[0] for path in labels.paths_N], return_inverse=True)
    if not 1 < len(folders) < len(class_N):
        return []
    labels = dataclasses.replace(labels, class_N=class_N.astype(np.int64))
    own, _ = between_classes(labels)
    chance = SHIFT * float(np.sqrt(2 * (len(folders) - 1))) / len(class_N)
    if own + chance >= 1:
        return []
    for by, whose in ((-1, "next"), (1, "previous")):
        known_NT = None if labels.known_NT is None else np.roll(labels.known_NT, by, axis=0)
        labels_NT = np.roll(labels.labels_NT, by, axis=0)
        other, _ = between_classes(dataclasses.replace(labels, labels_NT=labels_NT, known_NT=known_NT))
        if other > own + chance:
            return [
                f"the folders explain {own:.1%} of the labels' variance, but {other:.1%} if each image gets "
                f"the {whose} row's labels"
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
    class_C, mean_CT = np.unique(labels.class_N), _Classes.of(labels).mean_CT
    shares_CT = labels.shares_CT[class_C - 1]
    return class_C, mean_CT - mean_CT.mean(axis=0), shares_CT - shares_CT.mean(axis=0)


def between_classes(labels: base.Traits) -> tuple[float, float]:
    """(share of the labels' variance that lies between classes, share expected for unrelated labels)."""
    classes = _Classes.of(labels)
    n_T = classes.n_CT.sum(axis=0)
    p_T = classes.positive_CT.sum(axis=0) / np.maximum(n_T, 1)
    total = float((n_T * p_T * (1 - p_T)).sum())
    if total == 0:
        return 0.0, 0.0
    between = float((classes.n_CT * (classes.mean_CT - p_T) ** 2).sum())
    return between / total, (len(classes.n_CT) - 1) / max(len(labels.class_N) - 1, 1)


# ---- --check ----


def describe(labels: base.Traits) -> str:
    """Counts, prevalences by group of traits, and the constant scorer's mAP, as Markdown."""
    is_cub = isinstance(labels, cub.Cub)
    n_N, n_T = labels.labels_NT.shape
    train, test = _splits(labels)
    ones, zeros = (" (1 in train_test_split.txt)", " (0)") if is_cub else ("", "")
    lines = [
        f"{n_N:,} images of {len(set(labels.class_N.tolist())):,} classes, {n_T} traits: {train.n:,} train "
        f"images{ones}, {test.n:,} test images{zeros}",
        *_details(labels),
        "",
        tables.markdown(_by_group(labels, train, test)),
    ]
    if train.n and test.n:
        gap_T = np.abs(train.prevalence_T - test.prevalence_T)
        widest = int(gap_T.argmax())
        lines.append(
            f"Train and test prevalences differ by {gap_T.mean():.3f} on average, most for "
            f"{labels.attribute_names_T[widest]} ({gap_T[widest]:.3f})."
        )
    n_seen = int((test.positive_T > 0).sum())
    real = f"; the real CUB's is about {REAL_MEAN:.2f}" if is_cub else ""
    lines.append(
        f"A constant scorer's mean AP: {train.constant_ap:.3f} on the train images, "
        f"{test.constant_ap:.3f} on the test images (over {n_seen} traits{real})."
    )
    return "\n".join(lines)


def _details(labels: base.Traits) -> list[str]:
    """How many labels were given, and what classes explain of them."""
    explained, chance = between_classes(labels)
    text = f"classes explain {explained:.1%} of the labels' variance (by chance {chance:.1%})"
    if not isinstance(labels, cub.Cub):
        return [f"{labels.n_unknown:,} of {labels.labels_NT.size:,} labels are missing; {text}"]
    archive = f"no {ARCHIVE} to compare class means with"
    if labels.shares_CT is not None:
        archive = f"their class means correlate {agreement(labels):.2f} with {ARCHIVE}"
    return [
        f"{labels.n_lines:,} annotations; {labels.n_repeated:,} image x trait pairs were annotated more than "
        f"once ({labels.n_disputed:,} with both answers); {labels.n_uncertain:,} positives are not certain "
        "enough",
        f"{text}; {archive}",
    ]


def _by_group(labels: base.Traits, train: _Split, test: _Split) -> pl.DataFrame:
    """Number and prevalences of each group's traits."""
    groups = [results.group(name) for name in labels.attribute_names_T]
    header, cells = ["Group", "Traits", "Prevalence, train", "Prevalence, test"], []
    for group in dict.fromkeys(groups):
        mine = np.array([g == group for g in groups])
        sums = [
            (int(split.positive_T[mine].sum()), int(split.known_T[mine].sum())) for split in (train, test)
        ]
        prevalences = (f"{positive / known:.3f}" if known else "" for positive, known in sums)
        cells.append((group, str(int(mine.sum())), *prevalences))
    return pl.DataFrame(cells, header, orient="row")


def refuse_implausible(labels: base.Traits, where: str) -> None:
    """Raises a UserError that names what is implausible."""
    if found := problems(labels):
        raise errors.UserError(
            f"{where}: these labels are implausible: {'; '.join(found)}. Inspect them with --check, or pass "
            "--force to use them."
        )
