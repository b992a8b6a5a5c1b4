"""Predicts the peak memory of training from its config, on a CPU and on a GPU. Imports no torch.

Letters as in docs/memory.md, in bytes: W an SAE's two weight matrices, A a batch of activations, R the most
for numbers of B samples x S latents at once. P is the number of Matryoshka's prefixes.

Tests compare the predictions with the measured memory of processes, and with tensors on a fake GPU.
"""

import collections.abc

from saev.data.memory import PROGRAM
from saev.nn import partsizes
from saev.training import config

EVALUATED_CODES = 2**26
"""Most bytes of codes that an evaluation holds at a time."""
READ_FIRST, READ_FIRST_BYTES = 2**16, 2**28
"""Most activations, and bytes of them, that initialisation and evaluation read first."""
CORRELATED = 2048
"""Most latents that an evaluation correlates, in a few square float64 tables."""
INDEX_BYTES, N_AHEAD = 40, 4
"""Index bytes per activation in the stream's pool, and batches outside the pool."""
COMPARED = 1024
"""Latents whose products with all others are in memory at once (`metrics.CHUNK`)."""
SPARSE_CODE = 24
"""Bytes of a sparse code on a GPU: value, latent, order by latent, gradients."""
PART_BYTES = 2**26, 2**40
"""Least and most memory for B x S numbers."""


def peak(cfgs: collections.abc.Sequence[config.Train], n_acts: int, token_bytes: int) -> int:
    """Peak bytes of training one group of runs on a CPU, without AuxK's 12 x batch size x dead latents.

    Args:
        cfgs: with sae.d_vit set.
        n_acts: activations in the shards.
        token_bytes: bytes of a stored activation.
    """
    stream = _stream(cfgs[0], n_acts, token_bytes)
    kept = sum(_kept(cfg) + cfg.sae.KEEPS_CODES * _codes(cfg) for cfg in cfgs)
    passing = max(_passing(cfg) for cfg in cfgs)
    evaluation = max(_evaluation(cfg) for cfg in cfgs)
    # as batches, concatenated, and in scaled units
    copies = 3 if any(cfg.sae.normalize == "per-dim" for cfg in cfgs) else 2
    first = (
        copies
        * 4
        * (cfgs[0].sae.d_vit or 0)
        * (max(n_start(cfg, n_acts) for cfg in cfgs) + cfgs[0].batch_size)
    )
    return PROGRAM + stream + first + max(kept + passing, evaluation)


