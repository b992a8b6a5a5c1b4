"""The demo as a user runs it, on real DINOv2 weights, and the truths that its table must obey.

N images, K prototypes, T traits.
"""

import csv
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import forked
import gallery_files
import numpy as np
import pytest
import slurm_cluster

from saev import errors
from saev.data import config as data_config
from saev.data import cub, ordered
from saev.demo import config as demo_config
from saev.demo import steps
from saev.protoeval import config, run
from saev.scorers import config as scorers_config

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
SMALL = ["--n-imgs", "40", "--n-patches", "20000", "--device", "cpu"]
"""Enough for the manner of the demo, not for the truths."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SPACE = """
import dataclasses, sys
from saev.demo import config, steps

class Smaller(steps.Command):
    def run(self, title, args):
        return super().run(title, ["--img-size", 140, *args])

steps.DUMP = Smaller(*dataclasses.astuple(steps.DUMP))
cfg = config.Demo(dump_to=sys.argv[1], n_imgs=200, n_patches=30_000, device="cpu")
steps.dump(cfg), steps.train(cfg)
"""
"""The first steps on more images, of 10 x 10 patches."""


def run_demo(dpath: pathlib.Path, *more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "saev.demo", *SMALL, *map(str, more), "--dump-to", str(dpath)]
    env = os.environ | ONE_THREAD
    return forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=env)


@pytest.fixture(scope="module")
def dpath(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("demo") / "demo"


@pytest.fixture(scope="module")
def first(dpath: pathlib.Path) -> subprocess.CompletedProcess[str]:
    done = run_demo(dpath)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> config.ProtoEval:
    dpath = tmp_path_factory.mktemp("space")
    command = [sys.executable, "-c", SPACE, str(dpath)]
    forked.run(command, cwd=ROOT, check=True, env=os.environ | ONE_THREAD)
    return config.ProtoEval(
        cub_root=str(dpath / "200" / "CUB_200_2011"),
        train_data=shards_of(dpath),
        n_prototypes=(16, 64, 256),
        n_train=(8, 32, -1),
        n_boot=0,
        dump_to=str(dpath / "more"),
        scorers_to=str(dpath / "scorers"),
        device="cpu",
    )


def shards_of(dpath: pathlib.Path) -> data_config.Shards:
    (shard_dpath,) = (dpath / "shards").iterdir()
    return data_config.Shards(str(shard_dpath))


def read_summary(result: str) -> list[dict[str, str]]:
    with (pathlib.Path(result) / "summary.csv").open() as fd:
        return list(csv.DictReader(fd))


def test_prints_the_table_and_where_everything_is(
    first: subprocess.CompletedProcess[str], dpath: pathlib.Path
) -> None:
    for name in ("constant | 1", "Random | 512", "KMeans | 512", "Pca | 384", "Units | 512"):
        assert f"| {name} |" in first.stdout
    sae = r"\| Sae [0-9a-f]{8} \| 1,536 \|"  # all its latents
    assert re.search(rf"mAP.*{sae}.*Probe R.*{sae}", first.stdout, re.S)  # images' and patches' table
    paths = dict(re.findall(r"^ *(\w+): (\S+)$", first.stdout, re.M))
    assert paths.keys() == {"images", "shards", "patch_labels", "checkpoint", "gallery", "results"}
    assert all(pathlib.Path(p).exists() for p in paths.values())
    assert (pathlib.Path(paths["results"]) / "chart.png").stat().st_size > 10_000
    stats = gallery_files.load(pathlib.Path(paths["gallery"]).parent, "stats")
    assert stats["shown"]["n"] > 300 and stats["files"]["n_images"] == 40


def test_the_best_latents_of_all_traits_are_in_the_gallery(
    first: subprocess.CompletedProcess[str], dpath: pathlib.Path
) -> None:
    made = {fpath.name: pathlib.Path(fpath.read_text()) for fpath in (dpath / "made").iterdir()}
    shown = made["gallery"].parent
    value = gallery_files.load(shown, "traits")
    ids = gallery_files.load(shown, "stats")["columns"]["id"].tolist()
    names = [scorer["name"] for scorer in value["scorers"]]
    assert names[0].startswith("Sae ") and names[1:-1] == ["Random", "KMeans", "Pca", "Units"]
    assert names[-1] == names[0].replace("Sae", "Untrained")
    best = [best for trait in value["traits"] for best in trait["best"] if best["scorer"] == 0]
    assert len(best) > 30 and [ids[one["row"]] for one in best] == [one["prototype"] for one in best]
    assert "not in the gallery" not in (made["results"] / "traits.md").read_text()
    assert (value["columns"]["trait"][:, 0] >= 0).mean() > 0.2


def test_prints_commands_that_run(first: subprocess.CompletedProcess[str], dpath: pathlib.Path) -> None:
    """Each printed command, run by itself, finds its work done."""
    commands = re.findall(r"^\$ uv run (.*)$", first.stdout, re.M)
    programs = [c.split(" --")[0] for c in commands]
    assert programs[:2] == ["python -m saev.data", "python -m saev.labels"]
    assert programs[2:] == ["train.py", "visuals.py", "protoeval.py"]
    for command in (commands[0], commands[2], commands[4]):
        args = command.removeprefix("python ").split()
        done = forked.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "already" in done.stderr


def test_a_second_run_skips_what_is_done(
    first: subprocess.CompletedProcess[str], dpath: pathlib.Path
) -> None:
    before = {
        p: p.stat().st_mtime_ns
        for p in dpath.rglob("*.*")
        if p.suffix in (".bin", ".pt", ".csv", ".html", ".jpg")
    }
    second = run_demo(dpath)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("|") == first.stdout.count("|")
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.usefixtures("undrawn")
def test_random_vectors_gain_from_train_images_and_from_prototypes(cfg: config.ProtoEval) -> None:
    seeds = [read_summary(run.main([dataclasses.replace(cfg, seed=s)])) for s in range(3)]
    cells = [
        {
            (int(r["n_prototypes"]), int(r["n_train"])): float(r["map"])
            for r in rows
            if r["scorer"] == "Random"
        }
        for rows in seeds
    ]
    map_of = {cell: np.mean([c[cell] for c in cells]) for cell in cells[0]}
    all_train = max(n for _, n in map_of)
    assert map_of[256, 8] < map_of[256, 32] < map_of[256, all_train]
    assert map_of[16, all_train] < map_of[64, all_train] < map_of[256, all_train]
    assert map_of[256, all_train] > float(seeds[0][0]["map"]) + 0.15  # far above the constant row


@pytest.mark.usefixtures("undrawn")
def test_labels_shifted_by_one_image_drop_every_scorer_to_the_constant_row(
    cfg: config.ProtoEval, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug that once made a table read 0.86: here it cannot hide."""
    (ckpt,) = pathlib.Path(cfg.dump_to).parent.glob("checkpoints/*/sae.pt")
    members = [scorers_config.Random(), scorers_config.KMeans(n_samples=20_000), scorers_config.Pca()]
    members.append(scorers_config.Sae(str(ckpt)))
    cfgs = [dataclasses.replace(cfg, scorer=s, n_prototypes=(256,), n_train=(-1,)) for s in members]
    right = read_summary(run.main(cfgs))
    load = cub.load

    def shifted(root: str, **kwargs: object) -> cub.Cub:
        labels = load(root, **kwargs)
        return dataclasses.replace(labels, labels_NT=np.roll(labels.labels_NT, 1, axis=0))

    monkeypatch.setattr(cub, "load", shifted)
    with pytest.raises(errors.UserError, match="share their traits no more than any images do"):
        run.main(cfgs)
    wrong = read_summary(run.main([dataclasses.replace(c, force=True) for c in cfgs]))
    assert [r["scorer"] for r in wrong] == [r["scorer"] for r in right]
    assert len(wrong) == 3 + 2 * len(members)  # with the constant, two probes, and permuted labels of each
    for r, w in zip(right[1:], wrong[1:], strict=True):
        is_null = "permuted labels" in r["scorer"]
        assert is_null or float(r["map"]) > float(right[0]["map"]) + 0.1
        assert abs(float(w["map"]) - float(wrong[0]["map"])) < 0.06


