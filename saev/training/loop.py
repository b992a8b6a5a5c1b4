"""Trains a group of runs, which all see the same batches. B batch, D d_vit, N activations."""

import contextlib
import dataclasses
import logging
import math
import pathlib
import time

import torch
from torch import Tensor

from saev import devices, errors, helpers, machine, nn, provenance, tracking
from saev.data import activations, shuffled
from saev.formats import jsonfile
from saev.nn import objectives, robust
from saev.training import batches, config, evaluate, identity, interrupts, memory, parallel, state
from saev.training.run import Run

logger = logging.getLogger("saev")

SEEN = 8192
"""Activations whose variance by dimension is looked at."""


def main(cfgs: list[config.Train]) -> list[str]:
    """Trains and evaluates the runs of one group and returns the paths of their checkpoints, in order.

    Skips finished runs; interrupted ones continue from their newest saved state.

    Raises:
        UserError: bad shards, a d_vit that does not fit them, or some runs diverged. In the last case the
            other runs are trained and saved first, and `done` holds their paths.
    """
    with parallel.joined(cfgs[0].data_parallel, devices.pick(cfgs[0].device)) as world:
        acts = activations.Activations.open(cfgs[0].data)
        held_out = {
            data: activations.Activations.open(data, "--val-data", among=[acts])
            for data in {cfg.val_data for cfg in cfgs if cfg.val_data.shard_root}
        }
        for others in held_out.values():
            acts.space.check_same(others.space, whose=acts.given, flag=others.given)
        cfgs = [cfg.with_d_vit(acts.d_vit) for cfg in cfgs]
        for text in {cfg.window_warning for cfg in cfgs} - {""}:
            logger.warning("%s", text)
        dpaths = [identity.run_dpath(cfg, acts.fingerprint) for cfg in cfgs]
        named = dict(zip(dpaths, cfgs, strict=True))  # equal runs are trained once
        unfinished = [d for d, cfg in named.items() if not evaluate.is_done(d, cfg)]
        locks = [d.with_name(f".{d.name}.lock") for d in unfinished]
        with world.locked(locks, f"it trains {', '.join(d.name for d in unfinished)}"):
            lost = _train_all(_stream(cfgs[0], acts), named, world)
            for dpath, cfg in named.items() if world.is_first else []:
                evaluate.ensure(dpath, cfg, held_out.get(cfg.val_data, acts))
        fpaths = [str(dpath / "sae.pt") for dpath in dpaths if (dpath / "sae.pt").exists()]
    if lost:
        raise errors.UserError(" ".join(lost), done=fpaths)
    return fpaths


def _train_all(
    stream: shuffled.Shuffled, cfgs: dict[pathlib.Path, config.Train], world: parallel.World
) -> list[str]:
    """Trains unfinished runs. Returns an error line for each run that diverged."""
    for dpath in [*{d.parent for d in cfgs}, *cfgs]:
        helpers.sweep(dpath)
    todo = {dpath: cfg for dpath, cfg in cfgs.items() if not (dpath / "sae.pt").exists()}
    for dpath in (d for d in cfgs if d not in todo):
        logger.info("%s: already trained. To train again, pass another --seed or --ckpt-to.", dpath)
    if todo and world.is_first:
        _log_memory(list(todo.values()), stream)
    lost: list[str] = []
    for start, dpaths in state.starts({d: _states(c, d, world) for d, c in todo.items()}):
        lost += _train(stream, {d: todo[d] for d in dpaths}, start, world)
    return lost


def _log_memory(cfgs: list[config.Train], stream: shuffled.Shuffled) -> None:
    device = devices.pick(cfgs[0].device)
    if device.type == "cuda":
        part_bytes = memory.part_bytes(cfgs, _gpu_bytes(cfgs[0], device))
        logger.info("GPU memory: about %.1f GB (docs/memory.md)", memory.gpu_peak(cfgs, part_bytes) / 1e9)
        return
    machine.log_need(memory.peak(cfgs, len(stream.acts), stream.acts.token_bytes))


def _states(cfg: config.Train, dpath: pathlib.Path, world: parallel.World) -> list[int]:
    """Step numbers of the saved states that the run can continue from."""
    if not state.saved(dpath):
        return []
    return state.usable(dpath, Run(cfg, dpath, devices.pick(cfg.device), world).restore)


