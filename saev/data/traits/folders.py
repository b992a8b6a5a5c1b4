"""Class folders as traits: each class, or each group of classes, is a trait.

N images, T traits, C classes.
"""

import fnmatch
import pathlib

import beartype
import numpy as np
from jaxtyping import Bool, jaxtyped

from saev import errors
from saev.data.traits import base, config, dumped, split
from saev.formats import tomlfile

EXAMPLE = 'write lines such as waders = ["heron", "*_stork"]'


def load(cfg: config.ClassFolders, acts: dumped.Acts) -> base.Traits:
    """Makes labels from the paths of the dumped images.

    Raises:
        UserError: an image lies in no class folder, there is one class only, or the file of groups is wrong.
    """
    paths = list(dumped.images(acts, "the class folders"))
    names, class_n = classes(paths, 1 if cfg.split == "folders" else 0)
    parts = split.of(cfg, paths, class_n, acts)
    where = acts["train"].given
    if len(names) == 1:
        raise errors.UserError(
            f"{where}: all images are of one class ({names[0]}), which is not a trait. Dump at least two."
        )
    if cfg.groups:
        attributes, has_TC = groups(pathlib.Path(cfg.groups), names)
    else:
        attributes, has_TC = [f"class::{name}" for name in names], np.eye(len(names), dtype=bool)
    merge = "Merge classes with --labels.groups."
    base.refuse_size(len(paths), len(attributes), where, merge)
    class_N = class_n[parts.rows_N]
    what = "class folders" + f", grouped by {pathlib.Path(cfg.groups).name}" * bool(cfg.groups)
    return base.Traits(
        [paths[i] for i in parts.rows_N],
        parts.is_train_N,
        attributes,
        np.ascontiguousarray(has_TC.T[class_N]),
        class_N,
        left_out=parts.left_out,
        words=base.Words("the dump", "the dump", parts.said, "Label them", split.REMEDY),
        source=f"{what}, {parts.said}",
        is_drawn=cfg.split == "drawn",
    )


def classes(paths: list[str], depth: int) -> tuple[list[str], np.ndarray]:
    """(names of the classes; each image's class). A class is the folder at a depth of the path.

    Raises:
        UserError: an image lies in no folder at this depth.
    """
    names = []
    for path in paths:
        folders = path.split("/")[:-1]
        if len(folders) <= depth:
            raise errors.UserError(
                f"{path}: lies in no class folder. Dump a folder with one subfolder per class, or pass "
                "labels:table."
            )
        names.append(folders[depth])
    found, class_N = np.unique(np.array(names, object), return_inverse=True)
    return found.tolist(), class_N.astype(np.int64)


@jaxtyped(typechecker=beartype.beartype)
def groups(fpath: pathlib.Path, names: list[str]) -> tuple[list[str], Bool[np.ndarray, "T C"]]:
    """(names of the groups; the classes of each).

    A class is given by its name, or several by a pattern with * and ?. Classes of no group have none of the
    traits.

    Raises:
        UserError: a group is not a list of names, has a class that does not exist, or has all classes.
    """
    table = tomlfile.read(fpath, f"To merge classes, {EXAMPLE}.")
    number = {name: i for i, name in enumerate(names)}
    has_TC = np.zeros((len(table), len(names)), bool)
    for has_C, (group, members) in zip(has_TC, table.items(), strict=True):
        if not isinstance(members, list) or not all(isinstance(name, str) for name in members) or not members:
            raise errors.UserError(f"{fpath}: {group} is not a list of class names; {EXAMPLE}.")
        for pattern in members:
            found = [pattern] if pattern in number else fnmatch.filter(names, pattern)
            if not found:
                raise errors.UserError(
                    f"{fpath}: {group} has {pattern!r}, but no class has that name. The classes are "
                    f"{', '.join(names[:10])}{', ...' * (len(names) > 10)}."
                )
            has_C[[number[name] for name in found]] = True
        if has_C.all():
            raise errors.UserError(f"{fpath}: {group} has all classes, so it does not vary. Take some out.")
    if not len(table):
        raise errors.UserError(f"{fpath}: has no groups; {EXAMPLE}.")
    return list(table), has_TC
