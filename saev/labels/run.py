"""Labels the patches of a dump: each mask goes through the geometry that its photo went through.

Shape letters: N images, P patches in Y rows and X columns, H x W pixels, n pixels or patches, C classes of an
image.
"""

import collections
import collections.abc
import concurrent.futures
import dataclasses
import functools
import logging
import pathlib

import beartype
import numpy as np
import PIL.Image
from jaxtyping import Int32, Int64, jaxtyped

from saev import errors, helpers, provenance
from saev.data import images, layout, pixels
from saev.formats import patchlabels, shards
from saev.labels import config, masks

logger = logging.getLogger("saev")


def main(cfg: config.Labels) -> str:
    """Writes labels.bin and labels.json beside the shards. Returns the path of labels.bin.

    Raises:
        UserError: bad shards, images or masks (the first is named), or no patch got a label.
    """
    if not cfg.shard_root:
        raise errors.UserError(
            "--shard-root is missing: pass the directory that `python -m saev.data` printed."
        )
    if not cfg.images.root:
        raise errors.UserError("--images.root is missing: pass the folder that was dumped.")
    shard_dir = shards.ShardDir.open(cfg.shard_root)
    photos = layout.Photos([shard_dir])
    if photos.transform is None:
        raise errors.UserError(
            f"{shard_dir.dpath}: has no transform.json, so it is unknown what a patch shows of a photo. "
            "Dump the images again with `python -m saev.data`."
        )
    source = masks.open_source(cfg.masks)
    view = View(photos.transform, shard_dir.metadata.n_patches_per_img)
    id_NP = _label_all(cfg, shard_dir, source, view)
    classes = source.classes or {i: str(i) for i in np.unique(id_NP).tolist() if i >= 0}
    is_shown_NP = photos.shown_AP
    _report(id_NP.ravel() if is_shown_NP is None else id_NP[is_shown_NP], classes)
    made = source.made() | {"rule": cfg.rule, "background": cfg.background, "code": provenance.record()}
    return str(patchlabels.write(shard_dir, cfg.name, id_NP, classes, made))


def _report(id_n: Int32[np.ndarray, " n"], classes: dict[int, str]) -> None:
    """Logs how often each class is found. Raises a UserError if there is none at all.

    Args:
        id_n: of all patches that are not padding.
    """
    counts = zip(*np.unique(id_n, return_counts=True), strict=True)
    n_of = collections.Counter({int(i): int(n) for i, n in counts})
    n_void = n_of.pop(masks.VOID, 0)
    if not n_of:
        raise errors.UserError(
            "no patch got a label: all pixels of all masks are ignored. Check --masks.ignore."
        )
    for i, n in n_of.most_common(10):
        logger.info("%s: %.2f%% of the patches", classes[i], 100 * n / id_n.size)
    text = "%d of %d classes occur on patches; %d of %d patches have no label"
    logger.info(text, len(n_of), len(classes), n_void, id_n.size)


def _label_all(
    cfg: config.Labels, shard_dir: shards.ShardDir, source: masks.Source, view: "View"
) -> Int32[np.ndarray, "N P"]:
    """Labels of all images; VOID for those that the dump skipped."""
    metadata, records = shard_dir.metadata, shard_dir.records
    id_NP = np.full((metadata.n_imgs, metadata.n_patches_per_img), masks.VOID, np.int32)
    sizes_N2 = shard_dir.sizes_N2 if metadata.has_padding else None
    label = functools.partial(_label, cfg, images.image_root(cfg.images), source, view)
    image_is = shard_dir.image_is_N.tolist()
    n_missing = 0
    with concurrent.futures.ThreadPoolExecutor(cfg.n_workers) as pool:
        try:
            dumped = (None if sizes_N2 is None else sizes_N2[i] for i in image_is)
            found = pool.map(label, (records[i] for i in image_is), dumped)
            for i, id_P in zip(
                image_is, helpers.progress(found, "label", len(image_is), "images"), strict=True
            ):
                n_missing += id_P is None
                id_NP[i] = masks.VOID if id_P is None else id_P
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if n_missing:
        logger.warning("%d of %d images have no mask; their patches get no label", n_missing, len(image_is))
    return id_NP


