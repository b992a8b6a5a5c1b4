"""What a few activations of huge norm (attention sinks) do to an SAE, and what --max-norm-ratio does about it.

    uv run python -m benchmarks.outliers [--quick] [--share 0.005] [--norm 100] [--ratios 0 5]

The planted dictionary of benchmarks.quality; a share of the activations is moved `norm` times the typical distance
along one direction, with 10% noise in that norm. Each architecture is trained without sinks, then with them for each
--max-norm-ratio (0: off). Columns: normalised MSE of all held-out activations, of the ordinary ones alone (relative to
predicting their mean), of the sinks alone (relative to the ordinary ones' spread around them, so 1 is as bad as an
ordinary activation that is not reconstructed); L0 of the ordinary; atoms found (|cos| > 0.9).
"""

import argparse
import dataclasses
import pathlib
import typing as tp

import numpy as np
import torch
from torch import Tensor

from benchmarks import common, quality
from saev import nn
from saev.nn import config as nn_config
from saev.nn import metrics
from saev.training import config as training_config
from saev.training import run as training_run

D, FACTOR = 64, 8
ARCHITECTURES: dict[str, nn_config.Sae] = {
    "TopK": nn_config.TopK(d_vit=D, exp_factor=FACTOR, top_k=8),
    "BatchTopK": nn_config.BatchTopK(d_vit=D, exp_factor=FACTOR, top_k=8),
    "JumpReLU": nn_config.JumpRelu(d_vit=D, exp_factor=FACTOR, sparsity_coeff=0.02),
    "ReLU": nn_config.Relu(d_vit=D, exp_factor=FACTOR, sparsity_coeff=0.02),
}
HEADER = f"{'architecture':<12}{'sinks':>7}{'ratio':>7}{'all':>9}{'ordinary':>10}{'sinks':>9}{'L0':>8}{'found %':>9}"


class Sinks(tp.NamedTuple):
    x_ND: Tensor
    is_sink_N: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--share", type=float, default=0.005, help="of sinks")
    parser.add_argument("--norm", type=float, default=100.0, help="in typical distances")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 5.0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1024)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch_size = 50, 256
    args.tokens = 0
    data = quality.planted(args)
    held_out_ND = data.held_out_ND[:8192]
    cases = []
    print(HEADER)
    for name, sae in ARCHITECTURES.items():
        for share, ratio in [(0.0, 0.0), *((args.share, r) for r in args.ratios)]:
            train = plant(data.train_ND, share, args.norm, 0)
            held_out = plant(held_out_ND, share, args.norm, 1)
            found = one(sae, train.x_ND, held_out, data.atoms_AD, ratio, args)
            print(row(name, share, ratio, found), flush=True)
            cases.append({"name": f"{name} sinks {share:g} ratio {ratio:g}", **found})
    for case in cases:
        plain = next(c for c in cases if c["name"] == f"{case['name'].split()[0]} sinks 0 ratio 0")
        case["ratio"] = round(case["ordinary"] / plain["ordinary"], 3)
        case["reference"] = "the same without sinks (normalised MSE of ordinary activations)"
    common.report(cases)


def plant(x_ND: Tensor, share: float, norm: float, seed: int) -> Sinks:
    """The activations, some of them moved far along one direction (the same for every seed)."""
    generator = torch.Generator().manual_seed(seed)
    is_sink_N = torch.rand(len(x_ND), generator=generator) < share
    direction_D = torch.randn(x_ND.shape[1], generator=torch.Generator().manual_seed(7))
    radius = (x_ND - x_ND.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    length_N = norm * radius * (1 + 0.1 * torch.randn(len(x_ND), generator=generator))
    far_ND = length_N[:, None] * direction_D / direction_D.norm()
    return Sinks(torch.where(is_sink_N[:, None], x_ND + far_ND, x_ND), is_sink_N)


def one(
    sae: nn_config.Sae, x_ND: Tensor, held_out: Sinks, atoms_AD: np.ndarray, ratio: float, args
) -> common.Case:
    """Trains one SAE and measures it."""
    done = trained(sae, x_ND, args, max_norm_ratio=ratio)
    x_hat_ND, f_NS = done(held_out.x_ND)
    plain_N = ~held_out.is_sink_N
    ordinary_ND, error_ND = held_out.x_ND[plain_N], (held_out.x_ND - x_hat_ND).square()
    spread = (ordinary_ND - ordinary_ND.mean(dim=0)).square().sum(dim=1).mean()
    cos_A = np.abs(atoms_AD @ done.W_dec.numpy().T).max(axis=1)
    n_fired = (f_NS[plain_N] > metrics.EPS_ACTIVE).sum(dim=1).float().mean()
    sinks = error_ND[held_out.is_sink_N].sum(dim=1).mean() / spread
    return {
        "all": round(metrics.normalized_mse(held_out.x_ND, x_hat_ND), 5),
        "ordinary": round(metrics.normalized_mse(ordinary_ND, x_hat_ND[plain_N]), 5),
        "sinks": round(sinks.item(), 4) if held_out.is_sink_N.any() else None,
        "l0": round(n_fired.item(), 2),
        "found_pct": round(100 * float((cos_A > 0.9).mean()), 1),
    }


def trained(
    sae: nn_config.Sae, x_ND: Tensor, args: argparse.Namespace, **more: tp.Any
) -> nn.SparseAutoencoder:
    """An SAE after `args.steps` steps. more: further fields of the training's config."""
    cfg = training_config.Train(
        sae=sae,
        n_patches=args.steps * args.batch_size,
        batch_size=args.batch_size,
        dead_window=args.steps * args.batch_size // 10,
        **more,
    )
    run = training_run.Run(dataclasses.replace(cfg, lr=cfg.peak_lr), pathlib.Path(), torch.device("cpu"))
    run.start(x_ND[: 2**16])
    order = quality.Order(x_ND, args.batch_size, 0)
    for step in range(args.steps):
        run.step(step, order(step))
    return run.finished()


def row(name: str, share: float, ratio: float, found: common.Case) -> str:
    sinks = "-" if found["sinks"] is None else f"{found['sinks']:.3g}"
    return (
        f"{name:<12}{100 * share:>6g}%{ratio:>7g}{found['all']:9.4f}{found['ordinary']:10.4f}{sinks:>9}"
        f"{found['l0']:8.1f}{found['found_pct']:9.1f}"
    )


if __name__ == "__main__":
    main()
