"""Evaluate prototypes against CUB-200-2011's attributes. See README.md."""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import pathlib

from saev import console, launch, sweeps
from saev.protoeval import config


def main() -> None:
    cfgs = sweeps.parse(
        config.ProtoEval, "Scores prototypes against the attributes of CUB-200-2011."
    )
    if cfgs[0].dry_run:
        return console.show(cfgs)
    if cfgs[0].report:
        from saev.protoeval import joint  # draws charts, which --help need not wait for

        dpath = joint.write(pathlib.Path(cfgs[0].report))
        return console.say(f"{(dpath / 'table.md').read_text('utf-8')}\n{dpath}")
    if cfgs[0].check:
        from saev.protoeval import select

        return select.look(cfgs, console.say)
    groups = sweeps.group(cfgs)
    for dpath in launch.run("saev.protoeval.select:main", groups, cfgs[0].slurm, "saev-protoeval"):
        console.say(f"{(pathlib.Path(dpath) / 'table.md').read_text('utf-8')}\n{dpath}")


if __name__ == "__main__":
    launch.entry(main)
