"""Label patches: `python -m saev.labels`. See docs/patch-labels.md."""

from saev import commands

if __name__ == "__main__":
    commands.run("labels")
