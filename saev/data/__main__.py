"""Dump ViT activations: `python -m saev.data`. See README.md."""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

from saev import console, launch, sweeps
from saev.data import config


def main() -> None:
    (cfg,) = sweeps.parse(config.Dump, "Dumps the activations of a pretrained ViT to shards.")
    if cfg.dry_run:
        return console.show([cfg])
    jobs = [config.DumpJob(cfg, i) for i in range(cfg.n_jobs)]
    dpath, *_ = launch.run(
        "saev.data.dump:job", jobs, cfg.slurm, "saev-dump", n_processes=len(jobs)
    )
    from saev.formats import shards  # numpy: not to be waited for by --help

    shards.ShardDir.look(dpath).finish()
    shards.ShardDir.open(dpath)  # complete, or an error that says what is missing
    print(dpath)


if __name__ == "__main__":
    launch.entry(main)
