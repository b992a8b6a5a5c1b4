"""Chooses each trait's prototype by average precision on train images.

N train images, n of them, K prototypes, C of them, T traits.
"""

import typing as tp

import beartype
import numpy as np
from jaxtyping import Bool, Float64, Int64, jaxtyped

from saev import helpers
from saev.formats import patchresults
from saev.protoeval import ap, config, fit, score

AP_DIGITS = 12
"""Decimal places to which APs are compared, because equal APs of different rankings differ in their last
bits."""
N_FAVOURITES = 8
"""Traits that are kept for each prototype."""


class Choice(tp.NamedTuple):
    """Each trait's prototype (counted within the scorer) and its train AP, for one cell and draw."""

    best_T: Int64[np.ndarray, " T"]
    train_ap_T: Float64[np.ndarray, " T"]


class Favourites(tp.NamedTuple):
    """The traits that each prototype detects best, best first."""

    trait_KF: Int64[np.ndarray, "K F"]
    """-1 where there are fewer."""
    train_ap_KF: Float64[np.ndarray, "K F"]


class Cell(tp.NamedTuple):
    """A scorer's first K prototypes, and the choices among them on each draw of n train images."""

    scorer: str
    n_prototypes: int
    n_train: int
    choices: list[Choice]
    first: int
    """Index of its first prototype, counted over all scorers."""
    favourites: Favourites | None = None
    """On the first draw, in the largest cell of each fit: most train images, then most prototypes."""


def choose(train: score.Split, banks: list[fit.Bank], cfg: config.ProtoEval) -> list[Cell]:
    """Chooses for the whole grid: scorer x K x number of train images.

    The last cell of each fit is its null: its most prototypes and train images, whose labels are permuted.
    """
    drawn = draws(len(train.labels_NT), cfg)
    out: list[Cell] = []
    first = 0
    for bank in helpers.progress(banks, "choose", len(banks), "scorers"):
        out += _cells(bank, first, drawn, train, cfg)
        first += bank.scorer.n_prototypes
    return out


def _cells(
    bank: fit.Bank, start: int, drawn: dict[int, list[np.ndarray]], train: score.Split, cfg: config.ProtoEval
) -> list[Cell]:
    """A scorer's cells. Prototypes are read in blocks, and each is used for every K that includes it."""
    T, cells, most, found = train.labels_NT.shape[1], [], max(drawn), []
    none = Choice(np.zeros(T, np.int64), np.full(T, np.nan))
    best = {n: [none] * len(same_n) for n, same_n in drawn.items()}
    null = [none] * len(drawn[most])
    for first, last in _pieces(bank.ks, train.n_at_once(cfg.memory_gb)):
        scores_CN = train.of(slice(start + first, start + last))
        for n, same_n in drawn.items():
            for r, rows_n in enumerate(same_n):
                labels_nT, known_nT = train.labels_NT[rows_n], train.known_of(rows_n)
                if n < most:
                    ap_CT = ap.of_rows(scores_CN[:, rows_n], labels_nT, known_nT)
                else:
                    order_n = permutation(len(rows_n), cfg.seed, r)
                    ap_CT, null_CT = _with_null(scores_CN[:, rows_n], labels_nT, known_nT, order_n)
                    null[r] = better(null[r], null_CT, first)
                best[n][r] = better(best[n][r], ap_CT, first)
                if n == most and r == 0:
                    found.append(favourites(ap_CT, prevalence(labels_nT, known_nT)))
        if last in bank.ks:
            cells += [Cell(bank.name, last, n, list(choices), start) for n, choices in best.items()]
    merged = Favourites(*map(np.concatenate, zip(*found, strict=True)))
    is_last = (max(bank.ks), most)
    cells = [c._replace(favourites=merged) if (c.n_prototypes, c.n_train) == is_last else c for c in cells]
    return [*cells, Cell(bank.name + patchresults.PERMUTED, *is_last, null, start)]


def _with_null(
    scores_Cn: np.ndarray, labels_nT: np.ndarray, known_nT: np.ndarray | None, order_n: np.ndarray
) -> list[Float64[np.ndarray, "C T"]]:
    """APs for the labels, and for those of the images in another order. Both share the images' ranking."""
    both_nU = np.hstack([labels_nT, labels_nT[order_n]])
    known_nU = None if known_nT is None else np.hstack([known_nT, known_nT[order_n]])
    return np.hsplit(ap.of_rows(scores_Cn, both_nU, known_nU), 2)


def permutation(n: int, seed: int, r: int = 0) -> Int64[np.ndarray, " n"]:
    """Image i gets all labels of image order_n[i], for the null of draw r, equally for all scorers."""
    return np.random.default_rng((seed, 0x9E12, r)).permutation(n)


def draws(n_images: int, cfg: config.ProtoEval) -> dict[int, list[np.ndarray]]:
    """Number of train images, at most all images -> the rows of each draw. All images have one draw."""
    out = {}
    for n in (n_images if n == -1 else min(n, n_images) for n in cfg.n_train):
        seeds = range(1 if n == n_images else cfg.n_seeds)
        out[n] = [train_subset(n_images, n, cfg.seed, r) for r in seeds]
    return out


@jaxtyped(typechecker=beartype.beartype)
def train_subset(n_images: int, n: int, seed: int, r: int = 0) -> Int64[np.ndarray, " n"]:
    """Draw r of n train images, equal for all scorers. Smaller subsets are part of larger ones."""
    key = (seed, 0xC0B, r) if r else (seed, 0xC0B)
    return np.sort(np.random.default_rng(key).permutation(n_images)[:n])


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


@jaxtyped(typechecker=beartype.beartype)
def prevalence(
    labels_NT: Bool[np.ndarray, "N T"], known_NT: Bool[np.ndarray, "N T"] | None
) -> Float64[np.ndarray, " T"]:
    """Each trait's share of the images with a known label; 0 if there is none."""
    n_T = len(labels_NT) if known_NT is None else known_NT.sum(axis=0)
    return labels_NT.sum(axis=0) / np.maximum(n_T, 1)


@jaxtyped(typechecker=beartype.beartype)
def favourites(ap_CT: Float64[np.ndarray, "C T"], prevalence_T: Float64[np.ndarray, " T"]) -> Favourites:
    """Each prototype's traits with the largest AP above prevalence, the AP of a constant score; the first of
    equal ones.

    By AP alone, a trait that most images have would be the best one of nearly every prototype.
    """
    above_CT = np.nan_to_num(ap_CT - prevalence_T, nan=0.0).round(AP_DIGITS)
    trait_CF = np.argsort(-above_CT, axis=1, kind="stable")[:, :N_FAVOURITES]
    is_above_CF = np.take_along_axis(above_CT, trait_CF, axis=1) > 0
    ap_CF = np.take_along_axis(ap_CT, trait_CF, axis=1)
    return Favourites(np.where(is_above_CF, trait_CF, -1), np.where(is_above_CF, ap_CF, np.nan))


def _pieces(ks: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `size` prototypes. One ends at each K."""
    ends = sorted({*ks, *range(size, max(ks), size)})
    return list(zip([0, *ends[:-1]], ends, strict=True))
