"""Dichotomous keys: decision trees on the scores of prototypes, as a biologist reads them.

Traits of a group that exclude each other (the classes of class folders, the values of a column) have one key,
which leads to one of them. Every other trait has its own, which leads to "present" or "absent". A tree is
scikit-learn's, with balanced classes. Its depth has the best balanced accuracy in cross-validation on the
train images. Its thresholds are rounded to as few digits as leave the train images where they are, so the
printed key is the one that is measured.

N images, K candidate prototypes, L nodes of a tree, C categories that a key leads to, M resamples.
"""

import collections.abc
import dataclasses
import math
import typing as tp

import beartype
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8, jaxtyped

from saev.formats import results
from saev.protoeval import sparse

N_FOLDS = 5
"""Of the cross-validation; fewer if all categories but one have fewer train images."""
MIN_LEAF = 5
"""Train images that a key leads to each of its ends, at least; with fewer than 20 times as many, a 20th."""
LEAF = -1
"""Prototype of a node where a key ends."""
PRESENT = ("absent", "present")


class Target(tp.NamedTuple):
    """What a key leads to."""

    name: str
    """The trait, or the group of traits that exclude each other."""
    trait_is: list[int]
    categories: tuple[str, ...]
    """PRESENT for one trait, else the values of the group's traits."""

    def category_of(self, labels_NT: Bool[np.ndarray, "N T"]) -> Int64[np.ndarray, " N"]:
        if len(self.trait_is) == 1:
            return labels_NT[:, self.trait_is[0]].astype(np.int64)
        return labels_NT[:, self.trait_is].argmax(axis=1)

    def max_depth(self, depth: int) -> int:
        """More for many categories: each doubling needs a step."""
        return depth + math.ceil(math.log2(len(self.categories))) - 1


@jaxtyped(typechecker=beartype.beartype)
def targets(
    names: list[str], labels_NT: Bool[np.ndarray, "N T"], known_NT: Bool[np.ndarray, "N T"] | None
) -> list[Target]:
    """What keys lead to, in the order of the traits.

    Args:
        names: the traits' names.
        labels_NT: of all images, train and test.
    """
    of_group: dict[str, list[int]] = {}
    for t, name in enumerate(names):
        of_group.setdefault(results.group(name), []).append(t)
    found = []
    for group, trait_is in of_group.items():
        is_known = known_NT is None or bool(known_NT[:, trait_is].all())
        if len(trait_is) > 1 and is_known and (labels_NT[:, trait_is].sum(axis=1) == 1).all():
            values = tuple(names[t].partition("::")[2] for t in trait_is)
            found.append(Target(group, trait_is, values))
        else:
            found += [Target(names[t], [t], PRESENT) for t in trait_is]
    return sorted(found, key=lambda target: target.trait_is[0])


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Key:
    """A decision tree. Node 0 is its start; a node's children come after it."""

    prototype_L: Int64[np.ndarray, " L"]
    """The prototype that a node asks for; LEAF where the key ends."""
    threshold_L: Float64[np.ndarray, " L"]
    child_L2: Int64[np.ndarray, "L 2"]
    """Next nodes: of images that score at most the threshold, and of the others."""
    count_LC: Int64[np.ndarray, "L C"]
    """Train images of each category that come to a node."""

    @property
    def depth(self) -> int:
        depth_L = np.zeros(len(self.prototype_L), np.int64)
        for node in np.flatnonzero(self.prototype_L != LEAF):
            depth_L[self.child_L2[node]] = depth_L[node] + 1
        return int(depth_L.max())

    @property
    def share_LC(self) -> Float64[np.ndarray, "L C"]:
        """Each category's share of a node's train images; 0 if there are none."""
        return self.count_LC / np.maximum(self.count_LC.sum(axis=1, keepdims=True), 1)

    @property
    def call_L(self) -> Int64[np.ndarray, " L"]:
        """The category whose share exceeds its share of all train images most (as a ratio)."""
        return (self.share_LC / np.where(self.share_LC[0] > 0, self.share_LC[0], np.inf)).argmax(axis=1)

    def leaf_of(self, read: sparse.Read, n_images: int) -> Int64[np.ndarray, " N"]:
        """The node where each image ends."""
        node_N = np.zeros(n_images, np.int64)
        for node in np.flatnonzero(self.prototype_L != LEAF):
            here_n = np.flatnonzero(node_N == node)
            is_above_n = read(self.prototype_L[[node]])[0, here_n] > self.threshold_L[node]
            node_N[here_n] = self.child_L2[node][is_above_n.astype(np.int64)]
        return node_N


