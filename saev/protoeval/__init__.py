"""Stage 4: which prototypes of a scorer are traits that a biologist would name?"""

import typing as tp

from saev import lazy

if tp.TYPE_CHECKING:
    from saev.protoeval.ap import average_precision as average_precision
    from saev.protoeval.logistic import fit_each_latent as fit_each_latent
else:
    names = {"average_precision": "ap", "fit_each_latent": "logistic"}
    __getattr__, __dir__ = lazy.attributes(__name__, names)
