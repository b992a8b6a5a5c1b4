"""The memory that a dump, a gallery, ... are said to take, against processes that do them."""

import collections.abc
import os
import pathlib
import pickle
import re
import subprocess
import sys
import typing as tp

import forked
import numpy as np
import PIL.Image
import polars as pl
import pytest

from benchmarks import gpu_memory
from saev import nn
from saev.compare import config as compare_config
from saev.compare import memory as compare_memory
from saev.data import config as data_config
from saev.demo import minicub
from saev.formats import patchlabels, shards
from saev.nn import config as nn_config
from saev.nn import metrics
from saev.nn.architectures import batch_top_k
from saev.protoeval import ap, logistic, patch_fit, probe, score
from saev.protoeval import config as protoeval_config
from saev.protoeval import memory as protoeval_memory
from saev.scorers import base, kmeans, untrained
from saev.scorers import config as scorers_config
from saev.training import memory as training_memory
from saev.visuals import config as visuals_config
from saev.visuals import memory as visuals_memory

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
RUN = """
import importlib, logging, os, pathlib, pickle, re, sys

def run(cfg):
    module.main(cfg)
    peak = re.search("VmHWM:[^0-9]*([0-9]+) kB", pathlib.Path("/proc/self/status").read_text())[1]
    print(peak, flush=True)
    os._exit(0)  # without the second that Python takes to clean up

logging.basicConfig(level="INFO")
module = importlib.import_module(sys.argv[1])
cfgs = pickle.loads(bytes.fromhex(sys.argv[2]))
"""
"""The peak as the kernel keeps it for one program: ru_maxrss begins with that of its parent."""
FORKS = """
import shutil
for cfg in (cfgs[0], *cfgs):
    if not (pid := os.fork()):
        run(cfg)
    assert os.waitpid(pid, 0)[1] == 0
    if cfg is cfgs[0]:
        shutil.rmtree(sys.argv[3])
"""
"""A fork for each config. Before all others, the first one compiles what is not compiled yet. (A fork does not have those pages of
the libraries' files that it does not use: see ALONE.)"""
ALONE = """
run(cfgs[0])
"""
"""The first config as a user runs it."""
Measured = tuple[float, int]
"""GB that the log says, and bytes at the peak."""


def measured(
    module: str, cfgs: dict[str, tp.Any], made: pathlib.Path
) -> tuple[dict[str, Measured], Measured]:
    """(of each config; of the first one in a process of its own).

    made: what the first one makes.
    """
    args = [module, pickle.dumps([*cfgs.values()]).hex(), str(made)]
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # as many threads as a user has
    pipes = {"cwd": ROOT, "env": env, "capture_output": True, "text": True}
    _, *found = _measured(forked.run([sys.executable, "-c", RUN + FORKS, *args], also=(module,), **pipes))
    (alone,) = _measured(subprocess.run([sys.executable, "-c", RUN + ALONE, *args], **pipes))
    return dict(zip(cfgs, found, strict=True)), alone


def _measured(done: subprocess.CompletedProcess[str]) -> list[Measured]:
    assert done.returncode == 0, done.stderr
    said = re.findall(r"memory: about ([0-9.]+) GB", done.stderr)
    peaks = [line for line in done.stdout.splitlines() if line.isdecimal()]
    return [(float(gb), 1024 * int(kb)) for gb, kb in zip(said, peaks, strict=True)]


SMALL, CAMERA = 64, 3464
"""Sides of photos of 4 thousand and of 12 million pixels."""


def dumps(_: object, tmp_path: pathlib.Path) -> dict[str, data_config.Dump]:
    """A ViT of 23 MB. One photo in five or each one is a camera's, the others are small."""
    for side in (SMALL, CAMERA):
        PIL.Image.new("RGB", (side, side)).save(tmp_path / f"{side}.jpg")

    def dump(name: str, n_imgs: int, every: int, **kwargs: tp.Any) -> data_config.Dump:
        root = tmp_path / name
        root.mkdir()
        for i in range(n_imgs):
            (root / f"{i:03}.jpg").hardlink_to(tmp_path / f"{SMALL if i % every else CAMERA}.jpg")
        return data_config.Dump(
            vit=data_config.Vit("timm", "vit_tiny_patch16_224", "random"),
            data=data_config.ImageFolder(str(root)),
            dump_to=str(tmp_path / "shards"),
            device="cpu",
            **kwargs,
        )

    return {
        "nothing": dump("nothing", 2, 1, vit_batch_size=1, n_workers=1),
        "layers": dump("layers", 100, 5, vit_batch_size=20, vit_layers=tuple(range(12)), n_workers=1),
        "photos": dump("photos", 16, 1, vit_batch_size=2, n_workers=4),
    }


