"""The traits that `protoeval.py --gallery` writes, against plain loops. N images, P patches, T traits, K prototypes."""

import collections
import dataclasses
import pathlib
import shutil
import signal
import sys

import forked
import gallery_files
import numpy as np
import polars as pl
import pytest
import sklearn.metrics
import torch
import traits_data

from saev import errors, nn, scorers, sweeps
from saev.data.traits import config as traits_config
from saev.formats import manifest, patchlabels, scripts, shards
from saev.formats import results as results_format
from saev.protoeval import audit, choose, config, examples, run
from saev.scorers import config as scorers_config
from saev.visuals import collect
from saev.visuals import config as visuals_config

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = pathlib.Path(__file__).parent.parent
TRAIN, TEST = np.flatnonzero(traits_data.IS_TRAIN_N), np.flatnonzero(~traits_data.IS_TRAIN_N)
K = 12
ap_of = sklearn.metrics.average_precision_score


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> traits_data.Made:
    """With traits. Tests do not change it. Galleries leave the rows of several prototypes out."""
    made = traits_data.make(tmp_path_factory.mktemp("traits"), several=(2,), key_depth=2)
    run.main(made.cfgs)
    return made


@pytest.fixture
def copy(made: traits_data.Made, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of its gallery."""
    return pathlib.Path(shutil.copytree(made.gallery, tmp_path / "gallery"))


def results_of(made: traits_data.Made) -> pathlib.Path:
    (out,) = (p for p in (made.root / "results").iterdir() if p.is_dir())
    return out


def patch_scores(made: traits_data.Made, name: str) -> np.ndarray:
    """(N, P, K) of a scorer's first K prototypes, by its saved file."""
    if name.startswith("Sae"):
        return traits_data.codes(made.acts_NPD)[:, :, :K]
    (fpath,) = (made.root / "scorers").glob(f"{name.lower()}-{K}-*.bin")
    scorer = scorers.load(fpath)
    x_XD = torch.from_numpy(made.acts_NPD.reshape(-1, traits_data.D))
    return scorer(x_XD).numpy().reshape(traits_data.N, traits_data.P, K)


def pictures_of(dpath: pathlib.Path, value: dict) -> list[list[dict]]:
    folder, n = value["files"]["folder"], -(-len(value["traits"]) // value["files"]["traits"])
    return [one for i in range(n) for one in gallery_files.load(dpath, f"{folder}/{i:03}")["traits"]]


def images_of(dpath: pathlib.Path, value: dict) -> list[dict]:
    files = value["files"]
    n = -(-files["n_images"] // files["images"])
    return [
        one
        for i in range(n)
        for one in gallery_files.load(dpath, f"{files['folder']}/images/{i:03}")["images"]
    ]


def test_each_directory_is_opened_once_with_all_tables(
    tmp_path: pathlib.Path, opened: collections.Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four scorers, one of them fitted on other activations, with --gallery, --several, --key-depth, --audit
    and --patch-labels."""
    monkeypatch.setattr(audit, "N_NULL", 1)
    more = {"several": (2,), "key_depth": 1, "audit": (2, 4), "patch_labels": "labels.bin"}
    made = traits_data.make(tmp_path, **more)
    shard_root = made.cfgs[0].train_data.shard_root
    id_NP = np.random.default_rng(3).integers(0, 5, (traits_data.N, traits_data.P))
    names = {part: f"part{part}" for part in range(5)}
    patchlabels.write(shards.ShardDir.open(shard_root), "", id_NP, names, {})
    other_root = traits_data.dump(tmp_path / "other", made.acts_NPD + 1)
    fit_data = dataclasses.replace(made.cfgs[0].train_data, shard_root=other_root)
    pca = dataclasses.replace(
        made.cfgs[0], scorer=scorers_config.Pca(), n_prototypes=(4, 8), fit_data=fit_data
    )
    opened.clear()
    out = pathlib.Path(run.main([*made.cfgs, pca]))
    assert all((out / name).exists() for name in ("patches.md", "audit.md", "weights.parquet", "keys.md"))
    assert (made.gallery / "data" / "traits.js").exists()
    assert [opened[name] for name in (shard_root, other_root)] == [1, 1]
    assert opened["images.jsonl"] == 2  # one of each directory


# ---- what is written ----


def test_every_trait_has_each_scorers_best_prototype(made: traits_data.Made) -> None:
    value, labels_NT = gallery_files.load(made.gallery, "traits"), traits_data.labels()
    assert [s["name"] for s in value["scorers"]] == ["Sae run", "Random", "KMeans"]
    assert [(s["noun"], s["here"], s["n"]) for s in value["scorers"]] == [
        ("latent", True, K),
        ("prototype", False, K),
        ("prototype", False, K),
    ]
    assert "first 12 of 16 latents" in value["settings"]["words"] and value["settings"]["n_train"] == len(
        TRAIN
    )
    rows = gallery_files.load(made.gallery, "stats")["columns"]["id"].tolist()
    assert [trait["name"] for trait in value["traits"]] == traits_data.NAMES
    image_scores = [patch_scores(made, scorer["name"]).max(axis=1) for scorer in value["scorers"]]
    for t, trait in enumerate(value["traits"]):
        seen, y = labels_NT[TRAIN, t], labels_NT[TEST, t]
        assert trait["prevalence"] == pytest.approx(y.mean()) and trait["n_test"] == len(TEST)
        assert [best["scorer"] for best in trait["best"]] == ([0, 1, 2] if seen.any() else [])
        for best, scores_NK in zip(trait["best"], image_scores, strict=False):
            aps = [ap_of(seen, scores_NK[TRAIN, k]) for k in range(K)]
            k = int(np.argmax(np.round(aps, 12)))
            assert best["prototype"] == k and best["train_ap"] == pytest.approx(aps[k])
            assert best["test_ap"] == pytest.approx(ap_of(y, scores_NK[TEST, k]))
            assert best["row"] == (rows.index(k) if best["scorer"] == 0 else -1)


def test_pictures_are_the_test_images_with_the_highest_scores(made: traits_data.Made) -> None:
    value, labels_NT = gallery_files.load(made.gallery, "traits"), traits_data.labels()
    images, n_seen = images_of(made.gallery, value), 0
    scores = [patch_scores(made, scorer["name"]) for scorer in value["scorers"]]
    for t, entries in enumerate(pictures_of(made.gallery, value)):
        best = value["traits"][t]["best"]
        assert [entry["scorer"] for entry in entries] == [b["scorer"] for b in best]
        for entry, of_trait in zip(entries, best, strict=True):
            score_NP = scores[entry["scorer"]][:, :, of_trait["prototype"]]
            top_N = score_NP.max(axis=1)
            want = sorted(TEST, key=lambda n: (-top_N[n], n))[: examples.N_IMAGES]
            want = [n for n in want if top_N[n] > top_N[TEST].min()]
            assert [images[i]["path"] for i in entry["image"]] == [traits_data.PATHS[n] for n in want]
            np.testing.assert_allclose(entry["value"], top_N[want], rtol=1e-5)
            assert entry["right"].tolist() == labels_NT[want, t].tolist()
            low = 0 if entry["scorer"] == 0 else score_NP[want].mean()
            high = score_NP[want].max()
            assert (entry["low"], entry["high"]) == pytest.approx((low, high), abs=1e-5)
            for i, n in enumerate(want):
                heat_P = gallery_files.heat(entry, i, traits_data.P)
                clear_P = 255 * (score_NP[n] - low) / (high - low)
                np.testing.assert_allclose(heat_P, clear_P.clip(0, 255), atol=0.51)
            n_seen += len(want)
    assert n_seen > 80
    labels_of = dict(zip(traits_data.PATHS, np.arange(traits_data.N), strict=True))
    shown = {image["n"]: image["path"] for image in gallery_files.images(made.gallery)}
    assert len(shown) < traits_data.N  # of the others too there are pictures
    for image in images:
        n = labels_of[image["path"]]
        assert image["n"] == (n if n in shown else -1) and image["class"] == n % 3
        assert image["src"].startswith("data:image/webp;base64,")
    assert {image["n"] >= 0 for image in images} == {True, False}
    assert len({image["path"] for image in images}) == len(images)


def test_each_latents_traits_are_those_with_the_largest_ap_above_prevalence(made: traits_data.Made) -> None:
    value, labels_NT = gallery_files.load(made.gallery, "traits"), traits_data.labels()
    top_NK = patch_scores(made, "Sae run").max(axis=1)
    ids = gallery_files.load(made.gallery, "stats")["columns"]["id"].tolist()
    trait_CF, ap_CF = value["columns"]["trait"], value["columns"]["ap"]
    n_traits = len(traits_data.NAMES)
    assert len(trait_CF) == len(ids) and trait_CF.shape == ap_CF.shape == (len(ids), 8)
    for row, latent in enumerate(ids):
        want = []
        for t in range(n_traits if latent < K else 0):
            seen = labels_NT[TRAIN, t]
            ap = ap_of(seen, top_NK[TRAIN, latent]) if seen.any() else np.nan
            if ap > seen.mean() + 1e-12:
                want.append((-(ap - seen.mean()), t, ap))
        found = trait_CF[row][trait_CF[row] >= 0]
        assert found.tolist() == [t for _, t, _ in sorted(want)]
        np.testing.assert_allclose(ap_CF[row, : len(found)], [ap for *_, ap in sorted(want)], rtol=1e-6)
        assert np.isnan(ap_CF[row, len(found) :]).all()
    assert trait_CF[0, 0] == 0  # the planted one, although most images have another trait


def test_favourites_leave_out_what_is_no_better_than_chance() -> None:
    ap_CT = np.array([[0.9, 0.5, np.nan, 0.3], [0.8, 0.2, np.nan, 0.1]])
    found = choose.favourites(ap_CT, np.array([0.8, 0.2, 0.0, 0.1]))
    assert found.trait_KF.tolist() == [[1, 3, 0, -1], [-1] * 4]
    np.testing.assert_array_equal(found.train_ap_KF, [[0.5, 0.3, 0.9, np.nan], [np.nan] * 4])


def test_highest_scores_without_the_lowest() -> None:
    scores_N = np.array([0, 3, 0, 1, 3, 0], np.float32)
    assert examples.highest(scores_N).tolist() == [1, 4, 3]
    known_N = np.array([True, False, True, True, True, False])
    assert examples.highest(scores_N, known_N).tolist() == [4, 3]
    assert examples.highest(np.zeros(5, np.float32)).tolist() == []
    assert examples.highest(-np.arange(20, dtype=np.float32)).tolist() == list(range(examples.N_IMAGES))


def test_frames_of_the_results(made: traits_data.Made) -> None:
    out = results_of(made)
    for name, schema in (
        ("prototypes.parquet", results_format.FAVOURITES),
        ("retrieved.parquet", results_format.RETRIEVED),
    ):
        frame = pl.read_parquet(out / name)
        assert dict(frame.schema) == schema
        # k-means is fitted for each K; the others have the largest K only
        sizes = frame.group_by("scorer").agg(pl.col("n_prototypes").unique().sort()).rows()
        assert dict(sizes) == {"Sae run": [12], "Random": [12], "KMeans": [4, 12]}
        assert set(frame["n_train"]) == {len(TRAIN)}
        manifest.read(out, [name], "")


# ---- which gallery ----


def test_a_gallery_of_prototypes(made: traits_data.Made, tmp_path: pathlib.Path) -> None:
    """Of k-means with the smaller K, whose own cell is shown."""
    (fpath,) = (made.root / "scorers").glob("kmeans-4-*.bin")
    shown = dataclasses.replace(
        made.visuals, ckpt="", scorer=visuals_config.Fitted(str(fpath)), dump_to=str(tmp_path / "prototypes")
    )
    collect.main(shown)
    out = run.main([dataclasses.replace(cfg, gallery=shown.dump_to) for cfg in made.cfgs])
    value = gallery_files.load(shown.dump_to, "traits")
    assert [(s["name"], s["noun"], s["here"], s["n"]) for s in value["scorers"]] == [
        ("KMeans", "prototype", True, 4),
        ("Random", "prototype", False, K),
        ("Sae run", "latent", False, K),
    ]
    for trait in value["traits"][:4]:
        assert trait["best"][0]["row"] == trait["best"][0]["prototype"] < 4
    text = (pathlib.Path(out) / "traits.md").read_text()
    assert "Best prototypes of KMeans" in text and "| Prototype |" in text
    assert (value["columns"]["trait"][:, 0] >= 0).any()


def test_a_gallery_of_another_scorer_is_refused(
    made: traits_data.Made, copy: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def fails(match: str, *cfgs: config.ProtoEval) -> None:
        new = {"gallery": str(copy), "dump_to": str(tmp_path / "new")}
        with pytest.raises(errors.UserError, match=match):
            run.main([dataclasses.replace(cfg, **new) for cfg in cfgs])

    random, _, kmeans = made.cfgs
    fails("shows another scorer than those that are evaluated", random, kmeans)
    fails(r"gone\.pt: no such checkpoint", dataclasses.replace(random, scorer=scorers_config.Sae("gone.pt")))
    (copy / "gallery.json").unlink()
    fails(r"has no gallery\.json", *made.cfgs)
    assert not (tmp_path / "new").exists()


def test_latents_that_the_gallery_lacks(made: traits_data.Made, tmp_path: pathlib.Path) -> None:
    shown = dataclasses.replace(made.visuals, dump_to=str(tmp_path / "few"), include_latents=(14, 1))
    collect.main(shown)
    run.main([dataclasses.replace(cfg, gallery=shown.dump_to) for cfg in made.cfgs])
    value = gallery_files.load(shown.dump_to, "traits")
    rows = {trait["best"][0]["prototype"]: trait["best"][0]["row"] for trait in value["traits"][:4]}
    assert rows.pop(1) == 0 and set(rows.values()) == {-1}
    assert value["columns"]["trait"][0, 0] == 1
    assert value["columns"]["trait"][1].tolist() == [-1] * 8  # latent 14 took no part


def test_another_grid_or_a_missing_photo_is_refused_before_the_pass(
    made: traits_data.Made, copy: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    new = {"dump_to": str(tmp_path / "new"), "gallery": str(copy)}
    cfgs = [dataclasses.replace(cfg, **new) for cfg in made.cfgs]
    stats = scripts.read(copy, "stats", "")
    source = stats["source"]
    assert (source["grid"], source["size"]) == ([2, 2], [224, 224])
    for wrong in ({"grid": [1, 4]}, {"size": [224, 448]}):
        scripts.write(copy, "stats", stats | {"source": source | wrong})
        with pytest.raises(errors.UserError, match="Pass a gallery of images of this shape"):
            run.main(cfgs)
    no_grid = {key: value for key, value in source.items() if key != "grid"}
    scripts.write(copy, "stats", stats | {"source": no_grid})
    with pytest.raises(errors.UserError, match=r"stats\.js: cannot be read .*Run visuals\.py again\.$"):
        run.main(cfgs)
    fpath = copy / "data" / "stats.js"
    fpath.write_text(fpath.read_text().replace('"layer":', '"layer": '))
    with pytest.raises(errors.UserError, match=r"stats\.js: was changed .*Run visuals\.py again\.$"):
        run.main(cfgs)
    scripts.write(copy, "stats", stats)
    alone = tmp_path / "CUB"
    shutil.copytree(made.root / "CUB", alone)
    gone = alone / "images" / traits_data.PATHS[TEST[3]]
    gone.unlink()
    with pytest.raises(errors.UserError, match=f"{gone}: no such image"):
        run.main([dataclasses.replace(cfg, cub_root=str(alone)) for cfg in cfgs])
    shutil.rmtree(alone / "images")
    with pytest.raises(errors.UserError, match=r"is not in .*CUB or .*images or /gone\. Put the photos"):
        (made.root / "CUB" / "images").rename(tmp_path / "aside")
        try:
            run.main([dataclasses.replace(cfg, cub_root=str(alone)) for cfg in cfgs])
        finally:
            (tmp_path / "aside").rename(made.root / "CUB" / "images")
    assert not (tmp_path / "new").exists()


def test_two_sources_of_labels_are_refused(made: traits_data.Made) -> None:
    cub = dataclasses.replace(made.cfgs[1], cub_root="", labels=traits_config.Cub(made.cfgs[1].cub_root))
    other = dataclasses.replace(cub, labels=traits_config.ClassFolders())
    with pytest.raises(errors.UserError, match="traits of one source of labels, but 2 are given"):
        run.each([cub, other])


def test_older_results_say_that_they_kept_no_images(made: traits_data.Made, tmp_path: pathlib.Path) -> None:
    older = shutil.copytree(made.root / "results", tmp_path / "results")
    (out,) = (p for p in older.iterdir() if p.is_dir())
    for name in results_format.FOR_GALLERIES:
        (out / name).unlink()
    kept = (results_format.WEIGHTS_FILE, results_format.KEYS_FILE, results_format.KEYS_TEXT)
    manifest.write(out, (*results_format.FILES, *kept))
    with pytest.raises(errors.UserError, match=r"prototypes\.parquet: is missing\. Move that folder away"):
        run.main([dataclasses.replace(cfg, dump_to=str(older)) for cfg in made.cfgs])


def test_tokens_of_the_whole_image_have_no_heat(tmp_path: pathlib.Path) -> None:
    made = traits_data.make(tmp_path)
    data = dataclasses.replace(made.cfgs[0].train_data, patches="cls")
    cfg = dataclasses.replace(made.cfgs[1], train_data=data, n_prototypes=(12,))
    run.main([cfg])
    value = gallery_files.load(made.gallery, "traits")
    entries = [entry for of_trait in pictures_of(made.gallery, value) for entry in of_trait]
    assert len(entries) == 4 and all(len(entry["image"]) and not len(entry["heat"]) for entry in entries)


@pytest.mark.slow
def test_labels_of_a_table_with_missing_ones(
    made: traits_data.Made, copy: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Images whose label is missing are neither right nor wrong, and the photos lie where the gallery's do."""
    labels_NT, is_missing_N = traits_data.labels(), np.arange(traits_data.N) % 5 < 2
    lines = ["path,split,wings,bill"]
    for n, path in enumerate(traits_data.PATHS):
        split = "train" if traits_data.IS_TRAIN_N[n] else "test"
        lines.append(
            f"{path},{split},{'' if is_missing_N[n] else int(labels_NT[n, 0])},{int(labels_NT[n, 2])}"
        )
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    table = traits_config.Table(split="file", file=str(tmp_path / "table.csv"), binary=("wings", "bill"))
    new = {"cub_root": "", "labels": table, "gallery": str(copy), "dump_to": str(tmp_path / "new")}
    run.main([dataclasses.replace(cfg, **new) for cfg in made.cfgs])
    value = gallery_files.load(copy, "traits")
    known = TEST[~is_missing_N[TEST]]
    assert [trait["n_test"] for trait in value["traits"]] == [len(known), len(TEST)]
    assert value["traits"][0]["prevalence"] == pytest.approx(labels_NT[known, 0].mean())
    images = images_of(copy, value)
    wings, bill = pictures_of(copy, value)
    for entry, best in zip(wings, value["traits"][0]["best"], strict=True):
        top_N = patch_scores(made, value["scorers"][entry["scorer"]]["name"]).max(axis=1)
        if entry["scorer"] == 0:
            top_N = top_N[:, best["prototype"]]
            want = sorted(known, key=lambda n: (-top_N[n], n))[: len(entry["image"])]
            assert [images[i]["path"] for i in entry["image"]] == [traits_data.PATHS[n] for n in want]
            assert entry["right"].tolist() == labels_NT[want, 0].tolist()
    shown = {images[i]["path"] for entry in bill for i in entry["image"]}
    assert shown & {traits_data.PATHS[n] for n in np.flatnonzero(is_missing_N)}


def test_scorers_that_retrieve_no_image(tmp_path: pathlib.Path) -> None:
    """No latent of this SAE fires."""
    made = traits_data.make(tmp_path)
    sae = nn.load(made.visuals.ckpt)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    nn.save(sae, made.visuals.ckpt)
    collect.main(dataclasses.replace(made.visuals, include_latents=(3,)))
    run.main([dataclasses.replace(made.cfgs[1], n_prototypes=(12,))])
    value = gallery_files.load(made.gallery, "traits")
    assert value["files"]["n_images"] == 0 and pictures_of(made.gallery, value) == [[]] * 5
    assert [len(trait["best"]) for trait in value["traits"]] == [1, 1, 1, 1, 0]
    assert value["columns"]["trait"].tolist() == [[-1] * 8]


def test_a_slurm_job_gets_the_gallery(tmp_path: pathlib.Path) -> None:
    """All scorers of a sweep are one job, which writes the gallery once."""
    (tmp_path / "sweep.toml").write_text('[[scorer]]\ntype = "random"\n[[scorer]]\ntype = "pca"\n')
    args = ["--sweep", str(tmp_path / "sweep.toml"), "--gallery", str(tmp_path / "gallery")]
    args += ["--slurm-acct", "ACCOUNT", "--slurm-partition", "PARTITION", "--n-hours", "2"]
    (job,) = sweeps.group(sweeps.parse(config.ProtoEval, "protoeval.py", args))
    assert [cfg.gallery for cfg in job] == [str(tmp_path / "gallery")] * 2 and job[0].slurm.is_on


# ---- again, and killed ----


def files_of(dpath: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(dpath)): p.read_bytes() for p in sorted(dpath.rglob("*")) if p.is_file()}


def test_finished_results_write_the_same_traits_into_a_new_gallery(
    made: traits_data.Made, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_evaluate", None)  # nothing is scored again
    again = dataclasses.replace(made.visuals, dump_to=str(tmp_path / "gallery"))
    collect.main(again)
    assert gallery_files.load(again.dump_to, "traits") == {}
    cfgs = [dataclasses.replace(cfg, gallery=again.dump_to) for cfg in made.cfgs]
    run.main(cfgs)
    found, want = files_of(pathlib.Path(again.dump_to)), files_of(made.gallery)
    assert {k: v for k, v in found.items() if "traits" in k} == {
        k: v for k, v in want.items() if "traits" in k
    }
    run.main(cfgs)
    assert files_of(pathlib.Path(again.dump_to)) == found


def test_another_result_replaces_the_traits(made: traits_data.Made, copy: pathlib.Path) -> None:
    before = gallery_files.load(copy, "traits")["files"]["folder"]
    cfg = dataclasses.replace(made.cfgs[1], gallery=str(copy), n_prototypes=(16,), n_train=(-1,))
    run.main([cfg])
    value = gallery_files.load(copy, "traits")
    assert [s["n"] for s in value["scorers"]] == [16] and value["files"]["folder"] != before
    assert [f"traits/{p.name}" for p in (copy / "data/traits").iterdir()] == [value["files"]["folder"]]
    assert "take part" not in value["settings"]["words"]
    assert not [p.name for p in copy.parent.iterdir() if p.name.endswith(".lock")]


STOPS = {
    "in the pictures": "pictures.Pictures.src = stop",
    "before traits.js": "scripts.write = stop",
    "before the former pictures are removed": "traits.shutil = types.SimpleNamespace(rmtree=stop)",
}


@pytest.mark.slow
@pytest.mark.parametrize("where", STOPS)
def test_a_killed_command_leaves_the_former_traits_or_the_new_ones(
    made: traits_data.Made, copy: pathlib.Path, where: str
) -> None:
    former = files_of(copy)
    cfg = dataclasses.replace(made.cfgs[1], gallery=str(copy), n_prototypes=(16,), n_train=(-1,))
    code = f"""
import os, signal, types
from saev import launch
from saev.data import config as data_config, pictures
from saev.data.traits import config as traits_config
from saev.formats import scripts
from saev.protoeval import config, run, traits
from saev.scorers import config as scorers_config
def stop(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
{STOPS[where]}
run.main([{_as_code(cfg)}])
"""
    done = forked.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = files_of(copy)
    if where == "before the former pictures are removed":
        assert gallery_files.load(copy, "traits")["scorers"][0]["n"] == 16
    else:
        assert former.items() <= left.items()
    value = gallery_files.load(copy, "traits")
    assert len(pictures_of(copy, value)) == len(traits_data.NAMES) and images_of(copy, value)
    run.main([cfg])
    value = gallery_files.load(copy, "traits")
    assert value["scorers"][0]["n"] == 16
    assert [f"traits/{p.name}" for p in (copy / "data/traits").iterdir()] == [value["files"]["folder"]]


def _as_code(cfg: config.ProtoEval) -> str:
    text = repr(cfg)
    modules = {
        "Shards": "data_config",
        "Sae": "scorers_config",
        "SlurmConfig": "launch",
        "Cub": "traits_config",
    }
    for name, module in modules.items():
        text = text.replace(f"={name}(", f"={module}.{name}(")
    return f"config.{text}"
