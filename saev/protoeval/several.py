"""Several prototypes for each trait: sparse logistic models, and dichotomous keys (docs/keys.md).

Both are fitted on the train images of a cell of the grid, and measured on the test images as the best single
prototype is.

N images, K prototypes, T traits, X keys, R draws of train images, M resamples of the test images.
"""

import collections.abc
import typing as tp
import warnings

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64

from saev import compiled, helpers
from saev.formats import results
from saev.protoeval import ap, choose, config, keys, measure, score, sparse

N_CANDIDATES = 20
"""Prototypes of a trait's sparse model, which its key may ask for."""
MOST_CANDIDATES = 128
"""The same of a key to many categories: the first ones of each category's model."""
KEYS_NOTE = (
    "Dichotomous keys. Start at couplet 1, and follow the lead that holds. An image's score for "
    "a prototype is the largest over its patches. In brackets: the trait that a prototype detects best, and "
    "its average precision (AP) for it on train images. The numbers at an end count the train images that "
    'come there. An end says "present" if the trait is more frequent there than among all train images. An '
    "end of a key to several categories says the one whose share is the largest multiple of its share of all "
    "train images. Measures are on the test images.\n"
)


class Several(tp.NamedTuple):
    """The table's rows, and further files by name."""

    rows: list[results.Row]
    frames: dict[str, pl.DataFrame]
    texts: dict[str, str]


def evaluate(
    rows: list[results.Row],
    cells: list[choose.Cell],
    train: score.Split,
    test: score.Split,
    cfg: config.ProtoEval,
    about: results.About,
    names: list[str],
) -> Several:
    """Fits and measures models of several prototypes and keys.

    Args:
        rows: of the single prototypes. Each cell's new rows follow its own.
        cells: all cells. Keys are grown in the largest one of each fit.
        names: the traits' names.
    """
    all_of = _All.of(train, test, cfg, about, [helpers.printable(name) for name in names])
    found: dict[tuple[str, int, int], list[results.Row]] = {}
    cells = [cell for cell in cells if cell.scorer not in about.nulls]
    weights, measured, texts = [], [], [KEYS_NOTE]
    for cell in helpers.progress(cells, "several", len(cells), "cells"):
        is_keyed = bool(cfg.key_depth) and cell.favourites is not None
        fitted = _Fitted.of(cell, all_of, {*cfg.several, *([N_CANDIDATES] if is_keyed else [])})
        mine = found.setdefault((cell.scorer, cell.n_prototypes, cell.n_train), [])
        for n in dict.fromkeys(cfg.several):
            mine.append(fitted.row(n))
            weights.append(fitted.weights(n))
        if is_keyed:
            grown = fitted.grow()
            mine.append(grown.row)
            measured.append(grown.frame())
            texts.append(grown.text(measured[-1]))
    frames = {results.WEIGHTS_FILE: weights, results.KEYS_FILE: measured}
    return Several(
        [each for row in rows for each in (row, *found.get((row.scorer, row.n_prototypes, row.n_train), []))],
        {name: pl.concat(parts) for name, parts in frames.items() if parts},
        {results.KEYS_TEXT: "\n".join(texts)} if measured else {},
    )


class _All(tp.NamedTuple):
    """What all cells share."""

    train: score.Split
    test: score.Split
    cfg: config.ProtoEval
    about: results.About
    names: list[str]
    meter: measure.Meter
    drawn: dict[int, list[np.ndarray]]
    targets: list[keys.Target]

    @staticmethod
    def of(
        train: score.Split, test: score.Split, cfg: config.ProtoEval, about: results.About, names: list[str]
    ) -> "_All":
        labels_NT = np.concatenate([train.labels_NT, test.labels_NT])
        known = [split.known_NT for split in (train, test) if split.known_NT is not None]
        known_NT = np.concatenate(known) if known else None
        targets = keys.targets(names, labels_NT, known_NT) if cfg.key_depth else []
        drawn = choose.draws(len(train.labels_NT), cfg)
        return _All(train, test, cfg, about, names, measure.Meter(test, cfg), drawn, targets)


class _View:
    """A cell's train images on one draw."""

    def __init__(self, cell: choose.Cell, train: score.Split, rows_n: np.ndarray):
        self.labels_NT, self.known_NT = train.labels_NT[rows_n], train.known_of(rows_n)
        self.read = _reader(train, cell, rows_n)

    def known_of(self, t: int) -> Bool[np.ndarray, " N"]:
        return np.ones(len(self.labels_NT), bool) if self.known_NT is None else self.known_NT[:, t]


