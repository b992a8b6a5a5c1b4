"""The command that converts SAEs of other libraries: `python -m saev.compat`, `saev convert`."""

import importlib
import typing as tp

import tyro

from saev import cli, console, early, errors, fields

Library = tp.Literal["saelens", "dictionary_learning", "sparsify"]
HELP = "LIBRARY load FOLDER CHECKPOINT, or saelens export CHECKPOINT FOLDER. LIBRARY: {}."


def main() -> None:
    """Converts one SAE; prints the file or folder that it wrote.

    Raises:
        UserError: the target exists, the source cannot be read, or the SAE has no exact counterpart.
    """
    library, verb, source, target = cli.parse(
        tp.Annotated[
            tuple[Library, tp.Literal["load", "export"], str, str],
            tyro.conf.arg(
                name="args",
                help=HELP.format(", ".join(tp.get_args(Library))),
                metavar="LIBRARY {load,export} FROM TO",
            ),
            tyro.conf.Positional,
        ],
        description="Converts SAEs from and to the formats of other libraries.",
    )
    if verb == "export" and library != "saelens":
        raise errors.UserError(f"export: only the format of saelens can be written, not {library}'s.")
    target = fields.path(target)
    if target.exists():
        raise errors.UserError(
            f"{target} exists already. Pass a new {'file' if verb == 'load' else 'folder'}."
        )
    with early.importing():
        from saev import nn

        module = importlib.import_module(f"saev.compat.{library}")
    if verb == "export":
        module.export(nn.load(source), target)
    else:
        nn.save(module.load(source), target)
    console.say(str(target))
