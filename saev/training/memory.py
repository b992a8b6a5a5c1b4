"""How much memory a training takes on a CPU, by its config alone. Imports no torch.

W is the bytes of one SAE's weights, C those of a batch's codes with all their zeros. A test compares the formula with
processes.
"""

import collections.abc

import beartype

from saev.data.memory import PROGRAM
from saev.training import config

EVALUATED_CODES = 2**26
"""Bound of the codes that an evaluation holds at a time, in bytes."""
LOOKED_AT, LOOKED_AT_BYTES = 2**16, 2**28
"""Bounds of the activations that are looked at before the first step and before an evaluation."""
CORRELATED = 2048
"""Latents that an evaluation correlates at most, in a few float64 tables of their squares."""
INDEX_BYTES, N_AHEAD = 40, 4
"""Of the stream: what it keeps of each activation in its pool, and batches outside it."""


@beartype.beartype
def peak(
    cfgs: collections.abc.Sequence[config.Train],
    n_acts: int,
    token_bytes: int,
) -> int:
    """Bytes that the training of one group of runs (one stream) takes at most, without AuxK's 12 a batch's activation and dead latent.

    Args:
        cfgs: with sae.d_vit set.
        n_acts: activations in the shards.
        token_bytes: of a stored activation.
    """
    d_vit = cfgs[0].sae.d_vit or 0
    stream = _stream(cfgs[0], n_acts, d_vit, token_bytes)
    kept = sum(_kept(cfg) for cfg in cfgs)
    passing = max(_passing(cfg) for cfg in cfgs)
    evaluation = max(_evaluation(cfg) for cfg in cfgs)
    look = 2 * 4 * d_vit * (n_looked_at(d_vit, n_acts) + cfgs[0].batch_size)  # batches, and joined
    return PROGRAM + stream + look + max(kept + passing, evaluation)


@beartype.beartype
def n_looked_at(d_vit: int, n_acts: int) -> int:
    """All there are, within the bounds."""
    return min(LOOKED_AT, LOOKED_AT_BYTES // (4 * max(1, d_vit)), n_acts)


def _stream(cfg: config.Train, n_acts: int, d_vit: int, token_bytes: int) -> int:
    """The pool, the threads' reads (an eighth) and batches; a pool holds the activations twice at most."""
    whole = 2 * n_acts * (token_bytes + INDEX_BYTES) * 8 / 7
    return int(min(cfg.pool_gb * 1e9, whole + N_AHEAD * 4 * d_vit * cfg.batch_size))


def _weights(cfg: config.Train) -> int:
    return 8 * (cfg.sae.d_vit or 0) * cfg.sae.n_latents


def _codes(cfg: config.Train) -> int:
    return 4 * cfg.batch_size * cfg.sae.n_latents


def _kept(cfg: config.Train) -> int:
    """Of one run from step to step: weights, their gradients, Adam's two moments, the average; codes that are kept."""
    return (5 if cfg.ema else 4) * _weights(cfg) + cfg.sae.KEEPS_CODES * _codes(cfg)


def _passing(cfg: config.Train) -> int:
    """Of one run for a moment: a saved state on its way to the disk (copies of W, twice), or codes in a step and its metrics."""
    return int(max(4.5 * _weights(cfg), cfg.sae.CODES_IN_STEP * _codes(cfg)))


def _evaluation(cfg: config.Train) -> int:
    rows = min(1.0, cfg.n_val_patches / cfg.batch_size)
    codes = min(rows * _codes(cfg), EVALUATED_CODES)
    tables = 4 * 8 * min(cfg.sae.n_latents, CORRELATED) ** 2
    return int(2 * _weights(cfg) + 5 * codes + tables)
