"""Writes a gallery's files (docs/gallery.md).

N images, S latents, C chosen latents (rows of the gallery), E entries of a file, P patches.
"""

import collections.abc
import concurrent.futures
import csv
import dataclasses
import pathlib
import shutil
import typing as tp

import numpy as np

from saev import errors, helpers, provenance
from saev.data import activations, pictures
from saev.formats import codeshards, jsonfile, scripts
from saev.formats import gallery as gallery_format
from saev.visuals import coders, heat, relations, spool, statistics

PAGE = pathlib.Path(__file__).parent / "page"
"""index.html, its style and its scripts, the same in every gallery."""
MARKERS = ("index.html", "latents.csv")
"""A folder with these files is a gallery and may be replaced."""
LATENTS, IMAGES, CODES = 256, 64, 8
"""Latents, pictures and images of the image view in a file."""
Json = dict[str, object]
"""A value of a data file."""
WORDS = {
    "top": "the images with the largest values",
    "q4": "from the highest quarter of the images that fire it",
    "q3": "from the third quarter",
    "q2": "from the second quarter",
    "q1": "from the lowest quarter",
    "random": "any images, drawn at random",
}


class Classes(tp.NamedTuple):
    """The images' labels."""

    names: list[str]
    class_N: np.ndarray
    """int64: class of the image at each position of the stream; -1 without a label."""
    n_G: np.ndarray
    """Images of each class."""

    @staticmethod
    def of(acts: activations.Activations) -> "Classes":
        labels = [acts.records[i].label for i in acts.image_is_N.tolist()]
        names = sorted(set(labels) - {""})
        place = {name: i for i, name in enumerate(names)} | {"": -1}
        class_N = np.array([place[label] for label in labels], np.int64)
        return Classes(names, class_N, np.bincount(class_N[class_N >= 0], minlength=len(names)))


@dataclasses.dataclass(frozen=True)
class Gallery:
    """All that a gallery shows."""

    title: str
    scorer: Json
    """As in data/stats.js."""
    source: Json
    filters: str
    coder: coders.Coder
    acts: activations.Activations
    codes: spool.Spool
    stats: statistics.Stats
    chosen_C: np.ndarray
    shown: statistics.Shown
    view: list[int]
    """Positions of the images in the image view."""
    classes: Classes
    pictures: pictures.Pictures
    seed: int
    gallery: Json
    """Further values of gallery.json."""


def is_gallery(dpath: pathlib.Path) -> bool:
    return all((dpath / name).is_file() for name in MARKERS)


def check_target(dpath: pathlib.Path) -> None:
    """Creates the parent folder of `dpath` and checks that `dpath` may be replaced.

    Raises:
        UserError: the folder cannot be created, or `dpath` exists and is not a gallery.
    """
    try:
        dpath.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise errors.UserError(f"--dump-to {dpath}: cannot be created ({err}).") from err
    if not dpath.exists() or is_gallery(dpath):
        return
    if dpath.is_file() or any(dpath.iterdir()):
        raise errors.UserError(f"--dump-to {dpath}: exists and is not a gallery. Pass a new folder.")


def write(dpath: pathlib.Path, gallery: Gallery) -> None:
    """Writes the gallery to a temporary folder and replaces `dpath` with it when it is complete.

    Raises:
        UserError: an image is missing or unreadable (named), or `dpath` exists and is not a gallery.
    """
    check_target(dpath)
    with helpers.atomic_folder(dpath) as tmp_dpath:
        _write(tmp_dpath, gallery)
        check_target(dpath)  # someone may have written to it in the meantime


def _write(dpath: pathlib.Path, gallery: Gallery) -> None:
    shown = gallery.shown.position_CW
    positions = np.unique(np.concatenate([shown[shown >= 0], np.array(gallery.view, np.int32)]))
    _write_images(dpath, gallery, positions)
    _write_codes(dpath, gallery, positions)
    class_C3 = _write_latents(dpath, gallery, positions)
    _write_stats(dpath, gallery, len(positions), class_C3)
    for name in ("traits", "compare"):
        scripts.write(dpath, name, {})
    _write_table(dpath / "latents.csv", gallery)
    latents = gallery.chosen_C.tolist()
    helpers.write_text(dpath / "gallery.json", jsonfile.seal({**gallery.gallery, "latents": latents}))
    provenance.write(dpath)
    shutil.copytree(PAGE, dpath, dirs_exist_ok=True)


# ---- columns ----


