"""The command visuals.py."""

import pathlib

from saev import console, launch, sweeps
from saev.visuals import config


def main() -> None:
    """Makes a gallery and prints the path of its page."""
    (cfg,) = sweeps.parse(config.Visuals, "Makes a gallery: what each latent, prototype or unit fires on.")
    if cfg.dry_run:
        return console.show([cfg], [cfg] if cfg.slurm.is_on else ())
    source = pathlib.Path(cfg.source or "units")
    is_sae = isinstance(cfg.shown, config.Sae)
    name = sweeps.title("visuals", cfg, source.parent.name if is_sae else source.stem)
    (outcome,) = launch.run("saev.visuals.collect:main", [cfg], cfg.slurm, name)
    return console.say(f"{outcome.get()}/index.html")
