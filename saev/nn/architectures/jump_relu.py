"""JumpReLU: a learned threshold per latent, and an L0 penalty.

Shape letters: N activations, B batch, D d_vit, S latents, K the first K latents, n sparse codes.
"""

import math

import torch
from torch import Tensor

from saev.nn import activations, config, sparse
from saev.nn.architectures import base

MIN_THRESHOLD = 0.01
"""Lower limit of initial thresholds."""
START_CODES = 2**22
"""About how many pre-activations `initialize` looks at."""


class JumpRelu(base.Architecture, cfg=config.JumpRelu):
    def start(self, sae) -> None:
        # A code f lowers the loss by about f^2 / d_vit, and costs sparsity_coeff.
        break_even = math.sqrt(self.cfg.sparsity_coeff * sae.d_vit)
        start = self.cfg.init_threshold or max(MIN_THRESHOLD, break_even)
        sae.log_threshold = torch.nn.Parameter(torch.full((sae.d_sae,), math.log(start)))

    def initialize(self, sae, x_ND: Tensor) -> None:
        """Lowers thresholds so that on average one latent or more fires per activation and gets gradients."""
        if self.cfg.init_threshold:
            return
        n_rows = max(16, START_CODES // sae.d_sae)
        x_BD = x_ND[:: math.ceil(len(x_ND) / n_rows)]
        pre_BS = (x_BD * sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc
        most = pre_BS.flatten().kthvalue(max(1, pre_BS.numel() - len(x_BD))).values
        sae.log_threshold.clamp_(max=most.clamp(min=MIN_THRESHOLD).log())

    def set_threshold(self, sae, threshold: Tensor) -> None:
        sae.log_threshold.copy_(threshold.clamp(min=torch.finfo(torch.float32).tiny).log())

    def encode(self, sae, pre_BS: Tensor) -> Tensor:
        return activations.jump(pre_BS, sae.log_threshold.exp(), self.cfg.bandwidth)

    def encode_dense(self, sae, pre_BS: Tensor) -> base.Coded:
        threshold_S, width = sae.log_threshold.exp(), self.cfg.bandwidth
        f_BS = activations.jump(pre_BS, threshold_S, width)
        return base.Coded(f_BS, activations.fires(pre_BS, threshold_S, width).sum(dim=1).mean())

    def encode_sparse(self, sae, pre_n: Tensor, index: sparse.Index) -> base.Coded:
        threshold_n, width = sae.log_threshold.exp().index_select(0, index.latent_n), self.cfg.bandwidth
        f_n = activations.jump(pre_n, threshold_n, width)
        l0 = activations.fires(pre_n, threshold_n, width).sum() / index.n_rows
        return base.Coded(f_n, l0)

    def cutoff(self, sae) -> Tensor:
        return sae.log_threshold.detach().exp() - self.cfg.bandwidth / 2

    def fires_above(self, sae) -> Tensor:
        return sae.log_threshold.exp()

    def largest(self, sae, pre_BK: Tensor) -> Tensor:
        threshold_K = sae.log_threshold.exp()[: pre_BK.shape[1]]
        return torch.where(pre_BK > threshold_K, pre_BK, 0.0).relu()
