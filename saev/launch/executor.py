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

from saev import helpers
from saev.formats import jsonfile
from saev.launch import submissions
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
    plan: submissions.Plan | None = None
    """What is being submitted."""

    @property
    def _submitit_command_str(self) -> str:
        return shlex.join([sys.executable, "-u", "-c", START, str(self.folder)])

    def _make_submission_command(self, submission_file_path: pathlib.Path) -> list[str]:
        self.script = submission_file_path
        helpers.write_text(submission_file_path.with_suffix(".json"), jsonfile.dumps(self.plan, indent=4))
        unset = [f"--unset={name}" for name in inherited(self.parameters)]
        command = ["env", *unset, "sbatch", "--parsable", "--export=ALL", str(submission_file_path)]
        shielded = (
            "trap '' INT TERM HUP; exec \"$@\""  # signals wait for the id (see `slurm.interrupted_later`)
        )
        return ["sh", "-c", shielded, "sh", *command]

    @staticmethod
    def _get_job_id_from_submission_command(string: str | bytes) -> str:
        text = string if isinstance(string, str) else string.decode()
        ids = re.findall(r"^([0-9]+)(?:;\S+)?\s*$", text, re.MULTILINE)
        if not ids:
            raise submitit.core.utils.FailedJobError(f"sbatch printed no job id: {text.strip()!r}")
        return ids[-1]

    def submit_all(
        self, stages: list[Stage], minutes: int, max_parallel: int, planned: submissions.Submission
    ) -> list[str]:
        """Submits a job (or several as an array), notes it and returns the ids. On an error, no files are
        left.

        planned: what to note. Its jobs without ids are those of the stages.
        """
        self.script, pickles = None, [f"{uuid.uuid4().hex}.pkl" for _ in stages]
        self.plan = submissions.Plan(planned, pickles)
        made = [pathlib.Path(self.folder) / name for name in pickles]
        self.update_parameters(array_parallelism=max_parallel)
        self.parameters.pop("map_count", None)
        if len(stages) > 1:
            self.parameters["map_count"] = len(stages)
        try:
            for stage, fpath in zip(stages, made, strict=True):
                delayed = submitit.core.utils.DelayedSubmission(stage)
                delayed.set_timeout(minutes, MAX_TIMEOUTS)
                delayed.dump(fpath)
            array_id = self._submit_command(self._submitit_command_str).job_id
            assert self.script is not None
        except BaseException:
            # Only this command's own files: another one may be submitting to the same folder.
            made += [self.script, self.script.with_suffix(".json")] if self.script else []
            for fpath in made:
                fpath.unlink(missing_ok=True)
            raise
        return submissions.finish(self.script.with_suffix(".json"), array_id)


def inherited(parameters: collections.abc.Mapping[str, object]) -> list[str]:
    """Variables that would change a new job: those of a job around this process, and options of sbatch.

    Slurm's own settings stay, and what the user prefers where no flag says otherwise. (To sbatch, variables
    count more than the script's options.)
    """
    kept = {f"SBATCH_{name.upper()}" for name in PREFERENCES if not parameters.get(name)}
    kept |= {"SLURM_CONF", "SLURM_CLUSTERS", "SBATCH_CLUSTERS", "SBATCH_RESERVATION", "SBATCH_WCKEY"}
    return [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name not in kept]
