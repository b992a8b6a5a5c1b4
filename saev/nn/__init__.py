"""Sparse autoencoders: architectures, objectives, metrics, checkpoints. Knows nothing of shards."""

from saev import helpers

__getattr__ = helpers.lazy_attributes(
    __name__, {"SparseAutoencoder": "sae", "load": "sae", "save": "sae", "metrics": ""}
)
