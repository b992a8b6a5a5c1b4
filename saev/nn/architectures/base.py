"""The contract of an architecture. B batch, D d_vit, S latents, K of them, n sparse codes."""

import abc
import collections.abc
import typing as tp

from torch import Tensor

from saev.nn import sparse

if tp.TYPE_CHECKING:
    from saev.nn.sae import SparseAutoencoder

REGISTRY: dict[type, type["Architecture"]] = {}
"""Class of a config -> its architecture. Defining a subclass fills it."""


class Coded(tp.NamedTuple):
    """A batch's codes as the objective needs them."""

    f: Tensor
    """(n,) or (B, S), differentiable."""
    penalty: Tensor | None = None
    """Differentiable: L1 or L0 of a sample's code, averaged over the batch. The objective adds it times `cfg.sparsity_coeff`."""


DenseStep = collections.abc.Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor, Tensor]
]
"""(W_enc, b_enc, W_dec, b_dec, scaled x_BD, coefficient, memory for the codes) -> (loss, error, x_hat_BD)."""


class Architecture(abc.ABC):
    """What an SAE computes between W_enc's product and the decoder, and what else differs between architectures.

    A subclass lies in a module of `saev.nn.architectures` and says `class Name(base.Architecture, cfg=config.Name)`.
    It remembers nothing but its config; whatever is learned belongs to the SAE that is passed in: W_enc, b_enc, W_dec,
    b_dec, the buffers `scale` and `threshold`, and parameters that `start` adds. All x and pre-activations are scaled.

    Every architecture implements `encode`, `encode_dense` and `encode_sparse`. Then either codes are elementwise
    (`is_elementwise`: a code depends on, and rises with, its own pre-activation alone, in evaluation mode), and it
    implements `largest`; or it implements `find`. Those that choose a fixed number of latents are `is_always_sparse` and
    implement `find`; the others implement `least`.

    What depends on the config alone and must not wait for torch (default learning rate, memory) is said by the config
    class. AuxK acts where the config has `aux_coeff` and `aux_k`, resampling where it has `resample_every`, the warm-up
    of the sparsity coefficient where it has `sparsity_coeff`.
    """

    is_always_sparse: tp.ClassVar[bool] = False
    """So few latents fire that a training step never needs dense codes."""
    is_elementwise: tp.ClassVar[bool] = True
    """See above: then the largest code over an image's patches is the code of the largest pre-activation."""
    is_signed: bool = False
    """Codes may be negative."""
    dense_step: tp.ClassVar[DenseStep | None] = None
    """A faster step of the vanilla objective with dense codes on a CPU, if there is one."""

    def __init_subclass__(cls, cfg: type):
        REGISTRY[cfg] = cls

    def __init__(self, cfg: tp.Any):
        self.cfg = cfg

    def start(self, sae: "SparseAutoencoder") -> None:  # noqa: B027 (most add nothing)
        """Adds parameters of its own to a new SAE."""

    def initialize(self, sae: "SparseAutoencoder", x_ND: Tensor) -> None:  # noqa: B027
        """Fits its own parameters to raw activations, once scale and b_dec are."""

    def set_threshold(self, sae: "SparseAutoencoder", threshold: Tensor) -> None:
        """Takes over the threshold (a number, or one for each latent) of another library's SAE."""
        sae.threshold.copy_(threshold.clamp(min=0))

    @abc.abstractmethod
    def encode(self, sae: "SparseAutoencoder", pre_BS: Tensor) -> Tensor:
        """Codes of pre-activations, in training mode (`sae.training`) or evaluation mode."""

    @abc.abstractmethod
    def encode_dense(self, sae: "SparseAutoencoder", pre_BS: Tensor) -> Coded:
        """Codes and penalty of a training step. May overwrite pre-activations with their codes."""

    @abc.abstractmethod
    def encode_sparse(self, sae: "SparseAutoencoder", pre_n: Tensor, index: sparse.Index) -> Coded:
        """The same by the pre-activations that `find` found."""

    def least(self, sae: "SparseAutoencoder") -> Tensor:
        """(S,) Pre-activations above it matter in a training step: they fire, or a gradient passes."""
        raise NotImplementedError

    def find(
        self,
        sae: "SparseAutoencoder",
        encoder: sparse.Encoder,
        xc_BD: Tensor,
        n_likely: int,
        search: sparse.BatchSearch,
    ) -> sparse.Codes:
        """Pre-activations that matter in a training step; where codes are not elementwise, in evaluation mode too.

        Args:
            xc_BD: x - b_dec.
            n_likely: about how many there are.
            search: for those that choose over the whole batch; it lives as long as the training.
        """
        return sparse.above(encoder, xc_BD, self.least(sae), n_likely)

    def largest(self, sae: "SparseAutoencoder", pre_BK: Tensor) -> Tensor:
        """Codes of the first K latents in evaluation mode, by their largest pre-activations over an image's patches."""
        raise NotImplementedError
