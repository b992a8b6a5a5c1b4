"""Slurm's own commands: what the queue says, why a job ended, what the cluster allows."""

import collections.abc
import pathlib
import re
import subprocess
import typing as tp

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
    "DependencyNeverSatisfied": "a job that it was to follow failed",
    "InvalidAccount": "--slurm-acct is not valid in this partition",
    "InvalidQOS": "--slurm-qos is not valid here",
    "PartitionConfig": "the partition has less than --n-cpus, --mem-gb, --n-gpus or --n-nodes ask for",
    "PartitionTimeLimit": "--n-hours is above the partition's limit",
    "QOSMaxWallDurationPerJobLimit": "--n-hours is above the limit of the quality of service",
}
"""Slurm's reason -> why a pending job would never start."""
REFUSED = {
    r"invalid account": "--slurm-acct",
    r"partition": "--slurm-partition",
    r"qos": "--slurm-qos",
    r"feature": "--slurm-constraint",
    r"generic resource|gres": "--n-gpus (0 if the cluster has none) and --slurm-gpu-type",
    r"memory": "--mem-gb",
    r"time limit": "--n-hours",
    r"node name": "--slurm-exclude",
    r"option|reservation": "--slurm-extra",
    r"node count|node configuration": "--n-nodes, --n-cpus, --mem-gb and --n-gpus",
}
"""Pattern in sbatch's message -> flags that it may be about."""
OUT_OF_MEMORY = r"slurmstepd\S*: error: .*?(?:exceeded memory limit(?: \((\d+) > (\d+)\))?|oom[-_]kill)"
"""What Slurm writes to the log of a job that it kills for its memory; some give bytes used and asked."""
KILLED = r"srun: error: \S+: tasks? [\d,-]+: Killed"
"""What srun writes to the log if something else killed a task."""
COLUMNS = {"JobArrayID": 40, "State": 20, "RestartCnt": 8, "UserName": 40, "Name": 120, "Reason": 80}
"""Columns of squeue that are read, with their widths."""


class Queued(tp.NamedTuple):
    """A job as squeue lists it."""

    state: str
    reason: str = ""
    n_restarts: int = 0
    user: str = ""
    name: str = ""

    def is_of(self, user: str, name: str) -> bool:
        """Whether it may be this user's job of this name. Other clusters give its id to other jobs."""
        return self.user in ("", user) and name.startswith(self.name)  # squeue may cut it

    @property
    def is_over(self) -> bool:
        """Whether it has ended, for the queue."""
        return self.state in ENDED


def row_of(job_id: str, rows: collections.abc.Mapping[str, Queued]) -> Queued:
    """What the queue says of a job. If all tasks are cancelled before they begin, it lists only the array."""
    return rows.get(job_id) or rows.get(job_id.partition("_")[0]) or Queued("")


def squeue(ids: collections.abc.Iterable[str]) -> dict[str, Queued] | None:
    """Jobs as Slurm's controller knows them: also those that ended in the last minutes, but no older ones.

    None if it does not answer.
    """
    arrays = ",".join(dict.fromkeys(job_id.partition("_")[0] for job_id in ids))
    columns = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    text = output(
        "squeue", "--noheader", "--array", "--states=all", f"--Format={columns}", f"--jobs={arrays}"
    )
    if text is None:
        return None
    found = {}
    for line in text.splitlines():
        cells, at = [], 0
        for width in COLUMNS.values():
            cells.append(line[at : at + width].strip())
            at += width
        job_id, state, restarts, user, name, reason = cells
        found[job_id] = Queued(state, reason, int(restarts) if restarts.isdecimal() else 0, user, name)
    return found


def scripts(user: str) -> dict[str, str] | None:
    """The batch scripts of a user's jobs that `squeue` would list -> job id, without the array task.

    user: "" for all users. None if Slurm does not answer.
    """
    asked = [f"--user={user}"] if user else []
    text = output("squeue", "--noheader", "--states=all", *asked, "--Format=ArrayJobID:40,Command:4096")
    return None if text is None else {line[40:].strip(): line[:40].strip() for line in text.splitlines()}


