"""The architectures, one module each. `of` finds one by the class of its config (`saev.nn.config`)."""

import importlib
import pkgutil

from saev.nn import config
from saev.nn.architectures import base

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def of(cfg: config.Sae) -> base.Architecture:
    """Returns the architecture of this config."""
    return base.REGISTRY[type(cfg)](cfg)
