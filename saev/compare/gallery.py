"""Writes the matches of two dictionaries into the first one's gallery: data/compare.js (docs/gallery.md)."""

import collections.abc
import itertools
import os
import pathlib
import typing as tp
import urllib.parse

import numpy as np
import polars as pl

from saev import errors, helpers, scorers
from saev.compare import config, report, sides
from saev.formats import gallery, jsonfile, manifest, scripts

N_PICTURES = 8
"""Most pictures of one of the other dictionary's latents."""
PER_FILE = 64
"""Latents, and pictures, of a data file."""


class Galleries(tp.NamedTuple):
    mine: gallery.Gallery
    other: gallery.Gallery | None


def opened(cfg: config.Compare, found: list[sides.Side]) -> Galleries | None:
    """The galleries of both sides; None without --gallery.

    Raises:
        UserError: a folder is not a gallery, is damaged or older, or shows another dictionary.
    """
    if not cfg.gallery:
        return None
    other = _of(cfg.other_gallery, "--other-gallery", found[1]) if cfg.other_gallery else None
    mine = _of(cfg.gallery, "--gallery", found[0])
    if mine.stats.format < gallery.FORMAT:
        raise errors.UserError(
            f"--gallery {cfg.gallery}: an older version made it, and its page cannot show this comparison. "
            "Run visuals.py again."
        )
    return Galleries(mine, other)


def _of(dpath: str, flag: str, side: sides.Side) -> gallery.Gallery:
    """The gallery of a side. `flag` names it in messages."""
    remedy = f"Pass a gallery of {side.fpath} as {flag}, made by visuals.py."
    found = gallery.Gallery(pathlib.Path(dpath), remedy)
    if not _shows(found, side):
        raise errors.UserError(f"{flag} {dpath}: shows another dictionary. {remedy}")
    return found


def _shows(found: gallery.Gallery, side: sides.Side) -> bool:
    """Whether a gallery shows a dictionary. Units are known by their ViT and layer."""
    if not side.is_units:
        return found.stats.scorer.sha256 == side.digest
    mine = ("units", side.acts.metadata.vit_ckpt, side.layer)
    return (found.stats.scorer.kind, found.stats.source.vit, found.stats.source.layer) == mine


def write(galleries: Galleries, found: list[sides.Side], out: pathlib.Path) -> None:
    """Writes data/compare.js and data/compare/NNN.js of the first side's gallery from a results directory.

    compare.js is emptied first and written last, so that it never speaks of other pictures.
    """
    files = manifest.read(out, [report.MATCHES, "curve.csv", "about.json"], "Move that folder away.")
    lines = pl.read_parquet(files[report.MATCHES]).filter(of="one")
    curve = pl.read_csv(files["curve.csv"], infer_schema_length=None)
    about = jsonfile.parse(files["about.json"], dict[str, tp.Any], str(out), "Move that folder away.")
    mine, other = galleries
    shown = lines[mine.id_C]
    scripts.write(mine.dpath, "compare", {})
    n_pictures = _write_pictures(galleries, _see_the_same(galleries, found), shown["best"].to_list())
    null = np.sort(lines["null_corr"].drop_nans().to_numpy())
    n_patches = about["n_rows"] if about["per_patch"] else about["n_images"] * found[0].acts.n_tokens
    value: dict[str, object] = {
        "other": _described(mine, other, found[1]),
        "method": {
            "words": about["method"],
            "n_images": about["n_images"],
            "n_patches": n_patches,
            "one_space": shown["cos"].is_not_nan().any(),
        },
        "columns": {
            name: scripts.packed(values.to_numpy(), kind)
            for name, values, kind in (
                ("id", shown["latent"], "u4"),
                ("best", shown["best"], "i4"),
                ("corr", shown["corr"], "f4"),
                ("mutual", shown["is_mutual"].cast(pl.UInt8), "u1"),
                ("pair", shown["pair"], "i4"),
                ("pair_corr", shown["pair_corr"], "f4"),
                ("cos_best", shown["cos_best"], "i4"),
                ("cos", shown["cos"], "f4"),
            )
        },
        "null": {"corr": scripts.packed(null, "f4")},
        "curve": {
            name: scripts.packed(curve[column].to_numpy(), "f4")
            for name, column in (("threshold", "threshold"), ("share", "share_one"), ("null", "null_one"))
        },
        "files": {"compare": PER_FILE, "images": PER_FILE, "n_images": n_pictures},
    }
    scripts.write(mine.dpath, "compare", value)


def _described(mine: gallery.Gallery, other: gallery.Gallery | None, side: sides.Side) -> dict[str, object]:
    """The other dictionary: its gallery's words, else what is known without one."""
    if other:
        href = os.path.relpath(other.dpath / "index.html", mine.dpath)
        described = {key: other.raw[key] for key in ("title", "scorer", "source")}
        return described | {"href": urllib.parse.quote(os.fsencode(href))}
    kind = "sae" if side.sae else "units" if side.is_units else scorers.kind_of(side.fpath)
    return {
        "title": side.name,
        "scorer": {
            "name": side.kind,
            "kind": kind,
            "n": side.scorer.n_prototypes,
            "noun": side.noun,
            "ckpt": "" if side.is_units else helpers.printable(str(side.fpath)),
            "sha256": side.digest,
        },
        "source": {"vit": side.vit, "layer": side.layer, "n_images": side.acts.n_imgs},
        "href": "",
    }


# ---- pictures ----


