"""The command `python -m saev.codes`."""

import pathlib

from saev import console, launch, sweeps
from saev.codes import config


def main() -> None:
    """Writes codes and prints their folder."""
    (cfg,) = sweeps.parse(config.Codes, "Writes a scorer's codes of every patch and image to files.")
    if cfg.dry_run:
        return console.show([cfg], [cfg] if cfg.slurm.is_on else ())
    fpath = pathlib.Path(cfg.scorer)
    name = sweeps.title("codes", cfg, fpath.parent.name if fpath.name == "sae.pt" else fpath.stem)
    (outcome,) = launch.run("saev.codes.encode:main", [cfg], cfg.slurm, name)
    return console.say(outcome.get())
