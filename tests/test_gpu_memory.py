"""Memory and indices at a GPU's sizes: the formulas against tensors on a fake GPU, and searches in parts.

B batch, D d_vit, S latents, K top k.
"""

import collections.abc
import dataclasses
import pathlib
import re
import typing as tp
import unittest.mock

import fake_gpu
import numpy as np
import pytest
import torch

from benchmarks import gpu_memory
from saev import errors, nn, tracking
from saev.data import activations, dump, ordered, shuffled, vits
from saev.data import config as data_config
from saev.data import memory as data_memory
from saev.formats import shards
from saev.nn import config as nn_config
from saev.nn import partsizes, robust, sparse, triton_kernels
from saev.protoeval import memory as protoeval_memory
from saev.scorers import base, kmeans, pca
from saev.scorers import config as scorers_config
from saev.scorers import sae as sae_scorer
from saev.training import config, evaluate, loop, memory, parallel, run
from saev.visuals import coders, relations
from saev.visuals import memory as visuals_memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
    pytest.mark.skipif(not triton_kernels.IS_INSTALLED, reason="needs Triton"),
]

ROOT = pathlib.Path(__file__).parent.parent
LEAST, MOST = 0.9, 1.35
"""A formula divided by what is measured. It is rather too large than too small: kernels also need scratch memory.
The type checks of all functions, which full tests switch on, keep some tensors longer."""
P = gpu_memory.N_PATCHES
LARGEST = gpu_memory.SIZES[-1]


