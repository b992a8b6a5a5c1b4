"""Parts as traits: an image has a part if its patch labels have it.

N images, T traits, X tokens of an image.
"""

import dataclasses
import logging

import numpy as np

from saev import errors
from saev.data import activations
from saev.data.traits import base, config, dumped, split

logger = logging.getLogger("saev")

BACKGROUND = "background"
"""A class that is not a trait unless it is asked for."""


def load(cfg: config.Masks, acts: dumped.Acts) -> base.Traits:
    """Makes labels from those of patches. Labels of an image without labelled patches are unknown.

    Raises:
        UserError: a dump has no patch labels, or a part is unknown or does not vary.
    """
    found = dumped.images(acts, "the patch labels")
    streams = list(dict.fromkeys(stream for stream, _ in found.values()))
    number: dict[str, int] = {}
    classes_of = [_patches(stream).classes(cfg.label_name, number) for stream in streams]
    names = list(number)
    counted = dict(zip(streams, (_counts(class_AX, len(names)) for class_AX in classes_of), strict=True))
    paths = list(found)
    class_n = split.classes_of(paths, cfg)
    parts = split.of(cfg, paths, class_n, acts)
    n_NT = np.stack([counted[stream][i] for stream, i in found.values()])[parts.rows_N]
    labels_NT, known_N = n_NT >= cfg.min_patches, n_NT.sum(axis=1) > 0
    where = f"{streams[0].given} (patch labels)"
    if not known_N.any():
        raise errors.UserError(
            f"{where}: no image has a labelled patch. Make them with `python -m saev.labels`."
        )
    chosen = _chosen(cfg, names, labels_NT[known_N], where)
    return base.Traits(
        [paths[i] for i in parts.rows_N],
        parts.is_train_N,
        [f"part::{names[t]}" for t in chosen],
        labels_NT[:, chosen],
        class_n[parts.rows_N],
        None if known_N.all() else np.repeat(known_N[:, None], len(chosen), axis=1),
        parts.left_out,
        base.Words("the dump", "the dump", parts.said, "Label them", split.REMEDY),
        f"patch labels {cfg.label_name}".rstrip() + f", {cfg.min_patches} or more, {parts.said}",
        cfg.split == "drawn",
    )


def _patches(acts: activations.Activations) -> activations.Activations:
    """The patches of the images, also if [CLS] is scored."""
    if acts.cfg.patches != "cls":
        return acts
    return activations.Activations(dataclasses.replace(acts.cfg, patches="image"), acts.flag, [acts])


def _counts(class_AX: np.ndarray, n_classes: int) -> np.ndarray:
    """(A, T): the patches of each class, of all images A of a stream."""
    return np.stack([(class_AX == t).sum(axis=1) for t in range(n_classes)], axis=1)


def _chosen(cfg: config.Masks, names: list[str], labels_NT: np.ndarray, where: str) -> list[int]:
    """Numbers of the classes that are traits."""
    says = [bool(0 < column_N.mean() < 1) for column_N in labels_NT.T]
    for part in cfg.parts:
        if part not in names:
            raise errors.UserError(
                f"--labels.parts {part}: no such class. The classes are {', '.join(names[:20])}."
            )
        if not says[names.index(part)]:
            many = "all images have" if labels_NT[:, names.index(part)].any() else "no image has"
            raise errors.UserError(
                f"--labels.parts {part}: {many} it, so it does not vary. Leave it out, or change "
                "--labels.min-patches."
            )
    if cfg.parts:
        return [names.index(part) for part in dict.fromkeys(cfg.parts)]
    says = [does and name != BACKGROUND for does, name in zip(says, names, strict=True)]
    if not any(says):
        raise errors.UserError(f"{where}: all images have the same parts. Change --labels.min-patches.")
    dull = [name for name, does in zip(names, says, strict=True) if not does and name != BACKGROUND]
    if dull:
        logger.info("left out as traits, because all images or none have them: %s", ", ".join(dull))
    return [t for t, does in enumerate(says) if does]
