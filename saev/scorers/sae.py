"""SAE latents as prototypes.

B activations or images, P patches, D d_vit, S latents, K prototypes, n codes.
"""

import copy
import dataclasses

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev import errors, nn
from saev.nn import kernels, sparse
from saev.scorers import base

AT_ONCE = 2**28
"""Bytes of pre-activations (GPU) or of scaled activations (CPU) that `_by_codes` holds at once."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class SaeLatents:
    """Scores by the codes of the first `n_prototypes` latents, in evaluation mode."""

    sae: nn.SparseAutoencoder
    n_prototypes: int

    @errors.no_type_check
    def __call__(self, activations: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        x_BD = base.ready(activations, self.sae.b_dec, "B D")
        return self.sae.encode(x_BD)[:, : self.n_prototypes]

    @errors.no_type_check
    @torch.no_grad()
    def of_images(self, acts_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B K"]:
        """Largest code of each latent in an image. If elementwise, the largest pre-activation is enough."""
        acts_BPD = base.ready(acts_BPD, self.sae.b_dec, "B P D")
        sae, K = self.sae, self.n_prototypes
        if not sae.architecture.is_elementwise:
            return self._by_codes(acts_BPD)
        found_BK = base.largest(acts_BPD, sae.W_enc.T[:K], lambda x_RD: (x_RD * sae.scale - sae.b_dec, None))
        return sae.architecture.largest(sae, found_BK + sae.b_enc[:K])

    def _by_codes(self, acts_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B K"]:
        """Encodes some images at a time, because a GPU holds the pre-activations of all their patches."""
        _, P, D = acts_BPD.shape
        n_columns = D if kernels.available(acts_BPD) else self.sae.d_sae
        n_imgs = max(1, AT_ONCE // (4 * P * n_columns))
        return torch.cat([self._by_codes_of(part) for part in acts_BPD.split(n_imgs)])

    def _by_codes_of(self, acts_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B K"]:
        sae, architecture, (B, P, _) = self.sae, self.sae.architecture, acts_BPD.shape
        x_BPD = acts_BPD * sae.scale - sae.b_dec
        encoder = sparse.Encoder(sae.W_enc.T, sae.b_enc, False)
        found = architecture.infer(sae, encoder, x_BPD.flatten(0, 1), 0)
        image_n = found.index.row_n.div(P, rounding_mode="floor")
        at_n = image_n.long() * sae.d_sae + found.index.latent_n
        f_BS = x_BPD.new_full((B, sae.d_sae), -torch.inf if architecture.is_signed else 0.0)
        f_BS.view(-1).scatter_reduce_(0, at_n, found.value_n, "amax")
        if architecture.is_signed:  # a latent that does not fire in a patch has code 0 there
            n_fired_BS = at_n.bincount(minlength=f_BS.numel()).view_as(f_BS)
            f_BS = torch.where(n_fired_BS < P, f_BS.relu(), f_BS)
        return f_BS[:, : self.n_prototypes]

    def prefix(self, k: int) -> "SaeLatents":
        return dataclasses.replace(self, n_prototypes=min(k, self.n_prototypes))

    def to(self, device: torch.device) -> "SaeLatents":
        return dataclasses.replace(self, sae=copy.deepcopy(self.sae).to(device))

    def digest(self) -> str:
        state = self.sae.state_dict()
        # the repr has no fields that finished results do not know (`fields.later`)
        what = f"{self.sae.cfg} {self.n_prototypes} {sorted(state)}"
        return base.digest(what, [state[name] for name in sorted(state)])
