"""How a GPU divides a batch whose B x S numbers do not fit. B batch, S latents. Imports no torch."""

PRE_BYTES = 8
"""Bytes of a pre-activation in a search for sparse codes: the product, a mask, and room for selecting."""
AUX_BYTES = 12
"""Bytes of a dead latent's pre-activation in the AuxK loss: the product, codes, and their gradients."""
CANDIDATE_BYTES = 280
"""Bytes of a candidate group of `triton_select.Candidates`: two copies of 32 values, keys and positions."""
MORE_GROUPS = 1024
"""Room for candidate groups that tie with the n-th largest, beside n / 64."""
MOST = 2**31 - 1
"""Most numbers of a part, so that 32-bit offsets suffice."""


def n_rows(B: int, S: int, n_bytes: int, each: float | int = PRE_BYTES) -> int:
    """Rows of a part, at least 1. The parts are as few as possible, and nearly equal.

    Args:
        n_bytes: most bytes of a part.
        each: bytes of each of a row's S numbers.
    """
    most = max(1, min(int(n_bytes / (each * max(1, S))), MOST // max(1, S)))
    n_parts = -(-B // most)
    return -(-B // max(1, n_parts)) or 1


def n_candidates(n: int, n_bytes: int) -> int:
    """Candidate groups for which a search in parts for n codes has room. 0: they would exceed `n_bytes`."""
    room = n + n // 64 + MORE_GROUPS
    return room if CANDIDATE_BYTES * room <= n_bytes else 0
