"""Run a stage in this process, in several, or as a Slurm job array.

A stage is named by a string ("saev.data.dump:main") and imported only where it runs, so that `--help`,
`--dry-run` and submission do not import torch.
"""

import collections.abc
import os

from saev import errors
from saev.launch import local
from saev.launch import slurm as slurm_jobs
from saev.launch.config import SlurmConfig, of_user
from saev.launch.entry import entry
from saev.launch.slurm import pipeline
from saev.launch.stage import Outcome, Stage

__all__ = ["Outcome", "SlurmConfig", "Stage", "check", "entry", "of_user", "pipeline", "run"]

MOST_SHOWN = 3
"""Most errors that end a command in full."""
MOST_NAMED = 20
"""Most failed jobs that end a command by name."""


def run(
    target: str,
    args: collections.abc.Sequence[object],
    slurm: SlurmConfig,
    name: str,
    n_processes: int = 1,
    n_tasks: int = 1,
    is_lasting: bool = False,
) -> collections.abc.Iterator[Outcome]:
    """Calls `target` ("module:function") on each argument and yields the outcomes in order.

    With a Slurm account or partition the calls are a job array, and this process waits for it. Otherwise they
    run in this process, each when its outcome is asked for.

    Args:
        n_processes: without Slurm, if above 1: all calls run at once, each in its own process. The first that
            fails ends the others.
        n_tasks: processes that work on each argument together, on one node. The outcome is the first one's.
            Under torchrun, this process is one of them.
        is_lasting: with Slurm: an outcome stays right until the inputs or the code change. The same command
            then does not submit it again.

    Raises:
        UserError: no Slurm on this machine, or it refuses the jobs.
    """
    if slurm.is_on:
        return slurm_jobs.run([Stage(target, arg, n_tasks) for arg in args], slurm, name, is_lasting)
    if n_processes > 1:
        return iter(local.in_processes([Stage(target, arg) for arg in args]))
    if n_tasks > 1 and "WORLD_SIZE" not in os.environ:
        return (local.share(target, arg, n_tasks) for arg in args)
    return (Stage(target, arg).outcome() for arg in args)


def check(outcomes: collections.abc.Iterable[Outcome]) -> None:
    """Ends a command whose stages have run.

    Raises:
        UserError: some failed, in all or in part.
    """
    outcomes = list(outcomes)
    wrong = {outcome.error: outcome.job for outcome in outcomes if outcome.error}
    if wrong and len(outcomes) > 1 and all(wrong.values()):  # their errors were shown when they came
        names = [*wrong.values()]
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        raise errors.UserError(
            f"{len(wrong)} of {len(outcomes)} jobs failed, as shown above: {', '.join(names[:MOST_NAMED])}"
            f"{more}. To submit only what failed again, add --retry-failed to the command."
        )
    if wrong:
        more = f" {len(wrong) - MOST_SHOWN} more failed; see above." if len(wrong) > MOST_SHOWN else ""
        raise errors.UserError(" ".join([*wrong][:MOST_SHOWN]) + more)
