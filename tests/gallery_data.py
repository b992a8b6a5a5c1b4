"""Made-up galleries by docs/gallery.md, for the tests of the page. S latents, N images, P patches in a square grid."""

import base64
import dataclasses
import io
import pathlib
import shutil

import numpy as np
import PIL.Image

from saev.demo import minicub
from saev.formats import gallery, scripts
from saev.visuals.write import PAGE

NASTY = [
    "<script>document.title='hacked'</script>",
    "</script><img src=x onerror=alert(1)>",
    "quote\" apostrophe' & ampersand",
    "gull\u202egnp.exe\u200f",
]
GROUPS = {
    "top": "the images with the largest values",
    "q4": "images whose value is in the highest quarter",
    "q3": "images whose value is in the third quarter",
    "q2": "images whose value is in the second quarter",
    "q1": "images whose value is in the lowest quarter",
    "random": "images drawn at random, whether they fire it or not",
}
SCORERS = ["sae-topk-16", "k-means", "random", "pca"]
PER_FILE = {"latents": 256, "images": 32, "codes": 8, "traits": 16, "compare": 32}
OF_TRAITS = "traits/0123456789ab"


@dataclasses.dataclass(frozen=True)
class MadeUp:
    """What a gallery holds."""

    n_latents: int = 600
    n_images: int = 48
    side: int = 16
    """Patches in a row."""
    n_view: int = 16
    """Images in the image view."""
    traits: bool = True
    compare: bool = True
    nasty: bool = False
    """Names that would be markup."""
    picture: tuple[int, int, int] | None = None
    """Plain colour instead of drawn birds."""
    n_stored: int | None = None
    """Latents whose file is written; None means all."""
    n_listed: int | None = None
    """Images that have an id, if more than the pictures that are written."""
    signed: bool = False
    seed: int = 0

    @property
    def n_patches(self) -> int:
        return self.side**2


def write(dpath: pathlib.Path, made: MadeUp) -> pathlib.Path:
    """Writes the page and its data; returns the path of index.html."""
    rng = np.random.default_rng(made.seed)
    shutil.copytree(PAGE, dpath, dirs_exist_ok=True)
    images = _images(made)
    classes = sorted({image["class_name"] for image in images})
    if made.nasty:
        classes[:4] = NASTY
    for image in images:
        image["class"] = classes.index(image.pop("class_name")) if not made.nasty else image["n"] % 5
    _write_files(dpath, "images", "images", images)
    stats = _stats(made, rng, classes)
    scripts.write(dpath, "stats", stats)
    n_stored = made.n_latents if made.n_stored is None else made.n_stored
    latents = [_latent(made, rng, row, len(classes)) for row in range(n_stored)]
    _write_files(dpath, "latents", "latents", latents)
    _write_paths(dpath, made, images)
    _write_files(
        dpath, "codes", "images", [_codes(made, rng, i, stats["columns"]["max"]) for i in range(made.n_view)]
    )
    _write_traits(dpath, made, rng, images) if made.traits else scripts.write(dpath, "traits", {})
    _write_compare(dpath, made, rng) if made.compare else scripts.write(dpath, "compare", {})
    return dpath / "index.html"


def group(images: list[int], heats: list[dict[int, int]], values: list[float], **more: object) -> dict:
    """One packed group; heats maps patches to heat for each image."""
    start = np.cumsum([0, *map(len, heats)])
    return {
        "image": scripts.packed(np.array(images, np.int64), "u4"),
        "value": scripts.packed(values, "f4"),
        "start": scripts.packed(start, "u4"),
        "patch": scripts.packed(np.array([p for heat in heats for p in heat], np.int64), "u2"),
        "heat": scripts.packed(np.array([h for heat in heats for h in heat.values()], np.int64), "u1"),
        **more,
    }


def _write_files(dpath: pathlib.Path, folder: str, key: str, entries: list[dict], kind: str = "") -> None:
    n = PER_FILE[kind or folder]
    for i in range(0, len(entries), n):
        scripts.write(dpath, f"{folder}/{i // n:03}", {key: entries[i : i + n]})


