"""The interface of an architecture. B batch, D d_vit, S latents, K the first K latents, n sparse codes."""

import abc
import collections.abc
import typing as tp

from torch import Tensor

from saev.nn import sparse

if tp.TYPE_CHECKING:
    from saev.nn.sae import SparseAutoencoder

REGISTRY: dict[type, type["Architecture"]] = {}
"""Class of a config -> its architecture. Each subclass registers itself."""


class Coded(tp.NamedTuple):
    """A batch's codes, and their penalty."""

    f: Tensor
    """(n,) or (B, S), differentiable."""
    penalty: Tensor | None = None
    """Mean L1 or L0 over the batch, differentiable. The objective multiplies it by `cfg.sparsity_coeff`."""


DenseStep = collections.abc.Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor, Tensor]
]
"""(W_enc, b_enc, W_dec, b_dec, scaled x_BD, coefficient, buffer for the codes) -> (loss, error, x_hat_BD)."""


class Architecture(abc.ABC):
    """What an SAE computes between the encoder's product and the decoder, and its penalty.

    A subclass is defined in a module of `saev.nn.architectures` as `class Name(base.Architecture,
    cfg=config.Name)`. Its only state is the config. Everything learned belongs to the SAE that is passed in:
    W_enc, b_enc, W_dec, b_dec, the buffers `scale` and `threshold`, and parameters that `start` adds. All x
    and pre-activations are scaled.

    Which methods to implement:
    - always `encode`, `encode_dense` and `encode_sparse`;
    - `largest` if `is_elementwise`, else `find`;
    - `find` if `is_always_sparse`, else `cutoff`;
    - `fires_above` if `find` depends on the rest of the batch, or finds more than fires.

    The config class has what must not wait for torch (default learning rate, memory), and switches features
    on: AuxK needs the fields `aux_coeff` and `aux_k`, resampling needs `resample_every`, and a penalty with
    warm-up needs `sparsity_coeff`.
    """

    is_always_sparse: tp.ClassVar[bool] = False
    """A training step always uses sparse codes, because few latents fire by construction."""
    is_elementwise: tp.ClassVar[bool] = True
    """In evaluation mode, a code depends only on its own pre-activation and rises with it. So the largest
    code over an image's patches is the code of the largest pre-activation."""
    is_signed: bool = False
    """Codes may be negative."""
    dense_step: tp.ClassVar[DenseStep | None] = None
    """A faster step for the vanilla objective with dense codes on a CPU (optional)."""

    def __init_subclass__(cls, cfg: type):
        REGISTRY[cfg] = cls

    def __init__(self, cfg: tp.Any):
        self.cfg = cfg

    def start(self, sae: "SparseAutoencoder") -> None:  # noqa: B027 (optional)
        """Adds the architecture's own parameters to a new SAE."""

    def initialize(self, sae: "SparseAutoencoder", x_ND: Tensor) -> None:  # noqa: B027
        """Initialises these parameters from raw activations. scale and b_dec are already set."""

    def calibrate(self, sae: "SparseAutoencoder", x_ND: Tensor) -> None:  # noqa: B027
        """Sets what inference needs besides the parameters, for an SAE that is not trained."""

    def set_threshold(self, sae: "SparseAutoencoder", threshold: Tensor) -> None:
        """Sets the threshold, () or (S,), to that of another library's SAE."""
        sae.threshold.copy_(threshold.clamp(min=0))

    @abc.abstractmethod
    def encode(self, sae: "SparseAutoencoder", pre_BS: Tensor) -> Tensor:
        """Computes codes, in training mode or evaluation mode (`sae.training`)."""

    @abc.abstractmethod
    def encode_dense(self, sae: "SparseAutoencoder", pre_BS: Tensor) -> Coded:
        """Computes codes and penalty of a training step. It may overwrite the pre-activations.

        Unless `is_always_sparse`, a row's codes do not depend on the other rows: a GPU may divide the batch.
        """

    @abc.abstractmethod
    def encode_sparse(self, sae: "SparseAutoencoder", pre_n: Tensor, index: sparse.Index) -> Coded:
        """Computes the same from the pre-activations that `find` found."""

    def cutoff(self, sae: "SparseAutoencoder") -> Tensor:
        """(S,): in a training step, only pre-activations above it can fire or get a gradient."""
        raise NotImplementedError

    def find(
        self,
        sae: "SparseAutoencoder",
        encoder: sparse.Encoder,
        xc_BD: Tensor,
        n_expected: int,
        search: sparse.BatchSearch,
    ) -> sparse.Codes:
        """Finds the pre-activations that can fire or get a gradient in a training step.

        Args:
            xc_BD: x - b_dec.
            n_expected: about how many there are.
            search: for architectures that select over the whole batch; it lasts for the whole run.
        """
        return sparse.above(encoder, xc_BD, self.cutoff(sae), n_expected)

    def infer(
        self, sae: "SparseAutoencoder", encoder: sparse.Encoder, xc_BD: Tensor, n_expected: int
    ) -> sparse.Codes:
        """Finds the codes of `encode` in evaluation mode. Some of them may be 0. Arguments as for `find`."""
        if (cutoff_S := self.fires_above(sae)) is not None:
            return sparse.above(encoder, xc_BD, cutoff_S.contiguous(), n_expected)
        found = self.find(sae, encoder, xc_BD, n_expected, sparse.BatchSearch())
        return sparse.Codes(self.encode_sparse(sae, found.value_n, found.index).f, found.index)

    def fires_above(self, sae: "SparseAutoencoder") -> Tensor | None:
        """(S,): in evaluation mode, a code is its pre-activation above this, else 0. None if that is not so.

        With it, `infer` finds nothing else.
        """
        return None

    def largest(self, sae: "SparseAutoencoder", pre_BK: Tensor) -> Tensor:
        """Codes of the first K latents in evaluation mode, from their largest pre-activations in an image."""
        raise NotImplementedError
