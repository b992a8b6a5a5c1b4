"""The matches in a gallery's data/compare.js, read back. P patches of an image, S latents."""

import dataclasses
import pathlib

import numpy as np
import polars as pl
import pytest
import torch

from saev import errors, helpers, nn
from saev.compare import config, gallery, run
from saev.data import config as data_config
from saev.formats import gallery as gallery_format
from saev.formats import scripts
from saev.nn import config as nn_config

N, P, D, S = 12, 4, 6, 12


def made_gallery(
    dpath: pathlib.Path, ckpt: pathlib.Path, ids: list[int], images: list[int], grid=(2, 2), size=(28, 28)
) -> None:
    """The files that are read, as docs/gallery.md has them. Latent s fires on the s % n-th of the gallery's images.

    A picture is the gallery's name and the image's number.
    """
    source = {"vit": "a ViT", "layer": 3, "n_patches": P, "grid": list(grid), "size": list(size)}
    stats = {
        "format": gallery_format.FORMAT,
        "title": dpath.name,
        "scorer": {"name": "x", "noun": "latent", "n": S, "sha256": helpers.hash_file(ckpt)},
        "source": source,
        "files": {"latents": 5, "images": 4, "n_images": len(images), "codes": 1, "n_codes": 0},
        "classes": sorted({f"class{n % 3}" for n in images}),
        "columns": {"id": scripts.packed(ids, "u4")},
    }
    scripts.write(dpath, "stats", stats)
    latents = []
    for s in ids:
        top = {"name": "top", "words": "largest", "image": scripts.packed([s % len(images), 0], "u4")}
        top |= {"value": scripts.packed([s + 0.5, 0.25], "f4"), "start": scripts.packed([0, 2, 3], "u4")}
        top |= {"patch": scripts.packed([1, 3, 2], "u2"), "heat": scripts.packed([s, 255, 9], "u1")}
        latents.append({"low": 0.0, "high": s + 1.0, "groups": [{**top, "name": "q1"}, top]})
    for i in range(0, len(ids), 5):
        scripts.write(dpath, f"latents/{i // 5:03}", {"latents": latents[i : i + 5]})
    paths = [f"class{n % 3}/{n:04}.jpg" for n in images]
    numbers = scripts.packed(images, "u4")
    scripts.write(dpath, "paths", {"path": paths, "class": scripts.packed(images, "i4"), "n": numbers})
    places = [stats["classes"].index(f"class{n % 3}") for n in images]
    found = [
        {"n": n, "path": path, "class": place, "src": f"{dpath.name} {n}"}
        for n, path, place in zip(images, paths, places, strict=True)
    ]
    for i in range(0, len(found), 4):
        scripts.write(dpath, f"images/{i // 4:03}", {"images": found[i : i + 4]})


THEIRS, OURS = [0, 1, 3, 4, 5, 6, 7, 8, 9, 11], [1, 3, 4, 6, 7, 9, 11]


@pytest.fixture
def cfg(make_shards, tmp_path: pathlib.Path) -> config.Compare:
    """b is a with its latents reversed. Their galleries show some latents and some images."""
    dpath, _ = make_shards(n_imgs=N, n_patches=P, d_vit=D, layers=(3,))
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=2))
    nn.save(sae, tmp_path / "a" / "sae.pt")
    with torch.no_grad():
        for weights in (sae.W_enc, sae.W_dec.T):
            weights.copy_(weights.flip(1).clone())
    nn.save(sae, tmp_path / "b" / "sae.pt")
    made_gallery(tmp_path / "g a", tmp_path / "a" / "sae.pt", [0, 2, 5, 11], OURS)
    made_gallery(tmp_path / "g b", tmp_path / "b" / "sae.pt", list(range(1, S)), THEIRS)
    return config.Compare(
        scorer=str(tmp_path / "a" / "sae.pt"),
        other=str(tmp_path / "b" / "sae.pt"),
        data=data_config.Shards(str(dpath), 3),
        gallery=str(tmp_path / "g a"),
        other_gallery=str(tmp_path / "g b"),
        dump_to=str(tmp_path / "out"),
        device="cpu",
    )


