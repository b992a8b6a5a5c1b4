"""The command `python -m saev.labels`."""

import pathlib

from saev import console, launch, sweeps
from saev.labels import config


def main() -> None:
    """Labels the patches of a dump and prints the path of labels.bin."""
    (cfg,) = sweeps.parse(config.Labels, "Labels the patches of a dump by segmentation masks.")
    if cfg.dry_run:
        return console.show([cfg], [cfg] if cfg.slurm.is_on else ())
    name = sweeps.title("labels", cfg, pathlib.Path(cfg.shard_root).name[:8])
    (outcome,) = launch.run("saev.labels.run:main", [cfg], cfg.slurm, name)
    return console.say(str(outcome.get()))
