"""Train sparse autoencoders on activation shards. See README.md."""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

from saev import console, errors, launch, sweeps
from saev.training import config


def main() -> None:
    cfgs = sweeps.parse(config.Train, "Trains sparse autoencoders on activation shards.")
    if cfgs[0].dry_run:
        return console.show(cfgs)
    groups = sweeps.group(cfgs)
    results = launch.run(
        "saev.training.loop:outcome",
        groups,
        cfgs[0].slurm,
        "saev-train",
        n_tasks=cfgs[0].data_parallel,
        keeps_going=True,
    )
    fpaths, wrong = [], []
    for result in results:
        if isinstance(result, errors.UserError):
            wrong.append(str(result))
        else:
            fpaths += result[0]
            wrong += result[1]
    for fpath in dict.fromkeys(fpaths):
        print(fpath)
    if wrong:
        raise errors.UserError(" ".join(dict.fromkeys(wrong)))


if __name__ == "__main__":
    launch.entry(main)
