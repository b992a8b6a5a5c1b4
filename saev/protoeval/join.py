"""CUB's images among a dump's, joined by path: what is chosen on, what is measured on, and what scorers are fitted on."""

import logging
import typing as tp

import beartype
import numpy as np

from saev import errors
from saev.data import config as data_config
from saev.data import cub, reader
from saev.protoeval import config

logger = logging.getLogger("saev")


class Join(tp.NamedTuple):
    """One split's images in the activations that hold it."""

    split: config.Split
    data: data_config.Shards
    row_of: dict[int, int]
    """Image number in the shards -> row in the labels."""
    left_out: list[str]
    """Paths of the split's images that the dump recorded as corrupt."""

    @property
    def size(self) -> str:
        return f"{len(self.row_of):,} {self.split} images"


@beartype.beartype
def both(cfg: config.ProtoEval, labels: cub.Cub) -> list[Join]:
    """The images to choose prototypes on, and those to measure them on. Raises as `of`."""
    return [of(data, labels, split, cfg.force) for split, data in cfg.sides]


@beartype.beartype
def of(data: data_config.Shards, labels: cub.Cub, split: config.Split, force: bool) -> Join:
    """Finds a split's images. Those that the dump recorded as corrupt are left out.

    Raises:
        UserError: an image of the split was not dumped, a path is there twice, or (without `force`) the shards hold an image
            that the labels do not know.
    """
    acts = reader.Reader(data)
    label_row = {path: row for row, path in enumerate(labels.paths_N)}
    paths = {int(i): acts.records[i].path for i in acts.image_is_N}
    rows = {i: label_row[cub.key(path)] for i, path in paths.items() if cub.key(path) in label_row}
    wanted = np.flatnonzero(labels.is_train_N == (split == "train")).tolist()
    row_of = {i: row for i, row in rows.items() if labels.is_train_N[row] == (split == "train")}
    other = "test" if split == "train" else "train"
    if wrong := [paths[i] for i in row_of if paths[i].startswith(f"{other}/")]:
        raise errors.UserError(
            f"{data.shard_root}: {len(wrong)} images lie in {other}/ but are {split} images by train_test_split.txt (first: {wrong[0]}). Sort the photos again."
        )
    if unknown := sorted(paths[i] for i in paths.keys() - rows.keys()):
        what = f"{data.shard_root}: {len(unknown)} of {len(paths)} images have no row in images.txt (first: {', '.join(unknown[:3])})"
        if not force:
            raise errors.UserError(
                f"{what}. Dump CUB's images alone (data:cub200); --force leaves the others out; fit on other images by --fit-data."
            )
        logger.warning("%s; they are left out", what)
    if len(set(row_of.values())) < len(row_of):
        raise errors.UserError(
            f"{data.shard_root}: holds a {split} image of CUB twice. Dump one folder of CUB images."
        )
    corrupt = {label_row.get(cub.key(acts.records[i].path)) for i in acts.skipped_is}
    missing = sorted(set(wanted) - set(row_of.values()))
    if absent := [labels.paths_N[row] for row in missing if row not in corrupt]:
        raise errors.UserError(
            f"{data.shard_root}: {len(absent)} of CUB's {split} images are not in these shards, joined by path (first: {', '.join(absent[:3])}). "
            "Dump the images with data:cub200, or data:image-folder on CUB's images/ folder; if they lie in shards of their own, pass these as --test-data.shard-root."
        )
    left_out = [labels.paths_N[row] for row in missing]
    if left_out:
        logger.warning("%s: %s", data.shard_root, said_of(left_out, split))
    if not row_of:
        raise errors.UserError(
            f"{data.shard_root}: holds no {split} image that could be read. Dump the images again."
        )
    return Join(split, data, row_of, left_out)


@beartype.beartype
def said_of(left_out: list[str], split: str) -> str:
    """What was left out, in a sentence's part."""
    first = ", ".join(left_out[:3])
    return f"{len(left_out):,} {split} images are left out, because the dump recorded them as corrupt (first: {first})"


# ---- what scorers are fitted on ----


@beartype.beartype
def fit_data(cfg: config.ProtoEval, chosen_on: Join) -> data_config.Shards:
    """--fit-data if it was given; else the images that prototypes are chosen on, and no others."""
    if cfg.fit_data.shard_root:
        return cfg.fit_data
    image_is = tuple(sorted(chosen_on.row_of))
    if len(image_is) == reader.Reader(chosen_on.data).n_imgs:
        return chosen_on.data
    d = chosen_on.data
    return data_config.Subset(
        d.shard_root, d.layer, d.patches, d.more_roots, d.partial, image_is=image_is
    )


@beartype.beartype
def fitted_on(
    cfg: config.ProtoEval, fit: data_config.Shards, joins: list[Join], labels: cub.Cub
) -> str:
    """For the table: which images a scorer was fitted on, and how many of them it is measured on."""
    if not cfg.fit_data.shard_root:
        return joins[0].size
    acts = reader.Reader(fit)
    said = f"all {acts.n_imgs:,} images of --fit-data"
    try:
        keys = {cub.key(acts.records[int(i)].path) for i in acts.image_is_N}
    except errors.UserError:
        return f"{said}, whose paths are not recorded"
    measured = {labels.paths_N[row] for row in joins[1].row_of.values()}
    n = len(keys & measured)
    return f"{said}, {n:,} of them {joins[1].split} images that are measured on" if n else said
