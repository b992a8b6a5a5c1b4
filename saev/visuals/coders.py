"""When latents, prototypes and units fire on patches, as sparse codes.

B images of a block, P patches, X patches of all images of a block, D d_vit, S latents (or prototypes, or
units), n codes, C chosen latents.
"""

import abc
import dataclasses
import pathlib

import numpy as np
import torch
from torch import Tensor

from saev import errors, helpers, nn, scorers
from saev.data import activations, ordered
from saev.formats.codeshards import Csr
from saev.nn import metrics
from saev.scorers import base, rows
from saev.scorers import config as scorers_config
from saev.scorers import sae as scorers_sae
from saev.visuals import config

SAMPLED = 1024
"""Images whose patches give the units' means and deviations."""
CONSTANT = 1e-6
"""A unit never fires if its standard deviation is at most this fraction of its mean (rounding error)."""


class Coder(abc.ABC):
    """What a gallery shows."""

    kind: str
    """sae, kmeans, random, pca or units."""
    noun: str
    fires: str
    """A sentence that says when one fires on a patch."""
    is_signed: bool = False
    """Values may be negative. Such values are neither ranked nor drawn."""
    is_ranked_by_score: bool = False
    """Images are ranked by the score of all patches (`peaks`), not only of those that fire."""

    def __init__(self, n: int, device: torch.device):
        self.n = n
        self.device = device

    @abc.abstractmethod
    def __call__(self, x_XD: Tensor) -> Csr:
        """The latents that fire on each patch, and their values, float32 and not 0."""

    @abc.abstractmethod
    def vectors(self) -> Tensor | None:
        """(S, D) directions to compare by cosine, if they are not orthogonal by construction."""

    @abc.abstractmethod
    def digest(self) -> str:
        """Hash of everything that affects the codes."""

    def scores(self, acts_XD: Tensor, chosen_C: np.ndarray | None = None) -> Tensor:
        """(X, C) scores, if images are ranked by them."""
        raise NotImplementedError

    def of(self, scores_XS: Tensor) -> Csr:
        """What fires, from all scores, if images are ranked by them."""
        raise NotImplementedError


class SaeCoder(Coder):
    """Latents of an SAE in evaluation mode."""

    kind, noun = "sae", "latent"
    fires = "A latent fires on a patch if its code is not 0."

    def __init__(self, sae: nn.SparseAutoencoder):
        super().__init__(sae.d_sae, sae.W_enc.device)
        self.sae = sae
        self.is_signed = sae.architecture.is_signed
        self._latents = scorers_sae.SaeLatents(sae, self.n)
        self._rows_of = rows.of_sae(self._latents, above=metrics.EPS_ACTIVE)

    def __call__(self, x_XD: Tensor) -> Csr:
        return self._rows_of(x_XD)

    def vectors(self) -> Tensor:
        return self.sae.W_dec

    def digest(self) -> str:
        return self._latents.digest()


class PrototypeCoder(Coder):
    """Prototypes: a patch fires the one with the highest score."""

    noun, is_ranked_by_score = "prototype", True

    def __init__(self, scorer: scorers.Prototypes, kind: str):
        super().__init__(scorer.n_prototypes, scorer.mean_D.device)
        self.scorer = scorer
        self.kind = kind
        self.fires = (
            f"A patch fires the prototype with the highest score ({self.formula}). Top images have the "
            "highest scores on any patch. Heat is the score above the prototype's mean score."
        )

    @property
    def formula(self) -> str:
        return scorers_config.FORMULAS[self.scorer.similarity]

    def __call__(self, x_XD: Tensor) -> Csr:
        return self.of(self.scores(x_XD))

    def of(self, scores_XS: Tensor) -> Csr:
        value_X, latent_X = scores_XS.max(dim=1)
        start_X1 = np.arange(len(scores_XS) + 1)
        return Csr(start_X1, latent_X.int().cpu().numpy(), value_X.float().cpu().numpy())

    def scores(self, acts_XD: Tensor, chosen_C: np.ndarray | None = None) -> Tensor:
        scorer = self.scorer
        if chosen_C is not None:
            scorer = scorer.only(torch.from_numpy(chosen_C).to(acts_XD.device))
        return scorer(acts_XD)

    def vectors(self) -> Tensor:
        return self.scorer.direction_KD

    def digest(self) -> str:
        return self.scorer.digest()


