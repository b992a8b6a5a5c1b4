"""Training losses. B batch, D d_vit, S latents, P prefixes, n codes, C dead latents.

A loss is computed through sparse codes (`saev.nn.sparse`) if few latents fire, and through dense products
otherwise. Both give the same values up to rounding.
"""

import typing as tp

import beartype
import torch
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from saev.nn import activations, config, kernels, sparse
from saev.nn.architectures import base
from saev.nn.sae import SparseAutoencoder

SPARSE_BELOW = 0.03
"""A step uses sparse codes if, in the step before, less than this fraction of pre-activations could fire or
get a gradient. (Architectures that are always sparse always do.)"""


class Output(tp.NamedTuple):
    """Results of one training step. Only `loss` has gradients."""

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    """The reconstruction error, without penalty and AuxK."""
    x_hat_BD: Float[Tensor, "B D"]
    """Reconstruction by the whole dictionary, in the units of the activations."""
    codes: "sparse.Codes | Float[Tensor, 'B S']"
    fired_S: Bool[Tensor, " S"]
    """Latents that fired in this batch."""

    def dense(self) -> Float[Tensor, "B S"]:
        """The codes with their zeros."""
        return self.codes if isinstance(self.codes, Tensor) else self.codes.dense()

    @property
    def values(self) -> Tensor:
        """The codes' values, without zeros if the codes are sparse."""
        return self.codes if isinstance(self.codes, Tensor) else self.codes.value_n


