"""Writes the matches of two dictionaries into the first one's gallery: data/compare.js (docs/gallery.md)."""

import collections.abc
import itertools
import os
import pathlib
import typing as tp
import urllib.parse

import numpy as np
import polars as pl

from saev import errors, helpers
from saev.compare import config, report, sides
from saev.formats import gallery, jsonfile, manifest, scripts

N_PICTURES = 8
"""Most pictures of one of the other dictionary's latents."""
PER_FILE = 64
"""Latents of a data file."""


class Galleries(tp.NamedTuple):
    mine: gallery.Gallery
    other: gallery.Gallery | None


def opened(cfg: config.Compare, found: list[sides.Side]) -> Galleries | None:
    """The galleries of both sides; None without --gallery.

    Raises:
        UserError: a folder is no gallery, is damaged, or shows another dictionary.
    """
    if not cfg.gallery:
        return None
    other = _of(cfg.other_gallery, "--other-gallery", found[1]) if cfg.other_gallery else None
    return Galleries(_of(cfg.gallery, "--gallery", found[0]), other)


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
    words = _write_pictures(mine, other, shown["best"].to_list())
    null = np.sort(lines["null_corr"].drop_nans().to_numpy())
    n_patches = about["n_rows"] if about["per_patch"] else about["n_images"] * found[0].acts.n_tokens
    value: dict[str, object] = {
        "other": _described(mine, other, found[1]),
        "method": {
            "words": f"{about['method']} {words}".strip(),
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
        "files": {"compare": PER_FILE},
    }
    scripts.write(mine.dpath, "compare", value)


def _described(mine: gallery.Gallery, other: gallery.Gallery | None, side: sides.Side) -> dict[str, object]:
    """The other dictionary: its gallery's words, else what is known without one."""
    if other:
        href = os.path.relpath(other.dpath / "index.html", mine.dpath)
        described = {key: other.raw[key] for key in ("title", "scorer", "source")}
        return described | {"href": urllib.parse.quote(os.fsencode(href))}
    kind = "sae" if side.sae else side.fpath.name.partition("-")[0]
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


def _write_pictures(mine: gallery.Gallery, other: gallery.Gallery | None, best: list[int]) -> str:
    """Replaces data/compare/ and returns a sentence on pictures that cannot be shown."""
    words, entries = "", map(_empty, best)
    if other and _grid(other) != _grid(mine):
        words = "The other ViT has another grid of patches: its gallery has its pictures."
    elif other:
        row_of = {latent: row for row, latent in enumerate(other.id_C.tolist())}
        place_of = {path: place for place, path in enumerate(mine.paths().path)}
        places = np.array([place_of.get(path, -1) for path in other.paths().path], np.int64)
        words = "Of the other dictionary's images, those that this gallery has are shown." * bool(
            (places < 0).any()
        )
        entries = (_entry(other, latent, row_of.get(latent, -1), places) for latent in best)
    with helpers.atomic_folder(mine.dpath / "data" / "compare") as tmp_dpath:
        for i, part in enumerate(_batched(entries)):
            scripts.write_at(tmp_dpath / f"{i:03}.js", f"compare/{i:03}", {"latents": part})
    return words


def _batched(entries: collections.abc.Iterable[dict]) -> collections.abc.Iterator[tuple[dict, ...]]:
    """The entries of each file."""
    left = iter(entries)
    while part := tuple(itertools.islice(left, PER_FILE)):
        yield part


def _grid(found: gallery.Gallery) -> tuple[object, ...]:
    source = found.stats.source
    return source.grid, source.size, source.transform


def _empty(latent: int) -> dict[str, object]:
    return {"id": latent, "low": 0.0, "high": 0.0, "groups": []}


def _entry(other: gallery.Gallery, latent: int, row: int, places: np.ndarray) -> dict[str, object]:
    """The other latent's top images, as places in the first gallery."""
    if row < 0:
        return _empty(latent)
    found = other.latent(row)
    tops = [group for group in found.groups if group.name == "top"]
    if not tops:
        return _empty(latent)
    top = tops[0]
    image_N, value_N, start_N1, patch_n, heat_n = (
        other.unpack(packed) for packed in (top.image, top.value, top.start, top.patch, top.heat)
    )
    keep = np.flatnonzero(places[image_N] >= 0)[:N_PICTURES]
    slices = [slice(int(start_N1[k]), int(start_N1[k + 1])) for k in keep]
    ends = np.cumsum([0, *(s.stop - s.start for s in slices)])
    group = {
        "name": "top",
        "words": top.words,
        "image": scripts.packed(places[image_N[keep]], "u4"),
        "value": scripts.packed(value_N[keep], "f4"),
        "start": scripts.packed(ends, "u4"),
        "patch": scripts.packed(np.concatenate([patch_n[:0], *(patch_n[s] for s in slices)]), "u2"),
        "heat": scripts.packed(np.concatenate([heat_n[:0], *(heat_n[s] for s in slices)]), "u1"),
    }
    return {"id": latent, "low": found.low, "high": found.high, "groups": [group] if len(keep) else []}
