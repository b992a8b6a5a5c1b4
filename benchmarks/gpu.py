"""What saev does on a GPU, right and how fast: one call, within 8 minutes, without a network.

    uv run python -m benchmarks.gpu [--only abcdef] [--minutes 8] [--json FILE] [--small --device cpu]

In this order: (a) the tests that need a GPU; (b) each stage once on a small dump, beside the same on a CPU; (c) training steps
in units of the encoder's product in the same precision, beside dense autograd, torch.compile, and sparsify's and SAELens's own
steps where these are installed, with the share of each kernel and the peak of memory; (d) many SAEs on one stream, the loader
and the copy to the device; (e) the dump beside the ViT's forward pass; (f) k-means, PCA, protoeval's pass and AP.

A case that fails is reported and the next one runs; the exit status is then 1. A case whose turn comes after --minutes is
"not run". `--small --device cpu` runs all of it at toy sizes, which says nothing of speed.

B batch, D d_vit, S latents, K prototypes.
"""

import argparse
import collections.abc
import contextlib
import csv
import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import typing as tp

import numpy as np
import torch

from benchmarks import common, dump, loading, peers, train_step
from benchmarks import protoeval as grid
from saev import devices
from saev.data import activations, ordered, shuffled
from saev.data import config as data_config
from saev.nn import config as nn_config
from saev.protoeval import ap, score
from saev.scorers import config as scorers_config
from saev.scorers import kmeans, pca
from saev.training import memory

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Here:
    """Where and how large the cases are."""

    device: torch.device
    small: bool
    tmp: pathlib.Path

    def size(self, large: int, small: int) -> int:
        return small if self.small else large

    def wait(self) -> None:
        """Until the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: collections.abc.Callable[[], object], n: int = 10) -> float:
        """Of one call: the median of 3 rounds of n calls, after a round of warm-up."""
        rounds = []
        for _ in range(4):
            self.wait()
            start_s = time.perf_counter()
            for _ in range(1 if self.small else n):
                call()
            self.wait()
            rounds.append((time.perf_counter() - start_s) / (1 if self.small else n))
        return sorted(rounds[1:])[1]

    def peak_gb(self, call: collections.abc.Callable[[], object]) -> float | None:
        """The most memory that torch held during a call. None on a CPU."""
        if self.device.type != "cuda":
            call()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)


Cases = collections.abc.Iterator[tuple[str, collections.abc.Callable[[], dict[str, object]]]]
"""Name -> what it measures: keys of a case (`common.Case`) except its name."""


# ---- a, b: is it right? ----


def tests(here: Here) -> Cases:
    def run() -> dict[str, object]:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-o", "addopts=", "--durations=0"]
        few = ["tests/test_nn_triton.py"] if here.small else []
        done = subprocess.run([*command, *few], cwd=ROOT, capture_output=True, text=True, timeout=240)
        said = done.stdout.strip().splitlines()[-1]
        assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-30:])
        assert here.device.type == "cpu" or "skipped" not in said, said
        return {"reference": said}

    yield "pytest -m gpu", run


def stages(here: Here) -> Cases:
    """The demo's four stages on the device and on a CPU."""

    def demo(device: str) -> pathlib.Path:
        root = here.tmp / f"demo-{device}"
        size = ["--n-imgs", str(here.size(120, 40)), "--n-patches", str(here.size(60_000, 20_000))]
        command = [sys.executable, "-m", "saev.demo", "--dump-to", str(root), "--device", device, *size]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return root

    made: dict[str, pathlib.Path] = {}

    def dumped() -> dict[str, object]:
        made.update(there=demo(str(here.device)), here=made.get("here") or demo("cpu"))
        there, here_acts = (_activations(made[side]) for side in ("there", "here"))
        error = float(np.abs(there - here_acts).max() / np.abs(here_acts).max())
        assert error < 1e-2, error
        return {"ratio": error, "reference": "largest activation: largest difference of one"}

    def trained() -> dict[str, object]:
        there, cpu = (
            _metric(made[side], "checkpoints/*/metrics.json", "explained_variance") for side in made
        )
        assert abs(there - cpu) < 0.02, (there, cpu)
        return {"ratio": there / cpu, "reference": "explained variance of the CPU's SAE"}

    def evaluated() -> dict[str, object]:
        there, cpu = (_maps(made[side]) for side in ("there", "here"))
        assert len(there) == len(cpu) > 5
        worst = max(abs(a - b) for a, b in zip(there, cpu, strict=True))
        assert worst < 0.06, worst
        return {"ratio": worst, "reference": "mAP: largest difference of a row of the table"}

    yield "dump, against a CPU's", dumped
    yield "train, against a CPU's", trained
    yield "evaluate, against a CPU's", evaluated


