"""Joins labelled images to a dump's by path: images to choose on, to measure on, and to fit scorers on."""

import collections.abc
import logging
import typing as tp

import numpy as np

from saev import errors
from saev.data import activations
from saev.data.traits import base
from saev.protoeval import config, opening

logger = logging.getLogger("saev")


class Side(tp.NamedTuple):
    """One split's images in its activations."""

    split: config.Split
    acts: activations.Activations
    row_of: dict[int, int]
    """Image number in the shards -> row in the labels."""
    left_out: list[str]
    """Paths of the split's images that the dump recorded as corrupt."""

    @property
    def size(self) -> str:
        return f"{len(self.row_of):,} {self.split} images"


class Sides(tp.NamedTuple):
    chosen: Side
    """Images that prototypes are chosen on."""
    measured: Side


def join(cfg: config.ProtoEval, acts: opening.Opened, labels: base.Traits) -> Sides:
    """Finds the images of both splits. Raises as `find`."""
    return Sides(*(find(acts.of(split), labels, split, cfg.force) for split, _ in cfg.sides))


def find(acts: activations.Activations, labels: base.Traits, split: config.Split, force: bool) -> Side:
    """Finds a split's images. Those that the dump recorded as corrupt are left out.

    Raises:
        UserError: an image of the split was not dumped, a path occurs twice, or (without `force`) the shards
            hold an image without labels.
    """
    words = labels.words
    label_row = {path: row for row, path in enumerate(labels.paths_N)}
    paths = {int(i): acts.records[i].path for i in acts.image_is_N}
    keys = {i: labels.key(path) for i, path in paths.items()}
    rows = {i: label_row[key] for i, key in keys.items() if key in label_row}
    wanted = np.flatnonzero(labels.is_train_N == (split == "train")).tolist()
    row_of = {i: row for i, row in rows.items() if labels.is_train_N[row] == (split == "train")}
    other = "test" if split == "train" else "train"
    if paths and not rows:
        raise errors.UserError(
            f"{acts.root}: none of its images is in {words.listed}, joined by path. Its first path is "
            f"{next(iter(paths.values()))}, that of {words.listed} is {next(iter(label_row), 'none')}. Write "
            "paths relative to the folder that was dumped."
        )
    if wrong := [paths[i] for i in row_of if paths[i].startswith(f"{other}/")]:
        raise errors.UserError(
            f"{acts.root}: {len(wrong)} images lie in {other}/ but are {split} images in "
            f"{words.split} (first: {wrong[0]}). Sort the photos again."
        )
    if unknown := sorted(paths[i] for i in paths.keys() - rows.keys() if keys[i] not in labels.left_out):
        what = f"{acts.root}: {len(unknown)} of {len(paths)} images have no row in {words.listed} "
        what += f"(first: {', '.join(unknown[:3])})"
        if not force:
            raise errors.UserError(
                f"{what}. {words.surplus}, or pass --force to leave the others out. To fit on other images, "
                "use --fit-data."
            )
        logger.warning("%s; they are left out", what)
    if len(set(row_of.values())) < len(row_of):
        raise errors.UserError(
            f"{acts.root}: holds a {split} image of {words.name} twice. Dump one folder of these images."
        )
    corrupt = {label_row.get(labels.key(acts.records[i].path)) for i in acts.skipped_is}
    missing = sorted(set(wanted) - set(row_of.values()))
    if absent := [labels.paths_N[row] for row in missing if row not in corrupt]:
        raise errors.UserError(
            f"{acts.root}: {len(absent)} of {words.name}'s {split} images are not in these shards, joined by "
            f"path (first: {', '.join(absent[:3])}). {words.remedy}"
        )
    left_out = [labels.paths_N[row] for row in missing]
    if left_out:
        logger.warning("%s: %s", acts.root, describe_left_out(left_out, split))
    if not row_of:
        raise errors.UserError(
            f"{acts.root}: holds no {split} image that could be read. Dump the images again."
        )
    return Side(split, acts, row_of, left_out)


def describe_left_out(left_out: list[str], split: str) -> str:
    """A clause for messages."""
    first = ", ".join(left_out[:3])
    return (
        f"{len(left_out):,} {split} images are left out, because the dump recorded them as corrupt "
        f"(first: {first})"
    )


# ---- what scorers are fitted on ----


class Fit(tp.NamedTuple):
    """What a scorer is fitted on."""

    acts: activations.Activations
    description: str
    """For the table: which images, and how many of them are measured on."""


def fit_data(
    cfgs: collections.abc.Sequence[config.ProtoEval], acts: opening.Opened, sides: Sides, labels: base.Traits
) -> list[Fit]:
    """Each config's --fit-data, else only the images that prototypes are chosen on."""
    chosen = sides.chosen
    is_all = len(chosen.row_of) == chosen.acts.n_imgs
    default = Fit(chosen.acts if is_all else chosen.acts.only(chosen.row_of), chosen.size)
    given = {data: Fit(fit, _describe(fit, sides, labels)) for data, fit in acts.fit.items()}
    return [given.get(cfg.fit_data, default) for cfg in cfgs]


def _describe(fit: activations.Activations, sides: Sides, labels: base.Traits) -> str:
    text = f"all {fit.n_imgs:,} images of --fit-data"
    try:
        keys = {labels.key(fit.records[int(i)].path) for i in fit.image_is_N}
    except errors.UserError:
        return f"{text}, whose paths are not recorded"
    measured = {labels.paths_N[row] for row in sides.measured.row_of.values()}
    n = len(keys & measured)
    return f"{text}, {n:,} of them {sides.measured.split} images that are measured on" if n else text
