"""The supervised reference: a linear probe for each trait. N images, D d_vit, T traits."""

import warnings

import beartype
import numpy as np
import scipy.linalg
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing
from jaxtyping import Bool, Float32, Float64, jaxtyped

ALPHAS = np.logspace(-1, 6, 15)
"""Strengths of the penalty to choose from, for each trait its own."""


@jaxtyped(typechecker=beartype.beartype)
def scores(
    train_ND: Float32[np.ndarray, "N D"],
    labels_NT: Bool[np.ndarray, "N T"],
    *others: Float32[np.ndarray, "_ D"],
) -> list[Float64[np.ndarray, "_ T"]]:
    """Ridge regression (Hoerl and Kennard 1970) from the images' mean activations to each trait; its scores of `others`.

    Dimensions are scaled to variance 1 on the train images; the penalty has the least leave-one-out error on them. A
    trait without a positive (or without a negative) train image gets a constant score.
    """
    probe = sklearn.pipeline.make_pipeline(
        sklearn.preprocessing.StandardScaler(),
        sklearn.linear_model.RidgeCV(ALPHAS, alpha_per_target=True),
    )
    with warnings.catch_warnings():
        # few images leave the least penalty's system nearly singular; leave-one-out then takes a larger one
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # one image leaves nothing out
        probe.fit(train_ND.astype(np.float64), labels_NT.astype(np.float64))
    return [_two_dim(probe.predict(x_ND.astype(np.float64))) for x_ND in others]


def _two_dim(scores: np.ndarray) -> Float64[np.ndarray, "N T"]:
    return scores.reshape(len(scores), -1)
