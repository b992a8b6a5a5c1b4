"""Training that is stopped and goes on: the same weights, bit for bit. Real signals, real processes."""

import collections.abc
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
import typing as tp

import forked
import pytest
import torch

from saev import errors, helpers, nn
from saev.data import config as data_config
from saev.formats import checkpoint, metricslog, tensors
from saev.nn import config as nn_config
from saev.nn import optim
from saev.training import config, loop, run, state

ROOT = pathlib.Path(__file__).parent.parent

SAES = {
    "top-k": nn_config.TopK(exp_factor=4, top_k=3),
    "batch-top-k": nn_config.BatchTopK(exp_factor=4, top_k=3),
    "relu": nn_config.Relu(exp_factor=4, resample_every=7),
    "jump-relu": nn_config.JumpRelu(exp_factor=4),
    "per-dim, data": nn_config.BatchTopK(exp_factor=4, top_k=3, normalize="per-dim", init="data"),
}


@pytest.fixture(autouse=True)
def one_thread() -> collections.abc.Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cfg(make_shards, tmp_path: pathlib.Path) -> config.Train:
    """40 steps on 400 activations of width 8; latents die within two batches."""
    dpath, _ = make_shards(n_imgs=100, n_patches=4, d_vit=8, layers=(0,), per_shard=20)
    return config.Train(
        sae=SAES["top-k"],
        data=data_config.Shards(str(dpath)),
        n_patches=40 * 32,
        batch_size=32,
        lr=1e-2,
        n_lr_warmup=4,
        dead_window=64,
        log_every=6,
        ckpt_to=str(tmp_path / "checkpoints"),
        wandb_project="",
        device="cpu",
    )


def change(cfg: config.Train, **changes: object) -> config.Train:
    return dataclasses.replace(cfg, **changes)


def weights(fpath: str | pathlib.Path) -> dict[str, torch.Tensor]:
    return nn.load(fpath).state_dict()


def assert_same(fpath: str | pathlib.Path, other: str | pathlib.Path) -> None:
    mine, theirs = weights(fpath), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def logged(fpath: str | pathlib.Path) -> list[dict[str, float]]:
    """Metrics without those of the clock."""
    text = (pathlib.Path(fpath).parent / "metrics.jsonl").read_text()
    lines = [metricslog.parse(line) or {} for line in text.splitlines()]
    return [{k: v for k, v in m.items() if k not in ("tokens_per_s", "loader_wait")} for m in lines]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    """Sends this process a signal in the middle of a step."""
    real = run.Run.step

    def stepping(self: run.Run, at: int, x_BD: torch.Tensor) -> object:
        if at == step:
            os.kill(os.getpid(), signum)
        return real(self, at, x_BD)

    monkeypatch.setattr(run.Run, "step", stepping)


# ---- in one process: every architecture and option ----


