"""How good saev's SAEs are next to those of SAELens, dictionary_learning and overcomplete.

    uv run python -m benchmarks.quality [--quick] [--shards DIR --layer L] [--seeds R]

All see the same batches in the same order. Two sources of activations: a planted dictionary, whose atoms can be
looked for in the trained decoders, and, with --shards, a dump (every fifth image is held out). The ratio is the
normalised mean squared error on held-out activations to the lowest one of all methods at that k.

BatchTopK keeps k latents per activation on average only as well as its threshold was estimated, and more latents
make a smaller error. So each BatchTopK's threshold is set to give k on the held-out activations before it is compared
(`nmse`, `l0`); what its own threshold gives is reported beside it (`own_nmse`, `own_l0`).

A latent is dead (`dead_frac`) when it fires on no held-out activation and on none of the last 100,000 that it was
trained on. saev alone is measured where the dependency group `peers` is not installed.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time
import typing as tp

import numpy as np
import torch
from torch import Tensor

from benchmarks import common, peers
from saev.data import activations
from saev.data import config as data_config
from saev.nn import config as nn_config
from saev.nn import metrics
from saev.training import config as training_config
from saev.training import run as training_run

HELD_OUT = 5
"""One image in this many."""
N_RECENT = 100_000
"""Training activations that a latent has to fire on, if on no held-out one."""
MAX_ACTS = 1_000_000
"""Activations held in memory; of a larger dump, images at equal distances are taken."""
CHUNK = 4096
KINDS: tuple[peers.Kind, ...] = ("TopK", "BatchTopK")
VANILLA, MATRYOSHKA = nn_config.Vanilla(), nn_config.Matryoshka()
FOR_INFORMATION = "saev Matryoshka"
"""Its error is that of the whole dictionary, which it does not minimise alone: no other method's ratio is to it."""


class Data(tp.NamedTuple):
    """Activations of one source. A: atoms."""

    name: str
    train_ND: Tensor
    held_out_ND: Tensor
    atoms_AD: np.ndarray | None
    ks: tuple[int, ...]
    d_sae: int
    n_tokens: int
    """Activations to train each SAE on."""
    batch_size: int


def main() -> None:
    args = _args()
    libraries, missing = peers.installed()
    for name in missing:
        print(f"{name} is left out: it is not installed. `uv sync --group peers` installs it.")
    methods = {
        "saev": train_saev,
        FOR_INFORMATION: functools.partial(train_saev, objective=MATRYOSHKA),
        **libraries,
    }
    sources = [planted(args)] if not args.skip_planted else []
    if args.shards:
        sources.append(from_shards(args))
    cases = []
    for data in sources:
        print(f"\n{describe(data)}")
        for k in data.ks:
            print(f"k {k}\n{HEADER}")
            cases += compare(data, k, methods, args)
    common.report(cases)


