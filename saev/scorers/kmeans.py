"""K-means centroids as prototypes. The clustering itself is scikit-learn's Lloyd on a uniform sample."""

import warnings

import beartype
import sklearn.cluster
import sklearn.exceptions
import torch

from saev import errors
from saev.data import config as data_config
from saev.scorers import base, config, random


@beartype.beartype
def fit(cfg: config.KMeans, data: data_config.Shards, k: int, seed: int) -> base.Prototypes:
    """Clusters `cfg.n_samples` activations into k.

    Raises:
        UserError: bad shards, or fewer activations than k.
    """
    sample = random.reservoir(data, max(k, cfg.n_samples), seed)
    if len(sample.acts_KD) < k:
        raise errors.UserError(
            f"{data.shard_root}: holds {len(sample.acts_KD)} activations, fewer than {k} clusters. Lower --n-prototypes."
        )
    kmeans = sklearn.cluster.KMeans(
        k, init="k-means++", n_init=1, max_iter=cfg.n_iters, random_state=seed
    )
    with warnings.catch_warnings():
        # Fewer distinct activations than k: duplicates of a centroid are harmless prototypes.
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        centers_KD = kmeans.fit(sample.acts_KD).cluster_centers_
    return base.Prototypes(
        torch.from_numpy(centers_KD.astype("float32")),
        torch.from_numpy(sample.mean_D),
        cfg.similarity,
    )
