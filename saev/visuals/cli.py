"""The command visuals.py."""

import pathlib

from saev import console, errors, launch, sweeps
from saev.visuals import config


def main() -> None:
    """Makes a gallery and prints the path of its page, or draws a figure and prints its path."""
    (cfg,) = sweeps.parse(config.Visuals, "Makes a gallery: what each latent, prototype or unit fires on.")
    if cfg.out != config.Visuals.out and not cfg.figure:
        raise errors.UserError(f"--out {cfg.out}: only with --figure, which names the latents to draw.")
    if cfg.dry_run:
        return console.show([cfg], [cfg] if cfg.slurm.is_on else ())
    if not cfg.figure:
        return console.say(f"{_gallery(cfg)}/index.html")
    from saev.report import figures  # after --help, which need not wait for them
    from saev.visuals import figure, write

    figures.check(cfg.out, "--out")
    if not write.is_gallery(pathlib.Path(cfg.dump_to)):
        if not cfg.data.shard_root:
            raise errors.UserError(
                f"--dump-to {cfg.dump_to}: no gallery. Pass the folder of one, or the flags that make it "
                "(--data.shard-root, --ckpt, ...)."
            )
        _gallery(cfg)
    figure.write(cfg)
    return console.say(cfg.out)


def _gallery(cfg: config.Visuals) -> str:
    source = pathlib.Path(cfg.source or "units")
    is_sae = isinstance(cfg.shown, config.Sae) and source.suffix != ".bin"
    name = sweeps.title("visuals", cfg, source.parent.name if is_sae else source.stem)
    (outcome,) = launch.run("saev.visuals.collect:main", [cfg], cfg.slurm, name)
    return outcome.get()
