"""Submits pickled stages with sbatch. submitit writes the batch script and runs the stages in the jobs."""

import collections.abc
import os
import pathlib
import re
import shlex
import sys
import uuid

import submitit
import submitit.core.utils

from saev.launch.stage import Stage

START = (
    "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2}); "
    "from saev.launch import job; job.main()"
)
"""What a job runs. Slurm's warning waits until the stage begins; it would end a process without a handler."""
PREFERENCES = ("account", "partition", "qos", "constraint")
"""Options of sbatch that a user may set by variables, if no flag sets them."""
MAX_TIMEOUTS = 1000
"""A long run may reach the time limit this often; each job then continues the last."""


class Executor(submitit.SlurmExecutor):
    """submitit's, but sbatch gets a clean environment, and its answer is read among other output."""

    script: pathlib.Path | None = None
    """The batch script being submitted. submitit renames it once Slurm has taken the job."""

    @property
    def _submitit_command_str(self) -> str:
        return shlex.join([sys.executable, "-u", "-c", START, str(self.folder)])

    def _make_submission_command(self, submission_file_path: pathlib.Path) -> list[str]:
        self.script = submission_file_path
        unset = [f"--unset={name}" for name in inherited(self.parameters)]
        command = ["env", *unset, "sbatch", "--parsable", "--export=ALL", str(submission_file_path)]
        shielded = "trap '' INT TERM; exec \"$@\""  # signals wait for the id (see `slurm.interrupted_later`)
        return ["sh", "-c", shielded, "sh", *command]

    @staticmethod
    def _get_job_id_from_submission_command(string: str | bytes) -> str:
        text = string if isinstance(string, str) else string.decode()
        ids = re.findall(r"^([0-9]+)(?:;\S+)?\s*$", text, re.MULTILINE)
        if not ids:
            raise submitit.core.utils.FailedJobError(f"sbatch printed no job id: {text.strip()!r}")
        return ids[-1]

    def submit_all(self, stages: list[Stage], minutes: int, max_parallel: int) -> list[str]:
        """Submits a job (or several as an array) and returns the ids. On an error, no files are left."""
        folder, self.script = pathlib.Path(self.folder), None
        pickles = [folder / f"{uuid.uuid4().hex}.pkl" for _ in stages]
        self.update_parameters(array_parallelism=max_parallel)
        self.parameters.pop("map_count", None)
        if len(stages) > 1:
            self.parameters["map_count"] = len(stages)
        try:
            for stage, fpath in zip(stages, pickles, strict=True):
                delayed = submitit.core.utils.DelayedSubmission(stage)
                delayed.set_timeout(minutes, MAX_TIMEOUTS)
                delayed.dump(fpath)
            first = self._submit_command(self._submitit_command_str).job_id
            ids = [f"{first}_{i}" for i in range(len(stages))] if len(stages) > 1 else [first]
            for stale in (f for job_id in ids for f in folder.glob(f"{job_id}_*_result.pkl")):
                stale.unlink()  # of another job with this id: another cluster's, or before Slurm counted anew
            for fpath, job_id in zip(pickles, ids, strict=True):
                submitit.core.utils.JobPaths(folder, job_id).move_temporary_file(fpath, "submitted_pickle")
        finally:
            # Only this command's own files: another one may be submitting to the same folder.
            for fpath in [*pickles, self.script]:
                if fpath is not None and not fpath.is_symlink():
                    fpath.unlink(missing_ok=True)
        return ids


def inherited(parameters: collections.abc.Mapping[str, object]) -> list[str]:
    """Variables that would change a new job: those of a job around this process, and options of sbatch.

    Slurm's own settings stay, and what the user prefers where no flag says otherwise. (To sbatch, variables
    count more than the script's options.)
    """
    kept = {f"SBATCH_{name.upper()}" for name in PREFERENCES if not parameters.get(name)}
    kept |= {"SLURM_CONF", "SLURM_CLUSTERS", "SBATCH_CLUSTERS", "SBATCH_RESERVATION", "SBATCH_WCKEY"}
    return [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name not in kept]