def _stream(cfg: config.Train, acts: activations.Activations) -> shuffled.Shuffled:
    is_on_gpu = devices.pick(cfg.device).type == "cuda"
    return shuffled.Shuffled(
        acts,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        pool_bytes=int(cfg.pool_gb * 1e9),
        n_threads=cfg.n_threads,
        pin=is_on_gpu,
        keep_half=is_on_gpu,
        direct=False if cfg.data_parallel > 1 else None,  # a node's processes share what they read
    )


def _train(
    stream: shuffled.Shuffled, cfgs: dict[pathlib.Path, config.Train], start: int, world: parallel.World
) -> list[str]:
    """Trains runs that have all done `start` steps. Returns an error line for each run that diverged."""
    device = devices.pick(next(iter(cfgs.values())).device)
    part_bytes = memory.part_bytes([*cfgs.values()], _gpu_bytes(next(iter(cfgs.values())), device))
    runs = [Run(cfg, dpath, device, world, part_bytes) for dpath, cfg in cfgs.items()]
    if start:
        logger.info("continuing after step %d: %s", start, ", ".join(d.name for d in cfgs))
    for run in runs if start else []:
        run.restore(state.load(run.dpath, start))
    with contextlib.ExitStack() as trackers:  # closed even if a run fails
        started = []
        for run in runs:
            tracker = _start_tracker(run, start, stream) if world.is_first else tracking.Tracker()
            trackers.callback(tracker.finish)
            started.append((run, tracker))
        return _Loop(stream, started, start).run()


def _gpu_bytes(cfg: config.Train, device: torch.device) -> int:
    """--gpu-gb, or what the GPU has free, less a tenth for what torch's allocator leaves unused."""
    if cfg.gpu_gb or device.type != "cuda":
        return int(cfg.gpu_gb * 1e9)
    return int(0.9 * torch.cuda.mem_get_info(device)[0])


def _start_tracker(run: Run, start: int, stream: shuffled.Shuffled) -> tracking.Tracker:
    """Writes the run's config.json and opens its metrics log."""
    cfg, dpath = run.cfg, run.dpath
    record = {
        **dataclasses.asdict(cfg),
        "architecture": type(cfg.sae).__name__,
        "objective_name": type(cfg.objective).__name__,
        "activations": stream.acts.space.describe(),
        "code": provenance.record(),
    }
    helpers.write_text(dpath / "config.json", jsonfile.seal(record))
    (dpath / "failed.json").unlink(missing_ok=True)
    return tracking.start(dpath, wandb_project=cfg.wandb_project, from_step=start)


