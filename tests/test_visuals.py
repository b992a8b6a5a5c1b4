"""The gallery against plain loops, on an SAE whose latents are known. N images, P patches, S latents, K images."""

import dataclasses
import hashlib
import html.parser
import json
import os
import pathlib
import signal
import subprocess
import sys

import forked
import jaxtyping
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import as_older

from saev import errors, nn
from saev.data import config as data_config
from saev.data import images, ordered
from saev.formats import shards
from saev.nn import config as nn_config
from saev.visuals import collect, config, render

ROOT = pathlib.Path(__file__).parent.parent
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


def pixels(fpath: pathlib.Path) -> np.ndarray:
    with PIL.Image.open(fpath) as img:
        return np.asarray(img.convert("RGB"), np.int64)


def stats_of(cfg: config.Visuals, block: int = 16) -> collect.Stats:
    return collect.collect(nn.load(cfg.ckpt), ordered.Ordered(cfg.data, n_imgs=block), cfg.n_images)


@pytest.mark.parametrize("block", [1, 2, 16])
def test_stats_and_top_images_of_a_plain_loop(cfg: config.Visuals, acts_NPD: np.ndarray, block: int) -> None:
    stats = stats_of(cfg, block)
    for s in range(S):
        values = [v for v in acts_NPD[..., s].ravel().tolist() if v > 0]
        assert stats.freq_S[s] == pytest.approx(len(values) / (N * P))
        assert stats.mean_S[s] == pytest.approx(np.mean(values) if values else np.nan, nan_ok=True)
        peaks = [max(0.0, *acts_NPD[n, :, s].tolist()) for n in range(N)]
        top = sorted(range(N), key=lambda n, peaks=peaks: (-peaks[n], n))[:3]
        assert stats.top_image_SK[s].tolist() == top
        assert stats.top_value_SK[s].tolist() == [peaks[n] for n in top]


@pytest.mark.parametrize(
    "sae_cfg",
    [
        nn_config.TopK(d_vit=S, exp_factor=1, top_k=2),
        nn_config.TopK(d_vit=S, exp_factor=1, top_k=S - 1, keep_negative=True),
        nn_config.BatchTopK(d_vit=S, exp_factor=1, top_k=S),
    ],
)
def test_other_architectures_in_any_blocks(
    cfg: config.Visuals, acts_NPD: np.ndarray, sae_cfg: nn_config.Architecture
) -> None:
    """A plain loop over the codes of each image alone."""
    sae = nn.SparseAutoencoder(sae_cfg)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(S))
        sae.threshold.fill_(1.5)
    nn.save(sae, cfg.ckpt)
    sae = nn.load(cfg.ckpt)
    f_NPS = np.stack([sae.encode(torch.from_numpy(acts_PD)).numpy() for acts_PD in acts_NPD])
    for stats in (stats_of(cfg, 1), stats_of(cfg, 5)):
        np.testing.assert_allclose(stats.freq_S, (f_NPS != 0).mean(axis=(0, 1)))
        sizes = np.abs(f_NPS).sum(axis=(0, 1)) / np.maximum((f_NPS != 0).sum(axis=(0, 1)), 1)
        np.testing.assert_allclose(np.nan_to_num(stats.mean_S), sizes, rtol=1e-5)
        for s in range(S):
            peaks = f_NPS[..., s].max(axis=1).tolist()
            top = sorted(range(N), key=lambda n, peaks=peaks: (-peaks[n], n))[:3]
            assert stats.top_image_SK[s].tolist() == top


def test_heat_maps_are_the_codes(cfg: config.Visuals, acts_NPD: np.ndarray) -> None:
    sae, stream = nn.load(cfg.ckpt), ordered.Ordered(cfg.data)
    stats = collect.collect(sae, stream, 3)
    for page in collect._pages(sae, stream, stats, np.arange(S)):
        assert [shown.image_i for shown in page.shown] == [
            n
            for n, value in zip(stats.top_image_SK[page.latent], stats.top_value_SK[page.latent], strict=True)
            if value > 0
        ]
        for shown in page.shown:
            want_P = acts_NPD[shown.image_i, :, page.latent].clip(0)
            np.testing.assert_array_equal(shown.heat_P, want_P)
            assert shown.value == want_P.max()


