"""Sparse codes: found (`search`), decoded and differentiated (`autograd`) without a dense code."""

from saev.nn.sparse.autograd import decode, encode_at, pre_activations, reconstruct
from saev.nn.sparse.codes import ByLatent, Codes, Index, bag, bag_dot, n_positive
from saev.nn.sparse.search import BatchSearch, Encoder, Gather, above, top_k

__all__ = ["decode", "encode_at", "pre_activations", "reconstruct"]
__all__ += ["ByLatent", "Codes", "Index", "bag", "bag_dot", "n_positive"]
__all__ += ["BatchSearch", "Encoder", "Gather", "above", "top_k"]
