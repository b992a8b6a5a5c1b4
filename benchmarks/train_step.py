"""What a training step costs, in units of one dense float32 encoder product (B x D by D x S) timed beside it.

    uv run python -m benchmarks.train_step [--quick] [--cases PATTERN]

A step is all of `saev.training.run.Run.step`: encode, select, decode, loss, gradients of all parameters, clipping,
Adam, decoder norms, dead-latent counting. Activations are sparse sums of random directions, and no latent dies, so
AuxK costs nothing. Each step's time is divided by that of the product timed just before it; the ratio is the median.

Correctness: each case trains the same SAE for some steps through dense autograd and torch's Adam too; `max_diff` is
the largest difference of a parameter.

With a GPU, tokens per second beside dense autograd in the same precision.
"""

import argparse
import dataclasses
import fnmatch
import pathlib
import statistics
import time
import typing as tp

import torch
from torch import Tensor

from benchmarks import common
from saev.nn import config as nn_config
from saev.nn import objectives
from saev.training import config, run

REFERENCE = "one encoder product, float32"
N_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of step."""

    name: str
    sae: nn_config.Sae
    batch_size: int
    objective: nn_config.Objective = dataclasses.field(default_factory=nn_config.Vanilla)
    density: float | None = None
    """Of a ReLU: biases are set so that this fraction of its latents fires."""
    n_saes: int = 1
    n_steps: int = 20


def cases(quick: bool) -> list[Case]:
    """What is measured: the first shape at batch 1,024 where `quick`. top_k is 32."""
    out = []
    for d_vit, factor, batch_size in [
        (384, 8, 4096),
        (384, 16, 4096),
        (1024, 8, 4096),
        (1024, 16, 4096),
        (384, 8, 1024),
        (384, 16, 1024),
        (1024, 8, 1024),
        (1024, 16, 1024),
    ]:
        size = {"d_vit": d_vit, "exp_factor": factor}
        shape = f"{d_vit} x {factor}, batch {batch_size}"
        n = 30 if d_vit == 384 else 10
        out += [
            Case(f"TopK {shape}", nn_config.TopK(**size), batch_size, n_steps=n),
            Case(f"BatchTopK {shape}", nn_config.BatchTopK(**size), batch_size, n_steps=n),
        ]
        if (factor, batch_size) == (8, 4096):
            relu, top_k = nn_config.Relu(**size), nn_config.TopK(**size)
            more = {"batch_size": batch_size, "n_steps": n}
            matryoshka = nn_config.Matryoshka(n_prefixes=10)
            out += [
                Case(f"ReLU, half fire, {shape}", relu, **more),
                Case(f"ReLU, 1.5% fire, {shape}", relu, density=0.015, **more),
                Case(f"TopK Matryoshka {shape}", top_k, objective=matryoshka, **more),
            ]
        if (d_vit, factor, batch_size) == (384, 8, 4096):
            out.append(Case(f"3 x TopK {shape}", nn_config.TopK(**size), batch_size, n_saes=3))
    if quick:
        return [
            dataclasses.replace(c, name=c.name.replace("4096", "1024"), batch_size=1024, n_steps=6)
            for c in out
            if "384 x 8, batch 4096" in c.name
        ]
    return out


def batches(d_vit: int, batch_size: int, device: str = "cpu") -> list[Tensor]:
    """Sparse sums of 4,096 random directions, with an offset."""
    generator = torch.Generator().manual_seed(0)
    atoms_AD = torch.randn(4096, d_vit, generator=generator) / d_vit**0.5
    offset_D = torch.randn(d_vit, generator=generator)
    out = []
    for _ in range(N_BATCHES):
        fires_BA = torch.rand(batch_size, 4096, generator=generator) < 0.01
        code_BA = fires_BA * torch.rand(batch_size, 4096, generator=generator)
        out.append((5 * code_BA @ atoms_AD + offset_D).to(device))
    return out


def config_of(case: Case, precision: str = "float32") -> config.Train:
    return config.Train(
        sae=case.sae,
        objective=case.objective,
        batch_size=case.batch_size,
        n_patches=1_000_000 * case.batch_size,
        dead_window=10**12,
        precision=tp.cast(tp.Any, precision),
    )


def start(case: Case, x: list[Tensor], device: str = "cpu", precision: str = "float32") -> run.Run:
    """A run before its first step."""
    out = run.Run(config_of(case, precision), pathlib.Path(), torch.device(device))
    out.start(x[0])
    if case.density is not None:
        with torch.no_grad():
            pre_BS = (x[0][:512] * out.sae.scale - out.sae.b_dec) @ out.sae.W_enc
            n_drop = int(pre_BS.numel() * (1 - case.density))
            out.sae.b_enc -= pre_BS.flatten().kthvalue(n_drop).values
    return out


def measure(case: Case) -> common.Case:
    """Median of the steps' ratios, and what a dense step gives instead."""
    x = batches(tp.cast(int, case.sae.d_vit), case.batch_size)
    runs = [start(case, x) for _ in range(case.n_saes)]
    W_DS = runs[0].sae.W_enc.detach().contiguous()
    pre_BS = torch.empty(case.batch_size, case.sae.n_latents)

    def step(i: int) -> None:
        for one in runs:
            one.step(i, x[i % N_BATCHES])

    for i in range(3):  # compiles, and finds BatchTopK's first guess
        step(i)
    products, ratios = [], []
    for i in range(3, 3 + case.n_steps):
        product_s = common.seconds(lambda: torch.mm(x[0], W_DS, out=pre_BS))
        step_s = common.seconds(lambda i=i: step(i))
        products.append(product_s)
        ratios.append(step_s / product_s / case.n_saes)
    ratio = statistics.median(ratios)
    return {
        "name": case.name,
        "ratio": round(ratio, 3),
        "reference": REFERENCE,
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "product_ms": round(1e3 * statistics.median(products), 2),
        "tokens_per_s": round(case.batch_size / (ratio * statistics.median(products))),
        "max_diff": max_diff(case, x),
    }


