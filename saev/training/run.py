"""One SAE in training: its model, optimiser, counters and training step.

B batch, C dead latents, D d_vit, N activations, P prefixes, S latents.
"""

import copy
import pathlib
import typing as tp

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev import devices, nn
from saev.formats import tensors
from saev.nn import kernels, metrics, objectives, optim, robust
from saev.training import config, parallel

DEAD_EVERY = 10
"""Steps between updates of AuxK's list of dead latents. On a GPU, each takes the list of the update before,
whose copy to the CPU has arrived by then: the length of a new one would have to be waited for."""


class Run:
    """One SAE in training.

    Args:
        cfg: with sae.d_vit set.
        world: the processes among which its batches are divided.
        part_bytes: see `objectives.Objective`.
    """

    def __init__(
        self,
        cfg: config.Train,
        dpath: pathlib.Path,
        device: torch.device,
        world: parallel.World = parallel.World(),  # noqa: B008
        part_bytes: int = 2**33,
    ):
        self.cfg = cfg
        self.dpath = dpath
        self.device = device
        self.world = world
        self.sae = nn.SparseAutoencoder(cfg.sae, cfg.seed).to(device)
        self.averaged = copy.deepcopy(self.sae.state_dict()) if cfg.ema else None
        self.objective = objectives.Objective(
            self.sae,
            cfg.objective,
            gather=world.all_values,
            n_processes=world.size,
            is_bfloat16=cfg.precision == "bfloat16",
            part_bytes=part_bytes,
        )
        zero = torch.zeros((), device=device)
        self.around = robust.Typical(zero.repeat(self.sae.d_vit), zero, zero)
        self.optimizer = optim.Adam(self.sae, cfg.max_grad_norm)
        self.tokens_since_fired_S = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=device)
        self.dead_C: Tensor | None = None
        self.next_dead: devices.OnItsWay | None = None
        """On a GPU: which latents were dead at the last update of the list."""
        self.fired_S = torch.zeros(self.sae.d_sae, dtype=torch.bool, device=device)
        self.grad_norm = torch.zeros(())
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)

    @jaxtyped(typechecker=beartype.beartype)
    def start(self, x_ND: Float[Tensor, "N D"]) -> None:
        """Initialises from data, before the first step. N should be much larger than a batch."""
        self.around = self.sae.initialize(x_ND.to(self.device))
        if self.averaged is not None:
            self.averaged = copy.deepcopy(self.sae.state_dict())

    @jaxtyped(typechecker=beartype.beartype)
    def step(self, step: int, x_BD: Float[Tensor, "B D"]) -> objectives.Output:
        """Forward, backward, update. x_BD: the whole batch, on this run's device.

        `is_finite` becomes False if the loss or gradient is not finite in any process. On a CPU nothing is
        updated then; on a GPU the update goes on, because a check would wait for the device.
        """
        with devices.tf32(self.cfg.precision != "float32"):
            return self._step(step, x_BD)

    def _step(self, step: int, x_BD: Tensor) -> objectives.Output:
        x_BD = self.clip(x_BD)
        if self._resamples_at(step):
            self.resample(step, x_BD)
        mine_BD = self.world.share(x_BD)
        for parameter in self.sae.parameters():
            parameter.grad = None
        out = self.objective(
            mine_BD,
            sparsity=self.cfg.sparsity_at(step),
            end_P=self._prefixes(step),
            dead_C=self._dead(step),
            correlates=self.cfg.costly_at(step),
        )
        self.is_finite &= ~self.world.any(~out.loss.detach().isfinite())
        if not self.is_finite.is_cuda and not self.is_finite:
            return out
        out.loss.backward()
        self.world.mean(*(p.grad for p in self.sae.parameters() if p.grad is not None))
        self.grad_norm = self.optimizer.step(self.cfg.lr_at(step))
        self.is_finite &= self.grad_norm.isfinite()
        self._average(step)
        self.tokens_since_fired_S += len(x_BD)
        self.fired_S = self.world.any(out.fired_S)
        self.tokens_since_fired_S.masked_fill_(self.fired_S, 0)
        return out

    @jaxtyped(typechecker=beartype.beartype)
    def clip(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Moves activations that --max-norm-ratio calls too far from the centre."""
        if not self.cfg.max_norm_ratio:
            return x_BD
        clipped_BD = robust.clip(self.in_units(x_BD), self.around, self.cfg.max_norm_ratio)
        return clipped_BD if self.sae.scale.ndim == 0 else clipped_BD / self.sae.scale

    def in_units(self, x_BD: Tensor) -> Tensor:
        """Activations in the units of `around`: raw, or with per-dim scaled."""
        return x_BD if self.sae.scale.ndim == 0 else x_BD * self.sae.scale

    def _prefixes(self, step: int) -> Tensor | None:
        lengths = objectives.prefixes(self.cfg.objective, self.sae.d_sae, self.cfg.seed, step)
        return None if lengths is None else torch.tensor(lengths)

    def _dead(self, step: int) -> Tensor | None:
        """Dead latents for AuxK, or None without AuxK."""
        if not getattr(self.cfg.sae, "aux_coeff", 0):
            return None
        if step % DEAD_EVERY == 0 or self.dead_C is None:
            self.dead_C = self._updated_dead()
        return self.dead_C

    def _updated_dead(self) -> Tensor:
        is_dead_S = self._is_dead_S()
        if kernels.available(is_dead_S):
            return is_dead_S.nonzero().flatten()
        last, self.next_dead = self.next_dead, devices.OnItsWay(is_dead_S)
        if last is None:
            return (
                torch.zeros(0, dtype=torch.int64, device=self.device) if self.dead_C is None else self.dead_C
            )
        return devices.send(last.arrived().nonzero().flatten(), self.device)

    def _is_dead_S(self) -> Tensor:
        return self.tokens_since_fired_S >= self.cfg.window

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Weight EMA with decay warm-up, so that the initialisation is soon forgotten."""
        if self.averaged is None:
            return
        decay = min(self.cfg.ema, (1 + step) / (10 + step))
        parameters = dict(self.sae.named_parameters())
        for name, tensor in self.sae.state_dict().items():
            if name in parameters:
                self.averaged[name].lerp_(tensor, 1 - decay)
            else:  # the scale, and a threshold that is already an average
                self.averaged[name].copy_(tensor)

    # ---- resampling ----

    def _resamples_at(self, step: int) -> bool:
        every = getattr(self.cfg.sae, "resample_every", 0)
        return bool(every) and step > 0 and step % every == 0 and step < 0.8 * self.cfg.n_steps

    @torch.no_grad()
    @jaxtyped(typechecker=beartype.beartype)
    def resample(self, step: int, x_BD: Float[Tensor, "B D"]) -> None:
        """Points dead latents at badly reconstructed activations ("Neuron Resampling", Bricken et al. 2023).

        Activations are drawn with probability proportional to their squared loss. The encoder vector gets a
        fifth of the alive latents' mean norm, its bias becomes 0, and Adam's moments are reset.
        """
        dead_C = self._is_dead_S().nonzero().flatten()
        if len(dead_C) == 0:
            return
        sae = self.sae
        x_hat_BD = torch.cat([sae(x_BD[rows])[0] for rows in self.objective.rows(x_BD)])
        loss_B = self.in_units(x_BD - x_hat_BD).square().sum(dim=1).cpu()
        generator = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + step)
        chosen_C = torch.multinomial(
            loss_B.double().square() + 1e-30, len(dead_C), replacement=True, generator=generator
        )
        chosen_CD = x_BD[chosen_C.to(x_BD.device)] * sae.scale - sae.b_dec
        unit_CD = torch.nn.functional.normalize(chosen_CD, dim=1)
        alive_S = ~self._is_dead_S()
        norm = sae.W_enc[:, alive_S].norm(dim=0).mean() if alive_S.any() else 1.0
        sae.W_dec[dead_C] = unit_CD
        sae.W_enc[:, dead_C] = 0.2 * norm * unit_CD.T
        sae.b_enc[dead_C] = 0
        self.optimizer.forget(dead_C)
        self.tokens_since_fired_S[dead_C] = 0

    # ---- metrics ----

    @torch.no_grad()
    def measure(self, step: int, x_BD: Tensor, out: objectives.Output) -> dict[str, float]:
        """Metrics of this step's (clipped) batch. With several processes, of this process's rows."""
        raw_BD = self.world.share(x_BD)
        mine_BD = self.clip(raw_BD)
        W_dec = self.sae.W_dec.detach()
        costly = self.cfg.costly_at(step)
        return {
            "loss": out.loss.item(),
            **metrics.measure(mine_BD, out.x_hat_BD, out.values, self.sae.d_sae),
            **(metrics.costly(out.correlations or out.dense(), W_dec) if costly else {}),
            **robust.metrics(raw_BD, mine_BD - out.x_hat_BD),
            "avg_w_col_norm": metrics.avg_w_col_norm(W_dec),
            "dead_pct": metrics.dead_pct(self.fired_S),
            "dead_frac_window": metrics.dead_frac_window(
                self.tokens_since_fired_S, self.cfg.window, (step + 1) * len(x_BD)
            ),
            "grad_norm": self.grad_norm.item(),
            "lr": self.cfg.lr_at(step),
        }

    # ---- what is kept ----

    def is_sound(self) -> bool:
        """Whether all weights are finite, including averaged ones."""
        tensors = [*self.sae.state_dict().values(), *(self.averaged or {}).values()]
        return bool(self.is_finite) and all(bool(t.isfinite().all()) for t in tensors)

    def state(self) -> dict[str, tp.Any]:
        """All that the next steps depend on."""
        return {
            "sae": _on_cpu(self.sae.state_dict()),
            "averaged": None if self.averaged is None else _on_cpu(self.averaged),
            "optimizer": _on_cpu(self.optimizer.state_dict()),
            "around": _on_cpu(self.around._asdict()),
            "density": self.objective.density,
            "tokens_since_fired_S": self.tokens_since_fired_S.cpu(),
            "dead_C": None if self.dead_C is None else self.dead_C.cpu(),
            "next_dead_C": self.next_dead and self.next_dead.arrived().nonzero().flatten(),
        }

    def restore(self, state: dict[str, tp.Any]) -> None:
        """Restores what `state` returned.

        Raises:
            ValueError: it is of another kind of run. Nothing is changed then.
        """
        state = {"density": 1.0, "next_dead_C": None, **state}  # older states lack them
        mine = self.state()
        for name in ("dead_C", "next_dead_C"):
            mine[name] = None
            if isinstance(latent_C := state.get(name), Tensor):  # of any length
                mine[name] = torch.zeros(latent_C.numel(), dtype=torch.int64)
                if not all(0 <= latent < self.sae.d_sae for latent in latent_C.flatten().tolist()):
                    raise ValueError(f"{name} names latents that do not exist")
        tensors.check_like(state, mine)
        self.sae.load_state_dict(state["sae"])
        self.averaged = state["averaged"] and {k: v.to(self.device) for k, v in state["averaged"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.around = robust.Typical(**{k: v.to(self.device) for k, v in state["around"].items()})
        self.objective.density = state["density"]
        self.tokens_since_fired_S.copy_(state["tokens_since_fired_S"])
        self.dead_C = None if state["dead_C"] is None else state["dead_C"].to(self.device)
        self.next_dead = None
        if state["next_dead_C"] is not None and not kernels.available(self.fired_S):
            is_dead_S = torch.zeros_like(self.fired_S)
            is_dead_S[state["next_dead_C"].to(self.device)] = True
            self.next_dead = devices.OnItsWay(is_dead_S)

    def finished(self) -> nn.SparseAutoencoder:
        """A copy of the model as it is saved: with averaged weights if --ema is set, in evaluation mode."""
        sae = copy.deepcopy(self.sae)
        if self.averaged is not None:
            sae.load_state_dict(self.averaged)
            sae.normalize_decoder()
        return sae.eval().requires_grad_(False)


def _on_cpu(tree: tp.Any) -> tp.Any:
    if isinstance(tree, Tensor):
        return tree.detach().cpu().contiguous()
    return {k: _on_cpu(v) for k, v in tree.items()} if isinstance(tree, dict) else tree
