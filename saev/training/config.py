"""Config of `train.py`. Imports no torch."""

import dataclasses
import math
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch
from saev.data import config as data_config
from saev.nn import config as nn_config

MOST_CODES = 2**30
"""Positions of codes are 32-bit integers, and a search over the batch may find twice as many as it keeps."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Train:
    """Trains sparse autoencoders on activation shards."""

    sae: nn_config.Sae = dataclasses.field(default_factory=nn_config.DEFAULT)
    """The architecture. `sae:NAME --help` shows the flags of each."""
    objective: nn_config.Objective = dataclasses.field(default_factory=nn_config.Vanilla)
    """The loss."""
    data: data_config.Shards = fields.shared(data_config.Shards)
    """The activations."""
    val_data: data_config.Shards = fields.neither(data_config.Shards)
    """Held-out activations for the evaluation after training. Default: a sample of --data
    (metrics.json then says so)."""
    n_patches: int = fields.stream(100_000_000)
    """Number of activations to train on. If the shards hold fewer, they are read again in a new order."""
    n_val_patches: int = fields.neither(1_000_000)
    """Number of activations to evaluate on (at most all of them)."""
    batch_size: int = fields.stream(4096)
    """Activations in each step."""
    lr: float | None = None
    """Adam's learning rate after warm-up. Default: the architecture's (below)."""
    n_lr_warmup: int = 500
    """Steps of linear learning-rate warm-up (at most a tenth of all steps)."""
    lr_decay: tp.Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls to 0 in the last --decay-frac of the steps. constant: it does not fall."""
    decay_frac: float = 0.2
    """Fraction of the steps over which the learning rate falls."""
    n_sparsity_warmup: int = 0
    """Steps over which --sae.sparsity-coeff rises linearly from 0, for architectures that have one."""
    max_grad_norm: float = 1.0
    """Scale down gradients whose norm is larger than this. 0: never."""
    max_norm_ratio: float = 0.0
    """In training, pull activations back to this many times the typical distance from the centre, so that a
    few of huge norm do not dominate the loss. Try 5. 0: off. The finished SAE takes raw activations."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, with a warm-up. If above 0, the average is saved
    and evaluated instead of the last weights."""
    precision: tp.Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of matrix products (docs/training.md). tf32: TF32 on a GPU, float32 on a CPU. bfloat16: the
    encoder's product in bfloat16, and on a GPU also the rows that codes select. Weights, sums, gradients and
    Adam are always float32."""
    seed: int = fields.stream(0)
    """Seed of the initial weights and of the order of the activations."""
    pool_gb: float = fields.stream(2.0)
    """Memory for shuffling and prefetching activations, in GB (less if all of them fit into less). Training
    needs about 0.75 GB + this + 68 bytes x d_vit x latents (32 bytes for each further SAE on the same
    stream), more with large batches. The total is logged at the start."""
    n_threads: int = fields.shared(0)
    """Threads that read activations. 0: one per core (two for dumps that do not fit into memory), at most 4.
    Does not change the order of activations."""
    gpu_gb: float = fields.shared(0.0)
    """Memory of a GPU that training may take, in GB. Steps whose pre-activations do not fit handle the batch
    in parts. 0: what is free at the start."""
    dead_window: int | None = None
    """A latent that has not fired for this many activations is dead (for AuxK, resampling and
    dead_frac_window). Default: 1,000,000 or a tenth of --n-patches, whichever is less, but at least one
    batch."""
    log_every: int = fields.shared(50)
    """Steps between log lines."""
    costly_every: int = fields.neither(1000)
    """Steps between measurements of mean_abs_corr and coherence, whose cost grows with d_sae squared."""
    save_every: float = fields.neither(10.0)
    """Minutes between saved states. After a crash, the same command continues from the last one."""
    keep_last: int = fields.neither(2)
    """Number of saved states to keep."""
    data_parallel: int = fields.shared(1)
    """Processes (GPUs) among which each batch is divided. They are started by train.py, by Slurm as tasks of
    one job, or by torchrun."""
    ckpt_to: fields.Path = fields.neither("checkpoints")
    """Folder for checkpoints: <run id>/sae.pt. The run id is a hash of the config, so the same command finds
    its finished runs."""
    wandb_project: str = fields.neither("saev")
    """wandb project. Empty: metrics go to metrics.jsonl only."""
    device: str = fields.shared("auto")
    """auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:1, ..."""
    sweep: fields.Path = fields.neither("")
    """TOML file of parameters, in which each list is a grid axis. Flags on the command line override it."""
    dry_run: bool = fields.neither(False)
    """Print the configs without training."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = fields.neither(launch.of_user)
    """Where to run."""

    def __post_init__(self) -> None:
        fields.settle(
            self,
            n_patches="[1, 1e13]",
            n_val_patches="[1, 1e13]",
            batch_size="[1, 16777216]",
            lr="(0, 1e29]",
            n_lr_warmup="[0, 1e13]",
            decay_frac="[0, 1]",
            n_sparsity_warmup="[0, 1e13]",
            max_grad_norm="[0, 1e12]",
            max_norm_ratio="[0, 1e12]",
            ema="[0, 1)",
            seed="[0, 4294967296)",
            pool_gb="(0, 1e5]",
            n_threads="[0, 1024]",
            gpu_gb="[0, 1e5]",
            dead_window="[1, 1e13]",
            log_every="[1, 1e13]",
            costly_every="[1, 1e13]",
            save_every="(0, 1e6]",
            keep_last="[1, 1e6]",
            data_parallel="[1, 64]",
        )
        if self.n_patches < self.batch_size:
            raise errors.UserError(
                f"--n-patches {self.n_patches}: is less than one batch (--batch-size {self.batch_size}). "
                "Raise it or lower --batch-size."
            )
        if self.batch_size * self.sae.n_firing > MOST_CODES:
            raise errors.UserError(
                f"--batch-size {self.batch_size}: with --sae.top-k {self.sae.n_firing} a batch has more than "
                f"{MOST_CODES:,} codes, whose positions are 32-bit integers. Lower one of them."
            )
        if self.batch_size % self.data_parallel:
            raise errors.UserError(
                f"--batch-size {self.batch_size}: must be a multiple of --data-parallel {self.data_parallel}."
            )
        if self.data_parallel % self.slurm.n_nodes:
            raise errors.UserError(
                f"--n-nodes {self.slurm.n_nodes}: --data-parallel {self.data_parallel} must be a multiple of "
                "it. Each node runs as many tasks as the others."
            )
        if self.n_sparsity_warmup and not hasattr(self.sae, "sparsity_coeff"):
            raise errors.UserError(
                f"--n-sparsity-warmup {self.n_sparsity_warmup}: {type(self.sae).__name__} has no sparsity "
                "coefficient. Leave it out."
            )

    def with_d_vit(self, d_vit: int) -> "Train":
        """The config with d_vit and the defaults of --lr and --dead-window filled in.

        Raises:
            UserError: --sae.d-vit differs from the activations, or too many prefixes for this dictionary.
        """
        if self.sae.d_vit not in (None, d_vit):
            raise errors.UserError(
                f"--sae.d-vit {self.sae.d_vit}: the activations in {self.data.shard_root} are {d_vit} wide. "
                f"Pass --sae.d-vit {d_vit} or leave it out."
            )
        sae, cut = self.sae.sized(d_vit), self.objective
        if isinstance(cut, nn_config.Matryoshka) and cut.n_prefixes > (most := cut.n_possible(sae.n_latents)):
            raise errors.UserError(
                f"--objective.n-prefixes {cut.n_prefixes}: a dictionary of {sae.n_latents} latents has at "
                f"most {most} {cut.prefixes} prefixes. Lower it."
            )
        return dataclasses.replace(self, sae=sae, lr=self.peak_lr, dead_window=self.window)

    @property
    def n_steps(self) -> int:
        return self.n_patches // self.batch_size

    def logs_at(self, step: int) -> bool:
        """Whether metrics are measured at this step. The last step always is."""
        return step % self.log_every == 0 or step == self.n_steps - 1

    def costly_at(self, step: int) -> bool:
        """Whether costly metrics are measured too: at the first log step of each interval, and the last."""
        return self.logs_at(step) and (step % self.costly_every < self.log_every or step == self.n_steps - 1)

    def lr_at(self, step: int) -> float:
        """Linear warm-up, a plateau, then a decay that would reach 0 one step after the last."""
        warm = min(1.0, (step + 1) / max(1, min(self.n_lr_warmup, self.n_steps // 10)))
        n_decay = self.decay_frac * self.n_steps
        left = min(1.0, (self.n_steps - step) / max(1.0, n_decay))
        if self.lr_decay == "constant":
            left = 1.0
        elif self.lr_decay == "cosine":
            left = 0.5 * (1 - math.cos(math.pi * left))
        return self.peak_lr * warm * left

    @property
    def peak_lr(self) -> float:
        """The learning rate between warm-up and decay."""
        if self.lr is not None:
            return self.lr
        return self.sae.default_lr(self.n_steps)

    @property
    def window(self) -> int:
        """--dead-window, or its default."""
        if self.dead_window is not None:
            return self.dead_window
        return min(1_000_000, max(self.batch_size, self.n_patches // 10))

    @property
    def window_warning(self) -> str:
        """A warning if --dead-window is longer than the run, else ""."""
        n = self.n_steps * self.batch_size
        if self.window <= n:
            return ""
        return (
            f"--dead-window {self.window}: is longer than the run ({n} activations), so no latent counts as "
            "dead: AuxK and resampling never act, and dead_frac_window is null. Leave it out or lower it."
        )

    def sparsity_at(self, step: int) -> float:
        """Factor of the sparsity coefficient."""
        return min(1.0, (step + 1) / max(1, self.n_sparsity_warmup))
