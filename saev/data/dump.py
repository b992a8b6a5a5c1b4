"""Stage 1: images -> ViT -> shards. Killed at any moment, the same command goes on with the first missing shard.

Shape letters: B images of a forward pass, N images of a shard, L layers, T tokens, D d_vit.
"""

import collections
import collections.abc
import concurrent.futures
import dataclasses
import itertools
import logging
import pathlib

import beartype
import numpy as np
import torch
from torch import Tensor

from saev import devices, errors, helpers
from saev.data import config, images, vits
from saev.formats import shards

logger = logging.getLogger("saev")

PREFETCH = 3
"""Batches of images decoded ahead of the ViT."""


@beartype.beartype
def main(cfg: config.Dump) -> str:
    """Dumps what is missing and returns the shard directory's path.

    Raises:
        UserError: no images, a corrupt image (names it), a layer that the model lacks, a --d-vit or
            --n-patches-per-img that does not fit, or NaN/Inf activations (names the image).
    """
    records = images.list_images(cfg.data)
    vit = vits.load(cfg.vit)
    layers = vits.resolve_layers(cfg.vit_layers, vit.n_blocks)
    metadata = shards.Metadata(
        vit_family=cfg.vit.vit_family,
        vit_ckpt=vit.ckpt_id,
        layers=layers,
        n_patches_per_img=vit.n_patches,
        cls_token=vit.cls_token,
        d_vit=vit.d_vit,
        n_imgs=len(records),
        max_patches_per_shard=cfg.max_patches_per_shard,
        data=_describe(cfg.data),
    )
    out = shards.ShardDir.create(
        pathlib.Path(cfg.dump_to), metadata, records, vit.transform.to_dict()
    )
    todo = [i for i in range(metadata.n_shards) if not out.has(i)]
    if len(todo) < metadata.n_shards:
        logger.info(
            "%s: %d of %d shards are there already",
            out.dpath,
            metadata.n_shards - len(todo),
            metadata.n_shards,
        )
    if todo:
        _write_shards(cfg, vit, out, records, todo)
    return str(out.dpath)


def _describe(data: config.ImageFolder | config.Cub200) -> dict[str, object]:
    fields = dataclasses.asdict(data) | {"root": str(pathlib.Path(data.root).resolve())}
    return {**fields, "__class__": type(data).__name__}


def _write_shards(
    cfg: config.Dump,
    vit: vits.Vit,
    out: shards.ShardDir,
    records: list[shards.Record],
    todo: list[int],
) -> None:
    device = devices.pick(cfg.device)
    vit.to(device)
    root = images.image_root(cfg.data)

    def read(image_i: int) -> Tensor:
        return vit.transform(images.open_rgb(root / records[image_i].path))

    batches = [b for i in todo for b in _batched(out.imgs_in(i), cfg.vit_batch_size)]
    with concurrent.futures.ThreadPoolExecutor(max(1, cfg.n_workers)) as pool:
        stream = _prefetched(pool, read, batches)
        stream = helpers.progress(stream, "dump", len(batches), "batches")
        for shard_i in todo:
            _write_shard(vit, out, shard_i, stream, records, device)


def _batched(image_is: range, size: int) -> list[range]:
    return [image_is[at : at + size] for at in range(0, len(image_is), size)]


def _prefetched(
    pool: concurrent.futures.Executor,
    read: collections.abc.Callable[[int], Tensor],
    batches: list[range],
) -> collections.abc.Iterator[tuple[range, Tensor]]:
    """Yields (image numbers, images (B, 3, H, W)) in order while the pool decodes the next PREFETCH batches."""
    ahead = iter(batches)
    queue = collections.deque(
        (b, [pool.submit(read, i) for i in b]) for b in itertools.islice(ahead, PREFETCH)
    )
    try:
        while queue:
            image_is, futures = queue.popleft()
            imgs_BCHW = torch.stack([f.result() for f in futures])
            if (following := next(ahead, None)) is not None:
                queue.append((following, [pool.submit(read, i) for i in following]))
            yield image_is, imgs_BCHW
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@torch.inference_mode()
def _write_shard(
    vit: vits.Vit,
    out: shards.ShardDir,
    shard_i: int,
    stream: collections.abc.Iterator[tuple[range, Tensor]],
    records: list[shards.Record],
    device: torch.device,
) -> None:
    """Takes the shard's batches from the stream, and no more."""
    image_is = out.imgs_in(shard_i)
    with out.writing(shard_i) as shard_NLTD:
        done = image_is.start
        while done < image_is.stop:
            batch_is, imgs_BCHW = next(stream)
            acts_BLTD = vit(imgs_BCHW.to(device), out.metadata.layers).cpu().numpy()
            _check_finite(acts_BLTD, batch_is, records)
            shard_NLTD[batch_is.start - image_is.start : batch_is.stop - image_is.start] = acts_BLTD
            done = batch_is.stop


def _check_finite(acts_BLTD: np.ndarray, batch_is: range, records: list[shards.Record]) -> None:
    bad_B = ~np.isfinite(acts_BLTD).reshape(len(acts_BLTD), -1).all(axis=1)
    if bad_B.any():
        image_i = batch_is[int(bad_B.argmax())]
        raise errors.UserError(
            f"image {records[image_i].path}: the ViT gives NaN or infinite activations. Check the image and the weights."
        )
