"""Stage 3: one pass for every latent's statistics and top images, then a gallery of the chosen latents.

B images of a block, P patches, D d_vit, S latents, K images per latent, F latents that fire, C chosen ones.
"""

import dataclasses
import logging
import pathlib

import beartype
import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, jaxtyped
from torch import Tensor

from saev import devices, errors, helpers, nn
from saev.data import activations, images, ordered
from saev.nn import metrics
from saev.visuals import config, memory, render

logger = logging.getLogger("saev")

MAX_CHECKED = 10_000
"""Number of image paths that are checked before the pass, about."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of every latent, from one pass over the stream."""

    freq_S: Float64[np.ndarray, " S"]
    """Fraction of patches that it fires on."""
    mean_S: Float64[np.ndarray, " S"]
    """Mean size |f| when firing; NaN for a latent that never fires."""
    top_value_SK: Float32[np.ndarray, "S K"]
    """Largest values (maxima over an image's patches), descending; 0 where fewer than K images fire it."""
    top_image_SK: Int64[np.ndarray, "S K"]
    """The images of these values. Among equal values the lower number is first."""


def main(cfg: config.Visuals) -> str:
    """Makes the gallery and returns its folder.

    Raises:
        UserError: bad checkpoint, shards or images, or no latent in the ranges.
    """
    if not cfg.ckpt:
        raise errors.UserError("--ckpt is missing: pass the sae.pt that train.py printed.")
    sae = nn.load(cfg.ckpt, str(devices.pick(cfg.device)))
    stream = _stream(cfg, sae)
    gallery = _gallery(cfg, stream.acts)
    dpath = pathlib.Path(cfg.dump_to).resolve()
    helpers.sweep(dpath.parent, dpath.name)
    render.check_target(dpath)
    # Before the long pass, check that images exist: all of a small data set, a sample of a large one.
    image_is = stream.acts.image_is_N
    render.check_images(gallery, image_is[:: max(1, len(image_is) // MAX_CHECKED)].tolist())
    if sae.W_enc.device.type == "cpu":  # the formula holds on a CPU
        shape = (stream.acts.n_tokens, sae.d_vit, sae.d_sae)
        n_bytes = memory.peak(cfg.n_images, stream.block, *shape)
        logger.info("memory: about %.2f GB (docs/memory.md)", n_bytes / 1e9)
    stats = collect(sae, stream, cfg.n_images)
    pages = _pages(sae, stream, stats, choose(cfg, stats))
    render.write(dpath, gallery, pages)
    return cfg.dump_to


def _stream(cfg: config.Visuals, sae: nn.SparseAutoencoder) -> ordered.Ordered:
    """The image patches in order, in blocks whose codes fit in memory.MAX_CODES."""
    acts = activations.Activations.open(dataclasses.replace(cfg.data, patches="image"))
    sae.check_fits(acts.space, cfg.ckpt, acts.given)
    n_imgs = max(1, min(64, memory.MAX_CODES // (acts.n_tokens * sae.d_sae)))
    return ordered.Ordered(acts, n_imgs=n_imgs)


def _gallery(cfg: config.Visuals, acts: activations.Activations) -> render.Gallery:
    """The images' source, and the grid of patches on them."""
    if not cfg.images.root:
        raise errors.UserError("--images.root is missing: pass the folder that was dumped.")
    fields = acts.transform()
    if not fields:
        logger.info("%s: has no transform.json; heat maps assume a square centre crop", cfg.data.shard_root)
    transform = images.Transform.from_dict(fields) if fields else None
    layer = acts.only_layer("heat maps show")
    return render.Gallery(
        ckpt=cfg.ckpt,
        source=f"layer {layer} of {acts.metadata.vit_ckpt} on {acts.n_imgs:,} images",
        root=images.image_root(cfg.images),
        records=acts.records,
        transform=transform,
        grid=render.grid(acts.n_tokens, transform.size if transform else None),
        sha256=helpers.hash_file(pathlib.Path(cfg.ckpt)),
    )


@torch.inference_mode()
def collect(sae: nn.SparseAutoencoder, stream: ordered.Ordered, k: int) -> Stats:
    """Statistics and the k top images of every latent, in O(S k) memory."""
    S, device = sae.d_sae, sae.W_enc.device
    n_fired_S = torch.zeros(S, dtype=torch.int64, device=device)
    total_S = torch.zeros(S, dtype=torch.float64, device=device)
    value_SK = torch.zeros(S, 0, device=device)
    image_SK = torch.zeros(S, 0, dtype=torch.int64, device=device)
    for image_i_B, acts_BPD in helpers.progress(stream, "collect", len(stream), "blocks"):
        f_BPS = _codes(sae, acts_BPD)
        n_fired_S += (f_BPS.abs() > metrics.EPS_ACTIVE).sum(dim=(0, 1))
        total_S += f_BPS.abs().sum(dim=(0, 1), dtype=torch.float64)
        value_SB = f_BPS.amax(dim=1).T
        image_SB = torch.from_numpy(image_i_B).to(device).expand(S, -1)
        # Earlier images come first and the sort is stable, so among equals the lower number wins.
        value_SX, image_SX = torch.cat([value_SK, value_SB], 1), torch.cat([image_SK, image_SB], 1)
        value_SX, order_SX = value_SX.sort(dim=1, descending=True, stable=True)
        value_SK, image_SK = value_SX[:, :k], image_SX.gather(1, order_SX[:, :k])
    mean_S = torch.where(n_fired_S > 0, total_S / n_fired_S, torch.nan)
    freq_S = n_fired_S.double() / len(stream.acts)
    return Stats(*(t.cpu().contiguous().numpy() for t in (freq_S, mean_S, value_SK, image_SK)))


def _codes(sae: nn.SparseAutoencoder, acts_BPD: np.ndarray) -> Tensor:
    """(B, P, S) codes."""
    x_XD = torch.from_numpy(acts_BPD).flatten(0, 1).to(sae.W_enc.device)
    return sae.encode(x_XD).unflatten(0, acts_BPD.shape[:2])


@beartype.beartype
def choose(cfg: config.Visuals, stats: Stats) -> Int64[np.ndarray, " C"]:
    """The latents to show, in ascending order.

    Raises:
        UserError: a chosen latent does not exist, or no latent is in the ranges.
    """
    if cfg.latents:
        if bad := [i for i in cfg.latents if not 0 <= i < len(stats.freq_S)]:
            raise errors.UserError(f"--latents {bad[0]}: the SAE has latents 0 to {len(stats.freq_S) - 1}.")
        return np.array(sorted(set(cfg.latents)), np.int64)
    fires_F = np.flatnonzero(stats.freq_S > 0)
    log_freq_F, log_mean_F = np.log10(stats.freq_S[fires_F]), np.log10(stats.mean_S[fires_F])
    (f_low, f_high), (v_low, v_high) = cfg.log_freq_range, cfg.log_value_range
    in_freq_F = (f_low <= log_freq_F) & (log_freq_F <= f_high)
    eligible_C = fires_F[in_freq_F & (v_low <= log_mean_F) & (log_mean_F <= v_high)]
    if not len(eligible_C):
        found = _found(log_freq_F, log_mean_F)
        raise errors.UserError(f"no latent lies in --log-freq-range and --log-value-range. {found}")
    n = min(cfg.n_latents, len(eligible_C))
    return np.sort(np.random.default_rng(cfg.seed).choice(eligible_C, n, replace=False))


def _found(log_freq_F: np.ndarray, log_mean_F: np.ndarray) -> str:
    if not len(log_freq_F):
        return "No latent fires at all: is this the SAE of this ViT layer?"
    (f_low, f_high), (v_low, v_high) = (np.quantile(v_F, [0.05, 0.95]) for v_F in (log_freq_F, log_mean_F))
    return (
        f"Of {len(log_freq_F)} latents that fire, 90% have log10 frequency {f_low:.1f} to {f_high:.1f} "
        f"and log10 value {v_low:.1f} to {v_high:.1f}: widen the ranges."
    )


@torch.inference_mode()
def _pages(
    sae: nn.SparseAutoencoder, stream: ordered.Ordered, stats: Stats, latents_C: np.ndarray
) -> list[render.Page]:
    """Heat maps of the chosen latents on their top images; each image is read once."""
    wanted: dict[int, list[tuple[int, int]]] = {}
    for latent in latents_C.tolist():
        for rank in np.flatnonzero(stats.top_value_SK[latent] > 0).tolist():
            wanted.setdefault(int(stats.top_image_SK[latent, rank]), []).append((latent, rank))
    heat_P: dict[tuple[int, int], np.ndarray] = {}
    for image_i in helpers.progress(sorted(wanted), "heat maps", len(wanted), "images"):
        position = int(np.searchsorted(stream.acts.image_is_N, image_i))
        f_PS = _codes(sae, stream.acts.read(position, position + 1))[0].cpu().numpy()
        heat_P |= {key: f_PS[:, key[0]].copy() for key in wanted[image_i]}
    return [_page(stats, latent, heat_P) for latent in latents_C.tolist()]


def _page(stats: Stats, latent: int, heat_P: dict[tuple[int, int], np.ndarray]) -> render.Page:
    top = zip(stats.top_image_SK[latent].tolist(), stats.top_value_SK[latent].tolist(), strict=True)
    shown = [
        render.Shown(image_i, value, heat_P[latent, rank])
        for rank, (image_i, value) in enumerate(top)
        if (latent, rank) in heat_P
    ]
    return render.Page(latent, float(stats.freq_S[latent]), float(stats.mean_S[latent]), shown)
