"""The gallery against plain loops, on an SAE whose latents are known. N images, P patches, S latents, K images."""

import dataclasses
import html.parser
import json
import pathlib

import numpy as np
import PIL.Image
import pytest
import torch

from saev import errors, nn
from saev.data import config as data_config
from saev.data import ordered
from saev.formats import shards
from saev.nn import config as nn_config
from saev.visuals import collect, config, render

N, P, S = 7, 16, 4


@pytest.fixture
def acts_NPD() -> np.ndarray:
    """Few different values, so that ties happen; dimension 2 never fires, dimension 3 is planted."""
    acts_NPD = np.random.default_rng(0).integers(-3, 4, (N, P, S)).astype(np.float32)
    acts_NPD[..., 2] = -1
    acts_NPD[..., 3] = 0
    acts_NPD[5, 6, 3] = 8  # image 5, row 1, column 2 of the 4 x 4 grid
    return acts_NPD


@pytest.fixture
def cfg(make_shards, acts_NPD: np.ndarray, tmp_path: pathlib.Path) -> config.Visuals:
    """The SAE's latent s is ReLU of dimension s."""
    acts_NLTD = np.concatenate([np.full((N, 1, S), 99, np.float32), acts_NPD], axis=1)[:, None]
    dpath, _ = make_shards(n_imgs=N, n_patches=P, d_vit=S, layers=(13,), acts=acts_NLTD)
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=S, exp_factor=1))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(S))
    nn.save(sae, tmp_path / "run" / "sae.pt")
    for i, record in enumerate(shards.ShardDir.open(dpath).records):
        fpath = tmp_path / "imgs" / record.path
        fpath.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (60, 40), (10 * i, 100, 50)).save(fpath)
    return config.Visuals(
        images=data_config.ImageFolder(str(tmp_path / "imgs")),
        ckpt=str(tmp_path / "run" / "sae.pt"),
        data=data_config.Shards(str(dpath), 13),
        dump_to=str(tmp_path / "gallery"),
        log_freq_range=(-9.0, 0.0),
        n_images=3,
        device="cpu",
    )


def stats_of(cfg: config.Visuals, block: int = 16) -> collect.Stats:
    return collect.collect(nn.load(cfg.ckpt), ordered.Ordered(cfg.data, n_imgs=block), cfg.n_images)


@pytest.mark.parametrize("block", [1, 2, 16])
def test_stats_and_top_images_of_a_plain_loop(
    cfg: config.Visuals, acts_NPD: np.ndarray, block: int
) -> None:
    stats = stats_of(cfg, block)
    for s in range(S):
        values = [v for v in acts_NPD[..., s].ravel().tolist() if v > 0]
        assert stats.freq_S[s] == pytest.approx(len(values) / (N * P))
        assert stats.mean_S[s] == pytest.approx(np.mean(values) if values else np.nan, nan_ok=True)
        peaks = [max(0.0, *acts_NPD[n, :, s].tolist()) for n in range(N)]
        top = sorted(range(N), key=lambda n, peaks=peaks: (-peaks[n], n))[:3]
        assert stats.top_image_SK[s].tolist() == top
        assert stats.top_value_SK[s].tolist() == [peaks[n] for n in top]


