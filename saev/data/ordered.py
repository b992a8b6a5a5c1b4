"""Images in order, in blocks: for visuals, protoeval and the fitting of scorers."""

import collections.abc
import math

import beartype
import numpy as np
from jaxtyping import Float32, jaxtyped

from saev.data import config, reader


class Ordered:
    """Iterates over (first image number, activations (N, T, D)) in image order, at most `n_imgs` images at a time.

    Raises:
        UserError: see `reader.Reader`; while iterating, NaN or infinite activations (names the image).
    """

    @beartype.beartype
    def __init__(self, cfg: config.Shards, n_imgs: int = 64):
        self.reader = reader.Reader(cfg)
        self.block = n_imgs

    def __len__(self) -> int:
        """Number of blocks."""
        return math.ceil(self.reader.n_imgs / self.block)

    def __iter__(self) -> collections.abc.Iterator[tuple[int, np.ndarray]]:
        for start in range(0, self.reader.n_imgs, self.block):
            yield start, self._read(start)

    @jaxtyped(typechecker=beartype.beartype)
    def _read(self, start: int) -> Float32[np.ndarray, "N T D"]:
        acts_NTD = self.reader.read(start, min(start + self.block, self.reader.n_imgs))
        reader.check_finite(acts_NTD, self.reader, start)
        return acts_NTD
