"""BatchTopK: the k x B largest pre-activations of a batch; at inference, those above a learned threshold.

Shape letters: B batch, D d_vit, S latents, K the first K latents, n sparse codes.
"""

import contextlib
import math
import typing as tp

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev import errors
from saev.nn import activations, config, sparse
from saev.nn.architectures import base

CALIBRATED = 2**25
"""About how many pre-activations decide the threshold of an SAE that is not trained."""


class BatchTopK(base.Architecture, cfg=config.BatchTopK):
    is_always_sparse = True

    def calibrate(self, sae, x_ND: Tensor) -> None:
        """Sets the threshold so that top_k latents fire per activation; to 0 if fewer are positive."""
        n_rows = max(16, CALIBRATED // sae.d_sae)
        x_BD = x_ND[:: math.ceil(len(x_ND) / n_rows)]
        with contextlib.suppress(errors.UserError):
            calibrate(sae, x_BD, self.cfg.top_k)

    def encode(self, sae, pre_BS: Tensor) -> Tensor:
        if not sae.training:
            return self.largest(sae, pre_BS)
        return self.encode_dense(sae, pre_BS).f

    def encode_dense(self, sae, pre_BS: Tensor) -> base.Coded:
        f_BS = activations.batch_top_k(pre_BS, self.cfg.top_k)
        self._update_threshold(sae, f_BS.detach())
        return base.Coded(f_BS)

    def find(
        self, sae, encoder: sparse.Encoder, xc_BD: Tensor, n_expected, search: sparse.BatchSearch
    ) -> sparse.Codes:
        codes = search(encoder, xc_BD, self.cfg.top_k)
        self._update_threshold(sae, search.gather(codes.value_n))
        return codes

    def encode_sparse(self, sae, pre_n: Tensor, index: sparse.Index) -> base.Coded:
        return base.Coded(pre_n.relu())

    def fires_above(self, sae) -> Tensor:
        return sae.threshold.clamp(min=0).expand(sae.d_sae)

    def largest(self, sae, pre_BK: Tensor) -> Tensor:
        return activations.above(pre_BK, sae.threshold).relu()

    @torch.no_grad()
    def _update_threshold(self, sae, f: Tensor) -> None:
        """Updates the moving average of the smallest firing code of any-shaped f. The first batch sets it."""
        if f.numel() == 0:
            return
        smallest = torch.where(f > 0, f, torch.inf).min()
        step = torch.where(sae.threshold == 0, 1.0, self.cfg.threshold_momentum)
        moved = torch.lerp(sae.threshold, smallest, step)
        sae.threshold.copy_(torch.where(smallest.isfinite(), moved, sae.threshold))


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def calibrate(sae: tp.Any, x_BD: Float[Tensor, "B D"], k: int) -> None:
    """Sets a BatchTopK's threshold so that on average k latents fire on each of these raw activations.

    Raises:
        UserError: it is not a BatchTopK, or no more than k x B pre-activations are positive.
    """
    if not isinstance(getattr(sae, "cfg", None), config.BatchTopK):
        raise errors.UserError("calibrate: only a BatchTopK has a threshold.")
    pre_BS = (x_BD * sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc
    wanted = k * len(x_BD)
    values_n = pre_BS[pre_BS > 0]
    if len(values_n) <= wanted:
        raise errors.UserError(
            f"calibrate: only {len(values_n)} values of {len(x_BD)} activations are positive, but {wanted} "
            "are wanted. Lower k."
        )
    # Only values above the threshold fire, so the threshold is the largest value that does not.
    sae.threshold.copy_(values_n.kthvalue(len(values_n) - wanted).values)
