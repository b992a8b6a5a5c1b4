"""What a training run is called: a hash of all that decides its weights."""

import dataclasses
import pathlib

from saev import fields, helpers
from saev.training import config

REVISION = 4
"""Raise it when the same config may give other weights."""


def run_id(cfg: config.Train, fingerprint: str) -> str:
    """Eight hex digits of a hash of what determines the weights. fingerprint: of the activations."""
    if not _uses_window(cfg):
        cfg = dataclasses.replace(cfg, dead_window=None)
    parts = {"cfg": fields.identity(cfg), "revision": REVISION, "activations": fingerprint}
    return helpers.hash_of(parts)[:8]


def old_run_id(cfg: config.Train, fingerprint: str) -> str:
    """The id in version 0.1, which also hashed fields at their defaults."""
    parts = {name: dataclasses.asdict(cfg)[name] for name in fields.result_names(config.Train)}
    usual = dataclasses.asdict(type(cfg.sae)())
    for name in ("init", "init_blend"):  # came later
        if parts["sae"][name] == usual[name]:
            del parts["sae"][name]
    if not _uses_window(cfg):
        del parts["dead_window"]
    parts |= {"revision": REVISION, "activations": fingerprint}
    parts |= {"cls": type(cfg.sae).__name__, "objective_cls": type(cfg.objective).__name__}
    return helpers.hash_of(parts)[:8]


def _uses_window(cfg: config.Train) -> bool:
    """Whether --dead-window changes the weights, not only a metric."""
    return any(getattr(cfg.sae, name, 0) for name in ("aux_coeff", "resample_every"))


def run_dpath(cfg: config.Train, fingerprint: str) -> pathlib.Path:
    """The run's folder. A folder with the run's old id is used if it exists."""
    new, old = (pathlib.Path(cfg.ckpt_to) / name(cfg, fingerprint) for name in (run_id, old_run_id))
    return old if (old / "config.json").exists() and not new.exists() else new
