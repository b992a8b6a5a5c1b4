"""The sparse autoencoder and its checkpoint.

    x' = scale x,   f = act((x' - b_dec) W_enc + b_enc),   x_hat = (f W_dec + b_dec) / scale

scale is one factor, or one for each dimension (D,).
Shape letters: N activations, B batch, D d_vit, S latents. W_enc is (D, S), W_dec is (S, D) with unit-norm
rows. In memory W_enc is the transpose of a contiguous (S, D), so a latent's weights are contiguous.
"""

import copy
import dataclasses
import math
import pathlib
import typing as tp

import beartype
import msgspec
import numpy as np
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev import errors, fields, machine
from saev.compat import checks, upstream
from saev.formats import checkpoint, space, tensors
from saev.nn import architectures, config, robust

TRUNCATED = "The file is truncated or edited. Train again."
HEADER = {"lib", "schema", "kind", "cls", "cfg", "activations"}
"""Keys of a checkpoint's header."""


class Activations(tp.TypedDict, total=False):
    """What an SAE was trained on, as recorded in its header."""

    vit_family: str
    vit_ckpt: str
    layers: list[int]
    patches: str


class SparseAutoencoder(torch.nn.Module):
    """A sparse autoencoder. In evaluation mode, codes do not depend on the rest of the batch.

    Args:
        cfg: the architecture, with d_vit set.
        seed: seed of the initial weights.

    Raises:
        UserError: the weights exceed this machine's memory.
    """

    def __init__(self, cfg: config.Sae, seed: int = 0):
        super().__init__()
        _check_memory(cfg)
        self.cfg = cfg = cfg.sized()
        self.activations: dict[str, tp.Any] = {}
        """What it was trained on, as recorded in its checkpoint (see `Activations`); may be empty."""
        generator = torch.Generator().manual_seed(seed)
        W_dec = _directions(cfg, generator)
        W_enc = W_dec if cfg.tied_init else _directions(cfg, generator)
        self.W_dec = torch.nn.Parameter(W_dec)
        self.W_enc = torch.nn.Parameter(W_enc.clone().T)
        self.b_enc = torch.nn.Parameter(torch.zeros(cfg.n_latents))
        self.b_dec = torch.nn.Parameter(torch.zeros(self.d_vit))
        self.architecture = architectures.of(cfg)
        self.architecture.start(self)
        self.scale: Tensor
        self.threshold: Tensor
        self.register_buffer("scale", torch.ones(self.d_vit if cfg.normalize == "per-dim" else ()))
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def d_vit(self) -> int:
        return tp.cast(int, self.cfg.d_vit)

    @property
    def d_sae(self) -> int:
        return self.cfg.n_latents

    @torch.no_grad()
    @jaxtyped(typechecker=beartype.beartype)
    def initialize(self, x_ND: Float[Tensor, "N D"]) -> robust.Typical:
        """Initialises scale, b_dec, with --sae.init data the weights, and the architecture's parameters.

        The scale makes the mean squared distance of ordinary x' from their mean d_vit, or with per-dim the
        variance of each dimension 1. A constant dimension gets the median scale of the others. Extreme
        activations affect neither scale nor mean (see `robust`).

        Args:
            x_ND: raw activations, in random order. With --sae.init data at least d_sae, if possible.

        Returns: what is typical of the activations, with per-dim of x'.
        """
        found = robust.typical(x_ND)
        centre_D = found.centre_D
        match self.cfg.normalize:
            case "scale":
                self.scale.copy_(math.sqrt(self.d_vit) / found.radius.clamp(min=1e-6))
            case "per-dim":
                centre_D, deviation_D = robust.by_dimension(x_ND)
                varying_C = deviation_D[deviation_D > 0]
                usual = varying_C.median() if len(varying_C) else torch.ones_like(found.radius)
                self.scale.copy_(1 / torch.where(deviation_D > 0, deviation_D, usual))
                found = robust.typical(x_ND * self.scale)
            case "none":
                pass
        match self.cfg.b_dec_init:
            case "mean":
                self.b_dec.copy_(centre_D * self.scale)
            case "geometric-median":
                if self.scale.ndim:  # of x', because the median depends on the units of the dimensions
                    self.b_dec.copy_(geometric_median(x_ND * self.scale))
                else:
                    self.b_dec.copy_(geometric_median(x_ND) * self.scale)
            case "zero":
                self.b_dec.zero_()
        if self.cfg.init == "data":
            self._start_at(x_ND, centre_D)
        self.architecture.initialize(self, x_ND)
        return found

    def _start_at(self, x_ND: Tensor, centre_D: Tensor) -> None:
        """Blends decoder rows with the directions of evenly spaced activations (data-point initialisation).

        So each latent starts where it fires on something (Anthropic's circuits updates, October 2025). If
        there are fewer activations than latents, the last latents stay random.
        """
        n = min(len(x_ND), self.d_sae)
        row_C = torch.arange(n, device=x_ND.device) * len(x_ND) // n
        away_CD = (x_ND[row_C] - centre_D) * self.scale
        is_there_C1 = away_CD.norm(dim=1, keepdim=True) > 0  # not the centre itself
        unit_CD = torch.where(is_there_C1, torch.nn.functional.normalize(away_CD, dim=1), self.W_dec[:n])
        self.W_dec[:n] = torch.lerp(self.W_dec[:n], unit_CD, self.cfg.init_blend)
        self.normalize_decoder()
        if self.cfg.tied_init:
            self.W_enc.copy_(self.W_dec.T)

    def encode(self, x: Tensor | np.ndarray) -> Float[Tensor, "*batch S"]:
        """Computes codes of raw activations (*batch, D) of any float type, in the model's float type.

        Raises:
            UserError: x does not hold floats, or its last dimension is not d_vit.
        """
        x_BD = self._rows(x, self.d_vit, "encode")
        pre_BS = (x_BD * self.scale - self.b_dec) @ self.W_enc + self.b_enc
        f_BS = self.architecture.encode(self, pre_BS)
        return f_BS.reshape(*x.shape[:-1], self.d_sae)

    def decode(self, f: Tensor | np.ndarray) -> Float[Tensor, "*batch D"]:
        """Reconstructs raw activations from codes (*batch, S) of any float type. Raises as `encode`."""
        f_BS = self._rows(f, self.d_sae, "decode")
        return ((f_BS @ self.W_dec + self.b_dec) / self.scale).reshape(*f.shape[:-1], self.d_vit)

    def forward(self, x: Tensor | np.ndarray) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch S"]]:
        """Returns (reconstructions, codes). Raises as `encode`."""
        f = self.encode(x)
        return self.decode(f), f

    def _rows(self, values: tp.Any, width: int, caller: str) -> Tensor:
        """Flattens (*batch, width) to (B, width), with the weights' dtype and device."""
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            values = torch.from_numpy(values.astype(np.float64))
        is_dense = isinstance(values, Tensor) and values.layout == torch.strided
        is_float = is_dense and values.is_floating_point() and not values.is_meta
        if not is_float or values.ndim == 0 or values.shape[-1] != width:
            shape = f" of shape {tuple(values.shape)}" if hasattr(values, "shape") else ""
            seen = f"{getattr(values, 'dtype', type(values).__name__)}{shape}"
            raise errors.UserError(
                f"{caller}: got {seen}; pass a dense tensor or array of floats whose last dimension is "
                f"{width}."
            )
        return values.reshape(-1, width).to(self.W_dec)

    def directions(self) -> Float[Tensor, "S D"]:
        """Decoder rows in the units of raw activations: what a code of 1 adds to the reconstruction."""
        return self.W_dec / self.scale

    def with_parameters(self, tensors: dict[str, Tensor]) -> "SparseAutoencoder":
        """The same SAE with other tensors for its parameters, by name. It shares the buffers."""
        other = copy.copy(self)
        other._parameters = tp.cast(tp.Any, tensors)
        return other

    def check_fits(self, acts: space.Space, ckpt: str, flag: str) -> None:
        """Refuses activations of another space than it was trained on, as far as its checkpoint says.

        The tokens may be others. Of several layers that it was trained on, any will do.

        Args:
            flag: names the activations, such as "--data.shard-root shards/x".

        Raises:
            UserError: they have another width, ViT or layer.
        """
        mine = space.Space.of(self.activations, self.d_vit)
        if acts.layers and set(acts.layers) <= set(mine.layers or ()):
            mine = dataclasses.replace(mine, layers=acts.layers)
        mine.check_same(acts, whose=ckpt, flag=flag, patches=False)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scales decoder rows to norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8))

    @torch.no_grad()
    def remove_parallel_grad(self) -> None:
        """Removes each decoder row's gradient along the row, which normalising would undo."""
        grad_SD = self.W_dec.grad
        assert grad_SD is not None, "call backward first"
        along_S = (grad_SD * self.W_dec).sum(dim=1, keepdim=True)
        grad_SD -= along_S * self.W_dec


