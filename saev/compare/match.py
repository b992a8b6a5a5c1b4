"""Matches of two dictionaries' latents: the best of the other one, mutual ones, one-to-one, and by cosine.

S latents of the first dictionary, Z of the second, T some of S (a tile), B a few of S, K candidates, E pairs
that are considered for a one-to-one match, D d_vit.
"""

import collections.abc
import dataclasses
import typing as tp

import beartype
import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.sparse.csgraph
import torch
from jaxtyping import Bool, Float32, Float64, Int64, jaxtyped

from saev.compare import correlate, memory

NONE = -1
"""No latent."""
MOMENTS = 4096
"""Directions that are converted to float64 at a time."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Best:
    """The best match of each latent of one dictionary in the other one."""

    latent_S: Int64[np.ndarray, " S"]
    """NONE for a latent that is constant, or whose other dictionary is."""
    value_S: Float64[np.ndarray, " S"]
    """Its correlation or cosine; NaN without one."""
    is_mutual_S: Bool[np.ndarray, " S"]
    """Whether it is the best match of its best match."""

    def share(self, threshold: float, is_live_S: np.ndarray) -> float:
        """Share of the live latents whose match is mutual and has at least this value."""
        is_good_S = self.is_mutual_S & (np.nan_to_num(self.value_S, nan=-np.inf) >= threshold)
        return float(is_good_S.sum() / max(1, is_live_S.sum()))

    def mean(self) -> float:
        """Mean value over latents that have a match; NaN if none has one."""
        return float(np.nanmean(self.value_S)) if not np.isnan(self.value_S).all() else float("nan")


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Pairs:
    """One-to-one matches with positive correlations, whose sum is the largest."""

    other_S: Int64[np.ndarray, " S"]
    """The partner of each latent of the first dictionary, or NONE."""
    corr_S: Float64[np.ndarray, " S"]
    is_exact: bool
    """All pairs were considered, not only candidates."""

    def share(self, threshold: float, is_live: np.ndarray) -> float:
        """Share of one dictionary's live latents that have a partner with at least this correlation."""
        return float((self.corr_S >= threshold).sum() / max(1, is_live.sum()))


class Found(tp.NamedTuple):
    one: Best
    two: Best
    pairs: Pairs | None


class Cosines(tp.NamedTuple):
    """Matches by the cosine of directions."""

    one: Best
    two: Best
    null_one: Best
    """Matches of the first dictionary in random directions that stand for the second one."""
    null_two: Best


def match(tiles: collections.abc.Iterable[correlate.Tile], S: int, Z: int, candidates: int = 0) -> Found:
    """Matches from correlations, tile by tile.

    Args:
        candidates: the most correlated partners of each latent that are considered for one-to-one matches in
            dictionaries of more than memory.EXACT latents. 0: no one-to-one matches.
    """
    best_S, corr_S = np.full(S, NONE), np.full(S, -np.inf)
    best_Z, corr_Z = np.full(Z, NONE), np.full(Z, -np.inf)
    is_exact = max(S, Z) <= memory.EXACT
    edges: list[Edges] = []
    all_SZ = np.zeros((S, Z) if candidates and is_exact else (0, 0))
    for first, corr_TZ in tiles:
        at = slice(first, first + len(corr_TZ))
        best_S[at], corr_S[at] = corr_TZ.argmax(axis=1), corr_TZ.max(axis=1)
        top_Z = corr_TZ.argmax(axis=0)
        value_Z = np.take_along_axis(corr_TZ, top_Z[None], axis=0)[0]
        is_better_Z = value_Z > corr_Z  # among equals, the lower latent
        best_Z[is_better_Z], corr_Z[is_better_Z] = first + top_Z[is_better_Z], value_Z[is_better_Z]
        if candidates and is_exact:
            all_SZ[at] = corr_TZ
        elif candidates:
            edges += _candidates(corr_TZ, first, candidates)
    pairs = None
    if candidates:
        pairs = _exact(all_SZ) if is_exact else _restricted(edges, S, Z)
    return Found(*_both(best_S, corr_S, best_Z, corr_Z), pairs)


def _both(
    best_S: np.ndarray, value_S: np.ndarray, best_Z: np.ndarray, value_Z: np.ndarray
) -> tuple[Best, Best]:
    """Marks mutual matches. -inf means no value."""
    best_S, best_Z = (np.where(np.isfinite(v), b, NONE) for b, v in ((best_S, value_S), (best_Z, value_Z)))
    value_S, value_Z = (np.where(np.isfinite(v), v, np.nan) for v in (value_S, value_Z))
    is_mutual_S = (best_S >= 0) & (best_Z[best_S] == np.arange(len(best_S)))
    is_mutual_Z = (best_Z >= 0) & (best_S[best_Z] == np.arange(len(best_Z)))
    return Best(best_S, value_S, is_mutual_S), Best(best_Z, value_Z, is_mutual_Z)


# ---- one to one ----


class Edges(tp.NamedTuple):
    one_E: np.ndarray
    two_E: np.ndarray
    corr_E: np.ndarray


