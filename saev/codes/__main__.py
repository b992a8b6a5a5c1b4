"""Write codes of patches and images: `python -m saev.codes`. See docs/codes.md."""

from saev import commands

if __name__ == "__main__":
    commands.run("codes")
