"""Every stage's device code on a GPU that is not there (`fake_gpu`): devices, waits for the GPU, sizes, memory.

B batch, D d_vit, S latents, K prototypes, P patches.
"""

import collections.abc
import copy
import dataclasses
import pathlib
import typing as tp
import unittest.mock

import fake_gpu
import numpy as np
import pytest
import torch

from saev import devices, nn, scorers, tracking
from saev.data import activations, dump, shuffled, vits
from saev.data import config as data_config
from saev.formats import shards
from saev.nn import config as nn_config
from saev.nn import objectives, robust, triton_kernels
from saev.protoeval import score
from saev.scorers import base, kmeans, pca
from saev.scorers import config as scorers_config
from saev.scorers import sae as sae_scorer
from saev.training import config, evaluate, loop
from saev.training import run as training_run
from saev.visuals import coders, relations, spool

pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
    pytest.mark.skipif(not triton_kernels.IS_INSTALLED, reason="needs Triton"),
]

B, D, S, K = 64, 32, 128, 4
SAES = {
    "relu": nn_config.Relu(d_vit=D, d_sae=S, resample_every=12),
    "top-k": nn_config.TopK(d_vit=D, d_sae=S, top_k=K),
    "top-k-negative": nn_config.TopK(d_vit=D, d_sae=S, top_k=K, keep_negative=True),
    "batch-top-k": nn_config.BatchTopK(d_vit=D, d_sae=S, top_k=K),
    "jump-relu": nn_config.JumpRelu(d_vit=D, d_sae=S),
}
OBJECTIVES = {
    "vanilla": nn_config.Vanilla(),
    "fixed": nn_config.Matryoshka(n_prefixes=4, prefixes="fixed"),
    "sampled": nn_config.Matryoshka(n_prefixes=4),
}
WAITS_PER_STEP = {"relu": 0, "top-k": 0, "top-k-negative": 0, "batch-top-k": 1, "jump-relu": 0}
"""docs/training.md has these numbers."""


def a_gpu() -> fake_gpu.Gpu:
    """A few more codes are above BatchTopK's guess than it keeps; 3 latents are dead."""
    return fake_gpu.Gpu(lambda n: K * B + 7 if n == B * S else 3)


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device=fake_gpu.DEVICE)


def a_run(sae: tp.Any, objective: tp.Any, **kwargs: tp.Any) -> training_run.Run:
    kwargs = {"ema": 0.9, "max_norm_ratio": 5.0, "log_every": 50, "costly_every": 1, **kwargs}
    cfg = config.Train(sae=sae, objective=objective, batch_size=B, n_patches=100 * B, **kwargs)
    return training_run.Run(cfg, pathlib.Path("run"), fake_gpu.DEVICE)


def n_waits(gpu: fake_gpu.Gpu) -> int:
    return gpu.waits.total()


