"""Stage 4: which prototypes of a scorer are traits that a biologist would name?"""

from saev import helpers

__getattr__ = helpers.lazy_attributes(__name__, {"average_precision": "ap"})
