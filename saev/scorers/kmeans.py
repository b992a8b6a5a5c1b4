"""K-means centroids as prototypes: greedy k-means++ on a sample, then Lloyd's algorithm over all activations.

B activations of a block or sample, b those of a tile, D d_vit, K centres, C candidates, T tries per centre.
The mean is subtracted before distances are computed, so that it costs float32 no digits.
"""

import collections.abc
import dataclasses
import logging
import pathlib
import typing as tp

import beartype
import msgspec
import numpy as np
import torch
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

from saev import errors, helpers
from saev.data import activations, ordered
from saev.formats import checkpoint, tensors
from saev.nn import kernels, sparse
from saev.scorers import base, config, random

logger = logging.getLogger("saev")

CHUNK = 2**15
"""Activations whose distances a GPU computes at once, at most."""
SUMMED, MIN_SUMMED = 128, 2**16
"""k-means++ compares candidates on max(MIN_SUMMED, SUMMED x centres) activations (logbook 012)."""
TRIED = 16
"""Candidates per centre in k-means++."""
TILE = {"cpu": 2**20, "cuda": 2**28}
"""Squared distances that are computed at once. On a CPU k-means++ keeps them in its cache."""
WARM_UP, WARM_UP_SAMPLES = 4, 128
"""Lloyd iterations on the sample before the first pass, and their activations per centre."""
CANCELS = 1e-2
"""Squared distances below this fraction of the squared norm are computed again, from differences."""
ROUNDING = 1e-6
"""k-means++ sets squared distances below this fraction of the squared norm to 0 (rounding error)."""


def fit(
    cfg: config.KMeans,
    acts: activations.Activations,
    ks: list[int],
    seed: int,
    state_fpaths: list[pathlib.Path] | None = None,
    device: torch.device = base.CPU,
) -> list[base.Prototypes]:
    """Fits centroids for each K in the same passes over the activations; returned on the CPU.

    Memory: the sample, and about 30 bytes x K x d_vit for each K.

    Args:
        state_fpaths: one file per K for the centres after each pass. A killed fit resumes from them. They are
            not deleted.

    Raises:
        UserError: bad shards, or fewer activations than the largest K.
    """
    fpaths = dict(zip(ks, state_fpaths, strict=True)) if state_fpaths else {}
    saved = {k: _read_state(fpath, k, acts.d_vit, device) for k, fpath in fpaths.items()}
    states = {k: state for k, state in saved.items() if state}
    if new_ks := [k for k in ks if k not in states]:
        states |= zip(new_ks, _initial(cfg, acts, new_ks, seed, device), strict=True)
    while open_states := {k: s for k, s in states.items() if s.n_passes < cfg.n_iters and not s.is_done}:
        one_pass(list(open_states.values()), acts, cfg)
        for k in open_states.keys() & fpaths.keys():
            _write_state(states[k], fpaths[k])
    fitted = [base.Prototypes(states[k].center_KD, states[k].mean_D, cfg.similarity) for k in ks]
    return [scorer.to(base.CPU) for scorer in fitted]


def _initial(
    cfg: config.KMeans, acts: activations.Activations, ks: list[int], seed: int, device: torch.device
) -> list["State"]:
    """Centres before the first pass, for each K."""
    if cfg.n_samples < max(ks):
        raise errors.UserError(
            f"--scorer.n-samples {cfg.n_samples}: fewer than {max(ks)} clusters. Raise it."
        )
    random.check_enough(acts, max(ks), "clusters")
    sample = random.reservoir(acts, cfg.n_samples, seed)
    mean_D = torch.from_numpy(sample.mean_D).to(device)
    x_BD = _space(torch.from_numpy(sample.acts_KD).to(device), mean_D, cfg.normalize)
    # k-means++ draws centres in order, so the first K of a longer draw are a draw of K
    start_KD = plus_plus(x_BD, max(ks), seed)
    return [State(mean_D, _warmed_up(start_KD[:k].clone(), x_BD, cfg)) for k in ks]


