"""The supervised references: a logistic regression per trait on images' pooled activations.

N images, D d_vit, T traits, E inputs of a regression (directions of the activations, and 1 for the
intercept), C regressions: a trait on the train images but one fold.
"""

import beartype
import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int8, jaxtyped
from torch import Tensor

from saev import compiled
from saev.protoeval import newton_cg

PENALTIES = np.logspace(5, -1, 13)
"""Candidate penalties, from strong to weak. Each trait gets its own."""
FEW_PENALTY = 1.0
"""Of traits with fewer than two positive or negative train images: scikit-learn's default."""
N_FOLDS = 5
AT_ONCE = 12
"""Traits that a thread fits together."""


@jaxtyped(typechecker=beartype.beartype)
def scores(
    train_ND: Float32[np.ndarray, "N D"],
    labels_NT: Bool[np.ndarray, "N T"],
    *others: Float32[np.ndarray, "_ D"],
    known_NT: Bool[np.ndarray, "N T"] | None = None,
    seed: int = 0,
) -> list[Float64[np.ndarray, "_ T"]]:
    """Scores `others` by L2-penalised logistic regression from images' pooled activations to each trait.

    Dimensions are scaled to mean 0 and variance 1 on the train images. Each trait is fitted on the images
    with a known label, with the penalty that `choose_penalties` finds. A trait without a positive (or
    negative) train image gets a constant score.
    """
    known_NT = np.ones_like(labels_NT) if known_NT is None else known_NT
    mean_D, std_D = train_ND.mean(axis=0, dtype=np.float64), train_ND.std(axis=0, dtype=np.float64)
    std_D[std_D <= 1e-7 * np.abs(mean_D)] = np.inf  # constant, up to rounding
    x_NE, turn_DE = _turned((train_ND - mean_D) / std_D)
    penalty_T = torch.from_numpy(choose_penalties(x_NE, labels_NT, known_NT, seed))
    label_NT, is_used_NT = map(torch.from_numpy, (labels_NT, known_NT & (_rarer(labels_NT, known_NT) > 0)))

    def fitted(at: slice) -> Tensor:
        label_NC, is_used_NC, penalty_C = label_NT[:, at], is_used_NT[:, at], penalty_T[at]
        start_EC = x_NE.new_zeros(x_NE.shape[1], len(penalty_C))
        return newton_cg.fit(x_NE, label_NC, is_used_NC, penalty_C, start_EC)

    parts = _parts(labels_NT.shape[1], N_FOLDS * AT_ONCE)
    w_ET = torch.cat([x_NE.new_zeros(x_NE.shape[1], 0), *compiled.each_in_threads(fitted, parts)], dim=1)
    w_DT, b_T = (turn_DE @ w_ET[:-1]).numpy(), w_ET[-1].numpy()
    return [((other_ND - mean_D) / std_D) @ w_DT + b_T for other_ND in others]


@jaxtyped(typechecker=beartype.beartype)
def choose_penalties(
    x_NE: Float64[Tensor, "N E"],
    labels_NT: Bool[np.ndarray, "N T"],
    known_NT: Bool[np.ndarray, "N T"],
    seed: int,
) -> Float64[np.ndarray, " T"]:
    """Each trait's penalty with the lowest loss on held-out folds of the images with a known label.

    The folds are stratified: N_FOLDS, or as many as the rarer label has images. With fewer than two of these,
    it is FEW_PENALTY. From strong to weak penalties, a trait's search ends once the loss has risen twice in a
    row.
    """
    fold_NT = _folds(labels_NT, known_NT, seed)
    n_folds_T = fold_NT.max(axis=0, initial=-1) + 1
    penalty_T = np.full(labels_NT.shape[1], FEW_PENALTY)
    several = np.flatnonzero(n_folds_T)

    def search(at: slice) -> None:
        mine = several[at]
        penalty_T[mine] = _searched(x_NE, labels_NT[:, mine], fold_NT[:, mine], n_folds_T[mine])

    compiled.each_in_threads(search, _parts(len(several), AT_ONCE))
    return penalty_T