class _Loop:
    """Steps of all runs on one stream, with their metrics, saved states and checkpoints."""

    def __init__(self, stream: shuffled.Shuffled, runs: list[tuple[Run, tracking.Tracker]], start: int):
        self.stream = stream
        self.runs = runs
        self.start = start
        self.cfg, self.device, self.world = runs[0][0].cfg, runs[0][0].device, runs[0][0].world
        self.batches = batches.Batches(stream.batches(start))
        self.lost: list[str] = []
        self.saved_s = time.monotonic()

    def run(self) -> list[str]:
        n_steps = self.cfg.n_steps
        steps = helpers.progress(
            range(self.start, n_steps), f"train {len(self.runs)} SAE(s)", n_steps - self.start, "steps"
        )
        with interrupts.Interrupts() as signals:
            for step in steps:
                self.step(step)
                if not self.runs:
                    return self.lost
                self.save_if_due(step + 1, signals)
            self._drop_lost(n_steps - 1, [], check_weights=True)
            if self.world.is_first:
                for run, tracker in self.runs:
                    tracker.flush()
                    nn.save(run.finished(), run.dpath / "sae.pt", self.stream.acts.space.describe())
                    state.remove(run.dpath)
            (asked,) = self._any(signals.asked is not None)
            if asked:
                signals.act()
        return self.lost

    def step(self, step: int) -> None:
        """One step of every run, on the same batch."""
        if step == 0:
            self._fit_starts()
        x_BD = next(self.batches).to(self.device, non_blocking=True).float()
        outs = [run.step(step, x_BD) for run, _ in self.runs]
        logs = self.cfg.logs_at(step)
        if logs or self.device.type == "cpu":
            outs = self._drop_lost(step, outs)
        if logs and self.world.is_first:
            rates = self.batches.rates(len(x_BD))
            for (run, tracker), out in zip(self.runs, outs, strict=True):
                tracker.log(step, {**run.measure(step, x_BD, out), **rates})

    def _fit_starts(self) -> None:
        """Initialises from data, on many activations. Training then sees these activations too."""
        n_acts, size = len(self.stream.acts), self.cfg.batch_size
        wanted = [memory.n_start(run.cfg, n_acts) for run, _ in self.runs]
        x_ND = self.batches.peek(max(wanted)).to(self.device).float()
        for (run, _), n in zip(self.runs, wanted, strict=True):
            run.start(x_ND[: math.ceil(n / size) * size])  # as many as it would read alone
        self._warn_of_outliers(x_ND[: math.ceil(memory.n_read_first(x_ND.shape[1], n_acts) / size) * size])

    def _warn_of_outliers(self, x_ND: Tensor) -> None:
        """Warns of a few activations, or one dimension, that will dominate the loss."""
        is_clipped = all(run.cfg.max_norm_ratio for run, _ in self.runs)
        run = self.runs[0][0]
        found = robust.shares(robust.totals(run.in_units(x_ND), run.around))
        if found["extreme_variance_frac"] > 0.5 and not is_clipped:
            logger.warning(
                "%.3g%% of the activations have an extreme norm and hold %.3g%% of the variance, so they "
                "will dominate the loss. Pass --max-norm-ratio 5 (docs/training.md).",
                100 * found["extreme_frac"],
                100 * found["extreme_variance_frac"],
            )
            return
        variance_D = x_ND[:: math.ceil(len(x_ND) / SEEN)].var(dim=0)
        share, dimension = (variance_D / variance_D.sum().clamp(min=1e-30)).max(dim=0)
        if share > 0.5 and any(run.cfg.sae.normalize != "per-dim" for run, _ in self.runs):
            logger.warning(
                "dimension %d holds %.3g%% of the activations' variance, so most latents may never fire. "
                "Pass --sae.normalize per-dim (docs/training.md).",
                dimension.item(),
                100 * share.item(),
            )

    def _any(self, *flags: bool) -> list[bool]:
        """Each flag: is it set in any process?"""
        if self.world.size == 1:
            return list(flags)
        return self.world.any(torch.tensor(flags, device=self.device)).tolist()

    def _drop_lost(
        self, step: int, outs: list[objectives.Output], check_weights: bool = False
    ) -> list[objectives.Output]:
        """Drops runs whose loss or gradient is not finite. With `check_weights`, scans all weights too."""
        is_good = [run.is_sound() if check_weights else bool(run.is_finite) for run, _ in self.runs]
        if all(is_good := [not bad for bad in self._any(*(not good for good in is_good))]):
            return outs
        for (run, _), good in zip(self.runs, is_good, strict=True):
            if not good:
                self.lost.append(self._lose(run, step))
        self.runs = [pair for pair, good in zip(self.runs, is_good, strict=True) if good]
        return [out for out, good in zip(outs, is_good, strict=False) if good]

    def _lose(self, run: Run, step: int) -> str:
        """Saves the last finite state of a diverged run as a checkpoint. Returns an error line."""
        reason = f"run {run.dpath.name}: the loss or a weight is not finite at step {step}. "
        reason += f"Lower --lr (now {run.cfg.lr})"
        if self.world.is_first:
            if steps := state.usable(run.dpath, run.restore):  # which restores the newest
                fpath = run.dpath / "last-good.pt"
                nn.save(run.finished(), fpath, self.stream.acts.space.describe())
                reason += f"; {fpath} is the SAE after step {steps[-1]}"
            else:
                reason += "; no state was saved before that (--save-every)"
            record = {"step": step, "reason": reason}
            helpers.write_text(run.dpath / "failed.json", jsonfile.seal(record))
        logger.warning("%s", reason)
        return f"{reason}."

    # ---- saved states ----

    def save_if_due(self, n_done: int, signals: interrupts.Interrupts) -> None:
        """Saves states every --save-every minutes, and on a signal to stop, which then acts."""
        due = time.monotonic() - self.saved_s >= 60 * self.cfg.save_every
        asked, due = self._any(signals.asked is not None, due)  # the same in all processes
        if not (asked or due) or n_done == self.cfg.n_steps:
            return
        self._drop_lost(n_done - 1, [], check_weights=True)
        if self.world.is_first and self.runs:
            for run, tracker in self.runs:
                tracker.flush()
                state.save(run.dpath, n_done, run.state(), self.cfg.keep_last)
            logger.info("saved the state after step %d of %d", n_done, self.cfg.n_steps)
        self.saved_s = time.monotonic()
        if asked:
            signals.act()
