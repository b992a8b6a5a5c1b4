"""The nine metrics of a training step, and some others. docs/metrics.md has their fixed names and formulas.

Shape letters: B batch, D d_vit, S latents, C latents in a sample.
"""

import dataclasses
import math

import beartype
import torch
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

EPS_ACTIVE = 1e-8
"""A latent fires when |f| is above this."""
CHUNK = 1024
"""Latents per block of an S x S product, which is never in memory as a whole."""
MAX_CORR_LATENTS = 2048
"""An evaluation correlates at most this many latents: a seeded sample if there are more."""


@jaxtyped(typechecker=beartype.beartype)
def mse(x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"]) -> float:
    """Squared error in raw units, averaged over batch and dimensions."""
    return (x_BD - x_hat_BD).square().mean().item()


@jaxtyped(typechecker=beartype.beartype)
def explained_variance(x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"]) -> float:
    """1 - Var(x_hat - x) / Var(x), with Var over all elements of the batch. NaN if they are all equal."""
    if bool((x_BD == x_BD[0, 0]).all()):
        return math.nan
    return (1 - (x_hat_BD - x_BD).var(correction=0) / x_BD.var(correction=0)).item()


@jaxtyped(typechecker=beartype.beartype)
def explained_variance_per_dim(x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"]) -> float:
    """As `explained_variance`, but Var is taken per dimension over the batch and summed over dimensions.

    So differences between the dimensions' means do not count as variance.
    """
    if _is_constant(x_BD):
        return math.nan
    residual = (x_hat_BD - x_BD).var(dim=0, correction=0).sum()
    return (1 - residual / x_BD.var(dim=0, correction=0).sum()).item()


@jaxtyped(typechecker=beartype.beartype)
def normalized_mse(x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"]) -> float:
    """Squared error divided by the squared error of predicting the batch's mean. NaN if x is constant."""
    if _is_constant(x_BD):
        return math.nan
    baseline = (x_BD - x_BD.mean(dim=0)).square().sum()
    return ((x_BD - x_hat_BD).square().sum() / baseline).item()


def _is_constant(x_BD: Tensor) -> bool:
    """Compares values, because rounding may give equal values a variance above 0."""
    return bool((x_BD == x_BD[:1]).all())


@jaxtyped(typechecker=beartype.beartype)
def l0(f_BS: Float[Tensor, "B S"]) -> float:
    """Fraction of (sample, latent) pairs that fire."""
    return (f_BS.abs() > EPS_ACTIVE).float().mean().item()


@jaxtyped(typechecker=beartype.beartype)
def l1(f_BS: Float[Tensor, "B S"]) -> float:
    """Mean of |f| over batch and latents."""
    return f_BS.abs().mean().item()


@jaxtyped(typechecker=beartype.beartype)
def dead_pct(fired_S: Bool[Tensor, " S"]) -> float:
    """Fraction (0 to 1, despite its name) of latents that did not fire in the batch."""
    return (~fired_S).double().mean().item()


@jaxtyped(typechecker=beartype.beartype)
def dead_frac_window(tokens_since_fired_S: Int[Tensor, " S"], window: int, n_seen: int) -> float:
    """Fraction of latents that did not fire in the last `window` activations. NaN before that many."""
    if n_seen < window:
        return math.nan
    return (tokens_since_fired_S >= window).double().mean().item()


@jaxtyped(typechecker=beartype.beartype)
def mean_abs_corr(f_BS: Float[Tensor, "B S"]) -> float:
    """Mean |Pearson correlation| over pairs of different latents. A constant latent counts 0, never NaN.

    Exact; needs memory for another f_BS and a few CHUNK x S products. 0 for a single latent.
    """
    S = f_BS.shape[1]
    if S < 2:
        return 0.0
    z_BS = f_BS - f_BS.mean(dim=0)
    largest_S = torch.maximum(z_BS.amax(dim=0), -z_BS.amin(dim=0))
    # Centring a constant latent leaves rounding noise, so these are set to exact zeros.
    constant_S = (f_BS.amax(dim=0) == f_BS.amin(dim=0)) | (largest_S == 0)
    # Dividing by the largest value first keeps squares from over- or underflowing.
    z_BS /= torch.where(constant_S, 1.0, largest_S)
    z_BS.masked_fill_(constant_S, 0.0)
    z_BS /= torch.linalg.vector_norm(z_BS, dim=0).clamp(min=1e-12)
    total = torch.zeros((), dtype=torch.float64, device=f_BS.device)
    for z_BC in z_BS.split(CHUNK, dim=1):
        total += (z_BC.T @ z_BS).abs_().sum(dtype=torch.float64)
    diagonal = (~constant_S).sum()
    return ((total - diagonal).clamp(min=0) / (S * (S - 1))).item()


class CorrelationSums:
    """Computes `mean_abs_corr` over many batches, for all latents or a seeded sample of MAX_CORR_LATENTS."""

    def __init__(self, n_latents: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        drawn_C = torch.randperm(n_latents, generator=generator)[:MAX_CORR_LATENTS]
        self.latent_C = drawn_C.sort().values.to(device)
        n_C = len(self.latent_C)
        self.n = 0
        self.zz_CC = torch.zeros(n_C, n_C, dtype=torch.float64, device=device)
        self.z_C = torch.zeros(n_C, dtype=torch.float64, device=device)
        self.is_constant_C = torch.ones(n_C, dtype=torch.bool, device=device)

    @jaxtyped(typechecker=beartype.beartype)
    def add(self, f_BS: Float[Tensor, "B S"]) -> None:
        self.add_columns(f_BS[:, self.latent_C])

    @jaxtyped(typechecker=beartype.beartype)
    def add_columns(self, f_BC: Float[Tensor, "B C"]) -> None:
        """Adds the codes of the latents `latent_C` alone."""
        if self.n == 0:  # sums of values near their mean lose fewer digits
            self.shift_C = f_BC.mean(dim=0)
            self.first_C = f_BC[0].clone()
        self.n += len(f_BC)
        self.is_constant_C &= (f_BC == self.first_C).all(dim=0)
        z_BC = f_BC - self.shift_C
        self.zz_CC += z_BC.T @ z_BC
        self.z_C += z_BC.sum(dim=0, dtype=torch.float64)

    def mean_abs_corr(self) -> float:
        """Mean |Pearson correlation| over pairs of these latents. A constant latent counts 0."""
        n_C = len(self.z_C)
        if n_C < 2:
            return 0.0
        cov_CC = self.zz_CC - torch.outer(self.z_C, self.z_C / self.n)
        var_C = cov_CC.diagonal().clone()
        is_constant_C = self.is_constant_C | (var_C <= 0)
        inverse_C = torch.where(is_constant_C, 0.0, var_C.clamp(min=1e-300).rsqrt())
        corr_CC = cov_CC.mul_(inverse_C).mul_(inverse_C[:, None]).abs_().clamp_(max=1)
        corr_CC.fill_diagonal_(0)
        return (corr_CC.sum() / (n_C * (n_C - 1))).item()


@jaxtyped(typechecker=beartype.beartype)
def coherence(W_dec: Float[Tensor, "S D"]) -> float:
    """Largest |cos| between two decoder rows. Exact, in O(CHUNK x S) memory. 0 for a single latent."""
    unit_SD = torch.nn.functional.normalize(W_dec, dim=1)
    largest = 0.0
    for start in range(0, len(unit_SD), CHUNK):
        cos_CS = (unit_SD[start : start + CHUNK] @ unit_SD.T).abs()
        cos_CS.diagonal(offset=start).zero_()
        largest = max(largest, cos_CS.max().item())
    return largest


@jaxtyped(typechecker=beartype.beartype)
def avg_w_col_norm(W_dec: Float[Tensor, "S D"]) -> float:
    """Mean L2 norm of the decoder rows (columns, in the usual convention x = W f)."""
    return torch.linalg.vector_norm(W_dec, dim=1).mean().item()


@dataclasses.dataclass(frozen=True)
class CodeSums:
    """Sums over a batch's codes that the metrics need."""

    n_fired: Int[Tensor, ""]
    """How many codes fire."""
    l1: Float[Tensor, ""]
    """The sum of |f|."""

    @classmethod
    def of(cls, values: Float[Tensor, "..."]) -> "CodeSums":
        """Sums of codes of any shape. Zeros may be omitted."""
        size = values.abs()
        return cls((size > EPS_ACTIVE).count_nonzero(), size.sum())  # a sum would convert to int64

    def __add__(self, other: "CodeSums") -> "CodeSums":
        return CodeSums(self.n_fired + other.n_fired, self.l1 + other.l1)


@jaxtyped(typechecker=beartype.beartype)
def measure(
    x_BD: Float[Tensor, "B D"],
    x_hat_BD: Float[Tensor, "B D"],
    codes: Float[Tensor, "..."] | CodeSums,
    n_latents: int,
) -> dict[str, float]:
    """The metrics that cost little compared with a step, by name.

    Args:
        codes: values of the batch's codes, of any shape, where zeros may be omitted; or their sums.
    """
    sums = codes if isinstance(codes, CodeSums) else CodeSums.of(codes)
    n_B = len(x_BD)
    l0_count = sums.n_fired.item() / n_B
    return {
        "mse": mse(x_BD, x_hat_BD),
        "normalized_mse": normalized_mse(x_BD, x_hat_BD),
        "explained_variance": explained_variance(x_BD, x_hat_BD),
        "explained_variance_per_dim": explained_variance_per_dim(x_BD, x_hat_BD),
        "l0": l0_count / n_latents,
        "l0_count": l0_count,
        "l1": sums.l1.item() / (n_B * n_latents),
    }


@jaxtyped(typechecker=beartype.beartype)
def costly(codes: Float[Tensor, "B S"] | CorrelationSums, W_dec: Float[Tensor, "S D"]) -> dict[str, float]:
    """The metrics that cost S^2, by name. Codes may be sums over some latents' codes."""
    is_sums = isinstance(codes, CorrelationSums)
    correlation = codes.mean_abs_corr() if is_sums else mean_abs_corr(codes)
    return {"mean_abs_corr": correlation, "coherence": coherence(W_dec)}
