"""Sparse codes: found (`search`), decoded and differentiated (`autograd`) without a dense code."""

from saev.nn.sparse.autograd import decode as decode
from saev.nn.sparse.autograd import encode_at as encode_at
from saev.nn.sparse.autograd import pre_activations as pre_activations
from saev.nn.sparse.autograd import reconstruct as reconstruct
from saev.nn.sparse.codes import ByLatent as ByLatent
from saev.nn.sparse.codes import Codes as Codes
from saev.nn.sparse.codes import Index as Index
from saev.nn.sparse.codes import bag as bag
from saev.nn.sparse.codes import bag_dot as bag_dot
from saev.nn.sparse.codes import n_positive as n_positive
from saev.nn.sparse.search import BatchSearch as BatchSearch
from saev.nn.sparse.search import Encoder as Encoder
from saev.nn.sparse.search import Gather as Gather
from saev.nn.sparse.search import above as above
from saev.nn.sparse.search import top_k as top_k
