"""The command `python -m saev.compare`."""

import pathlib

from saev import console, launch, sweeps
from saev.compare import config


def main() -> None:
    """Compares, and prints the summary and its results directory.

    Raises:
        UserError: flags that do not go together, or the stage failed.
    """
    (cfg,) = sweeps.parse(config.Compare, "Matches the latents of dictionaries on the same images.")
    if cfg.dry_run:
        return console.show([cfg], [cfg] if cfg.slurm.is_on else ())
    cfg.check()
    what = "runs" if cfg.runs else pathlib.Path(cfg.scorer).parent.name
    (outcome,) = launch.run("saev.compare.run:main", [cfg], cfg.slurm, sweeps.title("compare", cfg, what))
    dpath = outcome.get()
    return console.say(f"{(pathlib.Path(dpath) / 'summary.md').read_text('utf-8')}\n{dpath}")
