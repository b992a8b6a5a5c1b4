"""Show the images that fire each latent most. See README.md."""

from saev import commands

if __name__ == "__main__":
    commands.run("visuals")