class UnitCoder(Coder):
    """The ViT's units: a dimension fires where its value is far above its mean."""

    kind, noun = "units", "unit"

    def __init__(self, mean_D: Tensor, cutoff_D: Tensor, deviations: float):
        super().__init__(len(mean_D), mean_D.device)
        self.mean_D, self.cutoff_D = mean_D, cutoff_D
        self.fires = (
            f"A unit fires on a patch if its value is more than {deviations:g} standard deviations above its "
            "mean. The value shown is the value minus the mean."
        )

    @staticmethod
    def fit(acts: activations.Activations, deviations: float, device: torch.device) -> "UnitCoder":
        """Means and deviations from at most SAMPLED images, evenly spaced in the data set."""
        n = min(SAMPLED, acts.n_imgs)
        images = acts.image_is_N[np.linspace(0, acts.n_imgs - 1, n).astype(np.int64)]
        total_D, square_D = np.zeros((2, acts.d_vit))
        stream = ordered.Ordered(acts.only(images.tolist()))
        n_patches = len(stream.acts)
        for block in helpers.progress(stream, "units' means", len(stream), "blocks"):
            x_XD = stream.rows(block).astype(np.float64)
            total_D += x_XD.sum(axis=0)
            square_D += np.square(x_XD).sum(axis=0)
        mean_D = total_D / n_patches
        std_D = np.sqrt(np.maximum(square_D / n_patches - mean_D**2, 0))
        std_D[std_D <= CONSTANT * np.abs(mean_D)] = np.inf
        mean_D, cutoff_D = mean_D.astype(np.float32), (deviations * std_D).astype(np.float32)
        return UnitCoder(
            torch.from_numpy(mean_D).to(device), torch.from_numpy(cutoff_D).to(device), deviations
        )

    def __call__(self, x_XD: Tensor) -> Csr:
        above_XD = x_XD - self.mean_D
        fires_XD = (above_XD > self.cutoff_D) & (above_XD > metrics.EPS_ACTIVE)
        return rows.of_dense(torch.where(fires_XD, above_XD, 0))

    def vectors(self) -> None:
        return None

    def digest(self) -> str:
        return base.digest("units", [self.mean_D, self.cutoff_D])


def load(cfg: config.Visuals, acts: activations.Activations, device: torch.device) -> Coder:
    """Loads what a gallery shows.

    Raises:
        UserError: no file is given, it is damaged or of another kind, or it does not fit the activations.
    """
    match cfg.shown:
        case config.Units(deviations=deviations):
            return UnitCoder.fit(acts, deviations, device)
        case config.Sae(ckpt=ckpt):
            if not ckpt:
                raise errors.UserError("--ckpt is missing: pass the sae.pt that train.py printed.")
            sae = nn.load(ckpt, str(device))
            sae.check_fits(acts.space, ckpt, acts.given)
            return SaeCoder(sae)
        case config.Fitted(path=path, similarity=similarity):
            return _fitted(path, similarity, acts, device)


def _fitted(
    path: str, similarity: config.Similarity, acts: activations.Activations, device: torch.device
) -> Coder:
    if not path:
        raise errors.UserError(
            "--scorer.path is missing: pass a file that protoeval.py wrote (scorers/*.bin)."
        )
    scorer = scorers.load(path)
    if not isinstance(scorer, scorers.Prototypes):
        raise errors.UserError(f"--scorer.path {path}: is an SAE. Pass it as --ckpt.")
    scorers.check_fits(scorer, acts, f"--scorer.path {path}")
    if similarity != "saved":
        scorer = dataclasses.replace(scorer, similarity=similarity)
    return PrototypeCoder(scorer.to(device), scorers.kind_of(pathlib.Path(path)))


def title(cfg: config.Visuals, layer: int) -> str:
    """The gallery's title: the run's name, the fitted scorer's file, or the layer."""
    match cfg.shown:
        case config.Sae(ckpt=ckpt) if not ckpt.endswith(".bin"):  # of an untrained SAE
            return pathlib.Path(ckpt).resolve().parent.name
        case config.Sae(ckpt=path) | config.Fitted(path=path):
            return pathlib.Path(path).stem
        case _:
            return f"units of layer {layer}"


def describe(coder: Coder) -> str:
    """Architecture or similarity, in words."""
    if isinstance(coder, SaeCoder):
        return type(coder.sae.cfg).__name__
    return coder.formula if isinstance(coder, PrototypeCoder) else "activations"
