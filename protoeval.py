"""Evaluate prototypes against CUB-200-2011's attributes. See README.md."""

from saev import commands

if __name__ == "__main__":
    commands.run("protoeval")
