"""A stage on one argument, and what comes of it."""

import dataclasses
import importlib
import os
import typing as tp

import beartype

from saev import console, early, errors
from saev.launch.entry import configure_logging, os_errors


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage returned, or why it failed; both if a part of its work failed."""

    value: tp.Any = None
    error: str = ""
    """Message for the user. Empty: nothing failed."""

    @property
    def failed(self) -> bool:
        """Is there no result at all?"""
        return bool(self.error) and self.value is None

    def get(self) -> tp.Any:
        """The value.

        Raises:
            UserError: the stage, or a part of it, failed.
        """
        if self.error:
            raise errors.UserError(self.error, done=self.value)
        return self.value

    def of(self, job: str) -> "Outcome":
        """The same, where a failure says which job failed."""
        return dataclasses.replace(self, error=f"{job}: {self.error}") if self.failed else self


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage on one argument. Pickled by submitit and by multiprocessing."""

    target: str
    """module:function"""
    arg: tp.Any
    n_tasks: int = 1
    """Processes that work on it together; more than one find each other by torchrun's variables."""
    rank: int = 0
    """This one's number among them, where Slurm does not say it."""
    port: int = 0
    """On which they meet. 0: Slurm decides it."""

    def __call__(self) -> Outcome:
        """As `outcome`, in a process of its own: its log holds the error too."""
        configure_logging()
        outcome = self.outcome()
        if outcome.error:
            console.tell(f"error: {outcome.error}")
        return outcome

    def outcome(self) -> Outcome:
        """Runs the stage; a UserError, or an OSError about a file, becomes the outcome's error."""
        try:
            with os_errors():
                return Outcome(self.run())
        except errors.UserError as err:
            return Outcome(err.done, str(err))

    def run(self) -> tp.Any:
        """Runs the stage and returns what it returns."""
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
        return getattr(module, function_name)(self.arg)

    def checkpoint(self) -> tp.Any:
        """What submitit submits again after a time-out or preemption; stages go on where they stopped."""
        import submitit.helpers

        return submitit.helpers.DelayedSubmission(self)
