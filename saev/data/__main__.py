"""Dump ViT activations: `python -m saev.data`. See README.md."""

from saev import commands

if __name__ == "__main__":
    commands.run("data")