def _write_stats(dpath: pathlib.Path, gallery: Gallery, n_pictures: int, class_C3: np.ndarray) -> None:
    stats, chosen_C = gallery.stats, gallery.chosen_C
    columns = {
        "id": (chosen_C, "u4"),
        "freq": (stats.freq_S[chosen_C], "f4"),
        "mean": (stats.mean_S[chosen_C], "f4"),
        "max": (_largest(gallery), "f4"),
        "n_images": (stats.images_S[chosen_C], "u4"),
        "class": (class_C3, "i4"),
    }
    value: Json = {
        "format": gallery_format.FORMAT,
        "title": gallery.title,
        "scorer": gallery.scorer,
        "source": gallery.source,
        "shown": {"n": len(chosen_C), "of": gallery.coder.n, "filters": gallery.filters},
        "files": {
            "latents": LATENTS,
            "images": IMAGES,
            "n_images": n_pictures,
            "codes": CODES,
            "n_codes": len(gallery.view),
        },
        "classes": gallery.classes.names,
        "columns": {name: scripts.packed(values, kind) for name, (values, kind) in columns.items()},
    }
    scripts.write(dpath, "stats", value)


def _largest(gallery: Gallery) -> np.ndarray:
    """Each row's largest value; 0 for a latent that never fires."""
    if gallery.codes.ranked is not None:
        return gallery.codes.ranked.value_SK[gallery.chosen_C, 0]
    return gallery.stats.high_S[gallery.chosen_C]


def _write_table(fpath: pathlib.Path, gallery: Gallery) -> None:
    stats, chosen_C = gallery.stats, gallery.chosen_C
    columns = (
        chosen_C,
        stats.freq_S[chosen_C],
        stats.mean_S[chosen_C],
        _largest(gallery),
        stats.images_S[chosen_C],
    )
    with fpath.open("w", newline="", encoding="utf-8") as fd:
        writer = csv.writer(fd)
        writer.writerow(["latent", "freq", "mean", "max", "n_images"])
        writer.writerows(zip(*(column_C.tolist() for column_C in columns), strict=True))


# ---- pictures ----


def _write_images(dpath: pathlib.Path, gallery: Gallery, positions: np.ndarray) -> None:
    """Decodes images in threads, and writes them file by file."""
    source, image_is = gallery.pictures, gallery.acts.image_is_N[positions].tolist()
    class_n = gallery.classes.class_N[positions].tolist()
    with concurrent.futures.ThreadPoolExecutor(pictures.n_threads(), "saev-pictures") as pool:
        starts = range(0, len(image_is), IMAGES)
        for file, start in enumerate(helpers.progress(starts, "pictures", len(starts), "files")):
            part = slice(start, start + IMAGES)
            srcs = list(pool.map(source.src, image_is[part]))
            found = zip(image_is[part], class_n[part], srcs, strict=True)
            value = [
                {"n": n, "path": source.records[n].path, "class": c, "src": src} | source.own_grid(n)
                for n, c, src in found
            ]
            scripts.write(dpath, f"images/{file:03}", {"images": value})
    place_of = {position: i for i, position in enumerate(gallery.view)}
    paths: Json = {
        "path": [source.records[n].path for n in image_is],
        "class": scripts.packed(class_n, "i4"),
        "n": scripts.packed(image_is, "u4"),
        "code": scripts.packed([place_of.get(position, -1) for position in positions.tolist()], "i4"),
    }
    scripts.write(dpath, "paths", paths)


# ---- image view ----


def _write_codes(dpath: pathlib.Path, gallery: Gallery, positions: np.ndarray) -> None:
    row_S = _row_of(gallery)
    found: list[Json] = []
    for i, position in enumerate(gallery.view, 1):
        fired = gallery.codes.rows(range(position, position + 1))
        found.append(_codes(fired, gallery.stats, row_S, int(np.searchsorted(positions, position))))
        if i % CODES == 0 or i == len(gallery.view):
            scripts.write(dpath, f"codes/{(i - 1) // CODES:03}", {"images": found})
            found = []


def _codes(fired: codeshards.Csr, stats: statistics.Stats, row_S: np.ndarray, place: int) -> Json:
    """The rows that fire on each patch, largest value first."""
    P = len(fired.start_R1) - 1
    patch_n = np.repeat(np.arange(P), np.diff(fired.start_R1))
    row_n = row_S[fired.latent_n]
    order = np.lexsort((-fired.value_n, patch_n))
    order = order[row_n[order] >= 0]
    n_P = np.bincount(patch_n[order], minlength=P)
    below_n = statistics.below(stats, fired.latent_n[order], fired.value_n[order])
    return {
        "image": place,
        "start": scripts.packed(np.concatenate([[0], np.cumsum(n_P)]), "u4"),
        "row": scripts.packed(row_n[order], "u4"),
        "value": scripts.packed(fired.value_n[order], "f4"),
        "rank": scripts.packed(np.rint(65535 * below_n).astype(np.uint16), "u2"),
    }


def _row_of(gallery: Gallery) -> np.ndarray:
    """Row of each latent, or -1."""
    row_S = np.full(gallery.coder.n, -1, np.int64)
    row_S[gallery.chosen_C] = np.arange(len(gallery.chosen_C))
    return row_S


# ---- latents ----


