"""Prototype scorers: random activations, k-means, PCA, SAE latents. All implement `Scorer`."""

import typing as tp

from saev import lazy

if tp.TYPE_CHECKING:
    from saev.scorers.base import Prototypes, Scorer
    from saev.scorers.store import REVISION, check_fits, fit, fit_each, kind_of, load, save, stored

    __all__ = [
        "REVISION",
        "Prototypes",
        "Scorer",
        "check_fits",
        "fit",
        "fit_each",
        "kind_of",
        "load",
        "save",
        "stored",
    ]
else:
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {"Scorer": "base", "Prototypes": "base"}
        | dict.fromkeys(
            ("check_fits", "fit", "fit_each", "kind_of", "load", "save", "stored", "REVISION"), "store"
        ),
    )
