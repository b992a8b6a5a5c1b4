"""Reads a gallery's statistics into data frames, for notebooks."""

import functools
import pathlib

import beartype
import numpy as np
import polars as pl

from saev import fields
from saev.formats import gallery

REMEDY = "Pass the folder of a gallery; if its files changed, run visuals.py again."


class Gallery:
    """Statistics of a gallery's latents (docs/gallery.md). Each frame is read when it is first used.

    Raises:
        UserError: there is no gallery, or a file is damaged (named).
    """

    def __init__(self, dpath: pathlib.Path):
        self._files = gallery.Gallery(dpath, REMEDY)

    @functools.cached_property
    def latents(self) -> pl.DataFrame:
        """A row for each latent: latent, freq (fraction of patches that it fires on), mean and max of its
        values there, n_images that it fires on, and the most over-represented class."""
        names = ("freq", "mean", "max", "n_images")
        columns = {"latent": self._files.id_C} | {name: self._files.column(name) for name in names}
        return pl.DataFrame(columns).with_columns(self._classes(self._files.column("class")[:, 0]))

    @functools.cached_property
    def neighbours(self) -> pl.DataFrame:
        """latent, other, cosine: the latents with the most similar decoder rows (or prototypes)."""
        return self._related("neighbours", ("other", "cosine"))

    @functools.cached_property
    def together(self) -> pl.DataFrame:
        """latent, other, share: latents that fire on the same patches; share of the latent's patches."""
        return self._related("together", ("other", "share"))

    @functools.cached_property
    def classes(self) -> pl.DataFrame:
        """latent, class, n_images, lift: classes that are over-represented among the images that fire it."""
        lines = [
            (latent, *line)
            for latent, found in zip(self._files.id_C.tolist(), self._files.latents(), strict=True)
            for line in found.classes
        ]
        schema = {"latent": pl.Int64, "class": pl.Int64, "n_images": pl.Int64, "lift": pl.Float64}
        frame = pl.DataFrame(lines, schema=schema, orient="row")
        return frame.with_columns(self._classes(frame["class"].to_numpy()))

    @functools.cached_property
    def traits(self) -> pl.DataFrame:
        """latent, trait, ap: each latent's best traits, with their AP on the train images (from `protoeval.py
        --gallery`)."""
        found = self._files.traits()
        schema = {"latent": pl.Int64, "trait": pl.String, "ap": pl.Float32}
        if not found.columns:
            return pl.DataFrame(schema=schema)
        trait_CK, ap_CK = (self._files.unpack(found.columns.get(name), "traits") for name in ("trait", "ap"))
        if trait_CK.shape != ap_CK.shape or len(trait_CK) != len(self._files.id_C):
            raise self._files.damaged("traits", f"{len(trait_CK)} rows instead of {len(self._files.id_C)}")
        if trait_CK.max(initial=-1) >= len(found.traits):
            raise self._files.damaged("traits", f"{len(found.traits)} traits, but others are named")
        names, ids = [trait.name for trait in found.traits], self._files.id_C.tolist()
        lines = [
            (latent, names[t], ap)
            for latent, row_K, ap_K in zip(ids, trait_CK.tolist(), ap_CK.tolist(), strict=True)
            for t, ap in zip(row_K, ap_K, strict=True)
            if t >= 0
        ]
        return pl.DataFrame(lines, schema=schema, orient="row")

    @functools.cached_property
    def images(self) -> pl.DataFrame:
        """latent, group, value, path, class, image_i: the images that are shown, in the page's order.

        Groups are top, q4, q3, q2, q1 and random. value is the latent's largest on the image, image_i the
        image's number in the dump.
        """
        place, value, latent, group = [], [], [], []
        for number, found in zip(self._files.id_C.tolist(), self._files.latents(), strict=True):
            for each in found.groups:
                place.append(self._files.unpack(each.image))
                value.append(self._files.unpack(each.value))
                latent.append(np.full(len(place[-1]), number))
                group += [each.name] * len(place[-1])
        paths = self._files.paths()
        place_n = np.concatenate(place or [np.zeros(0, np.int64)]).astype(np.int64)
        if (place_n >= len(paths.path)).any():
            raise self._files.damaged(
                "paths", f"{len(paths.path)} pictures, but {place_n.max() + 1} are shown"
            )
        columns = {
            "latent": np.concatenate(latent or [np.zeros(0, np.int64)]),
            "group": group,
            "value": np.concatenate(value or [np.zeros(0, np.float32)]),
            "path": pl.Series(paths.path, dtype=pl.String).gather(place_n),
        }
        class_n, number_n = (self._files.unpack(x, "paths")[place_n] for x in (paths.class_, paths.n))
        return pl.DataFrame(columns).with_columns(self._classes(class_n), pl.Series("image_i", number_n))

    def _related(self, name: str, columns: tuple[str, str]) -> pl.DataFrame:
        lines = [
            (latent, other, value)
            for latent, found in zip(self._files.id_C.tolist(), self._files.latents(), strict=True)
            for _, other, value in getattr(found, name)
        ]
        schema = {"latent": pl.Int64, columns[0]: pl.Int64, columns[1]: pl.Float64}
        return pl.DataFrame(lines, schema=schema, orient="row")

    def _classes(self, class_n: np.ndarray) -> pl.Series:
        """Names of classes; null for -1."""
        names = [*self._files.stats.classes, None]
        if ((class_n < -1) | (class_n >= len(names) - 1)).any():
            raise self._files.damaged("stats", f"{len(names) - 1} classes, but others are named")
        return pl.Series("class", [names[i] for i in class_n.tolist()], dtype=pl.String)


@beartype.beartype
def open(dpath: pathlib.Path | str) -> Gallery:  # noqa: A001 (used as saev.visuals.open)
    """Opens a gallery that visuals.py wrote, to read its statistics.

    Raises:
        UserError: there is no gallery, or it is damaged.
    """
    return Gallery(fields.path(dpath))
