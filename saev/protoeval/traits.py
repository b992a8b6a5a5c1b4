"""Writes the traits of a results directory into a gallery: data/traits.js and data/traits/ (docs/gallery.md).

T traits, C rows of the gallery, R retrieved images of all scorers and traits.
"""

import collections.abc
import concurrent.futures
import dataclasses
import pathlib
import shutil
import typing as tp

import numpy as np
import polars as pl

from saev import devices, errors, helpers, nn, scorers
from saev.data import activations, pictures
from saev.data import config as data_config
from saev.data.traits import config as traits_config
from saev.formats import gallery as gallery_format
from saev.formats import jsonfile, manifest, results, scripts
from saev.protoeval import choose, fit, gallery, heat, report, stats
from saev.protoeval.experiment import Experiment
from saev.scorers import sae as sae_scorer

TRAITS, IMAGES = 16, 16
"""Traits and pictures in a file."""
SIDE = 224
"""Longest side of the pictures in pixels."""
REMEDY = "Run visuals.py again."
Json = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Target:
    """A gallery, and the test images that it can show."""

    dpath: pathlib.Path
    row_of: dict[int, int]
    """Latent -> row."""
    classes: list[str]
    number_of: dict[str, int]
    """The gallery's images: key of the path -> number in the gallery's dump."""
    key: collections.abc.Callable[[str], str]
    """Turns a path into the key that joins images."""
    acts: activations.Activations
    """Patches of the images that are measured on."""
    pictures: pictures.Pictures


def check(experiment: Experiment) -> Target:
    """Opens the gallery and the photos, before the long pass.

    Raises:
        UserError: a file of the gallery is missing or damaged, it shows another grid of patches, or a photo
            is missing.
    """
    dpath, measured = pathlib.Path(experiment.cfgs[0].gallery), experiment.sides.measured
    given = measured.acts
    acts = activations.Activations(dataclasses.replace(given.cfg, patches="image"), given.flag, [given])
    described, found = gallery.read(dpath), gallery_format.Gallery(dpath, REMEDY)
    first = acts.records[min(measured.row_of)].path
    root = _photos(experiment, acts, described.images, first)
    shown = pictures.Pictures.of(data_config.ImageFolder(str(root)), acts, SIDE)
    source = found.stats.source
    (height, width), (h, w) = shown.size, source.size
    if shown.grid != source.grid or height * w != width * h:
        mine, theirs = (f"{rows} x {columns}" for rows, columns in (shown.grid, source.grid))
        raise errors.UserError(
            f"--gallery {dpath}: shows images of {h} x {w} pixels in {theirs} patches, but {given.given} has "
            f"{height} x {width} pixels in {mine} patches. Pass a gallery of images of this shape."
        )
    shown.check(sorted(measured.row_of))
    paths = found.paths()
    key, numbers = experiment.labels.key, found.unpack(paths.n, "paths").tolist()
    return Target(
        dpath=dpath,
        row_of={latent: row for row, latent in enumerate(found.id_C.tolist())},
        classes=found.stats.classes,
        number_of=dict(zip(map(key, paths.path), numbers, strict=True)),
        key=key,
        acts=acts,
        pictures=shown,
    )


def _photos(experiment: Experiment, acts: activations.Activations, shown: str, path: str) -> pathlib.Path:
    """The folder that the dump's paths are relative to: in CUB's folder, else where the gallery's images are,
    else where the dump read them.

    Raises:
        UserError: none of them holds the photo `path`.
    """
    source, data = experiment.cfgs[0].source, acts.metadata.data
    given = source.root if isinstance(source, traits_config.Cub) else ""
    recorded = str(data.get("root", "")) if isinstance(data, dict) else ""
    roots = [pathlib.Path(root) for root in dict.fromkeys((given, shown, recorded)) if root]
    for folder in [root / name for root in roots for name in ("images", "", "test", "train")]:
        if (folder / path).is_file():
            return folder
    where = " or ".join(map(str, roots)) or "any known folder"
    raise errors.UserError(
        f"--gallery: its traits show photos, but {path} is not in {where}. Put the photos there, or leave "
        "--gallery out."
    )


