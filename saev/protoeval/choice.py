"""Prototypes chosen on train images and measured on test images: the whole grid from the images' scores.

N images, K prototypes, C of them, T traits, D d_vit, R draws of train images, M resamples of test images.
"""

import typing as tp

import beartype
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, jaxtyped

from saev import helpers, scorers
from saev.formats import results
from saev.protoeval import ap, config, probe, scoring

AP_DIGITS = 12
"""Decimal places in which APs are compared: equal ones of different rankings differ in their last bits."""


class Bank(tp.NamedTuple):
    """A fitted scorer and the numbers of prototypes it is evaluated at (prefixes of it)."""

    name: str
    scorer: scorers.Scorer
    ks: tuple[int, ...]


class Split(tp.NamedTuple):
    """One split's images, in the order of CUB's images.txt."""

    scores: scoring.Scores
    column_N: Int64[np.ndarray, " N"]
    """Their places among the scores."""
    labels_NT: Bool[np.ndarray, "N T"]

    def of(self, prototypes: slice | np.ndarray) -> Float32[np.ndarray, "C N"]:
        """Scores of some prototypes, in memory."""
        return self.scores.scores_KN[prototypes][:, self.column_N]

    @property
    def mean_ND(self) -> Float32[np.ndarray, "N D"]:
        return self.scores.mean_ND[self.column_N]


class Draw(tp.NamedTuple):
    """Train images to choose on: draw `r` of `n`."""

    n: int
    r: int
    rows: Int64[np.ndarray, " n"]


class Choice(tp.NamedTuple):
    """Of one cell and draw: each trait's prototype, among the scorer's, and its AP on the train images."""

    best_T: Int64[np.ndarray, " T"]
    train_ap_T: Float64[np.ndarray, " T"]


@beartype.beartype
def evaluate(
    train: Split, test: Split, banks: list[Bank], cfg: config.ProtoEval
) -> list[results.Row]:
    """The whole grid (scorer x K x n_train), the constant scorer's row and the linear probe's first."""
    draws = _draws(len(train.labels_NT), cfg)
    measure = Measure(test, cfg)
    rows = [_constant_row(train, measure)]
    rows += [_probe_row(same_n, train, measure) for same_n in draws]
    start = 0
    for bank in helpers.progress(banks, "choose", len(banks), "scorers"):
        rows += _bank_rows(bank, start, draws, train, measure, cfg.memory_gb)
        start += bank.scorer.n_prototypes
    return rows


def _draws(n_images: int, cfg: config.ProtoEval) -> list[list[Draw]]:
    """For each number of train images (more than there are: all) its draws; of all images there is one."""
    out = []
    for n in dict.fromkeys(n_images if n == -1 else min(n, n_images) for n in cfg.n_train):
        n_draws = 1 if n == n_images else cfg.n_seeds
        out.append([Draw(n, r, train_subset(n_images, n, cfg.seed, r)) for r in range(n_draws)])
    return out


@jaxtyped(typechecker=beartype.beartype)
def train_subset(n_images: int, n: int, seed: int, r: int = 0) -> Int64[np.ndarray, " n"]:
    """Draw r of n train images (-1 or too many: all), the same for every scorer; smaller subsets lie in larger ones."""
    key = (seed, 0xC0B, r) if r else (seed, 0xC0B)
    order_N = np.random.default_rng(key).permutation(n_images)
    return np.sort(order_N if n == -1 else order_N[:n])


class Measure:
    """Test APs, and mAPs on resamples of the test images."""

    def __init__(self, test: Split, cfg: config.ProtoEval):
        self.test = test
        self.is_zero = cfg.no_positives == "zero"
        n_images = len(test.labels_NT)
        times_MN = ap.resamples(n_images, cfg.n_boot, cfg.seed)
        self.times_MN = np.concatenate([np.ones((1, n_images), np.uint8), times_MN])

    @jaxtyped(typechecker=beartype.beartype)
    def __call__(
        self, scores_TN: Float[np.ndarray, "T N"]
    ) -> tuple[Float64[np.ndarray, " T"], Float64[np.ndarray, " M"]]:
        """AP of row t for trait t, and mAPs over the traits that each resample has a positive of (or over all traits)."""
        ap_TM = ap.resampled(scores_TN, self.test.labels_NT, self.times_MN)
        if self.is_zero:
            ap_TM = np.nan_to_num(ap_TM, nan=0.0)
        boot_TM = ap_TM[:, 1:]
        n_M = np.maximum((~np.isnan(boot_TM)).sum(axis=0), 1)
        return ap_TM[:, 0], np.nansum(boot_TM, axis=0) / n_M