def test_gallery_is_complete(cfg: config.Visuals) -> None:
    dpath = pathlib.Path(collect.main(cfg))
    page = (dpath / "index.html").read_text()

    class Sources(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [v for k, v in attrs if k in ("src", "href") and v]

    parser = Sources()
    parser.feed(page)
    assert parser.found and all((dpath / source).is_file() for source in parser.found)
    assert [f"Latent {s}<" in page for s in range(S)] == [True, True, False, True]  # 2 is dead
    assert (dpath / "latents.csv").read_text().splitlines()[0] == "latent,freq,mean,max,n_images"
    assert (
        len(list((dpath / "latent_000003").iterdir())) == 1
    )  # images that a latent does not fire on are not shown


def test_heat_lies_on_the_planted_patch(cfg: config.Visuals) -> None:
    dpath = pathlib.Path(collect.main(dataclasses.replace(cfg, latents=(3,))))
    (fpath,) = (dpath / "latent_000003").iterdir()
    assert fpath.name == "00_000005.png"
    heat_HW3 = np.asarray(PIL.Image.open(fpath), np.int64)
    plain_HW3 = np.asarray(PIL.Image.open(dpath / "images" / "000005.png"), np.int64)
    height, width, _ = heat_HW3.shape
    cold_HW3 = heat_HW3[-1, -1]
    changed_HW = np.abs(heat_HW3 - cold_HW3).sum(axis=2)
    y, x = np.argwhere(changed_HW > 0.9 * changed_HW.max()).mean(axis=0)
    assert (y / height, x / width) == (
        pytest.approx(1.5 / 4, abs=0.06),
        pytest.approx(2.5 / 4, abs=0.06),
    )
    assert plain_HW3.shape == heat_HW3.shape and (plain_HW3 == plain_HW3[0, 0]).all()


def test_heat_maps_lie_on_what_the_vit_saw(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    """With a transform on record, the shown image is its resize and crop."""
    transform = {
        "size": [32, 32],
        "resize": 36,
        "squash": False,
        "interpolation": "bicubic",
        "mean": [0.5],
        "std": [0.5],
    }
    (pathlib.Path(cfg.data.shard_root) / "transform.json").write_text(json.dumps(transform))
    dpath = pathlib.Path(collect.main(dataclasses.replace(cfg, latents=(3,))))
    with PIL.Image.open(dpath / "images" / "000005.png") as img:
        assert img.size == (32, 32)


def test_text_is_escaped(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    record = shards.Record("<b>'\".png", "<script>alert(1)</script>")
    gallery = render.Gallery("x&y", tmp_path, [record], None)
    page = render.Page(0, 0.1, 1.0, [render.Shown(0, 2.0, np.zeros(4, np.float32))])
    text = render._index(gallery, [page])
    assert (
        "<script" not in text
        and "&lt;script&gt;" in text
        and "<b>" not in text
        and "x&amp;y" in text
    )


def test_choice(cfg: config.Visuals) -> None:
    stats = stats_of(cfg)
    log_freq_S = np.log10(np.maximum(stats.freq_S, 1e-12))
    ranged = dataclasses.replace(cfg, log_freq_range=(-9.0, float(log_freq_S[3]) + 0.01))
    assert collect.choose(ranged, stats).tolist() == [3]
    assert collect.choose(dataclasses.replace(cfg, log_value_range=(0.8, 2.0)), stats).tolist() == [
        3
    ]  # mean 8
    assert collect.choose(dataclasses.replace(cfg, latents=(3, 0)), stats).tolist() == [0, 3]
    draws = [
        collect.choose(dataclasses.replace(cfg, n_latents=2, seed=s), stats).tolist()
        for s in (0, 0, 1, 2, 3)
    ]
    assert draws[0] == draws[1] and len({tuple(d) for d in draws}) > 1
    with pytest.raises(
        errors.UserError,
        match=r"Of 3 latents that fire, 90% have log10 frequency .* widen the ranges",
    ):
        collect.choose(dataclasses.replace(cfg, log_value_range=(5.0, 6.0)), stats)
    with pytest.raises(errors.UserError, match="--latents 4: the SAE has latents 0 to 3"):
        collect.choose(dataclasses.replace(cfg, latents=(4,)), stats)


def test_an_older_gallery_is_replaced_and_anything_else_is_not(
    cfg: config.Visuals, tmp_path: pathlib.Path
) -> None:
    dpath = pathlib.Path(collect.main(cfg))
    (dpath / "stale.txt").write_text("old")
    collect.main(dataclasses.replace(cfg, latents=(0,)))
    assert not (dpath / "stale.txt").exists() and (dpath / "index.html").exists()
    with pytest.raises(errors.UserError, match="exists and is not a gallery"):
        collect.main(dataclasses.replace(cfg, dump_to=str(tmp_path / "imgs")))
    assert len(list((tmp_path / "imgs").rglob("*.jpg"))) == N


def test_a_failed_gallery_leaves_the_older_one(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    dpath = pathlib.Path(collect.main(cfg))
    before = sorted(p.name for p in tmp_path.iterdir())
    record = shards.ShardDir.open(cfg.data.shard_root).records[5]
    (tmp_path / "imgs" / record.path).write_text("no image")
    with pytest.raises(errors.UserError, match="cannot be read as an image"):
        collect.main(cfg)
    assert (dpath / "index.html").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_does_not_fit(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    nn.save(nn.SparseAutoencoder(nn_config.Relu(d_vit=9)), tmp_path / "wide.pt")
    cases = {
        "--ckpt is missing": {"ckpt": ""},
        "9 wide, but .* holds 4": {"ckpt": str(tmp_path / "wide.pt")},
        "--images.root is missing": {"images": data_config.ImageFolder()},
        "no such image. Pass as --images.root": {"images": data_config.ImageFolder(str(tmp_path))},
    }
    for match, changes in cases.items():
        with pytest.raises(errors.UserError, match=match):
            collect.main(dataclasses.replace(cfg, **changes))
    with pytest.raises(errors.UserError, match="the first must not exceed the second"):
        dataclasses.replace(cfg, log_freq_range=(0.0, -1.0))


def test_patches_that_are_no_square() -> None:
    with pytest.raises(errors.UserError, match="6 patches are not a square grid"):
        render.overlay(PIL.Image.new("RGB", (8, 8)), np.zeros(6, np.float32))
