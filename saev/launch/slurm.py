"""Runs stages as Slurm jobs: submits them, watches the queue, and reads their outcomes."""

import collections
import collections.abc
import contextlib
import io
import logging
import pathlib
import re
import shutil
import subprocess
import time
import typing as tp

from saev import console, errors
from saev.launch import submissions
from saev.launch.config import SlurmConfig
from saev.launch.stage import Outcome, Stage

logger = logging.getLogger("saev")

MAX_DELAY_S = 10.0
"""Most seconds between looks at the queue."""
GRACE_S = 10.0
"""Seconds that a job may be out of the queue without a result: it may be requeued, or files may come late."""
ENDED = {
    "": "left the queue without a result",
    "BOOT_FAIL": "did not start, because its node did not boot. Run the same command again",
    "CANCELLED": "was cancelled. Run the same command again; it continues",
    "COMPLETED": "ended without a result (Slurm state COMPLETED)",
    "DEADLINE": "reached its deadline. Run the same command again; it continues",
    "FAILED": "ended without a result (Slurm state FAILED)",
    "NODE_FAIL": "ended with its node. Run the same command again; it continues",
    "OUT_OF_MEMORY": "was killed because it used more than its memory. Raise --mem-gb",
    "PREEMPTED": "was preempted. Run the same command again; it continues",
    "REVOKED": "was revoked. Run the same command again; it continues",
    "TIMEOUT": "reached its time limit. Raise --n-hours, or run the same command again; it continues",
}
"""Slurm state -> what happened to a job without a result, and what to do."""
HOPELESS = {
    "AssocMaxWallDurationPerJobLimit": "--n-hours is above the account's limit",
    "BadConstraints": "no node has what --slurm-constraint, --n-gpus, --n-cpus and --mem-gb ask for",
    "InvalidAccount": "--slurm-acct is not valid in this partition",
    "InvalidQOS": "--slurm-qos is not valid here",
    "PartitionTimeLimit": "--n-hours is above the partition's limit",
    "QOSMaxWallDurationPerJobLimit": "--n-hours is above the limit of the quality of service",
}
"""Slurm's reason -> why a pending job would never start."""


class Queued(tp.NamedTuple):
    """A job as squeue lists it."""

    state: str
    reason: str


def run(stages: list[Stage], slurm: SlurmConfig, name: str) -> collections.abc.Iterator[Outcome]:
    """Submits the stages, waits for all, and returns their outcomes in order.

    A stage that an earlier command has submitted to the same --log-to, and whose job is still in the queue,
    is not submitted again.

    Raises:
        UserError: no Slurm on this machine, or it refuses the jobs.
        SystemExit: Ctrl-C, or --no-slurm-wait. The jobs keep running.
    """
    log_to = pathlib.Path(slurm.log_to).resolve()
    if shutil.which("sbatch") is None:
        flag = f"--slurm-acct {slurm.slurm_acct}" if slurm.slurm_acct else ""
        flag = flag or f"--slurm-partition {slurm.slurm_partition}"
        raise errors.UserError(
            f"{flag}: no sbatch on this machine. Run on the cluster's login node, or leave the flag out."
        )
    log_to.mkdir(parents=True, exist_ok=True)
    ids = _submit_new(stages, slurm, name, log_to)
    cancel = f"scancel {' '.join(dict.fromkeys(job_id.partition('_')[0] for job_id in ids))}"
    if not slurm.slurm_wait:
        console.tell(
            f"The jobs run without this command. Follow them with: squeue --me; cancel them with: {cancel}; "
            "collect their results with the same command without --no-slurm-wait."
        )
        raise SystemExit(0)
    try:
        outcomes = wait(ids, log_to)
    except KeyboardInterrupt:
        console.tell(
            f"\nstopped waiting. These jobs keep running: {_shown(ids)}. Cancel them with: {cancel}. The "
            "same command waits for them again."
        )
        raise SystemExit(130) from None
    return iter(outcomes)


# ---- submission ----


def _submit_new(stages: list[Stage], slurm: SlurmConfig, name: str, log_to: pathlib.Path) -> list[str]:
    """Submits stages that are not in the queue yet. Returns the job id of each stage."""
    keys = [submissions.key(stage) for stage in stages]
    earlier = submissions.job_ids(log_to)
    known = {earlier[key] for key in keys if key in earlier}
    queue = (squeue(known) or {}) if known else {}
    found = {key: earlier[key] for key in keys if _is_queued(queue.get(earlier.get(key, "")))}
    if found:
        logger.info("waiting for %d job(s) of an earlier command: %s", len(found), _shown([*found.values()]))
    new = {key: stage for key, stage in zip(keys, stages, strict=True) if key not in found}
    if new:
        ids = _submit([*new.values()], slurm, name, log_to)
        found |= dict(zip(new, ids, strict=True))
        submissions.write(log_to, {key: found[key] for key in new})
        logger.info("submitted %d job(s): %s; logs in %s", len(ids), _shown(ids), slurm.log_to)
    return [found[key] for key in keys]


