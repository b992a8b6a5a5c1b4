"""Does JumpReLU's coefficient decide L0 at any length of run? saev's and SAELens's, on the same batches.

    uv run --group peers python -m benchmarks.jumprelu [--shards DIR --layer L] [--coeffs 1e-3 1e-2] [--steps 1000 4000]

Activations are those of benchmarks.quality: the planted dictionary, or a dump (every fifth image is held out). saev's
loss is the mean squared error per dimension of activations whose mean squared distance from their mean is d_vit;
SAELens sums over the dimensions, so its coefficient is d_vit times saev's. L0 and normalised MSE are of held-out
activations; `start` is L0 before training.
"""

import argparse
import dataclasses
import pathlib
import time

import numpy as np
import torch
from torch import Tensor

from benchmarks import common, peers, quality
from saev.nn import config as nn_config
from saev.nn import metrics
from saev.training import config as training_config
from saev.training import run as training_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--shards", type=pathlib.Path, help="a shard directory")
    parser.add_argument("--layer", type=int, default=-1, help="one of its layers")
    parser.add_argument("--coeffs", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1])
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--exp-factor", type=int, default=8, help="of --shards")
    parser.add_argument("--lrs", type=float, nargs="+", default=[0], help="saev's; 0: its default")
    parser.add_argument("--init-threshold", type=float, default=0.0, help="saev's")
    parser.add_argument("--only", choices=["saev", "SAELens"], help="one library")
    args = parser.parse_args()
    if args.quick:
        args.coeffs, args.steps, args.batch_size = args.coeffs[-2:], [100], 256
    args.ks, args.tokens = [1], 0
    data = quality.from_shards(args) if args.shards else quality.planted(args)
    libraries = {"saev": saev}
    if "SAELens" in peers.installed()[0]:
        libraries["SAELens"] = sae_lens
    print(f"{data.name}\n{'method':<24}{'steps':>6}{'coeff':>8}{'start':>8}{'L0':>8}{'nmse':>8}")
    cases = []
    for name, train in libraries.items():
        if args.only in (None, name):
            for n_steps in args.steps:
                for lr in args.lrs if name == "saev" else [3e-4]:
                    cases += [one(name, train, data, n_steps, c, lr, args) for c in args.coeffs]
    common.report(cases)


def one(name: str, train, data: quality.Data, n_steps: int, coeff: float, lr: float, args) -> common.Case:
    """Trains one SAE and measures it."""
    start_s = time.perf_counter()
    batches = quality.Order(data.train_ND, args.batch_size, 0)
    x_ND = data.held_out_ND[:8192]
    start, trained = train(data, batches, n_steps, coeff, lr, args)
    found = quality.measure(trained, x_ND)
    label = f"{name}{f' lr {lr:g}' if lr else ''}"
    print(f"{label:<24}{n_steps:6}{coeff:8g}{start:8.1f}{found['l0']:8.2f}{found['nmse']:8.4f}", flush=True)
    case = {"name": f"{data.name}: {label}", "n_steps": n_steps, "coeff": coeff, "l0_start": start}
    if data.atoms_AD is not None:
        cos_A = np.abs(data.atoms_AD @ trained.decoder_SD.T).max(axis=1)
        case["found_pct"] = 100 * float((cos_A > 0.9).mean())
    case |= {"l0": round(found["l0"], 3), "nmse": round(found["nmse"], 5)}
    case |= {"dead_pct": 100 * (~found["fired_S"]).float().mean().item()}
    return {
        **case,
        "ratio": round(found["l0"], 3),
        "reference": "L0",
        "s": round(time.perf_counter() - start_s),
    }


def saev(
    data: quality.Data, batches: quality.Order, n_steps: int, coeff: float, lr: float, args
) -> tuple[float, peers.Trained]:
    d_vit = data.train_ND.shape[1]
    sae = nn_config.JumpRelu(
        d_vit=d_vit, exp_factor=data.d_sae // d_vit, sparsity_coeff=coeff, init_threshold=args.init_threshold
    )
    n_patches = n_steps * args.batch_size
    cfg = training_config.Train(sae=sae, n_patches=n_patches, batch_size=args.batch_size)
    cfg = dataclasses.replace(cfg, lr=lr or cfg.peak_lr)
    run = training_run.Run(cfg, pathlib.Path(), torch.device("cpu"))
    run.start(data.train_ND[:: -(-len(data.train_ND) // 2**16)])
    start = _l0(run.sae.encode(batches(0)))
    for step in range(n_steps):
        run.step(step, batches(step))
    done = run.finished()
    return start, peers.Trained(done.W_dec.numpy(), done, None, None)


def sae_lens(
    data: quality.Data, batches: quality.Order, n_steps: int, coeff: float, lr: float, args
) -> tuple[float, peers.Trained]:
    """`JumpReLUTrainingSAE` with `SAETrainer` as in `peers.sae_lens`; activations centred and scaled as saev's are."""
    import sae_lens as lib
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x_ND = data.train_ND
    d_vit, mean_D = x_ND.shape[1], x_ND.mean(dim=0)
    scale = d_vit**0.5 / (x_ND - mean_D).square().sum(dim=1).mean().sqrt().item()
    torch.manual_seed(0)
    cfg = SAETrainerConfig(
        total_training_samples=n_steps * args.batch_size,
        train_batch_size_samples=args.batch_size,
        lr=lr,
        lr_end=lr / 10,
        lr_decay_steps=n_steps // 5,
    )
    sae_cfg = lib.JumpReLUTrainingSAEConfig(d_in=d_vit, d_sae=data.d_sae, l0_coefficient=coeff * d_vit)
    sae = lib.JumpReLUTrainingSAE(sae_cfg)
    start = _l0(sae.encode((batches(0) - mean_D) * scale))
    trainer = SAETrainer(cfg, sae, iter(()))
    for step in range(n_steps):
        trainer.step((batches(step) - mean_D) * scale)
        trainer.n_training_steps += 1
    sae.eval()

    @torch.no_grad()
    def reconstruct(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        f_BS = sae.encode((x_BD - mean_D) * scale)
        return sae.decode(f_BS) / scale + mean_D, f_BS

    W_dec = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    return start, peers.Trained(W_dec.numpy(), reconstruct, None, None)


def _l0(f_BS: Tensor) -> float:
    return (f_BS > metrics.EPS_ACTIVE).sum(dim=1).float().mean().item()


if __name__ == "__main__":
    main()