def write(out: pathlib.Path, own: gallery.Own, experiment: Experiment) -> None:
    """Writes a results directory's traits into the gallery; they replace those that it has.

    data/traits.js names the folder of its pictures and is written last, so a killed command leaves the former
    traits as they were.

    Args:
        own: the scorer that the gallery shows.

    Raises:
        UserError: as `check`; or the results are damaged, or from a version that kept no images.
    """
    dpath = pathlib.Path(experiment.cfgs[0].gallery)
    lock = dpath.resolve().with_name(f".{dpath.resolve().name}.traits.lock")
    with helpers.locked(lock, f"it writes traits into {dpath}"):
        target = check(experiment)
        shown = _Shown.read(out, own, experiment)
        value, entries, images = shown.value(target), list(shown.entries(target)), shown.images
        folder = f"traits/{helpers.hash_of(jsonfile.dumps([value, entries, images]))[:12]}"
        value |= {"files": {"folder": folder, "traits": TRAITS, "images": IMAGES, "n_images": len(images)}}
        with helpers.atomic_folder(dpath / "data" / folder) as tmp_dpath:
            for i, start in enumerate(range(0, len(entries), TRAITS)):
                part: Json = {"traits": entries[start : start + TRAITS]}
                scripts.write_at(tmp_dpath / f"{i:03}.js", f"{folder}/{i:03}", part)
            _write_images(tmp_dpath / "images", f"{folder}/images", target, images)
        scripts.write(dpath, "traits", value)
        for other in (dpath / "data" / "traits").iterdir():
            if other != dpath / "data" / folder:
                shutil.rmtree(other, ignore_errors=True)


def _write_images(dpath: pathlib.Path, name: str, target: Target, images: dict[str, int]) -> None:
    """Decodes pictures in threads, and writes them file by file."""
    dpath.mkdir()
    class_of = {label: place for place, label in enumerate(target.classes)}
    records, numbers = target.acts.records, list(images.values())
    with concurrent.futures.ThreadPoolExecutor(pictures.n_threads(), "saev-pictures") as pool:
        starts = range(0, len(numbers), IMAGES)
        for file, start in enumerate(helpers.progress(starts, "pictures", len(starts), "files")):
            part = numbers[start : start + IMAGES]
            found: list[Json] = [
                {
                    "n": target.number_of.get(target.key(records[i].path), -1),
                    "path": records[i].path,
                    "class": class_of.get(records[i].label, -1),
                    "src": src,
                }
                | target.pictures.own_grid(i)
                for i, src in zip(part, pool.map(target.pictures.src, part), strict=True)
            ]
            scripts.write_at(dpath / f"{file:03}.js", f"{name}/{file:03}", {"images": found})


class _Scorer(tp.NamedTuple):
    """A scorer and the part of it that is shown."""

    name: str
    k: int
    """Its first k prototypes are compared."""
    scorer: scorers.Scorer

    @property
    def sae(self) -> nn.SparseAutoencoder | None:
        return self.scorer.sae if isinstance(self.scorer, sae_scorer.SaeLatents) else None


