"""Sparse autoencoders for vision transformers: dump activations, train, look, evaluate.

The parts are imported when first used: `saev.nn`, `saev.data`, `saev.scorers`, `saev.protoeval`.
"""

from saev import helpers

__version__ = "0.1.0"
__getattr__ = helpers.lazy_attributes(
    __name__, {"data": "", "nn": "", "protoeval": "", "scorers": ""}
)