def test_a_demo_without_enough_images_is_refused() -> None:
    with pytest.raises(errors.UserError, match="--n-imgs 10: must be at least 40."):
        demo_config.Demo(n_imgs=10)


def test_commands_are_named_as_they_can_be_called(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert steps.DUMP.typed == "uv run python -m saev.data" and steps.SHOW.typed == "uv run visuals.py"
    monkeypatch.chdir(tmp_path)  # outside a clone
    of_all = (steps.DUMP, steps.LABEL, steps.TRAIN, steps.SHOW, steps.EVALUATE)
    names = ["saev data", "saev labels", "saev train", "saev visuals", "saev protoeval"]
    assert [step.typed for step in of_all] == names


@pytest.mark.skipif(not slurm_cluster.slurm_answers(), reason="no test Slurm here")
def test_the_demo_as_dependent_jobs(
    first: subprocess.CompletedProcess[str], dpath: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its artefacts are those of the same steps here, in the same folder, which is part of the dump's hash."""
    here = dpath.rename(dpath.with_name("here"))
    (words,) = [words for words in slurm_cluster.page_commands() if "saev.demo" in words]
    where = slurm_cluster.filled(words, {"logs": tmp_path / "logs"}, "--n-gpus", 0, "--n-cpus", 2)
    done = run_demo(dpath, *where[2:])
    assert done.returncode == 0, done.stderr
    names = {json.loads(f.read_text())["name"] for f in (tmp_path / "logs").glob("*_submission.json")}
    assert names == {f"saev-demo-{step}" for step in ("dump", "label", "train", "fit", "show", "evaluate")}
    there, there_lines = dpath.rename(dpath.with_name("there")), done.stdout.splitlines()
    tables = [[x for x in lines if x.startswith("|")] for lines in (first.stdout.splitlines(), there_lines)]
    assert len(tables[0]) > 20 and tables[0] == tables[1]
    for pattern in (
        "shards/*/acts*.json",
        "shards/*/acts*.xxh3",
        "checkpoints/*/sae.pt",
        "visuals/*/latents.csv",
        "visuals/*/data/**/*.js",
    ):
        made, wanted = (slurm_cluster.files_of(side, pattern) for side in (there, here))
        assert made.keys() == wanted.keys() and made, pattern
        assert [name for name in wanted if wanted[name] != made[name]] == []
    for one, other in zip(*(ordered.Ordered(shards_of(side)) for side in (there, here)), strict=True):
        np.testing.assert_array_equal(one.act_NXD, other.act_NXD)
