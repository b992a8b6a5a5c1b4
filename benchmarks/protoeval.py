"""What a whole protoeval costs above the products that score the patches.

    uv run python -m benchmarks.protoeval [--quick]

A dump of random activations with CUB's number of traits; scorers of each kind at several K, several numbers of train images.
The pass: every patch scored by every prototype, and reduced to images. Reference: reading the same shards and the same
products of activations and prototypes (B x D by D x K, float32), timed in turn. The grid: pass, choice, bootstrap.

Correctness: largest difference of an image's score to the max over a plain product.
"""

import argparse
import collections.abc
import pathlib
import tempfile

import numpy as np
import torch

from benchmarks import common
from saev import nn, scorers
from saev.data import config as data_config
from saev.data import ordered
from saev.formats import shards
from saev.nn import config as nn_config
from saev.protoeval import config, scoring, select
from saev.scorers import sae as sae_scorer

N_PATCHES, T = 256, 312


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images: under 40 s")
    args = parser.parse_args()
    n_imgs, k, n_repeats = (96, 2048, 3) if args.quick else (128, 8192, 3)
    cases = []
    for d_vit in (384,) if args.quick else (384, 1024):
        with tempfile.TemporaryDirectory() as root:
            data = write(pathlib.Path(root) / "dump", n_imgs, d_vit)
            for name, scorer in made(k, d_vit).items():
                cases.append(measure_pass(name, scorer, data, n_imgs, n_repeats))
    n_imgs = 400 if args.quick else 4000
    cases.append(measure_choice(n_imgs, k))
    common.report(cases)


def write(root: pathlib.Path, n_imgs: int, d_vit: int) -> data_config.Shards:
    rng = np.random.default_rng(0)
    metadata = shards.Metadata(
        "timm", "random", (0,), N_PATCHES, False, d_vit, n_imgs, 200 * N_PATCHES, {}
    )
    records = [shards.Record(f"{i}.jpg", "") for i in range(n_imgs)]
    out = shards.ShardDir.create(root, metadata, records, {})
    for shard_i in range(metadata.n_shards):
        shape = (len(metadata.imgs_in(shard_i)), 1, N_PATCHES, d_vit)
        with out.writing(shard_i) as writer:
            writer.write(rng.standard_normal(shape, dtype=np.float32))
    return data_config.Shards(str(out.dpath), 0)


def made(k: int, d_vit: int) -> dict[str, scorers.Scorer]:
    """One scorer of each kind, all with about k prototypes."""
    generator = torch.Generator().manual_seed(0)
    p_KD, mean_D = torch.randn(k, d_vit, generator=generator), torch.zeros(d_vit)
    out: dict[str, scorers.Scorer] = {
        f"{name}": scorers.Prototypes(p_KD, mean_D, name) for name in ("dot", "cosine", "distance")
    }
    for cls in (nn_config.Relu, nn_config.TopK, nn_config.BatchTopK):
        sae = nn.SparseAutoencoder(cls(d_vit=d_vit, exp_factor=k // d_vit)).eval()
        sae.requires_grad_(False)
        sae.threshold.fill_(2.0)
        out[f"SAE, {cls.__name__}"] = sae_scorer.SaeLatents(sae, sae.d_sae)
    return out


def measure_pass(
    name: str, scorer: scorers.Scorer, data: data_config.Shards, n_imgs: int, n_repeats: int
) -> common.Case:
    k = scorer.n_prototypes
    first = next(iter(ordered.Ordered(data))).act_NXD
    d_vit = first.shape[2]
    W_KD = torch.randn(k, d_vit)
    out = torch.empty(64 * N_PATCHES, k)

    def floor() -> None:
        for block in ordered.Ordered(data):
            x_BD = torch.from_numpy(block.act_NXD).flatten(0, 1)
            torch.mm(x_BD, W_KD.T, out=out[: len(x_BD)])

    def ours() -> scoring.Scores:
        with tempfile.TemporaryDirectory() as dpath:
            images = list(range(n_imgs))
            return scoring.score([scorer], data, images, pathlib.Path(dpath), torch.device("cpu"))

    floor(), ours()
    calls: dict[str, collections.abc.Callable[[], float]] = {
        "floor": lambda: common.seconds(floor),
        "saev": lambda: common.seconds(ours),
    }
    timed = common.interleaved(calls, n_repeats)
    x_BPD = torch.from_numpy(first[:4])
    want_BK = scorer(x_BPD.flatten(0, 1)).unflatten(0, x_BPD.shape[:2]).amax(dim=1)
    return {
        "name": f"pass: {name}, {d_vit} wide, K {k}",
        "ratio": round(common.median_ratio(timed["saev"], timed["floor"]), 3),
        "reference": "reads + products",
        "seconds": [round(s, 2) for s in timed["saev"]],
        "max_diff": (scorer.of_images(x_BPD) - want_BK).abs().max().item(),
    }


def measure_choice(n_imgs: int, k: int) -> common.Case:
    """APs, choices and 1,000 resamples of the whole grid, as a fraction of one product of the images' patches with the prototypes."""
    rng = np.random.default_rng(0)
    splits = []
    for _ in range(2):
        scores_KN = rng.standard_normal((k, n_imgs), dtype=np.float32)
        means_ND = rng.standard_normal((n_imgs, 64), dtype=np.float32)
        scores = scoring.Scores(scores_KN, means_ND, np.arange(n_imgs))
        splits.append(select.Split(scores, np.arange(n_imgs), rng.random((n_imgs, T)) < 0.1))
    ks = tuple(sorted({128, 512, 2048, k}))
    scorer = scorers.Prototypes(torch.zeros(k, 1), torch.zeros(1), "dot")
    cfg = config.ProtoEval(n_prototypes=ks, n_train=(16, 64, 256, 1024, -1))
    seconds = common.seconds(lambda: select.evaluate(*splits, [select.Bank("a", scorer, ks)], cfg))
    x_BD, W_KD = torch.randn(64 * N_PATCHES, 1024), torch.randn(k, 1024)
    product_s = min(common.seconds(lambda: x_BD @ W_KD.T) for _ in range(3)) * 2 * n_imgs / 64
    return {
        "name": f"choice: {n_imgs} + {n_imgs} images, K {' '.join(map(str, ks))}",
        "ratio": round(seconds / product_s, 3),
        "reference": "the products of a 1,024 wide ViT's patches (extrapolated)",
        "seconds": round(seconds, 1),
        "cells": len(ks) * 5,
    }


if __name__ == "__main__":
    main()
