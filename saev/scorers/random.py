"""Random activations as prototypes: the baseline. B activations, D d_vit, K drawn, R in memory."""

import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Float32, jaxtyped

from saev import errors, helpers
from saev.data import activations, ordered
from saev.scorers import base, config


class Sample(tp.NamedTuple):
    """A uniform sample of activations in random order, and the mean of all activations."""

    acts_KD: Float32[np.ndarray, "K D"]
    mean_D: Float32[np.ndarray, " D"]


def fit(acts: activations.Activations, k: int, seed: int) -> base.Prototypes:
    """Draws k activations. For equal seeds, a draw of k is the first k of a larger draw.

    Raises:
        UserError: bad shards, or fewer than k activations.
    """
    check_enough(acts, k, "prototypes")
    sample = reservoir(acts, k, seed)
    vectors_KD, mean_D = torch.from_numpy(sample.acts_KD), torch.from_numpy(sample.mean_D)
    return base.Prototypes.of(vectors_KD, mean_D, config.Random().similarity)


def check_enough(acts: activations.Activations, k: int, what: str) -> None:
    """Checks that there are at least k activations, without reading them.

    Raises:
        UserError: there are fewer.
    """
    if len(acts) < k:
        some = f" (of {acts.n_imgs:,} images)" if acts.chosen else ""
        raise errors.UserError(
            f"{acts.root}: holds {len(acts)} activations{some}, fewer than {k} {what}. Lower --n-prototypes."
        )


@jaxtyped(typechecker=beartype.beartype)
def reservoir(acts: activations.Activations, k: int, seed: int) -> Sample:
    """Draws min(k, all) activations uniformly without replacement, in one pass. Memory: 1.25 k activations.

    Each activation gets a random key, and the k smallest keys stay (bottom-k sampling, Cohen and Kaplan
    2007). The sample is sorted by key, so samples of different sizes are nested.
    """
    stream = ordered.Ordered(acts)
    rng = np.random.default_rng((seed, 0xACE))
    d_vit = acts.d_vit
    size = min(k + max(k // 4, 1024), len(acts))
    key_R, acts_RD = np.full(size, np.inf), np.empty((size, d_vit), np.float32)
    n, bound = 0, np.inf  # rows in use; keys of at least `bound` cannot stay
    total_D = np.zeros(d_vit, np.float64)
    for block in helpers.progress(stream, "sample", len(stream), "blocks"):
        acts_BD = stream.rows(block)
        total_D += acts_BD.sum(axis=0, dtype=np.float64)
        key_B = rng.random(len(acts_BD))
        fresh = np.flatnonzero(key_B < bound)
        while len(fresh):
            if n == size:
                n, bound = k, _compact(key_R, acts_RD, k)
                fresh = fresh[key_B[fresh] < bound]
            now, fresh = fresh[: size - n], fresh[size - n :]
            key_R[n : n + len(now)], acts_RD[n : n + len(now)] = key_B[now], acts_BD[now]
            n += len(now)
    if n > k:
        n = k
        _compact(key_R, acts_RD, k)
    order_K = np.argsort(key_R[:n], kind="stable")
    return Sample(acts_RD[order_K], (total_D / len(acts)).astype(np.float32))


def _compact(key_R: np.ndarray, acts_RD: np.ndarray, k: int) -> float:
    """Moves the k smallest keys and their activations to the front; returns the largest of these keys."""
    stay = np.argpartition(key_R, k - 1)[:k]
    is_free_K = np.ones(k, bool)
    is_free_K[stay[stay < k]] = False
    free, moving = np.flatnonzero(is_free_K), stay[stay >= k]
    key_R[free], acts_RD[free] = key_R[moving], acts_RD[moving]
    key_R[k:] = np.inf
    return float(key_R[:k].max())
