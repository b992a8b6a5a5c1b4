"""Stage 4: which prototypes of a scorer are traits that a biologist would name?"""

from saev import lazy

__getattr__ = lazy.attributes(__name__, {"average_precision": "ap"})