def _bank_rows(
    bank: Bank,
    start: int,
    draws: list[list[Draw]],
    train: Split,
    measure: Measure,
    memory_gb: float,
) -> list[results.Row]:
    """A scorer's rows. Prototypes are taken some at a time, and each serves every K that it is among."""
    n_bytes = 4 * sum(split.labels_NT.shape[0] for split in (train, measure.test))
    size = max(1, int(memory_gb * 1e9 / (4 * n_bytes)))
    flat = [draw for same_n in draws for draw in same_n]
    T = train.labels_NT.shape[1]
    now = [Choice(np.zeros(T, np.int64), np.full(T, np.nan)) for _ in flat]
    chosen: dict[tuple[int, int, int], Choice] = {}
    for first, last in _pieces(bank.ks, size):
        scores_CN = train.of(slice(start + first, start + last))
        for i, draw in enumerate(flat):
            ap_CT = ap.of_rows(scores_CN[:, draw.rows], train.labels_NT[draw.rows])
            now[i] = better(now[i], ap_CT, first)
            if last in bank.ks:
                chosen[last, draw.n, draw.r] = now[i]
    rows = []
    for k in bank.ks:
        for same_n in draws:
            choices = [chosen[k, draw.n, draw.r] for draw in same_n]
            measured = [measure(measure.test.of(start + choice.best_T)) for choice in choices]
            rows.append(_row(bank.name, k, len(same_n[0].rows), choices, measured))
    return rows


def _pieces(ks: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` prototypes, one after the other, of which one ends at each K."""
    ends = sorted({*ks, *range(size, max(ks), size)})
    return list(zip([0, *ends[:-1]], ends, strict=True))


@jaxtyped(typechecker=beartype.beartype)
def better(choice: Choice, ap_CT: Float64[np.ndarray, "C T"], first: int) -> Choice:
    """The prototype of largest AP per trait, `first` and later ones considered too.

    Among equals the lowest number. Where there is no AP at all (a trait without a positive among the train images) it is
    prototype 0: no better than one drawn at random, and that is what its test AP then says.
    """
    ap_CT = ap_CT.round(AP_DIGITS)
    best_T = np.nan_to_num(ap_CT, nan=-1.0).argmax(axis=0)
    best_ap_T = ap_CT[best_T, np.arange(len(best_T))]
    is_new_T = best_ap_T > np.nan_to_num(choice.train_ap_T, nan=-1.0)
    return Choice(
        np.where(is_new_T, first + best_T, choice.best_T),
        np.where(is_new_T, best_ap_T, choice.train_ap_T),
    )


def _row(
    name: str,
    k: int,
    n: int,
    choices: list[Choice],
    measured: list[tuple[np.ndarray, np.ndarray]],
) -> results.Row:
    test_ap, boot = zip(*measured, strict=True)
    return results.Row(
        name,
        k,
        n,
        np.stack([choice.best_T for choice in choices]),
        np.stack([choice.train_ap_T for choice in choices]),
        np.stack(test_ap),
        np.stack(boot),
    )


def _constant_row(train: Split, measure: Measure) -> results.Row:
    """A scorer that says the same of every image: its AP is the trait's prevalence. Nothing real may fall to this row."""
    zeros_NT = np.zeros(train.labels_NT.shape, np.float32)
    train_ap_T = ap.paired(zeros_NT.T, train.labels_NT)
    choice = Choice(np.zeros(len(train_ap_T), np.int64), train_ap_T)
    measured = measure(np.zeros(measure.test.labels_NT.T.shape, np.float32))
    return _row("constant", 1, len(zeros_NT), [choice], [measured])


def _probe_row(same_n: list[Draw], train: Split, measure: Measure) -> results.Row:
    """A linear probe, trained on the images that the others choose on: what labels buy that may form their own direction."""
    choices, measured = [], []
    for draw in same_n:
        train_ND, labels_NT = train.mean_ND[draw.rows], train.labels_NT[draw.rows]
        own_NT, test_NT = probe.scores(train_ND, labels_NT, train_ND, measure.test.mean_ND)
        train_ap_T = ap.paired(own_NT.T, labels_NT)
        choices.append(Choice(np.zeros(len(train_ap_T), np.int64), train_ap_T))
        measured.append(measure(test_NT.T))
    return _row("Linear probe", 1, len(same_n[0].rows), choices, measured)
