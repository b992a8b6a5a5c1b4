"""The training loop: every run of a group sees the same batches. B batch, D d_vit, S latents."""

import contextlib
import dataclasses
import json
import logging
import pathlib
import time

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev import devices, errors, helpers, nn, tracking
from saev.data import shuffled
from saev.nn import metrics, objectives
from saev.training import config

logger = logging.getLogger("saev")

REVISION = 1
"""Raised whenever the same config may give other weights."""


@beartype.beartype
def main(cfgs: list[config.Train]) -> list[str]:
    """Trains the runs of one group and returns the paths of their checkpoints, in order. Finished runs are left alone.

    Raises:
        UserError: bad shards, a d_vit that does not fit them, or a loss that is not finite (after the
            other runs of the group are trained and saved).
    """
    stream = shuffled.Shuffled(
        cfgs[0].data,
        batch_size=cfgs[0].batch_size,
        seed=cfgs[0].seed,
        pool_bytes=int(cfgs[0].pool_gb * 1e9),
        n_threads=cfgs[0].n_threads,
        pin=devices.pick(cfgs[0].device).type == "cuda",
    )
    cfgs = [_with_d_vit(cfg, stream.reader.d_vit) for cfg in cfgs]
    fpaths = [_dpath(cfg, stream) / "sae.pt" for cfg in cfgs]
    todo = {}  # equal runs are trained once
    for cfg, fpath in zip(cfgs, fpaths, strict=True):
        if fpath.exists():
            logger.info(
                "%s: trained already; pass another --seed or --ckpt-to to train it again", fpath
            )
        else:
            todo[fpath] = cfg
    if todo:
        _train(stream, todo)
    return [str(fpath) for fpath in fpaths]


@beartype.beartype
def run_id(cfg: config.Train, activations: str) -> str:
    """Eight hex digits of the hash of all that decides the weights. activations: `reader.Reader.hash`."""
    skip = {
        "data",
        "ckpt_to",
        "wandb_project",
        "device",
        "sweep",
        "dry_run",
        "slurm",
        "log_every",
        "n_threads",
        "dead_window",
    }
    fields = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in skip}
    fields |= {"revision": REVISION, "cls": type(cfg.sae).__name__, "activations": activations}
    return helpers.hash_of(fields)[:8]


def _dpath(cfg: config.Train, stream: shuffled.Shuffled) -> pathlib.Path:
    return pathlib.Path(cfg.ckpt_to) / run_id(cfg, stream.reader.hash)


def _with_d_vit(cfg: config.Train, d_vit: int) -> config.Train:
    if cfg.sae.d_vit not in (None, d_vit):
        raise errors.UserError(
            f"--sae.d-vit {cfg.sae.d_vit}: the activations in {cfg.data.shard_root} are {d_vit} wide. "
            f"Pass --sae.d-vit {d_vit} or leave it out."
        )
    return dataclasses.replace(cfg, sae=dataclasses.replace(cfg.sae, d_vit=d_vit))