def why_lost(job_id: str, state: str, log: pathlib.Path) -> str:
    """What happened to a job that ended without a result, and what to do. state: squeue's last, or ""."""
    rows = _accounted(job_id, "State,ReqMem,MaxRSS")
    known = [row[0].partition(" ")[0] for row in rows]
    found = last_line(log, OUT_OF_MEMORY)
    if "OUT_OF_MEMORY" in known or found:  # Slurm may give only the step this state, or none
        memory = [row[1] for row in rows[:1]], [row[2] for row in rows if row[2]]
        if found and found[1]:
            memory = [f"{int(found[2]) / 1e9:.1f} GB"], [f"{int(found[1]) / 1e9:.1f} GB"]
        asked_for, used = (" ".join(texts[-1:]) or "unknown" for texts in memory)
        return f"{ENDED['OUT_OF_MEMORY']} (asked: {asked_for}; last seen: {used})"
    if state not in ENDED or not state:
        state = next((s for s in known if s in ENDED), "")
    if state in ("", "FAILED") and last_line(log, KILLED):
        return "was killed by the system, as when a node has no memory left. Raise --mem-gb"
    if not state and "_" in job_id and _was_cancelled_before_it_began(job_id):
        state = "CANCELLED"
    if not state and not log.exists():
        return "left the queue before it began, as a cancelled job does. Run the same command again"
    return ENDED[state]


def _was_cancelled_before_it_began(job_id: str) -> bool:
    """Accounting has one row for such tasks of an array: 24_[0-3,7%2]."""
    array, _, task = job_id.partition("_")
    for name, state in _accounted(array, "JobID,State"):
        listed = re.fullmatch(r"\d+_\[([\d,-]+)(%\d+)?\]", name)
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", listed[1]) if listed else ():
            if state.startswith("CANCELLED") and int(first) <= int(task) <= int(last or first):
                return True
    return False


def _accounted(job_id: str, columns: str) -> list[list[str]]:
    """Rows of accounting: the job, then its steps. Empty without accounting."""
    text = output("sacct", f"--jobs={job_id}", "--noheader", "--parsable2", f"--format={columns}") or ""
    return [line.split("|") for line in text.splitlines() if line.count("|") == columns.count(",")]


def why_refused(message: str) -> str:
    """What sbatch says about a job that it does not take, on one line, and which flags to check."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in message.splitlines()]
    lines = [line.strip(" .") for line in lines if line.strip() and not line.startswith("Try ")][-2:]
    flags = [flag for pattern, flag in REFUSED.items() if re.search(pattern, " ".join(lines), re.IGNORECASE)]
    others = (
        "the flags that say where it runs (account, partition, qos, constraint, exclude, extra) and what it "
        "needs (--n-gpus, 0 if the cluster has none; --n-cpus, --mem-gb, --n-hours)"
    )
    return f"{'; '.join(lines)}. Check {', '.join(flags) or others}."


def why_not_after(ids: collections.abc.Iterable[str]) -> str:
    """Why jobs cannot be waited for (--after): Slurm does not know one, or it failed. Empty if they can."""
    for job_id in ids:
        rows = {k: row for k, row in (squeue([job_id]) or {}).items() if job_id in (k, k.partition("_")[0])}
        states = {row.state for row in rows.values()}
        if not rows:
            asked = ("sacct", f"--jobs={job_id}", "--allocations", "--noheader", "--parsable2")
            text = output(*asked, "--format=State") or ""
            states = {line.partition(" ")[0] for line in text.splitlines()}
        if not states:
            return f"{job_id}: Slurm knows no such job"
        if bad := states & ENDED.keys() - {"COMPLETED"}:
            return f"{job_id}: this job {ENDED[bad.pop()].partition('.')[0]}"
    return ""


def max_array_size() -> int:
    """The cluster's limit on the jobs of an array."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", output("scontrol", "show", "config") or "", re.M)
    return max(1, int(found[1])) if found else 1000


def scancel(ids: collections.abc.Iterable[str]) -> None:
    """Cancels jobs. Those that have ended are ignored."""
    subprocess.run(["scancel", *ids], capture_output=True, timeout=60, check=False)


def output(*command: str) -> str | None:
    """What a Slurm command prints. "" if it no longer knows the job; None if it does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode == 0:
        return done.stdout
    return "" if "Invalid job id" in done.stderr else None


def last_line(fpath: pathlib.Path, pattern: str, n_bytes: int = 4096) -> re.Match[str] | None:
    """The last match of a pattern near the end of a log."""
    try:
        with fpath.open("rb") as fd:
            fd.seek(max(0, fd.seek(0, 2) - n_bytes))
            text = fd.read().decode("utf-8", "replace")
    except OSError:
        return None
    return next(iter([*re.finditer(pattern, text)][-1:]), None)
