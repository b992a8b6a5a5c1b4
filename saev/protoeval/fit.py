"""Fits the scorers of an experiment, or loads those of an earlier run."""

import logging
import pathlib
import typing as tp

from saev import devices, scorers
from saev.data import activations
from saev.protoeval import config
from saev.protoeval.experiment import Experiment
from saev.scorers import config as scorers_config

logger = logging.getLogger("saev")


class Bank(tp.NamedTuple):
    """A fitted scorer, and the numbers K of its first prototypes that are evaluated."""

    name: str
    scorer: scorers.Scorer
    ks: tuple[int, ...]


def fit(experiment: Experiment) -> list[Bank]:
    """Fits k-means for each K, and other scorers once: a smaller K uses their first prototypes."""
    found = zip(experiment.cfgs, experiment.fits, experiment.names, strict=True)
    return [bank for cfg, fit, name in found for bank in _banks(cfg, fit.acts, name)]


def _banks(cfg: config.ProtoEval, acts: activations.Activations, name: str) -> list[Bank]:
    is_per_k = isinstance(cfg.scorer, scorers_config.KMeans)
    fit_ks = sorted(set(cfg.n_prototypes)) if is_per_k else [max(cfg.n_prototypes)]
    fitted = scorers.fit_each(
        cfg.scorer,
        acts,
        fit_ks,
        seed=cfg.seed,
        dpath=pathlib.Path(cfg.scorers_to),
        device=devices.pick(cfg.device),
    )
    out = []
    for k_max, scorer in zip(fit_ks, fitted, strict=True):
        wanted = (k_max,) if len(fit_ks) > 1 else cfg.n_prototypes
        ks = tuple(sorted({min(k, scorer.n_prototypes) for k in wanted}))
        if scorer.n_prototypes < k_max:
            logger.info(
                "%s: has %d prototypes, which are used for all larger K",
                type(cfg.scorer).__name__,
                scorer.n_prototypes,
            )
        out.append(Bank(name, scorer, ks))
    return out
