"""Writes a scorer's codes of every patch and image.

Shape letters: N images of a block, P patches, R = N P rows, D d_vit, K latents, n codes.
"""

import collections.abc
import functools
import logging
import pathlib
import typing as tp

import beartype
import numpy as np
import torch
from torch import Tensor

from saev import compiled, devices, errors, helpers, provenance, scorers
from saev.codes import config, kernels, memory
from saev.data import activations, ordered
from saev.formats import codes
from saev.nn import sparse
from saev.scorers import base
from saev.scorers import sae as sae_scorer

logger = logging.getLogger("saev")

LARGEST = float(np.finfo(np.float16).max)


@beartype.beartype
def main(cfg: config.Codes) -> str:
    """Writes the codes that are not there yet, and returns their folder.

    Raises:
        UserError: bad scorer or shards, or a code that is not finite or too large for --dtype.
    """
    if not cfg.scorer:
        raise errors.UserError(
            "--scorer is missing: pass an SAE (sae.pt) or a fitted scorer (scorers/*.bin)."
        )
    device = devices.pick(cfg.device)
    acts = activations.Activations.open(cfg.data)
    scorer = _load(cfg.scorer, acts)
    metadata = describe(cfg, scorer, acts)
    _say_size(scorer, acts, metadata)
    dpath = pathlib.Path(cfg.dump_to) / metadata.hash
    with helpers.locked(dpath.with_name(f".{dpath.name}.lock"), f"it writes {dpath}"):
        codes.create(pathlib.Path(cfg.dump_to), metadata, _images(acts))
        provenance.write(dpath)
        todo = codes.missing(dpath, metadata)
        if todo:
            _write(dpath, metadata, todo, scorer.to(device), acts, device)
        else:
            logger.info("%s: already written", dpath)
    return str(dpath)


def _load(fpath: str, acts: activations.Activations) -> scorers.Scorer:
    """Loads the scorer.

    Raises:
        UserError: it is damaged, or was made for activations of another width, ViT or layer.
    """
    scorer = scorers.load(fpath)
    if isinstance(scorer, sae_scorer.SaeLatents):
        scorer.sae.check_fits(acts.space, fpath, acts.given)
    elif isinstance(scorer, base.Prototypes) and len(scorer.mean_D) != acts.d_vit:
        raise errors.UserError(
            f"{fpath}: scores activations of {len(scorer.mean_D)} dimensions, but {acts.given} has "
            f"{acts.d_vit}. Pass activations of the ViT that it was fitted on."
        )
    return scorer


