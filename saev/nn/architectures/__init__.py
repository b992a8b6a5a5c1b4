"""What tells one architecture from another: one module each, found by the class of its config (`saev.nn.config`)."""

import importlib
import pkgutil

from saev.nn import config
from saev.nn.architectures import base

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def of(cfg: config.Sae) -> base.Architecture:
    """The architecture that this config is for."""
    return base.REGISTRY[type(cfg)](cfg)