def _activations(root: pathlib.Path) -> np.ndarray:
    (dpath,) = (root / "shards").iterdir()
    return np.concatenate([b.act_NXD for b in ordered.Ordered(data_config.Shards(str(dpath), 7))])


def _metric(root: pathlib.Path, pattern: str, name: str) -> float:
    (fpath,) = root.glob(pattern)
    found = re.search(rf'"{name}": ([-\d.e]+)', fpath.read_text())
    assert found, fpath.read_text()
    return float(found[1])


def _maps(root: pathlib.Path) -> list[float]:
    fpath = max(root.glob("results/*/summary.csv"), key=lambda f: f.stat().st_size)
    with fpath.open() as fd:
        return [float(row["map"]) for row in csv.DictReader(fd)]


# ---- c: training steps ----


def steps(here: Here) -> Cases:
    d_vit = here.size(1024, 32)
    kinds = {
        "TopK": nn_config.TopK,
        "BatchTopK": nn_config.BatchTopK,
        "ReLU": nn_config.Relu,
        "JumpReLU": nn_config.JumpRelu,
    }
    shapes = [(16_384, 16_384), (16_384, 4096), (32_768, 16_384), (32_768, 4096)]
    for d_sae, batch_size in shapes[: 1 if here.small else None]:
        d_sae, batch_size = here.size(d_sae, 256), here.size(batch_size, 64)
        for name, cls in kinds.items():
            sparse = name in ("TopK", "BatchTopK")
            for precision in ("bfloat16", "float32", "tf32") if sparse else ("bfloat16", "float32"):
                case = train_step.Case(f"{name} {d_sae}", cls(d_vit=d_vit, d_sae=d_sae), batch_size)
                title = f"{name}, S {d_sae}, B {batch_size}, {precision}"
                yield title, lambda c=case, p=precision: _step(here, c, p)
        goal = nn_config.Matryoshka(n_prefixes=10)
        case = train_step.Case("Matryoshka", nn_config.TopK(d_vit=d_vit, d_sae=d_sae), batch_size, goal)
        yield (
            f"TopK Matryoshka, S {d_sae}, B {batch_size}, bfloat16",
            lambda c=case: _step(here, c, "bfloat16"),
        )
    d_sae, batch_size = here.size(16_384, 256), here.size(16_384, 64)
    case = train_step.Case("TopK", nn_config.TopK(d_vit=d_vit, d_sae=d_sae), batch_size)
    where = f"S {d_sae}, B {batch_size}"
    yield f"shares of kernels: TopK, {where}, bfloat16", lambda: _shares(here, case, "bfloat16")
    if here.device.type == "cuda":
        yield f"torch.compile: TopK, {where}, bfloat16", lambda: _compiled(here, case, "bfloat16")
    if importlib.util.find_spec("sparsify"):
        yield f"sparsify: TopK, {where}, float32", lambda: _sparsify(here, case)
    if importlib.util.find_spec("sae_lens"):
        yield f"SAELens: TopK, {where}, float32", lambda: _saelens(here, case)


