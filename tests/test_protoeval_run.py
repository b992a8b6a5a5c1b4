"""Ways to a wrong protoeval number that a reviewer looked for, all through the command's stage.

N images, L layers, T tokens, D d_vit.
"""

import dataclasses
import pathlib
import shutil

import numpy as np
import polars as pl
import pytest
import sklearn.metrics
import torch

from saev import errors, nn, scorers
from saev.data import config as data_config
from saev.formats import shards
from saev.nn import config as nn_config
from saev.protoeval import choose, config, experiment, fit, measure, opening, run, score
from saev.scorers import config as scorers_config

pytestmark = pytest.mark.usefixtures("undrawn")

N, D = 40, 4
PATHS = [f"{i % 5 + 1:03}.Bird/bird {i:03}.jpg" for i in range(N)]
LABELS_N2 = np.random.default_rng(0).random((N, 2)) < 0.4
LABELS_TXT = "attributes/image_attribute_labels.txt"


def write_shards(
    dump_to: pathlib.Path, *, roll: int = 0, vit_ckpt: str = "planted", skip: int | None = None
) -> data_config.Shards:
    """Layers 3 and 7, [CLS] and 2 patches. At layer 3, patch 1 shows the image's traits in dimensions 0 and 1.

    [CLS] shows the opposite, ten times as strongly. Image 0 is none of CUB's, so CUB's image ids are the numbers here.
    `roll` gives each image another one's activations; `skip` could not be read.
    """
    acts_NLTD = np.random.default_rng(1).standard_normal((N + 1, 2, 3, D)).astype(np.float32)
    acts_NLTD[1:, 0, 2, :2] += 8 * LABELS_N2
    acts_NLTD[1:, 0, 0, :2] += 80 * ~LABELS_N2
    acts_NLTD = np.roll(acts_NLTD, roll, axis=0)
    data: dict[str, object] = {"root": "/photos", "__class__": "ImageFolder"}
    metadata = shards.Metadata("timm", vit_ckpt, (3, 7), 2, True, D, N + 1, 6 * (N + 1), data)
    records = [shards.Record(path, "") for path in ("stranger.jpg", *PATHS)]
    out = shards.ShardDir.create(dump_to, metadata, records, {})
    with out.writing(0) as writer:
        if skip is not None:
            acts_NLTD[skip] = 0
            writer.skipped.append(shards.Skipped(skip, "corrupt"))
        writer.write(acts_NLTD)
    return data_config.Shards(str(out.dpath), 3)


@pytest.fixture
def cfg(tmp_path: pathlib.Path) -> config.ProtoEval:
    root = tmp_path / "CUB_200_2011"
    (root / "attributes").mkdir(parents=True)
    pairs = np.ndenumerate(LABELS_N2)
    files = {
        "images.txt": [f"{i} {path}" for i, path in enumerate(PATHS, 1)],
        "train_test_split.txt": [f"{i} {i % 2}" for i in range(1, N + 1)],
        "image_class_labels.txt": [f"{i} {(i - 1) % 5 + 1}" for i in range(1, N + 1)],
        "attributes/attributes.txt": ["1 has_a::x", "2 has_a::y"],
        LABELS_TXT: [f"{i + 1} {t + 1} {int(present)} 4 1.0" for (i, t), present in pairs],
    }
    for name, lines in files.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return config.ProtoEval(
        scorer=scorers_config.Random("dot"),
        force=True,  # the shards hold an image without labels
        cub_root=str(root),
        train_data=write_shards(tmp_path / "dump"),
        n_prototypes=(16,),
        n_train=(-1,),
        dump_to=str(tmp_path / "results"),
        scorers_to=str(tmp_path / "scorers"),
        device="cpu",
    )


def summary(cfg: config.ProtoEval) -> str:
    return (pathlib.Path(run.main([cfg])) / "summary.csv").read_text()


def save_sae(fpath: pathlib.Path, *, seed: int | None = None) -> scorers_config.Sae:
    """Without a seed, latent i is the positive part of dimension i."""
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=1), seed or 0)
    if seed is None:
        sae.W_enc.data = torch.eye(D)
    nn.save(sae.eval(), fpath)
    return scorers_config.Sae(str(fpath))


# ---- caches ----


