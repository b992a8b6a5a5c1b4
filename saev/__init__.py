"""Sparse autoencoders for vision transformers: dump activations, train, look, evaluate.

The parts are imported when first used: `saev.nn`, `saev.data`, `saev.scorers`, `saev.protoeval`.
"""

import os
import typing as tp

from saev import lazy

# OpenMP's threads look for their next work for this many rounds (a tenth of a millisecond or so) before they sleep. By
# default they spin ten milliseconds and more, on cores that our own threads then lack. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if tp.TYPE_CHECKING:
    from saev import data as data
    from saev import nn as nn
    from saev import protoeval as protoeval
    from saev import scorers as scorers

__version__ = "0.1.0"
__getattr__, __dir__ = lazy.attributes(
    __name__, {"data": "", "nn": "", "protoeval": "", "scorers": ""}
)