def _reader(split: score.Split, cell: choose.Cell, rows_n: np.ndarray | None = None) -> sparse.Read:
    """Reads scores by the cell's prototypes, of all images or of some."""

    def read(prototypes: slice | np.ndarray) -> np.ndarray:
        if isinstance(prototypes, slice):
            found_CN = split.of(slice(cell.first + prototypes.start, cell.first + prototypes.stop))
        else:
            found_CN = split.of(cell.first + prototypes)
        return found_CN if rows_n is None else found_CN[:, rows_n]

    return read


class _Fitted(tp.NamedTuple):
    """A cell's sparse models."""

    cell: choose.Cell
    of_all: _All
    views: list[_View]
    """One for each draw."""
    read_test: sparse.Read
    models_R: list[sparse.Models]
    """On each draw."""

    @staticmethod
    def of(cell: choose.Cell, of_all: _All, sizes: set[int]) -> "_Fitted":
        train, cfg = of_all.train, of_all.cfg
        views = [_View(cell, train, rows_n) for rows_n in of_all.drawn[cell.n_train]]
        block = train.n_at_once(cfg.memory_gb)
        models_R = [
            sparse.fit(view.read, cell.n_prototypes, view.labels_NT, view.known_NT, sizes, block)
            for view in views
            if sizes
        ]
        return _Fitted(cell, of_all, views, _reader(of_all.test, cell), models_R)

    def name(self, model: str) -> str:
        """A row's name in the table. model: the number of prototypes, or KEY."""
        of = (self.cell.scorer, model)
        return next(name for name, found in self.of_all.about.models.items() if found == of)

    def row(self, n: int) -> results.Row:
        n_test, models_R = len(self.of_all.test.labels_NT), [models[n] for models in self.models_R]
        first_RT = [
            [int(m.prototype_Z[0]) if len(m.prototype_Z) else 0 for m in models] for models in models_R
        ]
        scores = (
            (
                np.stack([model(view.read, len(view.labels_NT)) for model in models]),
                np.stack([model(self.read_test, n_test) for model in models]),
            )
            for models, view in zip(models_R, self.views, strict=True)
        )
        return self.measured(self.name(str(n)), first_RT, scores)

    def measured(
        self,
        name: str,
        first_RT: list[list[int]],
        scores: collections.abc.Iterable[tuple[np.ndarray, np.ndarray]],
    ) -> results.Row:
        """A row of the table.

        Args:
            first_RT: a prototype of each model.
            scores: of train and of test images (T, N), on each draw.
        """
        train_ap_RT, test_ap_RT, boot_RM = [], [], []
        for view, (train_TN, test_TN) in zip(self.views, scores, strict=True):
            train_ap_RT.append(ap.paired(train_TN, view.labels_NT, view.known_NT))
            test_ap_T, boot_M = self.of_all.meter(test_TN)
            test_ap_RT.append(test_ap_T)
            boot_RM.append(boot_M)
        stacked = map(np.stack, (train_ap_RT, test_ap_RT, boot_RM))
        return results.Row(name, self.cell.n_prototypes, self.cell.n_train, np.array(first_RT), *stacked)

    def key_of(self, name: str) -> tuple[str, str, int, int]:
        """The first columns of a frame."""
        return self.of_all.about.scorer(name).id, name, self.cell.n_prototypes, self.cell.n_train

    def weights(self, n: int) -> pl.DataFrame:
        """The rows of weights.parquet, on the first draw."""
        cell = self.key_of(self.name(str(n)))
        lines = [
            (*cell, self.of_all.names[t], rank, int(prototype), float(weight), model.intercept)
            for t, model in enumerate(self.models_R[0][n])
            for rank, (prototype, weight) in enumerate(zip(model.prototype_Z, model.weight_Z, strict=True))
        ]
        return pl.DataFrame(lines, results.WEIGHTS, orient="row")

    # ---- keys ----

    def grow(self) -> "_Grown":
        """Grows the cell's keys on each draw."""
        n_test, targets = len(self.of_all.test.labels_NT), self.of_all.targets
        keys_R = [
            self._keys(view, models[N_CANDIDATES])
            for view, models in zip(self.views, self.models_R, strict=True)
        ]
        first_RT = np.zeros((len(keys_R), len(self.of_all.names)), np.int64)
        for first_T, found in zip(first_RT, keys_R, strict=True):
            for target, key in zip(targets, found, strict=True):
                first_T[target.trait_is] = max(0, int(key.prototype_L[0]))
        scores = (
            (self._shares(found, view.read, len(view.labels_NT)), self._shares(found, self.read_test, n_test))
            for found, view in zip(keys_R, self.views, strict=True)
        )
        row = self.measured(self.name(results.KEY), first_RT.tolist(), scores)
        return _Grown(self, keys_R[0], row)

    def _keys(self, view: _View, models: list[sparse.Model]) -> list[keys.Key]:
        cfg = self.of_all.cfg

        def one(target: keys.Target) -> keys.Key:
            rows_n = np.flatnonzero(view.known_of(target.trait_is[0]))
            prototype_K = _candidates([models[t].prototype_Z for t in target.trait_is])
            scores_KN = view.read(prototype_K)[:, rows_n]
            category_N, n_categories = target.category_of(view.labels_NT[rows_n]), len(target.categories)
            depth = target.max_depth(cfg.key_depth)
            return keys.grow(scores_KN, prototype_K, category_N, n_categories, depth, cfg.seed)

        with warnings.catch_warnings():  # of categories with few images
            warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")
            return compiled.each_in_threads(one, self.of_all.targets)

    def _shares(self, found: list[keys.Key], read: sparse.Read, n_images: int) -> Float64[np.ndarray, "T N"]:
        """Each trait's share of the train images where an image ends."""
        out_TN = np.zeros((len(self.of_all.names), n_images))
        for target, key in zip(self.of_all.targets, found, strict=True):
            share_CN = key.share_LC.T[:, key.leaf_of(read, n_images)]
            out_TN[target.trait_is] = share_CN[1:] if len(target.trait_is) == 1 else share_CN
        return out_TN


