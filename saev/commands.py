"""The commands, as the root scripts and the installed ones call them. Imports nothing that takes time."""

import importlib
import typing as tp

from saev import early


def data() -> tp.NoReturn:
    """Dump ViT activations."""
    _run("saev.data.cli")


def train() -> tp.NoReturn:
    """Train sparse autoencoders on activation shards."""
    _run("saev.training.cli")


def visuals() -> tp.NoReturn:
    """Show the images that fire each latent most."""
    _run("saev.visuals.cli")


def protoeval() -> tp.NoReturn:
    """Evaluate prototypes against the attributes of CUB-200-2011."""
    _run("saev.protoeval.cli")


def _run(module: str) -> tp.NoReturn:
    """Runs a module's `main` as a command. Ctrl-C is answered while it is imported."""
    early.install()
    launch = importlib.import_module("saev.launch")
    launch.entry(importlib.import_module(module).main)
