"""What one dimension with huge deviations does to an SAE, and what --sae.normalize per-dim does about it.

    uv run python -m benchmarks.outlier_dimension [--quick] [--times 1000]

The planted dictionary of benchmarks.quality, of which one dimension becomes noise that is independent of the others, with
`times` their mean deviation and three times that as its mean (Bird-MAE has such a dimension). Columns: dead latents,
explained variance of the other dimensions (mean over dimensions) and of that one, on held-out activations.
"""

import argparse
import dataclasses

import torch
from torch import Tensor

from benchmarks import common, outliers, quality
from saev.nn import config as nn_config
from saev.nn import metrics

BAD = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--times", type=float, default=1000.0, help="the others' deviation")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1024)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch_size = 50, 256
    args.tokens = 0
    data = quality.planted(args)
    cases = []
    print(f"{'architecture':<12}{'dimension':>10}{'normalize':>10}{'dead %':>8}{'others':>9}{'it':>8}")
    for name, sae in outliers.ARCHITECTURES.items():
        for times, normalize in ((0.0, "scale"), (args.times, "scale"), (args.times, "per-dim")):
            sae = dataclasses.replace(sae, normalize=normalize)
            found = one(sae, plant(data.train_ND, times, 0), plant(data.held_out_ND[:8192], times, 1), args)
            dead, others, it = found["dead_pct"], found["others"], found["it"]
            print(f"{name:<12}{times:>10g}{normalize:>10}{dead:8.1f}{others:9.3f}{it:8.3f}", flush=True)
            cases.append({"name": f"{name} {times:g} {normalize}", **found})
    for i, case in enumerate(cases):
        case["ratio"] = round(case["unexplained"] / cases[i - i % 3]["unexplained"], 3)
        case["reference"] = "without the dimension (unexplained variance of the others)"
    common.report(cases)


def plant(x_ND: Tensor, times: float, seed: int) -> Tensor:
    """The activations, one dimension of them replaced by noise. times = 0: as they are."""
    if not times:
        return x_ND
    noise_N = torch.randn(len(x_ND), generator=torch.Generator().manual_seed(seed))
    out_ND = x_ND.clone()
    out_ND[:, BAD] = times * x_ND.std(dim=0).mean() * (3 + noise_N)
    return out_ND


def one(sae: nn_config.Sae, x_ND: Tensor, held_out_ND: Tensor, args) -> common.Case:
    """Trains one SAE and measures it."""
    x_hat_ND, f_NS = outliers.trained(sae, x_ND, args)(held_out_ND)
    residual_D = (held_out_ND - x_hat_ND).double().var(dim=0) / held_out_ND.double().var(dim=0)
    others_C = torch.cat([residual_D[:BAD], residual_D[BAD + 1 :]])
    is_dead_S = (f_NS.abs() <= metrics.EPS_ACTIVE).all(dim=0)
    return {
        "dead_pct": round(100 * is_dead_S.float().mean().item(), 1),
        "others": round(1 - others_C.mean().item(), 4),
        "unexplained": others_C.mean().item(),
        "it": round(1 - residual_D[BAD].item(), 4),
    }


if __name__ == "__main__":
    main()
