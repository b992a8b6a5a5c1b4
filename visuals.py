"""Show the images that fire each latent most. See README.md."""

from saev import launch, sweeps
from saev.visuals import config


def main() -> None:
    (cfg,) = sweeps.parse(config.Visuals, "Shows the images that fire each latent most.")
    if cfg.dry_run:
        return launch.show([cfg])
    for dpath in launch.run("saev.visuals.collect:main", [cfg], cfg.slurm, "saev-visuals"):
        print(f"{dpath}/index.html")


if __name__ == "__main__":
    launch.entry(main)