def _images(made: MadeUp) -> list[dict]:
    rng = np.random.default_rng((made.seed, 1))
    profiles = [{g: str(rng.choice(v)) for g, v in minicub.GROUPS.items()} for _ in range(minicub.N_SPECIES)]
    images = []
    for i in range(made.n_images):
        species = i % minicub.N_SPECIES
        name = minicub.SPECIES[species]
        if made.picture is None:
            picture = minicub.picture(minicub.Bird(species, profiles[species], None), rng)[0].resize(
                (224, 224)
            )
        else:
            picture = PIL.Image.new("RGB", (224, 224), made.picture)
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=80, lossless=made.picture is not None)
        src = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        path = f"{NASTY[i % 4]}/{i}.jpg" if made.nasty else f"{species + 1:03}.{name}/{name}_{i:04}.jpg"
        images.append({"n": 7 * i + 3, "path": path, "class_name": f"{species + 1:03}.{name}", "src": src})
    return images


def _stats(made: MadeUp, rng: np.random.Generator, classes: list[str]) -> dict:
    s = made.n_latents
    freq = 10 ** np.clip(rng.normal(-2.4, 0.8, s), -6, -0.05)
    mean = 10 ** rng.normal(0.1, 0.25, s) * freq**0.08
    if made.signed:
        mean -= 1
    peak = mean + 10 ** rng.normal(0.4, 0.25, s)
    freq[7 % s] = 0
    mean[7 % s] = peak[7 % s] = np.nan
    columns = {
        "id": scripts.packed(np.arange(s) * 2 + 1, "u4"),
        "freq": scripts.packed(freq, "f4"),
        "mean": scripts.packed(mean, "f4"),
        "max": scripts.packed(peak, "f4"),
        "n_images": scripts.packed((freq * made.n_images).astype(np.int64), "u4"),
        "class": scripts.packed(rng.integers(-1, len(classes), (s, 3)), "i4"),
    }
    scorer = {
        "name": NASTY[0] if made.nasty else "sae-topk-16",
        "kind": "random" if made.signed else "sae",
        "noun": "prototype" if made.signed else "latent",
        "n": 2 * s + 1,
        "signed": made.signed,
        "fires": "A latent fires on a patch where its value is above 0.",
        "ckpt": "checkpoints/a/sae.pt",
        "sha256": f"{made.seed:064x}",
    }
    n = made.n_listed or made.n_images
    return {
        "format": gallery.FORMAT,
        "title": NASTY[3] if made.nasty else "mini-CUB, TopK 16, seed 0",
        "scorer": scorer,
        "source": {
            "vit": "dinov2_vits14",
            "layer": 8,
            "data": NASTY[2] if made.nasty else "CUB_200_2011/images",
            "n_images": n,
            "n_patches": made.n_patches,
            "grid": [made.side, made.side],
            "size": [224, 224],
            "transform": "the shorter side to 224 pixels, centre crop",
        },
        "shown": {"n": s, "of": 2 * s + 1, "filters": "all that fire"},
        "files": {
            "latents": PER_FILE["latents"],
            "images": PER_FILE["images"],
            "n_images": made.n_images,
            "codes": PER_FILE["codes"],
            "n_codes": made.n_view,
        },
        "classes": classes,
        "columns": columns,
    }


def _blob(made: MadeUp, rng: np.random.Generator, peak: float) -> dict[int, int]:
    """Heat that falls off around a patch, as of a part of a bird."""
    y, x = rng.integers(3, made.side - 3, 2) if made.side > 6 else (0, 0)
    rows, columns = np.indices((made.side, made.side))
    heat = 255 * peak * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / rng.uniform(0.8, 3))
    return {int(p): int(h) for p, h in enumerate(heat.ravel()) if h > 12}


