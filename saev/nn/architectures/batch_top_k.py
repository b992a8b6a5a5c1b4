"""BatchTopK: the k x B largest pre-activations of a batch; in evaluation mode, those above a learned threshold. B batch, S latents."""

import torch
from torch import Tensor

from saev.nn import activations, config, sparse
from saev.nn.architectures import base
from saev.nn.architectures.base import Coded


class BatchTopK(base.Architecture, cfg=config.BatchTopK):
    is_always_sparse = True

    def encode(self, sae, pre_BS: Tensor) -> Tensor:
        if not sae.training:
            return self.largest(sae, pre_BS)
        f_BS = activations.batch_top_k(pre_BS, self.cfg.top_k)
        self._update_threshold(sae, f_BS.detach())
        return f_BS

    def encode_dense(self, sae, pre_BS: Tensor) -> Coded:
        f_BS = activations.batch_top_k(pre_BS, self.cfg.top_k)
        self._update_threshold(sae, f_BS.detach())
        return Coded(f_BS)

    def find(
        self, sae, encoder: sparse.Encoder, xc_BD: Tensor, n_likely, search: sparse.BatchSearch
    ) -> sparse.Codes:
        codes = search(encoder, xc_BD, self.cfg.top_k)
        self._update_threshold(sae, search.joint(codes.value_n))
        return codes

    def encode_sparse(self, sae, pre_n: Tensor, index: sparse.Index) -> Coded:
        return Coded(pre_n.relu())

    def largest(self, sae, pre_BK: Tensor) -> Tensor:
        return activations.above(pre_BK, sae.threshold).relu()

    @torch.no_grad()
    def _update_threshold(self, sae, f: Tensor) -> None:
        """Moving average of the smallest value that fired; the first batch sets it. f: codes of any shape."""
        if f.numel() == 0:
            return
        least = torch.where(f > 0, f, torch.inf).min()
        step = torch.where(sae.threshold == 0, 1.0, self.cfg.threshold_momentum)
        moved = torch.lerp(sae.threshold, least, step)
        sae.threshold.copy_(torch.where(least.isfinite(), moved, sae.threshold))
