"""Parts as traits: an image has a part if its labels of patches have it.

N images, T traits, P patches.
"""

import collections.abc
import logging

import numpy as np

from saev import errors
from saev.data import activations
from saev.data.traits import base, config, dumped, split
from saev.formats import patchlabels

logger = logging.getLogger("saev")


def load(cfg: config.Masks, acts: dumped.Acts) -> base.Traits:
    """Makes labels from those of patches. Labels of an image without labelled patches are unknown.

    Raises:
        UserError: a dump has no labels of patches or other classes, or a part is unknown or says nothing.
    """
    found = dumped.images(acts, "the labels of patches")
    streams = list(dict.fromkeys(stream for stream, _ in found.values()))
    labels = {stream: _read(stream, cfg.patch_labels) for stream in streams}
    names = labels[streams[0]][0].classes
    for stream in streams:
        for part in labels[stream]:
            if part.classes != names:
                raise errors.UserError(
                    f"{stream.given}: its labels of patches have other classes than "
                    f"{streams[0].given}. Label both with the same names."
                )
    counted = {stream: _counts(labels[stream], names) for stream in streams}
    paths = list(found)
    n_nT = np.stack([counted[stream][0][i] for stream, i in found.values()])
    is_labelled_n = np.array([counted[stream][1][i] for stream, i in found.values()])
    class_n = split.classes_of(paths, cfg)
    parts = split.of(cfg, paths, class_n, acts)
    labels_NT, known_N = (n_nT >= cfg.min_patches)[parts.rows_N], is_labelled_n[parts.rows_N]
    where = f"{streams[0].given} (labels of patches)"
    if not known_N.any():
        raise errors.UserError(
            f"{where}: no image has a labelled patch. Make them with `python -m saev.labels`."
        )
    chosen = _chosen(cfg, list(names.values()), labels_NT[known_N], where)
    known_NT = np.broadcast_to(known_N[:, None], (len(known_N), len(chosen))).copy()
    all_names = list(names.values())
    return base.Traits(
        [paths[i] for i in parts.rows_N],
        parts.is_train_N,
        [f"part::{all_names[t]}" for t in chosen],
        labels_NT[:, chosen],
        class_n[parts.rows_N],
        None if known_N.all() else known_NT,
        parts.left_out,
        base.Words("the dump", "the dump", parts.said, "Label them", split.REMEDY),
        f"labels of patches {cfg.patch_labels}".rstrip() + f", {cfg.min_patches} or more, {parts.said}",
        cfg.split == "drawn",
    )


def _read(stream: activations.Activations, name: str) -> list[patchlabels.PatchLabels]:
    return [patchlabels.read(part, name) for part in stream.dirs]


def _counts(
    parts: collections.abc.Sequence[patchlabels.PatchLabels], names: dict[int, str]
) -> tuple[np.ndarray, np.ndarray]:
    """(patches (N, T) of each class; whether an image has a labelled patch), for all images of a stream."""
    n_NT = [np.stack([(part.id_NP == i).sum(axis=1) for i in names], axis=1) for part in parts]
    return np.concatenate(n_NT), np.concatenate([(part.id_NP != part.ignore).any(axis=1) for part in parts])


def _chosen(cfg: config.Masks, names: list[str], labels_NT: np.ndarray, where: str) -> list[int]:
    """Numbers of the classes that are traits."""
    says = [bool(column_N.any() and not column_N.all()) for column_N in labels_NT.T]
    for part in cfg.parts:
        if part not in names:
            raise errors.UserError(
                f"--labels.parts {part}: no such class. The classes are {', '.join(names[:20])}."
            )
        if not says[names.index(part)]:
            many = "all images have" if labels_NT[:, names.index(part)].any() else "no image has"
            raise errors.UserError(
                f"--labels.parts {part}: {many} it, so it says nothing. Leave it out, or change "
                "--labels.min-patches."
            )
    if cfg.parts:
        return [names.index(part) for part in dict.fromkeys(cfg.parts)]
    if not any(says):
        raise errors.UserError(f"{where}: all images have the same parts. Change --labels.min-patches.")
    if dull := [name for name, does in zip(names, says, strict=True) if not does]:
        logger.info("all images or none have %s, so these are no traits", ", ".join(dull))
    return [t for t, does in enumerate(says) if does]
