"""protoeval on mini-CUB's real label files with activations whose answer is known.

N images, K prototypes, T traits, P patches, D d_vit.
"""

import collections
import collections.abc
import concurrent.futures
import csv
import dataclasses
import pathlib
import shutil
import tempfile
import time

import numpy as np
import PIL.Image
import polars as pl
import pytest
import torch

from saev import errors, nn, scorers, sweeps
from saev.data import activations, cub
from saev.data import config as data_config
from saev.demo import minicub
from saev.formats import results, shards
from saev.nn import config as nn_config
from saev.protoeval import choose, config, experiment, fit, join, measure, opening, report, run, score
from saev.report import figures
from saev.scorers import base
from saev.scorers import config as scorers_config

pytestmark = pytest.mark.usefixtures("undrawn")
save_figure = figures.save


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    dpath = tmp_path_factory.mktemp("minicub") / "CUB_200_2011"
    with pytest.MonkeyPatch.context() as patch:  # the labels matter here, not the photos
        patch.setattr(minicub, "picture", lambda bird, rng: (PIL.Image.new("RGB", (8, 8)),) * 2)
        minicub.draw(dpath, n_imgs=160)
    return dpath


@pytest.fixture(scope="module")
def labels(cub_root: pathlib.Path) -> cub.Cub:
    return cub.load(cub_root)


def write_shards(
    dpath: pathlib.Path, paths: list[str], acts_NPD: np.ndarray, skip: collections.abc.Collection[int] = ()
) -> data_config.Shards:
    """One layer, no [CLS]; image i has path paths[i]; those in `skip` are recorded as corrupt."""
    N, P, D = acts_NPD.shape
    metadata = shards.Metadata("timm", "planted", (3,), P, False, D, N, 50 * P, {"__class__": "ImageFolder"})
    out = shards.ShardDir.create(dpath, metadata, [shards.Record(p, "") for p in paths], {})
    for shard_i in range(metadata.n_shards):
        with out.writing(shard_i) as writer:
            image_is = metadata.imgs_in(shard_i)
            writer.skipped += [shards.Skipped(i, "corrupt") for i in image_is if i in skip]
            acts_NLPD = acts_NPD[image_is.start : image_is.stop, None]
            writer.write(np.ascontiguousarray(acts_NLPD, np.float32))
    return data_config.Shards(str(out.dpath), 3)


def plant(labels_NT: np.ndarray, seed: int = 0) -> np.ndarray:
    """Activations (N, P, T + 4): trait t adds 10 to dimension t of one random patch; the rest is noise."""
    rng = np.random.default_rng(seed)
    N, T = labels_NT.shape
    acts_NPD = rng.standard_normal((N, 9, T + 4)).astype(np.float32)
    acts_NPD[np.arange(N), rng.integers(0, 9, N), :T] += 10 * labels_NT
    return acts_NPD


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, labels: cub.Cub) -> data_config.Shards:
    """Shards in another order than images.txt: only a join by path gets the labels right."""
    order = np.random.default_rng(5).permutation(len(labels.paths_N))
    acts_NPD = plant(labels.labels_NT)[order]
    return write_shards(tmp_path_factory.mktemp("shards"), [labels.paths_N[i] for i in order], acts_NPD)


def configured(dpath: pathlib.Path, cub_root: pathlib.Path, data: data_config.Shards) -> config.ProtoEval:
    return config.ProtoEval(
        scorer=scorers_config.Pca(),
        cub_root=str(cub_root),
        train_data=data,
        n_prototypes=(4, 16),
        n_train=(16, -1),
        dump_to=str(dpath / "results"),
        scorers_to=str(dpath / "scorers"),
        device="cpu",
    )


@pytest.fixture
def cfg(tmp_path: pathlib.Path, cub_root: pathlib.Path, planted: data_config.Shards) -> config.ProtoEval:
    return configured(tmp_path, cub_root, planted)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, cub_root: pathlib.Path, planted: data_config.Shards
) -> pathlib.Path:
    """What `cfg` gives, evaluated once. Tests do not change it."""
    return pathlib.Path(run.main([configured(tmp_path_factory.mktemp("whole"), cub_root, planted)]))


def copied(whole: pathlib.Path, cfg: config.ProtoEval) -> pathlib.Path:
    """A copy where `cfg` has its results."""
    return pathlib.Path(shutil.copytree(whole, pathlib.Path(cfg.dump_to) / whole.name))


