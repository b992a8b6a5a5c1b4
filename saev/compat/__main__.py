"""The command `python -m saev.compat`. See docs/checkpoints.md."""

from saev import commands

if __name__ == "__main__":
    commands.run("convert")
