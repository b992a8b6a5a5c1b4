"""Figures of latents, from made-up galleries (gallery_data.py) whose heat is known to the pixel."""

import itertools
import json
import pathlib
import xml.etree.ElementTree as ET

import gallery_data
import inprocess
import matplotlib.figure
import numpy as np
import PIL.Image
import pytest

from saev import errors
from saev.data import pictures
from saev.formats import gallery as galleries
from saev.formats import scripts
from saev.report import figures
from saev.visuals import config, figure

GREY = 128
HOT = np.rint(GREY + 0.7 * (np.array([255, 0, 128]) - GREY))
MAGIC = {".pdf": b"%PDF-", ".svg": b"<?xml", ".png": b"\x89PNG"}


def write(dpath: pathlib.Path, side: int = 16, n_images: int = 3, low: float = 0.0) -> galleries.Gallery:
    """Grey pictures. Row r (latent 2 r + 1) has heat 255 on patch 7 r + i of its i-th image. Row 2 is dead."""
    made = gallery_data.MadeUp(
        *(4, 8, side, 0), traits=False, compare=False, picture=(GREY, GREY, GREY), n_stored=0
    )
    gallery_data.write(dpath, made)
    (dpath / "latents.csv").write_text("")
    latents = []
    for row in range(4):
        n = 0 if row == 2 else n_images
        heats = [{7 * row + i: 255} for i in range(n)]
        top = gallery_data.group([*range(n)], heats, [5.0] * n, name="top", words="")
        latents.append({"low": low, "high": 5.0, "groups": [top] if n else []})
    scripts.write(dpath, "latents/000", {"latents": latents})
    return galleries.Gallery(dpath, "Remedy.")


def edit(dpath: pathlib.Path, name: str, key: str, /, **changes: object) -> None:
    """Changes fields of a part of a data file."""
    value = scripts.read(dpath, name, "")
    value[key] |= changes
    scripts.write(dpath, name, value)


def pixels(drawn: matplotlib.figure.Figure, tmp_path: pathlib.Path) -> np.ndarray:
    figures.save(drawn, tmp_path / "x.png")
    with PIL.Image.open(tmp_path / "x.png") as img:
        return np.asarray(img.convert("RGB"), np.int64)


# ---- pixels ----


@pytest.mark.parametrize(("side", "n_images"), [(16, 1), (16, 3), (7, 6), (27, 8), (37, 2)])
def test_a_patch_that_fires_paints_exactly_its_rectangle(
    side: int, n_images: int, tmp_path: pathlib.Path
) -> None:
    gallery = write(tmp_path / "g", side, n_images)
    img_HW3 = pixels(figure.draw(gallery, (3,), 8), tmp_path)
    is_hot_HW = (np.abs(img_HW3 - HOT) <= 1).all(axis=2)
    is_picture_HW = (img_HW3 == GREY).all(axis=2) | is_hot_HW
    top = np.flatnonzero(is_picture_HW.mean(axis=1) > 0.15)[0]
    lefts = np.flatnonzero(np.diff(is_picture_HW[top].astype(int), prepend=0) == 1)
    ends = np.flatnonzero(np.diff(is_picture_HW[top].astype(int), append=0) == -1)
    assert len(lefts) == n_images and len({*(ends - lefts)}) == 1
    patch, rest = divmod(int(ends[0] - lefts[0] + 1), side)
    assert rest == 0, "patches are whole pixels"
    want_HW = np.zeros_like(is_hot_HW)
    for i, left in enumerate(lefts):
        row, column = divmod(7 + i, side)
        y, x = top + row * patch, left + column * patch
        want_HW[y : y + patch, x : x + patch] = True
        picture = img_HW3[top : top + side * patch, left : left + side * patch]
        want = np.where(want_HW[top : top + side * patch, left : left + side * patch, None], HOT, GREY)
        np.testing.assert_allclose(picture, want, atol=1)


def test_the_legend_is_painted_as_pictures_are(tmp_path: pathlib.Path) -> None:
    legend_HW3 = np.asarray(figure._legend(300, 36), np.float64)
    for y, grey in ((0, 0x20), (17, 0x80), (35, 0xE0)):
        for x, heat in ((0, 0.0), (100, 100 / 299), (299, 1.0)):
            want = grey + 0.7 * heat * (np.array(pictures.HUE) - grey)
            np.testing.assert_allclose(legend_HW3[y, x], want, atol=1.5)
    shown = pixels(figure.draw(write(tmp_path / "g"), (3,), 3), tmp_path)
    strip = np.asarray(figure._legend(*figure_legend_size(shown.shape[1])), np.int64)
    rows = [y for y in range(len(shown)) if (shown[y, : strip.shape[1]] == strip[0]).all()]
    assert rows and (shown[rows[0] : rows[0] + len(strip), : strip.shape[1]] == strip).all()


