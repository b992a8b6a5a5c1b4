"""The command visuals.py."""

import pathlib

from saev import console, launch, sweeps
from saev.visuals import config


def main() -> None:
    """Makes a gallery and prints the path of its page."""
    (cfg,) = sweeps.parse(config.Visuals, "Shows the images that fire each latent most.")
    if cfg.dry_run:
        return console.show([cfg], [cfg] if cfg.slurm.is_on else ())
    name = sweeps.title("visuals", cfg, pathlib.Path(cfg.source).parent.name)
    (outcome,) = launch.run("saev.visuals.collect:main", [cfg], cfg.slurm, name)
    return console.say(f"{outcome.get()}/index.html")
