"""What a whole protoeval costs above the products that score the patches.

    uv run python -m benchmarks.protoeval [--quick]

The pass: every patch of random activations scored by every prototype, and reduced to images. The grid: the whole command
with four scorers at four K and five numbers of train images, 312 traits, 1,000 resamples. Reference: reading the same shards
and the same products of activations and prototypes (B x D by D x K, float32), timed in turn.

Correctness: largest difference of an image's score to the max over its patches of the score's definition in float64; of a test AP to scikit-learn's on the
scores of plain products in float64 (float32's rounding may exchange neighbours in a ranking).
"""

import argparse
import collections.abc
import copy
import dataclasses
import pathlib
import tempfile

import numpy as np
import sklearn.metrics
import torch

from benchmarks import common
from saev import nn, scorers
from saev.data import activations, ordered
from saev.data import config as data_config
from saev.formats import shards
from saev.nn import config as nn_config
from saev.protoeval import config, gallery, run, score
from saev.scorers import config as scorers_config
from saev.scorers import sae as sae_scorer

N_PATCHES, T = 256, 312


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images: under 40 s")
    args = parser.parse_args()
    n_imgs, k, n_repeats = (96, 2048, 3) if args.quick else (96, 8192, 3)
    cases = []
    for d_vit in (384,) if args.quick else (384, 1024):
        with tempfile.TemporaryDirectory() as root:
            data = write(pathlib.Path(root) / "dump", n_imgs, d_vit)
            for name, scorer in made(k, d_vit).items():
                cases.append(measure_pass(name, scorer, data, n_imgs, n_repeats))
    n_imgs, d_vit = (200, 384) if args.quick else (400, 1024)
    with tempfile.TemporaryDirectory() as root:
        cases.append(measure_grid(pathlib.Path(root), n_imgs, d_vit, k, 2))
    common.report(cases)


def write(root: pathlib.Path, n_imgs: int, d_vit: int) -> data_config.Shards:
    rng = np.random.default_rng(0)
    metadata = shards.Metadata("timm", "random", (0,), N_PATCHES, False, d_vit, n_imgs, 200 * N_PATCHES, {})
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
        f"{name}": scorers.Prototypes.of(p_KD, mean_D, name) for name in ("dot", "cosine", "distance")
    }
    for cls in (nn_config.Relu, nn_config.TopK, nn_config.BatchTopK):
        sae = nn.SparseAutoencoder(cls(d_vit=d_vit, d_sae=k)).eval()
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

    def floor() -> None:
        for block in ordered.Ordered(data):
            common.products(torch.from_numpy(block.act_NXD).flatten(0, 1), W_KD)

    def ours() -> score.Scores:
        with tempfile.TemporaryDirectory() as dpath:
            images = list(range(n_imgs))
            return score.score_images(
                [scorer], activations.Activations(data), images, pathlib.Path(dpath), torch.device("cpu")
            )

    floor(), ours()
    calls: dict[str, collections.abc.Callable[[], float]] = {
        "floor": lambda: common.seconds(floor),
        "saev": lambda: common.seconds(ours),
    }
    timed = common.interleaved(calls, n_repeats)
    x_BPD = torch.from_numpy(first[:4])
    want_BK = plainly(scorer, x_BPD.double().flatten(0, 1))
    want_BK = want_BK.unflatten(0, x_BPD.shape[:2]).amax(dim=1)
    return {
        "name": f"pass: {name}, {d_vit} wide, K {k}",
        "ratio": round(common.median_ratio(timed["saev"], timed["floor"]), 3),
        "reference": "reads + products",
        "seconds": [round(s, 2) for s in timed["saev"]],
        "max_diff": (scorer.of_images(x_BPD) - want_BK).abs().max().item(),
    }


def plainly(scorer: scorers.Scorer, x_BD: torch.Tensor) -> torch.Tensor:
    """Scores from their definition, in float64."""
    if isinstance(scorer, sae_scorer.SaeLatents):
        wide = copy.deepcopy(scorer.sae).double()
        return wide.encode(x_BD)[:, : scorer.n_prototypes]
    p_KD, x_BD = scorer.direction_KD.double(), x_BD - scorer.mean_D
    if scorer.similarity == "distance":
        return -torch.cdist(x_BD, p_KD, compute_mode="donot_use_mm_for_euclid_dist").square()
    if scorer.similarity == "cosine":
        p_KD = torch.nn.functional.normalize(p_KD, dim=1)
        x_BD = torch.nn.functional.normalize(x_BD, dim=1)
    return x_BD @ p_KD.T