def _product_s(here: Here, case: train_step.Case, precision: str) -> float:
    """Seconds of the encoder's product in this precision."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    d_vit, d_sae = tp.cast(int, case.sae.d_vit), case.sae.n_latents
    x_BD = torch.randn(case.batch_size, d_vit, device=here.device).to(dtype)
    W_DS = torch.randn(d_sae, d_vit, device=here.device).to(dtype).T
    with devices.tf32(precision == "tf32"):
        return here.seconds(lambda: torch.mm(x_BD, W_DS))


def _ours(here: Here, case: train_step.Case, precision: str) -> collections.abc.Callable[[], object]:
    """A step of ours on the next batch."""
    x = train_step.batches(tp.cast(int, case.sae.d_vit), case.batch_size, str(here.device))
    run = train_step.start(case, x, str(here.device), precision)
    n = iter(range(10**9))
    return lambda: run.step(i := next(n), x[i % len(x)])


def _step(here: Here, case: train_step.Case, precision: str) -> dict[str, object]:
    product_s = _product_s(here, case, precision)
    step = _ours(here, case, precision)
    step_s = here.seconds(step)
    gb = here.peak_gb(step)
    del step
    cfg = train_step.config_of(case, precision)
    part_bytes = memory.part_bytes([cfg], 80 * 10**9)
    return {
        "ratio": step_s / product_s,
        "reference": f"one encoder product, {precision}",
        "product_ms": 1e3 * product_s,
        "tokens_per_s": round(case.batch_size / step_s),
        "dense_ratio": _dense_s(here, case, precision) / product_s,
        "peak_gb": gb,
        "formula_gb": round(memory.gpu_peak([cfg], part_bytes, is_costly=False) / 1e9, 3),
    }


def _dense(here: Here, case: train_step.Case, precision: str) -> collections.abc.Callable[[], object]:
    """A step of dense autograd with torch's fused Adam."""
    x = train_step.batches(tp.cast(int, case.sae.d_vit), case.batch_size, str(here.device))
    theirs = train_step.start(case, x, str(here.device), precision)
    optimizer = torch.optim.Adam(theirs.sae.parameters(), fused=here.device.type == "cuda")
    n = iter(range(10**9))

    def step() -> None:
        i = next(n)
        low = torch.autocast(here.device.type, torch.bfloat16, enabled=precision == "bfloat16")
        with low, devices.tf32(precision == "tf32"):
            train_step.dense_step(theirs, optimizer, i, x[i % len(x)])

    return step


def _dense_s(here: Here, case: train_step.Case, precision: str) -> float:
    return here.seconds(_dense(here, case, precision), 3)


def _compiled(here: Here, case: train_step.Case, precision: str) -> dict[str, object]:
    """A dense step whose loss and gradients torch has compiled, with torch's fused Adam."""
    x = train_step.batches(tp.cast(int, case.sae.d_vit), case.batch_size, str(here.device))
    sae = train_step.start(case, x, str(here.device), precision).sae
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    k, n = tp.cast(nn_config.TopK, case.sae).top_k, iter(range(10**9))

    def loss(x_BD: torch.Tensor) -> torch.Tensor:
        z_BD = x_BD * sae.scale
        value_BK, latent_BK = torch.addmm(sae.b_enc, z_BD - sae.b_dec, sae.W_enc).topk(k, dim=1, sorted=False)
        f_BS = z_BD.new_zeros(len(z_BD), sae.d_sae).scatter(1, latent_BK, value_BK.relu().float())
        return (torch.addmm(sae.b_dec, f_BS, sae.W_dec) - z_BD).square().mean()

    compiled = torch.compile(loss)

    def step() -> None:
        with torch.autocast(here.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            found = compiled(x[next(n) % len(x)])
        found.backward()
        sae.remove_parallel_grad()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sae.normalize_decoder()

    product_s = _product_s(here, case, precision)
    return {"ratio": here.seconds(step, 3) / product_s, "reference": f"one encoder product, {precision}"}


def _shares(here: Here, case: train_step.Case, precision: str) -> dict[str, object]:
    """Share of each kernel in the time of a step."""
    step = _ours(here, case, precision)
    for _ in range(5):
        step()
    here.wait()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    is_gpu = here.device.type == "cuda"
    kinds += [torch.profiler.ProfilerActivity.CUDA] if is_gpu else []
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(here.size(10, 2)):
            step()
        here.wait()
    name = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    rows = {row.key: getattr(row, name) for row in profile.key_averages()}
    total = sum(rows.values())
    largest = sorted(rows.items(), key=lambda pair: -pair[1])[:15]
    shares = {key[:60]: round(value / total, 4) for key, value in largest}
    return {"ratio": sum(shares.values()), "reference": "all kernels: the 15 longest", "shares": shares}


def _sparsify(here: Here, case: train_step.Case) -> dict[str, object]:
    """sparsify's SparseCoder as its trainer steps it: fraction of variance unexplained, Adam, unit decoder rows."""
    import sparsify

    d_vit = tp.cast(int, case.sae.d_vit)
    cfg = sparsify.SparseCoderConfig(
        num_latents=case.sae.n_latents, k=tp.cast(nn_config.TopK, case.sae).top_k
    )
    coder = sparsify.SparseCoder(d_vit, cfg, device=here.device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4)
    x = train_step.batches(d_vit, case.batch_size, str(here.device))
    n = iter(range(10**9))

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x[next(n) % len(x)]).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {
        "ratio": here.seconds(step, 3) / _product_s(here, case, "float32"),
        "reference": "one encoder product, float32",
    }


