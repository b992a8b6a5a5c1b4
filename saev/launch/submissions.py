"""Submissions: small files in --log-to that say which jobs do what.

With them the same command finds its jobs after Ctrl-C or a kill, and `python -m saev.jobs` lists them.
"""

import collections.abc
import contextlib
import dataclasses
import getpass
import os
import pathlib
import pickle
import sys
import time
import typing as tp

import msgspec

from saev import errors, fields, helpers, provenance
from saev.formats import jsonfile
from saev.launch import queue
from saev.launch.config import SlurmConfig
from saev.launch.stage import Outcome, Stage

SUFFIX = "_submission.json"
PLANS = ".submission_file_*.json"
"""Plans, each beside the batch script of the same name."""
FORGOTTEN_S = 3600.0
"""Seconds after which a plan is deleted if Slurm knows no such jobs."""


class Job(msgspec.Struct):
    """A submitted stage."""

    id: str
    """Job id: 24, or 24_3 in an array."""
    key: str
    """Hash of what it does."""
    label: str
    """What distinguishes it from the command's other jobs: lr = 0.003."""
    n_tasks: int = 1
    """Processes that work on it together."""
    parts: list[str] = []
    """Hashes of what it does, one for each config, if a later job may do some of it."""

    def __post_init__(self) -> None:
        self.parts = self.parts or [self.key]

    @property
    def title(self) -> str:
        return f"job {self.id} ({self.label})" if self.label else f"job {self.id}"


class Submission(msgspec.Struct):
    """What one command submitted, and from which code."""

    name: str
    """The jobs' name in Slurm."""
    jobs: list[Job]
    args: list[str]
    """The command as it was typed: its program, then its flags."""
    folder: str
    """Where it was run."""
    user: str
    code: provenance.Code

    @classmethod
    def new(cls, name: str) -> "Submission":
        """A submission of this process, still without jobs."""
        return cls(name, [], sys.argv, str(pathlib.Path.cwd()), user(), provenance.code())

    @property
    def id(self) -> str:
        """The first job's id, without the array task."""
        return self.jobs[0].id.partition("_")[0]

    def write(self, log_to: pathlib.Path) -> None:
        """Writes or replaces its file, which the first job's id names."""
        helpers.write_text(log_to / f"{self.id}{SUFFIX}", jsonfile.dumps(self, indent=4))


def user() -> str:
    """This user's name. Empty if it has none, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def read_all(log_to: pathlib.Path) -> list[Submission]:
    """The submissions of a folder, oldest first. Damaged files are ignored."""
    out = []
    for fpath in sorted(log_to.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime_ns):
        with contextlib.suppress(errors.UserError):
            submission = jsonfile.read(fpath, Submission, "Delete it.")
            out += [submission] if submission.jobs else []
    return out


def newest(found: list[Submission]) -> dict[str, tuple[Job, Submission]]:
    """The last job that was submitted for each part of the work."""
    return {part: (job, s) for s in found for job in s.jobs for part in job.parts}


# ---- between sbatch and the note of the jobs' ids ----


class Plan(msgspec.Struct):
    """What a command is about to submit. If it is killed meanwhile, the batch script's name leads to the
    jobs."""

    submission: Submission
    """With the new jobs, which have no ids yet."""
    pickles: list[str]
    """Files with the new jobs' stages."""