def test_columns_and_pictures(cfg: config.Compare) -> None:
    out = run.main(cfg)
    mine = pathlib.Path(cfg.gallery)
    found = scripts.read(mine, "compare", "")
    columns = {name: scripts.unpacked(v, "", "").tolist() for name, v in found["columns"].items()}
    assert columns["id"] == [0, 2, 5, 11]
    for name in ("best", "pair", "cos_best"):
        assert columns[name] == [S - 1 - s for s in columns["id"]]
    assert columns["mutual"] == [1] * 4
    np.testing.assert_allclose([columns[name] for name in ("corr", "pair_corr", "cos")], 1, atol=1e-5)
    assert found["other"]["title"] == "g b" and found["other"]["href"] == "../g%20b/index.html"
    assert found["method"]["n_images"] == N and found["method"]["n_patches"] == N * P
    assert found["method"]["one_space"] is True
    curve = {name: scripts.unpacked(v, "", "") for name, v in found["curve"].items()}
    table = pl.read_csv(pathlib.Path(out) / "curve.csv")
    for name, column in (("threshold", "threshold"), ("share", "share_one"), ("null", "null_one")):
        np.testing.assert_allclose(curve[name], table[column], rtol=1e-6)
    null = scripts.unpacked(found["null"]["corr"], "", "")
    want = (
        pl.read_parquet(pathlib.Path(out) / "matches.parquet").filter("is_live", of="one")["null_corr"].sort()
    )
    np.testing.assert_allclose(null, want, rtol=1e-6)
    check_pictures(mine, own=OURS)


def check_pictures(mine: pathlib.Path, own: list[int], theirs: list[int] = THEIRS) -> None:
    """Of latents 11, 9, 6 and 0 of the other one; the last is not in its gallery.

    own: the images whose picture is the first gallery's. The others are copied.
    """
    n_copied = scripts.read(mine, "compare", "")["files"]["n_images"]
    files = sorted((mine / "data" / "compare" / "images").iterdir())
    copied = [x for f in files for x in scripts.read(mine, f"compare/images/{f.stem}", "")["images"]]
    assert len(copied) == n_copied and len({image["path"] for image in copied}) == n_copied
    latents = scripts.read(mine, "compare/000", "")["latents"]
    assert [latent["id"] for latent in latents] == [11, 9, 6, 0] and latents[3]["groups"] == []
    for latent, s in zip(latents[:3], (11, 9, 6), strict=True):
        pairs = [(theirs[s % len(theirs)], [(1, s), (3, 255)], s + 0.5), (theirs[0], [(2, 9)], 0.25)]
        (group,) = latent["groups"]
        got = {k: scripts.unpacked(v, "", "") for k, v in group.items() if k not in ("name", "words")}
        assert latent["high"] == s + 1 and group["name"] == "top"
        for place, (n, _, _) in zip(got["image"].tolist(), pairs, strict=True):
            if n in own:
                assert place == OURS.index(n)
                continue
            name = f"class{n % 3}"
            assert copied[place - len(OURS)] == {
                "n": n if n in OURS else -1,
                "path": f"{name}/{n:04}.jpg",
                "class": ["class0", "class1", "class2"].index(name),
                "src": f"g b {n}",
            }
        assert got["value"].tolist() == [pair[2] for pair in pairs]
        for k, (_, heat, _) in enumerate(pairs):
            part = slice(got["start"][k], got["start"][k + 1])
            assert list(zip(got["patch"][part], got["heat"][part], strict=True)) == heat


