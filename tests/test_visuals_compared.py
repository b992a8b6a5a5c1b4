"""Real comparisons in a browser: ViTs on drawn photos, their galleries, `python -m saev.compare`, and the page.

N images, P patches, D d_vit, S latents.
"""

import dataclasses
import pathlib

import gallery_files
import inprocess
import numpy as np
import PIL.Image
import pytest
import torch
from browsing import Open, needed
from playwright import sync_api

from saev import nn
from saev.data import activations, dump, images
from saev.data import config as data_config
from saev.demo import minicub
from saev.formats import shards
from saev.nn import config as nn_config
from saev.visuals import collect
from saev.visuals import config as visuals_config

pytest_plugins = ["browser_fixtures"]
pytestmark = [needed, pytest.mark.slow]
N, S = 12, 16
SAME = 6
"""So many latents of the second SAE are copies of the first one's, in another order."""


@dataclasses.dataclass(frozen=True)
class Side:
    """A dictionary and its gallery."""

    ckpt: pathlib.Path
    data: data_config.Shards
    gallery: pathlib.Path
    f_NPS: np.ndarray
    grid: tuple[int, int]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with photos of birds."""
    root = tmp_path_factory.mktemp("compared")
    rng = np.random.default_rng(0)
    profile = {name: values[0] for name, values in minicub.GROUPS.items()}
    for i in range(N):
        bird = minicub.picture(minicub.Bird(i, profile, None), rng)[0]
        fpath = root / "photos" / minicub.SPECIES[i % 3] / f"{i:02}.png"
        fpath.parent.mkdir(parents=True, exist_ok=True)
        bird.resize((140, 110)).save(fpath)
    return root


def dumped(root: pathlib.Path, family: str, ckpt: str, side: int) -> data_config.Shards:
    """The activations after a ViT's first block, with random weights."""
    cfg = data_config.Dump(
        vit=data_config.Vit(family, ckpt, "random", img_size=side),
        data=data_config.ImageFolder(str(root / "photos")),
        vit_layers=(0,),
        dump_to=str(root / "shards"),
        device="cpu",
    )
    return data_config.Shards(dump.main(cfg), 0)


def with_gallery(root: pathlib.Path, name: str, sae: nn.SparseAutoencoder, data: data_config.Shards) -> Side:
    """Saves an SAE, and makes its gallery."""
    ckpt = root / name / "sae.pt"
    nn.save(sae.eval(), ckpt)
    cfg = visuals_config.Visuals(
        images=data_config.ImageFolder(str(root / "photos")),
        ckpt=str(ckpt),
        data=data,
        dump_to=str(root / f"gallery {name}"),
        n_images=10,
        n_group=1,
        image_view=2,
        thumb_side=64,
        device="cpu",
    )
    gallery = pathlib.Path(collect.main(cfg))
    acts = activations.Activations(data)
    acts_NPD = torch.from_numpy(acts.read(0, acts.n_imgs))
    grid = gallery_files.load(gallery, "stats")["source"]["grid"]
    return Side(
        ckpt,
        data,
        gallery,
        nn.load(ckpt).encode(acts_NPD.flatten(0, 1)).unflatten(0, acts_NPD.shape[:2]).numpy(),
        grid,
    )


def trained(data: data_config.Shards, seed: int) -> nn.SparseAutoencoder:
    """Random directions around the mean activation."""
    acts = activations.Activations(data)
    sae = nn.SparseAutoencoder(nn_config.TopK(d_vit=acts.d_vit, d_sae=S, top_k=4), seed=seed)
    with torch.no_grad():
        sae.b_dec.copy_(torch.from_numpy(acts.read(0, acts.n_imgs)).flatten(0, 1).mean(dim=0))
    return sae


@pytest.fixture(scope="module")
def one(root: pathlib.Path) -> Side:
    """6 x 6 patches of 16 pixels."""
    data = dumped(root, "timm", "vit_tiny_patch16_224", 96)
    return with_gallery(root, "a", trained(data, 0), data)


def compared(root: pathlib.Path, one: Side, two: Side) -> dict:
    """Runs the command; returns the columns that the page shows."""
    words = ["-m", "saev.compare", "--scorer", one.ckpt, "--other", two.ckpt, "--dump-to", root / "results"]
    words += [
        "--data.shard-root",
        one.data.shard_root,
        "--data.layer",
        0,
        "--other-data.shard-root",
        two.data.shard_root,
    ]
    words += [
        "--other-data.layer",
        0,
        "--gallery",
        one.gallery,
        "--other-gallery",
        two.gallery,
        "--device",
        "cpu",
    ]
    done = inprocess.run(*words)
    assert done.returncode == 0, done.stderr
    return gallery_files.load(one.gallery, "compare")


