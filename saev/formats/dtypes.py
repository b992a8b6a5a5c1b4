"""How activations are stored: float32, float16 or bfloat16, little-endian."""

import beartype
import numpy as np
from jaxtyping import Float32, Shaped, jaxtyped

STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
"""The NumPy types of the stored bytes. NumPy has no bfloat16, so its bits are stored as integers."""


@jaxtyped(typechecker=beartype.beartype)
def encode(acts: Float32[np.ndarray, "*shape"], dtype: str) -> Shaped[np.ndarray, "*shape"]:
    """Converts values to their stored form: round to nearest, ties to even, float16 overflow to infinity."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(acts).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(acts, STORED[dtype])
