"""The common interface of all families of vision transformers.

Recorded layer i is the residual stream after block i. It comes from the library's own
`forward_intermediates`, which stops after the last requested block.

Shape letters: B images, L layers, T tokens, P patches, X prefix tokens, D d_vit.
"""

import collections.abc
import contextlib
import dataclasses
import logging
import math
import pathlib
import warnings

import beartype
import PIL.Image
import torch
from jaxtyping import Float, Float32, jaxtyped
from torch import Tensor

from saev import errors
from saev.data import config, images, layout, pixels
from saev.formats import space

Intermediates = collections.abc.Callable[[Tensor, list[int]], list[tuple[Tensor, Tensor | None]]]
"""Maps (images, sorted layers) to (patch tokens, prefix tokens) of each layer."""


@dataclasses.dataclass(frozen=True)
class Tower:
    """An image tower and what `Vit` needs to know about it."""

    module: torch.nn.Module
    intermediates: Intermediates
    blocks: torch.nn.ModuleList | torch.nn.Sequential
    n_prefix: int
    """Tokens before the patches: [CLS], registers, distillation."""
    has_cls: bool
    grid: tuple[int, int]
    """(rows, columns) of the patches."""
    transform: images.Transform
    ckpt_id: str
    """Name that identifies the model and its weights, without the input size."""


class Vit(torch.nn.Module):
    """An image tower in evaluation mode.

    Attributes:
        family, ckpt_id: names that identify the model in the shards' metadata.
        d_vit, n_blocks, n_patches, grid (rows, columns), cls_token: its shape.
        transform: turns a photo into its input.
        resize: --resize, or None if it is what the family does anyway.

    Raises:
        UserError: block 0 does not output one token per patch, or the library reports other tokens.
    """

    def __init__(self, tower: Tower, cfg: config.Vit):
        super().__init__()
        self.family = cfg.vit_family
        self.ckpt_id = tower.ckpt_id + _variant(cfg)
        self.module = tower.module.eval().requires_grad_(False)
        self.intermediates = tower.intermediates
        self.n_blocks = len(tower.blocks)
        self.cls_token = tower.has_cls
        self.grid = tower.grid
        self.n_patches = math.prod(tower.grid)
        self.transform = tower.transform.with_resize(cfg.resize, self.n_patches)
        self.resize = cfg.resize if self.transform != tower.transform else None
        self.autocast = cfg.autocast != "off"
        self.d_vit = self._probe(tower, cfg)

    @torch.inference_mode()
    def _probe(self, tower: Tower, cfg: config.Vit) -> int:
        """Returns the width of block 0's output, after checking that exactly this output is recorded.

        Models that only resemble a ViT fail here.
        """
        seen: list[Tensor] = []
        hook = tower.blocks[0].register_forward_hook(lambda _module, _args, out: seen.append(out))
        height, width = self.transform.size
        ramp_BCHW = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
        (recorded,) = self.intermediates(ramp_BCHW, [0])
        hook.remove()
        if seen[0].shape[:-1] != (1, tower.n_prefix + self.n_patches):
            raise not_a_vit(cfg)
        cls_BXD = seen[0][:, : int(self.cls_token)]
        want_BTD = torch.cat([cls_BXD, seen[0][:, tower.n_prefix :]], dim=1)
        if not torch.equal(self._tokens(*recorded), want_BTD):
            raise not_a_vit(cfg)
        return want_BTD.shape[2]

    @jaxtyped(typechecker=beartype.beartype)
    def forward(
        self, imgs_BCHW: Float[Tensor, "B 3 H W"], layers: tuple[int, ...]
    ) -> Float32[Tensor, "B L T D"]:
        """Returns the activations of `layers`, in this order. [CLS], if any, comes first; no registers."""
        ordered = sorted(layers)
        with torch.autocast(imgs_BCHW.device.type, torch.bfloat16, enabled=self.autocast):
            acts = dict(zip(ordered, self.intermediates(imgs_BCHW, ordered), strict=True))
        return torch.stack([self._tokens(*acts[layer]) for layer in layers], dim=1).float()

    @jaxtyped(typechecker=beartype.beartype)
    def patches(self, photo: PIL.Image.Image | pathlib.Path | str, layer: int) -> Float32[Tensor, "P D"]:
        """Returns the activations of one photo's patches in raster order, as a dump records them.

        With --resize flexible, P is the number of the photo's own patches (`layout`).

        Args:
            photo: the path of a photo, or a decoded one.
            layer: the block whose output is returned, counted from 0, or from the end if negative.

        Raises:
            UserError: the photo cannot be read, or there is no such block.
        """
        layers = resolve_layers((layer,), self.n_blocks)
        img_CHW = self.transform(pixels.opened(photo)).to(next(self.parameters()).device)
        with torch.no_grad():
            return self(img_CHW[None], layers)[0, 0, int(self.cls_token) :]

    def layout(self, photo: PIL.Image.Image | pathlib.Path | str) -> layout.Layout:
        """Where the patches of a photo lie, and which show nothing of it. Raises as `patches`."""
        return layout.Layout.of(self.transform, self.n_patches, pixels.opened(photo).size)

    def space(self, layer: int) -> space.Space:
        """The space of `patches` at a layer."""
        layers = resolve_layers((layer,), self.n_blocks)
        found = {"vit_family": self.family, "vit_ckpt": self.ckpt_id, "layers": layers, "patches": "image"}
        return space.Space.of(found, self.d_vit)

    def _tokens(self, patches_BPD: Tensor, prefix_BXD: Tensor | None) -> Tensor:
        """Keeps the first prefix token if it is [CLS]. The others are registers or a distillation token."""
        if not self.cls_token:
            return patches_BPD
        assert prefix_BXD is not None, "a model with [CLS] gives prefix tokens"
        return torch.cat([prefix_BXD[:, :1], patches_BPD], dim=1)


