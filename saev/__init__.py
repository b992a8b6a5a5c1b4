"""Sparse autoencoders for vision transformers: dump activations, train, look, evaluate.

The parts are imported when first used: `saev.nn`, `saev.data`, `saev.scorers`, `saev.protoeval`.
"""

import os

from saev import lazy

# OpenMP's threads look for their next work for this many rounds (a tenth of a millisecond or so) before they sleep. By
# default they spin ten milliseconds and more, on cores that our own threads then lack. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
__getattr__ = lazy.attributes(__name__, {"data": "", "nn": "", "protoeval": "", "scorers": ""})
