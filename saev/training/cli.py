"""The command train.py."""

from saev import console, errors, launch, sweeps
from saev.training import config


def main() -> None:
    """Trains and prints the checkpoints' paths. If one group of runs fails, the others are still trained."""
    cfgs = sweeps.parse(config.Train, "Trains sparse autoencoders on activation shards.")
    cfg = cfgs[0]
    if cfg.dry_run:
        return console.show(cfgs)
    outcomes = list(
        launch.run(
            "saev.training.loop:main", sweeps.group(cfgs), cfg.slurm, "saev-train", n_tasks=cfg.data_parallel
        )
    )
    for fpath in dict.fromkeys(fpath for outcome in outcomes for fpath in outcome.value or ()):
        console.say(fpath)
    if wrong := dict.fromkeys(outcome.error for outcome in outcomes if outcome.error):
        raise errors.UserError(" ".join(wrong))
    return None
