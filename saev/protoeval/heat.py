"""Where prototypes score on the images that they retrieve.

R retrieved images (of any scorer and trait), P patches, D d_vit, C prototypes.
"""

import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Float32, Int64, jaxtyped
from torch import Tensor

from saev import helpers, scorers
from saev.data import activations


class Heat(tp.NamedTuple):
    """Heat of one prototype on some images. Patches that are not listed have heat 0."""

    low: float
    """The score with heat 0."""
    high: float
    """The score with heat 255: the largest one."""
    start: Int64[np.ndarray, " R1"]
    """Image r's patches are start[r] to start[r + 1]."""
    patch_m: Int64[np.ndarray, " m"]
    heat_m: Int64[np.ndarray, " m"]


@torch.inference_mode()
@jaxtyped(typechecker=beartype.beartype)
def scores(
    run: list[scorers.Scorer],
    acts: activations.Activations,
    device: torch.device,
    image_R: Int64[np.ndarray, " R"],
    scorer_R: Int64[np.ndarray, " R"],
    prototype_R: Int64[np.ndarray, " R"],
) -> Float32[np.ndarray, "R P"]:
    """Patch scores; NaN for padding. Each image is read once, and scored only for its prototypes.

    Args:
        run: the scorers.
        acts: activations of patches.
        image_R, scorer_R: the images' numbers, and places in `run`.

    Raises:
        UserError: as `Activations.read`.
    """
    run = [scorer.to(device) for scorer in run]
    out_RP = np.empty((len(image_R), acts.n_tokens), np.float32)
    order_R = np.argsort(image_R, kind="stable")
    images, first_i = np.unique(image_R[order_R], return_index=True)
    positions = np.searchsorted(acts.image_is_N, images).tolist()
    pairs = enumerate(zip(positions, np.split(order_R, first_i)[1:], strict=True))
    for n, (position, rows_r) in helpers.progress(pairs, "heat", len(positions), "images"):
        x_PD = torch.from_numpy(acts.read(position, position + 1)[0]).to(device)
        for s in np.unique(scorer_R[rows_r]).tolist():
            mine_C = rows_r[scorer_R[rows_r] == s]
            out_RP[mine_C] = _scores(run[s], x_PD, prototype_R[mine_C]).T.float().cpu().numpy()
        if (is_kept_NP := acts.kept(images[n : n + 1])) is not None:
            out_RP[np.ix_(rows_r, ~is_kept_NP[0])] = np.nan
    return out_RP


def _scores(scorer: scorers.Scorer, x_PD: Tensor, prototype_C: np.ndarray) -> Tensor:
    """(P, C). Of an SAE all latents are encoded, because they may compete."""
    chosen_C = torch.from_numpy(prototype_C).to(x_PD.device)
    if isinstance(scorer, scorers.Prototypes):
        return scorer.only(chosen_C)(x_PD)
    return scorer(x_PD)[:, chosen_C]


@jaxtyped(typechecker=beartype.beartype)
def of(scores_RP: Float32[np.ndarray, "R P"], has_zero: bool) -> Heat:
    """Heat of one prototype on its images: linear from `low` to the largest score.

    Args:
        has_zero: scores are 0 where the prototype is absent, so `low` is 0. Otherwise it is the mean score.
    """
    low = 0.0 if has_zero else float(np.nanmean(scores_RP)) if scores_RP.size else 0.0
    scores_RP = np.nan_to_num(scores_RP, nan=low)
    high = float(scores_RP.max(initial=low))
    heat_RP = (255 * (scores_RP - low) / max(high - low, 1e-30)).round().clip(0, 255).astype(np.int64)
    r_m, patch_m = np.nonzero(heat_RP)
    start = np.concatenate([[0], np.cumsum(np.bincount(r_m, minlength=len(scores_RP)))]).astype(np.int64)
    return Heat(low, high, start, patch_m, heat_RP[r_m, patch_m])
