"""torch's Adam as a function: its class imports torch's compiler, which takes 4 s."""

import collections.abc

import torch
from torch.optim import _functional


class Adam:
    """Changes parameters by their gradients, as torch.optim.Adam does with its defaults."""

    def __init__(self, parameters: collections.abc.Iterable[torch.Tensor]):
        self.params = list(parameters)
        self.means, self.squares = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.steps = [torch.zeros(()) for _ in self.params]

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Parameters without a gradient stay."""
        given = [i for i, p in enumerate(self.params) if p.grad is not None]
        some = ([found[i] for i in given] for found in (self.params, self.means, self.squares, self.steps))
        params, means, squares, steps = some
        grads = [p.grad for p in params]
        defaults = {"amsgrad": False, "weight_decay": 0.0, "eps": 1e-8, "maximize": False, "foreach": False}
        _functional.adam(params, grads, means, squares, [], steps, beta1=0.9, beta2=0.999, lr=lr, **defaults)