def _check_memory(cfg: config.Sae) -> None:
    memory_gb = 1e-9 * machine.memory_bytes()
    if config.weight_gb(cfg) > memory_gb:
        raise errors.UserError(
            f"{cfg.n_latents:,} latents of {cfg.d_vit:,} dimensions: their weights take "
            f"{config.weight_gb(cfg):,.0f} GB, this job has {memory_gb:,.0f} GB. "
            "Lower --sae.exp-factor or --sae.d-sae."
        )


def _directions(cfg: config.Sae, generator: torch.Generator) -> Float[Tensor, "S D"]:
    """Draws unit vectors uniformly."""
    drawn_SD = torch.randn(cfg.n_latents, tp.cast(int, cfg.d_vit), generator=generator)
    return torch.nn.functional.normalize(drawn_SD, dim=1)


@jaxtyped(typechecker=beartype.beartype)
def geometric_median(x_ND: Float[Tensor, "N D"], n_iters: int = 100) -> Float[Tensor, " D"]:
    """The point with the smallest mean distance to at most 8,192 of the activations (Weiszfeld 1937)."""
    x_ND = x_ND[:: math.ceil(len(x_ND) / 8192)]
    median_D = x_ND.mean(dim=0)
    for _ in range(n_iters):
        weight_N = 1 / robust.distance(x_ND, median_D).clamp(min=1e-8)
        last_D, median_D = median_D, weight_N @ x_ND / weight_N.sum()
        if torch.linalg.vector_norm(median_D - last_D) <= 1e-6 * torch.linalg.vector_norm(median_D):
            break
    return median_D


