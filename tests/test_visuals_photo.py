"""Heat on one photo, a gallery's data frames, and docs/notebook.md as it stands. P patches, D d_vit, S latents."""

import csv
import pathlib
import re

import gallery_files
import numpy as np
import PIL.Image
import polars as pl
import pytest
import sklearn.datasets
import torch

import saev
from saev import errors, nn, scorers
from saev.data import activations, config, dump, pictures, pixels, vits
from saev.demo import weights
from saev.formats import scripts
from saev.nn import config as nn_config
from saev.scorers import config as scorers_config
from saev.visuals import collect, photo
from saev.visuals import config as visuals_config

ROOT = pathlib.Path(__file__).parent.parent
DOC = (ROOT / "docs" / "notebook.md").read_text()
ROWS, COLUMNS, PATCH = 2, 4, 16
HUE = np.array([255, 0, 128])


def code(part: str) -> str:
    """The code of a section of the page."""
    (section,) = re.findall(rf"^## {part}\n(.*?)(?=^## |\Z)", DOC, re.M | re.S)
    return "\n".join(re.findall(r"^    (.*)$", section, re.M))


# ---- one photo, a small ViT ----


@pytest.fixture(scope="module")
def vit() -> vits.Vit:
    cfg = config.Vit("timm", "vit_tiny_patch16_224", "random", img_size=(ROWS * PATCH, COLUMNS * PATCH))
    return vits.load(cfg)


@pytest.fixture(scope="module")
def grey() -> PIL.Image.Image:
    """Of the ViT's aspect ratio, with one white corner."""
    out = np.full((ROWS * PATCH, COLUMNS * PATCH, 3), 100, np.uint8)
    out[PATCH:, :PATCH] = 255
    return PIL.Image.fromarray(out)


def sae_of(vit: vits.Vit, acts_PD: torch.Tensor, layer: int) -> nn.SparseAutoencoder:
    """Latent p fires on patch p alone: its pre-activation is a patch's cosine with it, less a threshold."""
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=vit.d_vit, d_sae=len(acts_PD) + 1))
    x_PD = acts_PD - acts_PD.mean(dim=0)
    # W x is the identity on the patches, by their pseudo-inverse; the last latent is dead
    inverse_DP = torch.linalg.pinv(x_PD)
    with torch.no_grad():
        sae.scale.fill_(1)
        sae.b_dec.copy_(acts_PD.mean(dim=0))
        sae.W_enc.copy_(torch.cat([inverse_DP, torch.zeros(vit.d_vit, 1)], dim=1))
        sae.b_enc.fill_(-0.5)
    sae.activations = vit.space(layer).describe()
    return sae.eval().requires_grad_(False)


def tile(sheet: PIL.Image.Image, i: int, side: tuple[int, int], n: int) -> np.ndarray:
    """Pixels of the i-th of n pictures; `side` is its (height, width)."""
    n_columns = min(n, photo.COLUMNS)
    row, column = divmod(i, n_columns)
    top = row * (side[0] + photo.LINE + photo.GAP) + photo.LINE
    left = column * (sheet.width + photo.GAP) // n_columns  # captions may be wider
    return np.asarray(sheet, np.float64)[top : top + side[0], left : left + side[1]]


def test_captions_wider_than_a_picture_do_not_overlap() -> None:
    """The second picture begins where the longest caption has ended, and its place holds no letters of the first."""
    tiles = [
        ("latent 123456: 7.89", PIL.Image.new("RGB", (16, 40), "green")),
        ("", PIL.Image.new("RGB", (16, 40))),
    ]
    sheet = np.asarray(photo._sheet(tiles))
    left = int(np.flatnonzero((sheet[photo.LINE] == 0).all(axis=1))[0])
    assert (sheet[: photo.LINE, :left] < 100).any() and (sheet[: photo.LINE, left - photo.GAP :] == 255).all()