class Objective:
    """The loss of one sparse autoencoder.

    The last step's `density` decides between sparse and dense codes, which round differently.

    Args:
        sae: in training mode.
        cfg: vanilla or Matryoshka.
        gather: see `sparse.BatchSearch`.
        n_processes: the number of processes that share each batch.
        search_bytes: see `sparse.Encoder`.
        is_bfloat16: mixed precision: the encoder's product is in bfloat16, and on a GPU so are the rows that
            sparse codes select.
        way: forces sparse or dense codes.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        cfg: config.Objective,
        *,
        gather: sparse.Gather = lambda value_n: value_n,
        n_processes: int = 1,
        is_bfloat16: bool = False,
        search_bytes: int = 2**33,
        way: tp.Literal["auto", "dense", "sparse"] = "auto",
    ):
        self.sae = sae
        self.cfg = cfg
        self.search = sparse.BatchSearch(gather, n_processes)
        self.is_bfloat16 = is_bfloat16
        self.search_bytes = search_bytes
        self.way = way
        self.density = 1.0
        self.codes_BS: Tensor | None = None
        """Buffer for the codes of `Architecture.dense_step`. The next step overwrites it."""

    @jaxtyped(typechecker=beartype.beartype)
    def __call__(
        self,
        x_BD: Float[Tensor, "B D"],
        *,
        sparsity: float = 1.0,
        end_P: Int[Tensor, " P"] | None = None,
        dead_C: Int[Tensor, " C"] | None = None,
    ) -> Output:
        """Computes the mean squared error plus the architecture's penalty and AuxK.

        The error is in scaled units, so that one learning rate suits every layer.

        Args:
            x_BD: raw activations.
            sparsity: warm-up factor of the sparsity coefficient.
            end_P: the prefixes' lengths, increasing, the last one d_sae. None: only the whole dictionary.
                On the CPU: reading them from a GPU would wait for it.
            dead_C: latents for the AuxK loss.
        """
        sae = self.sae
        scaled_BD = x_BD * sae.scale
        if self._takes_dense_step(scaled_BD, end_P):
            return self._dense_step(scaled_BD, sparsity)
        (f, penalty), index = self._encode(scaled_BD)
        if end_P is None:
            end_P = torch.tensor([sae.d_sae])
        if index is None:
            reconstruction, x_hat_BD = self._reconstruct_densely(f, scaled_BD, end_P)
        else:
            reconstruction, x_hat_BD = sparse.reconstruct(
                f, sae.W_dec, sae.b_dec, scaled_BD, index, end_P, self.is_bfloat16
            )
        loss = reconstruction
        if penalty is not None:
            loss = loss + sparsity * sae.architecture.cfg.sparsity_coeff * penalty
        if dead_C is not None and len(dead_C) and getattr(sae.cfg, "aux_coeff", 0):
            loss = loss + sae.cfg.aux_coeff * aux_k(sae, scaled_BD, scaled_BD - x_hat_BD, dead_C)
        codes = f.detach() if index is None else sparse.Codes(f.detach(), index)
        fired_S = (codes != 0).any(dim=0) if isinstance(codes, Tensor) else codes.fired_S
        return Output(loss, reconstruction.detach(), x_hat_BD / sae.scale, codes, fired_S)

    def _takes_dense_step(self, x_BD: Tensor, end_P: Tensor | None) -> bool:
        has_one = self.sae.architecture.dense_step is not None and end_P is None
        return has_one and kernels.available(x_BD) and not (self.is_bfloat16 or self._is_sparse(x_BD))

    def _dense_step(self, x_BD: Tensor, sparsity: float) -> Output:
        sae = self.sae
        if self.codes_BS is None or len(self.codes_BS) != len(x_BD):
            self.codes_BS = x_BD.new_empty(len(x_BD), sae.d_sae)
        weights = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
        coeff = sparsity * sae.architecture.cfg.sparsity_coeff
        step = tp.cast(base.DenseStep, sae.architecture.dense_step)
        loss, error, x_hat_BD = step(*weights, x_BD, coeff, self.codes_BS)
        n_S = sparse.n_positive(self.codes_BS)
        self.density = n_S.sum().item() / self.codes_BS.numel()
        return Output(loss, error, x_hat_BD / sae.scale, self.codes_BS, n_S > 0)

    # ---- codes ----

    def _encode(self, x_BD: Tensor) -> tuple[base.Coded, sparse.Index | None]:
        """Computes codes from scaled x; also returns their index if they are sparse."""
        sae, architecture = self.sae, self.sae.architecture
        weights = (sae.W_enc, sae.b_enc, sae.b_dec)
        if self._is_sparse(x_BD):
            found = self._find(x_BD)
            pre_n = sparse.encode_at(*weights, x_BD, found.index, found.value_n, self.is_bfloat16)
            return architecture.encode_sparse(sae, pre_n, found.index), found.index
        pre_BS = sparse.pre_activations(*weights, x_BD, is_bfloat16=self.is_bfloat16)
        coded = architecture.encode_dense(sae, pre_BS)
        if not architecture.is_always_sparse and kernels.available(x_BD):
            n_above = (pre_BS > architecture.cutoff(sae)).count_nonzero().item()
            self.density = n_above / pre_BS.numel()
        return coded, None

    def _is_sparse(self, x_BD: Tensor) -> bool:
        if self.way != "auto":
            return self.way == "sparse"
        if self.sae.architecture.is_always_sparse:
            return True
        # Dense on a GPU, because a count would wait for it.
        return kernels.available(x_BD) and self.density < SPARSE_BELOW

    def _find(self, x_BD: Tensor) -> sparse.Codes:
        sae, architecture = self.sae, self.sae.architecture
        W_SD = sae.W_enc.detach().T.contiguous()
        if self.is_bfloat16 and not kernels.available(x_BD):
            W_SD = W_SD.bfloat16()  # once, not for each part of the batch
        encoder = sparse.Encoder(W_SD, sae.b_enc.detach(), self.is_bfloat16, self.search_bytes)
        n_all = len(x_BD) * sae.d_sae
        n_expected = int(min(self.density, 1.0) * n_all)
        codes = architecture.find(sae, encoder, x_BD - sae.b_dec.detach(), n_expected, self.search)
        if not architecture.is_always_sparse and kernels.available(x_BD):
            self.density = len(codes.value_n) / n_all
        return codes

    # ---- reconstructions ----

    def _reconstruct_densely(self, f_BS: Tensor, x_BD: Tensor, end_P: Tensor) -> tuple[Tensor, Tensor]:
        """See `sparse.reconstruct`."""
        sae, ends = self.sae, end_P.tolist()
        x_hat_BD, error = sae.b_dec, torch.zeros((), dtype=x_BD.dtype, device=x_BD.device)
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            x_hat_BD = x_hat_BD + f_BS[:, start:end] @ sae.W_dec[start:end]
            error = error + (x_hat_BD - x_BD).square().mean() / len(ends)
        return error, x_hat_BD.detach()


@jaxtyped(typechecker=beartype.beartype)
def aux_k(
    sae: SparseAutoencoder,
    x_BD: Float[Tensor, "B D"],
    error_BD: Float[Tensor, "B D"],
    dead_C: Int[Tensor, " C"],
) -> Float[Tensor, ""]:
    """The AuxK loss (Gao et al. 2024, section 3.2): dead latents' error in reconstructing the residual.

    It uses the aux_k largest dead latents of each sample. The error is normalised by the residual's energy,
    and scaled by n_dead / aux_k if fewer than aux_k latents are dead.

    Args:
        x_BD: scaled activations.
        error_BD: the residual, scaled. It gets no gradient.
    """
    wanted = sae.architecture.cfg.aux_k or max(1, sae.d_vit // 2)
    k = min(wanted, len(dead_C))
    W_dec_CD = sae.W_dec[dead_C]
    pre_BC = sparse.pre_activations(sae.W_enc.T[dead_C].T, sae.b_enc[dead_C], sae.b_dec, x_BD)
    error_hat_BD = activations.top_k(pre_BC, k) @ W_dec_CD
    error_BD = error_BD.detach()
    energy = error_BD.square().mean().clamp(min=1e-12)
    return (k / wanted) * (error_hat_BD - error_BD).square().mean() / energy


def prefixes(cfg: config.Objective, d_sae: int, seed: int, step: int) -> list[int] | None:
    """Returns the increasing lengths of one step's prefixes, the last one d_sae. None if vanilla.

    Sampled prefixes (Bussmann et al. 2025, arXiv 2503.17547) follow a Pareto distribution with exponent 1/2,
    truncated at d_sae. They depend only on seed and step, so a resumed run draws the same ones.
    """
    if not isinstance(cfg, config.Matryoshka):
        return None
    n = min(cfg.n_prefixes, cfg.n_possible(d_sae))
    if cfg.prefixes == "fixed":
        return [d_sae >> i for i in reversed(range(n))]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    length_S = torch.arange(1, d_sae, dtype=torch.float64)
    weight_S = length_S**-0.5 - (length_S + 1) ** -0.5
    if n == 1:
        return [d_sae]
    drawn = torch.multinomial(weight_S, n - 1, replacement=False, generator=generator)
    return [*(drawn + 1).sort().values.tolist(), d_sae]