def locked(log_to: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """While a command looks for its jobs and submits others: another one with this --log-to waits."""
    return helpers.locked(log_to / ".submitting.lock", f"it submits jobs with --log-to {log_to}")


def finish(fpath: pathlib.Path, array_id: str) -> list[str]:
    """Names a plan's files by the ids of its jobs, which Slurm has taken, and notes the submission.

    It may be called again after a kill. Returns the ids.
    """
    plan, log_to = jsonfile.read(fpath, Plan, "Delete it."), fpath.parent
    new = [job for job in plan.submission.jobs if not job.id]
    if all((log_to / name).exists() for name in plan.pickles):
        for stale in log_to.glob(f"{array_id}_*_result.pkl"):
            stale.unlink()  # of another job with this id: another cluster's, or before Slurm counted anew
    for i, (job, name) in enumerate(zip(new, plan.pickles, strict=True)):
        job.id = f"{array_id}_{i}" if len(new) > 1 else array_id
        with contextlib.suppress(FileNotFoundError):  # it was renamed before
            (log_to / name).rename(stage_fpath(job.id, log_to))
    plan.submission.write(log_to)
    fpath.unlink(missing_ok=True)
    return [job.id for job in new]


def stage_fpath(job_id: str, log_to: pathlib.Path) -> pathlib.Path:
    """Where submitit looks for a job's pickled stage."""
    return log_to / f"{job_id}_submitted.pkl"


def recover(log_to: pathlib.Path) -> None:
    """Finishes the plans of commands that were killed after Slurm took their jobs. Call it `locked`."""
    if not (plans := [*log_to.glob(PLANS)]) or (scripts := queue.scripts(user())) is None:
        return
    for fpath in plans:
        if array_id := scripts.get(str(fpath.with_suffix(".sh"))):
            finish(fpath, array_id)
        elif time.time() - fpath.stat().st_mtime > FORGOTTEN_S:
            for name in (*jsonfile.read(fpath, Plan, "Delete it.").pickles, fpath.with_suffix(".sh").name):
                (log_to / name).unlink(missing_ok=True)
            fpath.unlink()


# ---- results ----


def result(job: Job, log_to: pathlib.Path) -> Outcome | None:
    """The outcome of a job's first task, or of the first that failed. None if one has written none yet."""
    found = [_of_task(job, task, log_to) for task in range(job.n_tasks)]
    failed = next((outcome for outcome in found if outcome and outcome.error), None)
    return failed or (None if None in found else found[0])


def result_fpath(job_id: str, log_to: pathlib.Path, task: int = 0) -> pathlib.Path:
    """Where submitit writes the outcome of a task."""
    return log_to / f"{job_id}_{task}_result.pkl"


def _of_task(job: Job, task: int, log_to: pathlib.Path) -> Outcome | None:
    import submitit.core.utils

    fpath = result_fpath(job.id, log_to, task)
    try:
        kind, value = submitit.core.utils.pickle_load(fpath)
    except FileNotFoundError:
        return None
    except (EOFError, pickle.UnpicklingError):
        return Outcome(None, f"{job.title}: {fpath} is cut off. Run the same command again.", job.title)
    if kind == "success":
        return dataclasses.replace(value.of(job.title), job=job.title)
    why = exception_line(value).removeprefix("saev.errors.UserError: ").rstrip(".")
    return Outcome(None, f"{job.title} failed: {why}. Its log: {log(job, log_to)}", job.title)


def log(job: Job, log_to: pathlib.Path) -> pathlib.Path:
    """The log of a job's first task."""
    return log_to / f"{job.id}_0_log.out"


def exception_line(message: str) -> str:
    """Finds the exception's type and first line, which follow the last frame of a traceback."""
    _, _, after = message.rpartition('\n  File "')
    lines = [line for line in after.splitlines()[1:] if line and line[0] not in " -"]
    return next(iter(lines), "it raised an exception")


def is_current(outcome: Outcome, written_s: float, arg: object) -> bool:
    """Whether a stage need not run again: it succeeded, what it made is there, and what it read is older.

    written_s: when the outcome was written. arg: the stage's.
    """
    if outcome.error:
        return False
    made = outcome.value if isinstance(outcome.value, list) else [outcome.value]
    there = all(pathlib.Path(path).exists() for path in made if isinstance(path, str))
    read = [pathlib.Path(path) for path in _inputs(arg)]
    # not st_mtime, which a folder that is moved to another name keeps
    return there and all(path.stat().st_ctime < written_s for path in read if path.exists())


def _inputs(value: tp.Any) -> collections.abc.Iterator[str]:
    """Paths in configs, except those of folders to write to (--ckpt-to)."""
    if isinstance(value, list | tuple):
        for v in value:
            yield from _inputs(v)
    elif dataclasses.is_dataclass(value) and not isinstance(value, SlurmConfig):
        paths = [name for name in fields.path_fields(type(value)) if not name.endswith("_to")]
        for field in dataclasses.fields(value):
            v = getattr(value, field.name)
            if field.name in paths:
                yield from filter(None, v if isinstance(v, tuple) else (v,))
            elif dataclasses.is_dataclass(v):
                yield from _inputs(v)


# ---- what a stage does ----


def key(stage: Stage) -> str:
    """A hash of what a stage does, without where it runs."""
    return helpers.hash_of([stage.target, stage.n_tasks, _plain(stage.arg)])


def parts(stage: Stage, is_lasting: bool) -> dict[str, object]:
    """What later jobs may do one by one, by hash: the members of a lasting stage's list, else all of it."""
    if not (is_lasting and isinstance(stage.arg, list)):
        return {key(stage): stage.arg}
    return {key(dataclasses.replace(stage, arg=[member])): member for member in stage.arg}


def _plain(value: tp.Any) -> tp.Any:
    """Paths are real ones: the same words in another folder, or a link elsewhere, mean something else."""
    if isinstance(value, SlurmConfig):
        return None
    if dataclasses.is_dataclass(value):
        paths = fields.path_fields(type(value))
        values = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return [type(value).__name__, {k: _real(v) if k in paths else _plain(v) for k, v in values.items()}]
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _real(value: tp.Any) -> tp.Any:
    if isinstance(value, list | tuple):
        return [_real(v) for v in value]
    return os.path.realpath(value) if value else value


def labels(args: collections.abc.Sequence[object]) -> list[str]:
    """What distinguishes each argument (a config, or a list of configs) from the others: lr = 0.003."""
    groups = [list(arg) if isinstance(arg, list | tuple) else [arg] for arg in args]
    flat = [[_flat(cfg) for cfg in group] for group in groups]
    every = [values for group in flat for values in group]
    names = dict.fromkeys(name for values in every for name in values)
    vary = [name for name in names if len({repr(values.get(name)) for values in every}) > 1]
    out = []
    for group in flat:
        texts = [", ".join(f"{name} = {v[name]}" for name in vary if name in v) for v in group]
        between = f" ... {texts[-1]}" if len(texts) > 1 else ""
        out.append(f"{texts[0]}{between}" if texts else "")
    return out


def _flat(cfg: tp.Any, prefix: str = "") -> dict[str, object]:
    """A config's values by dotted name; unions also by their class."""
    if not dataclasses.is_dataclass(cfg):
        return {"argument": cfg}
    out: dict[str, object] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, SlurmConfig):
            continue
        if dataclasses.is_dataclass(value):
            out[f"{prefix}{field.name}"] = type(value).__name__
            out |= _flat(value, f"{prefix}{field.name}.")
        else:
            out[f"{prefix}{field.name}"] = value
    return out
