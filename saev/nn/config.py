"""Configs of sparse autoencoders: one class per architecture, one per objective. Imports no torch."""

import dataclasses
import typing as tp

import beartype

from saev import errors, fields

T = tp.TypeVar("T", bound="Architecture")

DEFAULT_EXP_FACTOR = 16
AT_LEAST_0, AT_LEAST_1 = "[0, 1e12]", "[1, 1e12]"
MOST_LATENTS = 2**31
"""Latent numbers are 32-bit integers."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Architecture:
    """Fields that every architecture has. A subclass adds its own and their INTERVALS."""

    d_vit: int | None = None
    """Width of the activations. Default: inferred from the shards. If given, it is checked against them."""
    exp_factor: int | None = None
    """Number of latents as a multiple of d_vit. Default: 16, unless d_sae is given."""
    d_sae: int | None = None
    """Number of latents. Default: exp_factor x d_vit. Pass one of the two."""
    normalize: tp.Literal["scale", "per-dim", "none"] = "scale"
    """scale: multiply activations by one factor, saved with the model, so that their mean squared distance
    from their mean is d_vit (ignoring the few with extreme norms). per-dim: divide each dimension by its
    standard deviation (likewise), for ViTs in which a few dimensions hold most of the variance. none: use
    activations as they are."""
    b_dec_init: tp.Literal["mean", "geometric-median", "zero"] = "mean"
    """Initial decoder bias: the mean of the stream's first 65,536 activations (ignoring the few with extreme
    norms), their geometric median (Bricken et al. 2023), or 0."""
    tied_init: bool = True
    """Initialise the encoder as the decoder's transpose (Gao et al. 2024), instead of separately."""
    init: tp.Literal["random", "data"] = fields.later("random")
    """Initial decoder rows. random: random directions. data: directions of activations from their mean,
    blended with random ones (--sae.init-blend)."""
    init_blend: float = fields.later(0.8)
    """Weight of the activation's direction with --sae.init data. The random direction has the rest."""

    EITHER: tp.ClassVar = ("exp_factor", "d_sae")
    """At most one of these fields is set. A typed flag for one replaces a sweep's value of either."""
    KEEPS_CODES: tp.ClassVar[bool] = False
    """Is memory for a batch's dense codes kept between steps?"""
    CODES_IN_STEP: tp.ClassVar[float] = 2
    """Peak memory of a training step, as a multiple of a batch's dense codes."""
    GPU_CODES: tp.ClassVar[float] = 0
    """The same on a GPU. 0: its codes are sparse there."""
    SHARES_CODES: tp.ClassVar[bool] = False
    """Do the activations of a batch compete for its codes?"""
    INTERVALS: tp.ClassVar = {
        **dict.fromkeys(("d_vit", "exp_factor", "d_sae"), AT_LEAST_1),
        "init_blend": "[0, 1]",
    }

    def __post_init__(self) -> None:
        fields.settle(self, "sae.", **self.INTERVALS)
        if self.exp_factor is not None and self.d_sae is not None:
            raise errors.UserError(
                f"--sae.exp-factor {self.exp_factor} and --sae.d-sae {self.d_sae}: both give the "
                "number of latents. Pass only one of them."
            )
        if self.d_vit is not None and self.n_latents >= MOST_LATENTS:
            raise errors.UserError(
                f"{self.n_latents:,} latents of {self.d_vit:,} dimensions: their weights take "
                f"{weight_gb(self):,.0f} GB, and at most {MOST_LATENTS - 1:,} latents are possible. "
                "Lower --sae.exp-factor or --sae.d-sae."
            )
        if (self.d_sae or self.d_vit) and self.n_firing > self.n_latents:
            raise errors.UserError(
                f"--sae.top-k {self.n_firing}: the dictionary has {self.n_latents} latents. "
                "Lower it, or raise --sae.exp-factor (or --sae.d-sae)."
            )

    @property
    def n_latents(self) -> int:
        """d_sae if given, else exp_factor x d_vit.

        Raises:
            ValueError: d_vit is needed and not set.
        """
        if self.d_sae is not None:
            return self.d_sae
        if self.d_vit is None:
            raise ValueError("d_vit must be set")
        return self.d_vit * (DEFAULT_EXP_FACTOR if self.exp_factor is None else self.exp_factor)

    @property
    def n_firing(self) -> int:
        """Latents that fire per activation, where the config decides it; else 0."""
        return 0

    def default_lr(self, n_steps: int) -> float:
        """Adam's learning rate if none is given (measured in logbook 008 and 020)."""
        return 4e-3 * min(1.0, (1000 / n_steps) ** 0.5)

    def sized(self: T, d_vit: int | None = None) -> T:
        """Fills in d_vit and replaces exp_factor by d_sae, so dictionaries of equal size have equal configs.

        Raises:
            ValueError: d_vit is neither given nor set.
            UserError: other fields are out of range for this width.
        """
        cfg = self if d_vit is None else dataclasses.replace(self, d_vit=d_vit)
        if cfg.d_vit is None:
            raise ValueError("d_vit must be set")
        return dataclasses.replace(cfg, exp_factor=None, d_sae=cfg.n_latents)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Relu(Architecture):
    """ReLU with an L1 penalty (Bricken et al. 2023, Towards Monosemanticity). Default learning rate: 4e-4."""

    sparsity_coeff: float = 4e-4
    """Weight of the L1 penalty relative to the mean squared error per dimension. The penalty is the L1 norm
    of a sample's code, each latent times its decoder row's norm."""
    resample_every: int = 0
    """Steps between resamplings of dead latents (Bricken et al. 2023), in the first 80% of training.
    0: never."""

    KEEPS_CODES: tp.ClassVar[bool] = True
    CODES_IN_STEP: tp.ClassVar[float] = 1.3
    GPU_CODES: tp.ClassVar[float] = 3
    INTERVALS = Architecture.INTERVALS | {"sparsity_coeff": AT_LEAST_0, "resample_every": AT_LEAST_0}

    def default_lr(self, n_steps: int) -> float:
        return 4e-4


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class TopK(Architecture):
    """Keeps the k largest pre-activations of each sample (Gao et al. 2024, arXiv 2406.04093). Default
    learning rate: 4e-3, times sqrt(1,000 / steps) in runs of more than 1,000 steps."""

    top_k: int = 32
    """Latents allowed to fire per activation."""
    aux_coeff: float = 1 / 32
    """Weight of the AuxK loss (Gao et al. 2024): dead latents learn to reconstruct the residual. 0: off."""
    aux_k: int = 0
    """Dead latents allowed to fire per activation in the AuxK loss. 0: half of d_vit."""
    keep_negative: bool = False
    """Keep negative values among the k largest, as upstream saev checkpoints do. Otherwise they become 0."""

    INTERVALS = Architecture.INTERVALS | {"top_k": AT_LEAST_1, "aux_coeff": AT_LEAST_0, "aux_k": AT_LEAST_0}

    @property
    def n_firing(self) -> int:
        return self.top_k


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class BatchTopK(Architecture):
    """Keeps the k x B largest pre-activations of a batch; at inference, those above a learned threshold
    (Bussmann et al. 2024, arXiv 2412.06410). Default learning rate: 4e-3, times sqrt(1,000 / steps) in
    runs of more than 1,000 steps."""

    top_k: int = 32
    """Latents allowed to fire per activation, on average over the batch."""
    threshold_momentum: float = 0.02
    """Weight of the newest batch in the threshold, a moving average of each batch's smallest firing value."""
    aux_coeff: float = 1 / 32
    """Weight of the AuxK loss (Gao et al. 2024): dead latents learn to reconstruct the residual. 0: off."""
    aux_k: int = 0
    """Dead latents allowed to fire per activation in the AuxK loss. 0: half of d_vit."""

    INTERVALS = TopK.INTERVALS | {"threshold_momentum": "(0, 1]"}
    SHARES_CODES = True

    @property
    def n_firing(self) -> int:
        return self.top_k


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class JumpRelu(Architecture):
    """A learned threshold per latent, with an L0 penalty (Rajamanoharan et al. 2024, arXiv 2407.14435).
    Default learning rate: 4e-3, times sqrt(1,000 / steps) in runs of more than 1,000 steps."""

    sparsity_coeff: float = 1e-3
    """Weight of L0 (the number of latents that fire) relative to the mean squared error per dimension."""
    bandwidth: float = 0.1
    """Width of the window around the threshold that gives it gradients, in scaled pre-activations."""
    init_threshold: float = 0.0
    """Initial threshold of every latent. 0: sqrt(sparsity_coeff * d_vit), above which firing lowers the loss,
    or lower if fewer than one latent per activation would fire."""

    CODES_IN_STEP: tp.ClassVar[float] = 5.5
    GPU_CODES: tp.ClassVar[float] = 5.5
    INTERVALS = Architecture.INTERVALS | {
        "sparsity_coeff": AT_LEAST_0,
        "bandwidth": "(0, 1e12)",
        "init_threshold": AT_LEAST_0,
    }