def test_a_latent_paints_its_patches_and_nothing_else(vit: vits.Vit, grey: PIL.Image.Image) -> None:
    acts_PD = vit.patches(grey, -3)
    sae = sae_of(vit, acts_PD, -3)
    f_PS = sae.encode(acts_PD).numpy()
    fires_PP = f_PS[:, :-1] > 0.1
    assert np.array_equal(fires_PP, np.eye(ROWS * COLUMNS, dtype=bool)) and (f_PS[:, -1] == 0).all()
    sheet = saev.visuals.show(sae, grey, vit, latents=[5, 0, ROWS * COLUMNS], opacity=0.5)
    side, seen = (ROWS * PATCH, COLUMNS * PATCH), np.asarray(vit.transform.geometry(grey))
    assert sheet.width >= 4 * (side[1] + photo.GAP) - photo.GAP
    np.testing.assert_array_equal(tile(sheet, 0, side, 4), seen)  # untouched
    for i, latent in ((1, 5), (2, 0), (3, ROWS * COLUMNS)):
        heat_P = f_PS[:, latent] / max(f_PS[:, latent].max(), 1e-30)
        opacity_HW = 0.5 * heat_P.reshape(ROWS, COLUMNS).repeat(PATCH, 0).repeat(PATCH, 1)[..., None]
        want = seen * (1 - opacity_HW) + HUE * opacity_HW
        np.testing.assert_allclose(tile(sheet, i, side, 4), want, atol=1.5)
    # without names: those that fire, the largest first
    sheet = saev.visuals.show(sae, grey, vit, n=100)
    assert sheet.height == 2 * (side[0] + photo.LINE + photo.GAP) - photo.GAP  # 9 pictures, 5 in a row
    first = int(f_PS.max(axis=0).argmax())
    changed = np.abs(tile(sheet, 1, side, 9) - tile(sheet, 0, side, 9)).max(axis=2) > 20
    (rows, columns) = np.nonzero(changed)
    assert {*(rows // PATCH * COLUMNS + columns // PATCH).tolist()} == {first} and changed.sum() == PATCH**2


def test_a_photo_from_disk_is_what_a_dump_sees(vit: vits.Vit, tmp_path: pathlib.Path) -> None:
    """Another aspect ratio than the input; with an alpha channel and decoded by the caller too."""
    pixels_HW3 = np.random.default_rng(0).integers(0, 255, (50, 90, 3), np.uint8)
    PIL.Image.fromarray(pixels_HW3).save(tmp_path / "x.png")
    acts_PD = vit.patches(tmp_path / "x.png", 4)
    want = vit(vit.transform(pixels.open_rgb(tmp_path / "x.png"))[None], (4,))[0, 0, 1:]
    assert torch.equal(acts_PD, want) and not acts_PD.requires_grad and not acts_PD.is_inference()
    with_alpha = PIL.Image.fromarray(pixels_HW3).convert("RGBA")
    assert torch.equal(vit.patches(with_alpha, 4), acts_PD)


def test_prototypes_are_shown_above_their_mean(vit: vits.Vit, grey: PIL.Image.Image) -> None:
    acts_PD = vit.patches(grey, 2)
    scorer = scorers.Prototypes.of(acts_PD[[3, 6]], acts_PD.mean(dim=0), "distance")
    with pytest.raises(errors.UserError, match="Pass layer="):
        photo.show(scorer, grey, vit)
    sheet = photo.show(scorer, grey, vit, layer=2, latents=[1])
    score_P = scorer(acts_PD)[:, 1].numpy()
    heat_P = ((score_P - score_P.mean()) / (score_P.max() - score_P.mean())).clip(0, 1)
    opacity_HW = 0.7 * heat_P.reshape(ROWS, COLUMNS).repeat(PATCH, 0).repeat(PATCH, 1)[..., None]
    want = np.asarray(vit.transform.geometry(grey)) * (1 - opacity_HW) + HUE * opacity_HW
    np.testing.assert_allclose(tile(sheet, 1, (ROWS * PATCH, COLUMNS * PATCH), 2), want, atol=1.5)


def test_bad_input_is_one_line(vit: vits.Vit, grey: PIL.Image.Image, tmp_path: pathlib.Path) -> None:
    sae = sae_of(vit, vit.patches(grey, 3), 3)
    bad = [
        (lambda: photo.show(sae, grey, vit, latents=[99]), "latents: 99 is not one of the scorer's 0 to 8"),
        (lambda: photo.show(sae, grey, vit, layer=4), "vit and layer: not in the space of the SAE: layer 4"),
        (lambda: photo.show(sae, tmp_path / "no.jpg", vit), "no.jpg: cannot be read"),
        (lambda: photo.show(sae, PIL.Image.new("F", (8, 8)), vit), "mode F has no defined white"),
        (lambda: photo.show(sae, grey, vit, layer=12), "the model has 12 blocks"),
        (lambda: saev.visuals.open(tmp_path), "stats.js: no such file"),
    ]
    for call, message in bad:
        with pytest.raises(errors.UserError, match=message) as err:
            call()
        assert "\n" not in str(err.value)


def test_the_hue_is_the_pages() -> None:
    script = (ROOT / "saev/visuals/page/heat.js").read_text()
    assert f"const HUE = {list(pictures.HUE)};" in script
    assert f'opacity: "{round(100 * pictures.OPACITY)}"' in script


# ---- the page of the docs, with real weights, photos and a gallery ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What the page reads, under its names: real DINOv2 weights, a dump of crops of two photos, an SAE, a gallery."""
    root = tmp_path_factory.mktemp("notebook")
    weights.unpack(root / "weights.safetensors")
    for name, photo_HW3 in zip("ab", sklearn.datasets.load_sample_images().images, strict=True):
        for i in range(4):
            fpath = root / "photos" / name / f"{i}.png"
            fpath.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(photo_HW3[:, 70 * i : 70 * i + 400]).save(fpath)
    PIL.Image.open(root / "photos" / "a" / "3.png").save(root / "photo.jpg", "PNG")  # the name says nothing
    dumped = dump.main(
        config.Dump(
            vit=config.Vit("dinov2", "dinov2_vits14", str(root / "weights.safetensors")),
            data=config.ImageFolder(str(root / "photos")),
            vit_layers=(7,),
            dump_to=str(root / "shards"),
            device="cpu",
        )
    )
    data = config.Shards(str(dumped), 7)
    acts = activations.Activations(data)
    sae = nn.SparseAutoencoder(nn_config.TopK(d_vit=acts.d_vit, d_sae=512, top_k=8))
    sae.initialize(torch.from_numpy(acts.read(0, acts.n_imgs)).flatten(0, 1))

    nn.save(sae, root / "checkpoints" / "RUN" / "sae.pt", acts.space.describe())
    scorers.save(scorers.fit(scorers_config.Random(), data, 8), root / "scorers" / "kmeans-8.bin")
    collect.main(
        visuals_config.Visuals(
            images=config.ImageFolder(str(root / "photos")),
            ckpt=str(root / "checkpoints" / "RUN" / "sae.pt"),
            data=data,
            dump_to=str(root / "gallery"),
            n_images=3,
            n_group=2,
            device="cpu",
        )
    )
    return root


@pytest.mark.slow
def test_one_photo_as_the_docs_have_it(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code("One photo"), names)
    (dumped,) = (folder / "shards").iterdir()
    acts = activations.Activations(config.Shards(str(dumped), 7))
    paths = [record.path for record in acts.records]
    want_PD = acts.read(paths.index("a/3.png"), paths.index("a/3.png") + 1)[0]
    np.testing.assert_allclose(names["acts_PD"].numpy(), want_PD, atol=1e-3)
    assert names["f_PS"].shape == (256, 512) and len(set(names["latents"])) == 4
    sheet = saev.visuals.show(names["sae"], "photo.jpg", names["vit"], latents=names["latents"])
    # the strongest patch of the first latent is painted most
    before, after = (tile(sheet, i, (224, 224), 5) for i in (0, 1))
    f_RC = names["f_PS"][:, names["latents"][0]].numpy().reshape(16, 16)
    opacity_RC = 0.7 * f_RC.repeat(14, 0).repeat(14, 1)[..., None] / f_RC.max()
    np.testing.assert_allclose(after, before * (1 - opacity_RC) + HUE * opacity_RC, atol=1.5)
    page = [line for line in code("One photo").splitlines() if line.strip() and "scorer" not in line]
    assert len(page) <= 10


@pytest.mark.slow
def test_frames_as_the_docs_have_them(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict = {"saev": saev}
    exec(code("A gallery's statistics"), names)
    found = names["gallery"]
    with (folder / "gallery" / "latents.csv").open() as fd:
        lines = list(csv.DictReader(fd))
    for column in ("latent", "freq", "mean", "max", "n_images"):
        want = [float(line[column]) for line in lines]
        np.testing.assert_allclose(found.latents[column].to_numpy(), want, rtol=1e-6)
    raw, images = gallery_files.latents(folder / "gallery"), gallery_files.images(folder / "gallery")
    ids = found.latents["latent"].to_list()
    want = {
        "neighbours": [(s, o, v) for s, one in zip(ids, raw, strict=True) for _, o, v in one["neighbours"]],
        "together": [(s, o, v) for s, one in zip(ids, raw, strict=True) for _, o, v in one["together"]],
        "classes": [
            (s, "ab"[g], n, v) for s, one in zip(ids, raw, strict=True) for g, n, v in one["classes"]
        ],
        "images": [
            (s, g["name"], v, images[i]["path"], images[i]["path"][0], images[i]["n"])
            for s, one in zip(ids, raw, strict=True)
            for g in one["groups"]
            for i, v in zip(g["image"].tolist(), g["value"].tolist(), strict=True)
        ],
    }
    for name, rows in want.items():
        assert getattr(found, name).rows() == rows and rows, name
        columns = re.findall(rf"gallery.{name} +# (.*)", DOC)[0].split(", ")
        assert getattr(found, name).columns == columns
    best = {s: one["classes"][0][0] if one["classes"] else None for s, one in zip(ids, raw, strict=True)}
    assert found.latents["class"].to_list() == ["ab"[g] if g is not None else None for g in best.values()]
    assert isinstance(names["rare"], pl.DataFrame)


@pytest.mark.slow
def test_each_latents_traits(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert saev.visuals.open(folder / "gallery").traits.shape == (0, 3)  # protoeval.py wrote none
    for name in ("stats", "paths"):
        value = scripts.read(folder / "gallery", name, "")
        scripts.write(tmp_path, name, value)
    ids = saev.visuals.open(tmp_path).latents["latent"].to_list()
    trait_CK = np.array([[0, 1, -1], [1, -1, -1], *[[-1] * 3] * (len(ids) - 2)], np.int32)
    ap_CK = np.where(trait_CK >= 0, 0.5 ** np.arange(1, 4), np.nan)
    columns = {"trait": scripts.packed(trait_CK, "i4"), "ap": scripts.packed(ap_CK, "f4")}
    value = {"traits": [{"name": "wing</script>", "group": ""}, {"name": "bill"}], "columns": columns}
    scripts.write(tmp_path, "traits", value)
    want = [(ids[0], "wing</script>", 0.5), (ids[0], "bill", 0.25), (ids[1], "bill", 0.5)]
    assert saev.visuals.open(tmp_path).traits.rows() == want
    scripts.write(tmp_path, "traits", value | {"traits": value["traits"][:1]})
    with pytest.raises(errors.UserError, match="traits.js: holds 1 traits, but others are named"):
        _ = saev.visuals.open(tmp_path).traits


@pytest.mark.slow
def test_a_damaged_gallery_is_named(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = tmp_path / "g" / "data"
    (data / "latents").mkdir(parents=True)
    for name in ("stats", "paths", "latents/000", "latents/001"):
        source = folder / "gallery" / "data" / f"{name}.js"
        if source.exists():
            (data / f"{name}.js").write_bytes(source.read_bytes())
    text = (data / "stats.js").read_text()
    for name, frame in (("stats", "latents"), ("paths", "images"), ("latents/000", "together")):
        bytes_ = (data / f"{name}.js").read_bytes()
        (data / f"{name}.js").write_bytes(bytes_.replace(b'"u4"', b'"i4"', 1))
        with pytest.raises(errors.UserError, match=rf"{name}\.js: was changed after it was written"):
            getattr(saev.visuals.open(tmp_path / "g"), frame)
        (data / f"{name}.js").write_bytes(bytes_)
    text = re.sub(', "[0-9a-f]{32}"', "", text)  # as in files of older versions
    for old, new, frame, message in (
        ('["a","b"]', '["a"]', "classes", "holds 1 classes, but others are named"),
        ('"n_images":8', '"n_images":7', "images", "holds 8 pictures instead of 7"),
        ('"latents":256', '"latents":255', "neighbours", "latents/000.js: holds 256 rows instead of 255"),
    ):
        assert old in text
        (data / "stats.js").write_text(text.replace(old, new))
        with pytest.raises(errors.UserError, match=message):
            getattr(saev.visuals.open(tmp_path / "g"), frame)