def _submit(stages: list[Stage], slurm: SlurmConfig, name: str, log_to: pathlib.Path) -> list[str]:
    from saev.launch import executor as executors  # imports submitit

    executor = executors.Executor(folder=str(log_to), max_num_timeout=executors.MAX_TIMEOUTS)
    minutes = max(1, round(slurm.n_hours * 60))
    executor.update_parameters(**_parameters(slurm, name, stages[0].n_tasks, minutes))
    most, ids = _max_array_size(), []
    try:
        for first in range(0, len(stages), most):
            with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints sbatch's message
                ids += executor.submit_all(stages[first : first + most], minutes, slurm.max_parallel)
    except executors.submitit.core.utils.FailedJobError as err:
        complaint = str(err).strip().splitlines()[-1].removeprefix("sbatch: error: ")
        if ids:
            _scancel(ids)
        raise errors.UserError(
            f"sbatch refused the job: {complaint}. Check --slurm-acct, --slurm-partition, --n-gpus, "
            "--n-cpus, --mem-gb and --n-hours."
        ) from err
    return ids


def _parameters(slurm: SlurmConfig, name: str, n_tasks: int, minutes: int) -> dict[str, object]:
    """What submitit passes to sbatch. Each task gets a GPU, if the job has any."""
    n_gpus = max(slurm.n_gpus, n_tasks) if slurm.n_gpus else 0
    gpu_type = f"{slurm.slurm_gpu_type}:" if slurm.slurm_gpu_type else ""
    optional = {
        "account": slurm.slurm_acct,
        "partition": slurm.slurm_partition,
        "mem": f"{slurm.mem_gb}GB" if slurm.mem_gb else "",
        "gpus_per_node": f"{gpu_type}{n_gpus}" if n_gpus else "",
        "qos": slurm.slurm_qos,
        "constraint": slurm.slurm_constraint,
        "exclude": slurm.slurm_exclude,
        "setup": [*slurm.slurm_setup],
        "additional_parameters": slurm.extra,
    }
    return {
        "job_name": name,
        "time": minutes,
        "cpus_per_task": slurm.n_cpus,
        "ntasks_per_node": n_tasks,
        "stderr_to_stdout": True,
        **{k: v for k, v in optional.items() if v},
    }


def _max_array_size() -> int:
    """The cluster's limit on the jobs of an array."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _output("scontrol", "show", "config") or "", re.M)
    return max(1, int(found[1])) if found else 1000


# ---- waiting ----


def wait(ids: list[str], log_to: pathlib.Path) -> list[Outcome]:
    """Waits until each job has a result or is out of the queue without one. Logs what changes."""
    outcomes: dict[str, Outcome] = {}
    gone_s: dict[str, float] = {}
    delay_s, shown, answers = 0.5, "", True
    while True:
        left = [job_id for job_id in dict.fromkeys(ids) if job_id not in outcomes]
        queue = squeue(left) if left else {}
        if (queue is not None) != answers:
            answers = queue is not None
            logger.warning("squeue %s", "answers again" if answers else "does not answer; still waiting")
        for job_id in left:
            queued = None if queue is None else queue.get(job_id, Queued("", ""))
            if outcome := _result(job_id, log_to):
                outcomes[job_id] = outcome
            elif queued and queued.state == "PENDING" and queued.reason in HOPELESS:
                _scancel([job_id])
                why = f"{HOPELESS[queued.reason]} ({queued.reason})"
                outcomes[job_id] = Outcome(error=f"job {job_id} was cancelled, because {why}.")
            elif queued is None or _is_queued(queued):
                gone_s.pop(job_id, None)
            elif time.monotonic() - gone_s.setdefault(job_id, time.monotonic()) >= GRACE_S:
                outcomes[job_id] = _lost(job_id, queued.state, log_to)
            if (outcome := outcomes.get(job_id)) and outcome.error:
                logger.warning("%s", outcome.error)
        if (line := _summary(ids, outcomes, queue)) != shown:
            logger.info("%s", line)
            shown, delay_s = line, 0.5
        if len(outcomes) == len(set(ids)):
            return [outcomes[job_id] for job_id in ids]
        time.sleep(delay_s)
        delay_s = min(MAX_DELAY_S, 1.1 * delay_s)


def squeue(ids: collections.abc.Iterable[str]) -> dict[str, Queued] | None:
    """Jobs as Slurm's controller knows them: also those that ended in the last minutes, but no older ones.

    None if it does not answer.
    """
    arrays = ",".join(dict.fromkeys(job_id.partition("_")[0] for job_id in ids))
    command = ["--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={arrays}"]
    text = _output("squeue", *command)
    if text is None:
        return None
    rows = (line.strip().split("|", 2) for line in text.splitlines() if line.count("|") >= 2)
    return {job_id: Queued(state, reason) for job_id, state, reason in rows}


def _is_queued(job: Queued | None) -> bool:
    return job is not None and job.state not in ENDED


def _summary(ids: list[str], outcomes: dict[str, Outcome], queue: dict[str, Queued] | None) -> str:
    """One line: how many jobs are in each state, with Slurm's reasons for those that are pending."""
    counts: collections.Counter[str] = collections.Counter()
    for job_id in dict.fromkeys(ids):
        if outcome := outcomes.get(job_id):
            counts["failed" if outcome.error else "done"] += 1
            continue
        job = (queue or {}).get(job_id, Queued("", ""))
        state = "waiting for its result" if job.state in ENDED else job.state.lower()
        counts[f"{state} ({job.reason})" if job.state == "PENDING" else state] += 1
    return f"{sum(counts.values())} job(s): " + ", ".join(
        f"{n} {state}" for state, n in sorted(counts.items())
    )


