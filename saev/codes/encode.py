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
from jaxtyping import Bool
from torch import Tensor

from saev import compiled, devices, errors, helpers, machine, provenance, scorers
from saev.codes import config, kernels, memory
from saev.data import activations, ordered, passes
from saev.data import memory as data_memory
from saev.formats import codes, codeshards
from saev.scorers import rows as scorer_rows
from saev.scorers import sae as sae_scorer

logger = logging.getLogger("saev")


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
    acts.only_whole("codes are of")
    scorer = scorers.load(cfg.scorer)
    scorers.check_fits(scorer, acts, cfg.scorer)
    metadata = describe(cfg, scorer, acts)
    _say_size(scorer, acts, metadata, device)
    dpath = pathlib.Path(cfg.dump_to) / metadata.hash
    with helpers.locked(dpath.with_name(f".{dpath.name}.lock"), f"it writes {dpath}"):
        codes.create(pathlib.Path(cfg.dump_to), metadata, _images(acts))
        provenance.write(dpath)
        shards = codes.shards(dpath, metadata)
        if shards.missing():
            _write(shards, metadata, scorer.to(device), acts, device)
        else:
            logger.info("%s: already written", dpath)
    return str(dpath)


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
    is_listed = acts.is_listed
    for image_i in acts.image_is_N.tolist():
        path, label = acts.records[image_i] if is_listed else ("", "")
        placed = None if acts.photos.sizes_A2 is None else acts.photos.layout(image_i)
        grid, shown = (placed.grid, placed.shown) if placed else (None, None)
        yield codes.Image(image_i, path, label, grid, shown)


def _say_size(
    scorer: scorers.Scorer, acts: activations.Activations, metadata: codes.Metadata, device: torch.device
) -> None:
    """Logs the memory on a CPU, and the disk space where it is known."""
    P, K = acts.n_tokens, scorer.n_prototypes
    n_block = min(data_memory.n_block(P, K), metadata.imgs_per_shard)
    is_sae = isinstance(scorer, sae_scorer.SaeLatents)
    n_codes = (scorer.sae.cfg.n_firing or K // 8) if is_sae else K
    if device.type == "cpu":
        machine.log_need(memory.peak(n_block, P, acts.d_vit, K, n_codes, is_sae))
    if metadata.layout == "dense":
        size = np.dtype(metadata.dtype).itemsize * acts.n_imgs * P * K
        logger.info("all %s codes of each patch take %.1f GB; --top-n keeps fewer", f"{K:,}", size / 1e9)


@torch.inference_mode()
def _write(
    shards: codeshards.Shards,
    metadata: codes.Metadata,
    scorer: scorers.Scorer,
    acts: activations.Activations,
    device: torch.device,
) -> None:
    is_sae = isinstance(scorer, sae_scorer.SaeLatents)
    encode = _of_sae(scorer, metadata) if is_sae else _of_dense(scorer, metadata)

    def write_shard(writer: codeshards.ShardWriter, blocks: collections.abc.Iterator[ordered.Block]) -> None:
        for block in blocks:
            x_RD = torch.from_numpy(block.act_NXD).flatten(0, 1).to(device)
            is_kept_NP = acts.kept(block.image_i_N)
            if is_kept_NP is None:
                is_kept_NP = np.ones((len(block.image_i_N), metadata.n_patches), bool)
            rows, pooled = encode(x_RD, is_kept_NP)
            passes.check(rows, block.image_i_N, acts, dtype=metadata.dtype)
            _write_block(writer, metadata, rows, pooled)

    n_block = data_memory.n_block(metadata.n_patches, metadata.n_latents)
    passes.write(shards, acts, n_block, write_shard, "codes")


class _Pooled(tp.NamedTuple):
    """Codes of images: CSR with values (2, n), or dense (2, N, K). First the maxima, then the means."""

    index: tuple[np.ndarray, np.ndarray] | None
    values: np.ndarray


_Encode = collections.abc.Callable[
    [Tensor, Bool[np.ndarray, "N P"]], tuple[codeshards.Csr | np.ndarray, _Pooled]
]
"""Activations (R, D) of N images, and whether a patch is not padding -> codes of their rows (CSR, or dense
(R, K)) and of the images. Rows of padding have no codes; dense ones are 0."""


def _of_sae(scorer: sae_scorer.SaeLatents, metadata: codes.Metadata) -> _Encode:
    """Encodes without a dense code."""
    rows_of = scorer_rows.of_sae(scorer)

    def encode(x_RD: Tensor, is_kept_NP: np.ndarray) -> tuple[codeshards.Csr, _Pooled]:
        rows = rows_of(x_RD).of_rows(is_kept_NP.ravel())
        pooled = _pooled(rows, is_kept_NP.sum(axis=1), scorer.n_prototypes)
        return (_cut(rows, metadata.top_n) if metadata.top_n else rows), pooled

    return encode


def _pooled(rows: codeshards.Csr, n_patches_N: np.ndarray, n_latents: int) -> _Pooled:
    """Maximum and mean of each latent that fires in an image, over its patches without padding."""
    n_imgs, n = len(n_patches_N), len(rows.latent_n)
    n_rows = (len(rows.start_R1) - 1) // n_imgs
    n_N, latent_n, values_2n = np.empty(n_imgs, np.int64), np.empty(n, np.int32), np.empty((2, n), np.float32)
    inputs = (rows.value_n, rows.latent_n, rows.start_R1, n_rows, n_latents, n_patches_N)
    kernel = functools.partial(kernels.pool, *inputs, n_N, latent_n, *values_2n)
    compiled.in_threads(kernel, n_imgs)
    begin_N = rows.start_R1[:-1:n_rows]
    is_used_n = np.zeros(n + 1, np.int64)
    np.add.at(is_used_n, begin_N, 1)
    np.add.at(is_used_n, begin_N + n_N, -1)
    at_n = np.flatnonzero(np.cumsum(is_used_n[:-1]))
    start_N1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(n_N)])
    return _Pooled((start_N1, latent_n[at_n]), values_2n[:, at_n])


