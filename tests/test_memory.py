"""The memory that a dump, a gallery, ... are said to take, against processes that do them."""

import collections.abc
import pathlib
import pickle
import re
import subprocess
import sys
import typing as tp

import numpy as np
import PIL.Image
import polars as pl
import pytest

from saev import nn
from saev.compare import config as compare_config
from saev.data import config as data_config
from saev.demo import minicub
from saev.formats import patchlabels, shards
from saev.nn import config as nn_config
from saev.protoeval import config as protoeval_config
from saev.scorers import config as scorers_config
from saev.visuals import config as visuals_config
from saev.visuals import memory as visuals_memory

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
RUN = """
import importlib, logging, os, pathlib, pickle, re, shutil, sys

def run(cfg):
    module.main(cfg)
    print(re.search("VmHWM:[^0-9]*([0-9]+) kB", pathlib.Path("/proc/self/status").read_text())[1])

logging.basicConfig(level="INFO")
module = importlib.import_module(sys.argv[1])
first, *others = pickle.loads(bytes.fromhex(sys.argv[2]))
for cfg in [first, *others] if others else []:
    if not (pid := os.fork()):
        run(cfg)
        sys.exit()
    assert os.waitpid(pid, 0)[1] == 0
if others:
    shutil.rmtree(sys.argv[3])
run(first)
"""
"""A fork for each of several configs, and the first once more as a user runs it: a fork does not have those pages of the libraries'
files that it does not use. The peak as the kernel keeps it for one program: ru_maxrss begins with that of its parent."""
Measured = tuple[float, int]
"""GB that the log says, and bytes at the peak."""


def measured(
    module: str, cfgs: dict[str, tp.Any], made: pathlib.Path
) -> tuple[dict[str, Measured], Measured]:
    """(of each config, if there are several; of the first one in a process of its own). made: what the first one makes."""
    command = [sys.executable, "-c", RUN, module, pickle.dumps([*cfgs.values()]).hex(), str(made)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"memory: about ([0-9.]+) GB", done.stderr)
    peaks = [line for line in done.stdout.splitlines() if line.isdecimal()]
    *found, alone = [(float(gb), 1024 * int(kb)) for gb, kb in zip(said, peaks, strict=True)]
    return dict(zip(cfgs, found, strict=len(cfgs) > 1)), alone


CAMERA = 3464
"""Side of a photo of 12 megapixels."""