def check_side(page: sync_api.Page, i: int, side: Side, latent: int) -> None:
    """The i-th side's pictures are the latent's top images by the codes, and the outline is on the strongest patch."""
    records = shards.ShardDir.open(pathlib.Path(side.data.shard_root)).records
    f_NP = side.f_NPS[:, :, latent]
    order = [n for n in np.argsort(-f_NP.max(axis=1), kind="stable") if f_NP[n].max() > 0][:8]
    figures = page.locator(".side").nth(i).locator("figure")
    assert figures.count() == len(order) > 0
    found = figures.evaluate_all(
        """figures => figures.map((figure) => {
          const [frame, outline] = ['.frame', '.outline'].map((s) => figure.querySelector(s).getBoundingClientRect());
          const canvas = figure.querySelector('canvas');
          return {alt: figure.querySelector('img').alt, value: Number(figure.querySelector('b').innerText),
            grid: [canvas.height, canvas.width],
            box: [(outline.x - frame.x) / frame.width, (outline.y - frame.y) / frame.height, outline.width / frame.width]};
        })"""
    )
    rows, columns = side.grid
    for n, picture in zip(order, found, strict=True):
        patch = int(f_NP[n].argmax())
        row, column = divmod(patch, columns)
        assert picture["alt"].startswith(f"{records[n].path}, ") and picture["grid"] == [rows, columns]
        assert picture["value"] == pytest.approx(f_NP[n].max(), rel=5e-3)
        assert f"latent {latent} has value" in picture["alt"]
        assert picture["alt"].endswith(f"strongest at row {row + 1}, column {column + 1}")
        assert picture["box"] == pytest.approx([column / columns, row / rows, 1 / columns], abs=0.01)


def opened(page: sync_api.Page, latent: int) -> None:
    """Clicks a pair in the table, and waits for its pictures."""
    page.fill("input[type=search]", f"id:{latent}")
    page.locator(".table .body a").first.click()
    page.wait_for_selector(".side figure")
    page.wait_for_function("[...document.images].every((i) => i.complete && i.naturalWidth)")


@pytest.mark.slow
def test_two_saes_of_one_layer(show: Open, root: pathlib.Path, one: Side) -> None:
    """The first latents of the second SAE are the last ones of the first: each is the other's match."""
    sae, other = nn.load(one.ckpt), trained(one.data, 1)
    with torch.no_grad():
        other.W_enc[:, :SAME] = sae.W_enc[:, -SAME:]
        other.W_dec[:SAME] = sae.W_dec[-SAME:]
    two = with_gallery(root, "b", other, one.data)
    columns = compared(root, one, two)["columns"]
    assert gallery_files.load(one.gallery, "compare")["files"]["n_images"] == 0  # it has all pictures
    page = show("#/compare", one.gallery)
    assert page.inner_text(".found") == f"{len(columns['id'])} of {len(columns['id'])} pairs"
    for text in ("a · TopK · 16 latents", "b · TopK · 16 latents", "patches of 12 images"):
        assert text in page.inner_text(".left")
    for latent in (S - 1, S - SAME):
        row = columns["id"].tolist().index(latent)
        match, corr = int(columns["best"][row]), float(columns["corr"][row])
        f_R, g_R = one.f_NPS[:, :, latent].ravel(), two.f_NPS[:, :, match].ravel()
        assert match == latent - (S - SAME) and corr == pytest.approx(np.corrcoef(f_R, g_R)[0, 1], abs=1e-4)
        opened(page, latent)
        assert page.inner_text("h2") == f"Latent {latent} and {match}"
        assert f"{corr:.3f}" in page.inner_text(".facts")
        check_side(page, 0, one, latent)
        check_side(page, 1, two, match)
        if latent != S - 1:
            break
        page.keyboard.press("Escape")
    page.click("text=open in its gallery")
    page.wait_for_selector(".facts")
    assert page.inner_text("h2") == f"Latent {match}" and "gallery%20b" in page.url


