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
) -> list[Float64[np.ndarray, "_ T"]]:
    """Scores `others` by ridge regression (Hoerl and Kennard 1970) from images' mean activations to each
    trait.

    Dimensions are scaled to variance 1 on the train images. The penalty minimises the leave-one-out error on
    them. A trait without a positive (or negative) train image gets a constant score.
    """
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
