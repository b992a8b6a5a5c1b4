"""Reads a stream's first activations without consuming them. N activations, D d_vit."""

import collections
import collections.abc

import beartype
import torch
from jaxtyping import Float
from torch import Tensor

from saev.data import activations, shuffled
from saev.training import memory


def n_activations(acts: activations.Activations) -> int:
    """How many to read: enough to estimate the typical norm within 1%."""
    return memory.n_read_first(acts.d_vit, len(acts))


@beartype.beartype
def peek(
    batches: collections.abc.Iterator[shuffled.Batch], n: int
) -> tuple[Float[Tensor, "N D"], collections.abc.Iterator[shuffled.Batch]]:
    """(the first n activations, rounded up to whole batches; the stream, which gives them again)."""
    kept: collections.deque[shuffled.Batch] = collections.deque()
    n_kept = 0
    while n_kept < n:
        kept.append(next(batches))
        n_kept += len(kept[-1].act_BD)
    return torch.cat([batch.act_BD for batch in kept]), _again(kept, batches)


def _again(
    kept: collections.deque[shuffled.Batch], batches: collections.abc.Iterator[shuffled.Batch]
) -> collections.abc.Iterator[shuffled.Batch]:
    while kept:
        yield kept.popleft()
    yield from batches
