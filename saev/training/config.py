"""Config of `train.py`. Imports no torch."""

import dataclasses
import math
import typing as tp

import beartype
import tyro

from saev import errors, launch
from saev.data import config as data_config
from saev.nn import config as nn_config


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Train:
    """Trains sparse autoencoders on activation shards."""

    sae: nn_config.Relu | nn_config.TopK | nn_config.BatchTopK = dataclasses.field(
        default_factory=nn_config.BatchTopK
    )
    """The architecture."""
    data: data_config.Shards = dataclasses.field(default_factory=data_config.Shards)
    """The activations."""
    n_patches: int = 100_000_000
    """Activations to train on; the stream repeats when it is shorter."""
    batch_size: int = 4096
    """Activations per step."""
    lr: float = 4e-4
    """Adam's learning rate after warm-up."""
    n_lr_warmup: int = 500
    """Steps of linear learning-rate warm-up."""
    seed: int = 0
    """Seed of the initial weights and of the stream's order."""
    pool_gb: float = 2.0
    """Bound of the memory that mixes and prefetches the stream, in GB. (Less is taken when the activations fit into less.)"""
    n_threads: int = 0
    """Threads that read activations; 0: one for each core, at most 4. The order of the stream does not depend on it."""
    dead_window: int = 1_000_000
    """A latent is dead (`dead_pct`) when it did not fire within this many activations."""
    log_every: int = 50
    """Steps between log lines."""
    ckpt_to: str = "checkpoints"
    """Where <run id>/sae.pt goes. The run id is a hash of the config: the same command finds its finished runs."""
    wandb_project: str = "saev"
    """wandb project. Empty: metrics.jsonl only."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    sweep: str = ""
    """TOML file of parameters; each list is a grid axis. Typed flags win over it."""
    dry_run: bool = False
    """Print the configs and stop."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=launch.SlurmConfig
    )
    """Where to run."""

    def __post_init__(self) -> None:
        for name in ("n_patches", "batch_size", "log_every", "dead_window"):
            if getattr(self, name) < 1:
                raise errors.UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1."
                )
        for name in ("seed", "n_threads"):
            if getattr(self, name) < 0:
                raise errors.UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative."
                )
        if not 0 < self.lr < math.inf:
            raise errors.UserError(f"--lr {self.lr}: must be positive and finite.")

    @property
    def n_steps(self) -> int:
        return max(1, self.n_patches // self.batch_size)

    def logs_at(self, step: int) -> bool:
        """Are metrics measured at this step? At the last one always."""
        return step % self.log_every == 0 or step == self.n_steps - 1

    @property
    def stream(self) -> tuple[object, ...]:
        """Runs with equal streams are trained together."""
        return (
            self.data,
            self.n_steps,
            self.batch_size,
            self.seed,
            self.pool_gb,
            self.n_threads,
            self.device,
            self.log_every,
        )


@beartype.beartype
def group(cfgs: list[Train]) -> list[list[Train]]:
    """Splits a sweep into groups that share one data stream: one job each."""
    groups: dict[tuple[object, ...], list[Train]] = {}
    for cfg in cfgs:
        groups.setdefault(cfg.stream, []).append(cfg)
    return list(groups.values())
