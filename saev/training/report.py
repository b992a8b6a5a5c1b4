"""`python -m saev.training.report RUNS`: training runs as a table, and a plot of normalised MSE against L0.

RUNS are run directories (checkpoints/<run id>) or folders of them.
"""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import dataclasses
import pathlib
import typing as tp

import beartype
import tyro

from saev import cli, console, errors, fields, launch


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Report:
    """Prints training runs as a table and plots normalised MSE against L0."""

    runs: tp.Annotated[
        tuple[fields.Path, ...],
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint=""),
        tyro.conf.Positional,
    ]
    """Run directories (checkpoints/RUN) or folders of them."""
    csv: fields.Path = ""
    """Also write the table to this CSV file."""
    plot: fields.Path = "front.png"
    """File for the plot (.pdf, .svg or .png). Empty: no plot."""

    def __post_init__(self) -> None:
        fields.settle(self)


def main() -> None:
    cfg = cli.parse(Report, description=tp.cast(str, Report.__doc__))
    if not cfg.runs:
        raise errors.UserError("name at least one run directory, or a folder of them.")
    from saev.report import charts, figures, frame, tables  # after --help, which need not wait for them
    from saev.training import runs

    if cfg.plot:
        figures.check(cfg.plot, "--plot")
    found = runs.read(cfg.runs)
    table = runs.table(found)
    console.say(tables.markdown(table, padded=True).removesuffix("\n"))
    if cfg.csv:
        frame.write_csv(pathlib.Path(cfg.csv), table)
    measured = found.filter(runs.IS_MEASURED)
    if cfg.plot and len(measured):
        figures.save(charts.front(measured, runs.caption(measured)), pathlib.Path(cfg.plot))
        console.say(f"\n{cfg.plot}: * marks the runs on the front")


if __name__ == "__main__":
    launch.entry(main)
