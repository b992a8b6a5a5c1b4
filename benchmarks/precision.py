"""How good SAEs are that are trained with --precision bfloat16, beside float32, by a GPU's arithmetic on a CPU.

    uv run python -m benchmarks.precision [--quick] [--shards DIR --layer L]

Both precisions see the same batches and start from the same weights, once for each seed. Activations are those of
benchmarks.quality: a planted dictionary, whose atoms are looked for in the decoder, or a dump. The steps are those of a GPU
(torch's operations instead of the CPU's kernels): factors of the encoder's product are rounded to bfloat16 and its sums are
float32; W_dec, the batch and its error are read in bfloat16 where codes select rows. Not rounded: products that a GPU may
compute in TF32, which keeps more bits. Evaluation is in float32. The ratio is the unexplained variance to that of float32,
as a mean over seeds of the ratio of each seed.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import statistics
import typing as tp
import unittest.mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import common, quality
from saev.nn import config as nn_config
from saev.nn import kernels, metrics
from saev.nn.sparse import autograd, search
from saev.training import config as training_config
from saev.training import run as training_run

PRECISIONS: tuple[tp.Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
FIGURES = {"explained": 5, "l0": 2, "dead_pct": 1, "found_pct": 1}
"""Figure -> digits."""


def main() -> None:
    args = _args()
    data = quality.from_shards(args) if args.shards else quality.planted(args)
    d_sae = data.d_sae if args.d_sae is None else args.d_sae
    saes = {
        "TopK": nn_config.TopK(d_sae=d_sae, top_k=args.top_k),
        "BatchTopK": nn_config.BatchTopK(d_sae=d_sae, top_k=args.top_k),
        "ReLU": nn_config.Relu(d_sae=d_sae, sparsity_coeff=args.sparsity),
    }
    print(quality.describe(data))
    print(f"{'SAE':<12}{'precision':<10}" + "".join(f"{name:>22}" for name in FIGURES))
    cases = []
    for name, sae in saes.items():
        if name not in args.saes:
            continue
        found = {p: [one(sae, data, p, seed, args) for seed in range(args.seeds)] for p in PRECISIONS}
        for precision, runs in found.items():
            case = {key: [round(run[key], n) for run in runs] for key, n in FIGURES.items() if key in runs[0]}
            print(f"{name:<12}{precision:<10}" + "".join(map(_spread, case.values())), flush=True)
            ratios = [
                (1 - a["explained"]) / (1 - b["explained"])
                for a, b in zip(runs, found["float32"], strict=True)
            ]
            cases.append({"name": f"{name} {precision}", **case, "ratio": round(statistics.mean(ratios), 5)})
            cases[-1]["reference"] = f"float32 (unexplained variance; by seed {np.round(ratios, 4).tolist()})"
    common.report(cases)


def _args() -> argparse.Namespace:
    parser = quality.options(__doc__.splitlines()[0], 3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.02, help="of ReLU")
    parser.add_argument("--saes", nargs="+", default=["TopK", "BatchTopK", "ReLU"])
    parser.add_argument("--d-sae", type=int, help="default: 512, or 16 x d_vit of --shards")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch_size, args.seeds = 30, 256, 2
    args.tokens, args.ks, args.exp_factor = args.steps * args.batch_size, [args.top_k], 16
    return args


def _spread(values: list[float]) -> str:
    """Mean, and the smallest and largest of the seeds."""
    shown = f"{statistics.mean(values):.4g} ({min(values):.4g}-{max(values):.4g})"
    return f"{shown:>22}"


@contextlib.contextmanager
def gpus_arithmetic():
    """The operations of a GPU's step, on a CPU. A bfloat16 product has float32 sums and results there."""

    def dense(encoder: search.Encoder, xc_BD: Tensor) -> Tensor:
        if not encoder.is_bfloat16:
            return torch.addmm(encoder.b_S, xc_BD, encoder.W_SD.T)
        return torch.addmm(encoder.b_S, xc_BD.bfloat16().float(), encoder.W_SD.bfloat16().float().T)

    with (
        unittest.mock.patch.object(kernels, "available", lambda _: False),
        unittest.mock.patch.object(search, "dense", dense),
        unittest.mock.patch.object(autograd, "dense", dense),
    ):
        yield


def one(
    sae: nn_config.Sae,
    data: quality.Data,
    precision: tp.Literal["float32", "bfloat16"],
    seed: int,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Trains one SAE and measures it on held-out activations."""
    cfg = training_config.Train(
        sae=dataclasses.replace(sae, d_vit=data.train_ND.shape[1]),
        n_patches=args.steps * args.batch_size,
        batch_size=args.batch_size,
        dead_window=args.steps * args.batch_size // 10,
        precision=precision,
        seed=seed,
    )
    order = quality.Order(data.train_ND, args.batch_size, seed)
    run = training_run.Run(dataclasses.replace(cfg, lr=cfg.peak_lr), pathlib.Path(), torch.device("cpu"))
    run.start(data.train_ND[: 2**16])
    with gpus_arithmetic(), unittest.mock.patch.object(run, "_updated_dead", lambda: _dead(run)):
        for step in range(args.steps):
            run.step(step, order(step))
    trained, x_ND = run.finished(), data.held_out_ND[: 2**14]
    x_hat_ND, f_NS = trained(x_ND)
    fires_NS = f_NS.abs() > metrics.EPS_ACTIVE
    found = {
        "explained": metrics.explained_variance_per_dim(x_ND, x_hat_ND),
        "l0": fires_NS.sum(dim=1).float().mean().item(),
        "dead_pct": 100 * (~fires_NS.any(dim=0)).float().mean().item(),
    }
    if data.atoms_AD is not None:
        cos_A = np.abs(data.atoms_AD @ trained.W_dec.numpy().T).max(axis=1)
        found["found_pct"] = 100 * float((cos_A > 0.9).mean())
    return found


def _dead(run: training_run.Run) -> Tensor:
    """AuxK's list, which a GPU would copy to the host in the background."""
    return run._is_dead_S().nonzero().flatten()


if __name__ == "__main__":
    main()
