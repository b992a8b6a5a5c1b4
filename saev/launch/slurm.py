"""Runs stages as a Slurm job array, through submitit."""

import collections.abc
import contextlib
import io
import logging
import pathlib
import shutil
import sys
import time
import typing as tp

from saev import console, errors
from saev.launch.config import SlurmConfig
from saev.launch.stage import Outcome, Stage

logger = logging.getLogger("saev")


def run(stages: list[Stage], slurm: SlurmConfig, name: str) -> collections.abc.Iterator[Outcome]:
    """Submits the stages, waits for all, and returns their outcomes in order.

    Raises:
        UserError: no Slurm on this machine, or it refuses the jobs.
        SystemExit: Ctrl-C. The jobs keep running.
    """
    jobs = _submit(stages, slurm, name)
    ids = ", ".join(job.job_id for job in jobs)
    logger.info("submitted %d job(s): %s; logs in %s", len(jobs), ids, slurm.log_to)
    try:
        _wait(jobs)
    except KeyboardInterrupt:
        array_id = jobs[0].job_id.split("_")[0]
        console.tell(
            f"\nstopped waiting. These jobs keep running: {ids}. Cancel them with: scancel {array_id}"
        )
        sys.exit(130)
    return map(_outcome, jobs)


def _submit(stages: list[Stage], slurm: SlurmConfig, name: str) -> list[tp.Any]:
    if shutil.which("sbatch") is None:
        raise errors.UserError(
            f"--slurm-acct {slurm.slurm_acct}: no sbatch on this machine. Run on the cluster's login node, "
            "or leave --slurm-acct out."
        )
    import submitit.core.utils

    pathlib.Path(slurm.log_to).mkdir(parents=True, exist_ok=True)
    # A long run may reach the time limit many times; each job then continues the last.
    executor = submitit.SlurmExecutor(folder=str(pathlib.Path(slurm.log_to).resolve()), max_num_timeout=1000)
    executor.update_parameters(**_parameters(slurm, name, stages[0].n_tasks))
    try:
        # submitit also prints sbatch's message
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():
            return [executor.submit(stage) for stage in stages]
    except submitit.core.utils.FailedJobError as err:
        complaint = str(err).strip().splitlines()[-1].removeprefix("sbatch: error: ")
        raise errors.UserError(
            f"sbatch refused the job: {complaint}. Check --slurm-acct, --slurm-partition, --n-gpus, "
            "--n-cpus, --mem-gb and --n-hours."
        ) from err


def _parameters(slurm: SlurmConfig, name: str, n_tasks: int) -> dict[str, object]:
    optional = {
        "partition": slurm.slurm_partition,
        "mem": f"{slurm.mem_gb}GB" if slurm.mem_gb else "",
        "gpus_per_node": slurm.n_gpus,
    }
    return {
        "job_name": name,
        "account": slurm.slurm_acct,
        "time": max(1, round(slurm.n_hours * 60)),
        "cpus_per_task": slurm.n_cpus,
        "ntasks_per_node": n_tasks,
        "stderr_to_stdout": True,
        **{k: v for k, v in optional.items() if v},
    }


def _wait(jobs: list[tp.Any]) -> None:
    """Waits until all jobs have ended, asking at growing intervals of up to 10 s."""
    delay_s, n_done = 0.5, -1
    while (n_now := sum(job.done() for job in jobs)) < len(jobs):
        if n_now != n_done:
            logger.info("%d of %d job(s) done", n_now, len(jobs))
        n_done = n_now
        time.sleep(delay_s)
        delay_s = min(10.0, 1.1 * delay_s)


def _outcome(job: tp.Any) -> Outcome:
    import submitit.core.utils

    name, log = f"job {job.job_id}", f"Its log: {job.paths.stdout}"
    try:
        return job.results()[0].of(name)  # the first task's
    except submitit.core.utils.FailedJobError as err:
        why = exception_line(str(err)).rstrip(".")
        return Outcome(error=f"{name} failed: {why}. {log}")
    except submitit.core.utils.UncompletedJobError:  # killed, cancelled, out of memory
        return Outcome(error=f"{name} ended without a result (Slurm state {job.state}). {log}")


def exception_line(message: str) -> str:
    """Finds the exception's type and first line, which follow the last frame of submitit's traceback."""
    _, _, after = message.rpartition('\n  File "')
    lines = [line for line in after.splitlines()[1:] if line and line[0] not in " -"]
    return next(iter(lines), "it raised an exception")
