"""Measure how well prototypes detect traits of images. See README.md."""

from saev import commands

if __name__ == "__main__":
    commands.run("protoeval")