def measure_grid(dpath: pathlib.Path, n_imgs: int, d_vit: int, k: int, n_repeats: int) -> common.Case:
    """protoeval itself, its scorers fitted before: labels, pass, choice, intervals, report; against reads + all products."""
    data = write(dpath / "dump", n_imgs, d_vit)
    labels_NT = write_cub(dpath / "cub", n_imgs)
    ks = tuple(sorted({k // 64, k // 16, k // 4, k}))
    cfgs = [grid_config(dpath, data, scorer, ks) for scorer in grid_scorers(dpath, data, d_vit, k)]
    n_prototypes = sum(s.n_prototypes for cfg in cfgs for s in fitted(cfg))
    W_KD = torch.randn(n_prototypes, d_vit)
    made_in = []

    def ours() -> None:
        out = dpath / f"results-{len(made_in)}"
        made_in.append(run.main([dataclasses.replace(cfg, dump_to=str(out)) for cfg in cfgs]))

    def floor() -> None:
        for block in ordered.Ordered(data):
            common.products(torch.from_numpy(block.act_NXD).flatten(0, 1), W_KD)

    ours(), floor()
    calls: dict[str, collections.abc.Callable[[], float]] = {
        "floor": lambda: common.seconds(floor),
        "saev": lambda: common.seconds(ours),
    }
    timed = common.interleaved(calls, n_repeats)
    return {
        "name": f"grid: {n_imgs} images, {d_vit} wide, {n_prototypes:,} prototypes",
        "ratio": round(common.median_ratio(timed["saev"], timed["floor"]), 3),
        "reference": "reads + products",
        "seconds": [round(s, 1) for s in timed["saev"]],
        "floor_seconds": [round(s, 1) for s in timed["floor"]],
        "max_diff": grid_error(cfgs, labels_NT, pathlib.Path(made_in[0]) / "traits.parquet"),
    }


def write_cub(dpath: pathlib.Path, n_imgs: int) -> np.ndarray:
    """CUB's label files for images without relation to their activations; every other image is a train image."""
    rng = np.random.default_rng(1)
    labels_NT = rng.random((n_imgs, T)) < rng.uniform(0.02, 0.3, T)
    (dpath / "attributes").mkdir(parents=True)
    files = {
        "images.txt": (f"{i + 1} {i}.jpg" for i in range(n_imgs)),
        "train_test_split.txt": (f"{i + 1} {i % 2}" for i in range(n_imgs)),
        "image_class_labels.txt": (f"{i + 1} 1" for i in range(n_imgs)),
        "attributes/attributes.txt": (f"{t + 1} has_size::{t}" for t in range(T)),
        "attributes/image_attribute_labels.txt": (
            f"{i + 1} {t + 1} {int(labels_NT[i, t])} 4 1.0" for i in range(n_imgs) for t in range(T)
        ),
    }
    for name, lines in files.items():
        (dpath / name).write_text("\n".join(lines) + "\n")
    return labels_NT


def grid_scorers(
    dpath: pathlib.Path, data: data_config.Shards, d_vit: int, k: int
) -> list[scorers_config.Scorer]:
    sae = nn.SparseAutoencoder(nn_config.BatchTopK(d_vit=d_vit, d_sae=k)).eval()
    sae.requires_grad_(False)
    sae.threshold.fill_(2.0)
    nn.save(sae, dpath / "sae.pt", activations.Activations(data).space.describe())
    return [
        scorers_config.Random(),
        scorers_config.KMeans(n_iters=1, n_samples=2 * k),
        scorers_config.Pca(),
        scorers_config.Sae(str(dpath / "sae.pt")),
    ]


def grid_config(
    dpath: pathlib.Path, data: data_config.Shards, scorer: scorers_config.Scorer, ks: tuple[int, ...]
) -> config.ProtoEval:
    return config.ProtoEval(
        scorer=scorer,
        cub_root=str(dpath / "cub"),
        train_data=data,
        fit_data=data,
        n_prototypes=ks,
        scorers_to=str(dpath / "scorers"),
        force=True,  # labels without relation to anything
    )


def fitted(cfg: config.ProtoEval) -> list[scorers.Scorer]:
    """What protoeval scores: k-means once for each K, the others once."""
    several = isinstance(cfg.scorer, scorers_config.KMeans)
    ks = list(cfg.n_prototypes) if several else [max(cfg.n_prototypes)]
    dpath = pathlib.Path(cfg.scorers_to)
    return scorers.fit_each(cfg.scorer, cfg.fit, ks, seed=cfg.seed, dpath=dpath)


def grid_error(cfgs: list[config.ProtoEval], labels_NT: np.ndarray, fpath: pathlib.Path) -> float:
    """Largest difference of some test APs to scikit-learn's on scores of plain products: one scorer, some traits, all train images."""
    (scorer,) = fitted(cfgs[0])
    mine = gallery.best_traits(fpath.read_bytes(), "Random").head(20).to_dicts()
    p_CD = scorer.direction_KD[[line["prototype"] for line in mine]]
    p_CD = torch.nn.functional.normalize(p_CD, dim=1).double()
    parts = []
    for block in ordered.Ordered(cfgs[0].train_data):
        x_BPD = torch.from_numpy(block.act_NXD) - scorer.mean_D
        x_BPD = torch.nn.functional.normalize(x_BPD, dim=2).double()
        parts.append((x_BPD @ p_CD.T).amax(dim=1))
    scores_NC = torch.cat(parts).numpy()
    is_test_N = np.arange(len(scores_NC)) % 2 == 0
    traits = [int(line["trait"].partition("::")[2]) for line in mine]
    want = [
        sklearn.metrics.average_precision_score(labels_NT[is_test_N, t], scores_NC[is_test_N, c])
        for c, t in enumerate(traits)
    ]
    return max(abs(line["test_ap"] - ap) for line, ap in zip(mine, want, strict=True))


if __name__ == "__main__":
    main()
