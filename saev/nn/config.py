"""Configs of sparse autoencoders: one class per architecture. Imports no torch."""

import dataclasses
import typing as tp

import beartype

from saev import errors


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Architecture:
    """What every sparse autoencoder has."""

    d_vit: int | None = None
    """Width of the activations. Left out: inferred from the shards. Given: checked against them."""
    exp_factor: int = 16
    """Dictionary size d_sae as a multiple of d_vit."""

    def __post_init__(self) -> None:
        if self.exp_factor < 1:
            raise errors.UserError(f"--sae.exp-factor {self.exp_factor}: must be at least 1.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Relu(Architecture):
    """ReLU with an L1 penalty (Bricken et al. 2023, Towards Monosemanticity)."""

    sparsity_coeff: float = 4e-4
    """Weight of the L1 norm of a sample's code against the mean squared error per dimension."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity_coeff < 0:
            raise errors.UserError(
                f"--sae.sparsity-coeff {self.sparsity_coeff}: must not be negative."
            )


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class TopK(Architecture):
    """Keeps the k largest pre-activations of each sample (Gao et al. 2024, arXiv 2406.04093)."""

    top_k: int = 32
    """Latents allowed to fire per activation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_top_k(self.top_k)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class BatchTopK(Architecture):
    """Keeps the k x B largest pre-activations of a batch; a learned threshold at inference (Bussmann et al. 2024, arXiv 2412.06410)."""

    top_k: int = 32
    """Latents allowed to fire per activation, on average over the batch."""
    threshold_momentum: float = 0.02
    """Step of the moving average of the smallest firing value, which is the threshold at inference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_top_k(self.top_k)
        if not 0 < self.threshold_momentum <= 1:
            raise errors.UserError(
                f"--sae.threshold-momentum {self.threshold_momentum}: must be in (0, 1]."
            )


def _check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise errors.UserError(f"--sae.top-k {top_k}: must be at least 1.")


Sae = Relu | TopK | BatchTopK

BY_NAME: dict[str, tp.Any] = {cls.__name__: cls for cls in (Relu, TopK, BatchTopK)}
"""What a checkpoint's header may name."""
