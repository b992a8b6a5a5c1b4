"""Prints docs/memory.md's table of peak GPU memory per stage, from formulas. Needs no GPU.

The formula of a training step is in `saev/training/memory.py`, because train.py uses it.

uv run python -m benchmarks.gpu_memory
"""

import collections.abc
import functools
import typing as tp

from saev.data import config as data_config
from saev.data import memory as data_memory
from saev.nn import config as nn_config
from saev.protoeval import config as protoeval_config
from saev.protoeval import memory as protoeval_memory
from saev.scorers import config as scorers_config
from saev.training import config as training_config
from saev.training import memory as training_memory
from saev.visuals import memory as visuals_memory

GPU_GB = 72.0
"""What an 80 GB card has free, less a tenth."""
N_PATCHES, N_IMAGES, K = 256, 10_000, 64
"""Patches per image, images shown per latent, --sae.top-k."""


class Size(tp.NamedTuple):
    """A dictionary and a batch."""

    d_vit: int
    d_sae: int
    batch: int


TILE_ROWS, TILE_BYTES = 2**14, 2**28
"""Most patches whose scores a GPU computes at once, and bytes of these scores (`scorers.base.TILE`)."""
DISTANCES = 4 * 2**28
"""Bytes of the distances that k-means computes at once on a GPU (`scorers.kmeans.TILE`)."""
IN_FORWARD, BESIDES_RECORDED = 16, 10
"""A batch's memory in the ViT, in multiples of its residual stream: at least, and besides the recorded activations."""

SIZES = [Size(1024, 16_384, 4096), Size(1024, 32_768, 16_384), Size(4096, 131_072, 16_384)]


class Step(tp.NamedTuple):
    """A training step."""

    sae: collections.abc.Callable[..., tp.Any]
    objective: nn_config.Objective = nn_config.Vanilla()
    is_costly: bool = False
    """Measures costly metrics."""
    dead: float = 0.0
    """Fraction of latents that are dead."""
    gpu_gb: float = GPU_GB


TOP_K = functools.partial(nn_config.TopK, top_k=K)
SAES = {
    "TopK": Step(TOP_K),
    "BatchTopK": Step(functools.partial(nn_config.BatchTopK, top_k=K)),
    "TopK, Matryoshka": Step(TOP_K, nn_config.Matryoshka()),
    "TopK, all latents dead": Step(TOP_K, dead=1.0),
    "ReLU": Step(nn_config.Relu),
    "JumpReLU": Step(nn_config.JumpRelu),
    "TopK, costly metrics": Step(TOP_K, is_costly=True),
    "TopK, all latents dead, `--gpu-gb 32`": Step(TOP_K, dead=1.0, gpu_gb=32),
    "ReLU, `--gpu-gb 32`": Step(nn_config.Relu, gpu_gb=32),
    "JumpReLU, `--gpu-gb 32`": Step(nn_config.JumpRelu, gpu_gb=32),
    "JumpReLU, costly metrics, `--gpu-gb 32`": Step(nn_config.JumpRelu, is_costly=True, gpu_gb=32),
}
VIT = data_memory.Sizes(1_212_715_008, 224 * 224, N_PATCHES + 1, 1024, 4)
"""ViT-L/14 at 224 pixels with four recorded layers."""


def train(name: str, size: Size) -> training_config.Train:
    made = SAES[name].sae(d_vit=size.d_vit, d_sae=size.d_sae)
    return training_config.Train(
        sae=made, objective=SAES[name].objective, batch_size=size.batch, n_patches=10**9
    )


def part_bytes(name: str, size: Size) -> int:
    return training_memory.part_bytes([train(name, size)], int(SAES[name].gpu_gb * 1e9))


def evaluation(
    scorer: tp.Any, size: Size, k: int
) -> tuple[protoeval_config.ProtoEval, protoeval_memory.Sizes]:
    ckpt = 8 * size.d_vit * size.d_sae
    sizes = protoeval_memory.Sizes(5994, 5794, 312, N_PATCHES, size.d_vit, 5994 * N_PATCHES, ckpt)
    return protoeval_config.ProtoEval(scorer=scorer, n_prototypes=(k,)), sizes


# ---- peak bytes of a GPU's tensors ----


def in_evaluation(cfg: training_config.Train) -> int:
    """In the evaluation after training."""
    d_vit, n_latents = cfg.sae.d_vit or 0, cfg.sae.n_latents
    weights = 8 * d_vit * n_latents
    first = 4 * d_vit * training_memory.n_read_first(d_vit, cfg.n_val_patches)
    coherence = weights // 2 + 12 * training_memory.COMPARED * n_latents
    tables = 8 * min(n_latents, training_memory.CORRELATED) ** 2
    return weights + max(first, coherence + tables, 3 * training_memory.EVALUATED_CODES)