def _of_dense(scorer: scorers.Scorer, metadata: codes.Metadata) -> _Encode:
    """Encodes with a score for each prototype. With --top-n, the largest are kept."""

    def encode(x_RD: Tensor, is_kept_NP: np.ndarray) -> tuple[codeshards.Csr | np.ndarray, _Pooled]:
        score_NPK = scorer(x_RD).unflatten(0, is_kept_NP.shape)
        if is_kept_NP.all():
            pooled_2NK = torch.stack([score_NPK.amax(dim=1), score_NPK.mean(dim=1)])
        else:
            is_kept_NP1 = torch.from_numpy(is_kept_NP).to(x_RD.device)[:, :, None]
            max_NK = score_NPK.masked_fill(~is_kept_NP1, -torch.inf).amax(dim=1)
            score_NPK = score_NPK.masked_fill(~is_kept_NP1, 0)
            pooled_2NK = torch.stack([max_NK, score_NPK.sum(dim=1) / is_kept_NP1.sum(dim=1)])
        score = score_NPK.flatten(0, 1).cpu().numpy()
        rows = score
        if metadata.layout == "csr":
            rows = _largest(score, metadata.top_n).of_rows(is_kept_NP.ravel())
        return rows, _Pooled(None, pooled_2NK.cpu().numpy())

    return encode


def _largest(value_RK: np.ndarray, n: int) -> codeshards.Csr:
    R = len(value_RK)
    value_Rn, latent_Rn = np.empty((R, n), value_RK.dtype), np.empty((R, n), np.int32)
    kernel = functools.partial(kernels.largest, value_RK, n, value_Rn, latent_Rn)
    compiled.in_threads(kernel, R)
    return codeshards.Csr(np.arange(0, R * n + 1, n, dtype=np.int64), latent_Rn.ravel(), value_Rn.ravel())


def _cut(rows: codeshards.Csr, n: int) -> codeshards.Csr:
    """The n largest codes of each row."""
    is_kept_n = np.empty(len(rows.value_n), np.bool_)
    kernel = functools.partial(kernels.mark_largest, rows.value_n, rows.start_R1, n, is_kept_n)
    compiled.in_threads(kernel, len(rows.start_R1) - 1)
    return rows.kept(is_kept_n)


# ---- writing ----


def _write_block(
    writer: codeshards.ShardWriter,
    metadata: codes.Metadata,
    rows: codeshards.Csr | np.ndarray,
    pooled: _Pooled,
) -> None:
    if isinstance(rows, codeshards.Csr):
        writer.add_codes("patch", rows)
    else:
        writer.add("patch_values", rows)
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