def test_without_the_other_gallery(cfg: config.Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also several files of latents; and a second comparison replaces the first."""
    run.main(cfg)
    monkeypatch.setattr(gallery, "PER_FILE", 3)
    run.main(dataclasses.replace(cfg, other_gallery=""))
    mine = pathlib.Path(cfg.gallery)
    found = scripts.read(mine, "compare", "")
    assert found["other"]["href"] == "" and found["other"]["title"] == "b" and found["files"]["compare"] == 3
    assert found["other"]["scorer"]["noun"] == "latent" and found["other"]["source"]["layer"] == 3
    latents = [x for i in range(2) for x in scripts.read(mine, f"compare/{i:03}", "")["latents"]]
    assert [latent["id"] for latent in latents] == [11, 9, 6, 0]
    assert not any(latent["groups"] for latent in latents)


def test_another_grid(cfg: config.Compare, tmp_path: pathlib.Path) -> None:
    """Pictures of the same part of the photos are shared; others are copied."""
    mine = pathlib.Path(cfg.gallery)
    made_gallery(tmp_path / "g b", tmp_path / "b" / "sae.pt", list(range(1, S)), THEIRS, grid=(1, 4))
    run.main(cfg)
    check_pictures(mine, own=OURS)
    assert scripts.read(mine, "compare", "")["other"]["source"]["grid"] == [1, 4]


def test_pictures_of_another_part_of_the_photos_are_copied(
    cfg: config.Compare, tmp_path: pathlib.Path, make_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "PER_FILE", 4)
    transform = {
        "resize": 32,
        "squash": False,
        "interpolation": "bicubic",
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }
    dumps = [
        make_shards(
            n_imgs=N,
            n_patches=P,
            d_vit=D,
            layers=(3,),
            transform={**transform, "size": [size, size]},
            seed=size,
        )[0]
        for size in (28, 30)
    ]
    for name, size, images in (("g a", 28, OURS), ("g b", 30, THEIRS)):
        ids = list(range(1, S)) if name == "g b" else [0, 2, 5, 11]
        made_gallery(tmp_path / name, tmp_path / name[-1] / "sae.pt", ids, images, size=(size, size))
    datas = [data_config.Shards(str(dpath), 3) for dpath in dumps]
    run.main(dataclasses.replace(cfg, data=datas[0], other_data=datas[1]))
    mine = pathlib.Path(cfg.gallery)
    found = scripts.read(mine, "compare", "")
    latents = scripts.read(mine, "compare/000", "")["latents"]
    places = {i for x in latents for g in x["groups"] for i in scripts.unpacked(g["image"], "", "").tolist()}
    assert places and min(places) >= len(OURS) and len(places) == found["files"]["n_images"]
    for i in range(found["files"]["n_images"]):
        image = scripts.read(mine, f"compare/images/{i // 4:03}", "")["images"][i % 4]
        assert image["src"] == f"g b {int(image['path'][-8:-4])}"


def test_a_gallery_of_an_older_version_is_refused(cfg: config.Compare) -> None:
    mine = pathlib.Path(cfg.gallery)
    stats = scripts.read(mine, "stats", "")
    scripts.write(mine, "stats", stats | {"format": 1})
    with pytest.raises(
        errors.UserError, match=r"--gallery .*: an older version made it.* Run visuals.py again\.$"
    ):
        run.main(cfg)


def test_a_wrong_gallery_is_refused_before_the_pass(cfg: config.Compare, tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match="--gallery .*: shows another dictionary"):
        run.main(dataclasses.replace(cfg, gallery=cfg.other_gallery))
    with pytest.raises(errors.UserError, match="none/data/stats.js: no such file. Pass a gallery of"):
        run.main(dataclasses.replace(cfg, gallery=str(tmp_path / "none")))
    fpath = tmp_path / "g b" / "data" / "stats.js"
    text, stats = fpath.read_text(), scripts.read(tmp_path / "g b", "stats", "")
    scripts.write(tmp_path / "g b", "stats", stats | {"scorer": {"name": "x"}})
    other = fpath.read_text()
    scripts.write(tmp_path / "g b", "stats", {k: v for k, v in stats.items() if k != "scorer"})
    for damaged, message in (
        (text[:-3], "not a gallery's data file"),
        (text.replace("a ViT", "b ViT"), "was changed after it was written"),
        (other, "shows another dictionary"),
        (fpath.read_text(), "scorer"),
    ):
        fpath.write_text(damaged)
        with pytest.raises(errors.UserError, match=message) as err:
            run.main(cfg)
        assert "\n" not in str(err.value)
    assert not (tmp_path / "out").exists()


def test_a_gallery_of_units_is_known_by_its_vit_and_layer(
    cfg: config.Compare, tmp_path: pathlib.Path
) -> None:
    """Its sha256 is not that of a file. Without a gallery, the units are named."""
    given = dataclasses.replace(cfg, other="units", other_gallery=str(tmp_path / "g u"))
    made_gallery(tmp_path / "g u", tmp_path / "a" / "sae.pt", list(range(D)), [1, 3])
    stats = scripts.read(tmp_path / "g u", "stats", "")
    stats["scorer"]["kind"] = "units"
    scripts.write(tmp_path / "g u", "stats", stats)
    with pytest.raises(errors.UserError, match="shows another dictionary. Pass a gallery of units"):
        run.main(given)
    stats["source"]["vit"] = "made-up"
    scripts.write(tmp_path / "g u", "stats", stats)
    run.main(given)
    found = scripts.read(pathlib.Path(cfg.gallery), "compare", "")
    assert found["other"]["scorer"]["kind"] == "units" and found["other"]["href"]
    assert any(one["groups"] for one in scripts.read(pathlib.Path(cfg.gallery), "compare/000", "")["latents"])
    run.main(dataclasses.replace(given, other_gallery=""))
    other = scripts.read(pathlib.Path(cfg.gallery), "compare", "")["other"]
    assert (other["scorer"]["noun"], other["title"], other["scorer"]["ckpt"]) == ("unit", "units", "")
