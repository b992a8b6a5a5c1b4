"""Divides images into train and test images. N images."""

import collections.abc
import logging
import pathlib
import typing as tp

import beartype
import numpy as np
from jaxtyping import Bool, Int64, jaxtyped

from saev import errors
from saev.data.traits import config, dumped
from saev.formats import tablefile

logger = logging.getLogger("saev")

REMEDY = (
    "Dump them too, or take their rows out. If --train-data and --test-data hold different images, pass "
    "--labels.split dumps."
)


class Parts(tp.NamedTuple):
    """The images that are used, and their split."""

    rows_N: Int64[np.ndarray, " N"]
    """Numbers of the train and test images."""
    is_train_N: Bool[np.ndarray, " N"]
    left_out: frozenset[str]
    """Paths of the others."""
    said: str
    """How they were divided, for tables and messages."""


def of(cfg: config.Split, paths: list[str], class_n: np.ndarray, acts: dumped.Acts, table: str = "") -> Parts:
    """Divides the images with these paths and classes.

    Args:
        table: default of --labels.split-file.

    Raises:
        UserError: an image has no split, or no image is a train (or test) image.
    """
    train, test = cfg.split_names
    match cfg.split:
        case "drawn":
            is_test_n = drawn(paths, class_n, cfg.test_share, cfg.split_seed)
            names = [test if is_test else train for is_test in is_test_n.tolist()]
            said = f"split drawn with seed {cfg.split_seed}"
        case "folders":
            names = [path.partition("/")[0] for path in paths]
            said = "split by folders"
        case "dumps":
            names = _by_dump(cfg, paths, acts)
            said = "split by dumps"
        case "file":
            names, where = _by_file(cfg, paths, table)
            said = f"split by {cfg.split_column} of {where}"
    name_n = np.array(names, object)
    for name in cfg.split_names:
        if not (name_n == name).any():
            found = ", ".join(map(repr, sorted(set(names))[:5]))
            raise errors.UserError(
                f"--labels.split {cfg.split}: no image is named {name!r}; the names are {found}. Pass the "
                "names of the train and test images as --labels.split-names."
            )
    rows_N = np.flatnonzero(np.isin(name_n, [train, test]))
    used = set(rows_N.tolist())
    left_out = frozenset(path for i, path in enumerate(paths) if i not in used)
    if left_out:
        logger.info("%d images are neither %s nor %s and are left out", len(left_out), train, test)
    return Parts(rows_N, name_n[rows_N] == train, left_out, said)


@jaxtyped(typechecker=beartype.beartype)
def drawn(
    paths: collections.abc.Sequence[str], class_N: Int64[np.ndarray, " N"], share: float, seed: int
) -> Bool[np.ndarray, " N"]:
    """Draws test images. Does not depend on the images' order.

    The images are put in a row, class after class, at random within a class and in a random order of classes.
    From a random start, test images then come at equal distances, so their number in each class is its share
    up to 1.
    """
    rng = np.random.default_rng((seed, 0x5917))
    by_path = sorted(range(len(paths)), key=paths.__getitem__)
    shuffled_N = rng.permutation(by_path)
    _, class_N = np.unique(class_N, return_inverse=True)
    place_C = rng.permutation(class_N.max(initial=0) + 1)
    row_N = shuffled_N[np.argsort(place_C[class_N[shuffled_N]], kind="stable")]
    bounds = np.floor(np.arange(len(paths) + 1) * share + rng.random())
    out_N = np.zeros(len(paths), bool)
    out_N[row_N] = bounds[1:] > bounds[:-1]
    return out_N


def _by_dump(cfg: config.Split, paths: list[str], acts: dumped.Acts) -> list[str]:
    """The names of splits, by the activations that hold an image; "" for images in none."""
    if "train" not in acts or acts["train"] is acts.get("test", acts["train"]):
        raise errors.UserError(
            "--labels.split dumps: pass the train images' dump as --train-data.shard-root, and the test "
            "images' as --test-data.shard-root."
        )
    train, test = ({*dumped.images({"train": acts[split]}, "the images")} for split in ("train", "test"))
    if twice := sorted(train & test):
        raise errors.UserError(
            f"{acts['test'].given}: {len(twice)} of its images are in --train-data too, by path (first: "
            f"{twice[0]}). Dump different images, or pass another --labels.split."
        )
    if not (train | test) & set(paths):
        raise errors.UserError(
            f"--labels.split dumps: no image with labels is in the dumps, by path (first: {paths[0]}, of "
            f"--train-data: {min(train)}). Write paths relative to the folders that were dumped."
        )
    of = dict.fromkeys(train, cfg.split_names[0]) | dict.fromkeys(test, cfg.split_names[1])
    return [of.get(path, "") for path in paths]


def _by_file(cfg: config.Split, paths: list[str], table: str) -> tuple[list[str], str]:
    """(the names of splits by a file's column; the file's name)."""
    if not (cfg.split_file or table):
        raise errors.UserError("--labels.split-file is missing: pass a CSV or Parquet file.")
    path_column = "path"
    if not cfg.split_file and isinstance(cfg, config.Table):
        path_column = cfg.path_column
    fpath = pathlib.Path(cfg.split_file or table)
    found = tablefile.read(fpath, [path_column, cfg.split_column])
    names = found.values(cfg.split_column).to_list()
    of = {
        path: (name, row)
        for row, (path, name) in enumerate(zip(found.paths(path_column), names, strict=True))
    }
    if absent := [path for path in paths if path not in of]:
        raise errors.UserError(
            f"{fpath}: {len(absent)} of {len(paths)} images have no row there (first: {absent[0]}; its own "
            f"first is {next(iter(of), 'none')}). Add them."
        )
    out = []
    for path in paths:
        name, row = of[path]
        if name is None:
            raise errors.UserError(
                f"{fpath}: row {found.number(row)} ({path}) has no {cfg.split_column!r}. Fill it in."
            )
        out.append(name)
    return out, fpath.name


def classes_of(paths: list[str], cfg: config.Split) -> Int64[np.ndarray, " N"]:
    """Each image's class for a drawn split: its first folder (below train/ or test/), if there is one."""
    depth = int(cfg.split == "folders")
    folders = [[*path.split("/")[:-1], *[""] * (depth + 1)][depth] for path in paths]
    return np.unique(np.array(folders, object), return_inverse=True)[1].astype(np.int64)
