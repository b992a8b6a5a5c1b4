"""Joins patch labels to the train and test images. N images, X tokens of an image."""

import hashlib
import logging
import pathlib
import re
import typing as tp

import beartype
import numpy as np
from jaxtyping import Int32, Int64, jaxtyped

from saev import errors, helpers
from saev.data import activations
from saev.formats import patchlabels
from saev.protoeval import config, join

logger = logging.getLogger("saev")


@jaxtyped(typechecker=beartype.beartype)
class Side(tp.NamedTuple):
    """The labelled patches of one split."""

    acts: activations.Activations
    """Only the split's images."""
    class_NX: Int32[np.ndarray, "N X"]
    """Each patch's class, in the order of the stream; negative: none."""
    order_N: Int64[np.ndarray, " N"]
    """Each image's place among the split's images in the order of the labels."""


class Labels(tp.NamedTuple):
    """Labels of the patches to choose on and to measure on."""

    names: list[str]
    """Of the classes, by number."""
    chosen: Side
    measured: Side

    @property
    def fingerprint(self) -> str:
        """A hash of classes and labels."""
        digest = hashlib.sha256(helpers.canonical_json(self.names).encode())
        for side in (self.chosen, self.measured):
            digest.update(side.class_NX.tobytes())
        return digest.hexdigest()

    @property
    def of_images(self) -> str:
        """The same for any order of images in the shards, and of classes. Results compare if it is equal."""
        names = sorted(self.names)
        rank_C = np.array(
            [*map(names.index, self.names), -1], np.int32
        )  # the last one is of unlabelled patches
        digest = hashlib.sha256(helpers.canonical_json(names).encode())
        for side in (self.chosen, self.measured):
            digest.update(str(side.class_NX.shape).encode())
            class_NX = np.maximum(side.class_NX, -1)[np.argsort(side.order_N)]
            digest.update(rank_C[class_NX].tobytes())
        return digest.hexdigest()


def load(cfg: config.ProtoEval, sides: join.Sides) -> Labels | None:
    """Reads --patch-labels for both splits. None without the flag.

    Raises:
        UserError: a shard directory has no such labels, they are damaged or of another dump, or the train or
            test patches have fewer than two classes.
    """
    if not cfg.patch_labels:
        return None
    streams = [side.acts.only(side.row_of) for side in sides]
    number: dict[str, int] = {}
    name = _name(cfg.patch_labels, streams)
    of_streams = [acts.classes(name, number) for acts in streams]
    names = list(number)
    found = []
    for side, acts, class_AX in zip(sides, streams, of_streams, strict=True):
        rows = np.array([side.row_of[i] for i in acts.image_is_N.tolist()])
        class_NX = class_AX[acts.image_is_N]
        if acts.is_kept_NT is not None:
            class_NX[~acts.is_kept_NT] = patchlabels.NONE
        present = np.unique(class_NX[class_NX >= 0])
        if len(present) < 2:
            what = f"only the class {names[present[0]]}" if len(present) else "no label"
            raise errors.UserError(
                f"--patch-labels {cfg.patch_labels}: the patches of the {side.split} images have {what}. "
                "Label the patches of these images with at least two classes."
            )
        found.append(Side(acts, class_NX, np.argsort(np.argsort(rows))))
        n = int((class_NX >= 0).sum())
        text = "patch labels: %d of %d patches of %s have one of %d classes"
        logger.info(text, n, class_NX.size, side.size, len(present))
    return Labels(names, *found)


def _name(typed: str, streams: list[activations.Activations]) -> str:
    """The name of the labels whose file is given: parts for labels-parts.bin.

    Raises:
        UserError: it is not a file of labels, or lies beside other shards.
    """
    fpath = pathlib.Path(typed)
    match = re.fullmatch(r"labels(?:-(\w+))?\.bin", fpath.name, re.ASCII)
    if not match:
        raise errors.UserError(
            f"--patch-labels {typed}: pass the labels.bin (or labels-NAME.bin) that `python -m saev.labels` "
            "printed."
        )
    roots = {pathlib.Path(root).resolve() for acts in streams for root in acts.roots}
    if len(fpath.parts) > 1 and fpath.resolve().parent not in roots:
        raise errors.UserError(
            f"--patch-labels {typed}: does not lie beside the shards of {streams[0].given}. Label the "
            "patches of these shards, and pass the file that `python -m saev.labels` prints."
        )
    return match[1] or ""