def _candidates(corr_TZ: np.ndarray, first: int, k: int) -> list[Edges]:
    """The positive among the k largest correlations of each latent, of each dictionary."""
    T, Z = corr_TZ.shape
    value_TK, two_TK = torch.from_numpy(corr_TZ).topk(min(k, Z), dim=1)
    one_TK = torch.arange(first, first + T)[:, None].expand_as(two_TK)
    value_KZ, one_KZ = torch.from_numpy(corr_TZ).topk(min(k, T), dim=0)
    two_KZ = torch.arange(Z).expand_as(one_KZ)
    found = ((one_TK, two_TK, value_TK), (one_KZ + first, two_KZ, value_KZ))
    return [Edges(*(x[value > 0].numpy() for x in (one, two, value))) for one, two, value in found]


def _exact(corr_SZ: Float64[np.ndarray, "S Z"]) -> Pairs:
    one, two = scipy.optimize.linear_sum_assignment(corr_SZ.clip(min=0), maximize=True)
    return _pairs(one, two, corr_SZ[one, two], len(corr_SZ), True)


def _restricted(edges: list[Edges], S: int, Z: int) -> Pairs:
    """The best one-to-one matches among candidates. Each latent may also take a dummy of its own, worth 0."""
    one_E, two_E, corr_E = (np.concatenate(x) for x in zip(*edges, strict=True))
    _, first_E = np.unique(one_E * Z + two_E, return_index=True)
    one_E, two_E, corr_E = one_E[first_E], two_E[first_E], corr_E[first_E]
    dummies = np.arange(S)
    at = (np.concatenate([one_E, dummies]), np.concatenate([two_E, Z + dummies]))
    cost = np.concatenate([2 - corr_E, np.full(S, 2.0)])  # an entry of 0 would be no edge
    graph = scipy.sparse.csr_matrix((cost, at), shape=(S, Z + S))
    one, two = scipy.sparse.csgraph.min_weight_full_bipartite_matching(graph)
    one, two = one[two < Z], two[two < Z]
    return _pairs(one, two, 2 - np.asarray(graph[one, two]).ravel(), S, False)


def _pairs(one: np.ndarray, two: np.ndarray, corr: np.ndarray, S: int, is_exact: bool) -> Pairs:
    other_S, corr_S = np.full(S, NONE), np.full(S, np.nan)
    is_good = corr > 0
    other_S[one[is_good]], corr_S[one[is_good]] = two[is_good], corr[is_good]
    return Pairs(other_S, corr_S, is_exact)


# ---- cosines ----


def by_cosine(
    one_SD: Float32[torch.Tensor, "S D"],
    two_ZD: Float32[torch.Tensor, "Z D"],
    is_live_S: Bool[np.ndarray, " S"],
    is_live_Z: Bool[np.ndarray, " Z"],
) -> tuple[Best, Best]:
    """The best matches among live latents by the cosine of unit vectors."""
    S, Z = len(one_SD), len(two_ZD)
    dead_Z = torch.from_numpy(~is_live_Z)

    def tiles() -> collections.abc.Iterator[correlate.Tile]:
        n = max(1, memory.COSINES // Z)
        for first in range(0, S, n):
            cosine_TZ = (one_SD[first : first + n] @ two_ZD.T).double()
            cosine_TZ[:, dead_Z] = -torch.inf
            cosine_TZ[torch.from_numpy(~is_live_S[first : first + n])] = -torch.inf
            yield correlate.Tile(first, cosine_TZ.numpy())

    return match(tiles(), S, Z)[:2]


def cosines(
    one_SD: Float32[torch.Tensor, "S D"],
    two_ZD: Float32[torch.Tensor, "Z D"],
    is_live_S: Bool[np.ndarray, " S"],
    is_live_Z: Bool[np.ndarray, " Z"],
    seed: int,
) -> Cosines:
    """Matches by cosine, and those of each dictionary in random directions like the other one's."""
    live = (is_live_S, is_live_Z)
    null_one, _ = by_cosine(one_SD, random_like(two_ZD, is_live_Z, seed), *live)
    _, null_two = by_cosine(random_like(one_SD, is_live_S, seed), two_ZD, *live)
    return Cosines(*by_cosine(one_SD, two_ZD, *live), null_one, null_two)


def random_like(
    direction_SD: Float32[torch.Tensor, "S D"], is_live_S: Bool[np.ndarray, " S"], seed: int
) -> Float32[torch.Tensor, "S D"]:
    """As many unit vectors, drawn from the normal distribution with the live directions' mean and covariance.

    They crowd the same subspaces, so that they come as close to other directions as these do by chance.
    Random rotations or isotropic vectors would not, and two dictionaries would look alike because both lie
    where the activations vary.
    """
    D = direction_SD.shape[1]
    sum_D, sum_DD, n_live = torch.zeros(D).double(), torch.zeros(D, D).double(), max(1, int(is_live_S.sum()))
    for part_BD in direction_SD[torch.from_numpy(is_live_S)].split(MOMENTS):
        sum_D += part_BD.double().sum(dim=0)
        sum_DD += part_BD.double().T @ part_BD.double()
    mean_D = sum_D / n_live
    value_D, vector_DD = torch.linalg.eigh(sum_DD / n_live - torch.outer(mean_D, mean_D))
    root_DD = (vector_DD * value_D.clamp(min=0).sqrt()) @ vector_DD.T
    # NumPy's: torch's with this seed may have drawn the initial weights of one of the SAEs
    drawn_SD = np.random.default_rng([seed, 2]).standard_normal(direction_SD.shape, np.float32)
    out_SD = torch.from_numpy(drawn_SD) @ root_DD.float() + mean_D.float()
    return torch.nn.functional.normalize(out_SD, dim=1)
