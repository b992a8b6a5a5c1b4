"""Where a command runs."""

import dataclasses

import beartype

from saev import errors, fields


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
    """Folder for job logs."""
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
    max_parallel: int = 256
    """Jobs of a sweep that run at the same time."""
    slurm_wait: bool = True
    """Wait for the jobs. With --no-slurm-wait the command submits them and ends."""

    def __post_init__(self) -> None:
        fields.settle(
            self,
            n_hours="(0, 1e5]",
            mem_gb="[0, 1e6]",
            n_cpus="[1, 1e5]",
            n_gpus="[0, 1e4]",
            max_parallel="[1, 1e5]",
        )
        for option in self.slurm_extra:
            if not option.partition("=")[0].strip(" -"):
                raise errors.UserError(f"--slurm-extra {option!r}: must be key=value.")

    @property
    def is_on(self) -> bool:
        """Whether the work runs as Slurm jobs."""
        return bool(self.slurm_acct or self.slurm_partition)

    @property
    def extra(self) -> dict[str, str | bool]:
        """`slurm_extra` by key. An option without a value is a switch."""
        pairs = (option.partition("=") for option in self.slurm_extra)
        return {key.strip(" -"): value if sign else True for key, sign, value in pairs}
