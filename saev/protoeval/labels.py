"""Loads the labels, refuses implausible ones, and prints --check."""

import collections.abc
import hashlib

from saev import errors, helpers
from saev.data import activations, cub
from saev.data.traits import base, dumped, folders, masks, table
from saev.data.traits import config as traits_config
from saev.protoeval import check, config, join


def load(cfg: config.ProtoEval, acts: dumped.Acts) -> base.Traits:
    """Loads a config's labels. acts: the train and test activations.

    Raises:
        UserError: bad labels, or implausible ones without --force.
    """
    labels = _read(cfg, acts)
    if not cfg.force:
        check.refuse_implausible(labels, where(cfg))
    return labels


def where(cfg: config.ProtoEval) -> str:
    """The flag and file of the labels, for messages."""
    match cfg.source:
        case traits_config.Cub(root):
            return f"--cub-root {root}"
        case traits_config.Table(file=file):
            return f"--labels.file {file}"
        case traits_config.ClassFolders():
            return f"labels:class-folders of {cfg.train_data.shard_root}"
        case traits_config.Masks():
            return f"labels:masks of {cfg.train_data.shard_root}"


def fingerprint(labels: base.Traits) -> str:
    """A hash of paths, split, traits and labels."""
    parts = [labels.paths_N, labels.is_train_N.tolist(), labels.attribute_names_T]
    digest = hashlib.sha256(labels.labels_NT.tobytes())
    if labels.known_NT is not None:
        digest.update(labels.known_NT.tobytes())
    digest.update(helpers.canonical_json(parts).encode())
    return digest.hexdigest()


def describe(
    cfgs: collections.abc.Sequence[config.ProtoEval], say: collections.abc.Callable[[str], None] = print
) -> None:
    """Prints --check: each source of labels, and its join with the given activations.

    Raises:
        UserError: bad labels, implausible ones without --force, or shards that lack an image.
    """
    for cfg in {(c.source, c.train_data, c.test, c.protocol): c for c in cfgs}.values():
        sides = [(split, data) for split, data in cfg.sides if data.shard_root]
        is_open = {data: activations.Activations(data, f"--{split}-data") for split, data in sides}
        labels = _read(cfg, {split: is_open[data] for split, data in sides})
        said = labels.source
        if isinstance(cfg.source, traits_config.Cub):
            said = f"{cfg.source.root}, certainty from {cfg.min_certainty}, annotations: {cfg.annotations}"
        say(f"{said}: {check.describe(labels)}")
        chosen, measured = (split for split, _ in cfg.sides)
        say(f"Prototypes are chosen on the {chosen} images and measured on the {measured} images.")
        for split, data in sides:
            stream = is_open[data]
            side = join.find(stream, labels, split, cfg.force)
            holds = f"all {side.size}"
            if side.left_out:
                holds = f"{side.size}; {join.describe_left_out(side.left_out, split)}"
            say(f"{stream.root}: holds {holds}.")
        for problem in check.problems(labels):
            say(f"Implausible: {problem}.")
        if not cfg.force:
            check.refuse_implausible(labels, where(cfg))


def _read(cfg: config.ProtoEval, acts: dumped.Acts) -> base.Traits:
    match cfg.source:
        case traits_config.Cub(""):
            raise errors.UserError(
                "--cub-root is missing: pass the CUB_200_2011 folder, or other labels (labels:table, ...)."
            )
        case traits_config.Cub(root):
            return cub.load(root, min_certainty=cfg.min_certainty, annotations=cfg.annotations)
        case traits_config.ClassFolders() as source:
            return folders.load(source, acts)
        case traits_config.Table() as source:
            return table.load(source, acts)
        case traits_config.Masks() as source:
            return masks.load(source, acts)
