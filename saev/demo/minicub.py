"""mini-CUB: procedural birds in CUB-200-2011's exact file layout.

Every attribute is visible in the drawing. A species favours one value of each attribute group, but each image
takes another value often enough that no attribute is a mere species detector.

Birds are drawn on a 512 x 512 canvas, facing right, then mirrored, turned, scaled and placed, and the picture
is halved (which smooths edges) to 256 x 256.
"""

import collections.abc
import contextlib
import dataclasses
import pathlib
import typing as tp

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter

from saev import helpers

CANVAS = 512
N_SPECIES = 20
P_SPECIES_VALUE = 0.6
"""Probability that an image has its species' value of a group. Otherwise the value is drawn uniformly."""
P_LEAF = 0.2
"""Probability that a leaf hides one part of the bird."""
P_TRAIN = 0.5

RGB = tuple[int, int, int]

PALETTE: dict[str, RGB] = {
    "black": (28, 26, 30),
    "white": (240, 240, 235),
    "grey": (140, 142, 148),
    "brown": (122, 78, 44),
    "red": (200, 36, 32),
    "orange": (238, 130, 24),
    "yellow": (240, 208, 40),
    "green": (60, 150, 62),
    "blue": (40, 92, 200),
    "purple": (128, 54, 160),
}

GROUPS: dict[str, tuple[str, ...]] = {
    "has_wing_color": ("blue", "red", "yellow", "green", "black", "white"),
    "has_wing_pattern": ("solid", "striped", "spotted"),
    "has_breast_color": ("red", "yellow", "white", "brown", "purple"),
    "has_breast_pattern": ("solid", "striped", "spotted"),
    "has_crown_color": ("black", "red", "white", "blue", "orange"),
    "has_crest": ("yes", "no"),
    "has_bill_shape": ("hooked", "long_needle", "cone"),
    "has_bill_color": ("black", "orange", "yellow"),
    "has_tail_shape": ("forked", "fan", "pointed"),
    "has_size": ("small", "medium", "large"),
    "has_perch": ("branch", "ground", "water"),
}

ATTRIBUTES = [f"{group}::{value}" for group, values in GROUPS.items() for value in values if value != "no"]
"""In the order of attribute ids, from 1."""

SPECIES = [
    "Azure_Finch",
    "Banded_Tern",
    "Cinder_Wren",
    "Dusky_Heron",
    "Ember_Tanager",
    "Fern_Warbler",
    "Gilded_Oriole",
    "Hooded_Kite",
    "Ivory_Plover",
    "Jade_Jay",
    "Kelp_Gull",
    "Lemon_Siskin",
    "Marsh_Rail",
    "Night_Shrike",
    "Ochre_Thrush",
    "Pied_Swallow",
    "Quill_Cuckoo",
    "Ruby_Grosbeak",
    "Slate_Petrel",
    "Thorn_Vireo",
]

SCALES = {"small": (0.42, 0.5), "medium": (0.6, 0.7), "large": (0.84, 0.96)}

TAILS = {
    "forked": [(175, 240), (40, 205), (118, 268), (40, 330), (175, 290)],
    "fan": [(175, 245), (62, 190), (36, 235), (34, 295), (62, 335), (175, 290)],
    "pointed": [(175, 245), (14, 292), (175, 290)],
}
BILLS = {
    "hooked": [(402, 168), (446, 170), (466, 186), (464, 214), (450, 200), (404, 206)],
    "long_needle": [(402, 180), (506, 193), (402, 199)],
    "cone": [(398, 160), (454, 190), (398, 216)],
}
WING = [(306, 226), (262, 198), (204, 204), (150, 244), (96, 296), (176, 300), (256, 286), (300, 258)]
LEAVES = {
    "wing": (200, 250),
    "breast": (320, 290),
    "crown": (365, 150),
    "tail": (90, 268),
    "bill": (440, 190),
}
"""Parts that a leaf can hide, and their positions."""

PARTS = (
    "background",
    "body",
    "head",
    "breast",
    "wing",
    "crest",
    "crown",
    "tail",
    "bill",
    "eye",
    "legs",
    "leaf",
)
"""Classes of the part masks, by id. `background` includes the perch."""
ID = {name: i for i, name in enumerate(PARTS)}