@dataclasses.dataclass(frozen=True)
class _Shown:
    """What a gallery shows of results: each scorer's largest cell, on the first draw of train images."""

    experiment: Experiment
    own: str
    scorers: list[_Scorer]
    best: pl.DataFrame
    """The rows of traits.parquet of these cells."""
    retrieved: pl.DataFrame
    """The rows of retrieved.parquet of these cells: trait after trait, scorer after scorer."""
    favourites: pl.DataFrame
    """The rows of prototypes.parquet of the gallery's own scorer."""

    @staticmethod
    def read(out: pathlib.Path, own: gallery.Own, experiment: Experiment) -> "_Shown":
        """Reads results, and loads their scorers."""
        files = manifest.read(out, ["traits.parquet", *results.FOR_GALLERIES], report.AGAIN)
        frames = {name: pl.read_parquet(data) for name, data in files.items()}
        is_real = pl.col("scorer").is_in(experiment.names)
        is_shown = pl.col("n_prototypes") == own.n_prototypes if own.n_prototypes else pl.lit(True)
        best = frames["traits.parquet"].filter(is_real, pl.col("draw") == 0)
        best = best.filter(is_shown | (pl.col("scorer") != own.name)).filter(stats.largest("scorer"))
        best = best.unique(["scorer", "trait"], keep="last", maintain_order=True)
        size_of = dict(best.select("scorer", "n_prototypes").unique().iter_rows())
        banks = {(bank.name, k): bank.scorer for bank in fit.fit(experiment) for k in bank.ks}
        found = [
            _Scorer(name, size_of[name], banks[name, size_of[name]])
            for name in sorted(experiment.names, key=lambda name: name != own.name)
        ]
        names = [helpers.printable(name) for name in experiment.labels.attribute_names_T]
        orders = {"trait": pl.Enum(names), "scorer": pl.Enum([scorer.name for scorer in found])}
        cells = best.select("scorer", "n_prototypes").unique()
        retrieved = (
            frames["retrieved.parquet"]
            .join(cells, on=["scorer", "n_prototypes"], how="semi")
            .unique(["scorer", "trait", "rank"], keep="last")
            .sort(*(pl.col(name).cast(order) for name, order in orders.items()), "rank")
        )
        mine = (pl.col("scorer") == own.name) & (pl.col("n_prototypes") == size_of[own.name])
        favourites = frames["prototypes.parquet"].filter(mine)
        return _Shown(experiment, own.name, found, best, retrieved, favourites)

    @property
    def names(self) -> list[str]:
        """The traits' names."""
        return [helpers.printable(name) for name in self.experiment.labels.attribute_names_T]

    @property
    def images(self) -> dict[str, int]:
        """The images' paths in images.txt, in order of their first use -> their numbers in the shards."""
        measured = self.experiment.sides.measured
        image_of = {row: i for i, row in measured.row_of.items()}
        paths = [helpers.printable(path) for path in self.experiment.measured_paths]
        number_of = dict(zip(paths, (image_of[row] for row in sorted(image_of)), strict=True))
        return {path: number_of[path] for path in self.retrieved["image"].unique(maintain_order=True)}

    # ---- data/traits.js ----

    def value(self, target: Target) -> Json:
        """data/traits.js, without `files`."""
        rows = sorted(self.experiment.sides.measured.row_of.values())
        labels_NT, known_NT = self.experiment.labels.labels_NT[rows], self.experiment.labels.known_of(rows)
        n_T = np.full(labels_NT.shape[1], len(rows)) if known_NT is None else known_NT.sum(axis=0)
        prevalence_T = choose.prevalence(labels_NT, known_NT)
        place_of = {scorer.name: s for s, scorer in enumerate(self.scorers)}
        best: dict[str, list[Json]] = {name: [] for name in self.names}
        order = pl.col("scorer").replace_strict(place_of, return_dtype=pl.Int64)
        for line in (
            self.best.sort(order, maintain_order=True).filter(pl.col("train_ap").is_not_nan()).to_dicts()
        ):
            row = target.row_of.get(line["prototype"], -1) if line["scorer"] == self.own else -1
            found: Json = {"scorer": place_of[line["scorer"]], "prototype": line["prototype"], "row": row}
            best[line["trait"]].append(found | {key: line[key] for key in ("train_ap", "test_ap")})
        traits = [
            {
                "name": name,
                "group": results.group(name),
                "prevalence": prevalence,
                "n_test": n,
                "best": best[name],
            }
            for name, prevalence, n in zip(self.names, prevalence_T.tolist(), n_T.tolist(), strict=True)
        ]
        return {
            "scorers": [self._scorer(scorer) for scorer in self.scorers],
            "traits": traits,
            "settings": {"n_train": self.best["n_train"][0], "draw": 0, "words": self._words()},
            "columns": self._columns(target),
        }

    def _scorer(self, scorer: _Scorer) -> Json:
        noun = "latent" if scorer.sae else "prototype"
        return {"name": scorer.name, "noun": noun, "here": scorer.name == self.own, "n": scorer.k}

    def _words(self) -> str:
        """How prototypes were chosen."""
        sides, n_train = self.experiment.sides, self.best["n_train"][0]
        words = f"Prototypes are chosen on {n_train:,} {sides.chosen.split} images and measured on "
        words += f"{sides.measured.size} (results {self.experiment.id})."
        for scorer in self.scorers:
            if scorer.sae and scorer.k < scorer.sae.d_sae:
                words += f" Of {scorer.name}, only the first {scorer.k:,} of {scorer.sae.d_sae:,} latents "
                words += "take part (--n-prototypes)."
        return words

    def _columns(self, target: Target) -> Json:
        """The favourite traits of each row of the gallery (C rows, F favourites)."""
        trait_CF = np.full((len(target.row_of), choose.N_FAVOURITES), -1, np.int32)
        ap_CF = np.full(trait_CF.shape, np.nan, np.float32)
        place_of = {name: t for t, name in enumerate(self.names)}
        columns = ("prototype", "rank", "trait", "train_ap")
        for prototype, rank, trait, train_ap in self.favourites.select(columns).iter_rows():
            if (row := target.row_of.get(prototype, -1)) >= 0:
                trait_CF[row, rank], ap_CF[row, rank] = place_of[trait], train_ap
        return {"trait": scripts.packed(trait_CF, "i4"), "ap": scripts.packed(ap_CF, "f4")}

    # ---- data/traits/ ----

    def entries(self, target: Target) -> collections.abc.Iterator[list[Json]]:
        """Each trait's pictures, scorer after scorer."""
        images, frame = self.images, self.retrieved
        place_of = {path: place for place, path in enumerate(images)}
        scorer_of = {scorer.name: s for s, scorer in enumerate(self.scorers)}
        scorer_R = np.array([scorer_of[name] for name in frame["scorer"]], np.int64)
        image_R = np.array([images[path] for path in frame["image"]], np.int64)
        place_R = np.array([place_of[path] for path in frame["image"]], np.int64)
        device = devices.pick(self.experiment.cfgs[0].device)
        run = [scorer.scorer for scorer in self.scorers]
        scores_RP = heat.scores(run, target.acts, device, image_R, scorer_R, frame["prototype"].to_numpy())
        if self.experiment.sides.measured.acts.cfg.patches == "cls":
            scores_RP[:] = 0  # the [CLS] token was scored, which is nowhere in the image
        trait_R = frame["trait"].to_numpy()
        for name in self.names:
            of_trait = trait_R == name
            yield [
                self._entry(s, np.flatnonzero(of_trait & (scorer_R == s)), place_R, scores_RP)
                for s in np.unique(scorer_R[of_trait]).tolist()
            ]

    def _entry(self, s: int, rows: np.ndarray, place_R: np.ndarray, scores_RP: np.ndarray) -> Json:
        found, lines = heat.of(scores_RP[rows], self.scorers[s].sae is not None), self.retrieved[rows]
        return {
            "scorer": s,
            "low": found.low,
            "high": found.high,
            "image": scripts.packed(place_R[rows], "u4"),
            "value": scripts.packed(lines["score"].to_numpy(), "f4"),
            "right": scripts.packed(lines["has_trait"].cast(pl.UInt8).to_numpy(), "u1"),
            "start": scripts.packed(found.start, "u4"),
            "patch": scripts.packed(found.patch_m, "u2"),
            "heat": scripts.packed(found.heat_m, "u1"),
        }