def _result(job_id: str, log_to: pathlib.Path) -> Outcome | None:
    """The outcome of a job's first task, or None if it has written none yet."""
    import submitit.core.utils

    paths = submitit.core.utils.JobPaths(log_to, job_id, 0)
    try:
        kind, value = submitit.core.utils.pickle_load(paths.result_pickle)
    except FileNotFoundError:
        return None
    if kind == "success":
        return value.of(f"job {job_id}")
    why = exception_line(value).rstrip(".")
    return Outcome(error=f"job {job_id} failed: {why}. Its log: {paths.stdout}")


def _lost(job_id: str, state: str, log_to: pathlib.Path) -> Outcome:
    """The outcome of a job that ended without a result."""
    import submitit.core.utils

    log = submitit.core.utils.JobPaths(log_to, job_id, 0).stdout
    text = (
        _output("sacct", f"--jobs={job_id}", "--noheader", "--parsable2", "--format=State,ReqMem,MaxRSS")
        or ""
    )
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 2]
    known = [row[0].partition(" ")[0] for row in rows]
    if "OUT_OF_MEMORY" in known:  # Slurm may give only the step this state
        state = "OUT_OF_MEMORY"
    elif state not in ENDED or not state:
        state = next((s for s in known if s in ENDED), "")
    memory = ""
    if state == "OUT_OF_MEMORY" and rows:
        used = [row[2] for row in rows if row[2]]
        memory = f" (asked: {rows[0][1]}; last seen: {', '.join(used[-1:]) or 'unknown'})"
    return Outcome(error=f"job {job_id} {ENDED[state]}{memory}. Its log: {log}")


def exception_line(message: str) -> str:
    """Finds the exception's type and first line, which follow the last frame of a traceback."""
    _, _, after = message.rpartition('\n  File "')
    lines = [line for line in after.splitlines()[1:] if line and line[0] not in " -"]
    return next(iter(lines), "it raised an exception")


# ---- Slurm's commands ----


def _output(*command: str) -> str | None:
    """What a Slurm command prints. "" if it does not know the job any more; None if it does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode == 0:
        return done.stdout
    return "" if "Invalid job id" in done.stderr else None


def _scancel(ids: list[str]) -> None:
    subprocess.run(["scancel", *ids], capture_output=True, timeout=60, check=False)


def _shown(ids: list[str]) -> str:
    """Job ids, those of an array as one: 24_[0-199]."""
    tasks: dict[str, list[int]] = {}
    for job_id in ids:
        array, _, task = job_id.partition("_")
        tasks.setdefault(array, []).extend([int(task)] if task else [])
    return ", ".join(
        array if not own else f"{array}_[{min(own)}-{max(own)}]" if len(own) > 1 else f"{array}_{own[0]}"
        for array, own in tasks.items()
    )