def resolve_layers(layers: tuple[int, ...], n_blocks: int) -> tuple[int, ...]:
    """Resolves negative layers, which count from the end.

    Raises:
        UserError: the model has no such block, or a layer is repeated.
    """
    out = tuple(layer + n_blocks if layer < 0 else layer for layer in layers)
    if bad := [layer for layer, i in zip(layers, out, strict=True) if not 0 <= i < n_blocks]:
        raise errors.UserError(
            f"--vit-layers {bad[0]}: the model has {n_blocks} blocks. "
            f"Pass layers from 0 to {n_blocks - 1} (or -{n_blocks} to -1)."
        )
    if len(set(out)) < len(out):
        raise errors.UserError(f"--vit-layers {layers}: a layer is named twice.")
    return out


def asked_size(cfg: config.Vit) -> tuple[int, int] | None:
    """Returns the (height, width) that the user asked for."""
    return (cfg.img_size, cfg.img_size) if isinstance(cfg.img_size, int) else cfg.img_size


def _variant(cfg: config.Vit) -> str:
    suffix = ""
    if size := asked_size(cfg):
        suffix += f"@{size[0]}px" if size[0] == size[1] else f"@{size[0]}x{size[1]}px"
    return suffix + ("@bf16" if cfg.autocast == "bfloat16" else "")


def check_size(patch: tuple[int, int], cfg: config.Vit) -> None:
    """Checks the user's size. Default sizes may leave a margin (SigLIP So400m: 384 pixels, patches of 14)."""
    size = asked_size(cfg)
    if size and (size[0] % patch[0] or size[1] % patch[1]):
        near = " ".join(str(max(1, round(n / p)) * p) for n, p in zip(size, patch, strict=True))
        raise errors.UserError(
            f"--img-size {size[0]} {size[1]}: not a multiple of the {patch[0]} x {patch[1]} pixel "
            f"patches of {cfg.vit_ckpt}. Pass --img-size {near}."
        )


def not_flexible(cfg: config.Vit) -> errors.UserError:
    return errors.UserError(
        f"--resize flexible: the positions of {cfg.vit_ckpt} cannot be resampled to other grids. "
        "Pass --resize crop, squash or pad, or a plain ViT of dinov2, dinov3, mae or timm."
    )


def not_a_vit(cfg: config.Vit) -> errors.UserError:
    return errors.UserError(
        f"--vit-ckpt {cfg.vit_ckpt}: not a vision transformer whose blocks all hold one token per "
        "patch. Pass a plain ViT."
    )


@contextlib.contextmanager
def quiet() -> collections.abc.Generator[None]:
    """Silences open_clip's warning of random weights, and both libraries' deprecation warnings."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)


@contextlib.contextmanager
def building(cfg: config.Vit) -> collections.abc.Generator[None]:
    """Wraps a library's construction of a model.

    Random weights depend only on --vit-seed. The caller's random state stays. Errors become UserErrors.
    """
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.vit_seed)
            yield
    except Exception as err:
        remedy = (
            "Check the name and the network, or pass a local file as --vit-weights."
            if cfg.vit_weights == "hub"
            else "Check the name."
        )
        if cfg.vit_ckpt.startswith("local-dir:"):
            remedy = "Check its open_clip_config.json."
        elif cfg.vit_ckpt.startswith("hf-hub:"):
            remedy = (
                "Check the name and the network, or pass --vit-ckpt local-dir:FOLDER "
                "with a copy of the model's files."
            )
        raise errors.UserError(
            f"--vit-ckpt {cfg.vit_ckpt}: the model cannot be built with weights from "
            f"{cfg.vit_weights!r} ({errors.first_line(err)[:200]}). {remedy}"
        ) from err