def _saelens(here: Here, case: train_step.Case) -> dict[str, object]:
    """SAELens's trainer, timed from batch to batch."""
    x = train_step.batches(tp.cast(int, case.sae.d_vit), case.batch_size, str(here.device))
    n_steps, asked_s = here.size(60, 12), []

    def batch(step: int) -> torch.Tensor:
        here.wait()
        asked_s.append(time.perf_counter())
        return x[step % len(x)]

    cfg = tp.cast(nn_config.TopK, case.sae)
    task = peers.Task("TopK", batch, n_steps, cfg.n_latents, cfg.top_k, 0, device=str(here.device))
    peers.sae_lens(task)
    step_s = float(np.median(np.diff(asked_s[n_steps // 2 :])))
    return {"ratio": step_s / _product_s(here, case, "float32"), "reference": "one encoder product, float32"}


# ---- d: one stream ----


def stream(here: Here) -> Cases:
    with tempfile.TemporaryDirectory(dir=here.tmp) as root:
        for dtype in ("float32", "bfloat16"):
            folder = pathlib.Path(root) / dtype
            folder.mkdir()
            dpath = loading.write(folder, 0.02 if here.small else 1.5, dtype)
            loading.read_all(sorted(dpath.glob("acts*.bin")))
            yield f"loader alone, {dtype}", lambda d=dpath: _loader(here, d, 0)
            for n_saes in (1, 8):
                yield f"{n_saes} TopK on one stream, {dtype}", lambda d=dpath, n=n_saes: _loader(here, d, n)


def _loader(here: Here, dpath: pathlib.Path, n_saes: int) -> dict[str, object]:
    """Batches from the page cache to the device, and to the steps of some SAEs."""
    batch_size = here.size(16_384, 256)
    is_gpu = here.device.type == "cuda"
    acts = activations.Activations(data_config.Shards(str(dpath)))
    loader = shuffled.Shuffled(acts, batch_size=batch_size, pool_bytes=int(3e8), pin=is_gpu, keep_half=is_gpu)
    case = train_step.Case("TopK", nn_config.TopK(d_vit=acts.d_vit, d_sae=here.size(16_384, 256)), batch_size)
    batches = iter(loader)
    x = [next(batches).act_BD.to(here.device).float() for _ in range(4)]
    runs = [train_step.start(case, x, str(here.device), "bfloat16") for _ in range(n_saes)]
    n_steps, waited_s = here.size(300, 4), 0.0
    for i in range(min(5, n_steps)):
        for run in runs:
            run.step(i, x[i % 4])
    here.wait()
    start_s = time.perf_counter()
    for i in range(n_steps):
        asked_s = time.perf_counter()
        batch_BD = next(batches).act_BD
        waited_s += time.perf_counter() - asked_s
        x_BD = batch_BD.to(here.device, non_blocking=True).float()
        for run in runs:
            run.step(5 + i, x_BD)
    here.wait()
    took_s = time.perf_counter() - start_s
    batches.close()
    return {
        "ratio": waited_s / took_s,
        "reference": "the time: waiting for the loader",
        "tokens_per_s": round(n_steps * batch_size / took_s),
    }


# ---- e: dump ----


def dumps(here: Here) -> Cases:
    def run(autocast: str) -> dict[str, object]:
        with tempfile.TemporaryDirectory(dir=here.tmp) as root:
            n_imgs, images = here.size(512, 4), pathlib.Path(root) / "images"
            dump.draw(images, n_imgs)
            ckpt = "vit_tiny_patch16_224" if here.small else "vit_base_patch16_224"
            cfg = data_config.Dump(
                vit=data_config.Vit("timm", ckpt, "random", autocast=tp.cast(tp.Any, autocast)),
                data=data_config.ImageFolder(str(images)),
                vit_layers=(-1,),
                vit_batch_size=here.size(64, 2),
                device=str(here.device),
            )
            cases = dump.measure(cfg, pathlib.Path(root), n_imgs, here.size(3, 1), [4, here.size(16, 5)])
        best = min((case for case in cases if "dump" in str(case["name"])), key=lambda case: case["ratio"])
        return {
            "ratio": best["ratio"],
            "reference": "the ViT's bare forward pass",
            "cases": {case["name"]: [case["ratio"], case["imgs_per_s"]] for case in cases},
        }

    for autocast in ("bfloat16", "off"):
        yield f"dump, autocast {autocast}", lambda a=autocast: run(a)


# ---- f: scorers ----


def scoring(here: Here) -> Cases:
    root = here.tmp / "scoring"
    n_imgs, d_vit, k = here.size(400, 12), here.size(1024, 32), here.size(8192, 64)
    data = grid.write(root, n_imgs, d_vit)
    acts = activations.Activations(data)
    x = [torch.from_numpy(b.act_NXD).flatten(0, 1).to(here.device) for b in ordered.Ordered(acts)]
    w_KD = torch.randn(k, d_vit, device=here.device)

    def floor(w: torch.Tensor) -> None:
        for block in ordered.Ordered(acts):
            torch.mm(torch.from_numpy(block.act_NXD).flatten(0, 1).to(here.device), w.T)

    def ratio(call: collections.abc.Callable[[], object], what: collections.abc.Callable[[], object]) -> dict:
        return {"ratio": here.seconds(call, 1) / here.seconds(what, 1), "reference": "reads + products"}

    def fit_means() -> dict[str, object]:
        state = kmeans.State(torch.zeros(d_vit, device=here.device), x[0][:k].clone())
        cfg = scorers_config.KMeans()
        return ratio(lambda: kmeans.one_pass([state], acts, cfg), lambda: floor(w_KD))

    yield f"k-means, a pass, K {k}", fit_means
    yield "PCA", lambda: ratio(lambda: pca.fit(acts, here.device), lambda: floor(w_KD[:d_vit]))
    for name, scorer in grid.made(k, d_vit).items():

        def scored(scorer=scorer) -> dict[str, object]:
            def call() -> None:
                with tempfile.TemporaryDirectory(dir=here.tmp) as dpath:
                    images = list(range(n_imgs))
                    score.score_images([scorer], acts, images, pathlib.Path(dpath), here.device)

            return ratio(call, lambda: floor(w_KD))

        yield f"pass, {name}, K {k}", scored

    def average_precision() -> dict[str, object]:
        rng = np.random.default_rng(0)
        score_NK = rng.standard_normal((here.size(2000, 50), here.size(2048, 16)), np.float32)
        labels_NT = rng.random((len(score_NK), here.size(312, 4))) < 0.2
        took_s = common.seconds(lambda: ap.average_precision(score_NK, labels_NT))
        return {"ratio": took_s, "reference": "a second (it runs on the CPU)"}

    yield "AP matrix", average_precision


SECTIONS: dict[str, collections.abc.Callable[[Here], Cases]] = {
    "a": tests,
    "b": stages,
    "c": steps,
    "d": stream,
    "e": dumps,
    "f": scoring,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="".join(SECTIONS), help="sections, such as 'ac'")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins later than this")
    parser.add_argument("--json", help="file for the JSON lines too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes: are the cases right?")
    args = parser.parse_args()
    end_s = time.monotonic() + 60 * args.minutes
    device = torch.device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    cases: list[common.Case] = []
    with tempfile.TemporaryDirectory() as tmp:
        here = Here(device, args.small, pathlib.Path(tmp))
        for letter in args.only:
            for name, call in SECTIONS[letter](here):
                case = {"name": f"({letter}) {name}", "device": card, **measured(call, end_s)}
                cases.append(case)
                print(line(case), flush=True)
                if args.json:
                    with pathlib.Path(args.json).open("a") as fd:
                        fd.write(json.dumps(case) + "\n")
    print()
    for case in cases:
        print(json.dumps(case))
    failed = [case for case in cases if case.get("error")]
    print(f"\n{card}: {len(cases) - len(failed)} of {len(cases)} cases")
    return int(bool(failed))


def measured(call: collections.abc.Callable[[], dict[str, object]], end_s: float) -> dict[str, object]:
    """A case's outcome: its figures, or its error."""
    if time.monotonic() > end_s:
        return {"error": "not run: --minutes are over"}
    start_s = time.monotonic()
    try:
        found = call()
    except Exception as err:  # whatever it is, the other cases are worth knowing
        found = {"error": f"{type(err).__name__}: {err}"[-2000:]}
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
    return {**found, "seconds": round(time.monotonic() - start_s, 1)}


def line(case: common.Case) -> str:
    if case.get("error"):
        last = str(case["error"]).strip().splitlines()[-1]
        return f"{case['name']:60}  FAILED {last[:200]}"
    ratio = f"{case['ratio']:10.4g}" if "ratio" in case else f"{'':10}"
    more = "".join(f"  {k} {v}" for k, v in case.items() if k in ("tokens_per_s", "dense_ratio", "peak_gb"))
    return f"{case['name']:60}{ratio}  {case['reference']}{more}"


if __name__ == "__main__":
    sys.exit(main())