@jaxtyped(typechecker=beartype.beartype)
def grow(
    scores_KN: Float32[np.ndarray, "K N"],
    prototype_K: Int64[np.ndarray, " K"],
    category_N: Int64[np.ndarray, " N"],
    n_categories: int,
    max_depth: int,
    seed: int,
) -> Key:
    """Grows a key on train images, with the depth of 1 to `max_depth` that cross-validation finds best.

    With fewer than two categories, or no prototype, it ends where it starts.
    """
    import sklearn.metrics  # which takes a second
    import sklearn.model_selection
    import sklearn.tree

    n_C = np.bincount(category_N, minlength=n_categories)
    if (n_C > 0).sum() < 2 or not len(prototype_K):
        return _ended(n_C)
    least = max(1, min(MIN_LEAF, len(category_N) // 20))
    x_NK, depth = np.ascontiguousarray(scores_KN.T), 1

    def fitted(depth: int, rows: slice | np.ndarray = slice(None)) -> tp.Any:
        tree = sklearn.tree.DecisionTreeClassifier(
            max_depth=depth, min_samples_leaf=least, class_weight="balanced", random_state=seed
        )
        return tree.fit(x_NK[rows], category_N[rows])

    n_folds = min(N_FOLDS, int(np.sort(n_C)[-2]))  # folds may lack the rarer ones of several categories
    if n_folds > 1 and max_depth > 1:
        folds = sklearn.model_selection.StratifiedKFold(n_folds, shuffle=True, random_state=seed)
        score_DF = np.zeros((max_depth, n_folds))
        # by hand, because GridSearchCV resets the warning filters of all threads
        for f, (rows, held) in enumerate(folds.split(x_NK, category_N)):
            for d in range(max_depth):
                call_n = fitted(d + 1, rows).predict(x_NK[held])
                score_DF[d, f] = sklearn.metrics.balanced_accuracy_score(category_N[held], call_n)
        depth += int(score_DF.mean(axis=1).argmax())
    return _rounded(fitted(depth).tree_, scores_KN, prototype_K, category_N, n_categories)


def _ended(n_C: np.ndarray) -> Key:
    return Key(np.array([LEAF]), np.zeros(1), np.zeros((1, 2), np.int64), n_C[None])


def _rounded(
    tree: tp.Any, scores_KN: np.ndarray, prototype_K: np.ndarray, category_N: np.ndarray, n_categories: int
) -> Key:
    """The key of one of scikit-learn's trees. It ends where all train images are of one category, also if
    rounding made the tree go on."""
    prototypes, thresholds, children, counts = [], [], [], []

    def add(node: int, here_n: np.ndarray) -> int:
        """Adds a node to which these train images come, and those after it. Returns its number."""
        number, feature = len(counts), int(tree.feature[node])
        counts.append(np.bincount(category_N[here_n], minlength=n_categories))
        is_end = tree.children_left[node] < 0 or (counts[-1] > 0).sum() == 1
        prototypes.append(LEAF if is_end else int(prototype_K[feature]))
        thresholds.append(0.0)
        children.append((0, 0))
        if not is_end:
            score_n = scores_KN[feature, here_n].astype(np.float64)
            is_above_n = score_n > tree.threshold[node]
            low, high = float(score_n[~is_above_n].max()), float(score_n[is_above_n].min())
            thresholds[number] = between(low, high)
            lower = add(int(tree.children_left[node]), here_n[~is_above_n])
            children[number] = (lower, add(int(tree.children_right[node]), here_n[is_above_n]))
        return number

    add(0, np.arange(len(category_N)))
    return Key(np.array(prototypes), np.array(thresholds), np.array(children), np.array(counts))


@beartype.beartype
def between(low: float, high: float) -> float:
    """The number with the fewest digits, at least two, that is at least `low` and below `high`: the middle,
    rounded."""
    middle = low + (high - low) / 2
    for digits in range(2, 18):
        rounded = float(f"{middle:.{digits}g}")
        if low <= rounded < high:
            return rounded
    return low


# ---- how good it is ----


@jaxtyped(typechecker=beartype.beartype)
def accuracies(
    category_N: Int64[np.ndarray, " N"],
    call_N: Int64[np.ndarray, " N"],
    n_categories: int,
    times_MN: UInt8[np.ndarray, "M N"],
) -> tuple[Float64[np.ndarray, " M"], Float64[np.ndarray, " M"]]:
    """(accuracy, balanced accuracy) on resamples. Balanced: the mean of the categories' recalls, without
    categories that no image has, as scikit-learn's. NaN without images."""
    is_own_NC = category_N[:, None] == np.arange(n_categories)
    weight_MN = times_MN.astype(np.float32)  # whole numbers below 2^24 are exact
    n_MC = (weight_MN @ is_own_NC).astype(np.float64)
    right_MC = (weight_MN @ (is_own_NC & (call_N == category_N)[:, None])).astype(np.float64)
    with np.errstate(invalid="ignore"):
        recall_MC, n_M = right_MC / n_MC, (n_MC > 0).sum(axis=1)
        return right_MC.sum(axis=1) / n_MC.sum(axis=1), np.nansum(recall_MC, axis=1) / n_M


# ---- how it is printed ----


def text(key: Key, target: Target, describe: collections.abc.Callable[[int], str]) -> str:
    """The key's numbered couplets, in Markdown.

    Args:
        describe: names a prototype.
    """
    number_of = {node: i for i, node in enumerate(_in_order(key), start=1)}
    lines = []
    for node, number in number_of.items():
        what, threshold = describe(int(key.prototype_L[node])), f"{key.threshold_L[node]}".removesuffix(".0")
        low, high = key.child_L2[node].tolist()
        for letter, relation, child in (("a", "above", high), ("b", "at most", low)):
            leads_to = number_of.get(child) or _end(key, target, child)
            lines.append(f"    {number}{letter}. {what} {relation} {threshold} ... {leads_to}")
    return "\n".join(lines or [f"    1. All images ... {_end(key, target, 0)}"])


def _in_order(key: Key, node: int = 0) -> collections.abc.Iterator[int]:
    """Nodes that ask, from the start, first along the higher scores."""
    if key.prototype_L[node] != LEAF:
        yield node
        low, high = key.child_L2[node].tolist()
        yield from _in_order(key, high)
        yield from _in_order(key, low)


def _end(key: Key, target: Target, node: int) -> str:
    """What an end says, and how many of its train images have that category (for one trait: the trait)."""
    call, count_C = int(key.call_L[node]), key.count_LC[node]
    counted = 1 if len(target.trait_is) == 1 else call
    return f"{target.categories[call]} ({count_C[counted]:,} of {count_C.sum():,})"
