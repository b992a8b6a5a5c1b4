"""Evaluation of a trained SAE: metrics.json and latents.npz beside its checkpoint. B batch, D d_vit, S latents."""

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

from saev import devices, helpers, nn
from saev.data import reader, shuffled
from saev.nn import metrics
from saev.training import config

logger = logging.getLogger("saev")

CODE_BYTES = 2**28
"""Bound of a dense code that is held at a time."""
ALMOST_DEAD = 1e-5
"""A latent that fires less often than this (but fires) is almost dead."""
DENSE = 0.1
"""A latent that fires more often than this is dense."""


@beartype.beartype
def ensure(dpath: pathlib.Path, cfg: config.Train) -> None:
    """Evaluates a finished run on held-out activations (--val-data; else on --data), unless that was done."""
    if not (dpath / "sae.pt").exists() or (dpath / "metrics.json").exists():
        return
    held_out = bool(cfg.val_data.shard_root)
    data = cfg.val_data if held_out else cfg.data
    acts = reader.Reader(data)
    n = min(cfg.n_val_patches, len(acts))
    device = devices.pick(cfg.device)
    sae = nn.load(dpath / "sae.pt").to(device)
    sae.check_fits(acts.describe(), str(dpath / "sae.pt"), data.shard_root)
    batch_size = max(1, min(cfg.batch_size, n, CODE_BYTES // (4 * sae.d_sae)))
    stream = shuffled.Shuffled(
        data,
        batch_size=batch_size,
        seed=cfg.seed + 1,
        pool_bytes=int(cfg.pool_gb * 1e9),
        n_threads=cfg.n_threads,
    )
    n_batches = math.ceil(n / batch_size)
    sums = Sums(sae)
    batches = helpers.progress(iter(stream), f"evaluate {dpath.name}", n_batches, "batches")
    for i, batch in zip(range(n_batches), batches, strict=False):
        sums.add(batch.act_BD[: n - i * batch_size].to(device))
    arrays = sums.latents()
    with helpers.atomic(dpath / "latents.npz") as tmp_fpath, tmp_fpath.open("wb") as fd:
        np.savez(fd, **arrays)
    found = {"held_out": held_out, "data": dataclasses.asdict(data), **sums.metrics()}
    helpers.write_text(dpath / "metrics.json", json.dumps(found, indent=4))


class Sums:
    """What an evaluation adds up, in memory of the order of S + D."""

    @beartype.beartype
    def __init__(self, sae: nn.SparseAutoencoder):
        self.sae = sae
        self.n = 0
        device = sae.W_dec.device
        zeros_S = torch.zeros(sae.d_sae, dtype=torch.float64, device=device)
        zeros_D = torch.zeros(sae.d_vit, dtype=torch.float64, device=device)
        self.n_fired_S, self.sum_S, self.max_S = zeros_S.clone(), zeros_S.clone(), zeros_S.clone()
        self.shift_D = zeros_D
        self.x_D, self.x2_D = zeros_D.clone(), zeros_D.clone()
        self.error_D, self.error2_D = zeros_D.clone(), zeros_D.clone()

    @torch.no_grad()
    @jaxtyped(typechecker=beartype.beartype)
    def add(self, x_BD: Float[Tensor, "B D"]) -> None:
        """One batch of raw activations."""
        if self.n == 0:  # squares of numbers near their mean lose no digits
            self.shift_D = x_BD.double().mean(dim=0)
        x_hat_BD, f_BS = self.sae(x_BD)
        self.n += len(x_BD)
        fires_BS = f_BS > metrics.EPS_ACTIVE
        self.n_fired_S += fires_BS.sum(dim=0)
        self.sum_S += f_BS.sum(dim=0, dtype=torch.float64)
        self.max_S = torch.maximum(self.max_S, f_BS.amax(dim=0).double())
        error_BD = x_BD.double() - x_hat_BD.double()
        shifted_BD = x_BD.double() - self.shift_D
        self.x_D += shifted_BD.sum(dim=0)
        self.x2_D += shifted_BD.square().sum(dim=0)
        self.error_D += error_BD.sum(dim=0)
        self.error2_D += error_BD.square().sum(dim=0)

    def metrics(self) -> dict[str, float | int | None]:
        """By the names that the log uses; None where activations are constant."""
        n, S = self.n, self.sae.d_sae
        spread = (self.x2_D - self.x_D**2 / n).sum().item()
        residual = (self.error2_D - self.error_D**2 / n).sum().item()
        error = self.error2_D.sum().item()
        n_fired = self.n_fired_S.sum().item()
        frequency_S = self.n_fired_S / n
        return {
            "n": n,
            "mse": error / (n * self.sae.d_vit),
            "normalized_mse": error / spread if spread > 0 else None,
            "explained_variance": 1 - residual / spread if spread > 0 else None,
            "l0": n_fired / (n * S),
            "l0_count": n_fired / n,
            "l1": self.sum_S.sum().item() / (n * S),
            "n_latents": S,
            "n_dead": int((self.n_fired_S == 0).sum()),
            "n_almost_dead": int(((frequency_S > 0) & (frequency_S < ALMOST_DEAD)).sum()),
            "n_dense": int((frequency_S > DENSE).sum()),
        }

    def latents(self) -> dict[str, np.ndarray]:
        """Of each latent: how often it fires, and its mean (where it fires) and largest value."""
        n_fired_S = self.n_fired_S.cpu().numpy()
        return {
            "n_fired": n_fired_S.astype(np.int64),
            "frequency": n_fired_S / self.n,
            "mean_value": self.sum_S.cpu().numpy() / np.maximum(n_fired_S, 1),
            "max_value": self.max_S.cpu().numpy(),
        }
