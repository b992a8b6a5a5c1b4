"""Waits for jobs, and shows their states: live on a terminal, as plain lines in a log."""

import collections
import collections.abc
import logging
import pathlib
import shutil
import time

from saev import console
from saev.launch import queue, submissions
from saev.launch.queue import Queued
from saev.launch.stage import Outcome
from saev.launch.submissions import Job

logger = logging.getLogger("saev")

MAX_DELAY_S = 10.0
"""Most seconds between looks at the queue."""
GRACE_S = 10.0
"""Seconds that a job may be out of the queue without a result: it may be requeued, or files may come late."""
VAIN_S = 3.0
"""Seconds that a job may be pending for a reason that never passes."""
AGAIN_S = 15.0
"""Seconds between attempts to submit the rest, if Slurm took only some jobs and none of them ends."""
PROGRESS_S = 30.0
"""Seconds between looks at the progress in the logs of running jobs, which write it as often."""
LOGGED_S = 300.0
"""Seconds between lines of progress in a log."""
FULL = 2**20
"""Free bytes below which a disk is called full."""
PROGRESS = r": (\d+)/(\d+) [^\n]*?, [\d.]+/s, (\d+) s left"
"""A line of `helpers.progress`."""


def wait(
    jobs: list[Job], log_to: pathlib.Path, submit: collections.abc.Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Waits until each job has a result or is out of the queue without one. Shows what changes.

    Args:
        jobs: those without an id are not submitted yet.
        submit: submits them, as far as Slurm takes them.
    """
    outcomes: dict[str, Outcome] = {}
    gone_s: dict[str, float] = {}
    vain_s: dict[tuple[str, str], float] = {}
    delay_s, answers, tried_s = 0.5, True, time.monotonic()
    states, n_seen = States(log_to), 0
    while True:
        left = {job.id: job for job in jobs if job.id and job.id not in outcomes}
        rows = queue.squeue(left) if left else {}
        if (rows is not None) != answers:
            answers = rows is not None
            states.live.clear()
            logger.warning("squeue %s", "answers again" if answers else "does not answer; still waiting")
        for job in left.values():
            row = None if rows is None else queue.row_of(job.id, rows)
            if outcome := submissions.result(job, log_to):
                outcomes[job.id] = outcome
            elif row and row.state == "PENDING" and row.reason in queue.HOPELESS:
                # Slurm may have a more exact reason soon
                if time.monotonic() - vain_s.setdefault((job.id, row.reason), time.monotonic()) < VAIN_S:
                    continue
                queue.scancel([job.id])
                why = f"{queue.HOPELESS[row.reason]} ({row.reason})"
                outcomes[job.id] = Outcome(None, f"{job.title} was cancelled, because {why}.", job.title)
            elif row is None or not row.is_over:
                gone_s.pop(job.id, None)
            elif time.monotonic() - gone_s.setdefault(job.id, time.monotonic()) >= GRACE_S:
                outcomes[job.id] = _lost(job, row.state, log_to)
            is_shown = len(jobs) > 1  # the error of a single job ends the command
            if is_shown and (outcome := outcomes.get(job.id)) and outcome.error:
                states.live.clear()
                logger.warning("%s", outcome.error)
        if states.show(jobs, outcomes, rows or {}):
            delay_s = 0.5
        if all(job.id in outcomes for job in jobs):
            states.live.clear()
            return [outcomes[job.id] for job in jobs]
        is_time = len(outcomes) > n_seen or time.monotonic() - tried_s > AGAIN_S
        if is_time and not all(job.id for job in jobs):
            states.live.clear()
            submit()
            n_seen, tried_s = len(outcomes), time.monotonic()
        time.sleep(delay_s)
        delay_s = min(MAX_DELAY_S, 1.1 * delay_s)


def look(jobs: list[Job], log_to: pathlib.Path) -> tuple[dict[str, Outcome], dict[str, Queued]]:
    """The outcomes of the jobs that are over, by id, and what the queue says of the others."""
    outcomes = {job.id: outcome for job in jobs if (outcome := submissions.result(job, log_to))}
    left = {job.id: job for job in jobs if job.id not in outcomes}
    rows = queue.squeue(left) if left else {}
    if rows is None:
        return outcomes, {}
    for job in left.values():
        row = queue.row_of(job.id, rows)
        if row.is_over:
            outcomes[job.id] = _lost(job, row.state, log_to)
    return outcomes, rows


def _lost(job: Job, state: str, log_to: pathlib.Path) -> Outcome:
    """The outcome of a job that ended without a result."""
    full = f" The disk of {log_to} is full." if shutil.disk_usage(log_to).free < FULL else ""
    log = submissions.log(job, log_to)
    why = queue.why_lost(job.id, state, log)
    return Outcome(None, f"{job.title} {why}.{full} Its log: {log}", job.title)


class States:
    """Shows how many jobs are in each state, with Slurm's reasons and the progress of those that run."""

    def __init__(self, log_to: pathlib.Path):
        self.log_to = log_to
        self.live = console.Live()
        self.shown: dict[str, int] = {}
        self.progress, self.looked_s, self.logged_s = "", -PROGRESS_S, time.monotonic()

    def show(self, jobs: list[Job], outcomes: dict[str, Outcome], rows: dict[str, Queued]) -> bool:
        """Shows the jobs' states. Returns whether they changed."""
        counts = count(jobs, outcomes, rows)
        is_new = counts != self.shown
        now_s = time.monotonic()
        if is_new or now_s - self.looked_s >= PROGRESS_S:
            running = [job for job in jobs if job.id not in outcomes and _state(job, rows) == "RUNNING"]
            self.progress, self.looked_s = self._progress(running), now_s
        lines = [f"{n} {state}{self.progress if state == 'running' else ''}" for state, n in counts.items()]
        if self.live.is_on:
            self.live.show(lines)
        elif is_new or now_s - self.logged_s >= LOGGED_S:
            logger.info("%d job(s): %s", sum(counts.values()), "; ".join(lines))
            self.logged_s = now_s
        self.shown = counts
        return is_new

    def _progress(self, running: list[Job]) -> str:
        found = [queue.last_line(submissions.log(job, self.log_to), PROGRESS) for job in running]
        known = [tuple(map(int, match.groups())) for match in found if match]
        if not known:
            return ""
        shares = [100 * done // max(1, total) for done, total, _ in known]
        low, high = min(shares), max(shares)
        done = f"{low}%" if low == high else f"{low} to {high}%"
        minutes = round(max(left for _, _, left in known) / 60)
        return f", {done} done, {minutes or 'less than 1'} min left"


def _state(job: Job, rows: dict[str, Queued]) -> str:
    return queue.row_of(job.id, rows).state


def count(jobs: list[Job], outcomes: dict[str, Outcome], rows: dict[str, Queued]) -> dict[str, int]:
    """The number of jobs in each state."""
    counts: collections.Counter[str] = collections.Counter()
    for job in {(job.id, *job.parts): job for job in jobs}.values():
        if outcome := outcomes.get(job.id):
            counts["failed" if outcome.error else "done"] += 1
            continue
        row = queue.row_of(job.id, rows)
        if not job.id:
            counts["not submitted yet (Slurm accepts no more)"] += 1
        elif row.is_over:
            counts["waiting for the result"] += 1
        elif row.state == "PENDING":
            reason = f" ({row.reason})" if row.reason not in ("", "None") else ""
            counts[f"{'requeued' if row.n_restarts else 'pending'}{reason}"] += 1
        else:
            counts[row.state.lower()] += 1
    return dict(sorted(counts.items()))
