"""Sparse autoencoders for vision transformers: dump activations, train, show images, evaluate.

`saev.nn`, `saev.data`, `saev.scorers`, `saev.codes`, `saev.visuals` and `saev.protoeval` are imported when
first used.
"""

import typing as tp

from saev import lazy

__version__ = "0.1.0"

if tp.TYPE_CHECKING:
    from saev import codes as codes
    from saev import data as data
    from saev import nn as nn
    from saev import protoeval as protoeval
    from saev import scorers as scorers
    from saev import visuals as visuals
else:
    names = ("codes", "data", "nn", "protoeval", "scorers", "visuals")
    __getattr__, __dir__ = lazy.attributes(__name__, dict.fromkeys(names, ""))
