"""Where a command runs."""

import atexit
import dataclasses
import functools
import os
import pathlib
import sys
import tomllib
import typing as tp

import beartype
import beartype.door

from saev import console, errors, fields

WHERE = ("on_slurm", "slurm_acct", "slurm_partition")
"""Fields that send a command's work to Slurm."""
PER_COMMAND = ("on_slurm", "after", "retry_failed")
"""Fields that do not become defaults of other commands."""
OWN = {
    "array",
    "dependency",
    "error",
    "export",
    "job-name",
    "open-mode",
    "output",
    "parsable",
    "signal",
    "wrap",
}
"""Options of sbatch that saev sets without a flag, or by another one."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class SlurmConfig:
    """Where to run: in this process, or (with --slurm-acct or --slurm-partition) as Slurm jobs."""

    slurm_acct: str = ""
    """Slurm account. With an account or a partition, the work runs as Slurm jobs; otherwise in this
    process."""
    slurm_partition: str = ""
    """Slurm partition. Empty: the cluster's default."""
    n_hours: float = 24.0
    """Time limit of each job, in hours."""
    mem_gb: int = 0
    """Memory of each job, in GB. 0: the cluster's default."""
    n_cpus: int = 8
    """CPU cores of each job."""
    n_gpus: int = 1
    """GPUs of each job. 0 on a cluster without GPUs."""
    log_to: fields.Path = "logs"
    """Folder for the jobs' logs, results and code."""
    on_slurm: bool = False
    """Run as Slurm jobs, with the account and partition of ~/.config/saev/slurm.toml."""
    slurm_qos: str = ""
    """Slurm quality of service. Empty: the account's default."""
    slurm_constraint: str = ""
    """Features that the nodes must have, such as 'a100'."""
    slurm_gpu_type: str = ""
    """Type of the GPUs, such as 'a100'. Empty: any."""
    slurm_exclude: str = ""
    """Nodes not to use, such as 'node[3-5]'."""
    slurm_setup: tuple[str, ...] = ()
    """Shell lines that each job runs first, such as 'module load cuda'."""
    slurm_extra: tuple[str, ...] = ()
    """Other options of sbatch, each as key=value, such as 'reservation=lab'."""
    n_nodes: int = 1
    """Nodes among which the tasks of --data-parallel are divided."""
    stage_to: str = ""
    """Folder on a fast disk, such as '$TMPDIR' of a node. Shards are copied there before they are read.
    Variables are expanded where the job runs."""
    max_parallel: int = 256
    """Jobs of a sweep that run at the same time."""
    max_per_job: int = 16
    """Most SAEs of a sweep that one job trains together on one stream of activations."""
    after: tuple[str, ...] = ()
    """Job ids. The jobs start when these have ended without an error."""
    slurm_wait: bool = True
    """Wait for the jobs. With --no-slurm-wait the command submits them and ends."""
    retry_failed: bool = False
    """Submit only what an earlier submission in --log-to did not complete."""

    def __post_init__(self) -> None:
        fields.settle(
            self,
            n_hours="(0, 1e5]",
            mem_gb="[0, 1e6]",
            n_cpus="[1, 1e5]",
            n_gpus="[0, 1e4]",
            max_parallel="[1, 1e5]",
            max_per_job="[1, 1e5]",
            n_nodes="[1, 1e4]",
        )
        for option in self.slurm_extra:
            if not option.partition("=")[0].strip(" -"):
                raise errors.UserError(f"--slurm-extra {option!r}: must be key=value.")
        if own := OWN & {key.replace("_", "-") for key in self.extra}:
            raise errors.UserError(f"--slurm-extra {own.pop()}: saev sets this itself. Leave it out.")
        for name in WHERE[1:] if self.is_on else ():
            if not getattr(self, name):
                object.__setattr__(self, name, _of_file().get(name, ""))

    @property
    def is_on(self) -> bool:
        """Whether the work runs as Slurm jobs."""
        return bool(self.on_slurm or self.slurm_acct or self.slurm_partition)

    @property
    def extra(self) -> dict[str, str | bool]:
        """`slurm_extra` by key. An option without a value is a switch."""
        pairs = (option.partition("=") for option in self.slurm_extra)
        return {key.strip(" -"): value if sign else True for key, sign, value in pairs}


def of_user() -> SlurmConfig:
    """The defaults of commands: those of the user's file, where it has any.

    Its account and partition count only for commands that run on Slurm, so they are not among them.

    Raises:
        UserError: the file is not TOML, or has an unknown key or a wrong value. For --help, this is a warning
            below the help.
    """
    try:
        values = _of_file()
    except errors.UserError as err:
        if not {"-h", "--help"} & set(sys.argv):
            raise
        _warn_at_exit(str(err))
        return SlurmConfig()
    return SlurmConfig(**{key: value for key, value in values.items() if key not in WHERE})


@functools.cache
def _warn_at_exit(text: str) -> None:
    atexit.register(console.tell, f"warning: {text}")


def _of_file() -> dict[str, tp.Any]:
    home = os.environ.get("XDG_CONFIG_HOME") or str(pathlib.Path("~/.config").expanduser())
    fpath = pathlib.Path(home) / "saev" / "slurm.toml"
    return _read(fpath, fpath.stat().st_mtime_ns) if fpath.is_file() else {}


@functools.cache
def _read(fpath: pathlib.Path, _mtime_ns: int) -> dict[str, tp.Any]:
    try:
        values = tomllib.loads(fpath.read_text("utf-8"))
    except (OSError, ValueError) as err:
        raise errors.UserError(f"{fpath}: cannot be read ({errors.first_line(err)}). Correct it.") from err
    hints = {k: hint for k, hint in tp.get_type_hints(SlurmConfig).items() if k not in PER_COMMAND}
    for key, value in values.items():
        if key not in hints:
            raise errors.UserError(f"{fpath}: unknown key {key!r}. Valid keys: {', '.join(hints)}.")
        values[key] = tuple(value) if isinstance(value, list) else value
        if hints[key] is float and type(value) is int:
            values[key] = float(value)
        if not beartype.door.is_bearable(values[key], hints[key]):
            kind = "a list of texts" if tp.get_origin(hints[key]) is tuple else hints[key].__name__
            raise errors.UserError(f"{fpath}: {key} = {value!r}: must be {kind}.")
    try:
        SlurmConfig(**{key: value for key, value in values.items() if key not in WHERE})
    except errors.UserError as err:
        raise errors.UserError(f"{fpath}: {err}") from err
    return values
