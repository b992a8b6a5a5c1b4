"""Prototype scorers, all behind `Scorer`: random activations, k-means, PCA, SAE latents."""

from saev import helpers

__getattr__ = helpers.lazy_attributes(
    __name__,
    {"Scorer": "base", "Prototypes": "base"}
    | dict.fromkeys(("fit", "fit_each", "load", "save", "REVISION"), "store"),
)