@pytest.mark.slow
@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("objective", [nn_config.Vanilla(), nn_config.Matryoshka(n_prefixes=3)])
def test_interrupted_run_ends_with_the_same_weights(
    cfg: config.Train, monkeypatch: pytest.MonkeyPatch, name: str, objective: object
) -> None:
    cfg = change(cfg, sae=SAES[name], objective=objective, ema=0.9, n_threads=1)
    (want,) = loop.main([change(cfg, ckpt_to=cfg.ckpt_to + "-undisturbed")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 23, signal.SIGINT)
        loop.main([cfg])
    (dpath,) = pathlib.Path(cfg.ckpt_to).iterdir()
    assert state.saved(dpath) == [24], "the step in which the signal came was finished"
    (fpath,) = loop.main([cfg])
    assert_same(fpath, want)
    assert logged(fpath) == logged(want)
    assert state.saved(dpath) == [], "a finished run needs no states"


def test_resampling_revives_dead_latents(cfg: config.Train, tmp_path: pathlib.Path) -> None:
    sae = nn_config.Relu(d_vit=8, exp_factor=4, resample_every=10)
    mine = run.Run(change(cfg, sae=sae), tmp_path, torch.device("cpu"))
    x_BD = 3 + torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    mine.start(x_BD)
    dead_S = torch.arange(32) < 12
    with torch.no_grad():
        mine.sae.b_enc[dead_S] = -100
    for _ in range(3):  # 96 activations; latents die after 64
        out = mine.step(1, x_BD)
    assert not out.fired_S[dead_S].any() and out.fired_S[~dead_S].all()
    before = {n: p.detach().clone() for n, p in mine.sae.named_parameters()}
    mine.resample(10, x_BD)
    for name, parameter in mine.sae.named_parameters():
        rows = parameter.T if name == "W_enc" else parameter
        if name != "b_dec":
            old = before[name].T if name == "W_enc" else before[name]
            assert torch.equal(rows[~dead_S], old[~dead_S]), f"{name}: the living are left alone"
            moment = mine.optimizer.m[name]
            assert not (moment.T if name == "W_enc" else moment)[dead_S].any()
    unit_BD = torch.nn.functional.normalize(x_BD * mine.sae.scale - mine.sae.b_dec, dim=1)
    cos_SB = mine.sae.W_dec[dead_S] @ unit_BD.T
    torch.testing.assert_close(cos_SB.amax(dim=1), torch.ones(12), msg="directions of activations")
    alive_norm = mine.sae.W_enc[:, ~dead_S].norm(dim=0).mean()
    norms_S = mine.sae.W_enc[:, dead_S].norm(dim=0)
    torch.testing.assert_close(norms_S, (0.2 * alive_norm).expand(12))
    assert mine.step(11, x_BD).fired_S[dead_S].all()


def test_sigterm_saves_at_once(cfg: config.Train, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        interrupt_at(patch, 5, signal.SIGTERM)
        loop.main([cfg])
    assert stop.value.code == 128 + signal.SIGTERM
    (dpath,) = pathlib.Path(cfg.ckpt_to).iterdir()
    assert state.saved(dpath) == [6]


def test_sigusr2_saves_and_leaves_the_rest_to_whoever_listened(
    cfg: config.Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's handler requeues the job; one that returns lets the training go on."""
    seen: list[list[int]] = []

    def handler(*args: object) -> None:
        (dpath,) = pathlib.Path(cfg.ckpt_to).glob("[!.]*")
        seen.append(state.saved(dpath))

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with monkeypatch.context() as patch:
            interrupt_at(patch, 5, signal.SIGUSR2)
            (fpath,) = loop.main([cfg])
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [[6]]
    assert pathlib.Path(fpath).exists()


def test_states_are_saved_by_the_clock_and_the_newest_kept(
    cfg: config.Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = change(cfg, save_every=1e-9, keep_last=3)
    kept: list[list[int]] = []
    real = state.save

    def save(dpath: pathlib.Path, n_steps: int, *args: object) -> None:
        real(dpath, n_steps, *args)
        kept.append(state.saved(dpath))

    monkeypatch.setattr(loop.state, "save", save)
    loop.main([cfg])
    assert kept[:4] == [[1], [1, 2], [1, 2, 3], [2, 3, 4]]
    assert len(kept) == 39, "after every step but the last, whose result is the checkpoint"


def test_a_new_run_of_the_group_does_not_throw_the_others_back(
    cfg: config.Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 23, signal.SIGINT)
        loop.main([cfg])
    new = change(cfg, lr=1e-3)
    steps: list[tuple[float, int]] = []
    real = run.Run.step

    def stepping(self: run.Run, at: int, x_BD: torch.Tensor) -> object:
        steps.append((self.cfg.lr, at))
        return real(self, at, x_BD)

    monkeypatch.setattr(run.Run, "step", stepping)
    loop.main([cfg, new])
    assert [at for lr, at in steps if lr == 1e-2] == list(range(24, 40))
    assert [at for lr, at in steps if lr == 1e-3] == list(range(40))


@pytest.mark.parametrize(
    ("saved", "want"),
    [
        ({"a": [], "b": []}, [(0, "ab")]),
        ({"a": [5, 9], "b": [5, 9]}, [(9, "ab")]),
        ({"a": [5, 9], "b": [5]}, [(5, "ab")]),
        ({"a": [5, 9], "b": []}, [(0, "b"), (9, "a")]),
        ({"a": [7, 9], "b": [5], "c": [9]}, [(5, "b"), (9, "ac")]),
    ],
)
def test_which_runs_go_on_together(saved: dict[str, list[int]], want: list[tuple[int, str]]) -> None:
    got = state.starts({pathlib.Path(name): steps for name, steps in saved.items()})
    assert [(start, "".join(d.name for d in dpaths)) for start, dpaths in got] == want


def killed(cfg: config.Train, monkeypatch: pytest.MonkeyPatch, at: int) -> pathlib.Path:
    """A run that kept the states after two steps and was then killed; its folder."""
    real = state.save

    def save(dpath: pathlib.Path, n_steps: int, *args: object, **kwargs: object) -> None:
        real(dpath, n_steps, *args, **kwargs)
        if n_steps == at:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop.state, "save", save)
        with pytest.raises(RuntimeError, match="killed"):
            loop.main([change(cfg, save_every=1e-9, keep_last=2)])
    (dpath,) = pathlib.Path(cfg.ckpt_to).iterdir()
    assert state.saved(dpath) == [at - 1, at]
    return dpath


def bad_bit(fpath: pathlib.Path) -> None:
    content = bytearray(fpath.read_bytes())
    content[len(content) // 2] ^= 4
    fpath.write_bytes(content)


def crafted(*keys: str, to: object = None) -> tp.Callable[[pathlib.Path], None]:
    """Changes a value of a state, and its checksum with it."""

    def craft(fpath: pathlib.Path) -> None:
        n_steps = int(fpath.stem.removeprefix("state-"))
        tree = state.load(fpath.parent, n_steps)
        at = tree
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = to
        header = {"run": fpath.parent.name, "n_steps": n_steps}
        checkpoint.write(fpath, "state", header, tensors.dump(tree))

    return craft


DAMAGE = {
    "a bit": (bad_bit, "its bytes changed since it was written"),
    "empty": (lambda f: f.write_bytes(b""), "not a saev checkpoint"),
    "no weights": (crafted("sae", to={}), "sae has missing or extra keys: W_dec"),
    "another width": (crafted("sae", "b_dec", to=torch.zeros(9)), r"sae.b_dec is \(9,\)"),
    "NaN": (crafted("sae", "b_dec", to=torch.full((8,), torch.nan)), "sae.b_dec holds NaN"),
    "another type": (crafted("density", to="much"), "density is a str instead of a float"),
    "an index": (crafted("dead_C", to=torch.tensor([10**6])), "latents that do not exist"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_state_falls_back_to_the_older_one(
    cfg: config.Train, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = change(cfg, n_patches=12 * cfg.batch_size)
    (undisturbed,) = loop.main([change(cfg, ckpt_to=f"{cfg.ckpt_to}-undisturbed")])
    dpath = killed(cfg, monkeypatch, at=6)
    damage, match = DAMAGE[name]
    damage(dpath / "state-000000006.pt")
    with caplog.at_level("INFO", logger="saev"):
        (mine,) = loop.main([cfg])
    assert_same(mine, undisturbed)
    (said,) = [m for m in caplog.messages if "Ignored" in m]
    assert re.search(match, said) and "state-000000006.pt: " in said and "\n" not in said
    assert f"continuing after step 5: {dpath.name}" in caplog.messages


def test_a_run_without_a_good_state_starts_again(
    cfg: config.Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = change(cfg, n_patches=12 * cfg.batch_size)
    (undisturbed,) = loop.main([change(cfg, ckpt_to=f"{cfg.ckpt_to}-undisturbed")])
    dpath = killed(cfg, monkeypatch, at=6)
    for fpath in dpath.glob("state-*"):
        bad_bit(fpath)
    (mine,) = loop.main([cfg])
    assert_same(mine, undisturbed)
    assert len([m for m in caplog.messages if "Ignored" in m]) == 2


def test_a_damaged_later_state_never_outlives_a_good_one(tmp_path: pathlib.Path) -> None:
    for n_steps in (5, 9):
        state.save(tmp_path, n_steps, {}, keep_last=2)
    bad_bit(tmp_path / "state-000000009.pt")
    state.save(tmp_path, 7, {}, keep_last=1)
    assert state.saved(tmp_path) == [7]


def test_a_state_of_another_run_is_refused(cfg: config.Train, tmp_path: pathlib.Path) -> None:
    state.save(tmp_path / "a", 5, {}, keep_last=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "a/state-000000005.pt").rename(tmp_path / "b/state-000000005.pt")
    with pytest.raises(errors.UserError, match="is step 5 of run a. Delete it"):
        state.load(tmp_path / "b", 5)


def test_a_cut_state_is_named(tmp_path: pathlib.Path) -> None:
    state.save(tmp_path, 5, {"w": torch.zeros(1000)}, keep_last=1)
    fpath = tmp_path / "state-000000005.pt"
    fpath.write_bytes(fpath.read_bytes()[:-2000])
    with pytest.raises(errors.UserError, match=r"state-000000005\.pt: its bytes changed .* Delete it"):
        state.load(tmp_path, 5)


@pytest.mark.parametrize("ema", [0.0, 0.999])
def test_an_average_of_weights_keeps_the_threshold_of_the_last_step(
    cfg: config.Train, ema: float, tmp_path: pathlib.Path
) -> None:
    cfg = change(cfg, sae=nn_config.BatchTopK(d_vit=8, exp_factor=4, top_k=3), ema=ema)
    mine = run.Run(cfg, tmp_path, torch.device("cpu"))
    x_BD = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    mine.start(x_BD)
    seen = [mine.sae.W_enc.detach().clone()]
    for step in range(12):
        mine.step(step, x_BD)
        seen.append(mine.sae.W_enc.detach().clone())
    done = mine.finished()
    assert done.threshold == mine.sae.threshold > 0
    want = seen[0]  # by the formula: the first steps are averaged over fewer
    for step, w in enumerate(seen[1:]):
        want = torch.lerp(want, w, 1 - min(ema, (1 + step) / (10 + step)))
    torch.testing.assert_close(done.W_enc, want)


def test_a_resumed_run_clips_as_before(cfg: config.Train, tmp_path: pathlib.Path) -> None:
    cfg = change(cfg, sae=nn_config.TopK(d_vit=8, exp_factor=4, top_k=3), max_norm_ratio=2.0)
    mine, other = (run.Run(cfg, tmp_path, torch.device("cpu")) for _ in range(2))
    x_BD = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    x_BD[5] *= 100
    assert mine.clip(x_BD).equal(x_BD), "what is typical is not known yet"
    mine.start(x_BD)
    other.restore(mine.state())
    assert other.clip(x_BD).equal(mine.clip(x_BD)) and not mine.clip(x_BD).equal(x_BD)
    torch.testing.assert_close(mine.clip(x_BD)[5].norm(), 2 * mine.around.radius, rtol=0.1, atol=0)


def test_a_signal_in_the_last_step_is_not_forgotten(
    cfg: config.Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, cfg.n_steps - 1, signal.SIGINT)
        loop.main([cfg])
    (dpath,) = pathlib.Path(cfg.ckpt_to).iterdir()
    assert (dpath / "sae.pt").exists() and not (dpath / "metrics.json").exists()
    loop.main([cfg])
    assert (dpath / "metrics.json").exists()


# ---- a loss or weight that is no number ----


@pytest.mark.parametrize("at", [10, 39])
def test_weights_that_are_no_numbers_are_never_saved(
    cfg: config.Train, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A latent that never fires again may hide them from the loss."""
    real = run.Run.step

    def stepping(self: run.Run, step: int, x_BD: torch.Tensor) -> object:
        out = real(self, step, x_BD)
        if step == at:
            with torch.no_grad():
                self.sae.W_dec[3] = torch.nan
        return out

    monkeypatch.setattr(run.Run, "step", stepping)
    with pytest.raises(errors.UserError, match=rf"not finite at step {at}\..*after step {at}"):
        loop.main([change(cfg, save_every=1e-9)])
    (dpath,) = pathlib.Path(cfg.ckpt_to).iterdir()
    assert not (dpath / "sae.pt").exists()
    assert all(t.isfinite().all() for t in weights(dpath / "last-good.pt").values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_no_number_updates_nothing(bad: float, tmp_path: pathlib.Path) -> None:
    sae = nn.SparseAutoencoder(nn_config.TopK(d_vit=8, exp_factor=4, top_k=3))
    before = {n: p.detach().clone() for n, p in sae.named_parameters()}
    for p in sae.parameters():
        p.grad = torch.ones_like(p)
    sae.W_enc.grad[2, 5] = bad
    assert not optim.Adam(sae, max_norm=1.0).step(1e-2).isfinite()
    for name, p in sae.named_parameters():
        assert torch.equal(p, before[name]), name


def test_diverged_run_keeps_its_last_good_state(cfg: config.Train, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run.Run.step

    last_good = {}

    def stepping(self: run.Run, at: int, x_BD: torch.Tensor) -> object:
        if at == 17 and self.cfg.lr == 1e-3:
            last_good.update({k: v.clone() for k, v in self.sae.state_dict().items()})
            x_BD = x_BD * float("nan")
        return real(self, at, x_BD)

    monkeypatch.setattr(run.Run, "step", stepping)
    bad = change(cfg, lr=1e-3, save_every=1e-9)
    with pytest.raises(errors.UserError, match=r"not finite at step 17.*last-good.pt is the SAE after step"):
        loop.main([change(cfg, save_every=1e-9), bad])
    dpaths = {
        json.loads((d / "config.json").read_text())["lr"]: d for d in pathlib.Path(cfg.ckpt_to).iterdir()
    }
    assert (dpaths[1e-2] / "metrics.json").exists(), "the other run was finished and evaluated"
    assert not (dpaths[1e-3] / "sae.pt").exists()
    assert json.loads((dpaths[1e-3] / "failed.json").read_text())["step"] == 17
    good = weights(dpaths[1e-3] / "last-good.pt")
    assert good.keys() == last_good.keys()
    assert all(torch.equal(good[name], last_good[name]) for name in good)


# ---- real processes ----


def command(cfg: config.Train, *more: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "train.py"), "--data.shard-root", cfg.data.shard_root),
        *("--n-patches", str(1000 * 32), "--batch-size", "32", "--lr", "1e-2"),
        *("--dead-window", "64", "--log-every", "100", "--ckpt-to", cfg.ckpt_to),
        *("--wandb-project", "", "--device", "cpu", "--save-every", "4e-3", *more),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def sweep(tmp_path: pathlib.Path) -> str:
    fpath = tmp_path / "two.toml"
    fpath.write_text(
        '[[sae]]\ntype = "top-k"\nexp_factor = 4\ntop_k = 3\nnormalize = "per-dim"\ninit = "data"\n[[sae]]\ntype = "relu"\nexp_factor = 4\n'
        # so few latents fire that its steps go the sparse way
        '[[sae]]\ntype = "relu"\nexp_factor = 64\nsparsity_coeff = 0.1\n'
    )
    return str(fpath)


@pytest.mark.slow
def test_killed_three_times_ends_with_the_same_weights(cfg: config.Train, tmp_path: pathlib.Path) -> None:
    """kill -9, wherever it strikes: in a step, while states are written, between the runs of the group."""
    more = ("--sweep", sweep(tmp_path), "--n-patches", str(240 * 32), "--save-every", "5e-4")
    more += ("--log-every", "40")
    undisturbed = change(cfg, ckpt_to=cfg.ckpt_to + "-undisturbed")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    pipes["also"] = ("saev.training.loop",)
    want = forked.run(command(undisturbed, *more), **pipes, check=True).stdout.split()
    rng, n_killed, reached = random.Random(0), 0, []
    while True:
        process = forked.Popen(command(cfg, *more), **pipes)
        if n_killed < 3:
            newest = max(reached, default=0)
            while process.poll() is None and newest_state(cfg.ckpt_to) <= newest:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.06))
            process.kill()
        out, err = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        n_killed += 1
        reached.append(newest_state(cfg.ckpt_to))
    assert n_killed == 3
    assert reached == sorted(set(reached)), "each try went on from where the last one had come"
    assert "continuing after step" in err
    for mine, undisturbed_fpath in zip(out.split(), want, strict=True):
        assert_same(mine, undisturbed_fpath)
        assert logged(mine) == logged(undisturbed_fpath)
    assert not [p for p in pathlib.Path(cfg.ckpt_to).rglob("*") if p.name.startswith(".")]


def test_a_finished_run_removes_what_a_kill_left_half_written(tmp_path: pathlib.Path) -> None:
    state.save(tmp_path, 7, {"a": 1}, keep_last=2)
    old_fpath = tmp_path / f".state-000000008.pt.{'0' * 32}.tmp"  # as earlier versions named them
    old_fpath.write_bytes(b"half a state")
    os.utime(old_fpath, (0, 0))
    (tmp_path / "sae.pt").write_bytes(b"kept")
    state.remove(tmp_path)
    assert [fpath.name for fpath in tmp_path.iterdir()] == ["sae.pt"]


def newest_state(ckpt_to: str) -> int:
    dpaths = pathlib.Path(ckpt_to).glob("*")
    return max((n for d in dpaths for n in state.saved(d)), default=0)


@pytest.mark.slow
def test_two_processes_equal_one(cfg: config.Train, tmp_path: pathlib.Path) -> None:
    """Data parallel over gloo: each takes half of each batch. Three architectures on one stream."""
    saes = [f"[[sae]]\ntype = '{name}'\nexp_factor = 4\n" for name in ("batch-top-k", "relu", "jump-relu")]
    more = "top_k = 3\nnormalize = 'per-dim'\ninit = 'data'\n"
    (tmp_path / "three.toml").write_text("".join(saes).replace("k'\n", f"k'\n{more}"))
    more = ["--n-patches", str(60 * 32), "--lr", "1e-3", "--sweep", str(tmp_path / "three.toml")]
    fpaths = []
    for n in ("1", "2"):
        parallel = change(cfg, ckpt_to=f"{cfg.ckpt_to}-{n}")
        out = forked.run(
            command(parallel, "--data-parallel", n, *more), capture_output=True, text=True, env=environment()
        )
        assert out.returncode == 0, out.stderr
        fpaths.append(out.stdout.split())
    assert len(fpaths[0]) == 3
    for one, two in zip(*fpaths, strict=True):
        mine, theirs = weights(one), weights(two)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_the_good_runs_of_a_local_sweep_are_done_and_named(cfg: config.Train, tmp_path: pathlib.Path) -> None:
    """Two groups (seeds) with a run each that diverges: the other two are trained, evaluated and printed."""
    fpath = tmp_path / "four.toml"
    fpath.write_text("seed = [0, 1]\nlr = [1e25, 1e-2]\n[sae]\ntype = 'top-k'\nexp_factor = 4\n")
    args = [a for a in command(cfg, "--n-patches", "320", "--sweep", str(fpath)) if a != "--lr"]
    args.remove("1e-2")
    done = forked.run(args, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and done.stderr.splitlines()[-1].count("not finite") == 2
    fpaths = [pathlib.Path(line) for line in done.stdout.split()]
    assert len(fpaths) == 2 and all((f.parent / "metrics.json").exists() for f in fpaths)
    cfgs = [json.loads((f.parent / "config.json").read_text()) for f in fpaths]
    assert [(c["seed"], c["lr"]) for c in cfgs] == [(0, 1e-2), (1, 1e-2)]


@pytest.mark.slow
def test_two_processes_diverge_together(cfg: config.Train) -> None:
    """The loss of one process's half may be the first that is no number."""
    args = command(cfg, "--data-parallel", "2", "--n-patches", "320", "--lr", "1e25")
    done = forked.run(args, capture_output=True, text=True, env=environment())
    assert done.returncode == 2, done.stderr
    assert "not finite at step" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_save_when_their_parent_is_asked_to_stop(cfg: config.Train, signum: int) -> None:
    args = command(cfg, "--data-parallel", "2", "--n-patches", "3200000", "--save-every", "10")
    process = forked.Popen(args, stderr=subprocess.PIPE, text=True, env=environment())
    while process.poll() is None and not list(pathlib.Path(cfg.ckpt_to).glob("*/metrics.jsonl")):
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if signum == signal.SIGINT else 128 + signum), err
    assert "Traceback" not in err
    assert newest_state(cfg.ckpt_to) > 0


# ---- the same command twice at once ----


def test_the_second_of_two_waits_and_finds_the_finished_run(
    cfg: config.Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "saev")
    n_steps, real = 0, run.Run.step
    in_step, go_on = threading.Event(), threading.Event()

    def stepping(self: run.Run, at: int, x_BD: torch.Tensor) -> object:
        nonlocal n_steps
        n_steps += 1
        in_step.set()
        assert go_on.wait(60)
        return real(self, at, x_BD)

    monkeypatch.setattr(run.Run, "step", stepping)
    cfgs = [cfg, change(cfg, lr=1e-3)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        first = threads.submit(loop.main, cfgs)
        assert in_step.wait(60)
        second = threads.submit(loop.main, cfgs[::-1])
        while "waiting for another process: it trains" not in caplog.text:
            time.sleep(0.01)
            assert not second.done()
        go_on.set()
        assert first.result(60) == second.result(60)[::-1]
    assert n_steps == 2 * 40
    assert caplog.text.count("already trained") == 2
    names = {p.name for p in pathlib.Path(cfg.ckpt_to).iterdir()}
    assert names == {pathlib.Path(f).parent.name for f in first.result()}, "no lock is left"


def test_finished_runs_are_found_where_nothing_may_be_written(cfg: config.Train) -> None:
    fpaths = loop.main([cfg])
    (dpath,) = pathlib.Path(cfg.ckpt_to).iterdir()
    with helpers.locked(dpath.with_name(f".{dpath.name}.lock"), "a test"):
        assert loop.main([cfg]) == fpaths, "needs no lock"
