"""Statistics that are robust to a few extreme activations (attention sinks, DINOv2 artefacts).

An activation is extreme if its distance from the centre is more than EXTREME times the 75% quantile of all
distances. All others are ordinary. The centre is the mean of the ordinary activations. The radius is their
root mean squared distance from it. If no activation is extreme, these are the plain mean and the standard
deviation of the vectors.

Shape letters: N activations, D d_vit.
"""

import math
import typing as tp

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

EXTREME = 5.0
"""Distance at which an activation is extreme, as a multiple of the 75% quantile."""
MAX_START = 1024
"""The first guess of the centre is the per-dimension median of at most this many activations."""
MAX_ROUNDS = 10
QUARTILES = 1.349
"""Distance between a normal distribution's quartiles, in standard deviations."""
ROUNDING = 1e-6
"""Values that differ by at most this fraction of their mean are equal but for rounding in float32."""
CHUNK = 8192
"""Activations that are summed in float64 at a time."""
BINS_PER_OCTAVE, MAX_OCTAVE = 64, 40
"""The histogram of token errors covers 2^-40 to 2^40; a bin is 1.1% wide."""


class Typical(tp.NamedTuple):
    """Centre and spread of the ordinary activations."""

    centre_D: Float[Tensor, " D"]
    radius: Float[Tensor, ""]
    """Root mean squared distance of ordinary activations from the centre."""
    limit: Float[Tensor, ""]
    """Activations farther than this from the centre are extreme."""


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def typical(x_ND: Float[Tensor, "N D"]) -> Typical:
    """Estimates centre, radius and limit by alternating between the ordinary activations and their mean."""
    centre_D = x_ND[:: math.ceil(len(x_ND) / MAX_START)].median(dim=0).values
    last_N = None
    for _ in range(MAX_ROUNDS):
        distance_N = distance(x_ND, centre_D)
        limit = EXTREME * distance_N.quantile(0.75)
        # If most activations are equal, none is extreme.
        limit = torch.where(limit > 0, limit, torch.finfo(limit.dtype).max)
        ordinary_N = distance_N <= limit
        if last_N is not None and torch.equal(ordinary_N, last_N):
            break
        last_N = ordinary_N
        centre_D = ordinary_N.to(x_ND.dtype) @ x_ND / ordinary_N.sum()
    square_N = torch.where(ordinary_N, distance_N, 0.0).double().square()
    return Typical(centre_D, (square_N.sum() / ordinary_N.sum()).sqrt().to(x_ND.dtype), limit)


class Dimensions(tp.NamedTuple):
    """Centre and spread of the ordinary activations, for each dimension alone."""

    centre_D: Float[Tensor, " D"]
    deviation_D: Float[Tensor, " D"]
    """Standard deviation; 0 for a dimension that is constant but for rounding, or for denormal numbers."""


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def by_dimension(x_ND: Float[Tensor, "N D"]) -> Dimensions:
    """Estimates each dimension's mean and standard deviation over the ordinary activations.

    Distances that say which are ordinary are in units of the deviations, so that a dimension with large
    deviations does not hide activations that are extreme in the others. The first guess of a deviation is a
    normal distribution's, from the quartiles.
    """
    few_MD = x_ND[:: math.ceil(len(x_ND) / MAX_START)]
    quartiles_2D = few_MD.quantile(torch.tensor([0.25, 0.75], device=x_ND.device, dtype=x_ND.dtype), dim=0)
    guess_D = (quartiles_2D[1] - quartiles_2D[0]) / QUARTILES
    guess_D = torch.where(guess_D > 0, guess_D, few_MD.std(dim=0, correction=0))  # mostly one value
    unit_D, last_N = _units(guess_D), None
    found = Dimensions(guess_D, guess_D)
    for _ in range(MAX_ROUNDS):
        scaled_ND = x_ND * unit_D
        around = typical(scaled_ND)
        ordinary_N = distance(scaled_ND, around.centre_D) <= around.limit
        if last_N is not None and torch.equal(ordinary_N, last_N):
            break
        last_N = ordinary_N
        found = _moments(x_ND, ordinary_N)
        unit_D = _units(found.deviation_D)
    return found


def _units(deviation_D: Tensor) -> Tensor:
    """1 / deviation; 0 for one that is 0, or so small that this is infinite."""
    return (1 / deviation_D).nan_to_num(posinf=0)