def n_read_first(d_vit: int, n_acts: int) -> int:
    """Number of activations that initialisation and evaluation read first. The typical norm is within 1%."""
    return min(READ_FIRST, READ_FIRST_BYTES // (4 * max(1, d_vit)), n_acts)


def n_start(cfg: config.Train, n_acts: int) -> int:
    """Number of activations that initialise a run: with --sae.init data, at least one for each latent."""
    wanted = cfg.sae.n_latents if cfg.sae.init == "data" else 0
    return max(n_read_first(cfg.sae.d_vit or 0, n_acts), min(wanted, n_acts))


def _stream(cfg: config.Train, n_acts: int, token_bytes: int) -> int:
    """The pool, reads in progress (an eighth) and batches. A pool holds each activation at most twice."""
    whole = 2 * n_acts * (token_bytes + INDEX_BYTES) * 8 / 7
    return int(min(cfg.pool_gb * 1e9, whole + N_AHEAD * _acts(cfg)))


def _weights(cfg: config.Train) -> int:
    return 8 * (cfg.sae.d_vit or 0) * cfg.sae.n_latents


def _acts(cfg: config.Train) -> int:
    return 4 * cfg.batch_size * (cfg.sae.d_vit or 0)


def _codes(cfg: config.Train) -> int:
    return 4 * cfg.batch_size * cfg.sae.n_latents


def _kept(cfg: config.Train) -> int:
    """Bytes that one run keeps between steps: weights, gradients, Adam's moments, EMA weights."""
    return (5 if cfg.ema else 4) * _weights(cfg)


def _passing(cfg: config.Train) -> int:
    """Bytes that one run needs within a step: for a state being saved, or for codes and metrics."""
    return int(max(4.5 * _weights(cfg), cfg.sae.CODES_IN_STEP * _codes(cfg)))


def _evaluation(cfg: config.Train) -> int:
    rows = min(1.0, cfg.n_val_patches / cfg.batch_size)
    codes = min(rows * _codes(cfg), EVALUATED_CODES)
    tables = 4 * 8 * min(cfg.sae.n_latents, CORRELATED) ** 2
    return int(2 * _weights(cfg) + 5 * codes + tables)


# ---- on a GPU ----


def gpu_peak(
    cfgs: collections.abc.Sequence[config.Train], R: int, is_costly: bool = True, dead: float = 0.0
) -> int:
    """Peak bytes of a GPU's tensors in training one group of runs.

    CUDA itself takes about 0.5 GB more, and torch's allocator keeps some unused.

    Args:
        cfgs: with sae.d_vit set.
        R: see `part_bytes`.
        is_costly: metrics that cost d_sae squared are measured.
        dead: fraction of latents that are dead, for the AuxK loss.
    """
    passing = max(_gpu_passing(cfg, R, is_costly, dead) for cfg in cfgs)
    results = sum(_acts(cfg) + _gpu_codes(cfg, R) for cfg in cfgs[1:])  # of the other runs' steps
    return sum(_kept(cfg) for cfg in cfgs) + results + passing


def part_bytes(cfgs: collections.abc.Sequence[config.Train], gpu_bytes: int) -> int:
    """Most bytes of a part's B x S numbers, if training may take `gpu_bytes` of a GPU's memory.

    That holds even if all latents die. A power of two, so that the parts into which a batch is divided rarely
    depend on what else is on the GPU.
    """
    least, most = PART_BYTES
    while most > least and gpu_peak(cfgs, most, is_costly=True, dead=1.0) > gpu_bytes:
        most //= 2
    return most


def _n_samples(cfg: config.Train) -> int:
    """Rows of a batch on one GPU."""
    return cfg.batch_size // cfg.data_parallel


def _part(cfg: config.Train, R: int) -> tuple[int, bool]:
    """Bytes of a part's dense codes, and whether it is less than the batch."""
    each = 4 * cfg.sae.GPU_CODES or partsizes.PRE_BYTES
    n = partsizes.n_rows(_n_samples(cfg), cfg.sae.n_latents, R, each)
    return 4 * n * cfg.sae.n_latents, n < _n_samples(cfg)


def _candidates(cfg: config.Train, R: int) -> int:
    """Bytes of the groups that may hold a divided batch's codes, see `triton_select.Candidates`."""
    if not cfg.sae.SHARES_CODES or cfg.data_parallel > 1 or not _part(cfg, R)[1]:
        return 0
    n = min(cfg.sae.n_firing, cfg.sae.n_latents) * _n_samples(cfg)
    return partsizes.CANDIDATE_BYTES * partsizes.n_candidates(n, R)


def _gpu_codes(cfg: config.Train, R: int) -> int:
    """A batch's codes. Of a batch that is divided, dense ones are not kept."""
    if not cfg.sae.GPU_CODES:
        return SPARSE_CODE * cfg.sae.n_firing * _n_samples(cfg)
    part, is_divided = _part(cfg, R)
    return 0 if is_divided else part


def _gpu_passing(cfg: config.Train, R: int, is_costly: bool, dead: float) -> int:
    """Bytes that one run needs within a step. The gradients are freed at its start."""
    W, A, P, S = _weights(cfg), _acts(cfg), _n_prefixes(cfg), cfg.sae.n_latents
    (part, is_divided), codes = _part(cfg, R), _gpu_codes(cfg, R)
    update = W / 2 + 3 * A + codes
    if not cfg.sae.GPU_CODES:  # 5 of the bytes of `partsizes.PRE_BYTES`
        copies = W / 4 + A / 2 if cfg.precision == "bfloat16" else 0  # of a matrix and the batch
        gradients = max(5 / 4 * part + _candidates(cfg, R), 5 * P * A) + 3 * A + copies + codes - W
    elif is_divided:  # sums of gradients, and those of a part
        share = part / (4 * _n_samples(cfg) * S)
        gradients = cfg.sae.GPU_CODES * part + P * share * A + 3 * A + W
    else:
        gradients = cfg.sae.GPU_CODES * part + (P + 2) * A - W / 2
    aux = _gpu_aux(cfg, R, dead)
    if aux:
        aux += codes
        gradients += dead * W
    measured = _gpu_measured(cfg, part, is_divided) + 3 * A + codes if is_costly else 0
    return int(max(update, gradients, aux, measured))


def _gpu_aux(cfg: config.Train, R: int, dead: float) -> int:
    """Of the AuxK loss: products, the dead latents' weights and their gradients. Not the batch's codes."""
    n_dead = int(dead * cfg.sae.n_latents)
    if not n_dead or not getattr(cfg.sae, "aux_coeff", 0):
        return 0
    n = partsizes.n_rows(_n_samples(cfg), n_dead, R, partsizes.AUX_BYTES)
    W = _weights(cfg)
    return int(partsizes.AUX_BYTES * n * n_dead + 3 * dead * W - W / 2 + 5 * _acts(cfg))


def _gpu_measured(cfg: config.Train, part: int, is_divided: bool) -> int:
    """Of the metrics that cost d_sae squared."""
    W, S = _weights(cfg), cfg.sae.n_latents
    if is_divided:  # of a sample of latents
        sampled = 12 * _n_samples(cfg) * min(S, CORRELATED) + 24 * min(S, CORRELATED) ** 2
        return max(sampled, W // 2 + 12 * COMPARED * S)
    dense = 1 if cfg.sae.GPU_CODES else 2  # times the codes, beside those of the step
    return max(dense * part, W // 2) + 12 * COMPARED * S


def _n_prefixes(cfg: config.Train) -> int:
    return getattr(cfg.objective, "n_prefixes", 1)