Traits = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Bird:
    """The content of one image."""

    species: int
    traits: Traits
    hidden: str | None
    """The part behind a leaf."""


def draw(
    images: pathlib.Path | None, *, n_imgs: int = 640, seed: int = 0, parts: pathlib.Path | None = None
) -> None:
    """Draws mini-CUB into `images` (the CUB_200_2011 folder), and its part masks into `parts`, if given.

    `parts` gets an index PNG for each image, below the image's folder, and names.txt with the ids of PARTS.
    Both folders appear whole or not at all; one that exists is complete and is left alone. The same seed and
    number give the same files.
    """
    images = None if images and images.exists() else images
    parts = None if parts and parts.exists() else parts
    if not images and not parts:
        return
    rng, birds = _birds(n_imgs, seed)
    paths = [_path(bird, i) for i, bird in enumerate(birds)]
    with contextlib.ExitStack() as stack:
        to_images = stack.enter_context(helpers.atomic_folder(images)) if images else None
        to_parts = stack.enter_context(helpers.atomic_folder(parts)) if parts else None
        for i, (path, bird) in enumerate(zip(paths, birds, strict=True)):
            img, mask = picture(bird, np.random.default_rng((seed, i)))
            if to_images:
                img.save(_below(to_images / "images" / path), quality=90)
            if to_parts:
                mask.save(_below(to_parts / path).with_suffix(".png"))
        if to_images:
            # Ids follow a random order of the images, not the species as in CUB. Labels shifted by one image
            # then belong to an unrelated bird, so a misalignment shows.
            order = rng.permutation(n_imgs)
            _write_lists(to_images, [paths[i] for i in order], [birds[i] for i in order], rng)
            _write_attributes(to_images, [birds[i] for i in order], rng)
        if to_parts:
            _write_lines(to_parts / "names.txt", (f"{i} {name}" for i, name in enumerate(PARTS)))


def _below(fpath: pathlib.Path) -> pathlib.Path:
    """The same path, after its folder was made."""
    fpath.parent.mkdir(parents=True, exist_ok=True)
    return fpath


def _birds(n_imgs: int, seed: int) -> tuple[np.random.Generator, list[Bird]]:
    """The content of the images, in the order of their file names, and the generator for what follows."""
    rng = np.random.default_rng((seed, 0xB12D))
    profiles = [{g: str(rng.choice(v)) for g, v in GROUPS.items()} for _ in range(N_SPECIES)]
    return rng, [_bird(rng, i % N_SPECIES, profiles[i % N_SPECIES]) for i in range(n_imgs)]


def _bird(rng: np.random.Generator, species: int, profile: Traits) -> Bird:
    traits = {
        g: profile[g] if rng.random() < P_SPECIES_VALUE else str(rng.choice(v)) for g, v in GROUPS.items()
    }
    hidden = str(rng.choice(list(LEAVES))) if rng.random() < P_LEAF else None
    return Bird(species, traits, hidden)


def _path(bird: Bird, i: int) -> str:
    name = SPECIES[bird.species]
    return f"{bird.species + 1:03}.{name}/{name}_{i // N_SPECIES + 1:04}_{i:06}.jpg"


# ---- text files ----


def _write_lines(fpath: pathlib.Path, lines: collections.abc.Iterable[str]) -> None:
    fpath.parent.mkdir(parents=True, exist_ok=True)
    fpath.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_lists(root: pathlib.Path, paths: list[str], birds: list[Bird], rng: np.random.Generator) -> None:
    is_train_N = (rng.random(len(paths)) < P_TRAIN).astype(int)
    _write_lines(root / "images.txt", (f"{i} {p}" for i, p in enumerate(paths, 1)))
    _write_lines(root / "classes.txt", (f"{i} {i:03}.{name}" for i, name in enumerate(SPECIES, 1)))
    classes = (f"{i} {b.species + 1}" for i, b in enumerate(birds, 1))
    _write_lines(root / "image_class_labels.txt", classes)
    _write_lines(root / "train_test_split.txt", (f"{i} {t}" for i, t in enumerate(is_train_N, 1)))