@pytest.mark.slow
def test_two_vits_with_other_grids(show: Open, root: pathlib.Path, one: Side) -> None:
    """8 x 8 patches of 14 pixels, of another crop: the pictures are those of the other gallery."""
    data = dumped(root, "dinov2", "dinov2_vits14", 112)
    two = with_gallery(root, "c", trained(data, 2), data)
    assert (tuple(one.grid), tuple(two.grid)) == ((6, 6), (8, 8))
    value = compared(root, one, two)
    columns, ids = value["columns"], value["columns"]["id"].tolist()
    page = show("#/compare", one.gallery)
    assert "a latent's value is the maximum over an image's patches" in page.inner_text(".left")
    latent = next(int(i) for i in ids if columns["best"][ids.index(i)] >= 0)
    match = int(columns["best"][ids.index(latent)])
    opened(page, latent)
    check_side(page, 0, one, latent)
    check_side(page, 1, two, match)
    theirs = {image["path"]: image["src"] for image in gallery_files.images(two.gallery)}
    srcs = page.locator(".side").nth(1).locator("img").evaluate_all("imgs => imgs.map((i) => [i.alt, i.src])")
    assert srcs and all(src == theirs[alt.partition(", ")[0]] for alt, src in srcs)
    page.locator(".side").nth(1).locator("a.picture").first.click()  # the image, where this gallery has it
    page.wait_for_function("location.hash.startsWith('#/image/')")


# ---- alignment ----

SIDE = 224
SQUARES = [(0, 0), (184, 184), (96, 32), (50, 131), (13, 77), (160, 8)]
"""Upper left corners of bright squares of 40 pixels."""


@pytest.fixture
def bright(tmp_path: pathlib.Path, make_shards) -> list[Side]:
    """Two "ViTs" that see the mean brightness of patches of 14 and of 16 pixels, on the same photos."""
    transform = images.Transform((SIDE, SIDE), SIDE, False, "bicubic", (0.5,), (0.5,))
    found = []
    for patch in (16, 14):
        n = SIDE // patch
        acts_NP1 = np.zeros((len(SQUARES), n * n, 1), np.float32)
        photos = []
        for i, (y, x) in enumerate(SQUARES):
            photo_HW = np.zeros((SIDE, SIDE), np.uint8)
            photo_HW[y : y + 40, x : x + 40] = 255 - 20 * i
            photos.append(PIL.Image.fromarray(photo_HW).convert("RGB"))
            cells = photo_HW.reshape(n, patch, n, patch).mean(axis=(1, 3)) / 255
            acts_NP1[i, :, 0] = cells.ravel()
        dpath, _ = make_shards(
            n_imgs=len(SQUARES), n_patches=n * n, d_vit=1, layers=(0,), cls_token=False, acts=acts_NP1[:, None],
            transform=transform.to_dict(), name=f"bright{patch}",
        )  # fmt: skip
        for photo, record in zip(photos, shards.ShardDir.open(dpath).records, strict=True):
            fpath = tmp_path / "photos" / record.path
            fpath.parent.mkdir(parents=True, exist_ok=True)
            photo.save(fpath, format="PNG")
        sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=1, d_sae=1))
        with torch.no_grad():
            sae.W_enc.fill_(1)
            sae.b_enc.fill_(-0.01 * patch)
        found.append(with_gallery(tmp_path, f"p{patch}", sae, data_config.Shards(str(dpath), 0)))
    return found


def test_heat_of_both_grids_is_on_the_bright_square(
    show: Open, tmp_path: pathlib.Path, bright: list[Side]
) -> None:
    """14 and 16 patches a side over the same part of the photos: one picture serves for both."""
    one, two = bright
    value = compared(tmp_path, one, two)
    assert value["columns"]["best"].tolist() == [0] and value["files"]["n_images"] == 0
    page = show("#/compare", one.gallery)
    opened(page, 0)
    for i, side in enumerate(bright):
        check_side(page, i, side, 0)
        boxes = (
            page.locator(".side")
            .nth(i)
            .locator("figure")
            .evaluate_all(
                """figures => figures.map((figure) => {
              const [frame, outline] = ['.frame', '.outline'].map((s) => figure.querySelector(s).getBoundingClientRect());
              return [outline.y - frame.y, outline.x - frame.x, outline.height, outline.width].map((v) => v / frame.width);
            })"""
            )
        )
        for (y, x), (top, left, height, width) in zip(
            SQUARES, boxes, strict=True
        ):  # the brightest photo first
            assert height == pytest.approx(1 / side.grid[0], abs=0.01)
            slack = 0.01
            assert y / SIDE - slack <= top and top + height <= (y + 40) / SIDE + slack
            assert x / SIDE - slack <= left and left + width <= (x + 40) / SIDE + slack
