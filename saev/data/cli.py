"""The command `python -m saev.data`."""

from saev import console, launch, sweeps
from saev.data import config


def main() -> None:
    """Dumps activations and prints the shard directory."""
    (cfg,) = sweeps.parse(config.Dump, "Dumps the activations of a pretrained ViT to shards.")
    if cfg.dry_run:
        return console.show([cfg])
    jobs = [config.DumpJob(cfg, i) for i in range(cfg.n_jobs)]
    outcomes = launch.run("saev.data.dump:job", jobs, cfg.slurm, "saev-dump", n_processes=len(jobs))
    dpath, *_ = [outcome.get() for outcome in outcomes]
    from saev.formats import shards  # imports numpy, which --help does not need

    shards.ShardDir.open_unchecked(dpath).finish()
    shards.ShardDir.open(dpath)  # raises an error if a shard is missing
    return console.say(dpath)
