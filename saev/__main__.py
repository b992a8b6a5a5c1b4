"""The installed command: `saev COMMAND ...`, or `python -m saev COMMAND ...`."""

import sys
import typing as tp

from saev import commands, early


def main() -> tp.NoReturn:
    """Runs the command named by the first argument. Without one, or for --help, lists the commands; --version
    prints the version."""
    early.install()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in commands.COMMANDS:
        sys.argv[:2] = [f"saev {name}"]
        commands.run(name)
    from saev import launch

    launch.entry(lambda: _explain(name))


def _explain(name: str) -> None:
    import saev
    from saev import errors

    if name == "--version":
        print(saev.__version__)
        return
    if name not in ("-h", "--help"):
        known = ", ".join(commands.COMMANDS)
        raise errors.UserError(f"saev {name}: no such command. Commands: {known}.")
    lines = [f"    {command:10} {what}" for command, (_, what) in commands.COMMANDS.items()]
    print("\n".join(["usage: saev COMMAND ...", "", *lines, "", "saev COMMAND --help lists the flags."]))


if __name__ == "__main__":
    main()