def gallery(
    make_shards,
    dpath: pathlib.Path,
    n_imgs: int,
    n_patches: int,
    d_sae: int,
    d_vit: int = 8,
    top_k: int = 4,
    **kwargs: tp.Any,
) -> visuals_config.Visuals:
    """Photos lie beside `dpath`, and several galleries may share them."""
    shape = {"n_imgs": n_imgs, "n_patches": n_patches, "d_vit": d_vit, "layers": (0,)}
    shard_dpath, _ = make_shards(**shape, cls_token=False, per_shard=1000)
    ckpt = dpath / "sae.pt"
    nn.save(nn.SparseAutoencoder(nn_config.TopK(d_vit=d_vit, d_sae=d_sae, top_k=top_k)), ckpt)
    imgs_dpath = dpath.parent / "imgs"
    for record in shards.ShardDir.open(shard_dpath).records:
        fpath = imgs_dpath / record.path
        fpath.parent.mkdir(parents=True, exist_ok=True)
        if not fpath.exists():
            PIL.Image.new("RGB", (64, 64)).save(fpath)
    return visuals_config.Visuals(
        images=data_config.ImageFolder(str(imgs_dpath)),
        ckpt=str(ckpt),
        data=data_config.Shards(str(shard_dpath)),
        dump_to=str(dpath / "gallery"),
        device="cpu",
        **kwargs,
    )


def galleries(make_shards, tmp_path: pathlib.Path) -> dict[str, visuals_config.Visuals]:
    tables = {"top_k": 64, "n_images": 128}
    paper = {"d_vit": 16, "top_k": 512, "n_images": 128}
    return {
        "nothing": gallery(make_shards, tmp_path / "nothing", 8, 4, 32),
        "tables": gallery(make_shards, tmp_path / "tables", 132, 196, 9216, **tables),
        "paper": gallery(make_shards, tmp_path / "paper", 136, 64, 32768, **paper),
        "weights": gallery(make_shards, tmp_path / "weights", 4, 4, 16384, d_vit=1024),
    }


def evaluations(make_shards, tmp_path: pathlib.Path) -> dict[str, list[protoeval_config.ProtoEval]]:
    cub = tmp_path / "cub"
    with pytest.MonkeyPatch.context() as patch:  # the labels matter here, not the photos
        patch.setattr(minicub, "picture", lambda bird, rng: (PIL.Image.new("RGB", (8, 8)),) * 2)
        minicub.draw(cub, n_imgs=160)
    paths = sorted(line.split()[1] for line in (cub / "images.txt").read_text().splitlines())

    def acts(n_patches: int, d_vit: int, n_imgs: int = 160) -> data_config.Shards:
        metadata = shards.Metadata(
            "timm", f"made-up-{d_vit}", (3,), n_patches, False, d_vit, n_imgs, 50 * n_patches,
            {"__class__": "ImageFolder"},
        )  # fmt: skip
        names = paths if n_imgs == len(paths) else [f"{i}.jpg" for i in range(n_imgs)]
        out = shards.ShardDir.create(
            tmp_path / f"acts{n_patches}", metadata, [shards.Record(p, "") for p in names], {}
        )
        rng = np.random.default_rng(0)
        for shard_i in range(metadata.n_shards):
            with out.writing(shard_i) as writer:
                shape = (len(metadata.imgs_in(shard_i)), 1, n_patches, d_vit)
                writer.write(rng.standard_normal(shape, np.float32))
        out = shards.ShardDir.open(str(out.dpath))
        id_NP = rng.integers(0, 4, (n_imgs, n_patches))
        patchlabels.write(out, "", id_NP, {i: f"part {i}" for i in range(4)}, {})
        return data_config.Shards(str(out.dpath), 3)

    def evaluation(name: str, train: data_config.Shards, k: int, **kwargs: tp.Any) -> list:
        return [
            protoeval_config.ProtoEval(
                cub_root=str(cub),
                train_data=train,
                n_prototypes=(k,),
                n_train=(16, -1),
                dump_to=str(tmp_path / name),
                scorers_to=str(tmp_path / name),
                device="cpu",
                **kwargs,
            )
        ]

    def patches(name: str, train: data_config.Shards, k: int, **kwargs: tp.Any) -> list:
        fpath = pathlib.Path(train.shard_root) / "labels.bin"
        return evaluation(name, train, k, n_boot=20, patch_labels=str(fpath), **kwargs)

    few, many, wide, long = acts(4, 4), acts(1000, 4, 200), acts(640, 512), acts(8000, 4)
    k_means = scorers_config.KMeans(n_samples=50_000, n_iters=1)
    return {
        "nothing": evaluation("nothing", few, 16),
        "scores": evaluation("scores", few, 130_000, fit_data=many),
        "fit": evaluation("fit", wide, 16, scorer=k_means, memory_gb=0.1, fit_data=wide),
        "sums in parts": patches("sums in parts", few, 10_000, fit_data=many, memory_gb=0.2),
        "test patches": patches("test patches", long, 16),
        "audit": patches("audit", long, 45, audit=(4,), memory_gb=0.2),
    }


