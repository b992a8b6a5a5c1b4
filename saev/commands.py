"""The commands that the root scripts and the installed `saev` call. Imports quickly."""

import importlib
import typing as tp

from saev import early

COMMANDS = {
    "data": ("saev.data.cli", "dump the activations of a pretrained ViT"),
    "verify": ("saev.data.verify", "compare shard directories with their checksums"),
    "labels": ("saev.labels.cli", "give patches labels from segmentation masks"),
    "train": ("saev.training.cli", "train sparse autoencoders"),
    "report": ("saev.training.report", "show training runs as a table"),
    "visuals": ("saev.visuals.cli", "make a gallery of what each latent fires on"),
    "codes": ("saev.codes.cli", "write codes of patches and images to files"),
    "protoeval": ("saev.protoeval.cli", "measure how well prototypes detect traits of images"),
    "compare": ("saev.compare.cli", "match the latents of SAEs"),
    "convert": ("saev.compat.cli", "convert SAEs of other libraries"),
    "jobs": ("saev.jobs", "list, follow, cancel, collect and retry Slurm jobs"),
    "demo": ("saev.demo.__main__", "run the whole experiment on a small data set"),
}
"""Name -> (module with a `main`, what it does)."""


def run(name: str) -> tp.NoReturn:
    """Runs a command by name. Ctrl-C works while its modules are imported."""
    early.install()
    from saev import launch

    launch.entry(importlib.import_module(COMMANDS[name][0]).main)
