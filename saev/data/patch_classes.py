"""The class of each patch of a stream, from the labels that `python -m saev.labels` left beside the shards.

N images of all directories, X chosen tokens of an image, P patches.
"""

import collections.abc
import typing as tp

import numpy as np
from jaxtyping import Bool, Int32

from saev import errors
from saev.data import activations
from saev.formats import patchlabels, shards, staging

NONE = -1
"""The class of a patch without a label, and of [CLS]."""


class Classes(tp.NamedTuple):
    names: list[str]
    """Names of the classes, by number."""
    of_streams: list[Int32[np.ndarray, "N X"]]
    """For each stream, the class of each token of each image, by image number."""


def read(streams: collections.abc.Sequence["activations.Activations"], name: str = "") -> Classes:
    """Reads the labels of streams of activations. Classes of the same name are the same class.

    Args:
        name: of the labels, if they have one (`patchlabels`).

    Raises:
        UserError: a directory has no such labels, they are damaged or of another dump, or only [CLS] is read.
    """
    number: dict[str, int] = {}
    out = []
    for acts in streams:
        if acts.first_patch + acts.n_tokens <= 0:
            raise errors.UserError(
                f"{acts.flag}.patches cls: [CLS] has no patch label. Pass {acts.flag}.patches image."
            )
        class_NP = np.concatenate([_of_directory(part, name, number) for part in acts.dirs])
        n_lead = max(0, -acts.first_patch)
        out.append(np.pad(class_NP, ((0, 0), (n_lead, 0)), constant_values=NONE))
    return Classes(list(number), out)


def _of_directory(part: shards.ShardDir, name: str, number: dict[str, int]) -> Int32[np.ndarray, "N P"]:
    """Labels as numbers. Adds new names to `number`."""
    labels = patchlabels.read(staging.original(part), name)
    class_of = np.full(patchlabels.MAX_ID + 2, NONE, np.int32)
    known = np.zeros(len(class_of), bool)
    known[labels.ignore] = True
    for i, class_name in labels.classes.items():
        class_of[i] = number.setdefault(class_name, len(number))
        known[i] = True
    found = np.unique(labels.id_NP)
    if not known[found].all():
        raise errors.UserError(
            f"{part.dpath}: its patch labels have the id {found[~known[found]][0]}, which has no name. "
            f"{patchlabels.AGAIN}"
        )
    return class_of[labels.id_NP]


def kept(acts: "activations.Activations", excluded: tuple[str, ...]) -> Bool[np.ndarray, "N X"] | None:
    """Whether each token of each image is of none of these classes. None if no class is excluded.

    Raises:
        UserError: as `read`, or the labels have no such class.
    """
    if not excluded:
        return None
    names, (class_NX,) = read([acts])
    if unknown := [name for name in excluded if name not in names]:
        raise errors.UserError(
            f"{acts.flag}.exclude-patch-labels {unknown[0]}: no such class. The labels' classes are "
            f"{', '.join(names[:20])}."
        )
    return ~np.isin(class_NX, [names.index(name) for name in excluded])
