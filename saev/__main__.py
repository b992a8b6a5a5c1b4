"""The installed command: `saev COMMAND ...`, or `python -m saev COMMAND ...`. Imports nothing that takes time."""

import importlib
import sys
import typing as tp

from saev import early

COMMANDS = {
    "data": ("saev.data.cli", "dump the activations of a pretrained ViT"),
    "verify": ("saev.data.verify", "compare shard directories with their checksums"),
    "train": ("saev.training.cli", "train sparse autoencoders"),
    "report": ("saev.training.report", "show the runs of a sweep as a table"),
    "visuals": ("saev.visuals.cli", "show the images that fire each latent most"),
    "protoeval": ("saev.protoeval.cli", "evaluate prototypes on CUB-200-2011"),
    "demo": ("saev.demo.__main__", "run the whole experiment, small and real"),
}
"""Name -> (module with a `main`, what it does)."""


def main() -> tp.NoReturn:
    early.install()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    launch = importlib.import_module("saev.launch")
    if name not in COMMANDS:
        launch.entry(lambda: _explain(name))
    sys.argv[:2] = [f"saev {name}"]
    launch.entry(importlib.import_module(COMMANDS[name][0]).main)


def _explain(name: str) -> None:
    from saev import errors

    if name not in ("-h", "--help"):
        raise errors.UserError(f"saev {name}: no such command. Commands: {', '.join(COMMANDS)}.")
    lines = [f"    {command:10} {what}" for command, (_, what) in COMMANDS.items()]
    print("\n".join(["usage: saev COMMAND [-h] ...", "", *lines]))


if __name__ == "__main__":
    main()
