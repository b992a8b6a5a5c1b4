"""Train sparse autoencoders on activation shards. See README.md."""

from saev import launch, sweeps
from saev.training import config


def main() -> None:
    cfgs = sweeps.parse(config.Train, "Trains sparse autoencoders on activation shards.")
    if cfgs[0].dry_run:
        return launch.show(cfgs)
    groups = config.group(cfgs)
    results = launch.run(
        "saev.training.loop:main",
        groups,
        cfgs[0].slurm,
        "saev-train",
        n_tasks=cfgs[0].data_parallel,
    )
    for fpath in dict.fromkeys(fpath for fpaths in results for fpath in fpaths):
        print(fpath)


if __name__ == "__main__":
    launch.entry(main)
