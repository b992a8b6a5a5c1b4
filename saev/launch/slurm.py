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

import msgspec

from saev import console, errors, provenance
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
        with leaving(batch.jobs, slurm.log_to):
            batch.submit()

    def submit_rest() -> None:
        with submissions.locked(batch.log_to):
            batch.submit()

    return iter(_wait(batch.jobs, slurm, submit_rest))


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
    with submitting(slurm), leaving(jobs, slurm.log_to):
        for step, needed in steps.items():
            after = tuple(ids[other] for other in needed if ids[other]) + slurm.after
            own = dataclasses.replace(slurm, after=after)
            batch = Batch([Stage(f"{module}:{step}", arg, label=step)], own, f"{name}-{step}")
            jobs += batch.jobs
            batch.submit()
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
                f"Slurm accepts no more of your jobs now: {len(left)} of {len(jobs)} were not submitted. Run "
                "the same command again later, or without --no-slurm-wait."
            )
        raise SystemExit(0)
    with leaving(jobs, slurm.log_to):
        return watch.wait(jobs, pathlib.Path(slurm.log_to).resolve(), submit)


@contextlib.contextmanager
def leaving(jobs: list[Job], log_to: str) -> collections.abc.Generator[None]:
    """Inside, a command that Ctrl-C or SIGTERM ends says which of its jobs go on.

    jobs: may grow inside.

    Raises:
        SystemExit: instead of KeyboardInterrupt, if any job goes on.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as err:
        found = [job for job in jobs if job.id]
        ids = [job.id for job in found if submissions.result(job, pathlib.Path(log_to).resolve()) is None]
        if not ids:
            raise
        where = f"--log-to {shlex.quote(log_to)}"
        console.tell(
            f"\nstopped waiting. These jobs keep running: {shown(ids)}. Cancel them with: {cancel(ids)}. The "
            f"same command waits for them again, as does: python -m saev.jobs attach {where}"
        )
        raise SystemExit(130 if isinstance(err, KeyboardInterrupt) else err.code) from None


@contextlib.contextmanager
def submitting(slurm: SlurmConfig) -> collections.abc.Generator[None]:
    """Holds the lock of --log-to, once it and --after are checked.

    Raises:
        UserError: --log-to is not a folder that jobs can use, or a job of --after is unknown or failed.
    """
    if not slurm.log_to or set(":%") & set(str(pathlib.Path(slurm.log_to).resolve())):
        # PYTHONPATH divides its folders by colons; sbatch replaces %j and the like
        raise errors.UserError(f"--log-to {slurm.log_to!r}: must be a folder without : and % in its path.")
    with submissions.locked(pathlib.Path(slurm.log_to).resolve()):
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
        self.is_lasting = is_lasting
        self.log_to = pathlib.Path(slurm.log_to).resolve()
        self.log_to.mkdir(parents=True, exist_ok=True)
        submissions.recover(self.log_to)
        self.submission = submissions.Submission.new(name)
        self.stages: dict[str, Stage] = {}
        """Stages of new jobs, by key."""
        self.jobs: list[Job] = []
        """In the order of the stages. Earlier jobs that do parts of a stage precede the new one."""
        parts = [submissions.parts(stage, is_lasting) for stage in stages]
        todo = {part: member for own in parts for part, member in own.items()}
        taken, labels = self._find(todo), submissions.labels([stage.arg for stage in stages])
        for i, (stage, own) in enumerate(zip(stages, parts, strict=True)):
            label = labels[i] if len(stages) > 1 else stage.label
            self._take({taken[part].id: taken[part] for part in own if part in taken}, [*own], label)
            if left := [part for part in own if part not in taken]:
                if len(left) < len(own):
                    stage = dataclasses.replace(stage, arg=[todo[part] for part in left])
                    *_, label = submissions.labels([*(s.arg for s in stages), stage.arg])
                key = submissions.key(stage)
                self.stages[key] = dataclasses.replace(stage, label=label)
                self.jobs.append(Job("", key, label, stage.n_tasks, left))

    def _take(self, olds: dict[str, Job], parts: list[str], label: str) -> None:
        """Adds earlier jobs that do some of these parts, unless another stage has added them."""
        mine = {job.id for job in self.jobs}
        for old in olds.values():
            if old.parts == parts:
                self.jobs.append(Job(old.id, old.key, label, old.n_tasks, parts))
            elif old.id not in mine:
                self.jobs.append(old)

    def _find(self, todo: dict[str, object]) -> dict[str, Job]:
        """Finds earlier jobs that are queued or, if that is enough, have a current outcome: part -> job.

        A job that also does other work is left alone.

        Args:
            todo: part -> its config.
        """
        newest = submissions.newest(submissions.read_all(self.log_to))
        found = {newest[part][0].id: newest[part] for part in todo if part in newest}
        if self.slurm.retry_failed and not found:
            raise errors.UserError(
                f"--retry-failed: {self.slurm.log_to} has no earlier submission of these configs. Pass its "
                "--log-to, or leave the flag out."
            )
        if (rows := queue.squeue(found) if found else {}) is None:
            raise errors.UserError(
                "squeue does not answer, so it is unknown which jobs of earlier commands still run. Run the "
                "same command again later."
            )
        taken: dict[str, Job] = {}
        queued, done, older, hopeless, larger = [], [], [], [], []
        for old, submission in found.values():
            row = queue.row_of(old.id, rows)
            is_whole = all(part in todo and newest[part][0] is old for part in old.parts)
            outcome = submissions.result(old, self.log_to)
            is_mine = row.is_of(submission.user, submission.name)
            if outcome is None and not row.is_over and is_mine:
                if is_whole and row.state == "PENDING" and row.reason in queue.HOPELESS:
                    hopeless.append(old.id)
                    continue
                (queued if is_whole else larger).append(old.id)
                older += [] if submission.code.digest == provenance.code().digest else [old.id]
            elif is_whole and self._is_enough(old, submission, outcome, [todo[part] for part in old.parts]):
                done.append(old.id)
            else:
                continue
            taken |= dict.fromkeys(old.parts, old) if is_whole else {}
        self._tell_found(queued, done, older, larger)
        if hopeless:
            queue.scancel(hopeless)
            logger.info("cancelled earlier jobs that would never start: %s", shown(hopeless))
        return taken

    def _is_enough(
        self, old: Job, submission: submissions.Submission, outcome: Outcome | None, arg: list[object]
    ) -> bool:
        """Whether an earlier outcome is taken for the work's."""
        # what was made before the jobs of --after have ended may not be what is wanted
        is_lasting = (self.is_lasting and not self.slurm.after) or self.slurm.retry_failed
        is_same = self.slurm.retry_failed or submission.code.digest == provenance.code().digest
        if not (is_lasting and is_same) or outcome is None:
            return False
        written_s = submissions.result_fpath(old.id, self.log_to).stat().st_mtime
        return submissions.is_current(outcome, written_s, arg)

    def _tell_found(self, queued: list[str], done: list[str], older: list[str], larger: list[str]) -> None:
        if queued or done:
            n_queued, n_done, ids = len(queued), len(done), shown([*queued, *done])
            logger.info("of earlier commands: %d job(s) in the queue, %d done: %s", n_queued, n_done, ids)
        if larger:
            logger.warning(
                "Jobs of earlier commands do part of this, along with other work: %s. New jobs wait for them "
                "where both train the same run. To wait for the earlier jobs instead, press Ctrl-C and run: "
                "python -m saev.jobs attach --log-to %s",
                shown(larger),
                shlex.quote(self.slurm.log_to),
            )
        if older:
            logger.warning(
                "The code has changed since these jobs were submitted, and they run the earlier code: %s. "
                "For the new code, cancel them (%s) and run the same command again.",
                shown(older),
                cancel(older),
            )

    def submit(self) -> None:
        """Submits jobs that are not submitted yet, as many as Slurm takes.

        Raises:
            UserError: it refuses them for another reason. Those of this call are cancelled.
        """
        from saev.launch import executor as executors  # imports submitit

        # equal stages are one job
        todo = [*{job.key: (job, self.stages[job.key]) for job in self.jobs if not job.id}.values()]
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
                    executor.parameters["dependency"] = self._dependency(len(part)) or None
                    # submitit also prints sbatch's message
                    with interrupted_later(), contextlib.redirect_stderr(io.StringIO()):
                        planned = self._planned([job for job, _ in part])
                        new = executor.submit_all(stages, minutes, self.slurm.max_parallel, planned)
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
            raise errors.UserError(f"sbatch refused the job: {queue.why_refused(str(err))}") from err
        if ids:
            logger.info("submitted %d job(s): %s; logs in %s", len(ids), shown(ids), self.slurm.log_to)

    def _dependency(self, n_new: int) -> str:
        """After which jobs an array starts: those of --after, and the batch's other ones (its earlier arrays,
        and jobs of earlier commands) if all together were more than --max-parallel, which Slurm applies to
        each array."""
        after = [f"afterok:{':'.join(self.slurm.after)}"] if self.slurm.after else []
        ids = {job.id for job in self.jobs if job.id and submissions.result(job, self.log_to) is None}
        rows = queue.squeue(ids) if ids else {}
        left = sorted(i for i in ids if rows is None or not queue.row_of(i, rows).is_over)
        if left and len(left) + n_new > self.slurm.max_parallel:
            after.append(f"afterany:{':'.join(dict.fromkeys(i.partition('_')[0] for i in left))}")
        return ",".join(after)

    def _planned(self, new: list[Job]) -> submissions.Submission:
        """What is noted once Slurm has taken these jobs, too."""
        return msgspec.structs.replace(self.submission, jobs=[*self.submission.jobs, *new])

    def _note(self, ids: dict[str, str]) -> None:
        """Takes the ids of new jobs, which are noted. ids: by key."""
        for job in self.jobs:
            job.id = ids.get(job.key, job.id)
        self.submission.jobs += {job.key: job for job in self.jobs if job.key in ids}.values()


@contextlib.contextmanager
def interrupted_later() -> collections.abc.Generator[None]:
    """Ctrl-C, SIGTERM and SIGHUP arrive when this ends, so that no job is submitted whose id is not noted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = {
        signum: signal.signal(signum, lambda signum, _: asked.append(signum))
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if asked:
            signal.raise_signal(asked[0])


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
    """Job ids, those of an array as one: 24_[0-3,7]."""
    tasks: dict[str, list[int]] = {}
    for job_id in dict.fromkeys(ids):
        array, _, task = job_id.partition("_")
        tasks.setdefault(array, []).extend([int(task)] if task else [])
    return ", ".join(array + _task_list(sorted(own)) for array, own in tasks.items())


def _task_list(tasks: list[int]) -> str:
    if len(tasks) < 2:
        return "".join(f"_{task}" for task in tasks)
    firsts = [task for task in tasks if task - 1 not in tasks]
    lasts = [task for task in tasks if task + 1 not in tasks]
    runs = (str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))
    return f"_[{','.join(runs)}]"