def _candidates(prototypes: collections.abc.Iterable[np.ndarray]) -> np.ndarray:
    """The first prototypes of all models, then the second ones, ..., each once."""
    models = list(prototypes)
    ranked = [model_Z[i] for i in range(N_CANDIDATES) for model_Z in models if i < len(model_Z)]
    return np.array(list(dict.fromkeys(ranked))[:MOST_CANDIDATES], np.int64)


class _Grown(tp.NamedTuple):
    """A cell's keys."""

    fitted: _Fitted
    keys_X: list[keys.Key]
    """On the first draw."""
    row: results.Row

    def frame(self) -> pl.DataFrame:
        """The rows of keys.parquet."""
        of_all, lines = self.fitted.of_all, []
        test, cell = of_all.test, self.fitted.key_of(self.row.scorer)
        for target, key in zip(of_all.targets, self.keys_X, strict=True):
            first = target.trait_is[0]
            rows_n = np.arange(len(test.labels_NT))
            rows_n = rows_n if test.known_NT is None else np.flatnonzero(test.known_NT[:, first])
            leaf_N = key.leaf_of(self.fitted.read_test, len(test.labels_NT))[rows_n]
            category_N, n = target.category_of(test.labels_NT[rows_n]), len(target.categories)
            times_MN = of_all.meter.times_MN[:, rows_n]
            ap_T = self.row.test_ap_RT[0, target.trait_is]
            ap_T = ap_T[~np.isnan(ap_T)]
            line: list[str | float] = [
                *cell,
                target.name,
                n,
                key.depth,
                int((key.prototype_L == keys.LEAF).sum()),
            ]
            line.append(float(ap_T.mean()) if len(ap_T) else float("nan"))
            for value_M in keys.accuracies(category_N, key.call_L[leaf_N], n, times_MN):
                value, boot_M = float(value_M[0]), value_M[1:]
                line += [value, *results.share_interval(boot_M[~np.isnan(boot_M)], value)]
            lines.append(tuple(line))
        return pl.DataFrame(lines, results.KEYS, orient="row")

    def text(self, lines: pl.DataFrame) -> str:
        """The cell's part of keys.md. lines: `frame`."""
        of_all, cell = self.fitted.of_all, self.fitted.cell
        noun, best = "latent" if of_all.about.is_sae(cell.scorer) else "prototype", cell.favourites

        def describe(prototype: int) -> str:
            if best is None or best.trait_KF[prototype, 0] < 0:
                return f"{noun} {prototype}"
            trait = of_all.names[int(best.trait_KF[prototype, 0])]
            return f"{noun} {prototype} ({trait}, AP {best.train_ap_KF[prototype, 0]:.2f})"

        size = f"{cell.n_prototypes:,} {noun}s, {cell.n_train:,} train images"
        parts = [f"# {self.row.scorer} ({size})\n"]
        for target, key, line in zip(of_all.targets, self.keys_X, lines.iter_rows(named=True), strict=True):
            words = [
                f"{name.replace('_', ' ')} {line[name]:.3f}"
                for name in ("ap", "balanced_accuracy", "accuracy")
                if line[name] == line[name]
            ]
            said = f"Test images: {', '.join(words)}.".replace(" ap ", " AP ")
            said = said if words else "No test image has a label."
            parts += [f"## {target.name}\n", f"{said}\n", keys.text(key, target, describe), ""]
        return "\n".join(parts)