def name_of(cfg: config.ProtoEval) -> str:
    """The folder's name of a config's results, without evaluating it."""
    return run._experiment([cfg], opening.open_all([cfg])).id


def read_csv(fpath: pathlib.Path) -> list[dict[str, str]]:
    with fpath.open() as fd:
        return list(csv.DictReader(fd))


def oracle(labels: cub.Cub) -> base.Prototypes:
    """Knows each trait's direction."""
    D = labels.labels_NT.shape[1] + 4
    return base.Prototypes.of(torch.eye(D), torch.zeros(D), "dot")


def evaluate(
    cfg: config.ProtoEval, labels: cub.Cub, fitted: collections.abc.Mapping[str, scorers.Scorer]
) -> list[results.Row]:
    """The grid for ready-made scorers, through the same joins and scores as the command."""
    banks = [fit.Bank(name, scorer, (scorer.n_prototypes,)) for name, scorer in fitted.items()]
    sides = join.join(cfg, opening.open_all([cfg]), labels)
    with tempfile.TemporaryDirectory() as dpath:
        made = experiment.Experiment([cfg], labels, sides, [])
        chosen, measured = score.score(made, banks, pathlib.Path(dpath))
        return measure.measure(choose.choose(chosen, banks, cfg), chosen, measured, cfg)


def test_a_scorer_that_knows_the_traits_gets_one(cfg: config.ProtoEval, labels: cub.Cub) -> None:
    *_, row, null = evaluate(cfg, labels, {"oracle": oracle(labels)})
    assert null.scorer == "oracle, permuted labels" and null.mean_ap < 0.6
    assert row.n_train == labels.is_train_N.sum()
    np.testing.assert_array_equal(row.best_RT[0], np.arange(len(labels.attribute_names_T)))
    np.testing.assert_array_equal(row.measured_T, 1.0)


def test_constant_row_is_the_mean_prevalence(cfg: config.ProtoEval, labels: cub.Cub) -> None:
    constant, *_ = evaluate(cfg, labels, {"oracle": oracle(labels)})
    prevalence_T = labels.labels_NT[~labels.is_train_N].mean(axis=0)
    assert constant.scorer == "constant"
    assert constant.mean_ap == pytest.approx(prevalence_T[prevalence_T > 0].mean(), abs=1e-12)


def test_labels_shifted_by_one_image_drop_to_the_constant_row(cfg: config.ProtoEval, labels: cub.Cub) -> None:
    shifted = dataclasses.replace(labels, labels_NT=np.roll(labels.labels_NT, 1, axis=0))
    constant, *_, row, _ = evaluate(cfg, shifted, {"oracle": oracle(labels)})
    assert row.mean_ap < constant.mean_ap + 0.1


def test_scores_are_the_max_over_patches_of_a_plain_loop(
    planted: data_config.Shards, labels: cub.Cub, tmp_path: pathlib.Path
) -> None:
    scorer = oracle(labels)
    image_is = [3, 0, 159, 70]
    got = score.score_images(
        [scorer, scorer.prefix(2)],
        activations.Activations(planted),
        image_is,
        tmp_path / "s",
        torch.device("cpu"),
    )
    order = np.random.default_rng(5).permutation(len(labels.paths_N))
    acts_NPD = plant(labels.labels_NT)[order]
    for n, i in enumerate(image_is):
        want_K = np.max(acts_NPD[i], axis=0)
        np.testing.assert_allclose(got.scores_KN[:, n], [*want_K, *want_K[:2]], rtol=1e-6)
        np.testing.assert_allclose(got.mean_ND[n], acts_NPD[i].mean(axis=0), atol=1e-6)
        np.testing.assert_array_equal(got.max_ND[n], acts_NPD[i].max(axis=0))


def test_main_writes_table_csv_and_chart(
    cfg: config.ProtoEval, labels: cub.Cub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "save", save_figure)
    more_than_there_are = (16, 16, 5000, 6000, -1)
    dpath = pathlib.Path(run.main([dataclasses.replace(cfg, n_train=more_than_there_are)]))
    lines = read_csv(dpath / "summary.csv")
    n_train = str(labels.is_train_N.sum())
    grid = [(r["scorer"], r["n_prototypes"], r["n_train"]) for r in lines]
    assert grid == [
        ("constant", "1", n_train),
        *((f"Logistic probe ({of})", "1", n) for of in ("mean", "max") for n in ("16", n_train)),
        *(("Pca", k, n) for k in ("4", "16") for n in ("16", n_train)),
        ("Pca, permuted labels", "16", n_train),
    ]
    table = (dpath / "table.md").read_text()
    assert "| constant | 1 |" in table and "| Pca | 16 |" in table
    assert (dpath / "chart.png").read_bytes().startswith(b"\x89PNG")
    traits = pl.read_parquet(dpath / "traits.parquet").to_dicts()
    assert len(traits) == len(lines) * len(labels.attribute_names_T)
    shown = float(lines[-1]["map"])
    mine = [
        t["test_ap"] for t in traits if (t["scorer"], str(t["n_prototypes"]), str(t["n_train"])) == grid[-1]
    ]
    assert shown == pytest.approx(np.nanmean(mine))