def options(about: str, n_seeds: int) -> argparse.ArgumentParser:
    """The options that every benchmark on these activations has."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--shards", type=pathlib.Path, help="a shard directory")
    parser.add_argument("--layer", type=int, default=-1, help="one of its layers")
    parser.add_argument("--seeds", type=int, default=n_seeds, help="runs of each method")
    parser.add_argument("--batch-size", type=int, default=1024)
    return parser


def _args() -> argparse.Namespace:
    parser = options(__doc__.splitlines()[0], 1)
    parser.add_argument("--ks", type=int, nargs="+", default=[16, 32, 64, 128], help="of --shards")
    parser.add_argument("--exp-factor", type=int, default=16, help="of --shards")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="activations for each SAE")
    parser.add_argument(
        "--lr-factors",
        type=float,
        nargs="+",
        default=[1.0],
        help="times each library's own learning rate; the best of them counts, for each alike",
    )
    parser.add_argument("--skip-planted", action="store_true", help="--shards only")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.ks, args.exp_factor = 30_000, args.ks[:1], 4
    return args


# ---- activations ----


def planted(args: argparse.Namespace) -> Data:
    """Sparse sums of random directions: some 4 of 256 atoms at a time, in 64 dimensions.

    Atom a fires with a probability that falls as (a + 1)^-0.7, independently of the others, with a coefficient from
    0.5 to 1.5. There is an offset of norm 2 and noise of 0.03 in each dimension.
    """
    n, n_held_out = (20_000, 4_000) if args.quick else (500_000, 50_000)
    rng = np.random.default_rng(0)
    atoms_AD = rng.standard_normal((256, 64), dtype=np.float32)
    atoms_AD /= np.linalg.norm(atoms_AD, axis=1, keepdims=True)
    offset_D = rng.standard_normal(64, dtype=np.float32) / 4
    p_A = np.arange(1, 257) ** -0.7
    p_A *= 4 / p_A.sum()
    parts = []
    for _ in range(0, n + n_held_out, 10_000):
        fires_NA = rng.random((10_000, 256), dtype=np.float32) < p_A
        code_NA = fires_NA * (0.5 + rng.random((10_000, 256), dtype=np.float32))
        noise_ND = 0.03 * rng.standard_normal((10_000, 64), dtype=np.float32)
        parts.append(code_NA @ atoms_AD + offset_D + noise_ND)
    x_ND = torch.from_numpy(np.concatenate(parts)[: n + n_held_out])
    ks = (4,) if args.quick else (4, 8)
    return Data("planted", x_ND[:n], x_ND[n:], atoms_AD, ks, 512, args.tokens, args.batch_size)


def from_shards(args: argparse.Namespace) -> Data:
    """Patch activations of a dump's images, in raw units."""
    acts = activations.Activations(data_config.Shards(str(args.shards), args.layer, "image"))
    stride = -(-len(acts) // MAX_ACTS)
    train, held_out = [], []
    for i, position in enumerate(range(0, acts.n_imgs, stride)):
        x_XD = torch.from_numpy(acts.read(position, position + 1)[0])
        (held_out if i % HELD_OUT == HELD_OUT - 1 else train).append(x_XD)
    name = f"{acts.metadata.vit_ckpt.split('@')[0]} layer {acts.layers[0]}"
    d_sae = args.exp_factor * acts.d_vit
    parts = torch.cat(train), torch.cat(held_out)
    return Data(name, *parts, None, tuple(args.ks), d_sae, args.tokens, args.batch_size)


def describe(data: Data) -> str:
    n_steps = data.n_tokens // data.batch_size
    return (
        f"{data.name}: {len(data.train_ND):,} activations to train on, {len(data.held_out_ND):,} held out, "
        f"d_sae {data.d_sae}, {n_steps} steps of {data.batch_size} ({n_steps * data.batch_size / len(data.train_ND):.1f} epochs)"
    )


class Order:
    """Batches by step: each epoch is a shuffle of its own; its incomplete last batch is left out."""

    def __init__(self, x_ND: Tensor, batch_size: int, seed: int):
        self.x_ND, self.batch_size, self.seed = x_ND, batch_size, seed
        self.epoch = -1

    def __call__(self, step: int) -> Tensor:
        epoch, i = divmod(step, len(self.x_ND) // self.batch_size)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.epoch, self.order_N = epoch, torch.from_numpy(rng.permutation(len(self.x_ND)))
        return self.x_ND[self.order_N[i * self.batch_size : (i + 1) * self.batch_size]]


# ---- measures ----

HEADER = f"{'method':<32}{'lr':>7}{'nmse':>8}{'l0':>7}{'own nmse':>10}{'own l0':>8}{'dead %':>8}{'found %':>9}{'cos':>7}{'s':>7}"


def compare(
    data: Data, k: int, methods: dict[str, peers.Train], args: argparse.Namespace
) -> list[common.Case]:
    """All methods at one k."""
    cases = []
    for kind in KINDS:
        for name, train in methods.items():
            if name == FOR_INFORMATION and kind == "TopK":
                continue
            cases.append(best_of(data, k, kind, name, train, args))
    rivals = [case for case in cases if FOR_INFORMATION not in case["name"]]
    best = min(rivals, key=lambda case: case["nmse"])
    for case in cases:
        case["ratio"] = round(case["nmse"] / best["nmse"], 4)
        case["reference"] = f"{best['name'].split(': ')[1]} (normalised MSE)"
    return cases


def best_of(
    data: Data, k: int, kind: peers.Kind, name: str, train: peers.Train, args: argparse.Namespace
) -> common.Case:
    """Means over seeds at the learning rate with the lowest error. Prints those of every learning rate."""
    trials = []
    for lr_factor in args.lr_factors:
        runs = [one(data, k, kind, train, seed, lr_factor) for seed in range(args.seeds)]
        mean = {key: round(statistics.mean(run[key] for run in runs), 5) for key in runs[0]}
        errors = [round(run["nmse"], 5) for run in runs]
        print(row(f"{name} {kind}", lr_factor, mean), flush=True)
        trials.append({**mean, "nmse_by_seed": errors, "lr_factor": lr_factor})
    best = min(trials, key=lambda trial: trial["nmse"])
    return {"name": f"{data.name} k {k}: {name} {kind}", **best}


def one(
    data: Data, k: int, kind: peers.Kind, train: peers.Train, seed: int, lr_factor: float
) -> dict[str, float]:
    """Trains one SAE and measures it."""
    batches = Order(data.train_ND, data.batch_size, seed)
    n_steps = data.n_tokens // data.batch_size
    start_s = time.perf_counter()
    trained = train(peers.Task(kind, batches, n_steps, data.d_sae, k, seed, lr_factor))
    train_s = time.perf_counter() - start_s
    with torch.no_grad():
        check(trained, data.held_out_ND[:64])
        own = measure(trained, data.held_out_ND)
        if trained.threshold is not None:
            trained.set_threshold(fitting_threshold(trained, data.held_out_ND, k))
        values = measure(trained, data.held_out_ND)
        fired_S = values.pop("fired_S")
        first = max(0, n_steps - N_RECENT // data.batch_size)
        for step in range(first, n_steps):
            fired_S |= (trained.reconstruct(batches(step))[1] > metrics.EPS_ACTIVE).any(dim=0)
    values |= {"own_nmse": own["nmse"], "own_l0": own["l0"]}
    values["dead_frac"] = (~fired_S).float().mean().item()
    if data.atoms_AD is not None:
        cos_A = np.abs(data.atoms_AD @ trained.decoder_SD.T).max(axis=1)
        values |= {"found_pct": 100 * float((cos_A > 0.9).mean()), "cos": float(cos_A.mean())}
    return {**values, "train_s": train_s}


def measure(trained: peers.Trained, x_ND: Tensor) -> dict[str, tp.Any]:
    """Normalised MSE, latents per activation, and which latents fired."""
    x_hat, n_fired, fired_S = [], 0, False
    for x_BD in x_ND.split(CHUNK):
        x_hat_BD, f_BS = trained.reconstruct(x_BD)
        fires_BS = f_BS > metrics.EPS_ACTIVE
        x_hat.append(x_hat_BD)
        n_fired += fires_BS.sum().item()
        fired_S = fired_S | fires_BS.any(dim=0)
    nmse = metrics.normalized_mse(x_ND, torch.cat(x_hat))
    return {"nmse": nmse, "l0": n_fired / len(x_ND), "fired_S": fired_S}


def fitting_threshold(trained: peers.Trained, x_ND: Tensor, k: int) -> float:
    """The threshold that k latents per activation exceed, on average over some 8,192 of the activations."""
    trained.set_threshold(0.0)
    x_BD = x_ND[:: max(1, len(x_ND) // 8192)]
    f = torch.cat([trained.reconstruct(x_CD)[1].flatten() for x_CD in x_BD.split(CHUNK)])
    return f.kthvalue(len(f) - k * len(x_BD)).values.item()


def check(trained: peers.Trained, x_BD: Tensor) -> None:
    """Evaluation mode: the code of an activation does not depend on its batch mates; decoder rows have norm 1."""
    x_hat_BD, f_BS = trained.reconstruct(x_BD)
    alone_hat_BD, alone_BS = trained.reconstruct(x_BD[:5])
    assert torch.allclose(alone_BS, f_BS[:5], rtol=1e-3, atol=1e-5)
    assert torch.allclose(alone_hat_BD, x_hat_BD[:5], rtol=1e-3, atol=1e-4)
    assert (f_BS >= 0).all() and x_hat_BD.isfinite().all()
    assert np.allclose(np.linalg.norm(trained.decoder_SD, axis=1), 1, atol=1e-4)


def row(method: str, lr_factor: float, values: dict[str, float]) -> str:
    found, cos = values.get("found_pct", float("nan")), values.get("cos", float("nan"))
    return (
        f"{method:<32}{f'x{lr_factor:g}':>7}{values['nmse']:8.4f}{values['l0']:7.1f}{values['own_nmse']:10.4f}{values['own_l0']:8.1f}"
        f"{100 * values['dead_frac']:8.1f}{found:9.1f}{cos:7.3f}{values['train_s']:7.1f}"
    )


# ---- saev ----


def train_saev(task: peers.Task, objective: nn_config.Objective = VANILLA) -> peers.Trained:
    """saev's defaults (its window of dead latents is a tenth of a run as short as these)."""
    cls = {"TopK": nn_config.TopK, "BatchTopK": nn_config.BatchTopK}[task.kind]
    n_patches = task.n_steps * task.batch_size
    cfg = training_config.Train(
        sae=cls(d_vit=task.d_vit, d_sae=task.d_sae, top_k=task.k),
        objective=objective,
        n_patches=n_patches,
        batch_size=task.batch_size,
        seed=task.seed,
    )
    cfg = dataclasses.replace(cfg, lr=cfg.peak_lr * task.lr_factor)
    in_training = training_run.Run(cfg, pathlib.Path(), torch.device("cpu"))
    in_training.start(task.batches(0))
    for step in range(task.n_steps):
        in_training.step(step, task.batches(step))
    sae = in_training.finished()
    decoder_SD = sae.W_dec.numpy()
    if task.kind == "TopK":
        return peers.Trained(decoder_SD, sae, None, None)
    return peers.Trained(decoder_SD, sae, sae.threshold.item(), sae.threshold.fill_)


if __name__ == "__main__":
    main()
