"""--resize: geometry, dumps, and every reader of dumps with padding, against plain loops.

N images, P patches of an image, T tokens, D d_vit, K latents.
"""

import collections.abc
import dataclasses
import itertools
import json
import math
import pathlib

import msgspec
import numpy as np
import PIL.Image
import polars as pl
import pytest
import shallow
import sklearn.datasets
import torch

import saev
from saev import errors, nn, scorers
from saev.codes import config as codes_config
from saev.codes import encode
from saev.compare import config as compare_config
from saev.compare import run as compare_run
from saev.data import activations, config, dump, images, layout, ordered, pictures, shuffled, vits
from saev.demo import weights
from saev.formats import metadata, patchlabels, shards
from saev.labels import config as labels_config
from saev.labels import run as labels_run
from saev.nn import config as nn_config
from saev.protoeval import heat, score
from saev.scorers import base
from saev.scorers import config as scorers_config
from saev.visuals import coders, spool, statistics
from saev.visuals import heat as visuals_heat

MEAN = (0.2, 0.5, 0.8)
CROP = images.Transform((64, 64), 72, False, "bicubic", MEAN, MEAN)
SQUASH = images.Transform((64, 64), 64, True, "bilinear", MEAN, MEAN)
SIZES = [(64, 64), (300, 200), (200, 300), (257, 911), (911, 257), (1, 400), (400, 3), (97, 96), (640, 480)]


# ---- geometry ----


@pytest.mark.parametrize("n", [1, 4, 49, 196, 256, 729])
def test_the_flexible_grid_is_the_nearest_one(n: int) -> None:
    """Of all grids with at most n patches and at least 7/8 of them, by a plain loop."""
    aspects = [w / h for w, h in SIZES] + np.exp(np.random.default_rng(0).uniform(-3, 3, 20)).tolist()
    for aspect in aspects:
        rows, columns = images.flexible_grid(n, aspect)
        assert 7 / 8 * n <= rows * columns <= n
        distortion = max(rows / columns / aspect, aspect / (rows / columns))
        for r, c in itertools.product(range(1, n + 1), repeat=2) if n < 60 else [(rows, columns)]:
            if 7 / 8 * n <= r * c <= n:
                assert max(r / c / aspect, aspect / (r / c)) >= distortion * (1 - 1e-12)
        assert n < 196 or distortion < 1.1 or not 1 / 8 < aspect < 8
    assert images.flexible_grid(n, 1.0) == (math.isqrt(n),) * 2


def test_the_familys_own_mode_is_no_change() -> None:
    for own, mode in ((CROP, "crop"), (SQUASH, "squash"), (CROP, None), (SQUASH, None)):
        assert own.with_resize(mode, 16) is own
    assert CROP.with_resize("squash", 16) == dataclasses.replace(CROP, resize=64, squash=True)
    assert SQUASH.with_resize("crop", 16) == dataclasses.replace(SQUASH, squash=False)
    wide = dataclasses.replace(CROP, size=(32, 64), resize=(36, 72))
    assert wide.with_resize("squash", 8).resize == (32, 64)
    for mode in ("pad", "flexible"):
        made = CROP.with_resize(mode, 16)
        assert (made.fit, made.patch, made.resize) == (mode, 16, 64)
        assert images.Transform.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert "fit" not in CROP.to_dict()
    with pytest.raises(errors.UserError, match="15 patches do not form a grid"):
        CROP.with_resize("pad", 15)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (70, 70)])
