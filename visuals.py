"""Show the images that fire each latent most. See README.md."""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

from saev import console, launch, sweeps
from saev.visuals import config


def main() -> None:
    (cfg,) = sweeps.parse(config.Visuals, "Shows the images that fire each latent most.")
    if cfg.dry_run:
        return console.show([cfg])
    for dpath in launch.run("saev.visuals.collect:main", [cfg], cfg.slurm, "saev-visuals"):
        print(f"{dpath}/index.html")


if __name__ == "__main__":
    launch.entry(main)
