"""Joins CUB's images to a dump's by path: images to choose on, to measure on, and to fit scorers on."""

import collections.abc
import logging
import typing as tp

import numpy as np

from saev import errors
from saev.data import activations, cub
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


def join(cfg: config.ProtoEval, acts: opening.Opened, labels: cub.Cub) -> Sides:
    """Finds the images of both splits. Raises as `find`."""
    return Sides(*(find(acts.of(split), labels, split, cfg.force) for split, _ in cfg.sides))


def find(acts: activations.Activations, labels: cub.Cub, split: config.Split, force: bool) -> Side:
    """Finds a split's images. Those that the dump recorded as corrupt are left out.

    Raises:
        UserError: an image of the split was not dumped, a path occurs twice, or (without `force`) the shards
            hold an image without labels.
    """
    label_row = {path: row for row, path in enumerate(labels.paths_N)}
    paths = {int(i): acts.records[i].path for i in acts.image_is_N}
    rows = {i: label_row[cub.key(path)] for i, path in paths.items() if cub.key(path) in label_row}
    wanted = np.flatnonzero(labels.is_train_N == (split == "train")).tolist()
    row_of = {i: row for i, row in rows.items() if labels.is_train_N[row] == (split == "train")}
    other = "test" if split == "train" else "train"
    if wrong := [paths[i] for i in row_of if paths[i].startswith(f"{other}/")]:
        raise errors.UserError(
            f"{acts.root}: {len(wrong)} images lie in {other}/ but are {split} images in "
            f"train_test_split.txt (first: {wrong[0]}). Sort the photos again."
        )
    if unknown := sorted(paths[i] for i in paths.keys() - rows.keys()):
        what = f"{acts.root}: {len(unknown)} of {len(paths)} images have no row in images.txt "
        what += f"(first: {', '.join(unknown[:3])})"
        if not force:
            raise errors.UserError(
                f"{what}. Dump only CUB's images (data:cub200), or pass --force to leave the others out. "
                "To fit on other images, use --fit-data."
            )
        logger.warning("%s; they are left out", what)
    if len(set(row_of.values())) < len(row_of):
        raise errors.UserError(
            f"{acts.root}: holds a {split} image of CUB twice. Dump one folder of CUB images."
        )
    corrupt = {label_row.get(cub.key(acts.records[i].path)) for i in acts.skipped_is}
    missing = sorted(set(wanted) - set(row_of.values()))
    if absent := [labels.paths_N[row] for row in missing if row not in corrupt]:
        raise errors.UserError(
            f"{acts.root}: {len(absent)} of CUB's {split} images are not in these shards, joined by path "
            f"(first: {', '.join(absent[:3])}). Dump the images with data:cub200, or with data:image-folder "
            "on CUB's images/ folder. If the test images are in other shards, pass these as "
            "--test-data.shard-root."
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
    cfgs: collections.abc.Sequence[config.ProtoEval], acts: opening.Opened, sides: Sides, labels: cub.Cub
) -> list[Fit]:
    """Each config's --fit-data, else only the images that prototypes are chosen on."""
    chosen = sides.chosen
    is_all = len(chosen.row_of) == chosen.acts.n_imgs
    default = Fit(chosen.acts if is_all else chosen.acts.only(chosen.row_of), chosen.size)
    given = {data: Fit(fit, _describe(fit, sides, labels)) for data, fit in acts.fit.items()}
    return [given.get(cfg.fit_data, default) for cfg in cfgs]


def _describe(fit: activations.Activations, sides: Sides, labels: cub.Cub) -> str:
    text = f"all {fit.n_imgs:,} images of --fit-data"
    try:
        keys = {cub.key(fit.records[int(i)].path) for i in fit.image_is_N}
    except errors.UserError:
        return f"{text}, whose paths are not recorded"
    measured = {labels.paths_N[row] for row in sides.measured.row_of.values()}
    n = len(keys & measured)
    return f"{text}, {n:,} of them {sides.measured.split} images that are measured on" if n else text