def _searched(
    x_NE: Tensor, labels_NT: np.ndarray, fold_NT: np.ndarray, n_folds_T: np.ndarray
) -> Float64[np.ndarray, " T"]:
    """`choose_penalties` for some traits."""
    n_traits = len(n_folds_T)
    trait_C = np.repeat(np.arange(n_traits), n_folds_T)
    fold_C = np.concatenate([np.arange(n) for n in n_folds_T])
    w_EC = x_NE.new_zeros(x_NE.shape[1], len(trait_C))
    penalty_T, best_T, last_T = np.zeros(n_traits), *np.full((2, n_traits), np.inf)
    n_risen_T = np.zeros(n_traits, np.int64)
    for penalty in PENALTIES:
        live_C = np.flatnonzero(n_risen_T[trait_C] < 2)
        if not len(live_C):
            break
        mine_C = trait_C[live_C]
        is_held_NC = fold_NT[:, mine_C] == fold_C[live_C]
        is_used_NC = (fold_NT[:, mine_C] >= 0) & ~is_held_NC
        label_NC, used_NC, held_NC = map(torch.from_numpy, (labels_NT[:, mine_C], is_used_NC, is_held_NC))
        penalty_C = x_NE.new_full((len(live_C),), penalty)
        own_EC = newton_cg.fit(x_NE, label_NC, used_NC, penalty_C, w_EC[:, live_C], 1e-7)
        w_EC[:, live_C] = own_EC
        z_NC = x_NE @ own_EC
        loss_NC = torch.nn.functional.softplus(z_NC, threshold=1e3) - label_NC.double() * z_NC
        loss_T = np.bincount(mine_C, (loss_NC * held_NC).sum(dim=0).numpy(), n_traits)
        is_live_T = n_risen_T < 2
        is_best_T = is_live_T & (loss_T < best_T)
        penalty_T[is_best_T], best_T[is_best_T] = penalty, loss_T[is_best_T]
        n_risen_T = np.where(is_live_T & (loss_T <= last_T), 0, n_risen_T + 1)
        last_T = loss_T
    return penalty_T


def _folds(labels_NT: np.ndarray, known_NT: np.ndarray, seed: int) -> Int8[np.ndarray, "N T"]:
    """Each image's fold for each trait, as scikit-learn's StratifiedKFold shuffles them, which takes 3 to 5
    times as long. -1: its label is missing, or the trait has too few images."""
    fold_NT = np.full(labels_NT.shape, -1, np.int8)
    for t, rarer in enumerate(_rarer(labels_NT, known_NT).tolist()):
        if rarer < 2:
            continue
        rows = np.flatnonzero(known_NT[:, t])
        label_n, n_folds = labels_NT[rows, t], min(N_FOLDS, rarer)
        random, is_first_n = np.random.RandomState(seed), label_n == label_n[0]
        for rows_m, taken in ((rows[is_first_n], 0), (rows[~is_first_n], is_first_n.sum())):
            fold_m = np.sort((taken + np.arange(len(rows_m))) % n_folds)
            random.shuffle(fold_m)
            fold_NT[rows_m, t] = fold_m
    return fold_NT


def _rarer(labels_NT: np.ndarray, known_NT: np.ndarray) -> np.ndarray:
    """Images with the rarer label of each trait."""
    n_T = (labels_NT & known_NT).sum(axis=0)
    return np.minimum(n_T, known_NT.sum(axis=0) - n_T)


def _turned(x_ND: np.ndarray) -> tuple[Float64[Tensor, "N E"], Float64[Tensor, "D e"]]:
    """(the inputs in their principal axes, in which penalties are the same, and 1; the axes)."""
    u_NE, size_E, turn_ED = torch.linalg.svd(torch.from_numpy(x_ND), full_matrices=False)
    return torch.column_stack([u_NE * size_E, u_NE.new_ones(len(u_NE))]), turn_ED.T


def _parts(n: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, n, size)]
