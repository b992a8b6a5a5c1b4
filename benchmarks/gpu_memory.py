"""Prints docs/memory.md's table of peak GPU memory per stage, from the formulas of `saev/*/memory.py`. Needs no GPU.

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


def rows() -> dict[str, list[int]]:
    """Stage -> peak bytes at each of SIZES."""
    out = {}
    for name, step in SAES.items():
        peaks = [
            training_memory.gpu_peak([train(name, size)], part_bytes(name, size), step.is_costly, step.dead)
            for size in SIZES
        ]
        out[f"training step: {name}"] = peaks
    out["evaluation after training"] = [training_memory.gpu_evaluation(train("TopK", size)) for size in SIZES]
    out["visuals"] = [
        visuals_memory.gpu_peak(visuals_memory.Sizes(N_IMAGES, N_PATCHES, size.d_vit, size.d_sae))
        for size in SIZES
    ]
    kinds = {
        "SAE": (scorers_config.Sae("sae.pt"), None),
        "8,192 random activations": (scorers_config.Random(), 8192),
    }
    for name, (scorer, k) in kinds.items():
        found = [evaluation(scorer, size, k or size.d_sae) for size in SIZES]
        out[f"scoring: {name}"] = [protoeval_memory.gpu_scoring([cfg], sizes) for cfg, sizes in found]
    fits = {"8,192 centroids": scorers_config.KMeans(), "PCA": scorers_config.Pca()}
    for name, scorer in fits.items():
        found = [evaluation(scorer, size, 8192) for size in SIZES]
        out[f"fit: {name}"] = [protoeval_memory.gpu_fit(cfg, sizes) for cfg, sizes in found]
    return out


def dump() -> int:
    """Peak bytes of a dump with batches of 64."""
    vit = data_config.Vit("clip", "ViT-L-14/openai")
    cfg = data_config.Dump(vit=vit, data=data_config.ImageFolder("images"), vit_batch_size=64)
    return data_memory.gpu_peak(cfg, VIT)


def table() -> str:
    head = " | ".join(f"{size.d_vit:,} / {size.d_sae:,} / {size.batch:,}" for size in SIZES)
    lines = [f"| d_vit / d_sae / `--batch-size` | {head} |", "|---" * (1 + len(SIZES)) + "|"]
    for name, peaks in rows().items():
        lines.append(f"| {name} | {' | '.join(f'{n / 1e9:.1f} GB' for n in peaks)} |")
    lines.append(f"| dump: ViT-L/14, 4 layers, batches of 64 | {dump() / 1e9:.1f} GB | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