Passes = tuple[float, tp.Annotated[int, msgspec.Meta(ge=0)], bool]
"""`State.inertia`, `n_passes` and `is_done` in the header of a saved state."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass
class State:
    """The centres for one K between two passes."""

    mean_D: Float[Tensor, " D"]
    center_KD: Float[Tensor, "K D"]
    """Centres minus the mean."""
    inertia: float = float("inf")
    """Sum of squared distances to the nearest centre in the last pass."""
    n_passes: int = 0
    is_done: bool = False


def _space(x_BD: Tensor, mean_D: Tensor, normalize: bool) -> Tensor:
    """Subtracts the mean and, if asked to, normalises; in place."""
    x_BD -= mean_D
    return torch.nn.functional.normalize(x_BD, dim=1, out=x_BD) if normalize else x_BD


# ---- the nearest centre ----


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def nearest(
    x_BD: Float[Tensor, "B D"], center_KD: Float[Tensor, "K D"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Finds each activation's nearest centre (of ties, the lowest) and the squared distance to it.

    The nearest centre maximises x . c - |c|^2 / 2. So it is the top latent of an encoder with weights c and
    bias -|c|^2 / 2, and the sparse search finds it. That search finds only positive values, so the bias is
    raised by `lift`: the shortest centre's value is a lower bound of every maximum.
    """
    square_K = center_KD.square().sum(dim=1)
    shortest = square_K.argmin()
    lowest = (x_BD @ center_KD[shortest]).min() - 0.5 * square_K[shortest]
    lift = (-1.01 * lowest).clamp(min=0)
    bias_K = lift - 0.5 * square_K
    if not kernels.available(x_BD):
        n_rows = max(1, min(CHUNK, TILE["cuda"] // len(center_KD)))
        parts = [torch.addmm(bias_K, x_CD, center_KD.T).max(dim=1) for x_CD in x_BD.split(n_rows)]
        value_B, at_B = (torch.cat(p) for p in zip(*parts, strict=True))
    else:
        codes = sparse.top_k(sparse.Encoder(center_KD, bias_K, False), x_BD, 1)
        has_B = codes.index.start_O1.diff() > 0
        value_B, at_B = x_BD.new_empty(len(x_BD)), torch.empty(len(x_BD), dtype=torch.int32)
        value_B[has_B], at_B[has_B] = codes.value_n, codes.index.latent_n
        rest_n = (~has_B).nonzero().flatten()
        for rows_C in rest_n.split(max(1, 2**24 // len(center_KD))):
            found = torch.addmm(bias_K, x_BD[rows_C], center_KD.T).max(dim=1)
            value_B[rows_C], at_B[rows_C] = found.values, found.indices.int()
    square_B, at_B = torch.linalg.vector_norm(x_BD, dim=1).square(), at_B.long()
    distance_B = square_B - 2 * (value_B - lift)
    for rows_C in (distance_B < CANCELS * square_B).nonzero().flatten().split(CHUNK):
        distance_B[rows_C] = (x_BD[rows_C] - center_KD[at_B[rows_C]]).square().sum(dim=1)
    return at_B, distance_B


# ---- k-means++ ----


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def plus_plus(x_BD: Float[Tensor, "B D"], k: int, seed: int) -> Float[Tensor, "K D"]:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): returns k of the activations as centres.

    Plain k-means++ draws each next centre with probability proportional to the squared distance to the
    centres so far. The greedy variant draws TRIED candidates and takes the one that lowers the sum of squared
    distances most. Here the sum is over a part of the activations (SUMMED).

    Centres are drawn in batches. Candidates are drawn and compared by the distances at the start of the
    batch. Each winner is accepted with probability (squared distance to the centres accepted so far) /
    (squared distance at the start), which is rejection sampling. If all distances are 0 (fewer than k
    distinct activations), the rest is drawn uniformly. For equal seeds, the first k centres of a longer draw
    are a draw of k.
    """
    chosen = list(helpers.progress(_drawn(x_BD, k, seed), "k-means++", k, "centres"))
    return x_BD[chosen[:k]]


def _drawn(x_BD: Tensor, k: int, seed: int) -> collections.abc.Iterator[int]:
    """Yields the row numbers of at least k centres."""
    rng = np.random.default_rng((seed, 0xC3))
    square_B = x_BD.square().sum(dim=1)
    chosen = [int(rng.integers(len(x_BD)))]
    yield from chosen
    distance_B = _updated(torch.full_like(square_B, torch.inf), x_BD, square_B, x_BD[chosen])
    while len(chosen) < k:
        cumulative_B = np.cumsum(distance_B.cpu().numpy(), dtype=np.float64)
        if cumulative_B[-1] == 0:
            yield from rng.integers(0, len(x_BD), k - len(chosen)).tolist()
            return
        n = max(1, len(chosen) // 16)
        uniform_CT = rng.random((n, TRIED)) * cumulative_B[-1]
        drawn_CT = np.searchsorted(cumulative_B, uniform_CT, side="right")
        drawn_CT = np.minimum(drawn_CT, len(x_BD) - 1)
        summed = slice(max(MIN_SUMMED, SUMMED * len(chosen)))
        gain_CT = _gains(x_BD[summed], square_B[summed], distance_B[summed], x_BD[drawn_CT.ravel()])
        drawn_C = drawn_CT[np.arange(n), gain_CT.view(n, -1).argmax(dim=1).cpu().numpy()]
        accepted = _accepted(x_BD[drawn_C], distance_B[drawn_C], rng.random(n))
        new = drawn_C[accepted].tolist()
        chosen += new
        yield from new
        distance_B = _updated(distance_B, x_BD, square_B, x_BD[new])


def _updated(distance_B: Tensor, x_BD: Tensor, square_B: Tensor, new_CD: Tensor) -> Tensor:
    """Squared distances to the nearest centre, after adding centres."""
    square_C = new_CD.square().sum(dim=1)
    parts = []
    for rows in _tiles(x_BD, len(new_CD)):
        to_new_bC = torch.addmm(square_C, x_BD[rows], new_CD.T, alpha=-2)
        to_new_b = to_new_bC.amin(dim=1) + square_B[rows]
        parts.append(torch.where(to_new_b > ROUNDING * square_B[rows], to_new_b, 0.0))
    return torch.minimum(distance_B, torch.cat(parts))


def _gains(x_BD: Tensor, square_B: Tensor, distance_B: Tensor, candidate_CD: Tensor) -> Float[Tensor, " C"]:
    """How much each candidate alone, as another centre, would lower the sum of squared distances."""
    gain_C = torch.zeros(len(candidate_CD), dtype=torch.float64, device=x_BD.device)
    square_C = candidate_CD.square().sum(dim=1)
    for rows in _tiles(x_BD, len(candidate_CD)):
        # distance - |x - c|^2
        own_b1 = (distance_B[rows] - square_B[rows])[:, None]
        gain_bC = torch.addmm(own_b1, x_BD[rows], candidate_CD.T, alpha=2)
        gain_C += gain_bC.sub_(square_C).clamp_(min=0).sum(dim=0)
    return gain_C


def _tiles(x_BD: Tensor, n_columns: int) -> list[slice]:
    size = max(1, TILE[x_BD.device.type] // n_columns)
    return [slice(i, i + size) for i in range(0, len(x_BD), size)]


def _accepted(x_CD: Tensor, before_C: Tensor, uniform_C: np.ndarray) -> list[int]:
    """Accepts candidates in order, each with probability (squared distance now) / (the same before)."""
    between_CC = torch.cdist(x_CD, x_CD, compute_mode="donot_use_mm_for_euclid_dist").square().cpu().numpy()
    start_C = before_C.cpu().numpy()
    now_C, accepted = start_C.copy(), []
    for c, uniform in enumerate(uniform_C):
        if uniform * start_C[c] < now_C[c]:
            accepted.append(c)
            np.minimum(now_C, between_CC[c], out=now_C)
    return accepted


def _warmed_up(start_KD: Tensor, x_BD: Tensor, cfg: config.KMeans) -> Tensor:
    """Runs WARM_UP iterations on a part of the sample; they cost little compared with a pass."""
    state = State(x_BD.new_zeros(x_BD.shape[1]), start_KD)
    for _ in range(WARM_UP):
        sums = _Sums(state)
        for x_CD in x_BD[: WARM_UP_SAMPLES * len(start_KD)].split(CHUNK):
            sums.add(x_CD)
        sums.finish(cfg)
    return state.center_KD


# ---- passes over the stream ----


@torch.no_grad()
def one_pass(states: list[State], acts: activations.Activations, cfg: config.KMeans) -> None:
    """Runs one iteration of Lloyd's algorithm (Lloyd 1982) for each K, in one pass over the activations.

    Empty clusters get the activations that are farthest from their centres; these leave their old clusters
    (as in scikit-learn).
    """
    sums = [_Sums(state) for state in states]
    stream = ordered.Ordered(acts)
    what = f"k-means, pass {max(s.n_passes for s in states) + 1}"
    for block in helpers.progress(stream, what, len(stream), "blocks"):
        mean_D = states[0].mean_D
        raw_BD = torch.from_numpy(stream.rows(block)).to(mean_D.device)
        x_BD = _space(raw_BD, mean_D, cfg.normalize)  # no one else uses the block
        for one in sums if len(x_BD) else []:
            one.add(x_BD)
    for one in sums:
        one.finish(cfg)


class _Sums:
    """Sums of one pass for one K: in float32 within a block, in float64 over blocks."""

    def __init__(self, state: State):
        self.state = state
        (K, D), center_KD = state.center_KD.shape, state.center_KD
        self.sum_KD = center_KD.new_zeros(K, D, dtype=torch.float64)
        self.n_K = center_KD.new_zeros(K, dtype=torch.int64)
        self.inertia = 0.0
        self.far_C, self.far_CD = center_KD.new_zeros(0), center_KD.new_zeros(0, D)
        """The K activations farthest from their centres: squared distances, activations, centres (at)."""
        self.far_at_C = center_KD.new_zeros(0, dtype=torch.int64)

    def add(self, x_BD: Tensor) -> None:
        K = len(self.n_K)
        at_B, distance_B = nearest(x_BD, self.state.center_KD)
        start_B1 = torch.arange(len(x_BD) + 1, dtype=torch.int32, device=x_BD.device)
        by = sparse.Index(at_B.int(), start_B1, K).by_latent
        self.sum_KD += sparse.bag(x_BD, by.row_n, x_BD.new_ones(len(x_BD)), by.start_S1)
        self.n_K += by.start_S1.diff()
        self.inertia += distance_B.sum(dtype=torch.float64).item()
        smallest = self.far_C[-1] if len(self.far_C) == K else 0.0
        far = distance_B.topk(min(K, len(distance_B)))
        rows_C = far.indices[far.values > smallest]
        far_C = torch.cat([self.far_C, distance_B[rows_C]])
        order_C = far_C.argsort(descending=True, stable=True)[:K]
        self.far_C = far_C[order_C]
        self.far_CD = torch.cat([self.far_CD, x_BD[rows_C]])[order_C]
        self.far_at_C = torch.cat([self.far_at_C, at_B[rows_C]])[order_C]

    def finish(self, cfg: config.KMeans) -> None:
        """Moves the centres and decides whether k-means has converged."""
        state = self.state
        empty_n = (self.n_K == 0).nonzero().flatten()[: len(self.far_C)]
        n = len(empty_n)
        far_CD, from_n = self.far_CD[:n].double(), self.far_at_C[:n]
        self.sum_KD.index_add_(0, from_n, far_CD, alpha=-1)
        self.n_K.index_add_(0, from_n, torch.ones_like(from_n), alpha=-1)
        self.sum_KD[empty_n], self.n_K[empty_n] = far_CD, 1
        center_KD = (self.sum_KD / self.n_K.clamp(min=1)[:, None]).float()
        center_KD = torch.where(self.n_K[:, None] > 0, center_KD, state.center_KD)
        if cfg.normalize:
            center_KD = torch.nn.functional.normalize(center_KD, dim=1)
        gain = state.inertia - self.inertia
        state.is_done = torch.equal(center_KD, state.center_KD) or (
            n == 0 and gain < cfg.tolerance * self.inertia
        )
        state.center_KD, state.inertia = center_KD, self.inertia
        state.n_passes += 1


# ---- between passes, on disk ----


def _write_state(state: State, fpath: pathlib.Path) -> None:
    payload = tensors.dump({"mean_D": state.mean_D.cpu(), "center_KD": state.center_KD.cpu()})
    header = {"passes": [state.inertia, state.n_passes, state.is_done]}
    checkpoint.write(fpath, "state", header, payload)


def _read_state(fpath: pathlib.Path, k: int, d_vit: int, device: torch.device) -> State | None:
    """Reads the centres of a killed fit. None if the file is missing or damaged: it then starts again."""
    if not fpath.exists():
        return None
    try:
        header, payload = checkpoint.read(fpath, "state")
        found = tensors.load(payload, str(fpath), "")
        expected = {"mean_D": torch.zeros(d_vit), "center_KD": torch.zeros(k, d_vit)}
        tensors.check_like(found, expected)
        passes = msgspec.convert(header.get("passes"), Passes)
        return State(found["mean_D"].to(device), found["center_KD"].to(device), *passes)
    except (errors.UserError, ValueError) as err:
        what = errors.first_line(err).removesuffix(f" {checkpoint.REMEDY}")
        logger.warning("%s; %s is ignored: k-means starts again", what, fpath.name)
        return None
