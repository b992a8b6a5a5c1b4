"""The optimiser of sparse autoencoders.

A step removes each decoder row's gradient along the row, clips by the norm of all gradients, applies Adam and
normalises the decoder rows. On a CPU, and on a GPU with Triton, this takes two passes over the weights.
Otherwise it uses torch.
"""

import collections.abc
import functools
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev import compiled
from saev.nn import kernels, triton_kernels, triton_select
from saev.nn.sae import SparseAutoencoder

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
WithGrad = collections.abc.Mapping[str, tuple[Tensor, Tensor]]
"""Name -> parameter and gradient."""


class Adam:
    """Adam (Kingma & Ba 2015) for one sparse autoencoder.

    Args:
        max_norm: gradients are scaled down if their norm over all parameters is larger. 0: never.
    """

    @jaxtyped(typechecker=beartype.beartype)
    def __init__(self, sae: SparseAutoencoder, max_norm: float = 0.0):
        self.sae = sae
        self.max_norm = max_norm
        self.t = 0
        self.m = {name: torch.zeros_like(p) for name, p in sae.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in sae.named_parameters()}

    @torch.no_grad()
    def step(self, lr: float) -> Float[Tensor, ""]:
        """Updates the parameters and returns the gradients' norm before clipping. Overwrites the gradients.

        On a CPU, nothing is updated if the norm is not finite.
        """
        self.t += 1
        parameters = self.sae.named_parameters()
        with_grad = {n: (p, p.grad) for n, p in parameters if p.grad is not None}
        if triton_kernels.available(self.sae.W_dec) and self.sae.W_enc.T.is_contiguous():
            return self._step_triton(with_grad, lr)
        if not kernels.available(self.sae.W_dec):
            return self._step_torch(with_grad, lr)
        return self._step_kernels(with_grad, lr)

    def _step_kernels(self, with_grad: WithGrad, lr: float) -> Tensor:
        arrays = {n: [_rows(t) for t in (p, g, self.m[n], self.v[n])] for n, (p, g) in with_grad.items()}
        along, square = {}, 0.0
        for name, (w_SD, g_SD, _, _) in arrays.items():
            dots_S3 = np.empty((len(w_SD), 3), w_SD.dtype)
            compiled.in_threads(functools.partial(kernels.row_dots, w_SD, g_SD, dots_S3), len(w_SD))
            gw_S, gg_S, ww_S = dots_S3.T.astype(np.float64)
            # Normalising undoes changes along the row.
            along[name] = gw_S if name == "W_dec" else np.zeros_like(gw_S)
            with np.errstate(invalid="ignore", over="ignore"):  # handled below
                square += float((gg_S - 2 * along[name] * gw_S + along[name] ** 2 * ww_S).sum())
        if not np.isfinite(square):
            return torch.tensor(square)
        norm = max(square, 0.0) ** 0.5
        for name, (w_SD, *others) in arrays.items():
            along_S = along[name].astype(w_SD.dtype)
            factors = tuple(w_SD.dtype.type(f) for f in self._factors(lr, norm))
            update = functools.partial(kernels.adam_rows, w_SD, *others, along_S, factors, name == "W_dec")
            compiled.in_threads(update, len(w_SD))
        return torch.tensor(norm)

    def _factors(self, lr: float, norm: float) -> tuple[float, ...]:
        clip = self.max_norm / norm if 0 < self.max_norm < norm else 1.0
        return clip, lr / (1 - BETA1**self.t), BETA1, BETA2, EPS, (1 - BETA2**self.t) ** -0.5

    def _step_triton(self, with_grad: WithGrad, lr: float) -> Tensor:
        S, D = self.sae.W_dec.shape
        along_S, square_S = torch.empty(2, S, device=self.sae.W_dec.device)
        constants = {"BLOCK": min(1024, triton_select.pow2(D))}
        grad_SD = with_grad["W_dec"][1].contiguous()
        triton_select.launch("row_dots", (S,), self.sae.W_dec, grad_SD, along_S, square_S, D, **constants)
        norms = [torch.linalg.vector_norm(g) for name, (_, g) in with_grad.items() if name != "W_dec"]
        norm = torch.linalg.vector_norm(torch.stack([*norms, square_S.sum().clamp(min=0).sqrt()]))
        _, step, beta1, beta2, eps, correction = self._factors(lr, 0.0)
        clip = (self.max_norm / norm).clamp(max=1.0) if self.max_norm else torch.ones_like(norm)
        constants |= {"BETA1": beta1, "BETA2": beta2, "EPS": eps}
        for name, (p, g) in with_grad.items():
            if p.ndim == 1:
                self._update(name, p, g.mul_(clip), lr)
                continue
            rows = [t.T if name == "W_enc" else t for t in (p, g, self.m[name], self.v[name])]
            rows[1] = rows[1].contiguous()
            args = (*rows, along_S, clip, step, correction, D)
            triton_select.launch("adam_rows", (S,), *args, IS_UNIT=name == "W_dec", **constants)
        return norm

    def _update(self, name: str, p: Tensor, g: Tensor, lr: float) -> None:
        _, step, beta1, beta2, eps, correction = self._factors(lr, 0.0)
        self.m[name].lerp_(g, 1 - beta1)
        self.v[name].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(self.m[name], self.v[name].sqrt().mul_(correction).add_(eps), value=-step)

    def _step_torch(self, with_grad: WithGrad, lr: float) -> Tensor:
        self.sae.remove_parallel_grad()
        norms = [torch.linalg.vector_norm(g) for _, g in with_grad.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        clip = (self.max_norm / norm).clamp(max=1.0) if self.max_norm else None
        for name, (p, g) in with_grad.items():
            self._update(name, p, g if clip is None else g.mul_(clip), lr)
        self.sae.normalize_decoder()
        return norm

    def state_dict(self) -> dict[str, tp.Any]:
        return {"t": self.t, "m": self.m, "v": self.v}

    def load_state_dict(self, state: dict[str, tp.Any]) -> None:
        """Restores what `state_dict` returned."""
        self.t = state["t"]
        for name in self.m:
            self.m[name].copy_(state["m"][name])
            self.v[name].copy_(state["v"][name])

    @torch.no_grad()
    def forget(self, latent_C: Tensor) -> None:
        """Sets some latents' moments to 0, after resampling."""
        for moments in (self.m, self.v):
            for name, moment in moments.items():
                if name == "W_enc":
                    moment[:, latent_C] = 0
                elif name != "b_dec":
                    moment[latent_C] = 0


def _rows(t: Tensor) -> np.ndarray:
    """Returns a parameter, its gradient or a moment as rows: (S, D), or (1, n) for a bias."""
    array = t.detach().numpy()
    if array.ndim == 1:
        return array[None]
    return array if array.flags.c_contiguous else array.T
