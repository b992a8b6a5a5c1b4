"""Figures that a few activations of huge norm (attention sinks, DINOv2's artefacts) do not decide. N activations, D d_vit.

An activation is extreme when it is more than EXTREME times as far from the centre as three quarters of all are; the
others are ordinary. The centre is the mean of the ordinary ones, the radius their root mean squared distance from it.
Where no activation is extreme these are the plain mean and the plain standard deviation (of the vector).
"""

import math
import typing as tp

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

EXTREME = 5.0
"""See above."""
MAX_START = 1024
"""Activations whose coordinates' medians are the first guess of the centre."""
MAX_ROUNDS = 10
BINS_PER_OCTAVE, MAX_OCTAVE = 64, 40
"""The histogram of a token's error goes from 2^-40 to 2^40; a bin's ends are 1.1% apart."""


class Typical(tp.NamedTuple):
    """What ordinary activations are like."""

    centre_D: Float[Tensor, " D"]
    radius: Float[Tensor, ""]
    """Root mean squared distance of the ordinary ones from the centre."""
    limit: Float[Tensor, ""]
    """Activations further than this from the centre are extreme."""


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def typical(x_ND: Float[Tensor, "N D"]) -> Typical:
    """What most of these activations are like, whatever a few others are."""
    centre_D = x_ND[:: math.ceil(len(x_ND) / MAX_START)].median(dim=0).values
    last_N = None
    for _ in range(MAX_ROUNDS):
        distance_N = distance(x_ND, centre_D)
        limit = EXTREME * distance_N.quantile(0.75)
        limit = torch.where(limit > 0, limit, torch.inf)  # most are equal: nothing to measure by
        ordinary_N = distance_N <= limit
        if last_N is not None and torch.equal(ordinary_N, last_N):
            break
        last_N = ordinary_N
        centre_D = ordinary_N.to(x_ND.dtype) @ x_ND / ordinary_N.sum()
    square_N = torch.where(ordinary_N, distance_N, 0.0).double().square()
    return Typical(centre_D, (square_N.sum() / ordinary_N.sum()).sqrt().to(x_ND.dtype), limit)


@jaxtyped(typechecker=beartype.beartype)
def distance(x_ND: Float[Tensor, "N D"], centre_D: Float[Tensor, " D"]) -> Float[Tensor, " N"]:
    """Of each activation, in the memory of N numbers."""
    mode = "donot_use_mm_for_euclid_dist"  # which would lose digits
    return torch.cdist(x_ND, centre_D[None], compute_mode=mode)[:, 0]


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def clip(x_ND: Float[Tensor, "N D"], around: Typical, max_ratio: float) -> Float[Tensor, "N D"]:
    """Moves activations further than `max_ratio` radii from the centre towards it, to that distance. Others stay as they are."""
    distance_N = distance(x_ND, around.centre_D)
    most = max_ratio * around.radius
    far_N = (distance_N > most) & (most > 0)
    if not x_ND.is_cuda and not far_N.any():  # on a GPU nobody waits for the answer
        return x_ND
    factor_N = torch.where(far_N, most / distance_N, 1.0)
    clipped_ND = torch.lerp(around.centre_D, x_ND, factor_N[:, None])
    return torch.where(far_N[:, None], clipped_ND, x_ND)


class Tokens:
    """Quantiles over activations, to within 1.1%, in fixed memory. An activation's error is its squared error divided by the squared radius."""

    @beartype.beartype
    def __init__(self, around: Typical):
        self.around = around
        device = around.centre_D.device
        n_bins = 2 * MAX_OCTAVE * BINS_PER_OCTAVE
        self.n_bin = torch.zeros(n_bins, dtype=torch.int64, device=device)
        self.n_extreme = torch.zeros((), dtype=torch.int64, device=device)
        self.square, self.square_extreme = torch.zeros(2, dtype=torch.float64, device=device)

    @torch.no_grad()
    @jaxtyped(typechecker=beartype.beartype)
    def add(self, x_ND: Float[Tensor, "N D"], x_hat_ND: Float[Tensor, "N D"]) -> None:
        """Activations and their reconstructions."""
        error_N = (x_ND - x_hat_ND).square().sum(dim=1) / self.around.radius.square()
        bin_N = (error_N.log2() + MAX_OCTAVE) * BINS_PER_OCTAVE
        bin_N = bin_N.nan_to_num(nan=torch.inf).clamp(0, len(self.n_bin) - 1).long()
        self.n_bin += torch.bincount(bin_N, minlength=len(self.n_bin))
        distance_N = distance(x_ND, self.around.centre_D)
        extreme_N = distance_N > self.around.limit
        square_N = distance_N.double().square()
        self.n_extreme += extreme_N.sum()
        self.square += square_N.sum()
        self.square_extreme += square_N[extreme_N].sum()

    @beartype.beartype
    def quantile(self, q: float) -> float:
        """Of the errors: the middle of the bin that holds it. 0 below the first bin; NaN where the activations are constant."""
        if self.around.radius <= 1e-6 * self.around.centre_D.norm():  # float32's rounding
            return math.nan
        n_below = self.n_bin.cumsum(0)
        i = int((n_below < max(1, math.ceil(q * int(n_below[-1])))).sum())
        return 2 ** ((i + 0.5) / BINS_PER_OCTAVE - MAX_OCTAVE) if i else 0.0

    def metrics(self) -> dict[str, float]:
        """By the names of the log and of metrics.json."""
        square = self.square.item()
        return {
            "token_nmse_median": self.quantile(0.5),
            "token_nmse_q95": self.quantile(0.95),
            "extreme_pct": 100 * self.n_extreme.item() / max(1, self.n_bin.sum().item()),
            "extreme_variance_pct": 100 * self.square_extreme.item() / square if square else 0.0,
        }
