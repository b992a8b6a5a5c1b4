"""Principal components as prototypes. B activations, D d_vit, K components."""

import beartype
import numpy as np
import torch
from jaxtyping import Float, Float64, jaxtyped
from torch import Tensor

from saev import helpers
from saev.data import config as data_config
from saev.data import ordered
from saev.scorers import base, config


@beartype.beartype
def fit(
    cfg: config.Pca,
    data: data_config.Shards,
    k: int,
    seed: int,
    device: torch.device = base.CPU,
) -> base.Prototypes:
    """The k leading components (all of them if there are fewer), on the CPU. Exact; `seed` plays no part.

    A component's sign is arbitrary: it is fixed so that its entry of largest size is positive.
    """
    del seed
    mean_D, covariance_DD = moments(data, device)
    vectors_KD = components(covariance_DD)
    if cfg.both_signs:
        vectors_KD = torch.stack([vectors_KD, -vectors_KD], dim=1).flatten(0, 1)
    mean_D = mean_D.float()
    return base.Prototypes(vectors_KD[:k] + mean_D, mean_D, "dot")


@jaxtyped(typechecker=beartype.beartype)
def moments(
    data: data_config.Shards, device: torch.device = base.CPU
) -> tuple[Float64[Tensor, " D"], Float64[Tensor, "D D"]]:
    """Mean and covariance (divided by n) of the stream in one pass; computed on `device`, returned on the CPU.

    Sums are taken about the first block's mean, so that float32 products lose nothing to a large mean.
    """
    stream = ordered.Ordered(data)
    d_vit, shift_D = stream.reader.d_vit, None
    sum_D = torch.zeros(d_vit, dtype=torch.float64, device=device)
    square_DD = torch.zeros(d_vit, d_vit, dtype=torch.float64, device=device)
    for _, acts_NTD in helpers.progress(stream, "PCA", len(stream), "blocks"):
        x_BD = torch.from_numpy(acts_NTD).flatten(0, 1).to(device)
        shift_D = x_BD.mean(dim=0) if shift_D is None else shift_D
        x_BD -= shift_D  # the block is ours
        sum_D += x_BD.new_ones(len(x_BD)) @ x_BD
        square_DD += (x_BD.T @ x_BD).double()
    mean_D = sum_D / len(stream.reader)
    covariance_DD = square_DD / len(stream.reader) - torch.outer(mean_D, mean_D)
    return (mean_D + shift_D.double()).cpu(), covariance_DD.cpu()


@jaxtyped(typechecker=beartype.beartype)
def components(covariance_DD: Float64[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Unit eigenvectors as float32 rows, largest eigenvalue first, signs fixed."""
    vectors_DK = np.linalg.eigh(covariance_DD.numpy()).eigenvectors[:, ::-1]
    largest_K = np.abs(vectors_DK).argmax(axis=0)
    signs_K = np.sign(vectors_DK[largest_K, np.arange(len(largest_K))])
    return torch.from_numpy((vectors_DK * signs_K).T.astype(np.float32).copy())
