"""What `python -m saev.codes` costs above the encoder's products.

    uv run python -m benchmarks.codes [--quick]

The whole stage, from reading shards to checksummed files of codes, for SAEs at their usual L0 and for other scorers.
Reference: the products of the same activations and all latents (B x D by D x K, float32, in memory), timed in turn.

Correctness: largest difference of a code of the first images to `encode` (or the scorer) on the same activations.
"""

import argparse
import collections.abc
import pathlib
import shutil
import tempfile

import torch

import saev.codes
from benchmarks import common
from benchmarks.protoeval import write
from saev import nn, scorers
from saev.codes import config, encode
from saev.data import activations
from saev.data import config as data_config
from saev.nn import config as nn_config
from saev.scorers import sae as sae_scorer

L0 = 32
"""Latents that fire per activation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and latents: under 40 s")
    args = parser.parse_args()
    sizes = [(384, 8192, 32)] if args.quick else [(384, 8192, 128), (1024, 16384, 96)]
    cases = []
    for d_vit, k, n_imgs in sizes:
        with tempfile.TemporaryDirectory() as root:
            data = write(pathlib.Path(root) / "dump", n_imgs, d_vit)
            for name, (scorer, flags) in made(data, d_vit, k).items():
                n_repeats = 3 if args.quick else 5
                cases.append(measure(name, scorer, data, pathlib.Path(root), n_repeats, **flags))
    common.report(cases)


def made(data: data_config.Shards, d_vit: int, k: int) -> dict[str, tuple[scorers.Scorer, dict[str, int]]]:
    """Scorers, with flags of the command. Thresholds are set so that about L0 latents fire."""
    x_BD = torch.from_numpy(activations.Activations(data).read(0, 2)).flatten(0, 1)
    out: dict[str, tuple[scorers.Scorer, dict[str, int]]] = {}
    for cls in (nn_config.TopK, nn_config.BatchTopK, nn_config.Relu, nn_config.JumpRelu):
        counts = {"top_k": L0} if hasattr(cls, "top_k") else {}
        sae = nn.SparseAutoencoder(cls(d_vit=d_vit, d_sae=k, **counts)).eval().requires_grad_(False)
        pre_BK = x_BD @ sae.W_enc
        cutoff = float(pre_BK.flatten().kthvalue(pre_BK.numel() - L0 * len(x_BD)).values)
        sae.threshold.fill_(cutoff)
        if cls is nn_config.JumpRelu:
            sae.log_threshold.fill_(cutoff).log_()
        elif cls is nn_config.Relu:
            sae.b_enc.fill_(-cutoff)
        out[f"SAE, {cls.__name__}"] = (sae_scorer.SaeLatents(sae, k), {})
    p_KD = torch.randn(k, d_vit, generator=torch.Generator().manual_seed(0))
    random = scorers.Prototypes.of(p_KD, torch.zeros(d_vit), "cosine")
    out[f"random, --top-n {L0}"] = (random, {"top_n": L0})
    return out


def measure(
    name: str,
    scorer: scorers.Scorer,
    data: data_config.Shards,
    dpath: pathlib.Path,
    n_repeats: int,
    **flags: int,
) -> common.Case:
    scorers.save(scorer, dpath / "scorer.bin")
    acts = activations.Activations(data)
    x_BD = torch.from_numpy(acts.read(0, acts.n_imgs)).flatten(0, 1)
    W_KD = torch.randn(scorer.n_prototypes, acts.d_vit)
    cfg = config.Codes(str(dpath / "scorer.bin"), data, str(dpath / "codes"), device="cpu", **flags)

    def ours() -> float:
        shutil.rmtree(dpath / "codes", ignore_errors=True)
        return common.seconds(lambda: encode.main(cfg))

    calls: dict[str, collections.abc.Callable[[], float]] = {
        "floor": lambda: common.seconds(lambda: common.products(x_BD, W_KD)),
        "saev": ours,
    }
    ours()
    timed = common.interleaved(calls, n_repeats)
    codes = saev.codes.open(encode.main(cfg))
    part = codes.patches(slice(0, 2)).scipy()
    want_RK = scorer(x_BD[: part.shape[0]])
    if flags:
        want_RK = torch.zeros_like(want_RK).scatter(1, (top := want_RK.topk(L0, dim=1)).indices, top.values)
    return {
        "name": f"codes: {name}, {acts.d_vit} wide, K {scorer.n_prototypes}",
        "ratio": round(common.median_ratio(timed["saev"], timed["floor"]), 3),
        "reference": "encoder's products",
        "seconds": [round(s, 2) for s in timed["saev"]],
        "codes_per_patch": round(codes.patches().value_n.size / len(x_BD), 1),
        "max_diff": (torch.from_numpy(part.toarray()) - want_RK).abs().max().item(),
    }


if __name__ == "__main__":
    main()