@pytest.mark.slow
def test_all_scorers_of_a_group_give_what_each_gives_alone(
    cfg: config.ProtoEval, whole: pathlib.Path
) -> None:
    members = [scorers_config.Random(), scorers_config.KMeans(n_samples=500), scorers_config.Pca()]
    cfgs = [dataclasses.replace(cfg, scorer=s) for s in members]
    assert len(sweeps.group(cfgs)) == 1
    together = (pathlib.Path(run.main(cfgs)) / "summary.csv").read_text().splitlines()
    dpaths = [*(pathlib.Path(run.main([c])) for c in cfgs[:2]), whole]
    alone = [(dpath / "summary.csv").read_text().splitlines()[6:] for dpath in dpaths]
    assert together[6:] == [line for lines in alone for line in lines]


def test_scorers_of_one_table_have_different_names(cfg: config.ProtoEval) -> None:
    members = [scorers_config.Random(), scorers_config.Random("dot"), scorers_config.Pca()]
    members += [scorers_config.Sae("a/x/sae.pt"), scorers_config.Sae("a/y/sae.pt")]
    names = experiment.names([dataclasses.replace(cfg, scorer=s) for s in members])
    assert names == ["Random similarity=cosine", "Random similarity=dot", "Pca", "Sae x", "Sae y"]
    assert experiment.names([cfg]) == ["Pca"]


def test_train_and_test_in_separate_shards_equal_one_directory(
    cfg: config.ProtoEval, labels: cub.Cub, tmp_path: pathlib.Path, whole: pathlib.Path
) -> None:
    acts_NPD, paths = plant(labels.labels_NT), np.array(labels.paths_N)
    parts = [
        write_shards(tmp_path / name, paths[mask_N].tolist(), acts_NPD[mask_N])
        for name, mask_N in (("train", labels.is_train_N), ("test", ~labels.is_train_N))
    ]
    apart = dataclasses.replace(cfg, train_data=parts[0], test_data=parts[1])
    dpath = pathlib.Path(run.main([apart]))
    assert dpath.name != whole.name
    assert (dpath / "summary.csv").read_text() == (whole / "summary.csv").read_text()


