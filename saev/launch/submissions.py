"""Which jobs run which stages: small files in --log-to, so that the same command finds its running jobs."""

import contextlib
import dataclasses
import pathlib
import typing as tp

import msgspec

from saev import errors, helpers
from saev.formats import jsonfile
from saev.launch.config import SlurmConfig
from saev.launch.stage import Stage


class Submission(msgspec.Struct, frozen=True):
    """One sbatch: the job id of each stage, by the stage's key."""

    jobs: dict[str, str]


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
    helpers.write_text(log_to / f"{first}_submission.json", jsonfile.dumps(Submission(jobs)))


def job_ids(log_to: pathlib.Path) -> dict[str, str]:
    """Stage's key -> id of its newest job. Damaged files are ignored: their jobs are submitted again."""
    out: dict[str, str] = {}
    for fpath in sorted(log_to.glob("*_submission.json"), key=lambda p: p.stat().st_mtime_ns):
        with contextlib.suppress(errors.UserError):
            out |= jsonfile.read(fpath, Submission, "Delete it.").jobs
    return out
