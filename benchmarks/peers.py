"""SAEs of three other libraries, each trained by its own trainer on batches that the caller hands out.

SAELens 6.54 (`sae_lens`), dictionary_learning 0.1.0 and overcomplete 0.3.0 are in the dependency group `peers`.
Set here for all of them: width, k, batches, number of steps, seed. All else is as each library's documentation
advises, with one exception: warm-ups and windows made for runs of 10^5 steps (see `shortened`) end within a tenth
of a short run, since the trainers would refuse it or never look for dead latents.

Shape letters: B batch, D d_vit, S latents.
"""

import collections.abc
import importlib.util
import pathlib
import tempfile
import typing as tp

import numpy as np
import torch
from torch import Tensor

Batches = collections.abc.Callable[[int], Tensor]
"""step -> activations (B, D), float32."""
Kind = tp.Literal["TopK", "BatchTopK"]


class Task(tp.NamedTuple):
    """What every library is given alike."""

    kind: Kind
    batches: Batches
    n_steps: int
    d_sae: int
    k: int
    seed: int
    lr_factor: float = 1.0
    """Times the library's own learning rate."""
    device: str = "cpu"
    """Of the batches. Only SAELens's adapter trains elsewhere."""

    @property
    def batch_size(self) -> int:
        return len(self.batches(0))

    @property
    def d_vit(self) -> int:
        return self.batches(0).shape[1]

    def shortened(self, n: int) -> int:
        """A default of n steps, at most a tenth of the run."""
        return min(n, self.n_steps // 10)


class Trained(tp.NamedTuple):
    """An SAE in evaluation mode; activations go in and come out in raw units."""

    decoder_SD: np.ndarray
    """Rows of norm 1."""
    reconstruct: collections.abc.Callable[[Tensor], tuple[Tensor, Tensor]]
    """x_BD -> (x_hat_BD, f_BS)."""
    threshold: float | None
    """BatchTopK: what a latent must exceed to fire. TopK: None."""
    set_threshold: collections.abc.Callable[[float], None] | None


Train = collections.abc.Callable[[Task], Trained]


def installed() -> tuple[dict[str, Train], list[str]]:
    """Adapters by the library's name, and the names of those that are not installed. Imports none of them."""
    adapters = {
        "sae_lens": ("SAELens", sae_lens),
        "dictionary_learning": ("dictionary_learning", dictionary_learning),
        "overcomplete": ("overcomplete", overcomplete),
    }
    found = {module: importlib.util.find_spec(module) is not None for module in adapters}
    return (
        {name: train for module, (name, train) in adapters.items() if found[module]},
        [name for module, (name, _) in adapters.items() if not found[module]],
    )


def sae_lens(task: Task) -> Trained:
    """`TopKTrainingSAE`, `BatchTopKTrainingSAE` with `SAETrainer`.

    Learning rate 3e-4, as in its configs, falling to 0 over the last fifth, as in its documentation. Scale: as
    its normalisation "expected_average_only_in" gives (mean norm sqrt(D)), but applied here: in 6.54 folding it
    into the weights leaves BatchTopK's threshold behind in the other unit. Window of dead latents 1,000 steps,
    shortened. Evaluated as what it saves for inference.
    """
    import sae_lens as lib
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    scale = task.d_vit**0.5 / task.batches(0).norm(dim=1).mean().item()
    lr = 3e-4 * task.lr_factor
    cfg = SAETrainerConfig(
        total_training_samples=task.n_steps * task.batch_size,
        train_batch_size_samples=task.batch_size,
        lr=lr,
        lr_end=lr / 10,
        lr_decay_steps=task.n_steps // 5,
        dead_feature_window=task.shortened(1000),
    )
    torch.manual_seed(task.seed)
    sae_cls = getattr(lib, f"{task.kind}TrainingSAE")
    cfg_cls = getattr(lib, f"{task.kind}TrainingSAEConfig")
    sae = sae_cls(cfg_cls(d_in=task.d_vit, d_sae=task.d_sae, k=task.k, device=task.device))
    trainer = SAETrainer(cfg, sae, iter(()))
    for step in range(task.n_steps):
        trainer.step(task.batches(step) * scale)
        trainer.n_training_steps += 1
    with tempfile.TemporaryDirectory() as dpath:
        sae.save_inference_model(pathlib.Path(dpath))
        model = lib.SAE.load_from_disk(dpath).eval()

    def reconstruct(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        f_BS = model.encode(x_BD * scale)
        return model.decode(f_BS) / scale, f_BS

    if task.kind == "TopK":
        return Trained(_unit(model.W_dec), reconstruct, None, None)
    threshold = model.threshold.data
    return Trained(_unit(model.W_dec), reconstruct, threshold[0].item(), threshold.fill_)


def dictionary_learning(task: Task) -> Trained:
    """`AutoEncoderTopK` with `TopKTrainer`, `BatchTopKSAE` with `BatchTopKTrainer`.

    Learning rate by the trainers' rule (2e-4 / sqrt(S / 2^14)), falling to 0 over the last fifth as in the authors'
    demonstration. Activations scaled to a mean squared norm of 1, as its README advises. Shortened: warm-up
    (1,000 steps), first step of the threshold's average (1,000), window of dead latents (10 million activations).
    """
    from dictionary_learning.trainers import batch_top_k, top_k

    norm = task.batches(0).square().sum(dim=1).mean().sqrt().item()
    trainer_cls = top_k.TopKTrainer if task.kind == "TopK" else batch_top_k.BatchTopKTrainer
    trainer = trainer_cls(
        steps=task.n_steps,
        activation_dim=task.d_vit,
        dict_size=task.d_sae,
        k=task.k,
        layer=0,
        lm_name="",
        lr=2e-4 / (task.d_sae / 2**14) ** 0.5 * task.lr_factor,
        warmup_steps=task.shortened(1000),
        decay_start=task.n_steps - task.n_steps // 5,
        threshold_start_step=task.shortened(1000),
        seed=task.seed,
        device="cpu",
    )
    window = task.n_steps * task.batch_size // 10
    trainer.dead_feature_threshold = min(trainer.dead_feature_threshold, window)
    for step in range(task.n_steps):
        trainer.update(step, task.batches(step) / norm)
    ae = trainer.ae.eval()

    def reconstruct(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        f_BS = ae.encode(x_BD / norm)
        return ae.decode(f_BS) * norm, f_BS

    decoder_SD = _unit(ae.decoder.weight.T)
    if task.kind == "TopK":
        return Trained(decoder_SD, reconstruct, None, None)
    return Trained(decoder_SD, reconstruct, float(ae.threshold), ae.threshold.data.fill_)


def overcomplete(task: Task) -> Trained:
    """`TopKSAE`, `BatchTopKSAE` (whose top_k counts the whole batch) with `train_sae`.

    Learning rate 5e-4 without schedule, as in its README; loss: mean squared error less 1e-3 times the mean
    pre-activation of the latents that no activation of the batch fires, as its documentation recommends. Its
    examples are of unit variance in each dimension: activations are scaled to a mean square of 1.
    """
    import matplotlib.cm

    if not hasattr(matplotlib.cm, "get_cmap"):  # its plots want what matplotlib 3.9 removed
        matplotlib.cm.get_cmap = matplotlib.colormaps.get_cmap
    from overcomplete import sae as lib

    rms = task.batches(0).square().mean().sqrt().item()
    torch.manual_seed(task.seed)
    if task.kind == "TopK":
        sae = lib.TopKSAE(task.d_vit, task.d_sae, top_k=task.k)
    else:
        sae = lib.BatchTopKSAE(task.d_vit, task.d_sae, top_k=task.k * task.batch_size)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-4 * task.lr_factor)
    batches = (task.batches(step) / rms for step in range(task.n_steps))
    lib.train_sae(sae, batches, _reviving, optimizer, nb_epochs=1, monitoring=0)
    sae.eval()

    def reconstruct(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        _, f_BS = sae.encode(x_BD / rms)
        return sae.decode(f_BS) * rms, f_BS

    decoder_SD = _unit(sae.get_dictionary())
    if task.kind == "TopK":
        return Trained(decoder_SD, reconstruct, None, None)
    threshold = sae.running_threshold
    return Trained(decoder_SD, reconstruct, threshold.item(), threshold.fill_)


def _reviving(x_BD: Tensor, x_hat_BD: Tensor, pre_BS: Tensor, f_BS: Tensor, _decoder_SD: Tensor) -> Tensor:
    silent_S = (f_BS <= 0).all(dim=0)
    return (x_BD - x_hat_BD).square().mean() - 1e-3 * (pre_BS * silent_S).mean()


def _unit(W_dec: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(W_dec.detach(), dim=1).numpy().copy()