def figure_legend_size(width: int) -> tuple[int, int]:
    """Pixels of the legend in a figure of one column."""
    dpi = width / figures.COLUMN
    return round(figure.LEGEND * dpi), round(figure.LINE * dpi)


@pytest.mark.parametrize(
    ("n_images", "width"), [(1, figures.COLUMN), (5, figures.COLUMN), (6, figures.PAGE), (8, figures.PAGE)]
)
def test_it_has_the_width_of_a_paper(n_images: int, width: float, tmp_path: pathlib.Path) -> None:
    """Also with the longest words."""
    write(tmp_path, n_images=n_images, low=-0.5)
    edit(tmp_path, "stats", "scorer", n=40_000, noun="prototype", fires="A patch fires the prototype " * 9)
    edit(tmp_path, "stats", "columns", id=scripts.packed([32_768, 1, 2, 3], "u4"))
    edit(tmp_path, "stats", "columns", freq=scripts.packed([1.234e-5, 1, 1, 1], "f4"))
    edit(tmp_path, "stats", "columns", mean=scripts.packed([-1.234e-5, 1, 1, 1], "f4"))
    edit(tmp_path, "stats", "columns", max=scripts.packed([-1.234e-5, 1, 1, 1], "f4"))
    drawn = figure.draw(galleries.Gallery(tmp_path, ""), (32_768, 1), 8)
    assert drawn.get_size_inches()[0] == pytest.approx(width, abs=0.02)
    assert drawn.dpi >= figure.LEAST_DPI - 1
    inside = drawn.bbox
    found = [text.get_window_extent() for text in drawn.texts]
    for box in found:
        assert box.x0 >= -1 and box.x1 <= inside.x1 and box.y0 >= 0 and box.y1 <= inside.y1
    found += [axes.get_window_extent() for axes in drawn.axes]
    assert [(a, b) for a, b in itertools.combinations(found, 2) if a.overlaps(b)] == []


# ---- words ----


def texts(drawn: matplotlib.figure.Figure) -> list[str]:
    return [text.get_text() for text in drawn.texts]


def test_labels_and_caption(tmp_path: pathlib.Path) -> None:
    gallery = write(tmp_path)
    edit(tmp_path, "stats", "columns", freq=scripts.packed([0.00423, 0.5, 0, 0.0], "f4"))
    edit(tmp_path, "stats", "columns", mean=scripts.packed([1.25, 2, np.nan, np.nan], "f4"))
    edit(tmp_path, "stats", "columns", max=scripts.packed([5.0, 8, 0, 3], "f4"))
    edit(tmp_path, "stats", "source", data="CUB")
    gallery = galleries.Gallery(tmp_path, "")
    first, *_ = texts(drawn := figure.draw(gallery, (1, 7, 1), 2))
    assert first == "latent 1: fires on 0.423% of patches, mean 1.25, largest 5"
    assert texts(drawn)[1] == "latent 7: fires on 0% of patches, largest 3", "each latent once"
    legend, *caption = texts(drawn)[2:]
    assert legend == "heat: 0 to the latent's largest value"
    assert " ".join(caption) == (
        "Images with the largest values, from mini-CUB, TopK 16, seed 0 (sae-topk-16). dinov2_vits14, layer 8; CUB: 8 "
        "images of 256 patches. A latent fires on a patch where its value is above 0. Mean: over the patches that it "
        "fires on. Largest: on any patch."
    )
    edit(tmp_path, "stats", "source", padded=True)
    assert "8 images of at most 256 patches." in " ".join(
        texts(figure.draw(galleries.Gallery(tmp_path, ""), (1,), 2))
    )


def test_heat_of_scores_begins_at_their_mean(tmp_path: pathlib.Path) -> None:
    write(tmp_path, low=-0.25)
    edit(tmp_path, "stats", "scorer", noun="prototype")
    assert "heat: mean score to the prototype's largest value" in texts(
        figure.draw(galleries.Gallery(tmp_path, ""), (1,), 2)
    )


def test_names_that_would_be_formulas(tmp_path: pathlib.Path) -> None:
    write(tmp_path)
    edit(tmp_path, "stats", "scorer", name="$\\frac{$", fires="</text> & $x$.")
    figures.save(figure.draw(galleries.Gallery(tmp_path, ""), (1,), 2), tmp_path / "x.svg")
    found = "".join(ET.parse(tmp_path / "x.svg").getroot().itertext())
    assert "$\\frac{$" in found and "</text> & $x$." in found


# ---- the command ----