def _latent(made: MadeUp, rng: np.random.Generator, row: int, n_classes: int) -> dict:
    groups = []
    for i, (name, words) in enumerate(GROUPS.items()):
        n = 0 if row == 7 and name != "random" else 8
        peaks = np.sort(rng.uniform(0, 0.3, n) + max(0.05, 0.7 - 0.15 * i))[::-1]
        heats = [{} if row == 7 else _blob(made, rng, p) for p in peaks]
        chosen = rng.choice(made.n_images, n, replace=made.n_images < n)
        groups.append(group(chosen.tolist(), heats, [float(8 * p) for p in peaks], name=name, words=words))
    near = rng.choice(made.n_latents, 8, replace=made.n_latents < 8)
    counts = 0 if row == 7 else (4000 * np.exp(-np.arange(64) / 9)).astype(int)
    return {
        "histogram": {
            "n": scripts.packed(np.zeros(64, int) + counts, "u4"),
            "edges": [0.0, 8.0],
            "scale": "linear",
        },
        "low": 0.0,
        "high": 8.0,
        "groups": groups,
        "neighbours": [[int(r) if j % 4 else -1, int(2 * r + 1), 0.9 - 0.08 * j] for j, r in enumerate(near)],
        "together": [[int(r), int(2 * r + 1), 0.6 / (j + 1)] for j, r in enumerate(near)],
        "classes": [[int(c), 12 - c, 4.2 - 0.5 * c] for c in range(min(6, n_classes))],
    }


