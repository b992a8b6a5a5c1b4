"""Exact average precision. N images, K prototypes, T traits, P positives of a trait.

AP = sum over thresholds n of (R_n - R_{n-1}) P_n, with recall R and precision P; tied scores are one threshold,
as in scikit-learn's `average_precision_score`. Per image that is the mean, over the positive images i, of

    (positives scored >= i) / (images scored >= i).
"""

import beartype
import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Float64, Int64, jaxtyped

from saev import errors


@jaxtyped(typechecker=beartype.beartype)
def average_precision(
    scores_NK: Float[np.ndarray, "N K"], labels_NT: Bool[np.ndarray, "N T"]
) -> Float64[np.ndarray, "K T"]:
    """AP of every prototype for every trait. NaN where a trait has no positive (it has no AP).

    Raises:
        UserError: NaN among the scores.
    """
    ranks_NK = _ranks(scores_NK)
    ap_KT = np.full((scores_NK.shape[1], labels_NT.shape[1]), np.nan)
    for t in range(labels_NT.shape[1]):
        if labels_NT[:, t].any():
            ap_KT[:, t] = _from_ranks(ranks_NK[labels_NT[:, t]])
    return ap_KT


@jaxtyped(typechecker=beartype.beartype)
def paired_average_precision(
    scores_NT: Float[np.ndarray, "N T"], labels_NT: Bool[np.ndarray, "N T"]
) -> Float64[np.ndarray, " T"]:
    """AP of column t of the scores for trait t. NaN where a trait has no positive.

    Raises:
        UserError: NaN among the scores.
    """
    ranks_NT = _ranks(scores_NT)
    columns = zip(ranks_NT.T, labels_NT.T, strict=True)
    ap = [
        _from_ranks(rank_N[label_N][:, None])[0] if label_N.any() else np.nan
        for rank_N, label_N in columns
    ]
    return np.array(ap, np.float64)


def _ranks(scores_NK: np.ndarray) -> Int64[np.ndarray, "N K"]:
    """For each image, how many images score at least as high: the size of its threshold's retrieved set."""
    if np.isnan(scores_NK).any():
        column = int(np.isnan(scores_NK).any(axis=0).argmax())
        raise errors.UserError(
            f"prototype {column} has NaN scores. Fit the scorer again or check its checkpoint."
        )
    return scipy.stats.rankdata(-scores_NK, method="max", axis=0).astype(np.int64)


def _from_ranks(ranks_PK: Int64[np.ndarray, "P K"]) -> Float64[np.ndarray, " K"]:
    """AP of each column from the ranks of the positives alone."""
    n_positive = len(ranks_PK)
    ranks_PK = np.sort(ranks_PK, axis=0)
    found_PK = np.broadcast_to(np.arange(1, n_positive + 1)[:, None], ranks_PK.shape).copy()
    # Tied positives share one threshold: each counts all of its tie, that is the last one's place.
    found_PK[:-1][ranks_PK[:-1] == ranks_PK[1:]] = n_positive
    found_PK = np.minimum.accumulate(found_PK[::-1], axis=0)[::-1]
    return (found_PK / ranks_PK).mean(axis=0)