def weight_gb(cfg: Architecture) -> float:
    """Returns the size of both float32 weight matrices, in 10^9 bytes."""
    return 8e-9 * tp.cast(int, cfg.d_vit) * cfg.n_latents


Sae = Relu | TopK | BatchTopK | JumpRelu

DEFAULT = BatchTopK

BY_NAME: dict[str, tp.Any] = {cls.__name__: cls for cls in tp.get_args(Sae)}
"""The names of architectures in checkpoint headers."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Vanilla:
    """Minimises the reconstruction error of the whole dictionary."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Matryoshka:
    """Minimises the mean reconstruction error over nested prefixes of the dictionary (Bussmann et al. 2025,
    arXiv 2503.17547)."""

    n_prefixes: int = 10
    """Number of prefixes, including the whole dictionary."""
    prefixes: tp.Literal["fixed", "sampled"] = "sampled"
    """fixed: each prefix is twice as long as the one before. sampled: drawn from a Pareto distribution at
    each step, so short prefixes are more frequent."""

    def __post_init__(self) -> None:
        fields.settle(self, "objective.", n_prefixes=AT_LEAST_1)

    def n_possible(self, d_sae: int) -> int:
        """The number of possible prefixes."""
        return d_sae.bit_length() if self.prefixes == "fixed" else d_sae


Objective = Vanilla | Matryoshka
