"""Images in order, in blocks: for visuals, protoeval and the fitting of scorers."""

import collections.abc
import math
import typing as tp

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64

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


def filled(
    acts_NPD: Float[torch.Tensor, "N P D"], is_kept_NP: Bool[torch.Tensor, "N P"]
) -> Float[torch.Tensor, "N P D"]:
    """Images in which another patch stands for each patch that is left out, which changes no maximum over
    patches. If all of an image's patches are left out, they stay."""
    other_N = is_kept_NP.int().argmax(dim=1)
    other_N1D = acts_NPD[torch.arange(len(acts_NPD), device=acts_NPD.device), other_N][:, None]
    is_empty_N1 = ~is_kept_NP.any(dim=1, keepdim=True)
    return torch.where((is_kept_NP | is_empty_N1)[:, :, None], acts_NPD, other_N1D)


class Ordered:
    """Iterates over blocks of at most `n_imgs` images, in image order.

    Args:
        spans: positions of the images to read. A block lies in one span. Default: all.

    Raises:
        UserError: see `Activations`; while iterating, NaN or infinite activations (the image is named).
    """

    def __init__(
        self,
        data: config.Shards | activations.Activations,
        n_imgs: int = 64,
        spans: collections.abc.Sequence[range] | None = None,
    ):
        self.acts = activations.Activations.open(data)
        self.block = n_imgs
        self.spans = [range(self.acts.n_imgs)] if spans is None else spans

    def __len__(self) -> int:
        """Number of blocks."""
        return sum(math.ceil(len(span) / self.block) for span in self.spans)

    def __iter__(self) -> collections.abc.Iterator[Block]:
        return ahead(self._blocks(), AHEAD)

    def _blocks(self) -> collections.abc.Iterator[Block]:
        for span in self.spans:
            for start in range(span.start, span.stop, self.block):
                stop = min(start + self.block, span.stop)
                block = Block(self.acts.image_is_N[start:stop], self.acts.read(start, stop))
                activations.check_finite(block.act_NXD, block.image_i_N, self.acts)
                yield block

    def kept(self, block: Block) -> Bool[np.ndarray, "N X"] | None:
        """Whether each token of a block is in the stream. None: all are."""
        return self.acts.kept(block.image_i_N)

    def rows(self, block: Block) -> Float32[np.ndarray, "R D"]:
        """The tokens of a block that are in the stream, image after image."""
        is_kept_NX = self.kept(block)
        return block.act_NXD.reshape(-1, self.acts.d_vit) if is_kept_NX is None else block.act_NXD[is_kept_NX]