class _Top(tp.NamedTuple):
    """Top images of one of the other dictionary's latents."""

    low: float
    high: float
    words: str
    image_N: np.ndarray
    """Places in the other gallery's pictures."""
    packed: dict[str, scripts.Packed]
    """value, start, patch and heat."""


def _see_the_same(galleries: Galleries, found: list[sides.Side]) -> bool:
    """Whether both galleries' pictures show the same part of a photo. The grids of patches may differ."""
    mine, other = galleries
    if not other:
        return False
    geometries = [sides.geometry(side.acts) for side in found[:2]]
    one, two = mine.stats.source, other.stats.source
    is_alike = geometries[0] == geometries[1] and one.transform == two.transform
    if geometries[0].get("fit") == "flexible":  # each picture has a grid of its own
        is_alike = is_alike and one.grid == two.grid
    return is_alike and (one.size == two.size or not geometries[0])  # without one: squares of any size


def _write_pictures(galleries: Galleries, see_the_same: bool, best: list[int]) -> int:
    """Replaces data/compare/. Pictures that the first gallery lacks are copied from the other one.

    Args:
        see_the_same: whether the first gallery's picture of an image may stand for the other one's.

    Returns:
        The number of copied pictures.
    """
    mine, other = galleries
    tops = _tops(other, best) if other else {}
    place_N, copied = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if other:
        place_of = {path: place for place, path in enumerate(mine.paths().path)} if see_the_same else {}
        place_N = np.array([place_of.get(path, -1) for path in other.paths().path], np.int64)
        used = np.unique(np.concatenate([place_N[:0], *(top.image_N for top in tops.values())]))
        copied = used[place_N[used] < 0]
        place_N[copied] = mine.stats.files.n_images + np.arange(len(copied))
    entries = (_entry(latent, tops.get(latent), place_N) for latent in best)
    with helpers.atomic_folder(mine.dpath / "data" / "compare") as tmp_dpath:
        for i, part in enumerate(_batched(entries)):
            scripts.write_at(tmp_dpath / f"{i:03}.js", f"compare/{i:03}", {"latents": part})
        (tmp_dpath / "images").mkdir()
        for i, part in enumerate(_batched(_copies(galleries, copied))):
            scripts.write_at(tmp_dpath / "images" / f"{i:03}.js", f"compare/images/{i:03}", {"images": part})
    return len(copied)


def _batched(entries: collections.abc.Iterable[dict]) -> collections.abc.Iterator[tuple[dict, ...]]:
    """The entries of each file."""
    left = iter(entries)
    while part := tuple(itertools.islice(left, PER_FILE)):
        yield part


def _copies(galleries: Galleries, copied: np.ndarray) -> collections.abc.Iterator[dict[str, object]]:
    """Entries of data/compare/images. n is the image's number in the first gallery's dump, or -1."""
    mine, other = galleries
    if not other:
        return
    paths = mine.paths()
    number_of = dict(zip(paths.path, mine.unpack(paths.n, "paths").tolist(), strict=True))
    class_of = {name: i for i, name in enumerate(mine.stats.classes)}
    names = [*other.stats.classes, ""]
    for place in copied.tolist():
        image = other.image(place)
        if not -1 <= image.class_ < len(other.stats.classes):
            raise other.damaged("stats", f"{len(other.stats.classes)} classes, but others are named")
        class_ = class_of.get(names[image.class_], -1)
        entry = {"n": number_of.get(image.path, -1), "path": image.path, "class": class_, "src": image.src}
        yield entry | ({"grid": image.grid} if image.grid else {})


def _tops(other: gallery.Gallery, best: list[int]) -> dict[int, _Top]:
    """Top images of those latents that the other gallery shows. Its files are read once, in order."""
    row_of = {latent: row for row, latent in enumerate(other.id_C.tolist())}
    out = {}
    for latent in sorted(set(best) & set(row_of), key=row_of.__getitem__):
        found = other.latent(row_of[latent])
        for group in found.groups:
            if group.name == "top" and (top := _top(other, found, group)):
                out[latent] = top
    return out


def _top(other: gallery.Gallery, found: gallery.Latent, group: gallery.Group) -> _Top | None:
    image_N, value_N, start_N1, patch_n, heat_n = (
        other.unpack(packed) for packed in (group.image, group.value, group.start, group.patch, group.heat)
    )
    n = min(len(image_N), N_PICTURES)
    if not n:
        return None
    packed = {
        "value": scripts.packed(value_N[:n], "f4"),
        "start": scripts.packed(start_N1[: n + 1], "u4"),
        "patch": scripts.packed(patch_n[: start_N1[n]], "u2"),
        "heat": scripts.packed(heat_n[: start_N1[n]], "u1"),
    }
    if image_N.max() >= other.stats.files.n_images:
        raise other.damaged(
            "stats", f"{other.stats.files.n_images} pictures, but number {image_N.max()} is shown"
        )
    return _Top(found.low, found.high, group.words, image_N[:n].astype(np.int64), packed)


def _entry(latent: int, top: _Top | None, place_N: np.ndarray) -> dict[str, object]:
    """An entry of data/compare. place_N: the page's place of each of the other gallery's pictures."""
    if top is None:
        return {"id": latent, "low": 0.0, "high": 0.0, "groups": []}
    image = scripts.packed(place_N[top.image_N], "u4")
    group = {"name": "top", "words": top.words, "image": image, **top.packed}
    return {"id": latent, "low": top.low, "high": top.high, "groups": [group]}
