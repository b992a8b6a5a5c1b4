"""The command protoeval.py."""

import pathlib

from saev import console, launch, sweeps
from saev.protoeval import config


def main() -> None:
    """Evaluates, merges or checks. Prints tables and their results directories."""
    cfgs = sweeps.parse(
        config.ProtoEval,
        "Scores prototypes against traits of images, such as the attributes of CUB-200-2011.",
    )
    cfg = cfgs[0]
    if cfg.dry_run:
        return console.show(cfgs, sweeps.group(cfgs) if cfg.slurm.is_on else ())
    if cfg.report:
        from saev.protoeval import merge  # draws charts, which --help need not wait for

        return _show(str(merge.write(pathlib.Path(cfg.report))))
    if cfg.check:
        from saev.protoeval import labels

        return labels.describe(cfgs, console.say)
    name = sweeps.title("protoeval", cfg, cfg.scorer)
    outcomes = []
    for outcome in launch.run("saev.protoeval.run:each", sweeps.group(cfgs), cfg.slurm, name):
        outcomes.append(outcome)
        for dpath in outcome.value or ():
            _show(dpath)
    return launch.check(outcomes)


def _show(dpath: str) -> None:
    console.say(f"{(pathlib.Path(dpath) / 'table.md').read_text('utf-8')}\n{dpath}")