def max_diff(case: Case, x: list[Tensor], n_steps: int = 5) -> float:
    """Between `n_steps` of ours and as many of dense autograd with torch's Adam."""
    ours, theirs = start(case, x), start(case, x)
    optimizer = torch.optim.Adam(theirs.sae.parameters())
    for i in range(n_steps):
        ours.step(i, x[i % N_BATCHES])
        dense_step(theirs, optimizer, i, x[i % N_BATCHES])
    pairs = zip(ours.sae.parameters(), theirs.sae.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def dense_step(theirs: run.Run, optimizer: torch.optim.Optimizer, i: int, x_BD: Tensor) -> None:
    """A step as it is usually written: dense tensors, autograd, torch's Adam."""
    cfg, sae = theirs.cfg, theirs.sae
    optimizer.param_groups[0]["lr"] = cfg.lr_at(i)
    optimizer.zero_grad()
    f_BS = sae.encode(x_BD)
    loss = torch.zeros((), device=x_BD.device)
    lengths = objectives.prefixes(cfg.objective, sae.d_sae, cfg.seed, i) or [sae.d_sae]
    for length in lengths:
        x_hat_BD = f_BS[:, :length] @ sae.W_dec[:length] + sae.b_dec
        loss = loss + (x_hat_BD - x_BD * sae.scale).square().mean() / len(lengths)
    if isinstance(sae.cfg, nn_config.Relu):
        loss = loss + sae.cfg.sparsity_coeff * (f_BS @ sae.W_dec.norm(dim=1)).mean()
    loss.backward()
    sae.remove_parallel_grad()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), cfg.max_grad_norm)
    optimizer.step()
    sae.normalize_decoder()


# ---- with a GPU ----


def measure_gpu(d_sae: int, kind: str, precision: str) -> common.Case:
    """Steps of 16,384 activations of width 1,024: ours and dense autograd, and the encoder product in the same precision."""
    cls = {"TopK": nn_config.TopK, "BatchTopK": nn_config.BatchTopK}[kind]
    case = Case(f"GPU {kind} {d_sae} {precision}", cls(d_vit=1024, d_sae=d_sae), 16384)
    x = batches(1024, case.batch_size, "cuda")
    ours, theirs = (start(case, x, "cuda", precision) for _ in range(2))
    optimizer = torch.optim.Adam(theirs.sae.parameters(), fused=True)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    W_DS, x_BD = ours.sae.W_enc.detach().to(dtype), x[0].to(dtype)

    def dense(i: int) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            dense_step(theirs, optimizer, i, x[i % N_BATCHES])

    product_s = _gpu_seconds(lambda i: torch.mm(x_BD, W_DS))
    step_s = _gpu_seconds(lambda i: ours.step(i, x[i % N_BATCHES]))
    dense_s = _gpu_seconds(dense)
    return {
        "name": case.name,
        "ratio": round(step_s / product_s, 3),
        "reference": f"one encoder product, {precision}",
        "tokens_per_s": round(case.batch_size / step_s),
        "dense_tokens_per_s": round(case.batch_size / dense_s),
        "device": torch.cuda.get_device_name(),
    }


def _gpu_seconds(call: tp.Callable[[int], object], n: int = 20) -> float:
    for i in range(5):
        call(i)
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for i in range(n):
        call(i)
    torch.cuda.synchronize()
    return (time.perf_counter() - start_s) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few steps")
    parser.add_argument("--cases", default="*", help="a pattern of names, such as 'ReLU*'")
    args = parser.parse_args()
    results = []
    for case in cases(args.quick):
        if fnmatch.fnmatch(case.name, args.cases):
            results.append(measure(case))
            print(f"{results[-1]['name']:44}{results[-1]['ratio']:8.2f}", flush=True)
    if torch.cuda.is_available():
        for d_sae in (16_384, 32_768):
            for kind in ("TopK", "BatchTopK"):
                results += [measure_gpu(d_sae, kind, p) for p in ("float32", "bfloat16")]
    common.report(results)


if __name__ == "__main__":
    main()
