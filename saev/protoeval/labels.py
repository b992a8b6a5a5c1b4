"""Loads CUB's labels, refuses implausible ones, and prints --check."""

import collections.abc
import hashlib

from saev import errors, helpers
from saev.data import activations, cub
from saev.protoeval import check, config, join


def load(cfg: config.ProtoEval) -> cub.Cub:
    """Loads a config's labels.

    Raises:
        UserError: bad labels, or implausible ones without --force.
    """
    labels = _read(cfg)
    if not cfg.force:
        check.refuse_implausible(labels, cfg.cub_root)
    return labels


def fingerprint(labels: cub.Cub) -> str:
    """A hash of paths, split, traits and labels."""
    parts = [labels.paths_N, labels.is_train_N.tolist(), labels.attribute_names_T]
    digest = hashlib.sha256(labels.labels_NT.tobytes())
    digest.update(helpers.canonical_json(parts).encode())
    return digest.hexdigest()


def describe(cfgs: list[config.ProtoEval], say: collections.abc.Callable[[str], None] = print) -> None:
    """Prints --check: each label folder, and its join with the given activations.

    Raises:
        UserError: bad labels, implausible ones without --force, or shards that lack an image.
    """
    for cfg in {(c.cub_root, c.train_data, c.test, c.protocol): c for c in cfgs}.values():
        labels = _read(cfg)
        say(
            f"{cfg.cub_root}, certainty from {cfg.min_certainty}, annotations: {cfg.annotations}: "
            f"{check.describe(labels)}"
        )
        chosen, measured = (split for split, _ in cfg.sides)
        say(f"Prototypes are chosen on the {chosen} images and measured on the {measured} images.")
        for split, data in cfg.sides:
            if not data.shard_root:
                continue
            side = join.find(activations.Activations(data, f"--{split}-data"), labels, split, cfg.force)
            holds = f"all {side.size}"
            if side.left_out:
                holds = f"{side.size}; {join.describe_left_out(side.left_out, split)}"
            say(f"{data.shard_root}: holds {holds}.")
        for problem in check.problems(labels):
            say(f"Implausible: {problem}.")
        if not cfg.force:
            check.refuse_implausible(labels, cfg.cub_root)


def _read(cfg: config.ProtoEval) -> cub.Cub:
    if not cfg.cub_root:
        raise errors.UserError("--cub-root is missing: pass the CUB_200_2011 folder.")
    return cub.load(cfg.cub_root, min_certainty=cfg.min_certainty, annotations=cfg.annotations)
