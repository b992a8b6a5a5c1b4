"""Make a gallery of what each latent fires on. See README.md."""

from saev import commands

if __name__ == "__main__":
    commands.run("visuals")
