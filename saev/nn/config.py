"""Configs of sparse autoencoders: one class per architecture, one per objective. Imports no torch."""

import dataclasses
import typing as tp

import beartype

from saev import errors

T = tp.TypeVar("T", bound="Architecture")

DEFAULT_EXP_FACTOR = 16
MOST_LATENTS = 2**31
"""Latents are numbered in 32 bits."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Architecture:
    """What every sparse autoencoder has."""

    d_vit: int | None = None
    """Width of the activations. Left out: inferred from the shards. Given: checked against them."""
    exp_factor: int | None = None
    """Number of latents as a multiple of d_vit. Left out: 16, or whatever d_sae gives."""
    d_sae: int | None = None
    """Number of latents, any number. Left out: exp_factor x d_vit. Give one of the two."""
    normalize: tp.Literal["scale", "none"] = "scale"
    """scale: activations are multiplied so that their mean squared distance from their mean is d_vit, a few of huge norm left out (saved with the model). none: taken as they are."""
    b_dec_init: tp.Literal["mean", "geometric-median", "zero"] = "mean"
    """Where the decoder's bias starts: the mean of the stream's first 65,536 activations, a few of huge norm left out; their geometric median (Bricken et al. 2023); or 0."""
    tied_init: bool = True
    """Start the encoder as the decoder's transpose (Gao et al. 2024); else with a draw of its own."""

    EITHER: tp.ClassVar = ("exp_factor", "d_sae")
    """Fields of which one is given: a typed flag of either replaces a sweep's value of both."""
    KEEPS_CODES: tp.ClassVar[bool] = False
    """Is a batch's dense code kept from step to step?"""
    CODES_IN_STEP: tp.ClassVar[float] = 2
    """Memory of a training step, in dense codes of a batch."""

    def __post_init__(self) -> None:
        for name in ("d_vit", "exp_factor", "d_sae"):
            if getattr(self, name) is not None:
                _at_least(1, self, name)
        if self.exp_factor is not None and self.d_sae is not None:
            raise errors.UserError(
                f"--sae.exp-factor {self.exp_factor} and --sae.d-sae {self.d_sae}: both give the number of latents. Drop one of them."
            )
        if self.d_vit is not None and self.n_latents >= MOST_LATENTS:
            raise errors.UserError(
                f"{self.n_latents:,} latents of {self.d_vit:,} dimensions: their weights take {weight_gb(self):,.0f} GB, "
                f"and at most {MOST_LATENTS - 1:,} latents can be numbered. Lower --sae.exp-factor or --sae.d-sae."
            )

    @property
    def n_latents(self) -> int:
        """d_sae, given or by exp_factor.

        Raises:
            ValueError: it depends on d_vit, which is not known yet.
        """
        if self.d_sae is not None:
            return self.d_sae
        if self.d_vit is None:
            raise ValueError("d_vit must be set")
        return self.d_vit * (DEFAULT_EXP_FACTOR if self.exp_factor is None else self.exp_factor)

    def default_lr(self, n_steps: int) -> float:
        """Adam's learning rate where none is given (logbook 008 and 020)."""
        return 4e-3 * min(1.0, (1000 / n_steps) ** 0.5)

    def sized(self: T, d_vit: int | None = None) -> T:
        """The same with d_vit filled in and the number of latents given by d_sae: equal dictionaries have equal configs.

        Raises:
            ValueError: d_vit is neither given nor known.
            UserError: it does not fit this width.
        """
        cfg = self if d_vit is None else dataclasses.replace(self, d_vit=d_vit)
        if cfg.d_vit is None:
            raise ValueError("d_vit must be set")
        return dataclasses.replace(cfg, exp_factor=None, d_sae=cfg.n_latents)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Relu(Architecture):
    """ReLU with an L1 penalty (Bricken et al. 2023, Towards Monosemanticity)."""

    sparsity_coeff: float = 4e-4
    """Weight of the L1 norm of a sample's code (each latent times its decoder row's norm) against the mean squared error per dimension."""
    resample_every: int = 0
    """Steps between resamplings of dead latents (Bricken et al. 2023); 0: never. None happens in the last fifth of training."""

    KEEPS_CODES: tp.ClassVar[bool] = True
    CODES_IN_STEP: tp.ClassVar[float] = 1.3

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(0, self, "sparsity_coeff")
        _at_least(0, self, "resample_every")

    def default_lr(self, n_steps: int) -> float:
        return 4e-4


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class TopK(Architecture):
    """Keeps the k largest pre-activations of each sample (Gao et al. 2024, arXiv 2406.04093)."""

    top_k: int = 32
    """Latents allowed to fire per activation."""
    aux_coeff: float = 1 / 32
    """Weight of the AuxK loss (Gao et al. 2024), by which dead latents learn to reconstruct what the others miss. 0: none."""
    aux_k: int = 0
    """Dead latents allowed to fire per activation in the AuxK loss. 0: half of d_vit."""
    keep_negative: bool = False
    """Keep negative values among the k largest, as checkpoints of the field's existing toolkit do. Off: they become 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_top_k(self)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class BatchTopK(Architecture):
    """Keeps the k x B largest pre-activations of a batch; a learned threshold at inference (Bussmann et al. 2024, arXiv 2412.06410)."""

    top_k: int = 32
    """Latents allowed to fire per activation, on average over the batch."""
    threshold_momentum: float = 0.02
    """Step of the moving average of the smallest firing value, which is the threshold at inference."""
    aux_coeff: float = 1 / 32
    """See sae:top-k."""
    aux_k: int = 0
    """See sae:top-k."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_top_k(self)
        if not 0 < self.threshold_momentum <= 1:
            raise errors.UserError(
                f"--sae.threshold-momentum {self.threshold_momentum}: must be in (0, 1]."
            )


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class JumpRelu(Architecture):
    """A learned threshold for each latent, with an L0 penalty (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

    sparsity_coeff: float = 1e-3
    """Weight of L0 (the number of latents that fire) against the mean squared error per dimension."""
    bandwidth: float = 0.1
    """Width of the window about the threshold in which gradients reach it, in units of the (scaled) pre-activations."""
    init_threshold: float = 0.0
    """Every latent's threshold at the start. 0: sqrt(sparsity_coeff * d_vit), from where a latent's firing lowers the loss, but at most so high that one latent fires per activation."""

    CODES_IN_STEP: tp.ClassVar[float] = 5.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(0, self, "sparsity_coeff")
        _at_least(0, self, "init_threshold")
        if not 0 < self.bandwidth < 10**12:
            raise errors.UserError(
                f"--sae.bandwidth {self.bandwidth}: must be more than 0 and below 1e12."
            )


def weight_gb(cfg: Architecture) -> float:
    """Size of both weight matrices in float32, 10^9 bytes."""
    return 8e-9 * tp.cast(int, cfg.d_vit) * cfg.n_latents


def _check_top_k(cfg: TopK | BatchTopK) -> None:
    _at_least(1, cfg, "top_k")
    _at_least(0, cfg, "aux_coeff")
    _at_least(0, cfg, "aux_k")
    is_known = cfg.d_sae is not None or cfg.d_vit is not None
    if is_known and cfg.top_k > cfg.n_latents:
        raise errors.UserError(
            f"--sae.top-k {cfg.top_k}: the dictionary has {cfg.n_latents} latents. Lower it or raise --sae.exp-factor (or --sae.d-sae)."
        )


def _at_least(least: int, cfg: object, name: str) -> None:
    value = getattr(cfg, name)
    if not least <= value <= MOST:  # so that NaN is refused too
        wanted = f"must be at least {least} and at most {MOST:,}"
        raise errors.UserError(f"{_flag(name)} {value}: {wanted}.")


def _flag(name: str) -> str:
    return f"--sae.{name.replace('_', '-')}"


MOST = 10**12
"""Of any number here."""

Sae = Relu | TopK | BatchTopK | JumpRelu

DEFAULT = BatchTopK

BY_NAME: dict[str, tp.Any] = {cls.__name__: cls for cls in tp.get_args(Sae)}
"""What a checkpoint's header may name."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Vanilla:
    """The reconstruction error of the whole dictionary."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Matryoshka:
    """The mean reconstruction error of nested prefixes of the dictionary (Bussmann et al. 2025, arXiv 2503.17547)."""

    n_prefixes: int = 10
    """Prefixes, the whole dictionary among them."""
    prefixes: tp.Literal["fixed", "sampled"] = "sampled"
    """fixed: each is twice as long as the one before. sampled: drawn anew at each step, short ones more often (a Pareto distribution)."""

    def __post_init__(self) -> None:
        if not 1 <= self.n_prefixes <= MOST:
            raise errors.UserError(
                f"--objective.n-prefixes {self.n_prefixes}: must be at least 1 and at most {MOST:,}."
            )

    def most(self, d_sae: int) -> int:
        """The number of different prefixes that a dictionary has."""
        return d_sae.bit_length() if self.prefixes == "fixed" else d_sae


Objective = Vanilla | Matryoshka
