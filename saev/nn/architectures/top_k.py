"""TopK: the k largest pre-activations of each sample. B batch, D d_vit, S latents, n sparse codes."""

from torch import Tensor

from saev.nn import activations, config, sparse
from saev.nn.architectures import base


class TopK(base.Architecture, cfg=config.TopK):
    is_always_sparse = True
    is_elementwise = False

    def __init__(self, cfg: config.TopK):
        super().__init__(cfg)
        self.is_signed = cfg.keep_negative

    def encode(self, sae, pre_BS: Tensor) -> Tensor:
        return activations.top_k(pre_BS, self.cfg.top_k, self.cfg.keep_negative)

    def encode_dense(self, sae, pre_BS: Tensor) -> base.Coded:
        return base.Coded(self.encode(sae, pre_BS))

    def find(self, sae, encoder: sparse.Encoder, xc_BD: Tensor, n_expected, search) -> sparse.Codes:
        return sparse.top_k(encoder, xc_BD, self.cfg.top_k, self.cfg.keep_negative)

    def encode_sparse(self, sae, pre_n: Tensor, index: sparse.Index) -> base.Coded:
        # on a GPU, codes that are not positive are kept as places
        return base.Coded(pre_n if self.cfg.keep_negative else pre_n.relu())
