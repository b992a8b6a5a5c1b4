"""Train sparse autoencoders on activation shards. See README.md."""

from saev import launch, sweeps
from saev.training import config


def main() -> None:
    cfgs = sweeps.parse(config.Train, "Trains sparse autoencoders on activation shards.")
    if cfgs[0].dry_run:
        return launch.show(cfgs)
    groups = config.group(cfgs)
    for fpaths in launch.run("saev.training.loop:main", groups, cfgs[0].slurm, "saev-train"):
        for fpath in fpaths:
            print(fpath)


if __name__ == "__main__":
    launch.entry(main)