def _write_attributes(root: pathlib.Path, birds: list[Bird], rng: np.random.Generator) -> None:
    dpath = root / "attributes"
    _write_lines(dpath / "attributes.txt", (f"{i} {name}" for i, name in enumerate(ATTRIBUTES, 1)))
    certainties = ["1 not visible", "2 guessing", "3 probably", "4 definitely"]
    _write_lines(dpath / "certainties.txt", certainties)
    _write_lines(dpath / "image_attribute_labels.txt", _label_lines(birds, rng))
    present_NT = np.array([[_present(b, name) for name in ATTRIBUTES] for b in birds])
    species_N = np.array([b.species for b in birds])
    shares = (100 * present_NT[species_N == s].mean(axis=0) for s in range(N_SPECIES))
    rows = (" ".join(f"{v:.6g}" for v in row) for row in shares)
    _write_lines(dpath / "class_attribute_labels_continuous.txt", rows)


def _present(bird: Bird, attribute: str) -> int:
    group, _, value = attribute.partition("::")
    return int(bird.traits[group] == value)


def _certainty(bird: Bird, attribute: str, rng: np.random.Generator) -> int:
    """Draws an annotator's certainty. Parts behind the leaf (a crest is on the crown) are guessed at best."""
    part = "crown" if attribute.startswith("has_crest") else attribute.split("_")[1]
    if part == bird.hidden:
        return int(rng.integers(1, 3))
    return int(rng.integers(3, 5))


def _label_lines(birds: list[Bird], rng: np.random.Generator) -> collections.abc.Iterator[str]:
    """Yields lines of 5 fields, a few of 6 or 7, as in the real file. Only the first four have a meaning."""
    for i, bird in enumerate(birds, 1):
        for t, attribute in enumerate(ATTRIBUTES, 1):
            extra = " 0" * int(rng.integers(1, 3)) if rng.random() < 0.003 else ""
            start = f"{i} {t} {_present(bird, attribute)} {_certainty(bird, attribute, rng)}"
            yield f"{start}{extra} {rng.exponential(4):.3f}"


# ---- pictures ----