def run(*args: object) -> inprocess.Done:
    return inprocess.run("visuals.py", *args)


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_command(suffix: str, tmp_path: pathlib.Path) -> None:
    write(tmp_path / "g")
    before = {f: f.read_bytes() for f in (tmp_path / "g").rglob("*") if f.is_file()}
    out = tmp_path / "new" / f"x{suffix}"
    done = run("--figure", 3, 1, "--out", out, "--dump-to", tmp_path / "g")
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert out.read_bytes().startswith(MAGIC[suffix])
    assert {f: f.read_bytes() for f in (tmp_path / "g").rglob("*") if f.is_file()} == before
    assert [f.name for f in out.parent.iterdir()] == [out.name]


def test_what_is_refused(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "g")
    (tmp_path / "other.pt").write_text("another scorer")
    cases = {
        ("--figure", 9): "--figure 9: the scorer has latents 0 to 8.",
        ("--figure", 5): "--figure 5: this latent never fires on the images, so there is nothing to draw.",
        (
            "--figure",
            4,
        ): f"--figure 4: not in the gallery {tmp_path}/g, which shows all that fire. Make another one",
        ("--figure", 1, "--out", "x.jpg"): "--out x.jpg: a figure's file must end in .pdf, .svg or .png.",
        ("--out", "x.pdf"): "--out x.pdf: only with --figure",
        (
            "--figure",
            1,
            "--ckpt",
            tmp_path / "other.pt",
        ): f"{tmp_path}/other.pt: the gallery {tmp_path}/g shows another",
        ("--figure", 1, "--ckpt", tmp_path / "none.pt"): "none.pt: No such file",
        ("--figure", 1, "--dump-to", tmp_path / "h"): f"--dump-to {tmp_path}/h: no gallery. Pass the folder",
        ("--figure", 1, "scorer:units"): "scorer:units: the gallery",
        ("--figure", 1, "--data.shard-root", "x", "--data.layer", 7): "--data.layer 7: the gallery",
        ("--figure", *range(51)): "--figure names 51 latents. A figure holds at most 50.",
    }
    for args, want in cases.items():
        at = ("--dump-to", tmp_path / "g", "--out", tmp_path / "x.png")
        flags = at[:2] if "--out" in args else at
        done = run(*flags, *args)
        assert (done.returncode, done.stdout) == (2, "") and want in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "x.png").exists()


def test_a_dead_latent_of_a_gallery_of_all_that_fire(tmp_path: pathlib.Path) -> None:
    write(tmp_path)
    edit(tmp_path, "stats", "shown", filters="all latents that fire")
    with pytest.raises(errors.UserError, match="^--figure 4: this latent never fires"):
        figure.draw(galleries.Gallery(tmp_path, ""), (1, 4), 2)


@pytest.mark.parametrize("kind", ["not base64", "not a picture", "missing", "another place"])
def test_damaged_pictures(kind: str, tmp_path: pathlib.Path) -> None:
    gallery = write(tmp_path)
    fpath = tmp_path / "data" / "images" / "000.js"
    value = scripts.read(tmp_path, "images/000", "")
    if kind == "missing":
        fpath.unlink()
    elif kind == "another place":
        edit(tmp_path, "stats", "files", n_images=2)
        gallery = galleries.Gallery(tmp_path, "Remedy.")
    else:
        src = {"not base64": "é", "not a picture": "data:image/webp;base64,AAAA"}[kind]
        scripts.write(
            tmp_path, "images/000", {"images": [{**image, "src": src} for image in value["images"]]}
        )
    with pytest.raises(errors.UserError, match=r"data/(images/000|stats)\.js: .*Remedy\.$") as caught:
        figure.draw(gallery, (1,), 3)
    assert "\n" not in str(caught.value)


def test_a_figure_that_fails_leaves_the_older_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "g")
    (tmp_path / "x.pdf").write_text("older")
    cfg = config.Visuals(figure=(1,), out=str(tmp_path / "x.pdf"), dump_to=str(tmp_path / "g"))

    def fails(self: matplotlib.figure.Figure, fd: object, **_: object) -> None:
        fd.write(b"%PDF-half")
        raise OSError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", fails)
        with pytest.raises(OSError, match="disk on fire"):
            figure.write(cfg)
    assert (tmp_path / "x.pdf").read_text() == "older"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["g", "x.pdf"]
    figure.write(cfg)
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF-")


def test_no_flags_are_needed_besides_the_gallery(tmp_path: pathlib.Path) -> None:
    """Neither shards, nor images, nor a checkpoint: a gallery that was copied to another machine."""
    write(tmp_path / "g")
    assert (
        json.loads(json.dumps(scripts.read(tmp_path / "g", "stats", "")["scorer"]))["ckpt"]
        == "checkpoints/a/sae.pt"
    )
    assert run("--figure", 1, "--out", tmp_path / "x.svg", "--dump-to", tmp_path / "g").returncode == 0