class Run:
    """One SAE in training, with its optimiser, tracker and dead-latent count."""

    @jaxtyped(typechecker=beartype.beartype)
    def __init__(
        self,
        cfg: config.Train,
        dpath: pathlib.Path,
        x_BD: Float[Tensor, "B D"],
        device: torch.device,
    ):
        self.cfg = cfg
        self.dpath = dpath
        self.sae = nn.SparseAutoencoder(cfg.sae, cfg.seed)
        self.sae.initialize(x_BD)
        self.sae.to(device)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=cfg.lr)
        self.grad_norm = 0.0
        self.tokens_since_fired_S = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=device)
        fields = {**dataclasses.asdict(cfg), "architecture": type(cfg.sae).__name__}
        helpers.write_text(dpath / "config.json", json.dumps(fields, indent=4))
        self.tracker = tracking.start(
            dpath, name=dpath.name, config=fields, wandb_project=cfg.wandb_project
        )

    @jaxtyped(typechecker=beartype.beartype)
    def step(self, step: int, x_BD: Float[Tensor, "B D"]) -> objectives.Output:
        """Forward, backward, update."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        out = objectives.vanilla(self.sae, x_BD)
        self.optimizer.zero_grad()
        out.loss.backward()
        self.sae.remove_parallel_grad()
        if self.cfg.logs_at(step):
            self.grad_norm = metrics.grad_norm(list(self.sae.parameters()))
        self.optimizer.step()
        self.sae.normalize_decoder()
        fired_S = (out.f_BS.detach() > metrics.EPS_ACTIVE).any(dim=0)
        self.tokens_since_fired_S += len(x_BD)
        self.tokens_since_fired_S[fired_S] = 0
        return out

    def lr(self, step: int) -> float:
        """Linear warm-up, then constant."""
        return self.cfg.lr * min(1.0, (step + 1) / max(1, self.cfg.n_lr_warmup))

    @torch.no_grad()
    def measure(self, step: int, x_BD: Tensor, out: objectives.Output) -> dict[str, float]:
        """The metrics of this step's batch, by their fixed names.

        Raises:
            UserError: the loss is not finite.
        """
        if not out.loss.isfinite():
            raise errors.UserError(
                f"run {self.dpath.name}: the loss is {out.loss.item()} at step {step}. Lower --lr (now {self.cfg.lr})."
            )
        values = metrics.measure(
            x_BD, out.x_hat_BD.detach(), out.f_BS.detach(), self.sae.W_dec.detach()
        )
        values["dead_pct"] = metrics.dead_pct(self.tokens_since_fired_S, self.cfg.dead_window)
        return {"loss": out.loss.item(), **values, "grad_norm": self.grad_norm, "lr": self.lr(step)}

    def save(self) -> None:
        nn.save(self.sae.eval(), self.dpath / "sae.pt")


def _train(stream: shuffled.Shuffled, todo: dict[pathlib.Path, config.Train]) -> None:
    cfg = next(iter(todo.values()))
    device = devices.pick(cfg.device)
    batches = _Timed(stream)
    x_BD = next(batches)
    with contextlib.ExitStack() as trackers:  # closed also when a run fails
        runs = []
        for fpath, run_cfg in todo.items():
            runs.append(Run(run_cfg, fpath.parent, x_BD, device))
            trackers.callback(runs[-1].tracker.finish)
        _steps(cfg, runs, x_BD, batches, device)


def _steps(
    cfg: config.Train, runs: list[Run], x_BD: Tensor, batches: "_Timed", device: torch.device
) -> None:
    """All steps, then the checkpoints. A run whose loss is not finite drops out; the others go on, then it is reported."""
    lost: list[errors.UserError] = []
    steps = range(cfg.n_steps)
    for step in helpers.progress(steps, f"train {len(runs)} SAE(s)", cfg.n_steps, "steps"):
        x_BD = x_BD.to(device, non_blocking=True)
        outs = [run.step(step, x_BD) for run in runs]
        if cfg.logs_at(step):
            runs = _log(step, runs, outs, x_BD, batches, lost)
        if not runs:
            break
        if step < cfg.n_steps - 1:
            x_BD = next(batches)
    for run in runs:
        run.save()
    if lost:
        raise errors.UserError(" ".join(map(str, lost)))


def _log(
    step: int,
    runs: list[Run],
    outs: list[objectives.Output],
    x_BD: Tensor,
    batches: "_Timed",
    lost: list[errors.UserError],
) -> list[Run]:
    """Logs each run's metrics; returns the runs with a finite loss and adds the others' errors to `lost`."""
    rates = batches.rates(len(x_BD))
    alive = []
    for run, out in zip(runs, outs, strict=True):
        try:
            run.tracker.log(step, {**run.measure(step, x_BD, out), **rates})
        except errors.UserError as err:
            lost.append(err)
        else:
            alive.append(run)
    return alive


class _Timed:
    """The stream's activations, with the time spent waiting for them."""

    def __init__(self, stream: shuffled.Shuffled):
        self.batches = iter(stream)
        self.wait_s, self.n, self.start_s = 0.0, 0, time.monotonic()

    def __next__(self) -> Tensor:
        start_s = time.monotonic()
        act_BD = next(self.batches).act_BD
        self.wait_s += time.monotonic() - start_s
        self.n += 1
        return act_BD

    def rates(self, batch_size: int) -> dict[str, float]:
        """Activations per second and the share of time spent waiting, since the last call."""
        elapsed_s = max(time.monotonic() - self.start_s, 1e-9)
        out = {
            "tokens_per_s": self.n * batch_size / elapsed_s,
            "loader_wait": self.wait_s / elapsed_s,
        }
        self.wait_s, self.n, self.start_s = 0.0, 0, time.monotonic()
        return out