def dumps(_: object, tmp_path: pathlib.Path) -> dict[str, data_config.Dump]:
    """A ViT of 23 MB."""

    def dump(name: str, n_imgs: int, side: int, **kwargs: tp.Any) -> data_config.Dump:
        root = tmp_path / name
        root.mkdir()
        PIL.Image.new("RGB", (side, side)).save(root / "0.jpg")
        for i in range(1, n_imgs):
            (root / f"{i}.jpg").hardlink_to(root / "0.jpg")
        return data_config.Dump(
            vit=data_config.Vit("timm", "vit_tiny_patch16_224", "random"),
            data=data_config.ImageFolder(str(root)),
            dump_to=str(tmp_path / "shards"),
            device="cpu",
            **kwargs,
        )

    return {
        "nothing": dump("nothing", 2, CAMERA, vit_batch_size=1, n_workers=1),
        "layers": dump("layers", 256, 64, vit_layers=tuple(range(12)), n_workers=1),
        "photos": dump("photos", 32, CAMERA, vit_batch_size=8, n_workers=4),
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
    tables = {"d_vit": 16, "top_k": 64, "n_images": 128}
    return {
        "nothing": gallery(make_shards, tmp_path / "nothing", 8, 4, 32),
        "tables": gallery(make_shards, tmp_path / "tables", 300, 256, 16384, **tables),
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

    few, many, wide, long = acts(4, 4), acts(1000, 4, 200), acts(640, 512), acts(10_000, 4)
    k_means = scorers_config.KMeans(n_samples=100_000, n_iters=1)
    return {
        "nothing": evaluation("nothing", few, 16),
        "scores": evaluation("scores", few, 190_000, fit_data=many),
        "fit": evaluation("fit", wide, 16, scorer=k_means, memory_gb=0.1, fit_data=wide),
        "sums in parts": patches("sums in parts", few, 10_000, fit_data=many, memory_gb=0.2),
        "test patches": patches("test patches", long, 16),
        "audit": patches("audit", long, 75, audit=(4,), memory_gb=0.25),
    }


def comparisons(make_shards, tmp_path: pathlib.Path) -> dict[str, compare_config.Compare]:
    def comparison(
        name: str, n_imgs: int, n_patches: int, d_sae: int, top_k: int, d_vit: int = 8, **kwargs: tp.Any
    ) -> compare_config.Compare:
        dpath, _ = make_shards(
            n_imgs=n_imgs, n_patches=n_patches, d_vit=d_vit, layers=(0,), cls_token=False, per_shard=1000
        )
        for seed, other in enumerate("ab"):
            sae = nn.SparseAutoencoder(nn_config.TopK(d_vit=d_vit, d_sae=d_sae, top_k=top_k), seed=seed)
            nn.save(sae, tmp_path / name / other / "sae.pt")
        return compare_config.Compare(
            scorer=str(tmp_path / name / "a" / "sae.pt"),
            other=str(tmp_path / name / "b" / "sae.pt"),
            data=data_config.Shards(str(dpath), 0),
            dump_to=str(tmp_path / name / "made"),
            device="cpu",
            **kwargs,
        )

    return {
        "nothing": comparison("nothing", 8, 4, 32, 4),
        "one to one": comparison("one to one", 200, 16, 4096, 32),
        "codes": comparison("codes", 1200, 100, 512, 64, memory_gb=2.0),
        "tiles": comparison("tiles", 100, 16, 8192, 32, memory_gb=0.5),
    }


@pytest.mark.parametrize(
    ("module", "cases"),
    [
        ("saev.data.dump", dumps),
        ("saev.visuals.collect", galleries),
        ("saev.protoeval.run", evaluations),
        ("saev.compare.run", comparisons),
    ],
)
def test_what_a_stage_says_is_right_within_30_percent(
    make_shards, tmp_path: pathlib.Path, module: str, cases: collections.abc.Callable
) -> None:
    """The whole, and what each case takes above a tiny one, which is the program itself."""
    cfgs = cases(make_shards, tmp_path)
    first = cfgs["nothing"][0] if isinstance(cfgs["nothing"], list) else cfgs["nothing"]
    found, (said, taken) = measured(module, cfgs, pathlib.Path(first.dump_to))
    assert taken == pytest.approx(said * 1e9, rel=0.3)
    said_0, measured_0 = found.pop("nothing")
    for name, (said, taken) in found.items():
        assert taken - measured_0 > 150e6, name
        assert taken - measured_0 == pytest.approx((said - said_0) * 1e9, rel=0.3), name


def test_a_gallery_of_32768_latents_with_128_images_needs_less_than_2_gb(
    make_shards, tmp_path: pathlib.Path
) -> None:
    """Every latent fires on about all images. 64 dimensions are encoded quickly; those of a ViT-S need more memory
    for the weights, which is added."""
    d_vit, n, n_imgs = 64, 32768, 136
    shape = {"d_vit": d_vit, "top_k": 512, "n_images": 128}
    cfg = gallery(make_shards, tmp_path / "paper", n_imgs, 64, n, **shape)
    _, (said, taken) = measured("saev.visuals.collect", {"paper": cfg}, tmp_path)
    n_images_S = pl.read_csv(pathlib.Path(cfg.dump_to) / "latents.csv")["n_images"]
    assert len(n_images_S) == n and n_images_S.median() >= 64
    weights = visuals_memory.peak(cfg, visuals_memory.Sizes(n_imgs, 64, 384, n))
    weights -= visuals_memory.peak(cfg, visuals_memory.Sizes(n_imgs, 64, d_vit, n))
    assert 0 < weights < 0.3e9
    assert taken + weights < 2e9
    assert taken == pytest.approx(said * 1e9, rel=0.3)