def test_padding_shows_the_whole_photo_undistorted(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """The photo, resized by Pillow, lies in borders of the mean colour. Its corner is a patch's, at most half a patch
    and half of what is spare off the centre."""
    transform = dataclasses.replace(CROP, size=shape, resize=shape).with_resize(
        "pad", shape[0] // 16 * (shape[1] // 16)
    )
    covered = [n // 16 * 16 for n in shape]
    rng = np.random.default_rng(0)
    img = PIL.Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
    seen_HW3 = np.asarray(transform.geometry(img))
    assert seen_HW3.shape == (*shape, 3)
    left, top, right, bottom = transform.box(*size)
    want = np.asarray(img.resize((right - left, bottom - top), PIL.Image.Resampling.BICUBIC))
    assert np.array_equal(seen_HW3[top:bottom, left:right], want)
    outside = np.ones(shape, bool)
    outside[top:bottom, left:right] = False
    assert (seen_HW3[outside] == [51, 128, 204]).all()
    assert (right - left == covered[1] or bottom - top == covered[0]) and left % 16 == 0 and top % 16 == 0
    scale = min(covered[0] / size[1], covered[1] / size[0])
    assert (right - left, bottom - top) == tuple(max(1, round(n * scale)) for n in size)
    for first, last, whole in ((left, right, covered[1]), (top, bottom, covered[0])):
        assert 0 <= (whole - last) - first < 32 and last <= whole
    # as an input, the mean colour is nearly 0
    assert np.abs(transform(img).numpy()[:, outside]).max(initial=0) < 0.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["pad", "flexible"])
def test_padding_is_known(mode: config.Resize, size: tuple[int, int]) -> None:
    """A patch shows the photo if any pixel of a white photo lies in it."""
    transform = CROP.with_resize(mode, 16)
    placed = layout.Layout.of(transform, 16, size)
    seen = transform.geometry(PIL.Image.fromarray(np.ones(size[::-1], np.int32)), -1)
    rows, columns = placed.grid
    is_photo_HW = np.asarray(seen) == 1
    assert is_photo_HW.shape == placed.size == (rows * 16, columns * 16)
    is_photo_P = is_photo_HW.reshape(rows, 16, columns, 16).any(axis=(1, 3)).ravel()
    assert np.array_equal(placed.is_shown_P[: rows * columns], is_photo_P)
    assert not placed.is_shown_P[rows * columns :].any()
    if mode == "flexible":
        assert is_photo_P.all() and placed.grid == images.flexible_grid(16, size[1] / size[0])


# ---- dumps ----


def vit_of(resize: config.Resize | None, ckpt: str = "test_vit") -> config.Vit:
    return config.Vit("timm", ckpt, "random", img_size=64, resize=resize)


PHOTOS = [(64, 64), (120, 80), (80, 120), (64, 64), (200, 50), (90, 61), (120, 80)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(PHOTOS):
        small = PIL.Image.fromarray(rng.integers(0, 255, (5, 5, 3), np.uint8))
        small.resize((width, height)).save(root / f"{i}.png")
    (root / "3.png").write_bytes(b"no photo")
    return root


def dumped(
    folder: pathlib.Path, dump_to: pathlib.Path, resize: config.Resize | None, **given
) -> shards.ShardDir:
    """Two images to a shard, of 16 patches and [CLS]."""
    fields = {
        "vit": vit_of(resize),
        "data": config.ImageFolder(str(folder)),
        "vit_layers": (1, 2),
        "dump_to": str(dump_to),
        "max_patches_per_shard": 2 * 2 * 17,
        "vit_batch_size": 2,
        "n_workers": 2,
        "skip_corrupt": True,
        "device": "cpu",
    }
    return shards.ShardDir.open(dump.main(config.Dump(**fields | given)))


@pytest.fixture(scope="module")
def dumps(
    folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, shards.ShardDir]:
    root = tmp_path_factory.mktemp("shards")
    return {mode: dumped(folder, root, mode) for mode in (None, "crop", "squash", "pad", "flexible")}


def test_a_dump_knows_its_resize(dumps: dict[str | None, shards.ShardDir]) -> None:
    """The default's identity has not changed, and the family's own mode has it too."""
    assert dumps[None].dpath == dumps["crop"].dpath and "resize" not in dumps[None].metadata.data
    assert len({found.dpath for found in dumps.values()}) == 4
    for mode, found in dumps.items():
        is_padded = mode in ("pad", "flexible")
        assert found.metadata.protocol == (metadata.PROTOCOL_PADDED if is_padded else metadata.PROTOCOL)
        assert found.metadata.data.get("resize") == (None if mode == "crop" else mode)
        complete = json.loads(found.complete_fpath.read_text())
        assert ("sizes" in complete) == is_padded
        if is_padded:
            want = [(0, 0) if i == 3 else size for i, size in enumerate(PHOTOS)]
            assert found.sizes_N2.tolist() == [list(size) for size in want]
    spaces = {activations.Activations(config.Shards(str(found.dpath), 2)).space for found in dumps.values()}
    assert len(spaces) == 1  # an SAE of one reads the others


@pytest.mark.parametrize("mode", ["squash", "pad", "flexible"])
def test_a_dump_holds_each_photos_patches(
    mode: config.Resize, dumps: dict[str | None, shards.ShardDir], folder: pathlib.Path
) -> None:
    vit = vits.load(vit_of(mode))
    acts = activations.Activations(config.Shards(str(dumps[mode].dpath), 2))
    assert acts.n_imgs == len(PHOTOS) - 1
    for position, image_i in enumerate(acts.image_is_N.tolist()):
        fpath = folder / acts.records[image_i].path
        want_PD = vit.patches(fpath, 2).numpy()
        got_PD = acts.read(position, position + 1)[0]
        np.testing.assert_allclose(got_PD[: len(want_PD)], want_PD, atol=1e-4)
        assert not got_PD[len(want_PD) :].any()
        placed = vit.layout(fpath)
        assert acts.photos.layout(image_i) == placed and len(want_PD) == math.prod(placed.grid)
        if mode != "squash":
            assert np.array_equal(acts.is_kept_NT[position], placed.is_shown_P)


def test_an_interrupted_dump_ends_with_the_same_bytes(
    dumps: dict[str | None, shards.ShardDir], folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Two shards are dumped anew."""
    for mode in ("pad", "flexible"):
        found = dumped(folder, tmp_path, mode)
        names = sorted(p.name for p in found.dpath.iterdir() if p.suffix in (".bin", ".xxh3", ".json"))
        for name in ("acts000001.json", "acts000001.bin", "acts000003.json", "complete.json"):
            (found.dpath / name).unlink()
        again = dumped(folder, tmp_path, mode)
        for name in names:
            if name != "code.json":
                want = (dumps[mode].dpath / name).read_bytes()
                assert (again.dpath / name).read_bytes() == want, name


def test_a_damaged_sidecar_is_named(dumps: dict[str | None, shards.ShardDir], tmp_path: pathlib.Path) -> None:
    found = dumps["pad"]
    sidecar = found.sidecars[0]
    assert sidecar.size_n2(found.sidecar_fpath(0)) == [(64, 64), (120, 80)]
    for sizes in ("", "64x64", "64x64 120x80 1x1", "64x64 axb"):
        with pytest.raises(
            errors.UserError, match=r"acts000000.json: lacks the sizes of its photos. Delete it"
        ):
            msgspec.structs.replace(sidecar, sizes=sizes).size_n2(found.sidecar_fpath(0))


def test_a_photo_of_another_size_than_in_the_dump_is_refused(
    dumps: dict[str | None, shards.ShardDir], tmp_path: pathlib.Path
) -> None:
    acts = activations.Activations(config.Shards(str(dumps["pad"].dpath), 2))
    PIL.Image.new("RGB", (80, 120)).save(tmp_path / "1.png")
    shown = pictures.Pictures.of(config.ImageFolder(str(tmp_path)), acts, 64)
    match = r"1.png: has 80 x 120 pixels, but 120 x 80 in the dump, so .* Pass the folder that was dumped"
    with pytest.raises(errors.UserError, match=match):
        shown.view(1)
    for i in range(len(PHOTOS)):
        PIL.Image.new("RGB", (80, 120)).save(tmp_path / f"{i}.png")
    cfg = labels_config.Labels(
        str(dumps["pad"].dpath), config.ImageFolder(str(tmp_path)), labels_config.Index(str(tmp_path))
    )
    with pytest.raises(errors.UserError, match=r"0.png: has 80 x 120 pixels, but 64 x 64 in the dump"):
        labels_run.main(cfg)


def test_the_report_of_labels_leaves_padding_out(
    dumps: dict[str | None, shards.ShardDir],
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With masks of one class, all patches of the readable photos have it."""
    for i in dumps["flexible"].image_is_N.tolist():
        with PIL.Image.open(folder / f"{i}.png") as img:
            PIL.Image.new("L", img.size, 7).save(tmp_path / f"{i}.png")
    cfg = labels_config.Labels(
        str(dumps["flexible"].dpath),
        config.ImageFolder(str(folder)),
        labels_config.Index(str(tmp_path)),
        name="one",
    )
    with caplog.at_level("INFO", "saev"):
        labels_run.main(cfg)
    is_shown_NP = layout.Photos([dumps["flexible"]]).shown_AP
    n = int(is_shown_NP.sum())
    assert n < is_shown_NP.size and f"16 of {n} patches have no label" in caplog.text  # the corrupt image's
    assert f"7: {100 * (n - 16) / n:.2f}% of the patches" in caplog.text


# ---- refusals ----


@pytest.mark.parametrize(
    ("family", "ckpt"),
    [("clip", "ViT-B-32/openai"), ("siglip", "ViT-B-16-SigLIP/webli"), ("timm", "beit_base_patch16_224")],
)
def test_positions_that_cannot_be_resampled(
    family: config.Family, ckpt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow.towers(monkeypatch, 2)
    cfg = config.Vit(family, ckpt, "random", resize="flexible")
    with pytest.raises(
        errors.UserError, match=f"--resize flexible: the positions of {ckpt} cannot .* Pass --resize crop"
    ):
        vits.load(cfg)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ckpt", "own"),
    [
        ("clip", "ViT-B-32/openai", "crop"),
        ("siglip", "ViT-B-16-SigLIP/webli", "squash"),
        ("dinov2", "dinov2_vits14_reg", "crop"),
    ],
)
def test_every_familys_own_mode(
    family: config.Family, ckpt: str, own: config.Resize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights: the family's own mode is no change, and another one changes the input alone."""
    shallow.towers(monkeypatch, 2)
    photo = PIL.Image.fromarray(sklearn.datasets.load_sample_images().images[0])
    default = vits.load(config.Vit(family, ckpt, "random"))
    for mode in ("crop", "squash", "pad"):
        made = default.transform.with_resize(mode, default.n_patches)
        assert (made == default.transform) == (mode == own)
    padded = vits.load(config.Vit(family, ckpt, "random", resize="pad"))
    assert (default.resize, padded.resize) == (None, "pad") and padded.ckpt_id == default.ckpt_id
    default.transform = padded.transform
    assert torch.equal(padded.patches(photo, 0), default.patches(photo, 0))
    assert 0.5 < padded.layout(photo).is_shown_P.mean() < 0.8


# ---- flexible grids ----


FLEXIBLE = [
    "test_vit",
    "test_vit2",
    "flexivit_small",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
]
FLEXIBLE += ["vit_small_patch16_rope_mixed_ape_224", "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_r_s16_p8_224"]


@pytest.mark.slow
@pytest.mark.parametrize("ckpt", FLEXIBLE)
def test_a_flexible_vit_is_the_usual_one_on_a_square_photo(ckpt: str) -> None:
    """Bit for bit; and on a wide photo, a change in one patch changes that patch's embedding and no other."""
    patch = 14 if "14" in ckpt else 32 if "r_s16" in ckpt else 16
    sizes = {"img_size": 6 * patch}
    usual = vits.load(config.Vit("timm", ckpt, "random", resize="squash", **sizes))
    vit = vits.load(config.Vit("timm", ckpt, "random", resize="flexible", **sizes))
    rng = np.random.default_rng(0)
    square = PIL.Image.fromarray(rng.integers(0, 255, (90, 90, 3), np.uint8))
    for layer in (0, -1):
        assert torch.equal(vit.patches(square, layer), usual.patches(square, layer))
    grid = images.flexible_grid(36, 0.3)
    grey = np.full((grid[0] * patch, grid[1] * patch, 3), 90, np.uint8)
    bright = grey.copy()
    bright[patch : 2 * patch, 5 * patch : 6 * patch] = 250
    a_PD, b_PD = (vit.patches(PIL.Image.fromarray(pixels), 0) for pixels in (grey, bright))
    assert vit.layout(PIL.Image.fromarray(grey)).grid == grid and len(a_PD) == math.prod(grid) < 36
    assert (a_PD - b_PD).norm(dim=1).argmax() == grid[1] + 5


@pytest.mark.slow
def test_flexible_with_real_weights(tmp_path: pathlib.Path) -> None:
    """DINOv2's backbone: a square photo has the usual activations; a landscape photo's dump has 14 x 18 patches, a
    bright square changes the patch below it most, and the gallery's heat lies on it."""
    weights.unpack(fpath := tmp_path / "w.safetensors")
    usual = vits.load(config.Vit("dinov2", "dinov2_vits14", str(fpath), resize="squash"))
    cfg = config.Vit("dinov2", "dinov2_vits14", str(fpath), resize="flexible")
    vit = vits.load(cfg)
    photo = PIL.Image.fromarray(sklearn.datasets.load_sample_images().images[0])  # 640 x 427
    square = photo.crop((0, 0, 427, 427))
    assert torch.equal(vit.patches(square, 7), usual.patches(square, 7))
    wide = photo.resize((640, 480))
    placed = vit.layout(wide)
    assert placed.grid == (14, 18) and placed.is_shown_P.sum() == 252
    # another grid sees much the same photo: neighbouring patches of the usual grid are less alike
    usual_PD = torch.nn.functional.normalize(usual.patches(wide, 7), dim=1).reshape(16, 16, -1)
    resampled = torch.nn.functional.interpolate(
        usual_PD.permute(2, 0, 1)[None], size=(14, 18), mode="bilinear"
    )[0]
    own_PD = torch.nn.functional.normalize(vit.patches(wide, 7), dim=1)
    alike = (own_PD * torch.nn.functional.normalize(resampled.flatten(1).T, dim=1)).sum(dim=1).mean()
    apart = (usual_PD[:, 2:] * usual_PD[:, :-2]).sum(dim=2).mean()
    assert alike > 0.85 and alike > apart
    folder = tmp_path / "photos"
    folder.mkdir()
    places = [(2, 3), (7, 9), (11, 16)]
    side = 640 / 18, 480 / 14
    for i, (row, column) in enumerate(places):
        img = PIL.Image.new("RGB", (640, 480), (60, 60, 60))
        corner = column * side[0], row * side[1]
        box = (*corner, corner[0] + side[0], corner[1] + side[1])
        img.paste((250, 240, 200), tuple(map(round, box)))
        img.save(folder / f"{i}.png")
    PIL.Image.new("RGB", (640, 480), (60, 60, 60)).save(folder / "3.png")
    out = dump.main(
        config.Dump(
            vit=cfg,
            data=config.ImageFolder(str(folder)),
            vit_layers=(0,),
            dump_to=str(tmp_path / "s"),
            device="cpu",
        )
    )
    acts = activations.Activations(config.Shards(out, 0))
    acts_NPD = acts.read(0, 4)
    assert len(acts) == 4 * 252 and not acts_NPD[:, 252:].any()
    for (row, column), act_PD in zip(places, acts_NPD[:3], strict=True):
        assert np.linalg.norm(act_PD - acts_NPD[3], axis=1).argmax() == 18 * row + column
    # a latent that fires on the bright patches alone
    bright_D = np.stack([acts_NPD[i, 18 * r + c] for i, (r, c) in enumerate(places)]).mean(axis=0)
    grey_D = acts_NPD[3, :252].mean(axis=0)
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=vit.d_vit, d_sae=1))
    direction_D = torch.from_numpy((bright_D - grey_D) / np.square(bright_D - grey_D).sum())
    with torch.no_grad():
        sae.scale.fill_(1)
        sae.b_dec.copy_(torch.from_numpy(grey_D))
        sae.W_enc.copy_(direction_D[:, None])
        sae.b_enc.fill_(-0.6)
    nn.save(sae, tmp_path / "sae.pt", vit.space(0).describe())
    sae = nn.load(tmp_path / "sae.pt")
    for i, (row, column) in enumerate(places):
        fires_P = sae.encode(torch.from_numpy(acts_NPD[i])).numpy()[:, 0]
        assert fires_P[:252].argmax() == 18 * row + column
    sheet = saev.visuals.show(sae, folder / "1.png", vit, latents=[0], side=252)
    plain, hot = (np.asarray(sheet.crop((260 * i, 22, 260 * i + 252, 22 + 196)), float) for i in (0, 1))
    changed = np.abs(hot - plain).max(axis=2) > 60
    ys, xs = np.nonzero(changed)
    assert len(ys) and {*(ys // 14).tolist()} == {7} and {*(xs // 14).tolist()} == {9}


# ---- readers of padding ----

D, P, N, K = 6, 16, 9, 5
READ_SIZES = [(64, 32), (32, 64), (64, 64), (90, 61), (8, 64), (64, 32), (64, 16), (200, 150), (64, 64)]


@pytest.fixture(params=["pad", "flexible"])
def padded(request: pytest.FixtureRequest, make_shards) -> tuple[pathlib.Path, np.ndarray, np.ndarray]:
    """(shards with [CLS], image 4 corrupt; activations (N, P, D) of layer 7; whether a patch shows the photo (N, P)).

    Padding holds large values, which nothing may read."""
    transform = CROP.with_resize(request.param, P)
    is_shown_NP = np.stack([layout.Layout.of(transform, P, size).is_shown_P for size in READ_SIZES])
    assert 0.5 < is_shown_NP.mean() < 0.98
    acts_NLTD = np.random.default_rng(0).standard_normal((N, 2, P + 1, D)).astype(np.float32)
    acts_NLTD[:, :, 1:][~is_shown_NP[:, None].repeat(2, 1)] = 1000
    sizes = [(0, 0) if i == 4 else size for i, size in enumerate(READ_SIZES)]
    dpath, _ = make_shards(
        n_imgs=N, n_patches=P, d_vit=D, acts=acts_NLTD, skip=(4,), sizes=sizes, transform=transform.to_dict()
    )
    is_shown_NP[4] = False
    return dpath, acts_NLTD[:, 1, 1:], is_shown_NP


IS_READ = np.arange(N) != 4


def data_of(padded: tuple[pathlib.Path, np.ndarray, np.ndarray]) -> config.Shards:
    return config.Shards(str(padded[0]), 7)


def test_loaders_leave_padding_out(padded) -> None:
    dpath, acts_NPD, is_shown_NP = padded
    want_RD = acts_NPD[is_shown_NP]
    acts = activations.Activations(data_of(padded))
    assert len(acts) == len(want_RD)
    stream = ordered.Ordered(acts, 2)
    assert np.array_equal(np.concatenate([stream.rows(block) for block in stream]), want_RD)
    mixed = shuffled.Shuffled(acts, batch_size=8, pool_bytes=10**6)
    batches = itertools.islice(mixed.batches(), len(want_RD) // 8)
    seen = sorted(tuple(row) for batch in batches for row in batch.act_BD.tolist())
    assert set(seen) <= set(map(tuple, want_RD.tolist())) and len(set(seen)) == len(want_RD) // 8 * 8
    for layer, patches in ((7, "image"), (7, "all"), ("all", "all"), (7, "cls")):
        one = saev.data.Indexed(dpath, layer, patches)
        n_lead, n_layers = int(patches != "image"), 2 if layer == "all" else 1
        n_patches = 0 if patches == "cls" else len(want_RD)
        assert len(one) == n_layers * (n_patches + n_lead * (N - 1))
        places = [(one[i]["image_i"], one[i]["layer"], one[i]["patch_i"]) for i in range(len(one))]
        assert len(set(places)) == len(one) and places == sorted(places)
        assert all(p < 0 or is_shown_NP[i, p] for i, _, p in places)
    one = saev.data.Indexed(dpath, 7)
    assert np.array_equal(np.stack([one[i]["act"].numpy() for i in range(len(one))]), want_RD)
    assert torch.equal(one[-1]["act"], torch.from_numpy(want_RD[-1]))


def test_dumps_of_two_modes_are_one_stream(padded, make_shards) -> None:
    dpath, acts_NPD, is_shown_NP = padded
    whole, whole_NLTD = make_shards(n_imgs=3, n_patches=P, d_vit=D, transform=CROP.to_dict(), seed=5)
    for roots in ((dpath, whole), (whole, dpath)):
        acts = activations.Activations(config.Shards(str(roots[0]), 7, more_roots=(str(roots[1]),)))
        stream = ordered.Ordered(acts, 2)
        parts = [acts_NPD[is_shown_NP], whole_NLTD[:, 1, 1:].reshape(-1, D)]
        want_RD = np.concatenate(parts if roots[0] == dpath else parts[::-1])
        assert np.array_equal(np.concatenate([stream.rows(block) for block in stream]), want_RD)
        with pytest.raises(errors.UserError, match="different image transforms"):
            acts.photos.layout(0)


def test_fingerprints_differ_by_padding(make_shards) -> None:
    """The same activations of photos of other sizes are other activations."""
    transform = CROP.with_resize("flexible", P).to_dict()
    found = set()
    for sizes in ([(64, 48)] * 3, [(48, 64)] * 3, [(64, 64)] * 3):
        dpath, _ = make_shards(n_imgs=3, n_patches=P, sizes=sizes, transform=transform)
        acts = activations.Activations(config.Shards(str(dpath), 7))
        found.add(acts.fingerprint)
        assert acts.only([1]).n_kept_N.tolist() == acts.n_kept_N[1:2].tolist()
    assert len(found) == 3


def an_sae(cfg: nn_config.Architecture | None = None) -> nn.SparseAutoencoder:
    sae = nn.SparseAutoencoder(cfg or nn_config.Relu(d_vit=D, d_sae=K), seed=1)
    with torch.no_grad():
        sae.scale.fill_(1)
        sae.b_enc.fill_(-0.2)
    return sae.eval().requires_grad_(False)


def pooled(value_NPK: np.ndarray, is_shown_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximum and mean over the patches that show the photo, by a loop, of the images that were read."""
    parts = [value_PK[is_shown_P] for value_PK, is_shown_P in zip(value_NPK, is_shown_NP, strict=True)]
    parts = [part for part in parts if len(part)]
    return np.stack([part.max(axis=0) for part in parts]), np.stack([part.mean(axis=0) for part in parts])


def scorer_file(kind: str, tmp_path: pathlib.Path) -> tuple[pathlib.Path, collections.abc.Callable]:
    """A scorer's file, and its values on (R, D)."""
    fpath = tmp_path / "run" / ("sae.pt" if kind == "sae" else "random.bin")
    if kind == "sae":
        sae = an_sae()
        nn.save(sae, fpath)
        return fpath, lambda x_RD: sae.encode(x_RD).numpy()
    generator = torch.Generator().manual_seed(0)
    found = base.Prototypes.of(torch.randn(K, D, generator=generator), torch.zeros(D), "distance")
    scorers.save(found, fpath)
    return fpath, lambda x_RD: found(x_RD).numpy()


@pytest.mark.parametrize("top_n", [0, 2])
@pytest.mark.parametrize("kind", ["sae", "prototypes"])
def test_codes_have_none_on_padding(padded, kind: str, top_n: int, tmp_path: pathlib.Path) -> None:
    _, acts_NPD, is_shown_NP = padded
    fpath, values = scorer_file(kind, tmp_path)
    cfg = codes_config.Codes(str(fpath), data_of(padded), str(tmp_path / "codes"), device="cpu", top_n=top_n)
    codes = saev.codes.open(encode.main(cfg))
    value_NPK = values(torch.from_numpy(acts_NPD).flatten(0, 1)).reshape(N, P, K)
    max_NK, mean_NK = pooled(value_NPK, is_shown_NP)
    np.testing.assert_allclose(codes.pooled("max").dense(), max_NK, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(codes.pooled("mean").dense(), mean_NK, rtol=1e-5, atol=1e-5)
    found_NPK = codes.patches().dense().reshape(N - 1, P, K)
    assert not found_NPK[~is_shown_NP[IS_READ]].any()
    if not top_n:
        want_NPK = np.where(is_shown_NP[:, :, None], value_NPK, 0)[IS_READ]
        np.testing.assert_allclose(found_NPK, want_NPK, rtol=1e-5, atol=1e-5)
    for image, is_shown_P in zip(codes.images, is_shown_NP[IS_READ], strict=True):
        placed = layout.Layout(image.grid, 16, P, image.shown)
        assert np.array_equal(placed.is_shown_P, is_shown_P)


def test_scores_of_images_leave_padding_out(padded, tmp_path: pathlib.Path) -> None:
    _, acts_NPD, is_shown_NP = padded
    generator = torch.Generator().manual_seed(0)
    found = base.Prototypes.of(torch.randn(K, D, generator=generator), torch.zeros(D), "plain")
    acts, cpu = activations.Activations(data_of(padded)), torch.device("cpu")
    value_NPK = found(torch.from_numpy(acts_NPD).flatten(0, 1)).numpy().reshape(N, P, K)
    max_NK, _ = pooled(value_NPK, is_shown_NP)
    got = score.score_images([found], acts, acts.image_is_N.tolist(), tmp_path, cpu)
    np.testing.assert_allclose(got.scores_KN.T, max_NK, rtol=1e-5)
    np.testing.assert_allclose(got.mean_ND, pooled(acts_NPD, is_shown_NP)[1], rtol=1e-5, atol=1e-6)
    image_R = np.array([6, 0, 1, 6])
    zero_R = np.zeros(4, np.int64)
    scores_RP = heat.scores([found], acts, cpu, image_R, zero_R, np.full(4, 2))
    assert np.array_equal(np.isnan(scores_RP), ~is_shown_NP[image_R])
    np.testing.assert_allclose(
        scores_RP[is_shown_NP[image_R]], value_NPK[image_R, :, 2][is_shown_NP[image_R]], rtol=1e-5
    )
    made = heat.of(scores_RP, has_zero=False)
    assert made.low == pytest.approx(np.nanmean(scores_RP)) and made.high == np.nanmax(scores_RP)
    r_m = np.repeat(np.arange(4), np.diff(made.start))
    assert is_shown_NP[image_R[r_m], made.patch_m].all()


@pytest.mark.parametrize("kind", ["sae", "signed", "prototypes", "units"])
def test_statistics_of_a_gallery_leave_padding_out(padded, kind: str, tmp_path: pathlib.Path) -> None:
    _, acts_NPD, is_shown_NP = padded
    acts, cpu = activations.Activations(data_of(padded)), torch.device("cpu")
    if kind == "units":
        coder = coders.UnitCoder.fit(acts, 1.0, cpu)
        np.testing.assert_allclose(coder.mean_D, acts_NPD[is_shown_NP].mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(coder.cutoff_D, acts_NPD[is_shown_NP].std(axis=0), rtol=1e-4)
    elif kind == "prototypes":
        coder = coders.PrototypeCoder(scorers.load(scorer_file(kind, tmp_path)[0]), "random")
    else:
        sae = an_sae()
        coder = coders.SaeCoder(sae)
        coder.is_signed = kind == "signed"
    found = spool.run(coder, acts, 3, 2, tmp_path / "pass")
    class_N = np.full(N - 1, -1)
    stats = statistics.collect(coder, found, 3, 2, 0, class_N, 0)
    fired = coder(torch.from_numpy(acts_NPD[is_shown_NP]))
    n_S = np.bincount(fired.latent_n, minlength=coder.n)
    assert stats.fired_S.tolist() == n_S.tolist() and stats.n_patches == is_shown_NP.sum()
    np.testing.assert_allclose(stats.freq_S, n_S / is_shown_NP.sum())
    if kind == "prototypes":
        value_NPK = coder.scores(torch.from_numpy(acts_NPD).flatten(0, 1)).numpy().reshape(N, P, K)
        max_NK, _ = pooled(value_NPK, is_shown_NP)
        np.testing.assert_allclose(found.ranked.value_SK, -np.sort(-max_NK.T, axis=1)[:, :3], rtol=1e-5)
        low_S, _ = visuals_heat.scale(coder, found, stats)
        np.testing.assert_allclose(low_S, value_NPK[is_shown_NP].mean(axis=0), rtol=1e-5)
        shown = statistics.images_of(stats, np.arange(K), 3, 2, 0)
        entries = visuals_heat.Entries.of(shown, np.arange(K))
        low_S, high_S = visuals_heat.scale(coder, found, stats)
        for part in visuals_heat.parts(coder, acts, found, entries, low_S, high_S):
            first = int(entries.start_C1[part.rows.start])
            for e in range(len(part.value_E)):
                patches = part.patch_m[part.start_E1[e] : part.start_E1[e + 1]]
                assert is_shown_NP[IS_READ][entries.position_E[first + e], patches].all()


@pytest.mark.parametrize(("per", "pool"), [("patch", "max"), ("image", "max"), ("image", "mean")])
def test_comparisons_leave_padding_out(padded, per: str, pool: str, tmp_path: pathlib.Path) -> None:
    """Correlations of two SAEs' latents, by NumPy."""
    _, acts_NPD, is_shown_NP = padded
    saes = [an_sae(), an_sae(nn_config.Relu(d_vit=D, d_sae=7))]
    for name, sae in zip("ab", saes, strict=True):
        nn.save(sae, tmp_path / name / "sae.pt", {"layers": [7]})
    cfg = compare_config.Compare(
        scorer=str(tmp_path / "a" / "sae.pt"),
        other=str(tmp_path / "b" / "sae.pt"),
        data=data_of(padded),
        dump_to=str(tmp_path / "out"),
        per=per,
        pool=pool,
        device="cpu",
    )
    out = pathlib.Path(compare_run.main(cfg))
    values = [sae.encode(torch.from_numpy(acts_NPD).flatten(0, 1)).numpy().reshape(N, P, -1) for sae in saes]
    if per == "patch":
        f_RS, f_RZ = (value_NPK[is_shown_NP] for value_NPK in values)
    else:
        f_RS, f_RZ = (pooled(value_NPK, is_shown_NP)[pool == "mean"] for value_NPK in values)
    with np.errstate(invalid="ignore", divide="ignore"):
        corr_SZ = np.corrcoef(f_RS.T, f_RZ.T)[:K, K:]
    lines = pl.read_parquet(out / "matches.parquet").filter(of="one")
    np.testing.assert_allclose(
        lines["corr"].to_numpy(), np.nan_to_num(corr_SZ, nan=-9).max(axis=1), rtol=1e-4
    )
    assert json.loads((out / "about.json").read_text())["n_rows"] == len(f_RS)


def test_other_modes_are_not_compared_per_patch(make_shards, tmp_path: pathlib.Path) -> None:
    for name in "ab":
        nn.save(an_sae(), tmp_path / name / "sae.pt", {"layers": [7]})
    sizes = [(64, 64)] * N
    made = [
        make_shards(
            n_imgs=N,
            n_patches=P,
            d_vit=D,
            sizes=s,
            transform=CROP.with_resize(mode, P).to_dict(),
            name=str(n),
        )
        for n, (mode, s) in enumerate(
            ((None, None), ("pad", sizes), ("flexible", sizes), ("pad", [(64, 48)] * N))
        )
    ]
    for a, b in ((0, 1), (1, 2), (1, 3)):
        one, two = (config.Shards(str(made[i][0]), 7) for i in (a, b))
        cfg = compare_config.Compare(
            scorer=str(tmp_path / "a" / "sae.pt"), other=str(tmp_path / "b" / "sae.pt"), data=one, other_data=two,
            dump_to=str(tmp_path / "out"), per="patch", device="cpu",
        )  # fmt: skip
        with pytest.raises(
            errors.UserError, match=r"--per patch: .* have different .*16 and 16 patches.*Pass --per image"
        ):
            compare_run.main(cfg)
        compare_run.main(dataclasses.replace(cfg, per="image"))


def test_a_scorer_is_fitted_without_padding(padded, make_shards, tmp_path: pathlib.Path) -> None:
    """As on shards that hold nothing else."""
    _, acts_NPD, is_shown_NP = padded
    want_RD = acts_NPD[is_shown_NP]
    alone, _ = make_shards(
        n_imgs=len(want_RD), n_patches=1, d_vit=D, layers=(7,), cls_token=False, acts=want_RD[:, None, None]
    )
    fits = [
        scorers.fit(scorers_config.KMeans(n_iters=3), data, 4, dpath=tmp_path / "s").vectors_KD.numpy()
        for data in (data_of(padded), config.Shards(str(alone), 7))
    ]
    np.testing.assert_allclose(*fits, rtol=1e-4, atol=1e-5)


def test_classes_are_excluded_besides_padding(padded) -> None:
    dpath, acts_NPD, is_shown_NP = padded
    id_NP = np.where(is_shown_NP, np.random.default_rng(0).integers(0, 2, (N, P)), -1)
    patchlabels.write(shards.ShardDir.open(dpath), "", id_NP, {0: "leaf", 1: "wing"}, {})
    acts = activations.Activations(dataclasses.replace(data_of(padded), exclude_patch_labels=("leaf",)))
    stream = ordered.Ordered(acts, 2)
    assert np.array_equal(np.concatenate([stream.rows(block) for block in stream]), acts_NPD[id_NP == 1])
    with pytest.raises(errors.UserError, match="codes are of whole images"):
        acts.only_whole("codes are of")
    activations.Activations(data_of(padded)).only_whole("codes are of")
