"""The command train.py."""

from saev import console, launch, sweeps
from saev.training import config


def main() -> None:
    """Trains and prints the checkpoints' paths. If one group of runs fails, the others are still trained."""
    cfgs = sweeps.parse(config.Train, "Trains sparse autoencoders on activation shards.")
    cfg = cfgs[0]
    if cfg.dry_run:
        return console.show(cfgs, sweeps.group(cfgs, cfg.slurm.max_per_job) if cfg.slurm.is_on else ())
    most = cfg.slurm.max_per_job if cfg.slurm.is_on else len(cfgs)
    groups, name = sweeps.group(cfgs, most), sweeps.title("train", cfg, cfg.sae)
    n_tasks = cfg.data_parallel
    outcomes = list(
        launch.run("saev.training.loop:main", groups, cfg.slurm, name, n_tasks=n_tasks, is_lasting=True)
    )
    for fpath in dict.fromkeys(fpath for outcome in outcomes for fpath in outcome.value or ()):
        console.say(fpath)
    return launch.check(outcomes)
