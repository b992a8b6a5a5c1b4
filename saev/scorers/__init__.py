"""Prototype scorers, all behind `Scorer`: random activations, k-means, PCA, SAE latents."""

from saev import lazy

__getattr__ = lazy.attributes(
    __name__,
    {"Scorer": "base", "Prototypes": "base"}
    | dict.fromkeys(("fit", "fit_each", "load", "save", "REVISION"), "store"),
)
