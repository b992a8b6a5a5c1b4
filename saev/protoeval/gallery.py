"""Links each trait's latent in a results directory to its place in a gallery that visuals.py made."""

import os
import pathlib
import typing as tp
import urllib.parse

import msgspec
import polars as pl

from saev import errors, helpers, scorers
from saev.data import activations
from saev.formats import jsonfile, manifest
from saev.protoeval import config, report, stats
from saev.protoeval.experiment import Experiment
from saev.report import tables
from saev.scorers import config as scorers_config


class Own(tp.NamedTuple):
    """The scorer that a gallery shows."""

    name: str
    """In the table."""
    n_prototypes: int | None = None
    """K of a scorer that is fitted for each K."""


def own(experiment: Experiment) -> Own | None:
    """The scorer that the gallery of --gallery shows; None without --gallery.

    Raises:
        UserError: the gallery does not exist, or shows none of the scorers.
    """
    dpath = experiment.cfgs[0].gallery
    if not dpath:
        return None
    shown = read(pathlib.Path(dpath)).sha256
    for cfg, name, fit in zip(experiment.cfgs, experiment.names, experiment.fits, strict=True):
        for k, fpath in _files(cfg, fit.acts):
            if helpers.hash_file(fpath) == shown:
                return Own(name, k)
    raise errors.UserError(
        f"--gallery {dpath}: shows another scorer than those that are evaluated. Run visuals.py on "
        "--scorer.ckpt, or on a file in --scorers-to."
    )


def _files(cfg: config.ProtoEval, acts: activations.Activations) -> list[tuple[int | None, pathlib.Path]]:
    """(K, file) of a scorer's files; K is None if one file serves each K."""
    match cfg.scorer:
        case scorers_config.Sae(ckpt=ckpt):
            if not pathlib.Path(ckpt).is_file():
                raise errors.UserError(
                    f"--scorer.ckpt {ckpt}: no such checkpoint. Pass the sae.pt that train.py printed."
                )
            return [(None, pathlib.Path(ckpt))]
        case scorers_config.Pca(both_signs=True) | scorers_config.Units():
            return []  # a gallery shows each component or unit once
        case fitted:
            ks, dpath = list(cfg.n_prototypes), pathlib.Path(cfg.scorers_to)
            found = scorers.stored(fitted, acts, ks, cfg.seed, dpath)
            if isinstance(fitted, scorers_config.KMeans):
                return list(found.items())
            return [(None, found[max(ks)])] if max(ks) in found else []


class Gallery(msgspec.Struct):
    """gallery.json."""

    sha256: str
    """sha256 of the scorer's file."""
    latents: list[int]
    kind: str = "sae"
    """sae, kmeans, random, pca or units."""
    images: str = ""
    """The folder of its images."""


def read(gallery: pathlib.Path) -> Gallery:
    """Reads gallery.json of visuals.py.

    Raises:
        UserError: it is missing, or was changed.
    """
    try:
        return jsonfile.read_sealed(gallery / "gallery.json", Gallery, "Run visuals.py again.")
    except (FileNotFoundError, NotADirectoryError) as err:
        raise errors.UserError(
            f"--gallery {gallery}: has no gallery.json. Pass a folder that visuals.py wrote."
        ) from err


def link(dpath: pathlib.Path, shown: Own, gallery: pathlib.Path) -> None:
    """Writes traits.md into a results directory: each trait's latent, with a link into the gallery.

    Args:
        shown: the gallery's scorer. Its largest cell is used.
    """
    data = manifest.read(dpath, ["traits.parquet"], report.AGAIN)["traits.parquet"]
    opened = read(gallery)
    best, latents = best_traits(data, shown.name, shown.n_prototypes), set(opened.latents)
    index = urllib.parse.quote(os.fsencode(os.path.relpath(gallery / "index.html", dpath)))
    chosen = best["prototype"].to_list()
    noun = "prototype" if opened.kind in ("kmeans", "random", "pca") else "latent"
    table = {
        "Trait": best["trait"],
        noun.capitalize(): [f"[{i}]({index}#/latent/{i})" if i in latents else str(i) for i in chosen],
        "AP on train images": [f"{ap:.3f}" for ap in best["train_ap"]],
        "AP on test images": [f"{ap:.3f}" for ap in best["test_ap"]],
    }
    text = f"Best {noun}s of {shown.name} with {best['n_train'][0]} train images.\n\n"
    text += tables.markdown(pl.DataFrame(table))
    if missing := set(chosen) - latents:
        flags = " ".join(map(str, sorted(set(chosen))))
        text += f"\n{len(missing)} of them are not in the gallery; visuals.py shows all with "
        text += f"--include-latents {flags}\n"
    helpers.write_text(dpath / "traits.md", text)


def best_traits(data: bytes, scorer: str, n_prototypes: int | None = None) -> pl.DataFrame:
    """The rows of one of a scorer's cells (first draw) in traits.parquet, highest test AP first.

    n_prototypes: None means the largest cell.
    """
    mine = pl.read_parquet(data).filter(pl.col("scorer") == scorer, pl.col("draw") == 0)
    if n_prototypes is not None:
        mine = mine.filter(pl.col("n_prototypes") == n_prototypes)
    order = pl.col("test_ap").fill_nan(-1.0)
    return mine.filter(stats.largest("scorer")).sort(order, descending=True, maintain_order=True)
