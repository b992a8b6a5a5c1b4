"""Sparse autoencoders: architectures, objectives, metrics, checkpoints. Knows nothing of shards."""

from saev import lazy

__getattr__ = lazy.attributes(
    __name__, {"SparseAutoencoder": "sae", "load": "sae", "save": "sae", "metrics": ""}
)
