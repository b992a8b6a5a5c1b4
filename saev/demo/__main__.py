"""The whole experiment in a few minutes: `python -m saev.demo`."""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import time

from saev import console, launch, sweeps
from saev.demo import config
from saev.protoeval import cli as protoeval_cli

STEPS = {
    **{"dump": (), "label": ("dump",), "train": ("dump",), "fit": ("dump",), "show": ("train",)},
    "evaluate": ("label", "train", "fit", "show"),
}
"""Step -> the steps whose results it needs."""
MADE = ("images", "shards", "patch_labels", "checkpoint", "gallery", "results")


def run(cfg: config.Demo) -> dict[str, str]:
    """Runs all steps, in this process or as Slurm jobs, and returns the paths of the outputs by name."""
    from saev.demo import steps

    if cfg.slurm.is_on:
        launch.check(launch.pipeline("saev.demo.steps", STEPS, cfg, cfg.slurm, "saev-demo"))
    else:
        for step in (steps.dump, steps.label, steps.train, steps.show, steps.evaluate):
            step(cfg)
    return {name: steps.made(cfg, name) for name in MADE}


def main() -> None:
    (cfg,) = sweeps.parse(config.Demo, "Runs the whole experiment on a small data set.")
    if cfg.dry_run:
        return console.show([cfg], STEPS if cfg.slurm.is_on else ())
    start_s = time.monotonic()
    made = run(cfg)
    protoeval_cli.show(made["results"])
    for name, path in made.items():
        console.say(f"{name:>12}: {path}")
    console.say(f"\nDone in {time.monotonic() - start_s:.0f} s. Open {made['gallery']} in a browser.")
    return None


if __name__ == "__main__":
    launch.entry(main)
