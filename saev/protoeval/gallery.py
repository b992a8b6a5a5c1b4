"""Links each trait's latent in a results directory to its place in a gallery that visuals.py made."""

import os
import pathlib
import urllib.parse

import msgspec
import polars as pl

from saev import errors, helpers
from saev.formats import jsonfile, manifest
from saev.protoeval import config, report, stats
from saev.report import tables
from saev.scorers import config as scorers_config


def scorer(gallery: str, cfgs: list[config.ProtoEval], names: list[str]) -> str:
    """The name, in `names`, of the SAE that a gallery shows; "" without --gallery.

    Raises:
        UserError: the gallery does not exist, or shows none of the SAEs.
    """
    if not gallery:
        return ""
    shown = read(pathlib.Path(gallery)).sha256
    for cfg, name in zip(cfgs, names, strict=True):
        ckpt = pathlib.Path(getattr(cfg.scorer, "ckpt", ""))
        if isinstance(cfg.scorer, scorers_config.Sae) and not ckpt.is_file():
            raise errors.UserError(
                f"--scorer.ckpt {ckpt}: no such checkpoint. Pass the sae.pt that train.py printed."
            )
        if ckpt.is_file() and helpers.hash_file(ckpt) == shown:
            return name
    raise errors.UserError(
        f"--gallery {gallery}: shows another SAE than --scorer.ckpt. Run visuals.py on that checkpoint."
    )


class Gallery(msgspec.Struct):
    """gallery.json."""

    sha256: str
    """sha256 of the SAE's checkpoint."""
    latents: list[int]


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


def link(dpath: pathlib.Path, scorer: str, gallery: pathlib.Path) -> None:
    """Writes traits.md into a results directory: each trait's latent, with a link into the gallery.

    Args:
        scorer: the SAE's name in the table. Its largest cell is used.
    """
    data = manifest.read(dpath, ["traits.parquet"], report.AGAIN)["traits.parquet"]
    best, shown = best_traits(data, scorer), set(read(gallery).latents)
    index = urllib.parse.quote(os.fsencode(os.path.relpath(gallery / "index.html", dpath)))
    latents = best["prototype"].to_list()
    table = {
        "Trait": best["trait"],
        "Latent": [f"[{i}]({index}#/latent/{i})" if i in shown else str(i) for i in latents],
        "AP on train images": [f"{ap:.3f}" for ap in best["train_ap"]],
        "AP on test images": [f"{ap:.3f}" for ap in best["test_ap"]],
    }
    text = f"Best latents of {scorer} with {best['n_train'][0]} train images.\n\n"
    text += tables.markdown(pl.DataFrame(table))
    if missing := set(latents) - shown:
        flags = " ".join(map(str, sorted(set(latents))))
        text += f"\n{len(missing)} of them are not in the gallery; visuals.py shows all with "
        text += f"--include-latents {flags}\n"
    helpers.write_text(dpath / "traits.md", text)


def best_traits(data: bytes, scorer: str) -> pl.DataFrame:
    """The rows of a scorer's largest cell (first draw) in traits.parquet, highest test AP first."""
    mine = pl.read_parquet(data).filter(pl.col("scorer") == scorer, pl.col("draw") == 0)
    order = pl.col("test_ap").fill_nan(-1.0)
    return mine.filter(stats.largest("scorer")).sort(order, descending=True, maintain_order=True)
