"""Runs stages as Slurm jobs: submits them, watches the queue, and reads their outcomes."""

import collections.abc
import contextlib
import dataclasses
import io
import logging
import pathlib
import shlex
import shutil
import signal
import threading

from saev import console, errors, helpers, provenance
from saev.launch import queue, submissions, watch
from saev.launch.config import SlurmConfig
from saev.launch.stage import Outcome, Stage
from saev.launch.submissions import Job

logger = logging.getLogger("saev")

TOO_MANY = "SubmitJob"
"""In sbatch's answer if the user or the account may not submit that many more jobs (AssocMaxSubmitJobLimit,
AssocGrpSubmitJobsLimit, QOSMaxSubmitJobPerUserLimit, ...)."""


def run(
    stages: list[Stage], slurm: SlurmConfig, name: str, is_lasting: bool = False
) -> collections.abc.Iterator[Outcome]:
    """Submits the stages, waits for all, and returns their outcomes in order.

    A stage that an earlier command has submitted to the same --log-to, and whose job is still in the queue,
    is not submitted again.

    Args:
        is_lasting: an outcome stays right until the inputs or the code change. Such stages are not submitted
            again either.

    Raises:
        UserError: no Slurm on this machine, or it refuses the jobs.
        SystemExit: Ctrl-C, or --no-slurm-wait. The jobs keep running.
    """
    with submitting(slurm):
        batch = Batch(stages, slurm, name, is_lasting)
        batch.submit()
    return iter(_wait(batch.jobs, slurm, batch.submit))


def pipeline(
    module: str,
    steps: collections.abc.Mapping[str, collections.abc.Sequence[str]],
    arg: object,
    slurm: SlurmConfig,
    name: str,
) -> list[Outcome]:
    """Submits functions of a module, each of which waits for those that it needs, and waits for all.

    Args:
        steps: function -> functions whose jobs must end without an error before its own starts, in an order
            in which they could run.
        arg: of each function.

    Raises:
        UserError, SystemExit: as `run`.
    """
    ids: dict[str, str] = {}
    jobs: list[Job] = []
    with submitting(slurm):
        for step, needed in steps.items():
            after = tuple(ids[other] for other in needed if ids[other]) + slurm.after
            own = dataclasses.replace(slurm, after=after)
            batch = Batch([Stage(f"{module}:{step}", arg, label=step)], own, f"{name}-{step}")
            batch.submit()
            jobs += batch.jobs
            ids[step] = batch.jobs[0].id
    return _wait(jobs, slurm)