def _moments(x_ND: Tensor, ordinary_N: Tensor) -> Dimensions:
    """Mean and deviation of each dimension over the ordinary activations, summed in float64."""
    shift_D = x_ND[ordinary_N.nonzero()[0, 0]].double()
    sum_D, square_D, n = torch.zeros_like(shift_D), torch.zeros_like(shift_D), ordinary_N.sum()
    for x_CD, ordinary_C in zip(x_ND.split(CHUNK), ordinary_N.split(CHUNK), strict=True):
        shifted_CD = x_CD[ordinary_C].double() - shift_D
        sum_D += shifted_CD.sum(dim=0)
        square_D += shifted_CD.square().sum(dim=0)
    centre_D = shift_D + sum_D / n
    deviation_D = (square_D / n - (sum_D / n).square()).clamp(min=0).sqrt()
    is_constant_D = deviation_D <= (ROUNDING * centre_D.abs()).clamp(min=torch.finfo(x_ND.dtype).tiny)
    return Dimensions(centre_D.to(x_ND), deviation_D.masked_fill(is_constant_D, 0).to(x_ND))


@jaxtyped(typechecker=beartype.beartype)
def distance(x_ND: Float[Tensor, "N D"], centre_D: Float[Tensor, " D"]) -> Float[Tensor, " N"]:
    """Distance of each activation from the centre. Needs no (N, D) temporary."""
    mode = "donot_use_mm_for_euclid_dist"  # the product would lose digits
    return torch.cdist(x_ND, centre_D[None], compute_mode=mode)[:, 0]


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def clip(x_ND: Float[Tensor, "N D"], around: Typical, max_ratio: float) -> Float[Tensor, "N D"]:
    """Moves activations farther than max_ratio radii from the centre to that distance; keeps all others."""
    distance_N = distance(x_ND, around.centre_D)
    max_distance = max_ratio * around.radius
    far_N = (distance_N > max_distance) & (max_distance > 0)
    if not x_ND.is_cuda and not far_N.any():  # not on a GPU, where this would wait
        return x_ND
    factor_N = torch.where(far_N, max_distance / distance_N, 1.0)
    clipped_ND = torch.lerp(around.centre_D, x_ND, factor_N[:, None])
    return torch.where(far_N[:, None], clipped_ND, x_ND)


class Tokens:
    """Quantiles of the error over activations, accurate to 1.1%, in fixed memory.

    An activation's error is its squared error divided by the squared radius.
    """

    def __init__(self, around: Typical):
        self.around = around
        device = around.centre_D.device
        n_bins = 2 * MAX_OCTAVE * BINS_PER_OCTAVE
        self.n_bin = torch.zeros(n_bins, dtype=torch.int64, device=device)
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    @jaxtyped(typechecker=beartype.beartype)
    def add(self, x_ND: Float[Tensor, "N D"], error_ND: Float[Tensor, "N D"]) -> None:
        """Adds activations and the errors of their reconstructions."""
        error_N = error_ND.square().sum(dim=1) / self.around.radius.square()
        bin_N = (error_N.log2() + MAX_OCTAVE) * BINS_PER_OCTAVE
        bin_N = bin_N.nan_to_num(nan=torch.inf).clamp(0, len(self.n_bin) - 1).long()
        self.n_bin += torch.bincount(bin_N, minlength=len(self.n_bin))
        self.totals += totals(x_ND, self.around)

    def quantile(self, q: float) -> float:
        """The quantile's bin centre. 0 below the first bin; NaN if the activations are constant."""
        if self.around.radius <= ROUNDING * self.around.centre_D.norm():
            return math.nan
        n_below = self.n_bin.cumsum(0)
        i = int((n_below < max(1, math.ceil(q * int(n_below[-1])))).sum())
        return 2 ** ((i + 0.5) / BINS_PER_OCTAVE - MAX_OCTAVE) if i else 0.0

    def metrics(self) -> dict[str, float]:
        """The metrics, by their names in metrics.jsonl and metrics.json."""
        quantiles = {"token_nmse_median": self.quantile(0.5), "token_nmse_q95": self.quantile(0.95)}
        return quantiles | shares(self.totals)


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def totals(x_ND: Float[Tensor, "N D"], around: Typical) -> Float[Tensor, " 4"]:
    """Number and summed squared distances from the centre: of all activations, then of the extreme ones."""
    distance_N = distance(x_ND, around.centre_D)
    each_2N = torch.stack([torch.ones_like(distance_N), distance_N]).double().square()
    return torch.cat([each_2N.sum(dim=1), each_2N[:, distance_N > around.limit].sum(dim=1)])


def shares(totals_4: Tensor) -> dict[str, float]:
    """Extreme activations as a fraction of all, and their share of the summed squared distances."""
    n, square, n_extreme, square_extreme = totals_4.tolist()
    return {
        "extreme_frac": n_extreme / n if n else 0.0,
        "extreme_variance_frac": square_extreme / square if square else 0.0,
    }


@beartype.beartype
def metrics(x_ND: Float[Tensor, "N D"], error_ND: Float[Tensor, "N D"]) -> dict[str, float]:
    """`Tokens.metrics` of one batch, around its own centre."""
    tokens = Tokens(typical(x_ND))
    tokens.add(x_ND, error_ND)
    return tokens.metrics()