def a_gpu(d_sae: int = 10**9, k: int = gpu_memory.K) -> fake_gpu.Gpu:
    """Of pre-activations, a few more than the k largest of each row are above BatchTopK's guess."""
    gpu = fake_gpu.Gpu(lambda n: int(1.03 * k * (n // d_sae)) if n >= 1000 * d_sae else 5)
    gpu.answer[torch.int32] = k * LARGEST.batch  # BatchTopK's number of codes, at most
    return gpu


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device=fake_gpu.DEVICE)


class Acts(activations.Activations):
    """Activations that are nowhere."""

    d_vit = 0
    is_kept_NT = None

    def __init__(self, d_vit: int):
        self.d_vit = d_vit

    def __len__(self) -> int:
        return 10**6


class Blocks(ordered.Ordered):
    """A few blocks of images."""

    def __init__(self, n_imgs: int, d_vit: int):
        self.n_imgs, self.d_vit, self.acts = n_imgs, d_vit, Acts(d_vit)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> collections.abc.Iterator[ordered.Block]:
        for _ in range(3):
            yield ordered.Block(np.arange(self.n_imgs), np.empty((self.n_imgs, P, self.d_vit), np.float32))


# ---- the table ----


def trained(name: str, size: gpu_memory.Size) -> int:
    asked = gpu_memory.SAES[name]
    with a_gpu(size.d_sae) as gpu:
        cfg = gpu_memory.train(name, size)
        part_bytes = gpu_memory.part_bytes(name, size)
        made = run.Run(cfg, pathlib.Path("run"), fake_gpu.DEVICE, part_bytes=part_bytes)
        peak = stepped(gpu, made, asked.is_costly, int(asked.dead * size.d_sae))
        assert peak <= asked.gpu_gb * 1e9
        return peak


def stepped(gpu: fake_gpu.Gpu, made: run.Run, is_costly: bool, n_dead: int) -> int:
    """The peak of a run's second step."""
    x_BD = on_gpu(made.cfg.batch_size, made.sae.d_vit)
    made.step(0, x_BD)
    step = 0 if is_costly else 1
    with gpu.count(), unittest.mock.patch.object(made, "_updated_dead", lambda: made.dead_C):
        if n_dead:
            made.dead_C = torch.zeros(n_dead, dtype=torch.int64, device=fake_gpu.DEVICE)
        out = made.step(step, x_BD)
        if is_costly:
            made.measure(step, x_BD, out)
        return gpu.peak


def evaluated(size: gpu_memory.Size) -> int:
    with a_gpu() as gpu:
        sae = an_sae(size)
        around = robust.typical(on_gpu(memory.n_read_first(size.d_vit, 10**9), size.d_vit))
        sums = evaluate.Sums(sae, around)
        n_rows = memory.EVALUATED_CODES // (4 * size.d_sae)
        for _ in range(2):
            sums.add(on_gpu(n_rows, size.d_vit))
        sums.metrics()
        return gpu.peak


def an_sae(size: gpu_memory.Size, cls: tp.Any = nn_config.TopK) -> nn.SparseAutoencoder:
    cfg = cls(d_vit=size.d_vit, d_sae=size.d_sae, top_k=gpu_memory.K)
    return nn.SparseAutoencoder(cfg).to(fake_gpu.DEVICE).eval().requires_grad_(False)


def shown(size: gpu_memory.Size) -> int:
    with a_gpu() as gpu:
        coder = coders.SaeCoder(an_sae(size, nn_config.BatchTopK))
        sizes = visuals_memory.Sizes(gpu_memory.N_IMAGES, P, size.d_vit, size.d_sae)
        for _ in range(2):
            coder(on_gpu(sizes.block * P, size.d_vit))
        relations.neighbours(coder.vectors(), np.arange(1000))
        return gpu.peak


def scored(scorer: tp.Any, k: int, size: gpu_memory.Size) -> int:
    cfg, sizes = gpu_memory.evaluation(scorer, size, k)
    one = 4 * (5 * P * size.d_vit + 2 * k)
    n_imgs = max(1, min(protoeval_memory.SCORE_BLOCK, int(cfg.memory_gb * 1e9 / one)))
    with a_gpu() as gpu:
        if isinstance(scorer, scorers_config.Sae):
            # whose codes are elementwise: others are scored in smaller parts
            made: tp.Any = sae_scorer.SaeLatents(an_sae(size, nn_config.BatchTopK), k)
        else:
            made = base.Prototypes.of(torch.empty(k, size.d_vit), torch.empty(size.d_vit), "cosine")
            made = made.to(fake_gpu.DEVICE)
        for _ in range(2):
            best_BK = torch.cat([made.of_images(on_gpu(n_imgs, P, size.d_vit))], dim=1)
        assert best_BK.shape == (n_imgs, k) and sizes.d_vit == size.d_vit
        return gpu.peak


def fitted(scorer: tp.Any, size: gpu_memory.Size) -> int:
    k, D = 8192, size.d_vit
    with a_gpu() as gpu:
        if isinstance(scorer, scorers_config.Pca):
            with unittest.mock.patch.object(pca.ordered, "Ordered", lambda _: Blocks(64, D)):
                pca.moments(Acts(D), fake_gpu.DEVICE)
            return gpu.peak
        x_BD = on_gpu(scorer.n_samples, D)
        square_B = x_BD.square().sum(dim=1)
        kmeans._updated(square_B, x_BD, square_B, x_BD[: k // 16])
        kmeans._gains(x_BD, square_B, square_B, x_BD[:k])  # the largest draw of candidates
        del square_B
        sums = kmeans._Sums(kmeans.State(on_gpu(D), on_gpu(k, D)))
        for _ in range(3):
            sums.add(on_gpu(protoeval_memory.FIT_BLOCK * P, D))
        sums.finish(scorer)
        return gpu.peak


def measured(stage: str, size: gpu_memory.Size) -> int:
    kind, _, name = stage.partition(": ")
    match kind, name:
        case "training step", _:
            return trained(name, size)
        case "evaluation after training", _:
            return evaluated(size)
        case "visuals", _:
            return shown(size)
        case "scoring", "SAE":
            return scored(scorers_config.Sae("sae.pt"), size.d_sae, size)
        case "scoring", _:
            return scored(scorers_config.Random(), 8192, size)
        case _:
            return fitted({"PCA": scorers_config.Pca()}.get(name, scorers_config.KMeans()), size)


@pytest.mark.slow
@pytest.mark.parametrize("stage", gpu_memory.rows())
def test_a_stages_formula(stage: str) -> None:
    for size, want in zip(gpu_memory.SIZES, gpu_memory.rows()[stage], strict=True):
        found = measured(stage, size)
        assert LEAST <= want / found <= MOST, (size, want / 1e9, found / 1e9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "autocast", "n_imgs"),
    [
        ("vit_large_patch14_clip_224", (5, 11, 17, 23), "off", 64),
        ("vit_large_patch14_clip_224", (5,), "bfloat16", 16),
        ("vit_base_patch16_224", tuple(range(12)), "bfloat16", 16),
    ],
)
def test_the_formula_of_a_dump(name: str, layers: tuple[int, ...], autocast: tp.Any, n_imgs: int) -> None:
    cfg = data_config.Vit("timm", name, "random", autocast=autocast)
    with fake_gpu.Gpu() as gpu:
        gpu.equal = True  # the recorded activations are those of the block
        vit = vits.load(cfg)
        asked = data_config.Dump(
            vit=cfg, data=data_config.ImageFolder("x"), vit_batch_size=n_imgs, vit_layers=layers
        )
        metadata = unittest.mock.Mock(layers=layers, n_tokens=vit.n_patches + 1)
        out = unittest.mock.Mock(shards.ShardDir, metadata=metadata)
        dumper = dump._Dumper(asked, vit, out, [], fake_gpu.DEVICE)
        batch = dump.Loaded(
            range(n_imgs), [(list(range(n_imgs)), torch.empty(n_imgs, 3, *vit.transform.size))], [], []
        )
        sizes = data_memory.Sizes(gpu.live, 224 * 224, vit.n_patches + 1, vit.d_vit, len(layers))
        assert len(list(dumper._compute([batch] * 3))) == 3
        if (len(layers), n_imgs) == (4, 64):
            assert sizes.weights == pytest.approx(gpu_memory.VIT.weights, rel=0.01)
        assert LEAST <= gpu_memory.in_dump(asked, sizes) / gpu.peak <= MOST


@pytest.mark.slow
@pytest.mark.parametrize("sae", [nn_config.TopK, nn_config.BatchTopK, nn_config.Relu, nn_config.JumpRelu])
@pytest.mark.parametrize(
    "shape", [(16_384, 16_384, 1024, 32), (65_536, 8192, 256, 32), (1024, 65_536, 4096, 8)]
)
def test_training_at_other_sizes(sae: tp.Any, shape: tuple[int, int, int, int]) -> None:
    batch_size, d_sae, d_vit, k = shape
    some = {"top_k": k} if hasattr(sae, "top_k") else {}
    for n_prefixes, ema, precision in ((0, 0.0, "float32"), (4, 0.9, "bfloat16"), (10, 0.0, "float32")):
        objective = nn_config.Matryoshka(n_prefixes=n_prefixes) if n_prefixes else nn_config.Vanilla()
        cfg = config.Train(
            sae=sae(d_vit=d_vit, d_sae=d_sae, **some),
            objective=objective,
            batch_size=batch_size,
            ema=ema,
            precision=tp.cast(tp.Any, precision),
        )
        with a_gpu(d_sae, k) as gpu:
            made = run.Run(cfg, pathlib.Path("run"), fake_gpu.DEVICE)
            for step in range(2):
                made.step(step, on_gpu(batch_size, d_vit))
            assert LEAST <= memory.gpu_peak([cfg], 2**33, False) / gpu.peak <= MOST, (n_prefixes, precision)


def test_the_table_in_the_docs_is_what_the_command_prints() -> None:
    assert gpu_memory.table() in (ROOT / "docs/memory.md").read_text()


# ---- searches in parts ----


def an_encoder(n_latents: int, d: int, part_bytes: int) -> tuple[sparse.Encoder, torch.Tensor]:
    """In float64, so that products of any number of rows have the same largest values."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(*n, generator=generator).double() for n in ((n_latents, d), (n_latents,), (37, d))]
    return sparse.Encoder(draw[0], draw[1], False, part_bytes), draw[2]


@pytest.mark.parametrize("n_rows", [1, 5, 36, 37])
def test_parts_find_what_the_whole_batch_finds(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's operations, on the CPU."""
    monkeypatch.setattr("saev.nn.kernels.available", lambda _: False)
    monkeypatch.setattr("saev.nn.triton_kernels.available", lambda _: False)
    whole, x_BD = an_encoder(60, 9, 2**33)
    parts = whole._replace(part_bytes=n_rows * 60 * partsizes.PRE_BYTES)
    assert len(sparse.search.parts(parts, x_BD)) == -(-37 // n_rows)
    assert len(sparse.search.parts(whole, x_BD)) == 1
    for find in (
        lambda encoder: sparse.top_k(encoder, x_BD, 7),
        lambda encoder: sparse.top_k(encoder, x_BD, 50, keep_negative=True),
        lambda encoder: sparse.above(encoder, x_BD, torch.linspace(0, 2, 60), 10),
        lambda encoder: sparse.BatchSearch()(encoder, x_BD, 7),
    ):
        want, got = find(whole), find(parts)
        assert torch.equal(got.index.start_O1, want.index.start_O1)
        assert torch.equal(got.index.latent_n, want.index.latent_n)
        torch.testing.assert_close(got.value_n, want.value_n, rtol=1e-12, atol=1e-12)
        for one, other in zip(got.index.by_latent, want.index.by_latent, strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TopK", "BatchTopK", "ReLU", "JumpReLU"])
@pytest.mark.parametrize("gpu_gb", [32.0, 40.0, 300.0])
def test_a_step_fits_into_what_is_left(gpu_gb: float, name: str) -> None:
    """B x S is 2^31 here: 8.6 GB of pre-activations. Also if all latents are dead, and with costly metrics."""
    cfg = gpu_memory.train(name, LARGEST)
    part_bytes = memory.part_bytes([cfg], int(gpu_gb * 1e9))
    assert part_bytes & (part_bytes - 1) == 0, "a power of two"
    with a_gpu(LARGEST.d_sae) as gpu:
        made = run.Run(cfg, pathlib.Path("run"), fake_gpu.DEVICE, part_bytes=part_bytes)
        x_BD = on_gpu(LARGEST.batch, LARGEST.d_vit)
        rows = made.objective.rows(x_BD)
        sizes = [part.stop - part.start for part in rows]
        assert max(sizes) * LARGEST.d_sae < 2**31 and max(sizes) - min(sizes) <= len(sizes)
        made.step(0, x_BD)
        with gpu.count() as waits:
            made.step(1, x_BD)
            assert waits.total() == (1 if name == "BatchTopK" else 0)
        for is_costly, dead in ((False, 0), (False, LARGEST.d_sae), (True, LARGEST.d_sae // 3)):
            assert stepped(gpu, made, is_costly, dead) <= gpu_gb * 1e9, (is_costly, dead)


@pytest.mark.parametrize(("log_bytes", "waits_per_step"), [(30, 1), (29, 4)])
def test_candidates_in_parts(log_bytes: int, waits_per_step: int) -> None:
    """They take 0.6 GB of the step. If that is more than the search may take, it uses a guess."""
    sae = nn_config.BatchTopK(d_vit=1024, d_sae=16_384, top_k=128)
    cfg = config.Train(sae=sae, batch_size=16_384)
    with a_gpu(16_384, 128) as gpu:
        made = run.Run(cfg, pathlib.Path("run"), fake_gpu.DEVICE, part_bytes=2**log_bytes)
        for step in range(2):
            with gpu.count() as waits:
                made.step(step, on_gpu(16_384, 1024))
        assert waits.total() == waits_per_step and gpu.launched["merge"] == (4 if log_bytes == 30 else 0)
        assert LEAST <= memory.gpu_peak([cfg], 2**log_bytes, False) / gpu.peak <= MOST


def test_what_a_search_gets() -> None:
    """As much as all runs of the stream leave, also when all latents are dead, but never less than a little."""
    cfg = gpu_memory.train("TopK", LARGEST)
    gpu_gbs = (31, 36, 40, 72)
    found = [memory.part_bytes([cfg], gpu_gb * 10**9) for gpu_gb in gpu_gbs]
    assert found == sorted(found) and found[0] < found[1] < found[-1] == memory.PART_BYTES[1]
    assert memory.part_bytes([cfg], 20 * 10**9) == memory.PART_BYTES[0]
    for search, gpu_gb in zip(found[:3], gpu_gbs, strict=False):
        sizes = [memory.gpu_peak([cfg], n, dead=1.0) for n in (search, 2 * search)]
        assert sizes[0] <= gpu_gb * 10**9 < sizes[1]
    assert memory.part_bytes([cfg] * 5, 72 * 10**9) == memory.PART_BYTES[0]
    assert memory.part_bytes([cfg] * 2, 50 * 10**9) < memory.part_bytes([cfg], 50 * 10**9)


@pytest.mark.parametrize(("gpu_gb", "want"), [(0.0, 72 * 10**9), (24.0, 24 * 10**9)])
def test_the_search_of_a_training_gets_what_the_flag_leaves(
    gpu_gb: float, want: int, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Of a card with 80 GB free, 0.9 are used."""
    cfg = dataclasses.replace(gpu_memory.train("TopK", LARGEST), gpu_gb=gpu_gb, wandb_project="")
    made: list[run.Run] = []
    monkeypatch.setattr(loop.devices, "pick", lambda _: fake_gpu.DEVICE)
    monkeypatch.setattr(loop, "_start_tracker", lambda *_: unittest.mock.Mock(tracking.Tracker))
    monkeypatch.setattr(loop._Loop, "__init__", lambda _, stream, runs, *__: made.extend(r for r, _ in runs))
    monkeypatch.setattr(loop._Loop, "run", lambda _: [])
    with a_gpu(LARGEST.d_sae):
        stream = unittest.mock.Mock(shuffled.Shuffled)
        assert loop._train(stream, {tmp_path: cfg}, 0, parallel.World()) == []
        assert made[0].objective.part_bytes == memory.part_bytes([cfg], want)
        made[0].step(0, on_gpu(LARGEST.batch, LARGEST.d_vit))


# ---- indices ----


def test_more_codes_than_positions_are_refused() -> None:
    sae = nn_config.TopK(d_vit=8, d_sae=1024, top_k=128)
    config.Train(sae=sae, batch_size=2**23, n_patches=2**24)
    with pytest.raises(
        errors.UserError, match=re.escape("--batch-size 16777216: with --sae.top-k 128 a batch")
    ):
        config.Train(sae=sae, batch_size=2**24, n_patches=2**24)


def test_launches_at_the_largest_width() -> None:
    """A grid's second dimension is at most 65,535: blocks of 256 dimensions reach d_vit 16,776,960.

    The fake launcher refuses a larger one, and numbers that do not fit into 32 bits.
    """
    with a_gpu() as gpu:
        index_n, start_O1 = torch.zeros(3, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
        index_n, start_O1 = index_n.to(fake_gpu.DEVICE), start_O1.to(fake_gpu.DEVICE)
        triton_kernels.bag(on_gpu(2, 65_535 * 256), index_n, on_gpu(3), start_O1)
        with pytest.raises(AssertionError):
            triton_kernels.bag(on_gpu(2, 65_535 * 256 + 1), index_n, on_gpu(3), start_O1)
        triton_kernels.bag(on_gpu(2**19, 4096), index_n, on_gpu(3), start_O1)  # a table of 2^31 numbers
        assert gpu.launched["bag"] == 2
