"""Chooses each trait's prototype by average precision on train images.

N train images, K prototypes, C of them, T traits.
"""

import typing as tp

import beartype
import numpy as np
from jaxtyping import Float64, Int64, jaxtyped

from saev import helpers
from saev.protoeval import ap, config, fit, score

AP_DIGITS = 12
"""Decimal places to which APs are compared, because equal APs of different rankings differ in their last
bits."""


class Draw(tp.NamedTuple):
    """Train images to choose on: draw `r` of `n`."""

    n: int
    r: int
    rows: Int64[np.ndarray, " n"]


class Choice(tp.NamedTuple):
    """Each trait's prototype (counted within the scorer) and its train AP, for one cell and draw."""

    best_T: Int64[np.ndarray, " T"]
    train_ap_T: Float64[np.ndarray, " T"]


class Cell(tp.NamedTuple):
    """A scorer's first K prototypes, and the choices among them on each draw of train images."""

    scorer: str
    n_prototypes: int
    draws: list[Draw]
    choices: list[Choice]
    first: int
    """Index of its first prototype, counted over all scorers."""


def choose(train: score.Split, banks: list[fit.Bank], cfg: config.ProtoEval) -> list[Cell]:
    """Chooses for the whole grid: scorer x K x number of train images."""
    all_draws = draws(len(train.labels_NT), cfg)
    out: list[Cell] = []
    first = 0
    for bank in helpers.progress(banks, "choose", len(banks), "scorers"):
        out += _cells(bank, first, all_draws, train, cfg)
        first += bank.scorer.n_prototypes
    return out


def _cells(
    bank: fit.Bank, start: int, all_draws: list[list[Draw]], train: score.Split, cfg: config.ProtoEval
) -> list[Cell]:
    """A scorer's cells. Prototypes are read in blocks, and each is used for every K that includes it."""
    flat = [draw for same_n in all_draws for draw in same_n]
    T = train.labels_NT.shape[1]
    best = [Choice(np.zeros(T, np.int64), np.full(T, np.nan)) for _ in flat]
    found: dict[tuple[int, int, int], Choice] = {}
    size = max(1, int(cfg.memory_gb * 1e9 / (16 * train.scores.scores_KN.shape[1])))
    for first, last in _pieces(bank.ks, size):
        scores_CN = train.of(slice(start + first, start + last))
        for i, draw in enumerate(flat):
            ap_CT = ap.of_rows(scores_CN[:, draw.rows], train.labels_NT[draw.rows])
            best[i] = better(best[i], ap_CT, first)
            if last in bank.ks:
                found[last, draw.n, draw.r] = best[i]
    return [
        Cell(bank.name, k, same_n, [found[k, draw.n, draw.r] for draw in same_n], start)
        for k in bank.ks
        for same_n in all_draws
    ]


def draws(n_images: int, cfg: config.ProtoEval) -> list[list[Draw]]:
    """The draws for each number of train images, which is at most all images. All images have one draw."""
    out = []
    for n in dict.fromkeys(n_images if n == -1 else min(n, n_images) for n in cfg.n_train):
        ndraws = 1 if n == n_images else cfg.n_seeds
        out.append([Draw(n, r, train_subset(n_images, n, cfg.seed, r)) for r in range(ndraws)])
    return out


@jaxtyped(typechecker=beartype.beartype)
def train_subset(n_images: int, n: int, seed: int, r: int = 0) -> Int64[np.ndarray, " n"]:
    """Draw r of n train images (-1: all), equal for all scorers. Smaller subsets are part of larger ones."""
    key = (seed, 0xC0B, r) if r else (seed, 0xC0B)
    order_N = np.random.default_rng(key).permutation(n_images)
    return np.sort(order_N if n == -1 else order_N[:n])


@jaxtyped(typechecker=beartype.beartype)
def better(choice: Choice, ap_CT: Float64[np.ndarray, "C T"], first: int) -> Choice:
    """Updates each trait's prototype with those from `first` on: the highest AP, the first of several.

    For a trait without a positive train image it stays prototype 0, which is no better than a random one.
    """
    ap_CT = ap_CT.round(AP_DIGITS)
    best_T = np.nan_to_num(ap_CT, nan=-1.0).argmax(axis=0)
    best_ap_T = ap_CT[best_T, np.arange(len(best_T))]
    is_new_T = best_ap_T > np.nan_to_num(choice.train_ap_T, nan=-1.0)
    return Choice(
        np.where(is_new_T, first + best_T, choice.best_T), np.where(is_new_T, best_ap_T, choice.train_ap_T)
    )


def _pieces(ks: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `size` prototypes. One ends at each K."""
    ends = sorted({*ks, *range(size, max(ks), size)})
    return list(zip([0, *ends[:-1]], ends, strict=True))