@beartype.beartype
def save(
    sae: SparseAutoencoder, fpath: pathlib.Path | str, activations: dict[str, tp.Any] | None = None
) -> None:
    """Writes the checkpoint atomically: a JSON header line, then the state dict.

    Args:
        activations: what it was trained on (see `Activations`). Default: what `load` found.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in sae.state_dict().items()}
    header = {
        "cls": type(sae.cfg).__name__,
        "cfg": dataclasses.asdict(sae.cfg),
        "activations": sae.activations if activations is None else activations,
    }
    checkpoint.write(fields.path(fpath), "sae", header, tensors.dump(state))


@beartype.beartype
def load(fpath: pathlib.Path | str, device: str = "cpu") -> SparseAutoencoder:
    """Loads a checkpoint of saev or upstream saev (`saev.compat.upstream`), in evaluation mode.

    Raises:
        UserError: as `checkpoint.read`; or the architecture is unknown, or tensors do not match the header.
    """
    fpath = fields.path(fpath)
    header, payload = checkpoint.read(fpath, "sae")
    found = upstream.upgrade(header, fpath) if checkpoint.is_upstream(header) else None
    header = found.header() if found else header
    checks.refuse_unknown(header, HEADER, str(fpath))
    cfg = _config(header, fpath)
    state = tensors.load(payload, str(fpath), TRUNCATED)
    state = upstream.convert(found, state, fpath) if found else state
    try:
        shape = (cfg.n_latents, cfg.d_vit)
        if state["W_dec"].shape != shape:  # before allocating a model of that size
            raise ValueError(f"W_dec has shape {tuple(state['W_dec'].shape)}")
        sae = SparseAutoencoder(cfg)
        sae.load_state_dict(state)
        sae.activations = tp.cast(tp.Any, header.get("activations"))
        msgspec.convert(sae.activations, Activations)
    except Exception as err:  # names, types or shapes that do not match
        raise errors.UserError(
            f"{fpath}: its tensors do not match its header ({errors.first_line(err)}). {TRUNCATED}"
        ) from err
    return ready(sae, str(fpath)).to(device)


def ready(sae: SparseAutoencoder, where: str) -> SparseAutoencoder:
    """Sets evaluation mode without gradients, and checks the weights. Every loader calls this last.

    Raises:
        UserError: a weight is NaN or infinite. `where` names the file.
    """
    state = sae.state_dict()
    if "log_threshold" in state:  # a threshold of 0 is valid
        state["log_threshold"] = state["log_threshold"].exp()
    tensors.check_finite(state, where, "Train again, or use an older checkpoint.")
    return sae.eval().requires_grad_(False)


def _config(header: dict[str, object], fpath: pathlib.Path) -> config.Sae:
    cls = config.BY_NAME.get(str(header.get("cls")))
    if cls is None:
        raise errors.UserError(
            f"{fpath}: architecture {header.get('cls')!r} is unknown (known: "
            f"{', '.join(config.BY_NAME)}). Use the version that wrote it."
        )
    try:
        cfg = cls(**header["cfg"])
        if cfg.d_vit is None:
            raise ValueError("d_vit is missing")
        for f in dataclasses.fields(cls):
            if isinstance(value := getattr(cfg, f.name), bool) and f.type is not bool:
                raise ValueError(f"{f.name} is {value}")
        return cfg
    except Exception as err:  # wrong keys or types
        raise errors.UserError(
            f"{fpath}: its header's cfg does not match {cls.__name__}: {errors.first_line(err)}. Train again."
        ) from err
