"""Compare dictionaries: `python -m saev.compare`. See docs/compare.md."""

from saev import commands

if __name__ == "__main__":
    commands.run("compare")
