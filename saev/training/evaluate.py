"""Evaluates an SAE: metrics.json and latents.npz beside its checkpoint.

B batch, C some of the latents or dimensions, D d_vit, N activations, S latents.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import math
import pathlib

import beartype
import numpy as np
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev import devices, errors, helpers, nn
from saev.data import activations, shuffled
from saev.data import config as data_config
from saev.formats import arrays, jsonfile, metricslog
from saev.nn import metrics, robust
from saev.training import batches, config, memory

logger = logging.getLogger("saev")

ALMOST_DEAD = 1e-5
"""A latent that fires, but at a smaller fraction of activations than this, is almost dead."""
DENSE = 0.1
"""A latent that fires at a larger fraction of activations than this is dense."""

NAMES = {
    *("mse", "explained_variance", "l0", "l1", "dead_pct", "mean_abs_corr", "coherence"),
    *("avg_w_col_norm", "grad_norm", "normalized_mse", "explained_variance_per_dim"),
    *("token_nmse_median", "token_nmse_q95", "extreme_frac", "extreme_variance_frac"),
}
"""Keys that metrics.json always has."""


def ensure(dpath: pathlib.Path, cfg: config.Train, acts: activations.Activations) -> None:
    """Evaluates a finished run, unless that was done.

    Replaces results on other activations, but never results on held-out activations by results on --data.

    Args:
        acts: those of --val-data; without that flag, those of --data.
    """
    if not (dpath / "sae.pt").exists() or is_done(dpath, cfg):
        return
    n = min(cfg.n_val_patches, len(acts))
    device = devices.pick(cfg.device)
    sae = nn.load(dpath / "sae.pt").to(device)
    sae.check_fits(acts.space, str(dpath / "sae.pt"), acts.given)
    batch_size = max(1, min(cfg.batch_size, n, memory.EVALUATED_CODES // (4 * sae.d_sae)))
    shuffler = shuffled.Shuffled(
        acts,
        batch_size=batch_size,
        seed=cfg.seed + 1,
        pool_bytes=int(cfg.pool_gb * 1e9),
        n_threads=cfg.n_threads,
        keep_half=device.type == "cuda",
    )
    n_batches = math.ceil(n / batch_size)
    stream = batches.Batches(iter(shuffler))
    first_ND = stream.peek(min(n, memory.n_read_first(acts.d_vit, len(acts))))
    sums = Sums(sae, robust.typical(first_ND.to(device).float()))
    for i in helpers.progress(range(n_batches), f"evaluate {dpath.name}", n_batches, "batches"):
        sums.add(next(stream)[: n - i * batch_size].to(device).float())
    arrays.write(dpath / "latents.npz", sums.latents())
    found = {**_asked(cfg), **sums.metrics(), "grad_norm": _last_grad_norm(dpath)}
    helpers.write_text(dpath / "metrics.json", jsonfile.seal(found))


def is_done(dpath: pathlib.Path, cfg: config.Train) -> bool:
    """Whether the run is trained and metrics.json holds what `ensure` would compute."""
    try:
        fpath = dpath / "metrics.json"
        found = jsonfile.read_sealed(fpath, dict[str, object], "It is made again.", old=True)
    except (OSError, errors.UserError):  # missing, truncated or edited
        return False
    asked = json.loads(jsonfile.dumps(_asked(cfg)))
    defaults = json.loads(jsonfile.dumps(dataclasses.asdict(data_config.Shards())))
    if isinstance(data := found.get("data"), dict):  # older files lack newer fields
        found["data"] = defaults | data
    is_same = found.keys() >= NAMES and all(found.get(k) == v for k, v in asked.items())
    is_better = found.get("held_out") is True and not asked["held_out"]
    return (dpath / "sae.pt").exists() and (is_same or is_better)


def _asked(cfg: config.Train) -> dict[str, object]:
    """The evaluation data, as recorded in metrics.json."""
    held_out = bool(cfg.val_data.shard_root)
    data = cfg.val_data if held_out else cfg.data
    return {"held_out": held_out, "data": dataclasses.asdict(data), "asked": cfg.n_val_patches}


def _last_grad_norm(dpath: pathlib.Path) -> float | None:
    """The gradient norm that training logged last, or None without a log."""
    with contextlib.suppress(OSError, ValueError):
        with (dpath / "metrics.jsonl").open("rb") as fd:
            (last,) = collections.deque(fd, maxlen=1)
        return (metricslog.parse(last) or {}).get("grad_norm")
    return None


class Sums:
    """Running sums of an evaluation, in memory of the order of S + D (and metrics.MAX_CORR_LATENTS squared).

    Args:
        around: what is typical of the activations, for the figures by token.
    """

    def __init__(self, sae: nn.SparseAutoencoder, around: robust.Typical | None = None):
        self.sae = sae
        self.n = 0
        self.tokens = None if around is None else robust.Tokens(around)
        device = sae.W_dec.device
        zeros_S = torch.zeros(sae.d_sae, dtype=torch.float64, device=device)
        zeros_D = torch.zeros(sae.d_vit, dtype=torch.float64, device=device)
        self.n_fired_S, self.sum_S = zeros_S.clone(), zeros_S.clone()
        self.max_S = torch.full_like(zeros_S, -torch.inf)
        self.abs_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.correlations = metrics.CorrelationSums(sae.d_sae, device)
        self.shift_D = zeros_D
        self.x_D, self.x2_D = zeros_D.clone(), zeros_D.clone()
        self.error_D, self.error2_D = zeros_D.clone(), zeros_D.clone()

    @torch.no_grad()
    @jaxtyped(typechecker=beartype.beartype)
    def add(self, x_BD: Float[Tensor, "B D"]) -> None:
        """Adds one batch of raw activations."""
        if self.n == 0:  # squares of numbers near their mean lose no digits
            self.shift_D = x_BD.double().mean(dim=0)
        x_hat_BD, f_BS = self.sae(x_BD)
        self.n += len(x_BD)
        self.n_fired_S += (f_BS.abs() > metrics.EPS_ACTIVE).sum(dim=0)
        self.sum_S += f_BS.sum(dim=0, dtype=torch.float64)
        self.abs_sum += f_BS.abs().sum(dtype=torch.float64)
        self.correlations.add(f_BS)
        self.max_S = torch.maximum(self.max_S, f_BS.amax(dim=0).double())
        if self.tokens:
            self.tokens.add(x_BD, x_BD - x_hat_BD)
        error_BD = x_BD.double() - x_hat_BD.double()
        shifted_BD = x_BD.double() - self.shift_D
        self.x_D += shifted_BD.sum(dim=0)
        self.x2_D += shifted_BD.square().sum(dim=0)
        self.error_D += error_BD.sum(dim=0)
        self.error2_D += error_BD.square().sum(dim=0)

    def metrics(self) -> dict[str, float | int | None]:
        """Metrics over all activations as one batch, named as in the log. None if undefined (no variance)."""
        n, S = self.n, self.sae.d_sae
        spread, all_spread = _spreads(self.x_D, self.x2_D, self.shift_D, n)
        residual, all_residual = _spreads(self.error_D, self.error2_D, self.shift_D * 0, n)
        error = self.error2_D.sum().item()
        n_fired = self.n_fired_S.sum().item()
        n_dead = int((self.n_fired_S == 0).sum())
        frequency_S = self.n_fired_S / n
        return {
            "n": n,
            "mse": error / (n * self.sae.d_vit),
            "normalized_mse": error / spread if spread > 0 else None,
            "explained_variance": 1 - all_residual / all_spread if all_spread > 0 else None,
            "explained_variance_per_dim": 1 - residual / spread if spread > 0 else None,
            "explained_variance_median_dim": self._median_dim(),
            "l0": n_fired / (n * S),
            "l0_count": n_fired / n,
            "l1": self.abs_sum.item() / (n * S),
            "dead_pct": n_dead / S,
            "mean_abs_corr": self.correlations.mean_abs_corr(),
            "n_corr_latents": len(self.correlations.latent_C),
            "coherence": metrics.coherence(self.sae.W_dec),
            "avg_w_col_norm": metrics.avg_w_col_norm(self.sae.W_dec),
            "n_latents": S,
            "n_dead": n_dead,
            "n_almost_dead": int(((frequency_S > 0) & (frequency_S < ALMOST_DEAD)).sum()),
            "n_dense": int((frequency_S > DENSE).sum()),
            **(self.tokens.metrics() if self.tokens else {}),
        }

    def _median_dim(self) -> float | None:
        """Median over dimensions that vary of the explained variance of each alone."""
        n, mean_D = self.n, self.shift_D + self.x_D / self.n
        spread_D = self.x2_D - self.x_D**2 / n
        residual_D = self.error2_D - self.error_D**2 / n
        is_varying_D = spread_D > 1e-28 * n * mean_D.square()
        explained_C = 1 - residual_D[is_varying_D] / spread_D[is_varying_D]
        return explained_C.median().item() if len(explained_C) else None

    def latents(self) -> dict[str, np.ndarray]:
        """Per latent: how often it fires, its mean value when it fires, and its largest value."""
        n_fired_S = self.n_fired_S.cpu().numpy()
        return {
            "n_fired": n_fired_S.astype(np.int64),
            "frequency": n_fired_S / self.n,
            "mean_value": self.sum_S.cpu().numpy() / np.maximum(n_fired_S, 1),
            "max_value": self.max_S.cpu().numpy(),
        }


def _spreads(sum_D: Tensor, square_D: Tensor, shift_D: Tensor, n: int) -> tuple[float, float]:
    """Sums of squared deviations from each dimension's mean, and from the mean over all elements.

    Args:
        sum_D, square_D: sums of (x - shift) and (x - shift)^2 over n values x.
    """
    mean_D = shift_D + sum_D / n
    within = (square_D - sum_D**2 / n).clamp(min=0).sum().item()
    between = n * (mean_D - mean_D.mean()).square().sum().item()
    rounding = 1e-28 * n * mean_D.square().sum().item()
    a, b = (s if s > rounding else 0.0 for s in (within, within + between))
    return a, b
