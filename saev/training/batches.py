"""A stream's batches: its first activations ahead of time, and how long training waits for them. B batch, N
activations, D d_vit."""

import collections
import collections.abc
import time

import torch
from jaxtyping import Float
from torch import Tensor

from saev.data import shuffled


class Batches:
    """The activations of a stream, batch by batch, in the stream's dtype."""

    def __init__(self, stream: collections.abc.Iterator[shuffled.Batch]):
        self.stream = stream
        self.ahead: collections.deque[Tensor] = collections.deque()
        self.wait_s, self.n, self.start_s = 0.0, 0, time.monotonic()

    def peek(self, n: int) -> Float[Tensor, "N D"]:
        """The next n activations, rounded up to whole batches. `next` gives them again."""
        n_ahead = sum(map(len, self.ahead))
        while n_ahead < n:
            self.ahead.append(next(self.stream).act_BD)
            n_ahead += len(self.ahead[-1])
        self.start_s = time.monotonic()
        return torch.cat([*self.ahead])

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Float[Tensor, "B D"]:
        start_s = time.monotonic()
        act_BD = self.ahead.popleft() if self.ahead else next(self.stream).act_BD
        self.wait_s += time.monotonic() - start_s
        self.n += 1
        return act_BD

    def rates(self, batch_size: int) -> dict[str, float]:
        """Activations per second, and the fraction of time spent waiting, since the last call."""
        elapsed_s = max(time.monotonic() - self.start_s, 1e-9)
        out = {"tokens_per_s": self.n * batch_size / elapsed_s, "loader_wait": self.wait_s / elapsed_s}
        self.wait_s, self.n, self.start_s = 0.0, 0, time.monotonic()
        return out
