"""The command protoeval.py."""

import pathlib

from saev import console, errors, launch, sweeps
from saev.protoeval import config


def main() -> None:
    """Evaluates, merges or checks. Prints tables and their results directories."""
    cfgs = sweeps.parse(
        config.ProtoEval,
        "Measures how well prototypes detect traits of images, such as the attributes of CUB-200-2011.",
    )
    cfg = cfgs[0]
    if cfg.dry_run:
        return console.show(cfgs, sweeps.group(cfgs) if cfg.slurm.is_on else ())
    if cfg.report:
        from saev.protoeval import merge  # draws charts, which --help need not wait for
        from saev.report import figures

        if cfg.plot:
            figures.check(cfg.plot, "--plot")
        return show(str(merge.write(pathlib.Path(cfg.report), cfg.plot)))
    if cfg.plot:
        raise errors.UserError(f"--plot {cfg.plot}: only with --report. A result's chart is its chart.png.")
    if cfg.check:
        from saev.protoeval import labels

        return labels.describe(cfgs, console.say)
    name = sweeps.title("protoeval", cfg, cfg.scorer)
    outcomes = []
    for outcome in launch.run("saev.protoeval.run:each", sweeps.group(cfgs), cfg.slurm, name):
        outcomes.append(outcome)
        for dpath in outcome.value or ():
            show(dpath)
    return launch.check(outcomes)


def show(dpath: str) -> None:
    """Prints the tables of a results directory, and its path."""
    fpaths = (pathlib.Path(dpath) / name for name in ("table.md", "patches.md", "audit.md"))
    texts = [fpath.read_text("utf-8") for fpath in fpaths if fpath.exists()]
    console.say("\n".join([*texts, dpath]))
