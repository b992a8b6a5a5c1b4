"""Training losses. B batch, D d_vit, S latents, P prefixes, n codes, C dead latents, R rows of a part.

A loss is computed through sparse codes (`saev.nn.sparse`) if few latents fire, and through dense products
otherwise. Both give the same values up to rounding. On a GPU, whatever takes B x S (or B x C) numbers is
computed in parts of the batch if they do not fit.
"""

import typing as tp

import beartype
import torch
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from saev.nn import activations, config, kernels, metrics, parts, partsizes, sparse
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
    codes: "sparse.Codes | Float[Tensor, 'B S'] | metrics.CodeSums"
    """Only their sums if they were dense and the batch was divided."""
    fired_S: Bool[Tensor, " S"]
    """Latents that fired in this batch."""
    correlations: metrics.CorrelationSums | None = None
    """Of a divided batch, if asked for: of a seeded sample of latents, as in an evaluation."""

    def dense(self) -> Float[Tensor, "B S"]:
        """The codes with their zeros.

        Raises:
            ValueError: only their sums are known.
        """
        if isinstance(self.codes, metrics.CodeSums):
            raise ValueError("the batch was divided, so its codes were not kept")
        return self.codes if isinstance(self.codes, Tensor) else self.codes.dense()

    @property
    def values(self) -> Tensor | metrics.CodeSums:
        """The codes' values, without zeros if the codes are sparse; or their sums."""
        return self.codes.value_n if isinstance(self.codes, sparse.Codes) else self.codes