def _write_paths(dpath: pathlib.Path, made: MadeUp, images: list[dict]) -> None:
    n = made.n_listed or made.n_images
    more = range(made.n_images, n)
    code = np.full(n, -1)
    code[np.arange(made.n_view) * (made.n_images // max(made.n_view, 1))] = np.arange(made.n_view)
    columns = {
        "path": [*(image["path"] for image in images), *(f"more/{i:06}.jpg" for i in more)],
        "class": scripts.packed(np.array([*(image["class"] for image in images), *(-1 for _ in more)]), "i4"),
        "n": scripts.packed(np.arange(n) * 7 + 3, "u4"),
        "code": scripts.packed(code, "i4"),
    }
    scripts.write(dpath, "paths", columns)


def _codes(made: MadeUp, rng: np.random.Generator, i: int, peaks: scripts.Packed) -> dict:
    k = 6
    rows = rng.integers(0, made.n_latents, 60)
    largest = np.frombuffer(peaks.b, "<f4")
    row, value, rank = [], [], []
    for _ in range(made.n_patches):
        fires = rng.choice(rows, k, replace=False)
        ranks = rng.uniform(0, 1, k)
        values = np.nan_to_num(largest[fires] * ranks)
        row += fires[np.argsort(-values)].tolist()
        rank += ranks[np.argsort(-values)].tolist()
        value += np.sort(values)[::-1].tolist()
    return {
        "image": i * (made.n_images // made.n_view),
        "start": scripts.packed(np.arange(made.n_patches + 1) * k, "u4"),
        "row": scripts.packed(np.array(row), "u4"),
        "value": scripts.packed(value, "f4"),
        "rank": scripts.packed(np.rint(65535 * np.array(rank)).astype(int), "u2"),
    }


def _write_traits(dpath: pathlib.Path, made: MadeUp, rng: np.random.Generator, images: list[dict]) -> None:
    names = [*NASTY, *minicub.ATTRIBUTES] if made.nasty else minicub.ATTRIBUTES
    scorers = [
        {"name": n, "noun": "prototype" if i else "latent", "here": i == 0, "n": made.n_latents}
        for i, n in enumerate(SCORERS)
    ]
    if made.nasty:
        scorers[1]["name"] = NASTY[1]
    traits, pictures = [], []
    for name in names:
        best, entries = [], []
        for s in range(len(SCORERS)):
            r = int(rng.integers(made.n_latents))
            ap = float(rng.uniform(0.2, 0.95) - 0.05 * s)
            best.append(
                {
                    "scorer": s,
                    "prototype": 2 * r + 1 if s == 0 else r,
                    "row": r if s == 0 else -1,
                    "train_ap": ap + 0.04,
                    "test_ap": ap,
                }
            )
            values = np.sort(rng.uniform(1, 9, 9))[::-1]
            right = (rng.random(9) < ap).astype(int)
            heats = [_blob(made, rng, v / 9) for v in values]
            chosen = rng.choice(made.n_images, 9, replace=made.n_images < 9).tolist()
            packed = scripts.packed(right, "u1")
            entries.append(
                group(chosen, heats, values.tolist(), scorer=s, right=packed, low=0.0, high=float(values[0]))
            )
        prevalence = float(rng.uniform(0.03, 0.4))
        where = name.partition("::")[0]
        traits.append({"name": name, "group": where, "prevalence": prevalence, "n_test": 210, "best": best})
        pictures.append(entries)
    _write_files(dpath, OF_TRAITS, "traits", pictures, "traits")
    # every other one is not among the gallery's images
    shown = [{**image, "n": image["n"] if i % 2 else -1} for i, image in enumerate(images)]
    _write_files(dpath, f"{OF_TRAITS}/images", "images", shown, "images")
    ap = -np.sort(-rng.beta(2, 4, (made.n_latents, 3)), axis=1)
    value = {
        "scorers": scorers,
        "traits": traits,
        "settings": {"n_train": -1, "draw": 0, "words": "Prototypes are chosen on all 430 train images."},
        "files": {
            "folder": OF_TRAITS,
            "traits": PER_FILE["traits"],
            "images": PER_FILE["images"],
            "n_images": len(shown),
        },
        "columns": {
            "trait": scripts.packed(rng.integers(-1, len(names), (made.n_latents, 3)), "i4"),
            "ap": scripts.packed(ap, "f4"),
        },
    }
    scripts.write(dpath, "traits", value)


def _write_compare(dpath: pathlib.Path, made: MadeUp, rng: np.random.Generator) -> None:
    s = made.n_latents
    corr = rng.beta(2.5, 1.8, s)
    null = np.sort(rng.beta(1.5, 9, s))
    threshold = np.linspace(0, 1, 51)
    mutual = rng.random(s) < 0.7
    others = rng.permutation(s)
    columns = {
        "id": scripts.packed(np.arange(s) * 2 + 1, "u4"),
        "best": scripts.packed(others, "i4"),
        "corr": scripts.packed(corr, "f4"),
        "mutual": scripts.packed(mutual.astype(int), "u1"),
        "pair": scripts.packed(np.where(mutual, others, -1), "i4"),
        "pair_corr": scripts.packed(np.where(mutual, corr, np.nan), "f4"),
        "cos_best": scripts.packed(others, "i4"),
        "cos": scripts.packed(corr * 0.9, "f4"),
    }
    curve = {
        "threshold": scripts.packed(threshold, "f4"),
        "share": scripts.packed([(mutual & (corr >= t)).mean() for t in threshold], "f4"),
        "null": scripts.packed([0.4 * (null >= t).mean() for t in threshold], "f4"),
    }
    own = _stats(made, np.random.default_rng(made.seed), [])
    other = {"title": "mini-CUB, TopK 16, seed 1", "scorer": own["scorer"], "source": own["source"]}
    value = {
        "other": {**other, "href": "../other/index.html"},
        "method": {
            "words": "Pearson correlation of activations over the same patches.",
            "n_images": made.n_images,
            "n_patches": made.n_images * made.n_patches,
            "one_space": True,
        },
        "columns": columns,
        "null": {"corr": scripts.packed(null, "f4")},
        "curve": curve,
        "files": {"compare": PER_FILE["compare"], "images": PER_FILE["images"], "n_images": 0},
    }
    scripts.write(dpath, "compare", value)
    latents = []
    for row in range(s if made.n_stored is None else made.n_stored):
        peaks = np.sort(rng.uniform(0.4, 1, 8))[::-1]
        heats = [_blob(made, rng, p) for p in peaks]
        chosen = rng.choice(made.n_images, 8, replace=made.n_images < 8).tolist()
        top = group(chosen, heats, [float(8 * p) for p in peaks], name="top", words=GROUPS["top"])
        latents.append({"id": int(others[row]), "low": 0.0, "high": 8.0, "groups": [top]})
    _write_files(dpath, "compare", "latents", latents)
