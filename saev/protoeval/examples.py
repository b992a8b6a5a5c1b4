"""What prototypes detect, and which test images they retrieve: the frames that galleries show.

N test images, K prototypes, T traits, F favourites, I images that are shown.
"""

import numpy as np
import polars as pl

from saev import helpers
from saev.formats import results
from saev.protoeval import choose, score

N_IMAGES = 9
"""Most images for each scorer and trait."""


def favourites(cells: list[choose.Cell], about: results.About, names: list[str]) -> pl.DataFrame:
    """The frame of prototypes.parquet. names: the traits' names."""
    parts = [pl.DataFrame(schema=results.FAVOURITES)]
    trait_T = np.array([helpers.printable(name) for name in names])
    for cell in cells:
        if cell.favourites is None:
            continue
        prototype_n, rank_n = np.nonzero(cell.favourites.trait_KF >= 0)
        found = {
            "prototype": prototype_n,
            "rank": rank_n,
            "trait": trait_T[cell.favourites.trait_KF[prototype_n, rank_n]],
            "train_ap": cell.favourites.train_ap_KF[prototype_n, rank_n],
        }
        parts.append(_of(cell, about, pl.DataFrame(found)).cast(pl.Schema(results.FAVOURITES)))
    return pl.concat(parts)


def retrieved(
    cells: list[choose.Cell], test: score.Split, paths: list[str], about: results.About, names: list[str]
) -> pl.DataFrame:
    """The frame of retrieved.parquet, with images of known labels. paths: those of the split's images."""
    parts = [pl.DataFrame(schema=results.RETRIEVED)]
    path_N = np.array(paths, object)
    known = [None] * len(names) if test.known_NT is None else list(test.known_NT.T)
    for cell in cells:
        if cell.favourites is None:
            continue
        best_T = cell.choices[0].best_T
        scores_TN = test.of(cell.first + best_T)
        for t, scores_N in enumerate(scores_TN):
            if np.isnan(cell.choices[0].train_ap_T[t]):
                continue  # no prototype was chosen
            image_I = highest(scores_N, known[t])
            found = {
                "trait": [helpers.printable(names[t])] * len(image_I),
                "prototype": np.full(len(image_I), best_T[t]),
                "rank": np.arange(len(image_I)),
                "image": [helpers.printable(path) for path in path_N[image_I].tolist()],
                "score": scores_N[image_I],
                "has_trait": test.labels_NT[image_I, t],
            }
            parts.append(_of(cell, about, pl.DataFrame(found)).cast(pl.Schema(results.RETRIEVED)))
    return pl.concat(parts)


def highest(scores_N: np.ndarray, known_N: np.ndarray | None = None) -> np.ndarray:
    """The images with the highest scores, the first of equal ones, without those with the lowest score: an
    SAE's latent scores 0 where it does not fire.

    Args:
        known_N: whether each image's label is known; the others are left out. None: all are.
    """
    image_I = np.argsort(-scores_N, kind="stable")
    if known_N is not None:
        image_I = image_I[known_N[image_I]]
    return image_I[scores_N[image_I] > scores_N.min(initial=np.inf)][:N_IMAGES]


def _of(cell: choose.Cell, about: results.About, frame: pl.DataFrame) -> pl.DataFrame:
    key = {"scorer": cell.scorer, "n_prototypes": cell.n_prototypes, "n_train": cell.n_train}
    key = {"scorer_id": about.scorer(cell.scorer).id} | key
    return frame.select(*(pl.lit(value).alias(name) for name, value in key.items()), pl.all())
