"""Stage 1: images -> ViT -> shards. After a kill, the same command resumes with the first missing shard.

Jobs divide the shards by number, so they need neither locks nor communication. Within a job, decoding, the
ViT and writing overlap: threads decode the next images, and one thread writes the previous batch.

Shape letters: B images per forward pass, L layers, T tokens, D d_vit.
"""

import collections
import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import math
import pathlib
import typing as tp

import numpy as np
import torch
from torch import Tensor

from saev import devices, errors, helpers, machine, provenance
from saev.data import config, images, memory, vits
from saev.formats import shards

logger = logging.getLogger("saev")


class Decoded(tp.NamedTuple):
    """One image as the ViT's input. If it cannot be decoded: zeros, and the reason in `error`."""

    img_3HW: Tensor
    error: str
    size: tuple[int, int] = (0, 0)
    """(width, height) of the photo."""


class Loaded(tp.NamedTuple):
    """A batch of images."""

    image_is: range
    groups: list[tuple[list[int], Tensor]]
    """Places in the batch, and inputs (B, 3, H, W) of one size. With --resize flexible, sizes differ."""
    skipped: list[shards.Skipped]
    sizes: list[tuple[int, int]]


def main(cfg: config.Dump, job_i: int = 0) -> str:
    """Dumps this job's missing shards and returns the path of the shard directory.

    Raises:
        UserError: there are no images, an image is corrupt or gives NaN/Inf activations (named), the model
            lacks a layer or contradicts --d-vit or --n-patches-per-img.
        OSError: the disk is full.
    """
    records = images.list_images(cfg.data)
    vit = vits.load(cfg.vit)
    metadata = shards.Metadata(
        vit_family=cfg.vit.vit_family,
        vit_ckpt=vit.ckpt_id,
        layers=vits.resolve_layers(cfg.vit_layers, vit.n_blocks),
        n_patches_per_img=vit.n_patches,
        cls_token=vit.cls_token,
        d_vit=vit.d_vit,
        n_imgs=len(records),
        max_patches_per_shard=cfg.max_patches_per_shard,
        data=_describe(cfg.data) | ({"resize": vit.resize} if vit.resize else {}),
        **shards.stored_as(cfg.dtype, vit.transform.fit != "cover"),
    )
    _warn_of_earlier_lists(pathlib.Path(cfg.dump_to), metadata)
    transform = vit.transform.to_dict()
    out = shards.ShardDir.create(pathlib.Path(cfg.dump_to), metadata, records, transform)
    provenance.write(out.dpath)
    logger.info("shard directory: %s", out.dpath)
    lock_fpath = out.dpath / f".job{job_i}-of-{cfg.n_jobs}.lock"
    with helpers.locked(lock_fpath, f"it is writing the same dump to {out.dpath}"):
        mine = range(job_i, metadata.n_shards, cfg.n_jobs)
        todo = [i for i in mine if not out.has(i)]
        if len(todo) < len(mine):
            done = len(mine) - len(todo)
            logger.info("%s: %d of %d shards already exist", out.dpath, done, len(mine))
        if todo:
            device = _device(cfg.device, job_i)
            if device.type == "cpu" and job_i == 0:
                _log_memory(cfg, vit, metadata)
            _Dumper(cfg, vit, out, records, device).write(todo)
    return str(out.dpath)


def job(part: config.DumpJob) -> str:
    """Runs one job of a dump."""
    return main(part.dump, part.job_i)


def _warn_of_earlier_lists(dump_to: pathlib.Path, metadata: shards.Metadata) -> None:
    """Warns if an equal dump exists with another number of images, because then this one starts anew.

    Files were added or removed, or an older saev knew fewer suffixes.
    """
    if (dump_to / metadata.hash).exists():
        return
    for fpath in sorted(dump_to.glob("*/metadata.json")):
        with contextlib.suppress(errors.UserError):
            other = shards.ShardDir.open_unchecked(fpath.parent).metadata
            if dataclasses.replace(other, n_imgs=metadata.n_imgs) == metadata:
                logger.warning(
                    "%s: an earlier dump of this folder listed %d images; now there are %d, so a "
                    "new dump begins. Remove the earlier one if you no longer need it.",
                    fpath.parent,
                    other.n_imgs,
                    metadata.n_imgs,
                )