def test_a_block_of_codes_has_a_bound(cfg: config.Visuals, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = nn.load(cfg.ckpt)
    assert collect._stream(cfg, sae).block == 64
    monkeypatch.setattr(collect.memory, "MAX_CODES", 3 * P * S + 1)
    assert collect._stream(cfg, sae).block == 3
    monkeypatch.setattr(collect.memory, "MAX_CODES", 1)
    assert collect._stream(cfg, sae).block == 1


def test_gallery_is_complete(cfg: config.Visuals) -> None:
    dpath = pathlib.Path(collect.main(cfg))
    page = (dpath / "index.html").read_text()

    class Sources(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [v for k, v in attrs if k in ("src", "href") and v and v[0] != "#"]

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
    heat_HW3 = pixels(fpath)
    plain_HW3 = pixels(dpath / "images" / "000005.png")
    height, width, _ = heat_HW3.shape
    cold_HW3 = heat_HW3[-1, -1]
    changed_HW = np.abs(heat_HW3 - cold_HW3).sum(axis=2)
    y, x = np.argwhere(changed_HW > 0.9 * changed_HW.max()).mean(axis=0)
    assert (y / height, x / width) == (pytest.approx(1.5 / 4, abs=0.06), pytest.approx(2.5 / 4, abs=0.06))
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
    dpath = as_older(pathlib.Path(cfg.data.shard_root))  # whose transform.json has no checksum
    (dpath / "transform.json").write_text(json.dumps(transform))
    dpath = pathlib.Path(collect.main(dataclasses.replace(cfg, latents=(3,))))
    with PIL.Image.open(dpath / "images" / "000005.png") as img:
        assert img.size == (32, 32)


def test_text_is_escaped(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    record = shards.Record("<b>'\".png", "<script>alert(1)</script>")
    gallery = render.Gallery("x&y", "<i>", tmp_path, [record], None, (2, 2))
    page = render.Page(0, 0.1, 1.0, [render.Shown(0, 2.0, np.zeros(4, np.float32))])
    text = render._index(gallery, [page])
    assert (
        "<script" not in text
        and "&lt;script&gt;" in text
        and "<b>'" not in text
        and "<i>" not in text
        and "x&amp;y" in text
    )


def test_a_path_that_is_not_utf8(tmp_path: pathlib.Path) -> None:
    """The dump keeps such names; the page shows the odd byte as text."""
    name = os.fsdecode(b"caf\xe9.png")
    try:
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    except OSError:
        pytest.skip("this file system refuses such names")
    gallery = render.Gallery("x", "y", tmp_path, [shards.Record(name, "")], None, (2, 2))
    page = render.Page(0, 0.1, 1.0, [render.Shown(0, 2.0, np.ones(4, np.float32))])
    render.write(tmp_path / "gallery", gallery, [page])
    assert "caf\\udce9.png" in (tmp_path / "gallery" / "index.html").read_text("utf-8")


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
        collect.choose(dataclasses.replace(cfg, n_latents=2, seed=s), stats).tolist() for s in (0, 0, 1, 2, 3)
    ]
    assert draws[0] == draws[1] and len({tuple(d) for d in draws}) > 1
    with pytest.raises(
        errors.UserError, match=r"Of 3 latents that fire, 90% have log10 frequency .* widen the ranges"
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
        "d_vit 4 instead of 9": {"ckpt": str(tmp_path / "wide.pt")},
        "--images.root is missing": {"images": data_config.ImageFolder()},
        "no such image. Pass the folder that was dumped": {"images": data_config.ImageFolder(str(tmp_path))},
    }
    for match, changes in cases.items():
        with pytest.raises(errors.UserError, match=match):
            collect.main(dataclasses.replace(cfg, **changes))
    with pytest.raises(errors.UserError, match="the first must not exceed the second"):
        dataclasses.replace(cfg, log_freq_range=(0.0, -1.0))


def test_missing_images_are_found_before_the_pass(
    cfg: config.Visuals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = [
        tmp_path / "imgs" / record.path for record in shards.ShardDir.open(cfg.data.shard_root).records[4:6]
    ]
    for fpath in missing:
        fpath.unlink()

    def no_pass(*_: object) -> None:
        raise AssertionError("the pass began")

    with monkeypatch.context() as patch:
        patch.setattr(collect, "collect", no_pass)
        with pytest.raises(errors.UserError, match=f"{missing[0]}: no such image. Pass the folder"):
            collect.main(cfg)
    monkeypatch.setattr(collect, "MAX_CHECKED", 1)  # a large data set: only a sample is looked up
    with pytest.raises(errors.UserError, match=f"{missing[1]}: no such image. Pass the folder"):
        collect.main(dataclasses.replace(cfg, latents=(3,)))
    assert not pathlib.Path(cfg.dump_to).exists()


def test_a_swap_that_fails_brings_the_older_gallery_back(
    cfg: config.Visuals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpath = pathlib.Path(collect.main(cfg))
    before = sorted(p.name for p in tmp_path.iterdir())
    (dpath / "older.txt").write_text("older")
    rename = pathlib.Path.rename

    def fails_for_the_new_one(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if target == dpath and not self.name.endswith(".old"):
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="disk on fire"):
        collect.main(cfg)
    assert (dpath / "older.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_gallery_leaves_nothing_for_long(
    cfg: config.Visuals, tmp_path: pathlib.Path, signum: signal.Signals
) -> None:
    """SIGTERM: at once. SIGKILL: the next command sweeps. Both keep the older gallery until then."""
    code = f"""
import time
from saev import launch
from saev.data import config as data_config
from saev.visuals import collect, config, render
def wait(*args):
    print("there", flush=True)
    time.sleep(60)
render._write_table = wait
launch.entry(lambda: collect.main(config.{cfg!r}))
""".replace("ImageFolder(", "data_config.ImageFolder(").replace("Shards(", "data_config.Shards(")
    code = code.replace("SlurmConfig(", "launch.SlurmConfig(")
    before = sorted(p.name for p in tmp_path.iterdir())
    process = forked.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"there\n"
    process.send_signal(signum)
    process.communicate()
    left = sorted({p.name for p in tmp_path.iterdir()} - set(before))
    assert len(left) == (signum == signal.SIGKILL) and all(n.startswith(".gallery.") for n in left)
    collect.main(cfg)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "gallery"])


def test_a_gallery_says_what_it_shows(cfg: config.Visuals) -> None:
    dpath = pathlib.Path(collect.main(dataclasses.replace(cfg, latents=(3, 0))))
    said = json.loads((dpath / "gallery.json").read_text())
    assert said["latents"] == [0, 3] and said["ckpt"] == cfg.ckpt
    assert said["sha256"] == hashlib.sha256(pathlib.Path(cfg.ckpt).read_bytes()).hexdigest()
    assert len(said["xxh3_128"]) == 32


def test_a_folder_filled_meanwhile_is_kept(cfg: config.Visuals, monkeypatch: pytest.MonkeyPatch) -> None:
    dpath, write_table = pathlib.Path(cfg.dump_to), render._write_table

    def and_fill(*args: object) -> None:
        dpath.mkdir()
        (dpath / "mine.txt").write_text("mine")
        write_table(*args)

    monkeypatch.setattr(render, "_write_table", and_fill)
    with pytest.raises(errors.UserError, match="exists and is not a gallery"):
        collect.main(cfg)
    assert [p.name for p in dpath.iterdir()] == ["mine.txt"]


def test_a_table_alone_does_not_make_a_gallery(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "latents.csv").write_text("my own table")
    with pytest.raises(errors.UserError, match="exists and is not a gallery"):
        render.check_target(tmp_path / "mine")
    with pytest.raises(errors.UserError, match="cannot be created"):
        render.check_target(tmp_path / "mine" / "latents.csv" / "gallery")


def test_grid() -> None:
    assert render.grid(16, None) == (4, 4)
    assert render.grid(8, (28, 56)) == (2, 4)
    assert render.grid(729, (384, 384)) == (27, 27)  # 384 / 14 is not whole
    with pytest.raises(errors.UserError, match="6 patches do not form a grid on a square input"):
        render.grid(6, None)
    with pytest.raises(errors.UserError, match="6 patches do not form a grid on an input of 32 x 32"):
        render.grid(6, (32, 32))


def test_a_wide_grid_is_drawn_in_raster_order(cfg: config.Visuals, tmp_path: pathlib.Path) -> None:
    """16 patches on an input of 2 x 8: patch 6 is row 0, column 6."""
    transform = images.Transform((16, 64), 64, True, "bicubic", (0.5,), (0.5,))
    fpath = as_older(pathlib.Path(cfg.data.shard_root)) / "transform.json"
    fpath.write_text(json.dumps(transform.to_dict()))
    dpath = pathlib.Path(collect.main(dataclasses.replace(cfg, latents=(3,))))
    heat_HW3 = pixels(dpath / "latent_000003" / "00_000005.png")
    assert heat_HW3.shape == (16, 64, 3)
    changed_HW = np.abs(heat_HW3 - heat_HW3[-1, 0]).sum(axis=2)
    ys, xs = np.nonzero(changed_HW > 0.9 * changed_HW.max())
    assert ys.max() < 8 and xs.min() >= 48 and xs.max() < 56


def test_overlay_is_the_formula_at_patch_centres() -> None:
    """On black nothing but the colour map is left: 255 * opacity * sqrt(heat) * colour(heat)."""
    heat_YX = np.linspace(0, 1, 9, dtype=np.float32).reshape(3, 3)
    img = render.overlay(PIL.Image.new("RGB", (45, 45)), heat_YX)
    for (y, x), heat in np.ndenumerate(heat_YX):
        want_3 = 255 * render.OPACITY * heat**0.5 * np.array(render.COLORS(float(heat))[:3])
        np.testing.assert_allclose(img.getpixel((15 * x + 7, 15 * y + 7)), want_3, atol=2)


def test_images_of_a_latent_share_a_scale(tmp_path: pathlib.Path) -> None:
    """The same patch at a quarter of the latent's maximum gets the colour of 0.25."""
    records = [shards.Record(f"{i}.png", "") for i in range(2)]
    for record in records:
        PIL.Image.new("RGB", (32, 32)).save(tmp_path / record.path)
    gallery = render.Gallery("x", "y", tmp_path, records, None, (1, 1))
    heats = [render.Shown(i, v, np.array([v], np.float32)) for i, v in enumerate((8.0, 2.0))]
    render.write(tmp_path / "gallery", gallery, [render.Page(7, 0.1, 1.0, heats)])
    for rank, heat in enumerate((1.0, 0.25)):
        got_HW3 = pixels(tmp_path / "gallery" / "latent_000007" / f"{rank:02}_00000{rank}.png")
        want_3 = 255 * render.OPACITY * heat**0.5 * np.array(render.COLORS(heat)[:3])
        np.testing.assert_allclose(got_HW3[16, 16], want_3, atol=4)


def test_shapes_are_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        render.overlay(PIL.Image.new("RGB", (8, 8)), np.zeros(6, np.float32))