class Objective:
    """The loss of one sparse autoencoder.

    The last step's `density` decides between sparse and dense codes, which round differently.

    Args:
        sae: in training mode.
        cfg: vanilla or Matryoshka.
        gather: see `sparse.BatchSearch`.
        n_processes: the number of processes that share each batch.
        part_bytes: most bytes that B x S numbers take on a GPU at once.
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
        part_bytes: int = 2**33,
        way: tp.Literal["auto", "dense", "sparse"] = "auto",
    ):
        self.sae = sae
        self.cfg = cfg
        self.search = sparse.BatchSearch(gather, n_processes)
        self.is_bfloat16 = is_bfloat16
        self.part_bytes = part_bytes
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
        correlates: bool = False,
    ) -> Output:
        """Computes the mean squared error plus the architecture's penalty and AuxK.

        The error is in scaled units, so that one learning rate suits every layer. On a GPU, the gradients of
        dense codes of a divided batch are computed here already, and `backward` passes them on.

        Args:
            x_BD: raw activations.
            sparsity: warm-up factor of the sparsity coefficient.
            end_P: the prefixes' lengths, increasing, the last one d_sae. None: only the whole dictionary.
                On the CPU: reading them from a GPU would wait for it.
            dead_C: latents for the AuxK loss.
            correlates: if the batch is divided, the result has `correlations`.
        """
        sae = self.sae
        scaled_BD = x_BD * sae.scale
        if self._takes_dense_step(scaled_BD, end_P):
            return self._dense_step(scaled_BD, sparsity)
        if end_P is None:
            end_P = torch.tensor([sae.d_sae])
        if self._is_sparse(scaled_BD):
            out = self._sparse_step(scaled_BD, sparsity, end_P)
        elif self.is_divided(scaled_BD) and not sae.architecture.is_always_sparse:
            out = self._divided_step(scaled_BD, sparsity, end_P, correlates)
        else:
            out = self._whole_step(sae, scaled_BD, sparsity, end_P)
        if correlates and isinstance(out.codes, sparse.Codes) and self.is_divided(scaled_BD):
            out = out._replace(correlations=_correlations(out.codes))
        if dead_C is not None and len(dead_C) and getattr(sae.cfg, "aux_coeff", 0):
            error_BD = scaled_BD - out.x_hat_BD
            aux = aux_k(sae, scaled_BD, error_BD, dead_C, self.part_bytes)
            out = out._replace(loss=out.loss + sae.cfg.aux_coeff * aux)
        return out._replace(x_hat_BD=out.x_hat_BD / sae.scale)

    def rows(self, x_BD: Tensor) -> list[slice]:
        """The parts of a batch whose B x S numbers a GPU holds at once. A CPU holds all."""
        return parts.slices(len(x_BD), self._n_rows(x_BD))

    def is_divided(self, x_BD: Tensor) -> bool:
        return self._n_rows(x_BD) < len(x_BD)

    def _n_rows(self, x_BD: Tensor) -> int:
        if kernels.available(x_BD):
            return max(1, len(x_BD))
        each = 4 * self.sae.cfg.GPU_CODES or partsizes.PRE_BYTES
        return partsizes.n_rows(len(x_BD), self.sae.d_sae, self.part_bytes, each)

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

    # ---- steps; each returns x_hat in scaled units ----

    def _sparse_step(self, x_BD: Tensor, sparsity: float, end_P: Tensor) -> Output:
        sae = self.sae
        found = self._find(x_BD)
        weights = (sae.W_enc, sae.b_enc, sae.b_dec)
        pre_n = sparse.encode_at(*weights, x_BD, found.index, found.value_n, self.is_bfloat16)
        f_n, penalty = sae.architecture.encode_sparse(sae, pre_n, found.index)
        error, x_hat_BD = sparse.reconstruct(
            f_n, sae.W_dec, sae.b_dec, x_BD, found.index, end_P, self.is_bfloat16
        )
        codes = sparse.Codes(f_n.detach(), found.index)
        loss = self._penalised(error, penalty, sparsity)
        return Output(loss, error.detach(), x_hat_BD, codes, codes.fired_S)

    def _whole_step(self, sae: SparseAutoencoder, x_BD: Tensor, sparsity: float, end_P: Tensor) -> Output:
        """Dense codes of these rows, by an SAE that may stand in for the own one (`with_parameters`)."""
        weights = (sae.W_enc, sae.b_enc, sae.b_dec)
        pre_BS = sparse.pre_activations(*weights, x_BD, is_bfloat16=self.is_bfloat16)
        f_BS, penalty = sae.architecture.encode_dense(sae, pre_BS)
        if not sae.architecture.is_always_sparse and kernels.available(x_BD):
            n_above = (pre_BS > sae.architecture.cutoff(sae)).count_nonzero().item()
            self.density = n_above / pre_BS.numel()
        error, x_hat_BD = _reconstruct_densely(sae, f_BS, x_BD, end_P)
        codes_BS = f_BS.detach()
        loss = self._penalised(error, penalty, sparsity)
        return Output(loss, error.detach(), x_hat_BD, codes_BS, (codes_BS != 0).any(dim=0))

    def _divided_step(self, x_BD: Tensor, sparsity: float, end_P: Tensor, correlates: bool) -> Output:
        """Dense codes of one part of the batch after another. Their gradients are computed here."""
        sae, zero = self.sae, x_BD.new_zeros(())
        parameters = dict(sae.named_parameters())
        error, x_hat_BD = zero.clone(), torch.empty_like(x_BD)
        fired_S = torch.zeros(sae.d_sae, dtype=torch.bool, device=x_BD.device)
        sums = metrics.CodeSums(zero.long(), zero)
        correlations = metrics.CorrelationSums(sae.d_sae, x_BD.device) if correlates else None

        def loss_of(rows: slice, *tensors: Tensor) -> Tensor:
            nonlocal sums
            one = sae.with_parameters(dict(zip(parameters, tensors, strict=True)))
            share = len(x_BD[rows]) / len(x_BD)
            out = self._whole_step(one, x_BD[rows], sparsity, end_P)
            with torch.no_grad():
                f_RS = out.dense()
                error.add_(out.reconstruction, alpha=share)
                x_hat_BD[rows] = out.x_hat_BD
                fired_S.logical_or_(out.fired_S)
                sums = sums + metrics.CodeSums.of(f_RS)
                if correlations is not None:
                    correlations.add(f_RS)
            return share * out.loss

        loss = parts.summed(loss_of, self.rows(x_BD), *parameters.values())
        return Output(loss, error, x_hat_BD, sums, fired_S, correlations)

    def _penalised(self, error: Tensor, penalty: Tensor | None, sparsity: float) -> Tensor:
        if penalty is None:
            return error
        return error + sparsity * self.sae.architecture.cfg.sparsity_coeff * penalty

    # ---- codes ----

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
        encoder = sparse.Encoder(W_SD, sae.b_enc.detach(), self.is_bfloat16, self.part_bytes)
        n_all = len(x_BD) * sae.d_sae
        n_expected = int(min(self.density, 1.0) * n_all)
        codes = architecture.find(sae, encoder, x_BD - sae.b_dec.detach(), n_expected, self.search)
        if not architecture.is_always_sparse and kernels.available(x_BD):
            self.density = len(codes.value_n) / n_all
        return codes


def _reconstruct_densely(
    sae: SparseAutoencoder, f_BS: Tensor, x_BD: Tensor, end_P: Tensor
) -> tuple[Tensor, Tensor]:
    """See `sparse.reconstruct`."""
    ends = end_P.tolist()
    x_hat_BD, error = sae.b_dec, torch.zeros((), dtype=x_BD.dtype, device=x_BD.device)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        x_hat_BD = x_hat_BD + f_BS[:, start:end] @ sae.W_dec[start:end]
        error = error + (x_hat_BD - x_BD).square().mean() / len(ends)
    return error, x_hat_BD.detach()


def _correlations(codes: sparse.Codes) -> metrics.CorrelationSums:
    sums = metrics.CorrelationSums(codes.index.n_latents, codes.value_n.device)
    sums.add_columns(codes.columns(sums.latent_C))
    return sums


@jaxtyped(typechecker=beartype.beartype)
def aux_k(
    sae: SparseAutoencoder,
    x_BD: Float[Tensor, "B D"],
    error_BD: Float[Tensor, "B D"],
    dead_C: Int[Tensor, " C"],
    n_bytes: int = 2**33,
) -> Float[Tensor, ""]:
    """The AuxK loss (Gao et al. 2024, section 3.2): dead latents' error in reconstructing the residual.

    It uses the aux_k largest dead latents of each sample. The error is normalised by the residual's energy,
    and scaled by n_dead / aux_k if fewer than aux_k latents are dead.

    Args:
        x_BD: scaled activations.
        error_BD: the residual, scaled. It gets no gradient.
        n_bytes: most bytes that B x C numbers take on a GPU at once. More are computed in parts of the batch.
    """
    wanted = sae.architecture.cfg.aux_k or max(1, sae.d_vit // 2)
    k = min(wanted, len(dead_C))
    weights = (sae.W_enc.T[dead_C], sae.b_enc[dead_C], sae.W_dec[dead_C], sae.b_dec)
    error_BD = error_BD.detach()

    def squares(rows: slice, W_enc_CD: Tensor, b_enc_C: Tensor, W_dec_CD: Tensor, b_dec: Tensor) -> Tensor:
        pre_RC = sparse.pre_activations(W_enc_CD.T, b_enc_C, b_dec, x_BD[rows])
        error_hat_RD = activations.top_k(pre_RC, k) @ W_dec_CD
        return (error_hat_RD - error_BD[rows]).square()

    energy = error_BD.square().mean().clamp(min=1e-12)
    size = partsizes.n_rows(len(x_BD), len(dead_C), n_bytes, partsizes.AUX_BYTES)
    if kernels.available(x_BD) or size >= len(x_BD):
        return (k / wanted) * squares(slice(None), *weights).mean() / energy
    share = k / wanted / error_BD.numel()
    rows = parts.slices(len(x_BD), size)
    return parts.summed(lambda *args: share * squares(*args).sum(), rows, *weights) / energy


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
