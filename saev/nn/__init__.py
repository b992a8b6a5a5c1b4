"""Sparse autoencoders: architectures, objectives, metrics, checkpoints. Knows nothing of shards."""

import typing as tp

from saev import lazy

if tp.TYPE_CHECKING:
    from saev.nn import metrics as metrics
    from saev.nn.architectures.batch_top_k import calibrate as calibrate
    from saev.nn.sae import SparseAutoencoder as SparseAutoencoder
    from saev.nn.sae import load as load
    from saev.nn.sae import save as save
else:
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {"calibrate": "architectures.batch_top_k", "metrics": ""}
        | dict.fromkeys(("SparseAutoencoder", "load", "save"), "sae"),
    )
