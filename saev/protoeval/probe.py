"""The supervised reference: a linear probe per trait. N images, D d_vit, T traits."""

import warnings

import beartype
import numpy as np
import scipy.linalg
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing
from jaxtyping import Bool, Float32, Float64, jaxtyped

ALPHAS = np.logspace(-1, 6, 15)
"""Candidate penalties. Each trait gets its own."""


@jaxtyped(typechecker=beartype.beartype)
def scores(
    train_ND: Float32[np.ndarray, "N D"],
    labels_NT: Bool[np.ndarray, "N T"],
    *others: Float32[np.ndarray, "_ D"],
    known_NT: Bool[np.ndarray, "N T"] | None = None,
) -> list[Float64[np.ndarray, "_ T"]]:
    """Scores `others` by ridge regression (Hoerl and Kennard 1970) from images' mean activations to each
    trait.

    Dimensions are scaled to variance 1 on the train images. The penalty minimises the leave-one-out error on
    them. A trait without a positive (or negative) train image gets a constant score. Traits with the same
    known labels are fitted together, on the images that have these.
    """
    if known_NT is None or known_NT.all():
        return _fit(train_ND, labels_NT, others)
    out = [np.zeros((len(x_ND), labels_NT.shape[1])) for x_ND in others]
    known_GN, group_T = np.unique(known_NT.T, axis=0, return_inverse=True)
    for g, known_N in enumerate(known_GN):
        if known_N.any():
            in_group_T = group_T.ravel() == g
            found = _fit(train_ND[known_N], labels_NT[known_N][:, in_group_T], others)
            for scores_NT, part_NT in zip(out, found, strict=True):
                scores_NT[:, in_group_T] = part_NT
    return out


def _fit(train_ND: np.ndarray, labels_NT: np.ndarray, others: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    probe = sklearn.pipeline.make_pipeline(
        sklearn.preprocessing.StandardScaler(), sklearn.linear_model.RidgeCV(ALPHAS, alpha_per_target=True)
    )
    with warnings.catch_warnings():
        # With few images the smallest penalty is nearly singular; leave-one-out then chooses a larger one.
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # leave-one-out of a single image
        probe.fit(train_ND.astype(np.float64), labels_NT.astype(np.float64))
    found = (np.asarray(probe.predict(x_ND.astype(np.float64))) for x_ND in others)
    return [scores.reshape(len(scores), -1) for scores in found]
