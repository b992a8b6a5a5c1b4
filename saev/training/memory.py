"""Predicts the peak memory of training on a CPU from its config. Imports no torch.

A test compares the prediction with the measured memory of processes.
"""

import collections.abc

from saev.data.memory import PROGRAM
from saev.training import config

EVALUATED_CODES = 2**26
"""Most bytes of codes that an evaluation holds at a time."""
READ_FIRST, READ_FIRST_BYTES = 2**16, 2**28
"""Most activations, and bytes of them, that initialisation and evaluation read first."""
CORRELATED = 2048
"""Most latents that an evaluation correlates, in a few square float64 tables."""
INDEX_BYTES, N_AHEAD = 40, 4
"""Index bytes per activation in the stream's pool, and batches outside the pool."""


def peak(cfgs: collections.abc.Sequence[config.Train], n_acts: int, token_bytes: int) -> int:
    """Peak bytes of training one group of runs, without AuxK's 12 x batch size x dead latents.

    Args:
        cfgs: with sae.d_vit set.
        n_acts: activations in the shards.
        token_bytes: bytes of a stored activation.
    """
    d_vit = cfgs[0].sae.d_vit or 0
    stream = _stream(cfgs[0], n_acts, d_vit, token_bytes)
    kept = sum(_kept(cfg) for cfg in cfgs)
    passing = max(_passing(cfg) for cfg in cfgs)
    evaluation = max(_evaluation(cfg) for cfg in cfgs)
    # as batches, and concatenated
    first = 2 * 4 * d_vit * (n_read_first(d_vit, n_acts) + cfgs[0].batch_size)
    return PROGRAM + stream + first + max(kept + passing, evaluation)


def n_read_first(d_vit: int, n_acts: int) -> int:
    """Number of activations that initialisation and evaluation read first."""
    return min(READ_FIRST, READ_FIRST_BYTES // (4 * max(1, d_vit)), n_acts)


def _stream(cfg: config.Train, n_acts: int, d_vit: int, token_bytes: int) -> int:
    """The pool, reads in progress (an eighth) and batches. A pool holds each activation at most twice."""
    whole = 2 * n_acts * (token_bytes + INDEX_BYTES) * 8 / 7
    return int(min(cfg.pool_gb * 1e9, whole + N_AHEAD * 4 * d_vit * cfg.batch_size))


def _weights(cfg: config.Train) -> int:
    return 8 * (cfg.sae.d_vit or 0) * cfg.sae.n_latents


def _codes(cfg: config.Train) -> int:
    return 4 * cfg.batch_size * cfg.sae.n_latents


def _kept(cfg: config.Train) -> int:
    """Bytes that one run keeps between steps: weights, gradients, Adam's moments, EMA weights, kept codes."""
    return (5 if cfg.ema else 4) * _weights(cfg) + cfg.sae.KEEPS_CODES * _codes(cfg)


def _passing(cfg: config.Train) -> int:
    """Bytes that one run needs within a step: for a state being saved, or for codes and metrics."""
    return int(max(4.5 * _weights(cfg), cfg.sae.CODES_IN_STEP * _codes(cfg)))


def _evaluation(cfg: config.Train) -> int:
    rows = min(1.0, cfg.n_val_patches / cfg.batch_size)
    codes = min(rows * _codes(cfg), EVALUATED_CODES)
    tables = 4 * 8 * min(cfg.sae.n_latents, CORRELATED) ** 2
    return int(2 * _weights(cfg) + 5 * codes + tables)
