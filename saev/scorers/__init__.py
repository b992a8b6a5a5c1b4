"""Prototype scorers: random activations, k-means, PCA, SAE latents. All implement `Scorer`."""

import typing as tp

from saev import lazy

if tp.TYPE_CHECKING:
    from saev.scorers.base import Prototypes as Prototypes
    from saev.scorers.base import Scorer as Scorer
    from saev.scorers.store import (
        REVISION as REVISION,
    )
    from saev.scorers.store import (
        fit as fit,
    )
    from saev.scorers.store import (
        fit_each as fit_each,
    )
    from saev.scorers.store import (
        load as load,
    )
    from saev.scorers.store import (
        save as save,
    )
else:
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {"Scorer": "base", "Prototypes": "base"}
        | dict.fromkeys(("fit", "fit_each", "load", "save", "REVISION"), "store"),
    )