def _label(
    cfg: config.Labels,
    root: pathlib.Path,
    source: masks.Source,
    view: "View",
    record: shards.Record,
    dumped_2: Int64[np.ndarray, " 2"] | None,
) -> Int32[np.ndarray, " P"] | None:
    """dumped_2: (width, height) of the photo in the dump, if it matters."""
    size = _size(root / record.path)
    if dumped_2 is not None:
        layout.check_size(root / record.path, size, dumped_2)
    mask_HW = source.of(record, size)
    if mask_HW is None:
        if cfg.missing == "refuse":
            raise errors.UserError(
                f"{source.where(record)}: no such mask. Check the --masks flags, or pass "
                "--missing ignore to leave such images without labels."
            )
        return None
    background = cfg.background if cfg.rule == "foreground" else None
    return view.labels(mask_HW, background)


def _size(fpath: pathlib.Path) -> tuple[int, int]:
    """(width, height) of a photo, from its header. Photos are not rotated by EXIF, as in a dump.

    Raises:
        UserError: it is missing, or no image.
    """
    try:
        with PIL.Image.open(fpath, formats=pixels.formats()) as img:
            return img.size
    except FileNotFoundError as err:
        raise errors.UserError(
            f"{fpath}: no such image. Pass the folder that was dumped as --images.root."
        ) from err
    except Exception as err:  # Pillow's plugins raise a dozen types for malformed bytes
        raise errors.UserError(f"{fpath}: cannot be read as an image ({errors.first_line(err)}).") from err


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class View:
    """What a ViT saw of a photo, as patches."""

    transform: images.Transform
    n_patches: int

    @jaxtyped(typechecker=beartype.beartype)
    def seen(self, mask_HW: Int32[np.ndarray, "H W"]) -> Int32[np.ndarray, "h w"]:
        """The ids of the pixels of the ViT's input: the photo's geometry, with the nearest pixel's id. VOID
        outside the photo."""
        nearest = dataclasses.replace(self.transform, interpolation="nearest")
        return np.array(nearest.geometry(PIL.Image.fromarray(mask_HW), masks.VOID), np.int32)

    @jaxtyped(typechecker=beartype.beartype)
    def labels(
        self, mask_HW: Int32[np.ndarray, "H W"], background: int | None = None
    ) -> Int32[np.ndarray, " P"]:
        """The id that most pixels of each patch have; of equal counts, the lowest id. VOID only where more
        pixels are VOID than have any one id, such as in padding.

        Args:
            background: an id that counts only in patches without any other.

        Raises:
            UserError: see `images.grid`.
        """
        seen_HW = self.seen(mask_HW)
        placed = layout.Layout.of(self.transform, self.n_patches, mask_HW.shape[::-1])
        (rows, columns), side = placed.grid, placed.patch
        patch_HW = np.arange(rows).repeat(side)[:, None] * columns + np.arange(columns).repeat(side)
        id_C, class_n = np.unique(seen_HW[: rows * side, : columns * side], return_inverse=True)
        at_n = patch_HW.ravel() * len(id_C) + class_n.ravel()
        n_PC = np.bincount(at_n, minlength=rows * columns * len(id_C)).reshape(-1, len(id_C))
        # VOID is lowest, so it comes last: of equal counts, the first wins.
        order_C = np.argsort(np.where(id_C == masks.VOID, patchlabels.MAX_ID + 1, id_C))
        id_C, n_PC = id_C[order_C], n_PC[:, order_C]
        if background is not None:
            is_other_C = (id_C != background) & (id_C != masks.VOID)
            has_other_P1 = n_PC[:, is_other_C].any(axis=1, keepdims=True)
            n_PC = np.where(has_other_P1 & ~is_other_C, 0, n_PC)
            n_PC = np.where(~has_other_P1 & (id_C == background) & (n_PC > 0), n_PC + side * side, n_PC)
        out_P = np.full(self.n_patches, masks.VOID, np.int32)
        out_P[: rows * columns] = id_C[n_PC.argmax(axis=1)]
        return out_P
