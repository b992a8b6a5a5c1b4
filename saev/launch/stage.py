"""A stage with its argument, and its outcome."""

import dataclasses
import importlib
import logging
import os
import signal
import sys
import typing as tp

import beartype

from saev import console, early, errors, provenance
from saev.launch.entry import configure_logging

logger = logging.getLogger("saev")

MAX_VAIN = 3
"""Most restarts of a job that did not even begin its stage."""
_begun: list[str] = []
"""Stages that this process has begun."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage returned, or its error; both if only part of its work failed."""

    value: tp.Any = None
    error: str = ""
    """Message for the user. Empty: success."""
    job: str = dataclasses.field(default="", compare=False)
    """Name of the Slurm job whose outcome this is."""

    @property
    def failed(self) -> bool:
        """Whether there is no result at all."""
        return bool(self.error) and self.value is None

    def get(self) -> tp.Any:
        """Returns the value.

        Raises:
            UserError: all or part of the stage failed.
        """
        if self.error:
            raise errors.UserError(self.error, done=self.value)
        return self.value

    def of(self, job: str) -> "Outcome":
        """The same outcome, whose error names the job."""
        return dataclasses.replace(self, error=f"{job}: {self.error}") if self.failed else self


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage with its argument. submitit and multiprocessing pickle it."""

    target: str
    """module:function"""
    arg: tp.Any
    n_tasks: int = 1
    """Processes that work on it together. They find each other through torchrun's variables."""
    rank: int = 0
    """This process's number, unless Slurm sets it."""
    port: int = 0
    """Port on which they connect. 0: Slurm sets it."""
    label: str = ""
    """What distinguishes it from the command's other stages, for its log."""
    command: list[str] = dataclasses.field(default_factory=lambda: [*sys.argv])
    """The command that runs it."""

    def __call__(self) -> Outcome:
        """As `outcome`, for a separate process: also writes the error to its log."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})  # a job blocks it until here
        configure_logging()
        provenance.command[:] = self.command
        code = provenance.code()
        changes = " with changes" if code.is_changed else ""
        logger.info("job %s: %s", provenance.job_id() or "here", self.label or self.target)
        logger.info("code: %s%s, in %s", code.commit[:12] or "no Git commit", changes, provenance.PACKAGE)
        outcome = self.outcome()
        if outcome.error:
            console.tell(f"error: {outcome.error}")
        return outcome

    def outcome(self) -> Outcome:
        """Runs the stage. A UserError, or an OSError that the user can fix, becomes the outcome's error."""
        try:
            with errors.of_files():
                return Outcome(self.run())
        except errors.UserError as err:
            return Outcome(err.done, str(err))

    def run(self) -> tp.Any:
        """Runs the stage and returns its value."""
        early.limit_spinning()
        if self.port:
            os.environ |= {
                "WORLD_SIZE": str(self.n_tasks),
                "RANK": str(self.rank),
                "LOCAL_RANK": str(self.rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.port),
            }
        elif self.n_tasks > 1:
            import submitit.helpers

            world = submitit.helpers.TorchDistributedEnvironment()
            world.export(set_cuda_visible_devices=False, overwrite=True)
        module_name, _, function_name = self.target.partition(":")
        with early.importing():
            module = importlib.import_module(module_name)
        from saev.formats import staging  # imports numpy

        _begun.append(self.target)
        with staging.to(_stage_to(self.arg)):
            return getattr(module, function_name)(self.arg)

    def checkpoint(self) -> tp.Any:
        """What submitit resubmits after a time-out or preemption. Stages continue where they stopped.

        Raises:
            UserError: the stage has not begun, again and again, so that it would never be done.
        """
        import submitit.helpers

        if not _begun and int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= MAX_VAIN:
            raise errors.UserError("the time limit is shorter than the job's start-up. Raise --n-hours")

        # submitit now calls scontrol, which inherits this: Slurm ends all processes of a requeued job, and a
        # scontrol that does not return would count as a failure. (submitit itself passes over SIGTERM.)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return submitit.helpers.DelayedSubmission(self)


def _stage_to(arg: tp.Any) -> str:
    """--stage-to of a config, or of the first of several."""
    cfg = arg[0] if isinstance(arg, list) and arg else arg
    return cfg.slurm.stage_to if hasattr(cfg, "slurm") else ""