def picture(bird: Bird, rng: np.random.Generator) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """Draws the 256 x 256 picture of a bird, and its mask, whose pixels are ids of PARTS."""
    scale = rng.uniform(*SCALES[bird.traits["has_size"]])
    reach = 0.5 * CANVAS * (1 - scale)
    centre = CANVAS / 2 + rng.uniform(-0.8, 0.8, 2) * reach
    feet_y = int(centre[1] + scale * 134)
    img = _background(bird.traits["has_perch"], feet_y, scale, rng)
    layer, parts = _plumage(bird, rng)
    angle = rng.uniform(-9, 9)
    layer, parts = layer.rotate(angle, PIL.Image.Resampling.BILINEAR), parts.rotate(angle)
    if rng.random() < 0.5:
        layer, parts = (x.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) for x in (layer, parts))
    side = int(CANVAS * scale)
    layer = layer.resize((side, side), PIL.Image.Resampling.BILINEAR)
    parts = parts.resize((side, side), PIL.Image.Resampling.NEAREST)
    x, y = (int(c - side / 2) for c in centre)
    img.paste(layer, (x, y), layer)
    mask = PIL.Image.new("L", (CANVAS, CANVAS))
    mask.paste(parts, (x, y))
    return _photograph(img, rng), mask.resize((CANVAS // 2, CANVAS // 2), PIL.Image.Resampling.NEAREST)


def _photograph(img: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """Halves the canvas; light, blur and grain."""
    img = img.resize((CANVAS // 2, CANVAS // 2), PIL.Image.Resampling.BOX)
    img = img.filter(PIL.ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))
    pixels = np.asarray(img, np.float32) * rng.uniform(0.82, 1.12) + rng.normal(0, 5, (*img.size, 1))
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _jitter(color: RGB, rng: np.random.Generator, amount: float = 14.0) -> RGB:
    """Varies a colour within the range of its name."""
    r, g, b = (int(np.clip(c + d, 0, 255)) for c, d in zip(color, rng.normal(0, amount, 3), strict=True))
    return r, g, b


def _background(perch: str, feet_y: int, scale: float, rng: np.random.Generator) -> PIL.Image.Image:
    """Draws sky or thicket, blurred blobs, and the bird's perch."""
    skies = [(176, 206, 232), (206, 214, 214), (150, 178, 128), (214, 196, 160), (120, 146, 118)]
    top, bottom = (np.array(_jitter(skies[rng.integers(len(skies))], rng)) for _ in range(2))
    ramp = np.linspace(0, 1, CANVAS)[:, None, None]
    pixels = np.broadcast_to(top * (1 - ramp) + bottom * ramp, (CANVAS, CANVAS, 3))
    img = PIL.Image.fromarray(pixels.astype(np.uint8))
    pen = PIL.ImageDraw.Draw(img)
    for _ in range(rng.integers(4, 16)):
        x, y, r = rng.uniform(0, CANVAS), rng.uniform(0, CANVAS), rng.uniform(20, 90)
        tone = [(86, 120, 70), (120, 140, 90), (150, 130, 96), (186, 200, 190)][rng.integers(4)]
        pen.ellipse((x - r, y - 0.6 * r, x + r, y + 0.6 * r), fill=_jitter(tone, rng, 20.0))
    img = img.filter(PIL.ImageFilter.BoxBlur(9))
    {"branch": _branch, "ground": _ground, "water": _water}[perch](
        PIL.ImageDraw.Draw(img), feet_y, scale, rng
    )
    return img


def _branch(pen: PIL.ImageDraw.ImageDraw, y: int, scale: float, rng: np.random.Generator) -> None:
    slope, width = rng.uniform(-20, 20), int(30 * scale)
    bark = _jitter((92, 66, 44), rng)
    pen.line([(0, y - slope), (CANVAS, y + slope)], fill=bark, width=width)
    for _ in range(4):
        x, dy = rng.uniform(0, CANVAS), rng.choice([-1, 1]) * rng.uniform(30, 90)
        pen.line([(x, y), (x + rng.uniform(-60, 60), y + dy)], fill=bark, width=max(2, width // 3))


def _ground(pen: PIL.ImageDraw.ImageDraw, y: int, scale: float, rng: np.random.Generator) -> None:
    pen.rectangle((0, y - int(8 * scale), CANVAS, CANVAS), fill=_jitter((168, 138, 92), rng))
    for _ in range(60):
        x, at, r = rng.uniform(0, CANVAS), rng.uniform(y, CANVAS + 1), rng.uniform(2, 9)
        pen.ellipse((x - r, at - r / 2, x + r, at + r / 2), fill=_jitter((130, 106, 76), rng, 22.0))


def _water(pen: PIL.ImageDraw.ImageDraw, y: int, scale: float, rng: np.random.Generator) -> None:
    pen.rectangle((0, y - int(40 * scale), CANVAS, CANVAS), fill=_jitter((70, 128, 158), rng))
    for at in range(y - int(34 * scale), CANVAS, 16):
        x = rng.uniform(-100, CANVAS)
        pen.line([(x, at), (x + rng.uniform(80, 260), at)], fill=_jitter((150, 192, 208), rng), width=4)


class _Pen:
    """Draws on a picture and, with the id of a part, on its mask."""

    def __init__(self, img: PIL.Image.Image, parts: PIL.Image.Image):
        self.img, self.parts = img, parts
        self.pens = PIL.ImageDraw.Draw(img), PIL.ImageDraw.Draw(parts)

    def draw(
        self, shape: str, part: str, *args: tp.Any, fill: tp.Any, outline: RGB | None = None, **given: tp.Any
    ) -> None:
        """Draws a shape (a method of Pillow's pens)."""
        on_img, on_parts = (getattr(pen, shape) for pen in self.pens)
        on_img(*args, fill=fill, **given | ({"outline": outline} if outline else {}))
        on_parts(*args, fill=ID[part], **given)

    def cover(
        self, part: str, mask: PIL.Image.Image, color: RGB, pattern: str, rng: np.random.Generator
    ) -> None:
        _patch(self.img, mask, color, pattern, rng)
        self.parts.paste(ID[part], (0, 0, *mask.size), mask)


def _plumage(bird: Bird, rng: np.random.Generator) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """Draws the bird, facing right, on a transparent canvas, and its parts."""
    traits = bird.traits
    colors = {g: _jitter(PALETTE[traits[g]], rng) for g in traits if g.endswith("_color")}
    plain = _jitter([PALETTE["grey"], (160, 140, 112), (104, 96, 92)][rng.integers(3)], rng)
    dark = tuple(int(0.6 * c) for c in plain)
    img, parts = PIL.Image.new("RGBA", (CANVAS, CANVAS)), PIL.Image.new("L", (CANVAS, CANVAS))
    pen = _Pen(img, parts)
    if traits["has_perch"] != "water":
        for x in (258, 292):
            pen.draw("line", "legs", [(x, 330), (x + 4, 388), (x + 22, 390)], fill=(110, 80, 50), width=8)
    pen.draw("polygon", "tail", TAILS[traits["has_tail_shape"]], fill=dark)
    pen.draw("ellipse", "body", (150, 188, 376, 346), fill=plain)
    pen.draw("ellipse", "head", (312, 132, 418, 238), fill=plain)
    breast = _mask(lambda m: m.ellipse((246, 214, 380, 348), fill=255))
    pen.cover("breast", breast, colors["has_breast_color"], traits["has_breast_pattern"], rng)
    wing = _mask(lambda m: m.polygon(WING, fill=255))
    pen.cover("wing", wing, colors["has_wing_color"], traits["has_wing_pattern"], rng)
    if traits["has_crest"] == "yes":
        spikes = [(330, 150), (296, 84), (344, 120), (336, 66), (370, 116), (384, 72), (398, 146)]
        pen.draw("polygon", "crest", spikes, fill=colors["has_crown_color"])
    pen.draw("chord", "crown", (312, 130, 418, 238), 170, 10, fill=colors["has_crown_color"])
    bill = BILLS[traits["has_bill_shape"]]
    pen.draw("polygon", "bill", bill, fill=colors["has_bill_color"], outline=(60, 50, 44))
    pen.draw("ellipse", "eye", (374, 178, 396, 200), fill=(245, 245, 240))
    pen.draw("ellipse", "eye", (378, 182, 392, 196), fill=(10, 10, 10))
    if bird.hidden is not None:
        _leaf(pen, LEAVES[bird.hidden], rng)
    return img, parts


def _mask(paint: collections.abc.Callable[[PIL.ImageDraw.ImageDraw], None]) -> PIL.Image.Image:
    mask = PIL.Image.new("L", (CANVAS, CANVAS))
    paint(PIL.ImageDraw.Draw(mask))
    return mask


def _patch(
    img: PIL.Image.Image, mask: PIL.Image.Image, color: RGB, pattern: str, rng: np.random.Generator
) -> None:
    """Fills the masked part with a colour and, if patterned, with marks that contrast."""
    fill = PIL.Image.new("RGBA", img.size, color)
    pen = PIL.ImageDraw.Draw(fill)
    marks = (250, 248, 240) if sum(color) < 330 else (40, 34, 30)
    if pattern == "striped":
        for x in range(-40, CANVAS + 40, 26):
            pen.line([(x, 130), (x + 70, 400)], fill=marks, width=9)
    if pattern == "spotted":
        for x in range(70, CANVAS, 30):
            for y in range(170, 380, 28):
                dx, dy = rng.uniform(-4, 4, 2) + ((y // 28) % 2) * 15
                pen.ellipse((x + dx, y + dy, x + dx + 14, y + dy + 14), fill=marks)
    img.paste(fill, (0, 0), mask)


def _leaf(pen: _Pen, at: tuple[int, int], rng: np.random.Generator) -> None:
    x, y = at
    tone = _jitter((84, 128, 58), rng)
    outline = [(x - 92, y + 10), (x - 30, y - 62), (x + 92, y - 20), (x + 34, y + 64)]
    pen.draw("polygon", "leaf", outline, fill=tone)
    pen.draw("line", "leaf", [(x - 92, y + 10), (x + 92, y - 20)], fill=(60, 96, 44), width=5)
