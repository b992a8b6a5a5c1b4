"""Where a command runs."""

import dataclasses

import beartype

from saev import fields


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class SlurmConfig:
    """Where to run: in this process, or (with --slurm-acct) as Slurm jobs through submitit."""

    slurm_acct: str = ""
    """Slurm account. Empty: run in this process."""
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

    def __post_init__(self) -> None:
        fields.settle(self, n_hours="(0, 1e5]", mem_gb="[0, 1e6]", n_cpus="[1, 1e5]", n_gpus="[0, 1e4]")
