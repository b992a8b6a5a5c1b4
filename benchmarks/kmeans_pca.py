"""What fitting k-means and PCA costs above reading the shards and the one product that they cannot do without.

    uv run python -m benchmarks.kmeans_pca [--quick]

A pass of Lloyd's algorithm reads every activation and multiplies it with every centre (B x D by D x K); PCA reads and
multiplies X'X. References: the same reads (files in the page cache) and a float32 product of the same blocks, timed in
turn with what is measured; ratios are medians. scikit-learn and faiss (dependency group `peers`) get the activations as
one array in memory, the same start and the same number of passes.

Correctness: `inertia` after the same passes from the same start; PCA: largest relative error of an eigenvalue against numpy
in float64. Cases "own start" have no time: their ratio is the inertia after the same passes from each library's own start to
scikit-learn's, means over seeds. (Every library takes its passes over all activations; saev's start is refined on its sample.)
"""

import argparse
import importlib.util
import pathlib
import tempfile
import warnings

import numpy as np
import sklearn.cluster
import sklearn.decomposition
import sklearn.exceptions
import torch

from benchmarks import common
from saev.data import activations, ordered
from saev.data import config as data_config
from saev.formats import shards
from saev.scorers import config, kmeans, pca

N_PATCHES, D = 256, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few activations: under 40 s")
    args = parser.parse_args()
    # images, K, passes, repeats
    sizes = [(2000, 512, 2, 5), (800, 2048, 2, 3), (400, 8192, 1, 3), (200, 32_768, 1, 1)]
    starts = [(200, 512, 10, 3), (200, 2048, 10, 2)]
    if args.quick:
        sizes, starts = [(200, 512, 2, 3)], [(100, 128, 5, 2)]
    cases = []
    with tempfile.TemporaryDirectory() as root:
        data, x_BD = write(pathlib.Path(root), sizes[0][0])
        cases += measure_pca(data, x_BD, 5)
    for n_imgs, k, n_passes, n_repeats in sizes:
        with tempfile.TemporaryDirectory() as root:
            cases += measure_kmeans(*write(pathlib.Path(root), n_imgs), k, n_passes, n_repeats)
    for n_imgs, k, n_passes, n_seeds in starts:
        with tempfile.TemporaryDirectory() as root:
            cases += measure_starts(*write(pathlib.Path(root), n_imgs), k, n_passes, n_seeds)
    common.report(cases)


def write(root: pathlib.Path, n_imgs: int) -> tuple[data_config.Shards, np.ndarray]:
    """A dump of sparse sums of 1,024 directions with a decaying spectrum and an offset, and all of it as an array."""
    rng = np.random.default_rng(0)
    atoms_AD = rng.standard_normal((1024, D), dtype=np.float32)
    atoms_AD *= (np.arange(1, 1025, dtype=np.float32) ** -0.5)[:, None]
    offset_D = 3 * rng.standard_normal(D, dtype=np.float32)
    metadata = shards.Metadata("timm", "random", (0,), N_PATCHES, False, D, n_imgs, 500 * N_PATCHES, {})
    out = shards.ShardDir.create(root, metadata, [shards.Record(f"{i}.jpg", "") for i in range(n_imgs)], {})
    parts = []
    for shard_i in range(metadata.n_shards):
        n = len(metadata.imgs_in(shard_i)) * N_PATCHES
        code_BA = rng.random((n, 1024), dtype=np.float32)
        code_BA *= rng.random((n, 1024), dtype=np.float32) < 0.02
        parts.append(code_BA @ atoms_AD + offset_D)
        with out.writing(shard_i) as writer:
            writer.write(parts[-1].reshape(-1, 1, N_PATCHES, D))
    return data_config.Shards(str(out.dpath), 0), np.concatenate(parts)


def measure_kmeans(
    data: data_config.Shards, x_BD: np.ndarray, k: int, n_passes: int, n_repeats: int
) -> list[common.Case]:
    """saev's pass beside its floor; scikit-learn's and faiss's from the same start (random activations), as ratios to as many floors."""
    mean_D = torch.from_numpy(x_BD.mean(axis=0))
    rows_K = np.random.default_rng(0).choice(len(x_BD), k, replace=False)
    start_KD = torch.from_numpy(x_BD[rows_K]) - mean_D
    cfg = config.KMeans(n_iters=n_passes, tolerance=0.0)

    def ours() -> np.ndarray:
        state = kmeans.State(mean_D, start_KD.clone())
        for _ in range(n_passes):
            kmeans.one_pass([state], activations.Activations(data), cfg)
        return (state.center_KD + mean_D).numpy()

    def floor() -> None:
        for _ in range(n_passes):
            for block in ordered.Ordered(data):
                common.products(torch.from_numpy(block.act_NXD).flatten(0, 1), start_KD)

    calls = {"saev": ours, "scikit-learn": lambda: _sklearn(x_BD, n_passes, 0, x_BD[rows_K])}
    if importlib.util.find_spec("faiss"):
        calls["faiss"] = lambda: _faiss(x_BD, k, n_passes, 0, x_BD[rows_K])
    floor()
    centers = {name: call() for name, call in calls.items()}
    every = {"floor": floor, **calls}
    timed = common.interleaved({n: lambda c=c: common.seconds(c) for n, c in every.items()}, n_repeats)
    return [
        {
            "name": f"k-means K {k:,}, {n_passes} passes over {len(x_BD):,}: {name}",
            "ratio": round(common.median_ratio(timed[name], timed["floor"]), 3),
            "reference": "reads + products of as many passes",
            "seconds": [round(t, 2) for t in timed[name]],
            "inertia": round(inertia(x_BD, center_KD), 1),
        }
        for name, center_KD in centers.items()
    ]


