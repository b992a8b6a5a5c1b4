"""The command `python -m saev.data`."""

from saev import console, launch, sweeps
from saev.data import config


def main() -> None:
    """Dumps; prints the shard directory."""
    (cfg,) = sweeps.parse(config.Dump, "Dumps the activations of a pretrained ViT to shards.")
    if cfg.dry_run:
        return console.show([cfg])
    jobs = [config.DumpJob(cfg, i) for i in range(cfg.n_jobs)]
    outcomes = launch.run("saev.data.dump:job", jobs, cfg.slurm, "saev-dump", n_processes=len(jobs))
    dpath, *_ = [outcome.get() for outcome in outcomes]
    from saev.formats import shards  # numpy: not to be waited for by --help

    shards.ShardDir.open_unchecked(dpath).finish()
    shards.ShardDir.open(dpath)  # complete, or an error that says what is missing
    return console.say(dpath)
