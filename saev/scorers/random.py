"""Random activations as prototypes: the baseline that every other scorer has to beat."""

import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Float32, jaxtyped

from saev import errors, helpers
from saev.data import config as data_config
from saev.data import ordered
from saev.scorers import base, config


class Sample(tp.NamedTuple):
    """A uniform sample of a stream, in random order, and the mean of the whole stream."""

    acts_KD: Float32[np.ndarray, "K D"]
    mean_D: Float32[np.ndarray, " D"]


@beartype.beartype
def fit(
    cfg: config.Random,
    data: data_config.Shards,
    k: int,
    seed: int,
    device: torch.device = base.CPU,
) -> base.Prototypes:
    """Draws k activations. With one seed, the first k of a larger draw are the draw of k. `device` plays no part.

    Raises:
        UserError: bad shards, or fewer activations than k.
    """
    del device
    sample = reservoir(data, k, seed)
    if len(sample.acts_KD) < k:
        raise errors.UserError(
            f"{data.shard_root}: holds {len(sample.acts_KD)} activations, fewer than {k} prototypes. Lower --n-prototypes."
        )
    return base.Prototypes(
        torch.from_numpy(sample.acts_KD), torch.from_numpy(sample.mean_D), cfg.similarity
    )


@jaxtyped(typechecker=beartype.beartype)
def reservoir(data: data_config.Shards, k: int, seed: int) -> Sample:
    """Uniform sample without replacement of min(k, stream) activations in one pass, O(k) memory.

    Each activation gets a random key and the k smallest keys stay (bottom-k sampling, Cohen and Kaplan 2007),
    sorted by key: so samples of different size are nested.
    """
    stream = ordered.Ordered(data)
    rng = np.random.default_rng((seed, 0xACE))
    d_vit = stream.reader.d_vit
    key_K, acts_KD = np.empty(0), np.empty((0, d_vit), np.float32)
    total_D = np.zeros(d_vit, np.float64)
    for _, acts_NTD in helpers.progress(stream, "sample", len(stream), "blocks"):
        acts_BD = acts_NTD.reshape(-1, d_vit)
        total_D += acts_BD.sum(axis=0, dtype=np.float64)
        key_B = rng.random(len(acts_BD))
        bound = key_K[-1] if len(key_K) == k else np.inf
        fresh = np.flatnonzero(key_B < bound)
        key_K, acts_KD = (
            np.concatenate([key_K, key_B[fresh]]),
            np.concatenate([acts_KD, acts_BD[fresh]]),
        )
        keep = np.argsort(key_K, kind="stable")[:k]
        key_K, acts_KD = key_K[keep], acts_KD[keep]
    return Sample(acts_KD, (total_D / len(stream.reader)).astype(np.float32))
