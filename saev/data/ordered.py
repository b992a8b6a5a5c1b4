"""Images in order, in blocks: for visuals, protoeval and the fitting of scorers."""

import collections.abc
import math
import typing as tp

import numpy as np
from jaxtyping import Float32, Int64

from saev.data import activations, config
from saev.data.ahead import ahead

AHEAD = 2
"""Blocks read ahead."""


class Block(tp.NamedTuple):
    """Consecutive images."""

    image_i_N: Int64[np.ndarray, " N"]
    """Their numbers, ascending, without images that could not be read."""
    act_NXD: Float32[np.ndarray, "N X D"]
    """Their tokens. With layer "all", those of the first layer come first."""


class Ordered:
    """Iterates over blocks of at most `n_imgs` images, in image order, from the `first` readable image on.

    Raises:
        UserError: see `Activations`; while iterating, NaN or infinite activations (the image is named).
    """

    def __init__(self, data: config.Shards | activations.Activations, n_imgs: int = 64, first: int = 0):
        self.acts = activations.Activations.open(data)
        self.block = n_imgs
        self.first = first

    def __len__(self) -> int:
        """Number of blocks."""
        return math.ceil((self.acts.n_imgs - self.first) / self.block)

    def __iter__(self) -> collections.abc.Iterator[Block]:
        return ahead(self._blocks(), AHEAD)

    def _blocks(self) -> collections.abc.Iterator[Block]:
        for start in range(self.first, self.acts.n_imgs, self.block):
            stop = min(start + self.block, self.acts.n_imgs)
            block = Block(self.acts.image_is_N[start:stop], self.acts.read(start, stop))
            activations.check_finite(block.act_NXD, block.image_i_N, self.acts)
            yield block
