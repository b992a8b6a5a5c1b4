"""Fits the scorers of an experiment, or loads those of an earlier run."""

import logging
import pathlib
import typing as tp

import torch

from saev import devices, scorers
from saev.protoeval import config
from saev.protoeval.experiment import Experiment
from saev.scorers import config as scorers_config

logger = logging.getLogger("saev")


class Bank(tp.NamedTuple):
    """A fitted scorer, and the numbers K of its first prototypes that are evaluated."""

    name: str
    scorer: scorers.Scorer
    ks: tuple[int, ...]


def on_device(banks: list[Bank], cfg: config.ProtoEval) -> tuple[list[scorers.Scorer], torch.device]:
    """(their scorers on the device of the config, the device)."""
    device = devices.pick(cfg.device)
    return [bank.scorer.to(device) for bank in banks], device


def fit(experiment: Experiment) -> list[Bank]:
    """Fits k-means for each K, and other scorers once: a smaller K uses their first prototypes."""
    out = []
    for cfg, fit, name in zip(experiment.cfgs, experiment.fits, experiment.names, strict=True):
        is_per_k = isinstance(cfg.scorer, scorers_config.KMeans)
        fit_ks = sorted(set(cfg.n_prototypes)) if is_per_k else [max(cfg.n_prototypes)]
        dpath, device = pathlib.Path(cfg.scorers_to), devices.pick(cfg.device)
        fitted = scorers.fit_each(cfg.scorer, fit.acts, fit_ks, seed=cfg.seed, dpath=dpath, device=device)
        for k_max, scorer in zip(fit_ks, fitted, strict=True):
            wanted = (k_max,) if len(fit_ks) > 1 else cfg.n_prototypes
            n = scorer.n_prototypes
            if n < k_max:
                what = type(cfg.scorer).__name__
                logger.info("%s: has only %d prototypes; larger K use all of them", what, n)
            out.append(Bank(name, scorer, tuple(sorted({min(k, n) for k in wanted}))))
    return out
