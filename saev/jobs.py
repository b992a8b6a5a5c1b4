"""The command `python -m saev.jobs`: lists, follows, cancels, collects and retries submissions."""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import collections.abc
import dataclasses
import os
import pathlib
import shlex
import sys
import time
import typing as tp

import beartype
import tyro

from saev import commands, console, errors, fields, sweeps
from saev.launch import check, of_user, queue, slurm, submissions, watch
from saev.launch.stage import Outcome
from saev.launch.submissions import Job, Submission

MOST_ERRORS = 10
"""Most failed jobs of a submission that `list` shows."""
Action = tp.Literal["list", "attach", "collect", "cancel", "retry"]


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Jobs:
    """Shows and steers the Slurm jobs that saev's commands have submitted."""

    action: tyro.conf.Positional[Action] = "list"
    """list: show submissions and their states. attach: wait for their jobs. collect: print the results that
    are there. cancel: cancel their jobs. retry: submit again what failed."""
    ids: tyro.conf.Positional[tuple[str, ...]] = ()
    """Submissions, by the ids that `list` shows. Default: all of --log-to."""
    log_to: fields.Path = dataclasses.field(default_factory=lambda: of_user().log_to)
    """The --log-to of the commands."""

    def __post_init__(self) -> None:
        fields.settle(self)


def main() -> None:
    (cfg,) = sweeps.parse(Jobs, "Shows and steers the Slurm jobs that saev's commands have submitted.")
    log_to = pathlib.Path(cfg.log_to).resolve()
    if any(log_to.glob(submissions.PLANS)):
        with submissions.locked(log_to):
            submissions.recover(log_to)
    found = submissions.read_all(log_to)
    chosen, newest = choose(cfg, found), submissions.newest(found)
    own = [job for submission in chosen for job in submission.jobs]
    if cfg.action == "list":
        return console.say("\n".join(line for s in chosen for line in describe(s, newest, log_to)))
    if cfg.action == "retry":
        return retry(chosen)
    if cfg.action == "cancel":
        outcomes, _ = watch.look(own, log_to)
        return cancel([job for job in own if job.id not in outcomes])
    # what was submitted again later counts
    jobs = [*{job.id: job for old in own for part in old.parts for job, _ in [newest[part]]}.values()]
    if cfg.action == "attach":
        with slurm.leaving(jobs, cfg.log_to):
            outcomes = watch.wait(jobs, log_to)
        return deliver(outcomes)
    outcomes, rows = watch.look(jobs, log_to)
    if len(outcomes) > 1:
        for error in filter(None, (outcome.error for outcome in outcomes.values())):
            console.tell(error)
    deliver(outcomes.values())
    if left := [job for job in jobs if job.id not in outcomes]:
        states = watch.count(left, {}, rows)
        raise errors.UserError(
            f"not finished: {'; '.join(f'{n} {state}' for state, n in states.items())}. Wait for them with: "
            f"python -m saev.jobs attach --log-to {shlex.quote(cfg.log_to)}"
        )
    return None


def choose(cfg: Jobs, found: list[Submission]) -> list[Submission]:
    """The submissions with the chosen ids."""
    if not found:
        raise errors.UserError(f"--log-to {cfg.log_to}: no submissions here. Pass the --log-to of a command.")
    wanted = {job_id.partition("_")[0] for job_id in cfg.ids}
    own = [({job.id.partition("_")[0] for job in s.jobs}, s) for s in found]
    if unknown := wanted - set().union(*(ids for ids, _ in own)):
        known = ", ".join(s.id for s in found)
        raise errors.UserError(f"{sorted(unknown)[0]}: no such submission in {cfg.log_to}. It has: {known}.")
    return [s for ids, s in own if ids & wanted or not wanted]


def describe(
    submission: Submission, newest: dict[str, tuple[Job, Submission]], log_to: pathlib.Path
) -> list[str]:
    """Lines about a submission: its jobs' states, its command, and what failed."""
    outcomes, rows = watch.look(submission.jobs, log_to)
    later = {job.id: {newest[part][0].id for part in job.parts} - {job.id} for job in submission.jobs}
    again = [job for job in submission.jobs if later[job.id] and getattr(outcomes.get(job.id), "error", "")]
    states = watch.count([job for job in submission.jobs if job not in again], outcomes, rows)
    if again:
        ids = sorted({job_id for job in again for job_id in later[job.id]})
        states[f"submitted again as {slurm.shown(ids)}"] = len(again)
    fpath = log_to / f"{submission.id}{submissions.SUFFIX}"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(fpath.stat().st_mtime))
    text = "; ".join(f"{n} {state}" for state, n in states.items())
    mended = {job.id for job in again}
    wrong = [o.error for job_id, o in outcomes.items() if o.error and job_id not in mended]
    more = [f"{len(wrong) - MOST_ERRORS} more failed"] if len(wrong) > MOST_ERRORS else []
    program, *args = submission.args
    program = program if program.startswith("saev ") else shlex.quote(program)
    return [
        f"{submission.id}  {when}  {submission.name}: {text}",
        f"    in {submission.folder}: {program} {shlex.join(args)}",
        *(f"    {line}" for line in [*wrong[:MOST_ERRORS], *more]),
    ]


def deliver(outcomes: collections.abc.Iterable[Outcome]) -> None:
    """Prints what stages returned, which are paths, and raises their errors."""
    outcomes = list(outcomes)
    for outcome in outcomes:
        for path in outcome.value if isinstance(outcome.value, list) else [outcome.value]:
            if path is not None:
                console.say(str(path))
    check(outcomes)


def cancel(jobs: list[Job]) -> None:
    """Cancels jobs that have not ended."""
    ids = [job.id for job in jobs]
    if ids:
        queue.scancel(ids)
    console.say(f"cancelled {slurm.shown(ids)}" if ids else "no job is left to cancel")


def retry(chosen: list[Submission]) -> tp.NoReturn:
    """Runs a submission's command again, which submits what failed.

    Raises:
        UserError: several submissions were chosen, or its folder or command is unknown.
    """
    commands_of = {(submission.folder, *submission.args): submission for submission in chosen}
    if len(commands_of) != 1:  # (the demo's steps are submissions of one command)
        raise errors.UserError(f"retry: name one of the submissions {', '.join(s.id for s in chosen)}.")
    (submission,) = commands_of.values()
    command = submission.name.split("-")[1] if "-" in submission.name else ""
    if command not in commands.COMMANDS or not pathlib.Path(submission.folder).is_dir():
        raise errors.UserError(
            f"{submission.id}: its command or folder ({submission.folder}) is unknown here. Run the command "
            "yourself, with --retry-failed."
        )
    args = [*submission.args[1:], *([] if "--retry-failed" in submission.args else ["--retry-failed"])]
    console.tell(f"in {submission.folder}: saev {shlex.join([command, *args])}")
    os.chdir(submission.folder)
    os.execv(sys.executable, [sys.executable, "-m", "saev", command, *args])


if __name__ == "__main__":
    commands.run("jobs")