def on_gpu_only(tree: tp.Any) -> bool:
    tensors = [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return bool(tensors) and all(t.device == fake_gpu.DEVICE for t in tensors)


@pytest.fixture
def acts(make_shards: tp.Any) -> activations.Activations:
    dpath, _ = make_shards(n_imgs=40, n_patches=9, d_vit=D, layers=(3,), per_shard=9)
    return activations.Activations(data_config.Shards(str(dpath), 3))


# ---- what the fake GPU itself sees ----


def test_it_sees_each_kind_of_wait() -> None:
    cases = {
        "item": lambda x: x.sum().item(),
        "equal": lambda x: torch.equal(x, x),
        "nonzero": lambda x: (x > 0).nonzero(),
        "mask": lambda x: x[x[:, 0] > 0],
        "bincount": lambda x: torch.bincount(x[:, 0].long(), minlength=9),
        "copy": lambda x: x.cpu(),
    }
    for name, wait in cases.items():
        with fake_gpu.Gpu() as gpu:
            wait(on_gpu(6, 5))
            assert gpu.waits == {name: 1}, name
    waits_too = {
        "copy": [
            lambda x: torch.tensor([1, 2], device=x.device),
            lambda x: x.copy_(torch.zeros(6, 5)),
            lambda x: x[torch.tensor([0, 1])],
            lambda x: x[np.array([0, 1])],
        ],
        "item": [
            lambda x: bool(x.isfinite().all()),
            lambda x: float(x[0, 0]),
            lambda x: torch.full((2,), x.sum()),
        ],
        "mask": [lambda x: x.masked_select(x > 0), lambda x: x.index_put_((x[:, 0] > 0,), x[0, 0])],
        "repeat": [lambda x: x[:, 0].repeat_interleave(x[:, 1].int())],
    }
    for name, wait in ((name, wait) for name, each in waits_too.items() for wait in each):
        with fake_gpu.Gpu() as gpu:
            wait(on_gpu(6, 5))
            assert gpu.waits == {name: 1}
    does_not = [
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.copy_(devices.send(torch.zeros(6, 5), x.device)),
        lambda x: devices.OnItsWay(x).arrived(),
        lambda x: x.topk(2, dim=1).values.kthvalue(1).values.clamp(min=0),
        lambda x: x.sort(stable=True).values.quantile(0.5),
    ]
    for go_on in does_not:
        with fake_gpu.Gpu() as gpu:
            go_on(on_gpu(6, 5))
            assert n_waits(gpu) == 0, gpu.waits


def test_it_refuses_tensors_of_two_devices() -> None:
    with fake_gpu.Gpu():
        with pytest.raises(RuntimeError, match="device"):
            on_gpu(3, 4) + torch.zeros(3, 4)
        with pytest.raises(RuntimeError, match="device"):
            on_gpu(3, 4) @ torch.zeros(4, 2)
        with pytest.raises(TypeError, match="numpy"):
            on_gpu(3).numpy()
        with pytest.raises(AssertionError):
            triton_kernels._kernels()[0][(3, 65_536)](on_gpu(3))


def test_its_gradients_are_those_of_torchs_engine() -> None:
    """Of shapes, because there are no values: the same parameters get one, and memory is freed."""
    with fake_gpu.Gpu() as gpu:
        sae = nn.SparseAutoencoder(SAES["top-k"]).to(fake_gpu.DEVICE)
        before = gpu.live
        loss = objectives.Objective(sae, OBJECTIVES["sampled"])(
            on_gpu(B, D), end_P=torch.tensor([30, S])
        ).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in sae.parameters())
        del loss
        n_grads = sum(-(-p.grad.numel() * 4 // 512) * 512 for p in sae.parameters() if p.grad is not None)
        assert gpu.live == before + n_grads


# ---- training ----


class Stream(shuffled.Shuffled):
    """Endless batches on the CPU."""

    def __init__(self, acts: activations.Activations):
        self.acts = acts

    def batches(self, start: int = 0) -> collections.abc.Iterator[shuffled.Batch]:
        numbers_B = np.zeros(B, np.int64)
        while True:
            yield shuffled.Batch(torch.empty(B, D), numbers_B, numbers_B, numbers_B)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "precision"),
    [("vanilla", "float32"), pytest.param("sampled", "float32"), pytest.param("fixed", "bfloat16")],
)
@pytest.mark.parametrize("name", SAES)
def test_steps_of_the_loop_do_not_wait(
    precision: tp.Any, name: str, objective: str, acts: activations.Activations
) -> None:
    with a_gpu() as gpu:
        run = a_run(SAES[name], OBJECTIVES[objective], precision=precision)
        tracker = unittest.mock.Mock(tracking.Tracker)
        made = loop._Loop(Stream(acts), [(run, tracker)], 0)
        made.step(0)  # reads activations, initialises, logs
        assert tracker.log.call_args.args[1].keys() >= {"loss", "mean_abs_corr", "tokens_per_s"}
        for step in range(1, 12):
            with gpu.count() as waits:
                made.step(step)
            assert waits.total() == WAITS_PER_STEP[name], (step, waits)
        assert run.dead_C is None or len(run.dead_C) == 3, "of AuxK's list, copied in the background"
        if name != "relu" and name != "jump-relu":
            assert min(gpu.launched.values()) >= 12
        tensors = [run.sae.state_dict(), run.averaged, run.optimizer.state_dict(), run.around, run.fired_S]
        assert all(map(on_gpu_only, tensors)) and on_gpu_only([run.dead_C, run.tokens_since_fired_S])
        made.step(12)  # ReLU resamples
        assert made._drop_lost(12, [], check_weights=True) == []
        made.step(50)
        assert tracker.log.call_count == 2


