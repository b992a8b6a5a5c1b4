"""Which jobs run which stages: small files in --log-to, so that the same command finds its running jobs."""

import contextlib
import dataclasses
import pathlib
import subprocess
import sys
import typing as tp

import msgspec

from saev import errors, helpers
from saev.formats import jsonfile
from saev.launch.config import SlurmConfig
from saev.launch.stage import Stage


class Submission(msgspec.Struct, frozen=True):
    """What one command submitted, and from which code."""

    jobs: dict[str, str]
    """Stage's key -> job id."""
    command: list[str]
    """As it was typed."""
    folder: str
    """Where it was run."""
    commit: str
    """Git commit of the code. Empty: the code is not in a Git repository."""
    is_changed: bool
    """Whether tracked files differed from the commit."""


def key(stage: Stage) -> str:
    """A hash of what a stage does, without where it runs."""
    return helpers.hash_of([stage.target, stage.n_tasks, _plain(stage.arg)])


def _plain(value: tp.Any) -> tp.Any:
    if isinstance(value, SlurmConfig):
        return None
    if dataclasses.is_dataclass(value):
        values = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [type(value).__name__, values]
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def write(log_to: pathlib.Path, jobs: dict[str, str]) -> None:
    """Notes the job ids of new stages."""
    first = next(iter(jobs.values()))
    submission = Submission(
        jobs=jobs,
        command=sys.argv,
        folder=str(pathlib.Path.cwd()),
        commit=_git("rev-parse", "HEAD"),
        is_changed=bool(_git("status", "--porcelain", "--untracked-files=no")),
    )
    helpers.write_text(log_to / f"{first}_submission.json", jsonfile.dumps(submission, indent=4))


def _git(*args: str) -> str:
    """What Git prints about saev's code; "" without Git or a repository."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def job_ids(log_to: pathlib.Path) -> dict[str, str]:
    """Stage's key -> id of its newest job. Damaged files are ignored: their jobs are submitted again."""
    out: dict[str, str] = {}
    for fpath in sorted(log_to.glob("*_submission.json"), key=lambda p: p.stat().st_mtime_ns):
        with contextlib.suppress(errors.UserError):
            out |= jsonfile.read(fpath, Submission, "Delete it.").jobs
    return out
