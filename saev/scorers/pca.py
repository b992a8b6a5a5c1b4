"""Principal components as prototypes. B activations, D d_vit, K components."""

import dataclasses

import beartype
import numpy as np
import torch
from jaxtyping import Float, Float64, jaxtyped
from torch import Tensor

from saev import helpers
from saev.data import activations, ordered
from saev.scorers import base


def fit(acts: activations.Activations, device: torch.device = base.CPU) -> base.Prototypes:
    """Computes all principal components, largest variance first; returned on the CPU.

    There are d_vit of them, or the number of activations minus 1 if that is smaller. Signs are fixed so that
    each component's largest entry by absolute value is positive.
    """
    mean_D, covariance_DD, n = moments(acts, device)
    return base.Prototypes(components(covariance_DD)[: max(1, n - 1)], mean_D.float(), "dot")


def both_signs(scorer: base.Prototypes) -> base.Prototypes:
    """Adds the negative of each component, right after it."""
    both_KD = torch.stack([scorer.direction_KD, -scorer.direction_KD], dim=1).flatten(0, 1)
    return dataclasses.replace(scorer, direction_KD=both_KD)


@jaxtyped(typechecker=beartype.beartype)
def moments(
    acts: activations.Activations, device: torch.device = base.CPU
) -> tuple[Float64[Tensor, " D"], Float64[Tensor, "D D"], int]:
    """Computes mean, covariance (divided by n) and number n in one pass on `device`; returned on the CPU.

    Each block is centred on its own mean, so that the mean costs float32 products no digits. Blocks are
    combined in float64 (Chan, Golub and LeVeque 1983).
    """
    stream = ordered.Ordered(acts)
    d_vit, n = acts.d_vit, 0
    mean_D = torch.zeros(d_vit, dtype=torch.float64, device=device)
    square_DD = torch.zeros(d_vit, d_vit, dtype=torch.float64, device=device)
    for block in helpers.progress(stream, "PCA", len(stream), "blocks"):
        x_BD = torch.from_numpy(stream.rows(block)).to(device)
        B = len(x_BD)
        if not B:
            continue
        own_D = (x_BD.new_ones(B) @ x_BD) / B
        x_BD -= own_D  # no one else uses the block
        square_DD += (x_BD.T @ x_BD).double()
        own_D = own_D.double() + (x_BD.new_ones(B) @ x_BD).double() / B
        away_D = own_D - mean_D
        square_DD.addr_(away_D, away_D, alpha=n * B / (n + B))
        mean_D += away_D * (B / (n + B))
        n += B
    return mean_D.cpu(), (square_DD / n).cpu(), n


@jaxtyped(typechecker=beartype.beartype)
def components(covariance_DD: Float64[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Unit eigenvectors as float32 rows, largest eigenvalue first, signs fixed."""
    vectors_DK = np.linalg.eigh(covariance_DD.numpy()).eigenvectors[:, ::-1]
    largest_K = np.abs(vectors_DK).argmax(axis=0)
    signs_K = np.sign(vectors_DK[largest_K, np.arange(len(largest_K))])
    return torch.from_numpy((vectors_DK * signs_K).T.astype(np.float32).copy())