def _log_memory(cfg: config.Dump, vit: vits.Vit, metadata: shards.Metadata) -> None:
    weights = sum(p.numel() * p.element_size() for p in vit.parameters())
    sizes = memory.Sizes(
        weights, math.prod(vit.transform.size), metadata.n_tokens, vit.d_vit, len(metadata.layers)
    )
    machine.log_need(memory.peak(cfg, sizes), f" per job, with photos of {memory.PHOTO // 10**6} megapixels")


def _describe(data: config.ImageFolder | config.Cub200) -> dict[str, object]:
    fields = dataclasses.asdict(data) | {"root": str(pathlib.Path(data.root).resolve())}
    return {**fields, "__class__": type(data).__name__}


def _device(name: str, job_i: int) -> torch.device:
    """Assigns this machine's GPUs to jobs in turn, unless the user named one."""
    device = devices.pick(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", job_i % torch.cuda.device_count())
    return device


@dataclasses.dataclass
class _Dumper:
    """Runs one job: decodes, computes and writes its shards."""

    cfg: config.Dump
    vit: vits.Vit
    out: shards.ShardDir
    records: list[shards.Record]
    device: torch.device

    def __post_init__(self) -> None:
        self.vit.to(self.device)
        self.root = images.image_root(self.cfg.data)

    def write(self, shard_is: list[int]) -> None:
        """Writes these shards in order."""
        size = self.cfg.vit_batch_size
        wholes = [self.out.metadata.imgs_in(i) for i in shard_is]
        batches = [r[at : at + size] for r in wholes for at in range(0, len(r), size)]
        with (
            concurrent.futures.ThreadPoolExecutor(self.cfg.n_workers) as decoders,
            concurrent.futures.ThreadPoolExecutor(1) as saver,
        ):
            loaded = self._load(decoders, batches)
            computed = self._compute(helpers.progress(loaded, "dump", len(batches), "batches"))
            with contextlib.closing(loaded):
                for shard_i in shard_is:
                    self._write_shard(shard_i, computed, saver)

    def _decode(self, image_i: int) -> Decoded:
        try:
            img = images.open_rgb(self.root / self.records[image_i].path)
            return Decoded(self.vit.transform(img), "", img.size)
        except images.BadImage as err:
            if not self.cfg.skip_corrupt:
                raise errors.UserError(f"{err} (Or pass --skip-corrupt to leave such images out.)") from err
            return Decoded(torch.zeros(3, *self.vit.transform.size), str(err))

    def _load(
        self, decoders: concurrent.futures.Executor, batches: list[range]
    ) -> collections.abc.Generator[Loaded, None, None]:
        """Yields batches in order while threads decode the next memory.PREFETCH batches."""
        ahead = ((b, [decoders.submit(self._decode, i) for i in b]) for b in batches)
        queue = collections.deque(itertools.islice(ahead, memory.PREFETCH))
        try:
            while queue:
                image_is, futures = queue.popleft()
                decoded = [f.result() for f in futures]
                queue.extend(itertools.islice(ahead, 1))
                skipped = [
                    shards.Skipped(i, d.error) for i, d in zip(image_is, decoded, strict=True) if d.error
                ]
                yield Loaded(image_is, _grouped(decoded), skipped, [d.size for d in decoded])
        finally:
            decoders.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def _compute(
        self, loaded: collections.abc.Iterable[Loaded]
    ) -> collections.abc.Iterator[tuple[Loaded, np.ndarray]]:
        """Yields each batch's activations (B, L, T, D).

        On a GPU, the copy to the host overlaps with the next forward pass.
        """
        on_gpu = self.device.type == "cuda"
        waiting: tuple[Loaded, devices.OnItsWay] | None = None
        for batch in loaded:
            acts_BLTD = self._forward(batch)
            if not on_gpu:
                yield batch, acts_BLTD.contiguous().numpy()
                continue
            before, waiting = waiting, (batch, devices.OnItsWay(acts_BLTD))
            if before is not None:
                yield before[0], before[1].arrived().numpy()
        if waiting is not None:
            yield waiting[0], waiting[1].arrived().numpy()

    def _forward(self, batch: Loaded) -> Tensor:
        """(B, L, T, D) activations. Tokens after those of an image's own grid are zero."""
        metadata, out_BLTD = self.out.metadata, None
        for rows, imgs_BCHW in batch.groups:
            imgs_BCHW = imgs_BCHW.pin_memory() if self.device.type == "cuda" else imgs_BCHW
            acts_BLTD = self.vit(imgs_BCHW.to(self.device, non_blocking=True), metadata.layers)
            n_tokens = acts_BLTD.shape[2]
            if len(rows) == len(batch.image_is) and n_tokens == metadata.n_tokens:
                return acts_BLTD
            if out_BLTD is None:
                shape = (len(batch.image_is), len(metadata.layers), metadata.n_tokens, metadata.d_vit)
                out_BLTD = acts_BLTD.new_zeros(shape)
            out_BLTD[rows, :, :n_tokens] = acts_BLTD
        assert out_BLTD is not None, "a batch has images"
        return out_BLTD

    def _write_shard(
        self,
        shard_i: int,
        computed: collections.abc.Iterator[tuple[Loaded, np.ndarray]],
        saver: concurrent.futures.Executor,
    ) -> None:
        """Takes exactly this shard's batches from the stream and writes them."""
        end = self.out.metadata.imgs_in(shard_i).stop
        with self.out.writing(shard_i) as writer:
            unwritten: collections.deque[concurrent.futures.Future[None]] = collections.deque()
            try:
                for batch, acts_BLTD in computed:
                    unwritten.append(saver.submit(self._save, writer, batch, acts_BLTD))
                    if len(unwritten) > memory.UNWRITTEN:
                        unwritten.popleft().result()
                    if batch.image_is.stop == end:
                        break
                while unwritten:
                    unwritten.popleft().result()
            finally:  # after an error, no thread may write to a closed file
                concurrent.futures.wait(unwritten)

    def _save(self, writer: shards.ShardWriter, batch: Loaded, acts_BLTD: np.ndarray) -> None:
        """Checks a batch and writes it."""
        for skipped in batch.skipped:
            logger.warning("left out: %s", skipped.error)
            acts_BLTD[skipped.image_i - batch.image_is.start] = 0
        self._check_finite(acts_BLTD, batch.image_is)
        writer.write(acts_BLTD)
        writer.skipped += batch.skipped
        if self.out.metadata.has_padding:
            writer.sizes += batch.sizes

    def _check_finite(self, acts_BLTD: np.ndarray, image_is: range) -> None:
        limit = np.finfo(np.float16).max
        if self.out.metadata.dtype == "float16":
            bad_B = ~(np.abs(acts_BLTD) <= limit).reshape(len(acts_BLTD), -1).all(axis=1)
        elif np.isfinite(acts_BLTD.sum(dtype=np.float64)):
            return
        else:
            bad_B = ~np.isfinite(acts_BLTD).reshape(len(acts_BLTD), -1).all(axis=1)
        if bad_B.any():
            path = self.records[image_is[int(bad_B.argmax())]].path
            if np.isfinite(acts_BLTD[bad_B]).all():
                largest = np.abs(acts_BLTD).max()
                raise errors.UserError(
                    f"image {path}: an activation is too large for float16 ({largest:.0f} > {limit:.0f}). "
                    "Pass --dtype bfloat16."
                )
            raise errors.UserError(
                f"image {path}: the ViT gives NaN or infinite activations. Check the image and the weights."
            )


def _grouped(decoded: list[Decoded]) -> list[tuple[list[int], Tensor]]:
    """The inputs of each size, with their places."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, found in enumerate(decoded):
        places.setdefault(tuple(found.img_3HW.shape), []).append(i)
    return [(mine, torch.stack([decoded[i].img_3HW for i in mine])) for mine in places.values()]
