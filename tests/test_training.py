"""Training: finds planted dictionaries, logs every metric, fails in words. D d_vit, S latents, A atoms."""

import collections.abc
import dataclasses
import itertools
import json
import math
import pathlib
import shutil
import typing as tp

import numpy as np
import pytest
import torch
import torch_adam

from saev import errors, fields, nn, provenance, sweeps
from saev.data import activations, shuffled
from saev.data import config as data_config
from saev.formats import metricslog
from saev.nn import config as nn_config
from saev.nn import metrics
from saev.training import config, evaluate, identity, loop, memory, run

NAMES = {
    "mse",
    "explained_variance",
    "l0",
    "l1",
    "explained_variance_per_dim",
    "dead_pct",
    "dead_frac_window",
    "avg_w_col_norm",
    "grad_norm",
    "normalized_mse",
    "l0_count",
    "loss",
    "lr",
    "tokens_per_s",
    "loader_wait",
    "step",
    "token_nmse_median",
    "token_nmse_q95",
    "extreme_frac",
    "extreme_variance_frac",
}
COSTLY = {"mean_abs_corr", "coherence"}

SAES = [
    nn_config.TopK(exp_factor=4, top_k=3),
    nn_config.BatchTopK(exp_factor=4, top_k=3),
    nn_config.Relu(exp_factor=4),
    nn_config.JumpRelu(exp_factor=4),
]


@pytest.fixture(autouse=True)
def one_thread() -> collections.abc.Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cfg(make_shards, tmp_path: pathlib.Path) -> config.Train:
    """12 steps on 200 activations of width 8."""
    dpath, _ = make_shards(n_imgs=50, n_patches=4, d_vit=8, layers=(3, 7), per_shard=20)
    return config.Train(
        sae=nn_config.TopK(exp_factor=4, top_k=3),
        data=data_config.Shards(str(dpath), 7),
        n_patches=12 * 32,
        batch_size=32,
        lr=1e-2,
        n_lr_warmup=4,
        log_every=5,
        dead_window=100,
        ckpt_to=str(tmp_path / "checkpoints"),
        wandb_project="",
        device="cpu",
    )


def change(cfg: config.Train, **changes: object) -> config.Train:
    return dataclasses.replace(cfg, **changes)


def logged(sae_fpath: str) -> list[dict[str, float]]:
    text = (pathlib.Path(sae_fpath).parent / "metrics.jsonl").read_text()
    return [metricslog.parse(line) or {} for line in text.splitlines()]


def weights(sae_fpath: str) -> dict[str, torch.Tensor]:
    return nn.load(sae_fpath).state_dict()


# ---- does it learn ----


