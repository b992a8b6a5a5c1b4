"""Estimates the memory of `python -m saev.compare` (docs/memory.md). Imports no torch.

Tests compare the estimate with processes. S latents of a dictionary, D d_vit.
"""

import collections.abc
import itertools
import typing as tp

from saev.compare import config
from saev.data import memory

LIBRARIES = 200 * 10**6
"""Bytes of compiled kernels and libraries beyond `data.memory.PROGRAM`."""
EXACT = 4096
"""Dictionaries of at most this many latents are matched one to one over all pairs."""
COSINES = 2**24
"""Cosines that are computed at a time, about."""
CODE_BYTES = 24
"""Most bytes of a code in memory: itself, its copy, and its place when sorted by latent. The second
dictionary's are not sorted, so that 14 bytes are usual."""
EDGE_BYTES = 72
"""Bytes of a candidate for a one-to-one match: itself, sorted, and in the graph."""


class Side(tp.NamedTuple):
    """Sizes of a dictionary and of its activations."""

    n: int
    """Latents."""
    d_vit: int
    n_imgs: int
    n_patches: int
    """Per image."""
    n_rows: int
    """Rows that are compared: patches or images."""
    n_codes: int
    """Codes of a row."""
    is_sae: bool

    @property
    def weights(self) -> int:
        return (8 if self.is_sae else 4) * self.d_vit * self.n

    @property
    def mapped(self) -> int:
        """Its codes in memory-mapped files, and where each row begins."""
        return self.n_rows * (8 * self.n_codes + 12)


def peak(cfg: config.Compare, sides: collections.abc.Sequence[Side]) -> int:
    """Estimates the peak memory in bytes, including memory-mapped files."""
    weights = sum(side.weights for side in sides)
    loading = weights + 3 * max(side.weights * side.is_sae for side in sides)
    encoding = weights + max(_encoding(side) for side in sides)
    pairs = max(_matching(cfg, *pair) for pair in itertools.combinations(sides, 2))
    comparing = weights + sum(side.mapped for side in sides) + pairs
    return memory.PROGRAM + LIBRARIES + max(loading, encoding, comparing)


def _encoding(side: Side) -> int:
    """Blocks read ahead, pre-activations, codes and what is found."""
    n_imgs = min(memory.n_block(side.n_patches, side.n), side.n_imgs)
    return 4 * n_imgs * side.n_patches * (6 * side.d_vit + 2 * side.n)


def _matching(cfg: config.Compare, one: Side, two: Side) -> int:
    """A tile of sums and what normalises it, codes, and one-to-one matches; or cosines of two tiles."""
    n_bytes, all_pairs = 1e9 * cfg.memory_gb, 8 * one.n * two.n
    tile = 8 * two.n * max(1, min(one.n, int(n_bytes / 2) // (8 * two.n)))
    codes = 14 * int(min(n_bytes / 4 / CODE_BYTES, one.n_rows * one.n_codes + two.n_rows * two.n_codes))
    # both sides' directions, those of one drawn at random, and what that takes; none in two spaces
    directions = 4 * one.d_vit * (one.n + two.n + 3 * max(one.n, two.n))
    cosines = (20 * min(COSINES, one.n * two.n) + directions) * (one.d_vit == two.d_vit)
    if cfg.runs:
        return max(2 * tile + codes, cosines)
    if max(one.n, two.n) <= EXACT:
        return max(all_pairs + 2 * tile + codes, 4 * all_pairs, cosines)
    edges = EDGE_BYTES * cfg.candidates * (one.n + -(-all_pairs // tile) * two.n)
    return max(2 * tile + codes + edges, cosines)