def comparisons(make_shards, tmp_path: pathlib.Path) -> dict[str, compare_config.Compare]:
    def comparison(
        name: str, n_imgs: int, n_patches: int, d_sae: tuple[int, int], top_k: int, **kwargs: tp.Any
    ) -> compare_config.Compare:
        """With `other_d_vit`, the second side has activations of its own."""
        shape = {
            "n_imgs": n_imgs,
            "n_patches": n_patches,
            "layers": (0,),
            "cls_token": False,
            "per_shard": 1000,
        }
        other_d_vit = kwargs.pop("other_d_vit", None)
        data = data_config.Shards(str(make_shards(**shape)[0]), 0)
        if other_d_vit:
            kwargs["other_data"] = data_config.Shards(str(make_shards(**shape, d_vit=other_d_vit)[0]), 0)
        for seed, (other, n, d_vit) in enumerate(zip("ab", d_sae, (8, other_d_vit or 8), strict=True)):
            sae = nn.SparseAutoencoder(nn_config.TopK(d_vit=d_vit, d_sae=n, top_k=top_k), seed=seed)
            nn.save(sae, tmp_path / name / other / "sae.pt")
        return compare_config.Compare(
            scorer=str(tmp_path / name / "a" / "sae.pt"),
            other=str(tmp_path / name / "b" / "sae.pt"),
            data=data,
            dump_to=str(tmp_path / name / "made"),
            device="cpu",
            **kwargs,
        )

    tiles = {"candidates": 20, "memory_gb": 0.24, "other_d_vit": 9}
    return {
        "nothing": comparison("nothing", 8, 4, (32, 32), 4),
        "one to one": comparison("one to one", 200, 4, (1600, compare_memory.EXACT), 32),
        "codes": comparison("codes", 840, 100, (512, 512), 64, memory_gb=1.0),
        "tiles": comparison("tiles", 200, 4, (5632, 5632), 32, **tiles),
    }


Cases = collections.abc.Callable[..., dict[str, tp.Any]]


def check(module: str, cfgs: dict[str, tp.Any]) -> dict[str, Measured]:
    """The whole, and what each case takes above a tiny one, which is the program itself. Returns the whole of each."""
    first = cfgs["nothing"][0] if isinstance(cfgs["nothing"], list) else cfgs["nothing"]
    found, (said, alone) = measured(module, cfgs, pathlib.Path(first.dump_to))
    assert alone == pytest.approx(said * 1e9, rel=0.3)
    said_0, measured_0 = found["nothing"]
    for name, (said, taken) in found.items():
        if name != "nothing":
            assert taken - measured_0 > 150e6, name
            assert taken - measured_0 == pytest.approx((said - said_0) * 1e9, rel=0.3), name
    return {name: (said, taken - measured_0 + alone) for name, (said, taken) in found.items()}


@pytest.mark.parametrize(
    ("module", "cases"),
    [("saev.data.dump", dumps), ("saev.protoeval.run", evaluations), ("saev.compare.run", comparisons)],
)
def test_what_a_stage_says_is_right_within_30_percent(
    make_shards, tmp_path: pathlib.Path, module: str, cases: Cases
) -> None:
    check(module, cases(make_shards, tmp_path))


def test_galleries_and_one_of_32768_latents_with_128_images_needs_less_than_2_gb(
    make_shards, tmp_path: pathlib.Path
) -> None:
    """Every latent of the large one fires on about all images. 16 dimensions are encoded quickly; those of a ViT-S need
    more memory for the weights, which is added."""
    cfgs = galleries(make_shards, tmp_path)
    said, taken = check("saev.visuals.collect", cfgs)["paper"]
    cfg = cfgs["paper"]
    n_images_S = pl.read_csv(pathlib.Path(cfg.dump_to) / "latents.csv")["n_images"]
    assert len(n_images_S) == 32768 and n_images_S.median() >= 64
    weights = visuals_memory.peak(cfg, visuals_memory.Sizes(136, 64, 384, 32768))
    weights -= visuals_memory.peak(cfg, visuals_memory.Sizes(136, 64, 16, 32768))
    assert 0 < weights < 0.3e9
    assert taken + weights < 2e9
    assert taken == pytest.approx(said * 1e9, rel=0.3)


def test_constants_of_an_evaluation_are_those_of_its_modules() -> None:
    assert (protoeval_memory.FIT_BLOCK, protoeval_memory.SCORE_BLOCK) == (patch_fit.N_IMGS, score.MAX_BLOCK)
    assert base.TILE["cuda"] == (gpu_memory.TILE_ROWS, gpu_memory.TILE_BYTES)
    assert 4 * kmeans.TILE["cuda"] == gpu_memory.DISTANCES
    assert protoeval_memory.BINS == 8 * (6 * logistic.N_BINS + 4)
    assert protoeval_memory.SCORES == 4 * patch_fit.TILE
    assert protoeval_memory.PROBES == probe.N_FOLDS * probe.AT_ONCE
    assert protoeval_memory.UNTRAINED == untrained.N_SAMPLES
    assert protoeval_memory.PRE_ACTIVATIONS == 4 * batch_top_k.CALIBRATED
    assert protoeval_memory.AP_BLOCKS == 4 * ap.BLOCK_BYTES
    assert training_memory.COMPARED == metrics.CHUNK