def measure_starts(
    data: data_config.Shards, x_BD: np.ndarray, k: int, n_passes: int, n_seeds: int
) -> list[common.Case]:
    """Inertia after the same passes from each library's own start."""
    cfg = config.KMeans(n_iters=n_passes, tolerance=0.0)
    calls = {
        "saev": lambda seed: kmeans.fit(cfg, activations.Activations(data), [k], seed)[0].vectors_KD.numpy(),
        "scikit-learn": lambda seed: _sklearn(x_BD, n_passes, seed, k),
    }
    if importlib.util.find_spec("faiss"):
        calls["faiss"] = lambda seed: _faiss(x_BD, k, n_passes, seed, None)
    seeds = range(n_seeds)
    found = {name: [inertia(x_BD, call(s)) for s in seeds] for name, call in calls.items()}
    want = float(np.mean(found["scikit-learn"]))
    return [
        {
            "name": f"own start, K {k:,}, {n_passes} passes over {len(x_BD):,}: {name}",
            "ratio": round(float(np.mean(values)) / want, 4),
            "reference": "scikit-learn's inertia",
            "inertia": [round(v, 1) for v in values],
        }
        for name, values in found.items()
    ]


def _sklearn(x_BD: np.ndarray, n_passes: int, seed: int, start: np.ndarray | int) -> np.ndarray:
    """Centres from a start (K, D), or from its own start with that many centres."""
    k, init = (start, "k-means++") if isinstance(start, int) else (len(start), start)
    km = sklearn.cluster.KMeans(k, init=init, n_init=1, max_iter=n_passes, tol=0, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        return km.fit(x_BD).cluster_centers_


def _faiss(x_BD: np.ndarray, k: int, n_passes: int, seed: int, start_KD: np.ndarray | None) -> np.ndarray:
    import faiss

    km = faiss.Kmeans(
        D, k, niter=n_passes, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(x_BD)
    )
    km.train(x_BD, init_centroids=start_KD)
    return km.centroids


def inertia(x_BD: np.ndarray, center_KD: np.ndarray) -> float:
    """Sum of squared distances to the nearest centre."""
    mean_D = torch.from_numpy(x_BD.mean(axis=0))
    center_KD = torch.from_numpy(np.ascontiguousarray(center_KD, np.float32)) - mean_D
    chunks = torch.from_numpy(x_BD).split(2**15)
    return sum(kmeans.nearest(c - mean_D, center_KD)[1].sum(dtype=torch.float64).item() for c in chunks)


def measure_pca(data: data_config.Shards, x_BD: np.ndarray, n_repeats: int) -> list[common.Case]:
    """saev's pass beside reads + X'X; scikit-learn's IncrementalPCA on the array in memory."""

    def floor() -> None:
        for block in ordered.Ordered(data):
            x = torch.from_numpy(block.act_NXD).flatten(0, 1)
            x.T @ x

    def incremental() -> np.ndarray:
        fitted = sklearn.decomposition.IncrementalPCA(128, batch_size=16384).fit(x_BD)
        return fitted.explained_variance_

    calls = {"floor": floor, "saev": lambda: pca.fit(activations.Activations(data))}
    for call in calls.values():
        call()
    timed = common.interleaved({n: lambda c=c: common.seconds(c) for n, c in calls.items()}, n_repeats)
    theirs_s = common.seconds(incremental)
    wide_BD = x_BD.astype(np.float64)
    wide_BD -= wide_BD.mean(axis=0)
    want_K = np.linalg.eigvalsh(wide_BD.T @ wide_BD / len(wide_BD))[::-1][:128]
    scorer = pca.fit(activations.Activations(data)).prefix(128)
    direction_KD = scorer.direction_KD.double().numpy()
    got_K = (wide_BD @ direction_KD.T).var(axis=0)
    error = float(np.abs(got_K / want_K - 1).max())
    n_floor = float(np.median(timed["floor"]))
    return [
        {
            "name": "PCA, 128 components: saev",
            "ratio": round(common.median_ratio(timed["saev"], timed["floor"]), 3),
            "reference": "reads + X'X",
            "seconds": [round(t, 2) for t in timed["saev"]],
            "max_relative_error": error,
        },
        {
            "name": "PCA, 128 components: scikit-learn Incremental",
            "ratio": round(theirs_s / n_floor, 3),
            "reference": "reads + X'X",
            "max_relative_error": float(np.abs(incremental() / want_K - 1).max()),
        },
    ]


if __name__ == "__main__":
    main()
