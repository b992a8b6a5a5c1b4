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
from saev.formats import scripts
from saev.nn import config as nn_config

N, P, D, S = 12, 4, 6, 12


def made_gallery(
    dpath: pathlib.Path, ckpt: pathlib.Path, ids: list[int], images: list[int], grid=(2, 2)
) -> None:
    """The files that are read, as docs/gallery.md has them. Latent s fires on the s % n-th of the gallery's images."""
    source = {"vit": "a ViT", "layer": 3, "n_patches": P, "grid": list(grid), "size": [28, 28]}
    stats = {
        "format": 1,
        "title": dpath.name,
        "scorer": {"name": "x", "noun": "latent", "n": S, "sha256": helpers.hash_file(ckpt)},
        "source": source,
        "files": {"latents": 5, "images": 4, "n_images": len(images), "codes": 1, "n_codes": 0},
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
    paths = {"path": [f"class{n % 3}/{n:04}.jpg" for n in images], "class": scripts.packed(images, "i4")}
    scripts.write(dpath, "paths", paths)


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
    made_gallery(tmp_path / "g a", tmp_path / "a" / "sae.pt", [0, 2, 5, 11], [1, 3, 4, 6, 7, 9, 11])
    made_gallery(
        tmp_path / "g b", tmp_path / "b" / "sae.pt", list(range(1, S)), [0, 1, 3, 4, 5, 6, 7, 8, 9, 11]
    )
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
    # pictures: of latents 11, 9, 6 and 0 of the other one; the last has no place in its gallery
    latents = scripts.read(mine, "compare/000", "")["latents"]
    assert [latent["id"] for latent in latents] == [11, 9, 6, 0] and latents[3]["groups"] == []
    theirs, ours = [0, 1, 3, 4, 5, 6, 7, 8, 9, 11], [1, 3, 4, 6, 7, 9, 11]
    for latent, s in zip(latents[:3], (11, 9, 6), strict=True):
        pairs = [(theirs[s % 10], [(1, s), (3, 255)], s + 0.5), (theirs[0], [(2, 9)], 0.25)]
        pairs = [pair for pair in pairs if pair[0] in ours]
        assert latent["high"] == s + 1 and len(latent["groups"]) == bool(pairs)
        for group in latent["groups"]:
            got = {k: scripts.unpacked(v, "", "") for k, v in group.items() if k not in ("name", "words")}
            assert group["name"] == "top" and [ours[i] for i in got["image"]] == [pair[0] for pair in pairs]
            assert got["value"].tolist() == [pair[2] for pair in pairs]
            for k, (_, heat, _) in enumerate(pairs):
                part = slice(got["start"][k], got["start"][k + 1])
                assert list(zip(got["patch"][part], got["heat"][part], strict=True)) == heat
    assert latents[0]["groups"] and "those that this gallery has" in found["method"]["words"]


def test_without_the_other_gallery(cfg: config.Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also several files of latents; and a second comparison replaces the first."""
    run.main(cfg)
    monkeypatch.setattr(gallery, "PER_FILE", 3)
    run.main(dataclasses.replace(cfg, other_gallery=""))
    mine = pathlib.Path(cfg.gallery)
    found = scripts.read(mine, "compare", "")
    assert (
        found["other"]["href"] == "" and found["other"]["title"] == "b" and found["files"] == {"compare": 3}
    )
    assert found["other"]["scorer"]["noun"] == "latent" and found["other"]["source"]["layer"] == 3
    latents = [x for i in range(2) for x in scripts.read(mine, f"compare/{i:03}", "")["latents"]]
    assert [latent["id"] for latent in latents] == [11, 9, 6, 0]
    assert not any(latent["groups"] for latent in latents)


def test_another_grid_has_no_pictures(cfg: config.Compare, tmp_path: pathlib.Path) -> None:
    made_gallery(tmp_path / "g b", tmp_path / "b" / "sae.pt", [11], [0, 1], grid=(1, 4))
    run.main(cfg)
    mine = pathlib.Path(cfg.gallery)
    assert "another grid" in scripts.read(mine, "compare", "")["method"]["words"]
    assert scripts.read(mine, "compare/000", "")["latents"][0]["groups"] == []


def test_a_wrong_gallery_is_refused_before_the_pass(cfg: config.Compare, tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match="--gallery .*: shows another dictionary"):
        run.main(dataclasses.replace(cfg, gallery=cfg.other_gallery))
    with pytest.raises(errors.UserError, match="none/data/stats.js: no such file. Pass a gallery of"):
        run.main(dataclasses.replace(cfg, gallery=str(tmp_path / "none")))
    stats = tmp_path / "g b" / "data" / "stats.js"
    text = stats.read_text()
    for damaged, message in (
        (text[:-3], "not a gallery's data file"),
        (text.replace('"sha256"', '"x"'), "shows another dictionary"),
        (text.replace('"scorer"', '"x"'), "scorer"),
    ):
        stats.write_text(damaged)
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
    fpath = tmp_path / "g u" / "data" / "stats.js"
    text = fpath.read_text().replace('"name":"x"', '"kind":"units"')
    fpath.write_text(text)
    with pytest.raises(errors.UserError, match="shows another dictionary. Pass a gallery of units"):
        run.main(given)
    fpath.write_text(text.replace('"a ViT"', '"made-up"'))
    run.main(given)
    found = scripts.read(pathlib.Path(cfg.gallery), "compare", "")
    assert found["other"]["scorer"]["kind"] == "units" and found["other"]["href"]
    assert any(one["groups"] for one in scripts.read(pathlib.Path(cfg.gallery), "compare/000", "")["latents"])
    run.main(dataclasses.replace(given, other_gallery=""))
    other = scripts.read(pathlib.Path(cfg.gallery), "compare", "")["other"]
    assert (other["scorer"]["noun"], other["title"], other["scorer"]["ckpt"]) == ("unit", "units", "")