def plant(n_imgs: int, n_patches: int, D: int, A: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations (n_imgs, 1, n_patches, D): 3 or 4 of A unit atoms with positive weights, an offset, a little noise."""
    rng = np.random.default_rng(0)
    atoms_AD = rng.standard_normal((A, D))
    atoms_AD /= np.linalg.norm(atoms_AD, axis=1, keepdims=True)
    n = n_imgs * n_patches
    f_NA = np.zeros((n, A))
    for f_A in f_NA:
        active = rng.choice(A, rng.integers(3, 5), replace=False)
        f_A[active] = rng.uniform(0.5, 1.5, len(active))
    noise_ND = 0.02 * rng.standard_normal((n, D))
    x_ND = 3 * f_NA @ atoms_AD + 2 * rng.standard_normal(D) + noise_ND
    return x_ND.astype(np.float32).reshape(n_imgs, 1, n_patches, D), atoms_AD


@pytest.mark.slow
@pytest.mark.parametrize("cls", [nn_config.TopK, nn_config.BatchTopK])
def test_planted_dictionary_is_found(make_shards, tmp_path: pathlib.Path, cls: type) -> None:
    acts, atoms_AD = plant(n_imgs=200, n_patches=50, D=32, A=64)
    dpath, _ = make_shards(
        acts=acts, n_imgs=200, n_patches=50, d_vit=32, layers=(0,), cls_token=False, per_shard=100
    )
    cfg = config.Train(
        sae=cls(exp_factor=4, top_k=4),
        data=data_config.Shards(str(dpath)),
        n_patches=150_000,
        batch_size=256,
        lr=3e-3,
        n_lr_warmup=50,
        log_every=1000,
        ckpt_to=str(tmp_path),
        wandb_project="",
        device="cpu",
    )
    (fpath,) = loop.main([cfg])
    sae = nn.load(fpath)
    cos_A = np.abs(atoms_AD @ sae.W_dec.numpy().T).max(axis=1)
    assert (cos_A > 0.9).mean() >= 0.9
    first, last = logged(fpath)[0], logged(fpath)[-1]
    assert last["normalized_mse"] < 0.12 < first["normalized_mse"]

    # In evaluation mode too: BatchTopK's threshold keeps about as many latents as training did.
    x_BD = torch.tensor(acts[:20].reshape(-1, 32))
    x_hat_BD, f_BS = sae(x_BD)
    assert metrics.normalized_mse(x_BD, x_hat_BD) < 0.12
    assert metrics.l0(f_BS) * sae.d_sae == pytest.approx(4, abs=0.7)


def test_scale_does_not_depend_on_the_seed(
    make_shards, cfg: config.Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on which batch the activations of huge norm are in; and a look at many activations takes none from the stream."""
    acts = np.random.default_rng(0).standard_normal((400, 1, 4, 8), np.float32)
    acts.reshape(-1, 8)[::40, 3] += 500
    more = {"n_patches": 4, "d_vit": 8, "layers": (0,), "cls_token": False, "per_shard": 100}
    dpath, _ = make_shards(acts=acts, n_imgs=400, **more)
    seen: list[torch.Tensor] = []
    step = run.Run.step
    monkeypatch.setattr(run.Run, "step", lambda self, i, x_BD: (seen.append(x_BD), step(self, i, x_BD))[1])
    scales = []
    for seed in range(3):
        mine = change(cfg, data=data_config.Shards(str(dpath)), seed=seed, n_patches=64)
        (fpath,) = loop.main([mine])
        scales.append(nn.load(fpath).scale.item())
    want = (8 / acts.reshape(-1, 8)[np.arange(1600) % 40 > 0].var(axis=0).sum()) ** 0.5
    assert scales == pytest.approx([want] * 3, rel=0.02)
    stream = iter(shuffled.Shuffled(mine.data, batch_size=32, seed=2, pool_bytes=10**9))
    assert all(torch.equal(x_BD, next(stream).act_BD) for x_BD in seen[-2:])


@pytest.mark.slow
def test_a_few_that_hold_most_of_the_variance_are_seen_and_can_be_clipped(
    make_shards, cfg: config.Train, caplog: pytest.LogCaptureFixture
) -> None:
    acts, atoms_AD = plant(n_imgs=200, n_patches=20, D=32, A=64)
    acts.reshape(-1, 32)[::100] += 500 * atoms_AD[0]
    more = {"n_patches": 20, "d_vit": 32, "layers": (0,), "cls_token": False, "per_shard": 100}
    dpath, _ = make_shards(acts=acts, n_imgs=200, **more)
    cfg = change(cfg, data=data_config.Shards(str(dpath)), n_patches=300 * 128, batch_size=128)
    cfg = change(cfg, sae=nn_config.TopK(exp_factor=4, top_k=4), log_every=300)
    figures = []
    for ratio in (0.0, 5.0):
        caplog.clear()
        (fpath,) = loop.main([change(cfg, max_norm_ratio=ratio)])
        warnings = [r.message for r in caplog.records if "--max-norm-ratio" in r.message]
        want = "1% of the activations have an extreme norm and hold "
        assert [want in w for w in warnings] == ([] if ratio else [True])
        figures.append(json.loads((pathlib.Path(fpath).parent / "metrics.json").read_text()))
    taken_over, clipped = figures
    assert clipped["extreme_frac"] == pytest.approx(0.01)
    assert clipped["extreme_variance_frac"] > 0.95
    assert taken_over["normalized_mse"] < 0.05 < taken_over["token_nmse_median"]
    assert clipped["token_nmse_median"] < 0.9 * taken_over["token_nmse_median"]
    log = logged(fpath)[-1]
    assert log["token_nmse_q95"] >= log["token_nmse_median"] > 0


@pytest.mark.slow
def test_relu_learns_and_l1_makes_it_sparser(cfg: config.Train) -> None:
    cfg = change(cfg, n_patches=300 * 32, log_every=299)
    few, many = (
        loop.main([change(cfg, sae=nn_config.Relu(exp_factor=4, sparsity_coeff=c))])[0] for c in (0.05, 0.001)
    )
    for fpath in (few, many):
        first, last = logged(fpath)
        assert last["loss"] < 0.7 * first["loss"]
    assert logged(few)[-1]["l0"] < 0.85 * logged(many)[-1]["l0"]
    assert logged(few)[-1]["mse"] > logged(many)[-1]["mse"]


# ---- what a step does ----


def test_training_equals_a_plain_loop(cfg: config.Train) -> None:
    """The same batches through dense autograd and torch's Adam, with schedule, clipping, projection and normalisation written out."""
    (fpath,) = loop.main([cfg])
    sae = nn.SparseAutoencoder(dataclasses.replace(cfg.sae, d_vit=8), cfg.seed)
    stream = iter(shuffled.Shuffled(cfg.data, batch_size=32, seed=cfg.seed, pool_bytes=10**9))
    batches = [next(stream).act_BD for _ in range(12)]
    sae.initialize(torch.cat(batches[:7]))  # the first 200 activations, in whole batches
    optimizer = torch_adam.Adam(sae.parameters())
    for step in range(12):
        x_BD = batches[step]
        left = min(1, (12 - step) / (0.2 * 12))
        optimizer.zero_grad()
        x_hat_BD, _ = sae(x_BD)
        ((x_hat_BD - x_BD) * sae.scale).square().mean().backward()
        with torch.no_grad():
            for w_D, g_D in zip(sae.W_dec, sae.W_dec.grad, strict=True):
                g_D -= torch.dot(g_D, w_D) * w_D
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step(1e-2 * left)  # a tenth of the steps is one: no warm-up
            for w_D in sae.W_dec:
                w_D /= w_D.norm()
    for name, tensor in weights(fpath).items():
        torch.testing.assert_close(tensor, sae.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_runs_on_one_stream_equal_runs_alone(cfg: config.Train, monkeypatch: pytest.MonkeyPatch) -> None:
    cfgs = [
        cfg,
        change(cfg, sae=nn_config.BatchTopK(exp_factor=2, top_k=3)),
        change(cfg, sae=nn_config.Relu(exp_factor=4), lr=1e-3),
        change(cfg, sae=nn_config.TopK(exp_factor=4, top_k=3, normalize="per-dim")),
        # initialised on more activations than the others
        change(cfg, sae=nn_config.TopK(exp_factor=20, top_k=3, init="data")),
    ]
    monkeypatch.setattr(memory, "READ_FIRST", 64)
    assert sweeps.group(cfgs) == [cfgs]
    together = loop.main([change(c, ckpt_to=c.ckpt_to + "-together") for c in cfgs])
    for c, fpath in zip(cfgs, together, strict=True):
        (alone,) = loop.main([c])
        assert pathlib.Path(alone).parent.name == pathlib.Path(fpath).parent.name
        for name, tensor in weights(alone).items():
            assert torch.equal(tensor, weights(fpath)[name]), name


@pytest.mark.slow
def test_half_precision_that_the_device_converts_gives_the_same(
    make_shards, cfg: config.Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: batches come as they are stored."""
    dpath, _ = make_shards(n_imgs=40, n_patches=8, d_vit=8, layers=(7,), per_shard=9, dtype="bfloat16")
    cfg = change(cfg, data=data_config.Shards(str(dpath), 7))
    (converted,) = loop.main([cfg])
    made, plain = [], shuffled.Shuffled
    keep = {"keep_half": True}
    monkeypatch.setattr(
        shuffled, "Shuffled", lambda *a, **k: (made.append(plain(*a, **k | keep)), made[-1])[1]
    )
    (kept,) = loop.main([change(cfg, ckpt_to=cfg.ckpt_to + "-kept")])
    assert [stream.dtype for stream in made] == [torch.bfloat16] * 2, "training and evaluation"
    for name, tensor in weights(converted).items():
        assert torch.equal(tensor, weights(kept)[name]), name
    one, other = (
        json.loads((pathlib.Path(f).parent / "metrics.json").read_text()) for f in (converted, kept)
    )
    assert one["normalized_mse"] == other["normalized_mse"]


def test_schedules() -> None:
    """200 steps: 20 of warm-up, a plateau, 40 of decay."""
    cfg = config.Train(n_patches=200 * 8, batch_size=8, lr=1.0, n_lr_warmup=20)
    for name, at_190 in [("constant", 1.0), ("linear", 0.25), ("cosine", 0.5 - 0.5 * math.cos(math.pi / 4))]:
        lr = [change(cfg, lr_decay=name).lr_at(step) for step in range(200)]
        assert lr[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
        assert lr[20:160] == [1.0] * 140
        assert lr[190] == pytest.approx(at_190)
        assert all(a >= b > 0 for a, b in itertools.pairwise(lr[19:]))
    assert change(cfg, n_lr_warmup=500).lr_at(19) == 1.0, "at most a tenth of the steps"
    relu = change(cfg, sae=nn_config.Relu(), n_sparsity_warmup=10)
    assert [relu.sparsity_at(step) for step in (0, 4, 9, 100)] == [0.1, 0.5, 1.0, 1.0]


def test_learning_rate_that_is_left_out() -> None:
    def peak(n_steps: int, sae: nn_config.Architecture) -> float:
        return config.Train(n_patches=8 * n_steps, batch_size=8, sae=sae).peak_lr

    assert peak(500, nn_config.TopK()) == peak(1000, nn_config.BatchTopK()) == 4e-3
    assert peak(4000, nn_config.TopK()) == pytest.approx(2e-3)
    assert peak(4000, nn_config.JumpRelu()) == pytest.approx(2e-3)
    assert peak(500, nn_config.Relu()) == peak(50_000, nn_config.Relu()) == 4e-4


@pytest.mark.slow
@pytest.mark.parametrize("n_steps", [100, 300])
def test_jump_relus_coefficient_decides_l0_in_short_runs(
    make_shards, cfg: config.Train, n_steps: int
) -> None:
    acts, _ = plant(n_imgs=100, n_patches=20, D=32, A=64)
    more = {"n_patches": 20, "d_vit": 32, "layers": (0,), "cls_token": False, "per_shard": 100}
    dpath, _ = make_shards(acts=acts, n_imgs=100, **more)
    coeffs = (1e-3, 1e-2, 5e-2)
    saes = [nn_config.JumpRelu(exp_factor=4, sparsity_coeff=c) for c in coeffs]
    cfg = change(cfg, data=data_config.Shards(str(dpath)), n_patches=n_steps * 128, batch_size=128)
    fpaths = loop.main([change(cfg, sae=sae, lr=None, log_every=n_steps) for sae in saes])
    many, some, few = (logged(fpath)[-1]["l0_count"] for fpath in fpaths)
    assert many > 2 * some > 4 * few > 0, (many, some, few)


def test_groups_share_a_stream_only_when_it_is_the_same(cfg: config.Train) -> None:
    others = [
        change(cfg, seed=1),
        change(cfg, batch_size=16),
        change(cfg, n_patches=13 * 32),
        change(cfg, data=dataclasses.replace(cfg.data, layer=3)),
    ]
    assert sweeps.group([cfg, *others, change(cfg, lr=1.0)]) == [
        [cfg, change(cfg, lr=1.0)],
        *[[c] for c in others],
    ]


# ---- what is written ----


def test_every_metric_is_logged_and_finite(cfg: config.Train) -> None:
    for sae in SAES:
        (fpath,) = loop.main([change(cfg, sae=sae, costly_every=10, lr_decay="constant")])
        lines = logged(fpath)
        assert [line["step"] for line in lines] == [0, 5, 10, 11]
        assert [line.keys() - NAMES for line in lines] == [COSTLY, set(), COSTLY, COSTLY]
        for line in lines:
            assert line.keys() >= NAMES
            later = line["step"] >= 5  # more than the window of 100
            assert all(v is None or math.isfinite(v) for v in line.values()), line
            assert {k for k, v in line.items() if v is None} == (set() if later else {"dead_frac_window"})
        assert [line["lr"] for line in lines] == pytest.approx([0.01] * 4)
        assert all(0 <= line["loader_wait"] <= 1 and line["tokens_per_s"] > 0 for line in lines)
        assert lines[0]["grad_norm"] > 0


def test_logged_metrics_are_those_of_the_steps_batch(cfg: config.Train) -> None:
    """The first line, from the untrained model and the first batch, computed here."""
    (fpath,) = loop.main([cfg])
    line = logged(fpath)[0]
    stream = iter(shuffled.Shuffled(cfg.data, batch_size=32, pool_bytes=10**9))
    batches = [next(stream).act_BD for _ in range(7)]
    sae = nn.SparseAutoencoder(dataclasses.replace(cfg.sae, d_vit=8), cfg.seed)
    sae.initialize(torch.cat(batches))
    x_BD = batches[0]
    x_hat_BD, f_BS = sae(x_BD)
    loss = ((x_hat_BD - x_BD) * sae.scale).square().mean()
    loss.backward()
    sae.remove_parallel_grad()
    norm = torch.nn.utils.get_total_norm([p.grad for p in sae.parameters()])
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["mse"] == pytest.approx(metrics.mse(x_BD, x_hat_BD), rel=1e-5)
    assert line["l0_count"] == pytest.approx(metrics.l0(f_BS) * 32, rel=1e-5)
    assert line["explained_variance"] == pytest.approx(
        1 - ((x_hat_BD - x_BD).var() / x_BD.var()).item(), rel=1e-4
    )
    assert line["dead_pct"] == pytest.approx((f_BS == 0).all(dim=0).double().mean().item())
    assert line["dead_frac_window"] is None, "32 activations are fewer than the window"


def test_dead_latents_are_counted(cfg: config.Train) -> None:
    """Window of one batch: dead is what did not fire in the last one."""
    (fpath,) = loop.main([change(cfg, dead_window=32, sae=nn_config.TopK(exp_factor=16, top_k=1))])
    dead = [line["dead_frac_window"] for line in logged(fpath)]
    assert all(d >= 1 - 32 / 128 for d in dead), "32 samples fire at most 32 of 128 latents"
    assert dead == [line["dead_pct"] for line in logged(fpath)]


@pytest.mark.parametrize(
    ("n_patches", "batch_size", "window"),
    [(10**8, 4096, 10**6), (10**6, 2048, 10**5), (256_000, 256, 25_600), (8192, 4096, 4096)],
)
def test_the_dead_window_adapts_to_the_run(n_patches: int, batch_size: int, window: int) -> None:
    cfg = config.Train(n_patches=n_patches, batch_size=batch_size)
    assert cfg.window == cfg.with_d_vit(8).dead_window == window
    assert change(cfg, dead_window=7).window == 7


def test_a_dead_window_longer_than_the_run_is_said(
    cfg: config.Train, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "saev")
    (fpath,) = loop.main([change(cfg, dead_window=10_000), change(cfg, dead_window=10_000, lr=1e-3)])[:1]
    assert [line["dead_frac_window"] for line in logged(fpath)] == [None] * 4
    (message,) = [r.message for r in caplog.records if "--dead-window" in r.message]
    assert message.startswith("--dead-window 10000: is longer than the run (384 activations)")
    caplog.clear()
    loop.main([change(cfg, dead_window=None)])
    assert not [r for r in caplog.records if "--dead-window" in r.message]


def test_config_is_written_beside_the_checkpoint(cfg: config.Train) -> None:
    (fpath,) = loop.main([cfg])
    written = json.loads((pathlib.Path(fpath).parent / "config.json").read_text())
    assert (written.pop("sealed"), len(written.pop("xxh3_128"))) == (1, 32)
    assert written.pop("code") == provenance.record()
    want = json.loads(json.dumps(dataclasses.asdict(cfg)))  # JSON has no tuples
    want |= {"architecture": "TopK", "objective_name": "Vanilla"}
    want["sae"] |= {"d_vit": 8, "exp_factor": None, "d_sae": 32}
    want["activations"] = {
        "vit_family": "timm",
        "vit_ckpt": "made-up",
        "layers": [7],
        "patches": "image",
        "d_vit": 8,
    }
    assert written == want
    sae = nn.load(fpath)
    assert sae.cfg == nn_config.TopK(d_vit=8, d_sae=32, top_k=3)
    assert sae.activations == want["activations"]


# ---- run ids, reruns ----


def trained_id(cfg: config.Train) -> str:
    acts = activations.Activations(cfg.data)
    return identity.run_id(cfg.with_d_vit(acts.d_vit), acts.fingerprint)


def test_run_id_depends_on_what_decides_the_weights_and_on_nothing_else(
    cfg: config.Train, make_shards
) -> None:
    other_dpath, _ = make_shards(n_imgs=49, n_patches=4, d_vit=8, layers=(3, 7), per_shard=20)
    different = [
        cfg,
        change(cfg, lr=1e-3),
        change(cfg, seed=1),
        change(cfg, batch_size=16),
        change(cfg, n_patches=13 * 32),
        change(cfg, n_lr_warmup=5),
        change(cfg, lr=None),
        change(cfg, lr_decay="cosine"),
        change(cfg, max_grad_norm=0.5),
        change(cfg, ema=0.9),
        change(cfg, dead_window=7),
        change(cfg, precision="bfloat16"),
        change(cfg, objective=nn_config.Matryoshka()),
        change(cfg, objective=nn_config.Matryoshka(n_prefixes=5, prefixes="fixed")),
        change(cfg, pool_gb=0.5),
        change(cfg, sae=nn_config.TopK(exp_factor=4, top_k=4)),
        change(cfg, sae=nn_config.TopK(exp_factor=5, top_k=3)),
        change(cfg, sae=nn_config.BatchTopK(exp_factor=4, top_k=3)),
        change(cfg, sae=nn_config.TopK(exp_factor=4, top_k=3, normalize="per-dim")),
        change(cfg, sae=nn_config.TopK(exp_factor=4, top_k=3, init="data")),
        change(cfg, sae=nn_config.TopK(exp_factor=4, top_k=3, init="data", init_blend=0.5)),
        change(cfg, data=dataclasses.replace(cfg.data, layer=3)),
        change(cfg, data=dataclasses.replace(cfg.data, patches="all")),
        change(cfg, data=dataclasses.replace(cfg.data, shard_root=str(other_dpath))),
    ]
    assert len({trained_id(c) for c in different}) == len(different)
    same = [
        change(cfg, sae=dataclasses.replace(cfg.sae, d_vit=8)),
        change(cfg, data=dataclasses.replace(cfg.data, layer=-1)),
        change(cfg, data=dataclasses.replace(cfg.data, shard_root=cfg.data.shard_root + "/.")),
        change(cfg, ckpt_to="elsewhere", wandb_project="p", log_every=1, sweep="x"),
        change(cfg, dead_window=cfg.dead_window + 0),
        change(cfg, val_data=cfg.data, costly_every=7, save_every=1.0, keep_last=9),
    ]
    assert {trained_id(c) for c in same} == {trained_id(cfg)}


def test_architectures_with_equal_fields_are_different_runs(cfg: config.Train) -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(nn_config.TopK):
        pass

    other = change(cfg, sae=Other(exp_factor=4, top_k=3))
    assert trained_id(other) != trained_id(cfg)


def with_new_field(cfg: object) -> tp.Any:
    """The config as a later version may define it: its class has one more field, which has its default."""
    cls = type(cfg)
    newer = dataclasses.make_dataclass(cls.__name__, [("new", int, 3)], bases=(cls,), frozen=True)
    return newer(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(cls)})


def test_a_new_field_orphans_no_finished_run(cfg: config.Train) -> None:
    want = loop.main([cfg])
    written = pathlib.Path(want[0]).stat().st_mtime_ns
    nested = {name: with_new_field(getattr(cfg, name)) for name in ("sae", "objective", "data")}
    newer = with_new_field(change(cfg, **nested))
    assert newer.new == newer.sae.new == newer.data.new == 3
    assert loop.main([newer]) == want
    assert pathlib.Path(want[0]).stat().st_mtime_ns == written
    assert evaluate.is_done(pathlib.Path(want[0]).parent, newer)
    assert trained_id(change(newer, new=4)) != trained_id(cfg)
    assert trained_id(change(newer, sae=change(newer.sae, new=4))) != trained_id(cfg)


def test_a_run_under_its_old_id_is_found(cfg: config.Train) -> None:
    (fpath,) = loop.main([cfg])
    acts = activations.Activations(cfg.data)
    old = identity.old_run_id(cfg.with_d_vit(acts.d_vit), acts.fingerprint)
    old_dpath = pathlib.Path(fpath).parent.rename(pathlib.Path(cfg.ckpt_to) / old)
    assert loop.main([cfg]) == [str(old_dpath / "sae.pt")]


def test_the_old_ids() -> None:
    """As version 0.1 computed them."""
    topk = config.Train(sae=nn_config.TopK(d_vit=8, d_sae=32, top_k=3), lr=1e-2, dead_window=100)
    relu = config.Train(sae=nn_config.Relu(d_vit=8, d_sae=32), lr=1e-3, dead_window=50, seed=3)
    assert [identity.old_run_id(c, "abc") for c in (topk, relu)] == ["2730496b", "c4adf1e6"]
    data = change(topk, sae=change(topk.sae, init="data"))
    assert identity.old_run_id(data, "abc") != "2730496b", "not a run of a version that knew no --sae.init"


def test_roles() -> None:
    """What a run's id and its group were made of before roles were declared, but for n_patches: n_steps decided the stream."""
    ignored = {"data", "val_data", "n_val_patches", "ckpt_to", "wandb_project", "device", "sweep"}
    ignored |= {"dry_run", "slurm", "log_every", "costly_every", "save_every", "keep_last"}
    ignored |= {"n_threads", "data_parallel", "gpu_gb"}
    names = {f.name for f in dataclasses.fields(config.Train)}
    assert set(fields.result_names(config.Train)) == names - ignored
    cfg = config.Train(n_patches=8192, batch_size=2048, seed=5, n_threads=3, device="cpu")
    assert fields.stream_of(cfg) == (cfg.data, 8192, 2048, 5, 2.0, 3, 0.0, 50, 1, "cpu")


def test_finished_runs_are_left_alone(cfg: config.Train) -> None:
    (fpath,) = loop.main([cfg])
    before = pathlib.Path(fpath).stat().st_mtime_ns
    new = change(cfg, lr=1e-3)
    again, other = loop.main([cfg, new])
    assert again == fpath
    assert pathlib.Path(fpath).stat().st_mtime_ns == before
    assert pathlib.Path(other).exists()
    assert len(logged(fpath)) == 4


def test_a_run_named_twice_is_trained_once(cfg: config.Train) -> None:
    cfg = change(cfg, sae=dataclasses.replace(cfg.sae, aux_coeff=0.0))
    fpaths = loop.main([cfg, change(cfg, dead_window=50)])  # decides a metric only
    assert fpaths[0] == fpaths[1]
    assert [line["step"] for line in logged(fpaths[0])] == [0, 5, 10, 11]


def test_interrupted_run_is_trained_again(cfg: config.Train, monkeypatch: pytest.MonkeyPatch) -> None:
    (want,) = loop.main([change(cfg, ckpt_to=cfg.ckpt_to + "-undisturbed")])

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.nn, "save", stop)
        loop.main([cfg])
    assert not list(pathlib.Path(cfg.ckpt_to).glob("*/sae.pt"))
    (fpath,) = loop.main([cfg])
    for name, tensor in weights(fpath).items():
        assert torch.equal(tensor, weights(want)[name]), name


# ---- failing in words ----


def test_json_has_no_bare_nan(make_shards, cfg: config.Train) -> None:
    """Constant activations have no variance to explain."""
    dpath, _ = make_shards(n_imgs=9, layers=(0,), acts=np.ones((9, 1, 5, 8), np.float32))
    cfg = change(cfg, data=data_config.Shards(str(dpath)))
    (fpath,) = loop.main([cfg])
    for name in ("metrics.jsonl", "metrics.json", "config.json"):
        text = pathlib.Path(fpath).with_name(name).read_text()
        for part in text.splitlines() if name == "metrics.jsonl" else [text]:
            found = json.loads(part, parse_constant=lambda token: pytest.fail(token))
            if name != "config.json":
                assert found["explained_variance"] is found["normalized_mse"] is None


def test_activations_too_large_for_squares_are_refused(make_shards, cfg: config.Train) -> None:
    acts = 1e25 * np.random.default_rng(0).standard_normal((9, 1, 5, 8), np.float32)
    dpath, _ = make_shards(n_imgs=9, layers=(0,), acts=acts)
    cfg = change(cfg, data=data_config.Shards(str(dpath)))
    with pytest.raises(errors.UserError, match=r"activations up to [\d.]+e\+25 at layer 0: squares"):
        loop.main([cfg])
    assert not list(pathlib.Path(cfg.ckpt_to).glob("*/sae.pt"))


def test_loss_that_is_not_finite(cfg: config.Train) -> None:
    with pytest.raises(errors.UserError, match=r"not finite at step \d+. Lower --lr"):
        loop.main([change(cfg, lr=1e25)])
    assert not list(pathlib.Path(cfg.ckpt_to).glob("*/sae.pt"))


def test_a_diverging_run_does_not_take_the_others_along(cfg: config.Train) -> None:
    bad = change(cfg, lr=1e25)
    with pytest.raises(errors.UserError, match=rf"run {trained_id(bad)}: the loss or a weight is not finite"):
        loop.main([bad, cfg])
    (saved,) = pathlib.Path(cfg.ckpt_to).glob("*/sae.pt")
    assert saved.parent.name == trained_id(cfg)
    (alone,) = loop.main([change(cfg, ckpt_to=cfg.ckpt_to + "-alone")])
    for name, tensor in weights(alone).items():
        assert torch.equal(tensor, weights(str(saved))[name]), name


@pytest.mark.parametrize("at", [7, 11])
def test_checkpoints_removed_while_training(
    cfg: config.Train, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Also after the last log line: then nothing of the run would be left but its weights."""
    real = run.Run.measure

    def measuring(self: run.Run, step: int, *args: object) -> dict[str, float]:
        if step >= at:
            shutil.rmtree(cfg.ckpt_to, ignore_errors=True)
        return real(self, step, *args)

    monkeypatch.setattr(run.Run, "measure", measuring)
    with pytest.raises(errors.UserError, match=r"metrics\.jsonl: was removed, moved or replaced"):
        loop.main([cfg])
    assert not list(pathlib.Path(cfg.ckpt_to).glob("*"))


@pytest.mark.parametrize(
    "sae",
    [*(dataclasses.replace(sae, exp_factor=None, d_sae=37) for sae in SAES),
     nn_config.TopK(d_sae=37, top_k=30, keep_negative=True)],
)  # fmt: skip
@pytest.mark.parametrize("objective", [nn_config.Vanilla(), nn_config.Matryoshka(n_prefixes=3)])
def test_any_number_of_latents_and_either_sign_train(
    sae: nn_config.Sae, objective: nn_config.Objective, cfg: config.Train
) -> None:
    """The saved model's own codes are what its metrics.json counts."""
    (fpath,) = loop.main([change(cfg, sae=sae, objective=objective)])
    trained = nn.load(fpath)
    assert trained.d_sae == 37 and trained.cfg == sae.sized(8)
    found = json.loads((pathlib.Path(fpath).parent / "metrics.json").read_text())
    acts = activations.Activations(cfg.data).read(0, 50)
    f_NPS = trained.encode(acts)
    assert found["n_latents"] == 37
    assert found["l0_count"] == pytest.approx((f_NPS.abs() > 1e-8).sum().item() / 200)
    assert found["l1"] == pytest.approx(f_NPS.abs().mean().item(), rel=1e-4)
    if getattr(sae, "keep_negative", False):
        assert (f_NPS < 0).any() and found["l0_count"] == 30


def test_equal_sizes_are_one_run(cfg: config.Train) -> None:
    by_factor, by_number = (
        change(cfg, sae=nn_config.TopK(top_k=3, **size)) for size in ({"exp_factor": 4}, {"d_sae": 32})
    )
    first, second = loop.main([by_factor, by_number])
    assert first == second


def test_a_dictionary_that_fits_nowhere_is_refused_before_training(cfg: config.Train) -> None:
    with pytest.raises(errors.UserError, match="8,000,000,000 latents .* take 512 GB"):
        loop.main([change(cfg, sae=nn_config.Relu(exp_factor=10**9))])
    assert not pathlib.Path(cfg.ckpt_to).exists()


def test_wrong_d_vit(cfg: config.Train) -> None:
    bad = change(cfg, sae=nn_config.TopK(d_vit=1024))
    with pytest.raises(errors.UserError, match=r"--sae\.d-vit 1024: the activations in .* 8 wide"):
        loop.main([bad])
    assert not pathlib.Path(cfg.ckpt_to).exists()


@pytest.mark.parametrize("field", ["n_patches", "batch_size", "log_every", "dead_window", "lr", "seed"])
def test_config_refuses_nothing_or_less(field: str) -> None:
    value = {"lr": 0.0, "seed": -1}.get(field, 0)
    with pytest.raises(errors.UserError, match=f"--{field.replace('_', '-')} {value}"):
        config.Train(**{field: value})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"seed": 2**32}, "--seed 4294967296: must be below"),
        ({"n_patches": 31, "batch_size": 32}, "--n-patches 31: is less than one batch"),
        ({"ema": math.nan}, "--ema nan"),
    ],
)
def test_config_refuses(fields: dict[str, object], match: str) -> None:
    with pytest.raises(errors.UserError, match=match):
        config.Train(**fields)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (nn_config.JumpRelu, "bandwidth"),
        (nn_config.JumpRelu, "init_threshold"),
        (nn_config.Relu, "sparsity_coeff"),
        (nn_config.TopK, "aux_coeff"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_architectures_refuse(cls: type, name: str, value: float) -> None:
    with pytest.raises(errors.UserError, match=f"--sae.{name.replace('_', '-')} {value}: must be"):
        cls(**{name: value})


def test_more_prefixes_than_there_are(cfg: config.Train) -> None:
    bad = change(cfg, objective=nn_config.Matryoshka(n_prefixes=10, prefixes="fixed"))
    with pytest.raises(errors.UserError, match="a dictionary of 32 latents has at most 6 fixed prefixes"):
        loop.main([bad])


def test_defaults_pass_their_own_checks() -> None:
    assert dataclasses.replace(config.Train()) == config.Train()


# ---- wandb ----


@pytest.mark.slow
def test_wandb_offline_writes_a_run_directory(cfg: config.Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = change(cfg, wandb_project="saev-test")
    fpaths = loop.main([cfg, change(cfg, lr=1e-3)])
    for fpath in map(pathlib.Path, fpaths):
        (run_dpath,) = fpath.parent.glob("wandb/offline-run-*")
        assert list(run_dpath.glob("*.wandb"))
        assert len(logged(str(fpath))) == 4