def test_the_docs_say_how_often_a_step_waits() -> None:
    names = {"ReLU": "relu", "TopK": "top-k", "JumpReLU": "jump-relu", "BatchTopK": "batch-top-k"}
    text = (pathlib.Path(__file__).parent.parent / "docs/training.md").read_text()
    for said, name in names.items():
        assert f"| {said} | {WAITS_PER_STEP[name]} | {WAITS_PER_STEP[name]} |" in text


def test_waits_of_log_steps_and_of_resampling() -> None:
    """The docs say about 30, and 5: the dead latents, losses to draw from, the drawn rows, and twice the alive latents."""
    with a_gpu() as gpu:
        run = a_run(SAES["relu"], OBJECTIVES["vanilla"])
        out = run.step(1, on_gpu(B, D))
        with gpu.count() as waits:
            run.cfg = dataclasses.replace(run.cfg, costly_every=10**6)
            run.measure(1, on_gpu(B, D), out)
        assert 20 <= waits.total() <= 35
        with gpu.count() as waits:
            run.resample(1, on_gpu(B, D))
        assert waits.total() == 5 and waits["nonzero"] == 1
        assert on_gpu_only(run.sae.state_dict()) and on_gpu_only(run.optimizer.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", SAES)
def test_a_state_is_saved_on_the_cpu_and_restored_on_the_gpu(name: str) -> None:
    with a_gpu() as gpu:
        run, other = (a_run(SAES[name], OBJECTIVES["vanilla"]) for _ in range(2))
        for step in range(12):
            run.step(step, on_gpu(B, D))
        state = run.state()
        tensors = [t for t in torch.utils._pytree.tree_leaves(state) if isinstance(t, torch.Tensor)]
        assert {t.device.type for t in tensors} == {"cpu"}
        other.restore(state)
        mine = [other.sae.state_dict(), other.averaged, other.optimizer.state_dict(), other.around]
        assert all(map(on_gpu_only, mine)) and on_gpu_only([other.dead_C, other.tokens_since_fired_S])
        assert (other.next_dead is None) == (run.next_dead is None)
        for step in (13, 20, 30):
            with gpu.count() as waits:
                other.step(step, on_gpu(B, D))
            assert waits.total() == WAITS_PER_STEP[name]
        finished = run.finished()
        assert on_gpu_only(finished.state_dict()) and not any(p.requires_grad for p in finished.parameters())
        assert run.is_sound()


def test_a_run_continues_on_a_gpu_from_a_cpus_state() -> None:
    """Which has no list of dead latents on its way: the old one stays until the next."""
    with a_gpu():
        run = a_run(SAES["top-k"], OBJECTIVES["vanilla"])
        state = run.state() | {"dead_C": torch.arange(5), "next_dead_C": None}
        run.restore(state)
        run.step(10, on_gpu(B, D))
        assert run.dead_C is not None and len(run.dead_C) == 5
        run.step(20, on_gpu(B, D))
        assert len(run.dead_C) == 3


class Copied:
    """`devices.OnItsWay` on a CPU."""

    def __init__(self, tensor: torch.Tensor):
        self.host = tensor.clone()

    def arrived(self) -> torch.Tensor:
        return self.host


def test_dead_latents_of_ten_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's operations, on the CPU: which list a step uses, and that a run that continues reaches the same weights."""
    monkeypatch.setattr("saev.nn.kernels.available", lambda _: False)
    monkeypatch.setattr(devices, "OnItsWay", Copied)
    sae = dataclasses.replace(SAES["top-k"], aux_coeff=1.0)
    cfg = config.Train(sae=sae, batch_size=B, n_patches=100 * B, dead_window=4 * B, device="cpu")
    x_NBD = torch.randn(40, B, D, generator=torch.Generator().manual_seed(0))
    x_NBD[:, :, 8:] = 0  # so that many latents never fire
    run = training_run.Run(cfg, pathlib.Path("run"), torch.device("cpu"))
    dead, used, states = {}, {}, {}
    for step, x_BD in enumerate(x_NBD):
        dead[step] = run._is_dead_S().nonzero().flatten()
        run.step(step, x_BD)
        used[step] = run.dead_C
        if step in (14, 19):
            states[step] = copy.deepcopy(run.state())
    assert len(used[0]) == len(used[19]) == 0, "at first none is dead"
    for step in (20, 29, 30, 39):
        assert torch.equal(used[step], dead[step // 10 * 10 - 10]) and len(used[step]) > 3
    assert not torch.equal(dead[10], dead[20]), "the lists differ, so a run that mixes them up is seen"
    for step, state in states.items():
        other = training_run.Run(cfg, pathlib.Path("run"), torch.device("cpu"))
        other.restore(state)
        for i in range(step + 1, 40):
            other.step(i, x_NBD[i])
        for name, want in run.sae.state_dict().items():
            assert torch.equal(other.sae.state_dict()[name], want), (step, name)


@pytest.mark.parametrize("name", SAES)
def test_evaluation(name: str) -> None:
    with a_gpu() as gpu:
        sae = nn.SparseAutoencoder(SAES[name]).to(fake_gpu.DEVICE).eval().requires_grad_(False)
        sums = evaluate.Sums(sae, robust.typical(on_gpu(200, D)))
        sums.add(on_gpu(B, D))
        with gpu.count() as waits:
            sums.add(on_gpu(B, D))
        assert waits == {"bincount": 1, "mask": 1}, "of the tokens' histogram and the extreme ones"
        assert sums.metrics().keys() >= evaluate.NAMES - {"grad_norm"}
        assert sums.latents()["n_fired"].shape == (S,)


# ---- scorers ----


def scorers_on_gpu() -> dict[str, scorers.Scorer]:
    out: dict[str, scorers.Scorer] = {
        similarity: base.Prototypes.of(torch.empty(20, D), torch.empty(D), tp.cast(tp.Any, similarity))
        for similarity in scorers_config.FORMULAS
    }
    out["pca"] = pca.both_signs(base.Prototypes(torch.empty(20, D), torch.empty(D), "dot"))
    for name, cfg in SAES.items():
        out[name] = sae_scorer.SaeLatents(nn.SparseAutoencoder(cfg).eval().requires_grad_(False), S)
    return {name: scorer.to(fake_gpu.DEVICE) for name, scorer in out.items()}


def test_scorers() -> None:
    with a_gpu() as gpu:
        for name, scorer in scorers_on_gpu().items():
            with gpu.count() as waits:
                of_images = scorer.of_images(on_gpu(7, 9, D))
                of_acts = scorer.prefix(3)(on_gpu(B, D))
            assert of_images.shape == (7, scorer.n_prototypes) and of_acts.shape == (B, 3), name
            assert on_gpu_only([of_images, of_acts])
            # of signed codes: how many patches fire
            assert waits == ({"bincount": 1} if name == "top-k-negative" else {}), name
            assert len(scorer.digest()) == 32


def test_a_pass_over_images(acts: activations.Activations, tmp_path: pathlib.Path) -> None:
    with a_gpu():
        run = list(scorers_on_gpu().values())
        found = score.score_images(run, acts, list(range(5, 30)), tmp_path, fake_gpu.DEVICE)
    assert found.scores_KN.shape == (sum(s.n_prototypes for s in run), 25)


@pytest.mark.slow
def test_fits(acts: activations.Activations) -> None:
    with a_gpu():
        cfg = scorers_config.KMeans(n_iters=2, n_samples=300)
        for normalize in (False, True):
            fitted = kmeans.fit(cfg, acts, [6, 11], 0, device=fake_gpu.DEVICE)
            assert [one.n_prototypes for one in fitted] == [6, 11]
            assert {one.vectors_KD.device.type for one in fitted} == {"cpu"}
            cfg = scorers_config.KMeans(n_iters=2, n_samples=300, normalize=not normalize)
        mean_D, covariance_DD, n = pca.moments(acts, fake_gpu.DEVICE)
        assert (mean_D.device.type, covariance_DD.shape, n) == ("cpu", (D, D), len(acts))
        drawn = kmeans.plus_plus(on_gpu(500, D), 40, 0)
        assert on_gpu_only(drawn) and drawn.shape == (40, D)


# ---- visuals and dump ----


@pytest.mark.parametrize("name", SAES)
def test_a_gallerys_codes_of_an_sae(name: str, acts: activations.Activations, tmp_path: pathlib.Path) -> None:
    with a_gpu():
        sae = nn.SparseAutoencoder(SAES[name]).to(fake_gpu.DEVICE).eval().requires_grad_(False)
        coder = coders.SaeCoder(sae)
        with unittest.mock.patch.object(coder, "digest", lambda: name):
            codes = spool.run(coder, acts, 5, 7, tmp_path / "pass")
        assert codes.n_imgs == acts.n_imgs and codes.ranked is None
        found = relations.neighbours(coder.vectors(), np.array([1, 9]), 3)
        assert found.latent_CK.shape == (2, 3)


def test_a_gallerys_codes_of_prototypes(acts: activations.Activations, tmp_path: pathlib.Path) -> None:
    with a_gpu():
        scorer = scorers.Prototypes.of(on_gpu(S, D), on_gpu(D), "cosine")
        coder = coders.PrototypeCoder(scorer, "random")
        with unittest.mock.patch.object(coder, "digest", lambda: "x"):
            codes = spool.run(coder, acts, 5, 7, tmp_path / "pass")
        assert codes.ranked is not None and codes.ranked.value_SK.shape == (S, 5)
        assert on_gpu_only(coder.scores(on_gpu(7, D), np.array([2, 0])))
        unit = coders.UnitCoder(on_gpu(D), on_gpu(D), 2.0)
        assert unit(on_gpu(7, D)).start_R1.shape == (8,)


@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
def test_the_forward_pass_of_a_dump(autocast: tp.Any, tmp_path: pathlib.Path) -> None:
    """Activations come to the CPU on the stream of the job's own GPU, while the next batch is computed."""
    vit_cfg = data_config.Vit("timm", "vit_tiny_patch16_224", "random", autocast=autocast)
    cfg = data_config.Dump(vit=vit_cfg, data=data_config.ImageFolder(str(tmp_path)), dump_to=str(tmp_path))
    vit = vits.load(vit_cfg)
    with fake_gpu.Gpu() as gpu:
        gpu.adopt(vit)
        metadata = unittest.mock.Mock(layers=(3, 11), n_tokens=197)
        out = unittest.mock.Mock(shards.ShardDir, metadata=metadata)
        dumper = dump._Dumper(cfg, vit, out, [], fake_gpu.DEVICE)
        height, width = vit.transform.size
        batches = [
            dump.Loaded(range(2 * i, 2 * i + 2), [([0, 1], torch.empty(2, 3, height, width))], [], [])
            for i in range(3)
        ]
        with gpu.count() as waits:
            found = list(dumper._compute(batches))
        assert waits.total() == 0
        assert [(batch.image_is.start, acts.shape, acts.dtype) for batch, acts in found] == [
            (i, (2, 2, 197, 192), np.float32) for i in (0, 2, 4)
        ]


def test_what_arrives_is_copied_on_its_own_gpus_stream() -> None:
    """Another GPU's stream would say that the copy has arrived before it has."""
    with fake_gpu.Gpu(), unittest.mock.patch.object(torch.cuda, "Event") as event:
        devices.OnItsWay(torch.empty(3, device="cuda:1"))
        assert event.return_value.record.call_args.args == (torch.device("cuda:1"),)
