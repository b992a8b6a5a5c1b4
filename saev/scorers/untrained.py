"""SAEs before training as prototypes: what the shape of a trained SAE gives without what it learned."""

import torch

from saev import errors, nn
from saev.data import activations
from saev.scorers import config, random, sae

N_SAMPLES = 65_536
"""Activations for the scale and the decoder bias; as many as training uses."""


def fit(cfg: config.Untrained, acts: activations.Activations, seed: int) -> sae.SaeLatents:
    """An SAE with the config of `cfg.like`, as at the start of training with this seed on these activations.

    Of what training learns, it has only the threshold that a selection over batches needs in evaluation mode.
    It lets as many latents fire as the config says.

    Raises:
        UserError: bad shards or checkpoint, or a checkpoint that was trained on other activations.
    """
    if not cfg.like:
        raise errors.UserError("--scorer.like is missing: pass the sae.pt of a trained SAE.")
    trained = nn.load(cfg.like)
    trained.check_fits(acts.space, cfg.like, acts.given)
    model = nn.SparseAutoencoder(trained.cfg, seed)
    x_ND = torch.from_numpy(random.reservoir(acts, N_SAMPLES, seed).acts_KD)
    model.initialize(x_ND)
    model.architecture.calibrate(model, x_ND)
    model.activations = trained.activations
    return sae.SaeLatents(model.eval().requires_grad_(False), model.d_sae)