def _wait(
    jobs: list[Job], slurm: SlurmConfig, submit: collections.abc.Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Waits for the jobs, unless --no-slurm-wait. submit: submits those that are not yet."""
    ids = [job.id for job in jobs if job.id]
    if not slurm.slurm_wait:
        console.tell(
            "The jobs run without this command. Follow them with: python -m saev.jobs attach --log-to "
            f"{shlex.quote(slurm.log_to)}; cancel them with: {cancel(ids)}; collect their results with the "
            "same command without --no-slurm-wait."
        )
        if left := [job for job in jobs if not job.id]:
            raise errors.UserError(
                f"Slurm takes no more jobs of yours now: {len(left)} of {len(jobs)} were not submitted. Run "
                "the same command again later, or without --no-slurm-wait."
            )
        raise SystemExit(0)
    try:
        return watch.wait(jobs, pathlib.Path(slurm.log_to).resolve(), submit)
    except KeyboardInterrupt:
        ids = [job.id for job in jobs if job.id]
        console.tell(
            f"\nstopped waiting. These jobs keep running: {shown(ids)}. Cancel them with: {cancel(ids)}. The "
            "same command waits for them again."
        )
        raise SystemExit(130) from None


@contextlib.contextmanager
def submitting(slurm: SlurmConfig) -> collections.abc.Generator[None]:
    """While a command looks for its jobs and submits others: another one with this --log-to waits.

    Raises:
        UserError: --log-to is no folder that jobs can use, or a job of --after is unknown or failed.
    """
    if not slurm.log_to or set(":%") & set(str(pathlib.Path(slurm.log_to).resolve())):
        # PYTHONPATH divides its folders by colons; sbatch replaces %j and the like
        raise errors.UserError(f"--log-to {slurm.log_to!r}: must be a folder without : and % in its path.")
    log_to = pathlib.Path(slurm.log_to)
    with helpers.locked(log_to / ".submitting.lock", f"it submits jobs with --log-to {log_to}"):
        if slurm.after and (why := queue.why_not_after(slurm.after)):
            raise errors.UserError(f"--after {why}. Pass jobs that are in the queue or completed.")
        yield


def cancel(ids: list[str]) -> str:
    """The command that cancels jobs."""
    return f"scancel {' '.join(dict.fromkeys(job_id.partition('_')[0] for job_id in ids))}"


class Batch:
    """A command's stages and their jobs, of which some may be an earlier command's or not submitted yet."""

    def __init__(self, stages: list[Stage], slurm: SlurmConfig, name: str, is_lasting: bool = False):
        """Finds the jobs of earlier commands."""
        if shutil.which("sbatch") is None:
            acct, partition = slurm.slurm_acct, slurm.slurm_partition
            flag = f"--slurm-acct {acct}" if acct else f"--slurm-partition {partition}" if partition else ""
            flag = flag or "--on-slurm"
            raise errors.UserError(
                f"{flag}: no sbatch on this machine. Run on the cluster's login node, or leave the flag out."
            )
        self.slurm = slurm
        self.name = name
        self.log_to = pathlib.Path(slurm.log_to).resolve()
        self.log_to.mkdir(parents=True, exist_ok=True)
        self.submission = submissions.Submission.new(name)
        found = submissions.labels([stage.arg for stage in stages]) if len(stages) > 1 else [stages[0].label]
        self.stages = [dataclasses.replace(s, label=text) for s, text in zip(stages, found, strict=True)]
        self.jobs = [Job("", submissions.key(s), s.label, s.n_tasks) for s in self.stages]
        # what was made before the jobs of --after have ended may not be what is wanted
        self._find((is_lasting and not slurm.after) or slurm.retry_failed)

    def _find(self, is_lasting: bool) -> None:
        """Takes over jobs of earlier commands that are queued or, if `is_lasting`, have a current outcome."""
        earlier: dict[str, tuple[Job, submissions.Submission]] = {}
        for submission in submissions.read_all(self.log_to):
            earlier |= {job.key: (job, submission) for job in submission.jobs}
        mine = [(job, *earlier[job.key]) for job in self.jobs if job.key in earlier]
        if self.slurm.retry_failed and not mine:
            raise errors.UserError(
                f"--retry-failed: {self.slurm.log_to} has no earlier submission of these configs. Pass its "
                "--log-to and --max-per-job, or leave the flag out."
            )
        rows = (queue.squeue(job.id for _, job, _ in mine) or {}) if mine else {}
        n_queued = n_done = 0
        hopeless, older = [], []
        for (job, old, submission), stage in zip(mine, self._stages_of(mine), strict=True):
            row = rows.get(old.id, queue.Queued(""))
            outcome = submissions.result(old, self.log_to)
            is_same = submission.code.digest == provenance.code().digest
            if outcome is None and not row.is_over and row.user in ("", submission.user):
                if row.state == "PENDING" and row.reason in queue.HOPELESS:
                    hopeless.append(old.id)
                    continue
                job.id, n_queued = old.id, n_queued + 1
                older += [] if is_same else [old.id]
                continue
            is_same = is_same or self.slurm.retry_failed
            if is_lasting and is_same and self._is_current(old, outcome, stage):
                job.id, n_done = old.id, n_done + 1
        if n_queued or n_done:
            ids = shown([job.id for job in self.jobs if job.id])
            logger.info("of earlier commands: %d job(s) in the queue, %d done: %s", n_queued, n_done, ids)
        if older:
            logger.warning(
                "The code has changed since these jobs were submitted, and they run the earlier code: %s. "
                "For the new code, cancel them (%s) and run the same command again.",
                shown(older),
                cancel(older),
            )
        if hopeless:
            queue.scancel(hopeless)
            logger.info("cancelled earlier jobs that would never start: %s", shown(hopeless))

    def _stages_of(self, mine: list[tuple[Job, Job, submissions.Submission]]) -> list[Stage]:
        by_key = {job.key: stage for job, stage in zip(self.jobs, self.stages, strict=True)}
        return [by_key[job.key] for job, _, _ in mine]

    def _is_current(self, old: Job, outcome: Outcome | None, stage: Stage) -> bool:
        if outcome is None:
            return False
        written_s = submissions.result_fpath(old.id, self.log_to).stat().st_mtime
        return submissions.is_current(outcome, written_s, stage)

    def submit(self) -> None:
        """Submits jobs that are not submitted yet, as many as Slurm takes.

        Raises:
            UserError: it refuses them for another reason. Those of this call are cancelled.
        """
        from saev.launch import executor as executors  # imports submitit

        todo = [(job, stage) for job, stage in zip(self.jobs, self.stages, strict=True) if not job.id]
        todo = [*{job.key: (job, stage) for job, stage in todo}.values()]  # equal stages are one job
        if not todo:
            return
        executor = executors.Executor(folder=str(self.log_to), max_num_timeout=executors.MAX_TIMEOUTS)
        minutes = max(1, round(self.slurm.n_hours * 60))
        code = provenance.copy(self.log_to / "code")
        executor.update_parameters(**parameters(self.slurm, self.name, todo[0][1].n_tasks, minutes, code))
        most, ids = queue.max_array_size(), []
        try:
            while todo and most:
                part = todo[:most]
                try:
                    stages = [stage for _, stage in part]
                    # submitit also prints sbatch's message
                    with interrupted_later(), contextlib.redirect_stderr(io.StringIO()):
                        new = executor.submit_all(stages, minutes, self.slurm.max_parallel)
                        self._note(dict(zip([job.key for job, _ in part], new, strict=True)))
                except executors.submitit.core.utils.FailedJobError as err:
                    if TOO_MANY not in str(err):
                        raise
                    most = len(part) // 2
                    continue
                todo, ids = todo[most:], [*ids, *new]
        except executors.submitit.core.utils.FailedJobError as err:
            if ids:
                queue.scancel(ids)
            lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(err).splitlines()]
            lines = [line.strip(" .") for line in lines if line.strip() and not line.startswith("Try ")]
            raise errors.UserError(
                f"sbatch refused the job: {'; '.join(lines[-2:])}. Check the flags that say where it runs "
                "(account, partition, qos, constraint, exclude, extra) and what it needs (--n-gpus, 0 if the "
                "cluster has none; --n-cpus, --mem-gb, --n-hours)."
            ) from err
        if ids:
            logger.info("submitted %d job(s): %s; logs in %s", len(ids), shown(ids), self.slurm.log_to)

    def _note(self, ids: dict[str, str]) -> None:
        """Notes the job ids of new stages. ids: by key."""
        for job in self.jobs:
            job.id = ids.get(job.key, job.id)
        new = {job.key: job for job in self.jobs if job.key in ids}
        self.submission.jobs += new.values()
        self.submission.write(self.log_to)


@contextlib.contextmanager
def interrupted_later() -> collections.abc.Generator[None]:
    """Ctrl-C is raised when this ends, so that no job is submitted whose id is not noted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, _: asked.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def parameters(
    slurm: SlurmConfig, name: str, n_tasks: int, minutes: int, code: pathlib.Path
) -> dict[str, object]:
    """What submitit passes to sbatch. Each task gets a GPU, if the job has any.

    code: where saev is copied.
    """
    per_node = -(-n_tasks // slurm.n_nodes)
    n_gpus = max(slurm.n_gpus, per_node) if slurm.n_gpus else 0
    gpu_type = f"{slurm.slurm_gpu_type}:" if slurm.slurm_gpu_type else ""
    path = f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    gone = shlex.quote(f"error: the code of this job, {code}, is gone. Run the same command again.")
    there = f"[ -d {shlex.quote(f'{code}/saev')} ] || {{ echo {gone}; exit 1; }}"
    optional = {
        "account": slurm.slurm_acct,
        "partition": slurm.slurm_partition,
        "mem": f"{slurm.mem_gb}GB" if slurm.mem_gb else "",
        "gpus_per_node": f"{gpu_type}{n_gpus}" if n_gpus else "",
        "qos": slurm.slurm_qos,
        "constraint": slurm.slurm_constraint,
        "exclude": slurm.slurm_exclude,
        "dependency": f"afterok:{':'.join(slurm.after)}" if slurm.after else "",
        "additional_parameters": slurm.extra,
    }
    return {
        "job_name": name,
        "time": minutes,
        "nodes": slurm.n_nodes,
        "cpus_per_task": slurm.n_cpus,
        "ntasks_per_node": per_node,
        "signal_delay_s": min(90, 15 * minutes),
        "stderr_to_stdout": True,
        "setup": [*slurm.slurm_setup, there, path],
        **{k: v for k, v in optional.items() if v},
    }


def shown(ids: list[str]) -> str:
    """Job ids, those of an array as one: 24_[0-199]."""
    tasks: dict[str, list[int]] = {}
    for job_id in ids:
        array, _, task = job_id.partition("_")
        tasks.setdefault(array, []).extend([int(task)] if task else [])
    return ", ".join(
        array if not own else f"{array}_[{min(own)}-{max(own)}]" if len(own) > 1 else f"{array}_{own[0]}"
        for array, own in tasks.items()
    )