def test_an_image_without_labels_is_refused(cfg: config.ProtoEval, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(errors.UserError, match=r"1 of 41 images have no row .*stranger\.jpg.*--force"):
        run.main([dataclasses.replace(cfg, force=False)])
    run.main([cfg])
    assert "stranger.jpg); they are left out" in caplog.text


def test_new_activations_with_old_metadata_are_evaluated_anew(
    cfg: config.ProtoEval, tmp_path: pathlib.Path
) -> None:
    """The photos (or the transform, or the weights behind a hub name) were mended in place and dumped again."""
    other = dataclasses.replace(cfg, train_data=write_shards(tmp_path / "again", roll=1))
    clean = {"dump_to": str(tmp_path / "clean"), "scorers_to": str(tmp_path / "clean")}
    want = summary(dataclasses.replace(other, **clean))
    assert summary(cfg) != want
    assert summary(other) == want


def test_new_activations_with_old_metadata_are_fitted_anew(tmp_path: pathlib.Path) -> None:
    data = [write_shards(tmp_path / f"dump{roll}", roll=roll) for roll in (0, 1)]
    a, b = (scorers.fit(scorers_config.Random(), d, 4, dpath=tmp_path / "s") for d in data)
    assert not torch.equal(a.vectors_KD, b.vectors_KD)


def fitted_name(cfg: config.ProtoEval) -> str:
    """The folder's name of a config's results, after fitting its scorers, which are not evaluated."""
    found = run._experiment([cfg], opening.open_all([cfg]))
    fit.fit(found)
    return found.id


def test_what_decides_the_result_is_in_its_name(cfg: config.ProtoEval, tmp_path: pathlib.Path) -> None:
    layer_7 = dataclasses.replace(cfg.train_data, layer=7)
    changes: list[dict[str, object]] = [
        {},
        {"train_data": layer_7},
        {"train_data": dataclasses.replace(cfg.train_data, patches="all")},
        {"scorer": scorers_config.KMeans()},
        {"scorer": scorers_config.KMeans(n_samples=30)},
        {"scorer": scorers_config.Random("distance")},
        {"scorer": scorers_config.Pca()},
        {"scorer": scorers_config.Pca(both_signs=True)},
        {"n_prototypes": (8,)},
        {"seed": 1},
    ]
    names = [fitted_name(dataclasses.replace(cfg, **change)) for change in changes]
    # 16 random activations hold the 8 that another run wants, and serve another similarity; components serve both signs
    assert len(list((tmp_path / "scorers").iterdir())) == len(changes) - 3
    names.append(fitted_name(dataclasses.replace(cfg, n_train=(8,))))
    for seed in (None, 1):  # another file under the same path
        sae = save_sae(tmp_path / "run" / "sae.pt", seed=seed)
        names.append(fitted_name(dataclasses.replace(cfg, scorer=sae)))
    lines = {"train_test_split.txt": ("1 1", "1 0"), LABELS_TXT: ("\n9 1 0 4", "\n9 1 1 4")}
    for name, (old, new) in lines.items():
        root = tmp_path / pathlib.Path(name).stem
        shutil.copytree(cfg.cub_root, root)
        text = (root / name).read_text()
        (root / name).write_text(text.replace(old, new, 1))
        assert (root / name).read_text() != text
        names.append(fitted_name(dataclasses.replace(cfg, cub_root=str(root))))
    assert len(set(names)) == len(names)


# ---- activations that do not belong to the labels or to each other ----


TEST_BIRD_IDS = [i for i in range(2, N + 1, 2) if LABELS_N2[i - 1].any()]


@pytest.mark.parametrize("skip", [None, 0, TEST_BIRD_IDS[0], TEST_BIRD_IDS[-1], 3])
def test_each_patch_meets_its_own_label(
    cfg: config.ProtoEval, tmp_path: pathlib.Path, skip: int | None
) -> None:
    """AP is 1, unless [CLS] is scored too or an unreadable image shifts the others. An unreadable bird is left out and named."""
    data = write_shards(tmp_path / "with_skipped", skip=skip)
    sae = save_sae(tmp_path / "run" / "sae.pt")
    cfg = dataclasses.replace(cfg, train_data=data, scorer=sae, n_prototypes=(D,))
    dpath = pathlib.Path(run.main([cfg]))
    table, about = ((dpath / name).read_text() for name in ("table.md", "about.json"))
    if skip:
        split = "train" if skip % 2 else "test"
        assert f"1 {split} image(s) are left out, because the dump recorded them as corrupt" in table
        assert PATHS[skip - 1] in about
        is_measured_N = np.arange(1, N + 1) % 2 == 0
        is_measured_N[skip - 1] = False
        line = (dpath / "summary.csv").read_text().splitlines()[1].split(",")
        assert float(line[3]) == pytest.approx(LABELS_N2[is_measured_N].mean(), abs=1e-12)
    else:
        assert "left out, because" not in table
    lines = pl.read_parquet(dpath / "traits.parquet").to_dicts()
    x, y = (line for line in lines if line["scorer"] == "Sae run")
    assert [(t["prototype"], t["test_ap"]) for t in (x, y)] == [(0, 1.0), (1, 1.0)]


def test_images_that_were_never_dumped_are_refused(cfg: config.ProtoEval, tmp_path: pathlib.Path) -> None:
    """With --force too, and beside one that was recorded as corrupt."""
    data = write_shards(tmp_path / "with_skipped", skip=TEST_BIRD_IDS[0])
    fpath = pathlib.Path(cfg.cub_root) / "images.txt"
    fpath.write_text(fpath.read_text().replace(PATHS[7], "001.Bird/new.jpg"))
    with pytest.raises(errors.UserError, match=r"1 of CUB's test images are not.*001.Bird/new"):
        run.main([dataclasses.replace(cfg, train_data=data)])


@pytest.mark.parametrize(
    ("name", "vit_ckpt", "change"),
    [
        ("test_data", "planted", {"layer": -1}),  # --test-data.layer forgotten
        ("test_data", "planted", {"patches": "cls"}),
        ("test_data", "other", {}),
        ("fit_data", "planted", {"layer": -1}),
        ("fit_data", "other", {}),
    ],
)
def test_activations_of_another_space_are_refused(
    cfg: config.ProtoEval, tmp_path: pathlib.Path, name: str, vit_ckpt: str, change: dict
) -> None:
    """Equally wide, so nothing crashes: prototypes of one layer or ViT score patches of another."""
    data = dataclasses.replace(write_shards(tmp_path / "other", vit_ckpt=vit_ckpt), **change)
    with pytest.raises(errors.UserError):
        run.main([dataclasses.replace(cfg, **{name: data})])


@pytest.mark.parametrize("name", ["test", "fit"])
def test_a_typed_layer_without_its_shard_root_counts(name: str) -> None:
    layers = {f"{name}_data": data_config.Shards("", 13)}
    try:
        cfg = config.ProtoEval(train_data=data_config.Shards("S", 23), **layers)
    except errors.UserError:
        return
    assert getattr(cfg, name).layer == 13


# ---- the choice ----


def test_every_cell_equals_a_plain_loop_with_sklearn() -> None:
    """Choice on the drawn train images alone, among the scorer's first k; AP on all test images. Ties and negative scores.
    The nulls choose on permuted labels."""
    rng, n_traits = np.random.default_rng(3), 5
    splits = []
    for n in (50, 60):
        labels_NT = rng.random((n, n_traits)) < 0.3
        scores_NK = rng.integers(-4, 4, (n, 9)).astype(np.float32)
        mean_ND, max_ND = rng.standard_normal((2, n, D)).astype(np.float32)
        scores = score.Scores(scores_NK.T, mean_ND, max_ND, np.arange(n))
        splits.append(score.Split(scores, np.arange(n), labels_NT))
    train, test = splits
    train.labels_NT[:, 3], test.labels_NT[:, 4] = False, False
    zeros_D = torch.zeros(D)
    banks = [
        fit.Bank(name, scorers.Prototypes.of(torch.zeros(k, D), zeros_D, "dot"), ks)
        for name, k, ks in (("a", 3, (3,)), ("b", 6, (2, 6)))
    ]
    cfg = config.ProtoEval(n_train=(7, -1), n_boot=0, memory_gb=1e-6)
    cells = choose.choose(train, banks, cfg)
    constant, *rows = measure.measure(cells, train, test, cfg)
    rows = rows[4:]  # of the probes
    np.testing.assert_allclose(constant.test_ap_RT[0][:4], test.labels_NT[:, :4].mean(axis=0))
    cells = [("a", 0, 3), ("b", 3, 2), ("b", 3, 6)]
    wanted = [(*cell, n_train) for cell in cells for n_train in (7, 50)]
    wanted.insert(2, ("a, permuted labels", 0, 3, 50))
    wanted.append(("b, permuted labels", 3, 6, 50))
    assert [(r.scorer, r.n_prototypes, r.n_train) for r in rows] == [(c[0], *c[2:]) for c in wanted]
    order = choose.permutation(50, cfg.seed)
    assert sorted(order) == list(range(50)) and (order != range(50)).sum() > 40
    for row, (name, first, k, n_train) in zip(rows, wanted, strict=True):
        drawn = choose.train_subset(50, n_train, 0)
        labels_NT = train.labels_NT[order if "permuted" in name else drawn]
        for t in range(n_traits):
            seen, y = labels_NT[:, t], test.labels_NT[:, t]
            aps = [
                sklearn.metrics.average_precision_score(seen, train.scores.scores_KN[first + i, drawn])
                for i in range(k if seen.any() else 0)
            ]
            best = int(np.argmax(np.round(aps, 12))) if aps else 0
            assert row.best_RT[0][t] == best
            if not y.any():
                assert np.isnan(row.test_ap_RT[0][t])
                continue
            want = sklearn.metrics.average_precision_score(y, test.scores.scores_KN[first + best])
            assert row.test_ap_RT[0][t] == pytest.approx(want, abs=1e-12)


# ---- what the table says ----


def test_rows_of_different_scorers_have_different_names(cfg: config.ProtoEval) -> None:
    fit_data = dataclasses.replace(cfg.train_data, patches="all")
    saes = [scorers_config.Sae(f"{vit}/x/sae.pt") for vit in ("clip", "dino")]
    groups = [
        [cfg, dataclasses.replace(cfg, fit_data=fit_data)],
        [dataclasses.replace(cfg, scorer=sae) for sae in saes],
    ]
    for cfgs in groups:
        names = experiment.names(cfgs)
        assert len(set(names)) == 2, names


def test_results_say_what_they_are_of(cfg: config.ProtoEval) -> None:
    dpath = pathlib.Path(run.main([cfg]))
    text = "".join(fpath.read_text() for fpath in dpath.iterdir() if fpath.suffix in (".md", ".json"))
    assert pathlib.Path(cfg.train_data.shard_root).name[:8] in text and "layer" in text
