"""Dump ViT activations: `python -m saev.data`. See README.md."""

from saev import launch, sweeps
from saev.data import config


def main() -> None:
    (cfg,) = sweeps.parse(config.Dump, "Dumps the activations of a pretrained ViT to shards.")
    if cfg.dry_run:
        return launch.show([cfg])
    for dpath in launch.run("saev.data.dump:main", [cfg], cfg.slurm, "saev-dump"):
        print(dpath)


if __name__ == "__main__":
    launch.entry(main)
