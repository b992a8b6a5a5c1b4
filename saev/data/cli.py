"""The command `python -m saev.data`."""

import pathlib

from saev import console, launch, sweeps
from saev.data import config


def main() -> None:
    """Dumps activations and prints the shard directory."""
    (cfg,) = sweeps.parse(config.Dump, "Dumps the activations of a pretrained ViT to shards.")
    if cfg.dry_run:
        return console.show([cfg], range(cfg.n_jobs) if cfg.slurm.is_on else ())
    from saev.formats import shards  # imports numpy, which --help does not need

    jobs = [config.DumpJob(cfg, i) for i in range(cfg.n_jobs)]
    name = sweeps.title("data", cfg, pathlib.Path(cfg.vit.vit_ckpt).name)
    outcomes = launch.run("saev.data.dump:job", jobs, cfg.slurm, name, n_processes=len(jobs))
    outcomes = list(outcomes)
    launch.check(outcomes)
    dpath = outcomes[0].get()
    shards.ShardDir.open_unchecked(dpath).finish()
    shards.ShardDir.open(dpath)  # raises an error if a shard is missing
    return console.say(dpath)