def describe(cfg: config.Codes, scorer: scorers.Scorer, acts: activations.Activations) -> codes.Metadata:
    """What is written: the layouts, the shards, and the identity of scorer and activations."""
    is_sae = isinstance(scorer, sae_scorer.SaeLatents)
    is_cut = 0 < cfg.top_n < scorer.n_prototypes
    layout = "csr" if is_sae or is_cut else "dense"
    return codes.Metadata(
        scorer=cfg.scorer,
        digest=scorer.digest(),
        activations=acts.fingerprint,
        vit_family=acts.metadata.vit_family,
        vit_ckpt=acts.metadata.vit_ckpt,
        layer=acts.only_layer("codes are of"),
        patches=cfg.data.patches,
        n_latents=scorer.n_prototypes,
        n_imgs=acts.n_imgs,
        n_patches=acts.n_tokens,
        imgs_per_shard=max(1, cfg.max_patches_per_shard // acts.n_tokens),
        dtype=cfg.dtype,
        layout=layout,
        image_layout=("csr" if is_sae else "dense") if cfg.image_codes == "auto" else cfg.image_codes,
        top_n=cfg.top_n if is_cut else 0,
    )


def _images(acts: activations.Activations) -> collections.abc.Iterator[codes.Image]:
    """The readable images. Paths are empty if another tool wrote the dump, without a list of images."""
    is_listed = all(part.images_fpath.exists() for part in acts.dirs)
    for image_i in acts.image_is_N.tolist():
        path, label = acts.records[image_i] if is_listed else ("", "")
        yield codes.Image(image_i, path, label)


def _say_size(scorer: scorers.Scorer, acts: activations.Activations, metadata: codes.Metadata) -> None:
    """Logs the memory, and the disk space where it is known."""
    P, K = acts.n_tokens, scorer.n_prototypes
    n_block = min(memory.n_block(P, K), metadata.imgs_per_shard)
    is_sae = isinstance(scorer, sae_scorer.SaeLatents)
    n_codes = K
    if isinstance(scorer, sae_scorer.SaeLatents):
        n_codes = getattr(scorer.sae.cfg, "top_k", K // 8)
    n_bytes = memory.peak(n_block, P, acts.d_vit, K, n_codes, is_sae)
    logger.info("memory: about %.2f GB (docs/memory.md)", n_bytes / 1e9)
    if metadata.layout == "dense":
        size = np.dtype(metadata.dtype).itemsize * acts.n_imgs * P * K
        logger.info("all %s codes of each patch take %.1f GB; --top-n keeps fewer", f"{K:,}", size / 1e9)


@torch.inference_mode()
def _write(
    dpath: pathlib.Path,
    metadata: codes.Metadata,
    todo: list[int],
    scorer: scorers.Scorer,
    acts: activations.Activations,
    device: torch.device,
) -> None:
    """Encodes shard by shard. A shard's bytes do not depend on the others."""
    encoder = _of_sae(scorer) if isinstance(scorer, sae_scorer.SaeLatents) else _of_dense(scorer, metadata)
    n_block = memory.n_block(metadata.n_patches, metadata.n_latents)

    def blocks() -> collections.abc.Iterator[tuple[int, bool, ordered.Block]]:
        for shard_i in todo:
            image_is = acts.image_is_N[slice(*_bounds(metadata.imgs_in(shard_i)))]
            stream = ordered.Ordered(acts.only(image_is.tolist()), n_block)
            for block_i, block in enumerate(stream):
                yield shard_i, block_i + 1 == len(stream), block

    total = sum(-(-len(metadata.imgs_in(i)) // n_block) for i in todo)
    found = iter(helpers.progress(blocks(), "codes", total, "blocks"))
    for shard_i in todo:
        with codes.writing(dpath, metadata, shard_i) as writer:
            is_last = False
            while not is_last:
                _, is_last, block = next(found)
                x_RD = torch.from_numpy(block.act_NXD).flatten(0, 1).to(device)
                _write_block(writer, metadata, block, *encoder(x_RD, len(block.image_i_N)))


def _bounds(images: range) -> tuple[int, int]:
    return images.start, images.stop


class _Pooled(tp.NamedTuple):
    """Codes of images: CSR with values (2, n), or dense (2, N, K). First the maxima, then the means."""

    index: tuple[np.ndarray, np.ndarray] | None
    values: np.ndarray


_Encode = collections.abc.Callable[[Tensor, int], tuple[codes.Csr | np.ndarray, _Pooled]]
"""Activations (R, D) of N images -> codes of their rows (CSR, or dense (R, K)) and of the images."""


def _of_sae(scorer: sae_scorer.SaeLatents) -> _Encode:
    """Encodes without a dense code."""
    sae, expected = scorer.sae, [0]
    weights = sparse.Encoder(sae.W_enc.T, sae.b_enc, False)

    def encode(x_RD: Tensor, n_imgs: int) -> tuple[codes.Csr, _Pooled]:
        x_RD = x_RD * sae.scale - sae.b_dec
        found = sae.architecture.infer(sae, weights, x_RD, expected[0])
        expected[0] = len(found.value_n)
        index = found.index
        rows = [t.cpu().numpy() for t in (index.start_O1, index.latent_n, found.value_n)]
        csr = _nonzero(codes.Csr(rows[0].astype(np.int64), rows[1], rows[2]))
        return csr, _pooled(csr, n_imgs, sae.d_sae)

    return encode


def _nonzero(rows: codes.Csr) -> codes.Csr:
    return _kept(rows, rows.value_n != 0)


def _kept(rows: codes.Csr, is_kept_n: np.ndarray) -> codes.Csr:
    """Only the marked codes."""
    if is_kept_n.all():
        return rows
    before_n1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept_n)])
    return codes.Csr(before_n1[rows.start_R1], rows.latent_n[is_kept_n], rows.value_n[is_kept_n])


def _pooled(rows: codes.Csr, n_imgs: int, n_latents: int) -> _Pooled:
    """Maximum and mean of each latent that fires in an image."""
    n_patches, n = (len(rows.start_R1) - 1) // n_imgs, len(rows.latent_n)
    n_N, latent_n, values_2n = np.empty(n_imgs, np.int64), np.empty(n, np.int32), np.empty((2, n), np.float32)
    inputs = (rows.value_n, rows.latent_n, rows.start_R1, n_patches, n_latents)
    kernel = functools.partial(kernels.pool, *inputs, n_N, latent_n, *values_2n)
    compiled.in_threads(kernel, n_imgs)
    begin_N = rows.start_R1[:-1:n_patches]
    is_used_n = np.zeros(n + 1, np.int64)
    np.add.at(is_used_n, begin_N, 1)
    np.add.at(is_used_n, begin_N + n_N, -1)
    at_n = np.flatnonzero(np.cumsum(is_used_n[:-1]))
    start_N1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(n_N)])
    return _Pooled((start_N1, latent_n[at_n]), values_2n[:, at_n])


