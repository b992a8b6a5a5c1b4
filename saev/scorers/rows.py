"""Codes of scorers as sparse rows. R rows (activations), D d_vit, K latents, n codes."""

import collections.abc

import numpy as np
import torch
from torch import Tensor

from saev.formats import codeshards
from saev.nn import sparse
from saev.scorers import sae


def of_sae(scorer: sae.SaeLatents, above: float = 0.0) -> collections.abc.Callable[[Tensor], codeshards.Csr]:
    """Maps activations (R, D) to codes whose absolute value is larger than `above`, without a dense code."""
    weights, n_per_row = sparse.Encoder(scorer.sae.W_enc.T, scorer.sae.b_enc, False), 32.0

    @torch.no_grad()
    def encode(x_RD: Tensor) -> codeshards.Csr:
        nonlocal n_per_row
        model = scorer.sae
        x_RD = x_RD * model.scale - model.b_dec
        found = model.architecture.infer(model, weights, x_RD, int(n_per_row * len(x_RD)))
        n_per_row = 1.2 * len(found.value_n) / len(x_RD)
        arrays = (found.index.start_O1.long(), found.index.latent_n.int(), found.value_n.float())
        rows = codeshards.Csr(*(t.cpu().numpy() for t in arrays))
        return rows.kept(~(np.abs(rows.value_n) <= above))  # keeps NaN, which `passes.check` reports

    return encode


def of_dense(f_RK: Tensor) -> codeshards.Csr:
    """The codes that are not 0."""
    row_n, latent_n = f_RK.nonzero(as_tuple=True)
    start_R1 = torch.nn.functional.pad(row_n.bincount(minlength=len(f_RK)).cumsum(dim=0), (1, 0))
    arrays = (start_R1, latent_n.int(), f_RK[row_n, latent_n].float())
    return codeshards.Csr(*(t.cpu().numpy() for t in arrays))