def test_too_many_prototypes_are_refused_before_anything_is_read(
    cfg: config.ProtoEval, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("saev.data.activations.Activations.read")
    for scorer in (scorers_config.Random(), scorers_config.KMeans(n_samples=10**7)):
        with pytest.raises(errors.UserError, match=r"activations.*, fewer than 9999999 "):
            run.main([dataclasses.replace(cfg, scorer=scorer, n_prototypes=(4, 9999999, 4))])


def test_a_finished_evaluation_is_found_again(cfg: config.ProtoEval, whole: pathlib.Path) -> None:
    table = copied(whole, cfg) / "table.md"
    before = table.stat().st_mtime_ns
    assert run.main([cfg]) == str(table.parent)
    assert table.stat().st_mtime_ns == before
    others: list[dict[str, object]] = [{"seed": 1}, {"n_train": (8,)}, {"min_certainty": 4}, {"n_boot": 7}]
    others += [{"annotations": "last"}, {"no_positives": "zero"}, {"swap_splits": True}]
    names = [name_of(dataclasses.replace(cfg, **change)) for change in others]
    assert name_of(cfg) == whole.name and len({whole.name, *names}) == 8


def test_a_changed_evaluation_is_refused_and_an_unfinished_one_done_again(
    cfg: config.ProtoEval, whole: pathlib.Path
) -> None:
    dpath = copied(whole, cfg)
    for name in results.FILES:
        content = (dpath / name).read_bytes()
        (dpath / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(errors.UserError, match=f"{name}: was changed after .* Move that folder"):
            run.main([cfg])
        (dpath / name).write_bytes(content)
    (dpath / "manifest.json").unlink()
    (dpath / "table.md").write_text("half a table")
    assert run.main([cfg]) == str(dpath)
    assert (dpath / "table.md").read_text() == (whole / "table.md").read_text()


def test_results_of_another_fitter_are_not_found_again(
    cfg: config.ProtoEval, whole: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name_of(cfg) == whole.name
    monkeypatch.setattr("saev.scorers.store.REVISION", -1)
    assert name_of(cfg) != whole.name


@pytest.mark.slow
def test_two_processes_of_one_command_evaluate_once(
    cfg: config.ProtoEval, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first, here in a thread, and takes its table."""
    cfg = dataclasses.replace(cfg, dump_to=str(tmp_path / "shared"))
    slow, calls = choose.choose, []

    def evaluate(*args: object) -> list[choose.Cell]:
        calls.append(args)
        time.sleep(0.5)
        return slow(*args)

    monkeypatch.setattr(choose, "choose", evaluate)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run.main, [[cfg], [cfg]])
    assert first == second and len(calls) == 1
    assert {f.name for f in (tmp_path / "shared").iterdir()} == {pathlib.Path(first).name}


def test_n_train_subsets_are_nested_and_seeded() -> None:
    small, large = choose.train_subset(100, 10, 0), choose.train_subset(100, 50, 0)
    assert set(small) < set(large) and len(small) == 10
    np.testing.assert_array_equal(choose.train_subset(100, 100, 0), np.arange(100))
    assert set(small) != set(choose.train_subset(100, 10, 1))


@pytest.mark.slow
def test_draws_differ_and_the_first_is_that_of_one_draw(cfg: config.ProtoEval, whole: pathlib.Path) -> None:
    dpaths = [whole, pathlib.Path(run.main([dataclasses.replace(cfg, n_seeds=3)]))]
    one, three = (read_csv(dpath / "summary.csv") for dpath in dpaths)
    assert {line["spread"] for line in one} == {"nan"}
    of_16, of_all = ([x for x in three if (x["n_train"] == "16") is few] for few in (True, False))
    assert all(float(line["spread"]) > 0 for line in of_16)
    assert {line["spread"] for line in of_all} == {"nan"}  # all images can be drawn in one way
    assert [x["map"] for x in of_all] == [x["map"] for x in one if x["n_train"] != "16"]
    draws = [choose.train_subset(100, 10, 0, r) for r in range(3)]
    assert len({tuple(draw) for draw in draws}) == 3
    np.testing.assert_array_equal(draws[0], choose.train_subset(100, 10, 0))


def test_intervals_hold_the_map_and_grow_with_fewer_test_images(
    cfg: config.ProtoEval, labels: cub.Cub, tmp_path: pathlib.Path, whole: pathlib.Path
) -> None:
    """A quarter of the test images: intervals about twice as wide."""
    test_is = np.flatnonzero(~labels.is_train_N)
    skip = set(test_is.tolist()) - set(test_is[::4].tolist())
    data = write_shards(tmp_path / "few", list(labels.paths_N), plant(labels.labels_NT), skip)
    widths = []
    for dpath in (whole, pathlib.Path(run.main([dataclasses.replace(cfg, train_data=data)]))):
        rows = read_csv(dpath / "summary.csv")
        bounds = [[float(row[key]) for key in ("low", "map", "high")] for row in rows]
        bounds = [each for each in bounds if each != [1.0, 1.0, 1.0]]  # a probe knows planted traits
        assert len(bounds) > 2 and all(low < value < high < low + 0.5 for low, value, high in bounds)
        widths.append(np.mean([high - low for low, _, high in bounds[1:]]))  # without the constant
    assert 1.4 < widths[1] / widths[0] < 2.8


@pytest.mark.slow
def test_a_killed_evaluation_leaves_no_table_and_ends_the_same(
    cfg: config.ProtoEval, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, whole: pathlib.Path
) -> None:
    again = dataclasses.replace(cfg, dump_to=str(tmp_path / "again"))

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(report, "write", full_disk)
        run.main([again])
    (partial,) = pathlib.Path(again.dump_to).iterdir()
    assert partial.name == f".{whole.name}.partial"
    monkeypatch.setattr(scorers.Prototypes, "of_images", full_disk)  # a second pass would end
    done = pathlib.Path(run.main([again]))
    assert (done / "summary.csv").read_text() == (whole / "summary.csv").read_text()
    assert [p.name for p in pathlib.Path(again.dump_to).iterdir()] == [whole.name]


def test_ties_take_the_lowest_prototype() -> None:
    ap_KT = np.array([[0.5, np.nan, 0.1], [0.5, np.nan, 0.2], [0.4, np.nan, 0.2]])
    none = choose.Choice(np.zeros(3, np.int64), np.full(3, np.nan))
    whole = choose.better(none, ap_KT, 0)
    np.testing.assert_array_equal(whole.best_T, [0, 0, 1])
    np.testing.assert_array_equal(whole.train_ap_T, [0.5, np.nan, 0.2])
    in_parts = none
    for k in range(3):
        in_parts = choose.better(in_parts, ap_KT[k : k + 1], k)
    np.testing.assert_array_equal(in_parts.best_T, whole.best_T)


def test_the_best_of_k_is_chosen_among_the_first_k(whole: pathlib.Path) -> None:
    lines = pl.read_parquet(whole / "traits.parquet").to_dicts()
    assert max(t["prototype"] for t in lines if t["n_prototypes"] == 4) < 4
    assert max(t["prototype"] for t in lines if t["n_prototypes"] == 16) >= 4


def test_a_missing_image_is_named(cfg: config.ProtoEval, labels: cub.Cub, tmp_path: pathlib.Path) -> None:
    acts_NPD, paths = plant(labels.labels_NT), labels.paths_N
    gone = int(np.flatnonzero(labels.is_train_N)[0])
    keep = [i for i in range(len(paths)) if i != gone]
    part = write_shards(tmp_path / "part", [paths[i] for i in keep], acts_NPD[keep])
    with pytest.raises(errors.UserError, match=f"1 of CUB's train images .*{paths[gone]}"):
        run.main([dataclasses.replace(cfg, train_data=part)])


def test_an_image_that_is_there_twice(cfg: config.ProtoEval, labels: cub.Cub, tmp_path: pathlib.Path) -> None:
    paths = [*labels.paths_N, f"images/{labels.paths_N[0]}"]
    acts_NPD = plant(np.vstack([labels.labels_NT, labels.labels_NT[:1]]))
    twice = write_shards(tmp_path / "twice", paths, acts_NPD)
    with pytest.raises(errors.UserError, match="image of CUB twice"):
        run.main([dataclasses.replace(cfg, train_data=twice)])


def test_cub_without_attributes(
    cfg: config.ProtoEval, cub_root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    bare = tmp_path / "bare" / "CUB_200_2011"
    shutil.copytree(cub_root, bare, ignore=shutil.ignore_patterns("images", "attributes"))
    with pytest.raises(errors.UserError, match=r"attributes\.txt: missing"):
        run.main([dataclasses.replace(cfg, cub_root=str(bare))])


def test_missing_flags(cfg: config.ProtoEval) -> None:
    with pytest.raises(errors.UserError, match="--cub-root is missing"):
        run.main([dataclasses.replace(cfg, cub_root="")])
    with pytest.raises(errors.UserError, match=r"--scorer\.ckpt is missing"):
        run.main([dataclasses.replace(cfg, scorer=scorers_config.Sae())])


# ---- what is opened ----


def test_each_directory_is_opened_once_and_its_images_are_read_once(
    cfg: config.ProtoEval, labels: cub.Cub, tmp_path: pathlib.Path, opened: collections.Counter[str]
) -> None:
    """One command with four scorers, one of them fitted on activations of its own."""
    paths = [f"photos/{i}.jpg" for i in range(60)]
    D = labels.labels_NT.shape[1] + 4
    others = write_shards(tmp_path / "others", paths, np.ones((60, 9, D), np.float32) * 3)
    ckpt = tmp_path / "run" / "sae.pt"
    ckpt.parent.mkdir()
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=D, d_sae=8))
    nn.save(sae, ckpt, activations.Activations(cfg.train_data).space.describe())
    members = (
        {"scorer": scorers_config.Random()},
        {"scorer": scorers_config.KMeans(n_iters=2)},
        {"scorer": scorers_config.Pca(), "fit_data": others},
        {"scorer": scorers_config.Sae(str(ckpt))},
    )
    cfgs = [dataclasses.replace(cfg, n_prototypes=(8,), n_boot=20, **more) for more in members]
    opened.clear()
    run.main(cfgs)
    roots = {cfg.train_data.shard_root: 1, others.shard_root: 1}
    assert {key: opened[key] for key in roots} == roots
    assert opened["streams"] == 2  # train and test are the same; --fit-data
    assert opened["images.jsonl"] == 2  # one of each directory