def _of_dense(scorer: scorers.Scorer, metadata: codes.Metadata) -> _Encode:
    """Encodes with a score for each prototype. With --top-n, the largest are kept."""

    def encode(x_RD: Tensor, n_imgs: int) -> tuple[codes.Csr | np.ndarray, _Pooled]:
        score_RK = scorer(x_RD)
        score_NPK = score_RK.unflatten(0, (n_imgs, -1))
        pooled = _Pooled(None, torch.stack([score_NPK.amax(dim=1), score_NPK.mean(dim=1)]).cpu().numpy())
        score = score_RK.cpu().numpy()
        return (_largest(score, metadata.top_n) if metadata.layout == "csr" else score), pooled

    return encode


def _largest(value_RK: np.ndarray, n: int) -> codes.Csr:
    R = len(value_RK)
    value_Rn, latent_Rn = np.empty((R, n), value_RK.dtype), np.empty((R, n), np.int32)
    kernel = functools.partial(kernels.largest, value_RK, n, value_Rn, latent_Rn)
    compiled.in_threads(kernel, R)
    return codes.Csr(np.arange(0, R * n + 1, n, dtype=np.int64), latent_Rn.ravel(), value_Rn.ravel())


def _cut(rows: codes.Csr, n: int) -> codes.Csr:
    """The n largest codes of each row."""
    is_kept_n = np.empty(len(rows.value_n), np.bool_)
    kernel = functools.partial(kernels.mark_largest, rows.value_n, rows.start_R1, n, is_kept_n)
    compiled.in_threads(kernel, len(rows.start_R1) - 1)
    return _kept(rows, is_kept_n)


# ---- writing ----


def _write_block(
    writer: codes.ShardWriter,
    metadata: codes.Metadata,
    block: ordered.Block,
    rows: codes.Csr | np.ndarray,
    pooled: _Pooled,
) -> None:
    if isinstance(rows, codes.Csr):
        rows = _cut(rows, metadata.top_n) if metadata.top_n else rows
        values, start_R1 = rows.value_n, rows.start_R1
        writer.add_rows("patch", start_R1, rows.latent_n)
    else:
        values, start_R1 = rows, np.arange(0, rows.size + 1, rows.shape[1])
    _check(values, metadata, block, start_R1)
    writer.add("patch_values", values)
    image_values = pooled.values
    if metadata.image_layout == "dense" and pooled.index:
        image_values = _dense(pooled, metadata.n_latents)
    elif metadata.image_layout == "csr":
        index = pooled.index or _all_places(*image_values.shape[1:])
        writer.add_rows("image", *index)
    for name, each in zip(("image_max", "image_mean"), image_values, strict=True):
        writer.add(name, each)


def _dense(pooled: _Pooled, n_latents: int) -> np.ndarray:
    """(2, N, K): the same with their zeros."""
    assert pooled.index is not None
    start_N1, latent_n = pooled.index
    out_2NK = np.zeros((2, len(start_N1) - 1, n_latents), np.float32)
    image_n = np.repeat(np.arange(len(start_N1) - 1), np.diff(start_N1))
    out_2NK[:, image_n, latent_n] = pooled.values
    return out_2NK


def _all_places(n_imgs: int, n_latents: int) -> tuple[np.ndarray, np.ndarray]:
    """CSR indices with all latents in each row."""
    starts = np.arange(0, n_imgs * n_latents + 1, n_latents, dtype=np.int64)
    return starts, np.tile(np.arange(n_latents, dtype=np.int32), n_imgs)


def _check(values: np.ndarray, metadata: codes.Metadata, block: ordered.Block, start_R1: np.ndarray) -> None:
    """Checks that --dtype can hold the codes.

    Raises:
        UserError: one is not finite, or too large (the image is named).
    """
    if not values.size:
        return
    flat_n = values.reshape(-1)
    largest = max(abs(float(flat_n.min())), abs(float(flat_n.max())))  # NaN if there is one
    limit = LARGEST if metadata.dtype == "float16" else float(np.finfo(np.float32).max)
    if largest <= limit:
        return
    at = int(np.flatnonzero(~(np.abs(flat_n) <= limit))[0])
    row = int(np.searchsorted(start_R1, at, "right")) - 1
    image_i, patch = int(block.image_i_N[row // metadata.n_patches]), row % metadata.n_patches
    remedy = "Pass --dtype float32." if np.isfinite(flat_n[at]) else "Check the scorer's weights."
    raise errors.UserError(
        f"a code of image {image_i}, patch {patch}, is {flat_n[at]:g}; the largest {metadata.dtype} is "
        f"{limit:g}. {remedy}"
    )