def in_visuals(sizes: visuals_memory.Sizes) -> int:
    """In visuals.py, for an SAE."""
    codes, acts = (4 * sizes.block * sizes.n_patches * width for width in (sizes.n, sizes.d_vit))
    weights = 8 * sizes.d_vit * sizes.n
    neighbours = weights // 2 + 8 * visuals_memory.AT_ONCE * sizes.n
    return weights + max(codes + codes // 4 + 3 * acts, neighbours)


def in_scoring(cfg: protoeval_config.ProtoEval, sizes: protoeval_memory.Sizes) -> int:
    """In the pass over images: a scorer, a block of images, a tile of scores."""
    k, is_sae = protoeval_memory.n_prototypes(cfg, sizes.d_vit), scorers_config.checkpoint(cfg.scorer)
    held = sizes.ckpt if is_sae else 8 * k * sizes.d_vit
    one = 4 * (5 * sizes.n_tokens * sizes.d_vit + 2 * k)
    n_imgs = max(1, min(protoeval_memory.SCORE_BLOCK, int(cfg.memory_gb * 1e9 / one)))
    block = 4 * n_imgs * (sizes.n_tokens * sizes.d_vit + 2 * k)
    n_rows = min(TILE_ROWS, n_imgs * sizes.n_tokens)
    tile = 12 * n_rows * sizes.d_vit + min(2 * TILE_BYTES, 4 * n_rows * k)  # prepared, and scores
    unit_vectors = 0 if is_sae else 4 * k * sizes.d_vit
    return held + block + tile + unit_vectors


def in_fit(cfg: protoeval_config.ProtoEval, sizes: protoeval_memory.Sizes) -> int:
    """In the fit of k-means or PCA."""
    d_vit, k = sizes.d_vit, protoeval_memory.n_prototypes(cfg, sizes.d_vit)
    block = 4 * protoeval_memory.FIT_BLOCK * sizes.n_tokens * d_vit
    if not isinstance(cfg.scorer, scorers_config.KMeans):
        return max(24 * d_vit**2 + block, 8 * d_vit**2 + 2 * block)
    sample = 4 * d_vit * min(cfg.scorer.n_samples, sizes.n_fit)
    distances = min(DISTANCES, 4 * k * protoeval_memory.FIT_BLOCK * sizes.n_tokens)
    return sample + max(sample, 2 * DISTANCES, 24 * k * d_vit + distances + 2 * block)


def in_dump(cfg: data_config.Dump, vit: data_memory.Sizes) -> int:
    """In one job of a dump."""
    imgs = 12 * vit.pixels * cfg.vit_batch_size
    layer = 4 * vit.n_tokens * vit.d_vit * cfg.vit_batch_size
    # recorded and stacked activations, also of the batch before
    n_layers = max(IN_FORWARD, BESIDES_RECORDED + 2 * vit.n_layers, 4 * vit.n_layers)
    return vit.weights + imgs + n_layers * layer


def rows() -> dict[str, list[int]]:
    """Stage -> peak bytes at each of SIZES."""
    out = {}
    for name, step in SAES.items():
        peaks = [
            training_memory.gpu_peak([train(name, size)], part_bytes(name, size), step.is_costly, step.dead)
            for size in SIZES
        ]
        out[f"training step: {name}"] = peaks
    out["evaluation after training"] = [in_evaluation(train("TopK", size)) for size in SIZES]
    out["visuals"] = [
        in_visuals(visuals_memory.Sizes(N_IMAGES, N_PATCHES, size.d_vit, size.d_sae)) for size in SIZES
    ]
    kinds = {
        "SAE": (scorers_config.Sae("sae.pt"), None),
        "8,192 random activations": (scorers_config.Random(), 8192),
    }
    for name, (scorer, k) in kinds.items():
        found = [evaluation(scorer, size, k or size.d_sae) for size in SIZES]
        out[f"scoring: {name}"] = [in_scoring(cfg, sizes) for cfg, sizes in found]
    fits = {"8,192 centroids": scorers_config.KMeans(), "PCA": scorers_config.Pca()}
    for name, scorer in fits.items():
        found = [evaluation(scorer, size, 8192) for size in SIZES]
        out[f"fit: {name}"] = [in_fit(cfg, sizes) for cfg, sizes in found]
    return out


def dump() -> int:
    """Peak bytes of a dump with batches of 64."""
    vit = data_config.Vit("clip", "ViT-L-14/openai")
    cfg = data_config.Dump(vit=vit, data=data_config.ImageFolder("images"), vit_batch_size=64)
    return in_dump(cfg, VIT)


def table() -> str:
    head = " | ".join(f"{size.d_vit:,} / {size.d_sae:,} / {size.batch:,}" for size in SIZES)
    lines = [f"| d_vit / d_sae / `--batch-size` | {head} |", "|---" * (1 + len(SIZES)) + "|"]
    for name, peaks in rows().items():
        lines.append(f"| {name} | {' | '.join(f'{n / 1e9:.1f} GB' for n in peaks)} |")
    lines.append(f"| dump: ViT-L/14, 4 layers, batches of 64 | {dump() / 1e9:.1f} GB | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