def _write_latents(dpath: pathlib.Path, gallery: Gallery, positions: np.ndarray) -> np.ndarray:
    """Returns each row's three most over-represented classes, or -1."""
    coder, chosen_C = gallery.coder, gallery.chosen_C
    place_N = np.zeros(gallery.acts.n_imgs, np.uint32)
    place_N[positions] = np.arange(len(positions))
    related, class_C3 = _related(gallery), np.full((len(chosen_C), 3), -1, np.int32)
    ends_CG = _group_ends(gallery.shown)
    low_S, high_S = heat.scale(coder, gallery.codes, gallery.stats)
    entries = heat.Entries.of(gallery.shown, chosen_C)
    latents: list[Json] = []
    n_files = 0
    for part in heat.parts(coder, gallery.acts, gallery.codes, entries, low_S, high_S):
        rows = slice(part.rows.start, part.rows.stop)
        groups = _groups(gallery.shown.names, ends_CG[rows], part, place_N[entries.of_rows(rows)])
        for row in part.rows:
            s = int(chosen_C[row])
            found: Json = {
                "histogram": _histogram(gallery.stats, s),
                "low": float(low_S[s]),
                "high": float(high_S[s]),
                "groups": next(groups),
            }
            latents.append(found | (others := next(related)))
            for i, (place, *_) in enumerate(others["classes"][:3]):
                class_C3[row, i] = place
            if len(latents) == LATENTS or row == len(chosen_C) - 1:
                scripts.write(dpath, f"latents/{n_files:03}", {"latents": latents})
                latents, n_files = [], n_files + 1
    return class_C3


def _histogram(stats: statistics.Stats, s: int) -> Json:
    edges = [float(stats.low_S[s]), float(stats.high_S[s])]
    return {"n": scripts.packed(stats.bin_SH[s], "u4"), "edges": edges, "scale": "linear"}


def _group_ends(shown: statistics.Shown) -> np.ndarray:
    """(C, 1 + groups) Where each group of a row begins, and the last one ends, among the row's images."""
    n_CW1 = np.pad((shown.position_CW >= 0).cumsum(axis=1), ((0, 0), (1, 0)))
    return n_CW1[:, [0, *shown.ends]]


def _groups(
    names: tuple[str, ...], ends_CG: np.ndarray, part: heat.Heat, place_E: np.ndarray
) -> collections.abc.Iterator[list[Json]]:
    """The groups of images of each row of a part. Empty ones are left out."""
    image, value = scripts.Column(place_E, "u4"), scripts.Column(part.value_E, "f4")
    patch, shade = scripts.Column(part.patch_m, "u2"), scripts.Column(part.heat_m, "u1")
    first = 0
    for ends_G in ends_CG.tolist():
        found: list[Json] = []
        for name, before, end in zip(names, ends_G, ends_G[1:], strict=False):
            if before == end:
                continue
            e0, e1 = first + before, first + end
            start_n = part.start_E1[e0 : e1 + 1]
            m0, m1 = int(start_n[0]), int(start_n[-1])
            found.append(
                {
                    "name": name,
                    "words": WORDS[name],
                    "image": image.part(e0, e1),
                    "value": value.part(e0, e1),
                    "start": scripts.packed((start_n - m0).astype(np.uint32), "u4"),
                    "patch": patch.part(m0, m1),
                    "heat": shade.part(m0, m1),
                }
            )
        first += ends_G[-1]
        yield found


def _related(gallery: Gallery) -> collections.abc.Iterator[dict[str, list[tp.Any]]]:
    """What each row is related to. Lists are made for some rows at a time, because they are large."""
    coder, chosen_C, classes, row_S = gallery.coder, gallery.chosen_C, gallery.classes, _row_of(gallery)
    vectors_SD = coder.vectors()
    near = None if vectors_SD is None else relations.neighbours(vectors_SD, chosen_C)
    together = relations.together(gallery.codes, coder.n, chosen_C, gallery.seed).related
    for start in range(0, len(chosen_C), LATENTS):
        rows = slice(start, start + LATENTS)
        n = len(chosen_C[rows])
        each: tp.Any = zip(
            [[]] * n if near is None else _pairs(near, row_S, rows),
            _pairs(together, row_S, rows),
            relations.classes(gallery.stats, chosen_C[rows], classes.class_N, classes.n_G),
            strict=True,
        )
        yield from (dict(zip(("neighbours", "together", "classes"), row, strict=True)) for row in each)


def _pairs(related: relations.Related, row_S: np.ndarray, rows: slice) -> list[list[tuple[tp.Any, ...]]]:
    """(row or -1, number, value) of each related latent."""
    latent_CK, value_CK = related.latent_CK[rows], related.value_CK[rows].astype(np.float64).round(4)
    columns = (row_S[latent_CK].tolist(), latent_CK.tolist(), value_CK.tolist())  # of -1 too: left out
    found = [list(zip(*each, strict=True)) for each in zip(*columns, strict=True)]
    return found if (latent_CK >= 0).all() else [[x for x in each if x[1] >= 0] for each in found]
