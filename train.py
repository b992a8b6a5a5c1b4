"""Train sparse autoencoders on activation shards. See README.md."""

from saev import commands

if __name__ == "__main__":
    commands.run("train")
