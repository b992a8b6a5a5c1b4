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
        most = torch.finfo(limit.dtype).max  # most are equal: nothing to measure by
        limit = torch.where(limit > 0, limit, most)
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
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    @jaxtyped(typechecker=beartype.beartype)
    def add(self, x_ND: Float[Tensor, "N D"], error_ND: Float[Tensor, "N D"]) -> None:
        """Activations and the errors of their reconstructions."""
        error_N = error_ND.square().sum(dim=1) / self.around.radius.square()
        bin_N = (error_N.log2() + MAX_OCTAVE) * BINS_PER_OCTAVE
        bin_N = bin_N.nan_to_num(nan=torch.inf).clamp(0, len(self.n_bin) - 1).long()
        self.n_bin += torch.bincount(bin_N, minlength=len(self.n_bin))
        self.totals += totals(x_ND, self.around)

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
        return {
            "token_nmse_median": self.quantile(0.5),
            "token_nmse_q95": self.quantile(0.95),
            **shares(self.totals),
        }


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def totals(x_ND: Float[Tensor, "N D"], around: Typical) -> Float[Tensor, " 4"]:
    """Activations, squared distances from the centre, and both of the extreme ones alone."""
    distance_N = distance(x_ND, around.centre_D)
    each_2N = torch.stack([torch.ones_like(distance_N), distance_N]).double().square()
    return torch.cat([each_2N.sum(dim=1), each_2N[:, distance_N > around.limit].sum(dim=1)])


@beartype.beartype
def shares(totals_4: Tensor) -> dict[str, float]:
    """How many activations are extreme, and how much of the squared distances they hold, as fractions."""
    n, square, n_extreme, square_extreme = totals_4.tolist()
    return {
        "extreme_frac": n_extreme / n if n else 0.0,
        "extreme_variance_frac": square_extreme / square if square else 0.0,
    }


@beartype.beartype
def metrics(
    x_ND: Float[Tensor, "N D"], error_ND: Float[Tensor, "N D"], around: Typical | None = None
) -> dict[str, float]:
    """Those of `Tokens`, of one batch. around: None: of the batch itself."""
    tokens = Tokens(around or typical(x_ND))
    tokens.add(x_ND, error_ND)
    return tokens.metrics()
