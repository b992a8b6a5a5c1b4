"""What a Slurm job runs (see `executor.START`). submitit calls the stage."""

import os
import pathlib
import sys


def main() -> None:
    """Runs this task's stage. Exits with 1 if it failed: Slurm then does not start jobs --after it."""
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"  # it would write its lines to stdout and stderr
    from saev import early
    from saev.launch.entry import configure_logging

    early.end_at_once()
    configure_logging()
    import submitit.core.job_environment
    import submitit.core.submission
    import submitit.core.utils

    from saev.launch import submissions

    log_to = pathlib.Path(sys.argv[1])
    os.environ["SUBMITIT_FOLDER"] = str(log_to)
    paths = submitit.core.job_environment.JobEnvironment().paths
    if not paths.submitted_pickle.exists():  # the command still submits, or it was killed
        with submissions.locked(log_to):
            submissions.recover(log_to)
    submitit.core.submission.process_job(log_to)
    _, outcome = submitit.core.utils.pickle_load(paths.result_pickle)
    sys.exit(1 if outcome.error else 0)
