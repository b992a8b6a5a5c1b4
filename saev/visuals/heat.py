"""Heat of latents on the images that are shown for them.

An entry is an image shown for a latent. Entries are numbered latent after latent, in the order shown.

N images, P patches, S latents, C chosen latents, W images shown for a latent, E entries, m shown patches.
"""

import collections.abc
import dataclasses
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8, UInt16, jaxtyped

from saev import helpers
from saev.data import activations
from saev.visuals import coders, kernels, memory, spool, statistics


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Heat:
    """Entries of some consecutive rows. Entry e's patches are start[e] to start[e + 1]."""

    rows: range
    value_E: Float32[np.ndarray, " E"]
    """Largest value on the image's patches; 0 if the latent does not fire."""
    start_E1: Int64[np.ndarray, " E1"]
    patch_m: UInt16[np.ndarray, " m"]
    heat_m: UInt8[np.ndarray, " m"]


class Entries(tp.NamedTuple):
    """All entries."""

    latent_E: np.ndarray
    position_E: np.ndarray
    start_C1: np.ndarray
    """Row c's entries are start[c] to start[c + 1]."""

    @staticmethod
    def of(shown: statistics.Shown, chosen_C: np.ndarray) -> "Entries":
        is_shown_CW = shown.position_CW >= 0
        n_C = is_shown_CW.sum(axis=1)
        start_C1 = np.concatenate([[0], np.cumsum(n_C)])
        return Entries(np.repeat(chosen_C, n_C).astype(np.int32), shown.position_CW[is_shown_CW], start_C1)

    def of_rows(self, rows: slice) -> np.ndarray:
        """The positions of the entries of consecutive rows."""
        return self.position_E[self.start_C1[rows.start] : self.start_C1[rows.stop]]


def scale(coder: coders.Coder, codes: spool.Spool, stats: statistics.Stats) -> tuple[np.ndarray, np.ndarray]:
    """(low_S, high_S): the values with heat 0 and heat 255.

    From 0 to the maximum. If images are ranked by score: from the mean score to the maximum.
    """
    if codes.ranked is None:
        return np.zeros_like(stats.high_S), np.maximum(stats.high_S, 0)
    mean_S = codes.ranked.total_S / codes.n_shown_N.sum()
    return mean_S.astype(np.float32), codes.ranked.value_SK[:, 0]


def parts(
    coder: coders.Coder,
    acts: activations.Activations,
    codes: spool.Spool,
    entries: Entries,
    low_S: np.ndarray,
    high_S: np.ndarray,
) -> collections.abc.Iterator[Heat]:
    """Yields the heat of all entries, some rows at a time."""
    if coder.is_ranked_by_score:
        most_E = np.full(len(entries.latent_E), codes.n_patches)
        for rows in _rows(entries, most_E):
            yield _of_scores(coder, acts, entries, rows, low_S, high_S)
        return
    order_E = np.lexsort((entries.latent_E, entries.position_E))
    latent_E = entries.latent_E[order_E]
    start_N1 = np.searchsorted(entries.position_E[order_E], np.arange(codes.n_imgs + 1))
    slot_S = np.full(coder.n, -1, np.int32)
    patches_e, peak_e = np.zeros(len(latent_E), np.int32), np.zeros(len(latent_E), np.float32)
    for first, fired in codes.blocks("count"):
        kernels.count_entries(
            *fired, codes.n_patches, first, start_N1, latent_E, slot_S, coder.is_signed, patches_e, peak_e
        )
    n_E, value_E = np.empty_like(patches_e), np.empty_like(peak_e)
    n_E[order_E], value_E[order_E] = patches_e, peak_e
    for rows in _rows(entries, n_E):
        e0, e1 = entries.start_C1[[rows.start, rows.stop]].tolist()
        start_E1 = np.concatenate([[0], np.cumsum(n_E[e0:e1], dtype=np.int64)])
        cursor_E = np.full(len(latent_E), -1, np.int64)
        cursor_E[e0:e1] = start_E1[:-1]
        cursor_e = cursor_E[order_E]
        patch_m, heat_m = np.empty(start_E1[-1], np.uint16), np.empty(start_E1[-1], np.uint8)
        for first, fired in codes.blocks("heat"):
            kernels.fill_entries(
                *fired, codes.n_patches, first, start_N1, latent_E, slot_S, coder.is_signed,
                low_S, high_S, cursor_e, patch_m, heat_m,
            )  # fmt: skip
        yield Heat(rows, value_E[e0:e1], start_E1, patch_m, heat_m)


def _rows(entries: Entries, n_E: np.ndarray) -> list[range]:
    """Divides the rows so that each part has about memory.MAX_SHOWN patches."""
    total_E1 = np.concatenate([[0], np.cumsum(n_E, dtype=np.int64)])
    part_C = total_E1[entries.start_C1[:-1]] // memory.MAX_SHOWN
    starts = np.flatnonzero(np.diff(part_C, prepend=-1)).tolist()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(part_C)], strict=True)]


@torch.inference_mode()
def _of_scores(
    coder: coders.Coder,
    acts: activations.Activations,
    entries: Entries,
    rows: range,
    low_S: np.ndarray,
    high_S: np.ndarray,
) -> Heat:
    """Scores the images again for the chosen prototypes only."""
    e0, e1 = entries.start_C1[[rows.start, rows.stop]].tolist()
    latent_E, position_E = entries.latent_E[e0:e1], entries.position_E[e0:e1]
    order_E = np.argsort(position_E, kind="stable")
    positions, first_e = np.unique(position_E[order_E], return_index=True)
    value_E, n_E = np.empty(e1 - e0, np.float32), np.zeros(e1 - e0, np.int64)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    mine = np.split(order_E, first_e[1:])
    pairs = zip(positions.tolist(), mine, strict=True)
    for position, e_C in helpers.progress(pairs, "heat", len(positions), "images"):
        acts_PD = torch.from_numpy(acts.read(position, position + 1)[0]).to(coder.device)
        score_CP = coder.scores(acts_PD, latent_E[e_C]).T.float().cpu().numpy()
        if acts.is_kept_NT is not None:  # padding
            score_CP[:, ~acts.is_kept_NT[position]] = -np.inf
        value_E[e_C] = score_CP.max(axis=1)
        low_C1, high_C1 = low_S[latent_E[e_C], None], high_S[latent_E[e_C], None]
        n_E[e_C] = (score_CP > low_C1).sum(axis=1)
        c_m, patch_m = np.nonzero(score_CP > low_C1)
        heat_CP = (score_CP - low_C1) / np.maximum(high_C1 - low_C1, 1e-30)
        heat_m = (255 * heat_CP[c_m, patch_m]).round().clip(1, 255).astype(np.uint8)
        found.append((e_C, patch_m.astype(np.uint16), heat_m))
    start_E1 = np.concatenate([[0], np.cumsum(n_E)])
    patch_M, heat_M = np.empty(start_E1[-1], np.uint16), np.empty(start_E1[-1], np.uint8)
    for e_C, patch_m, heat_m in found:
        n_C = n_E[e_C]
        at_m = np.arange(len(patch_m)) + np.repeat(start_E1[e_C] - np.cumsum(n_C) + n_C, n_C)
        patch_M[at_m], heat_M[at_m] = patch_m, heat_m
    return Heat(rows, value_E, start_E1, patch_M, heat_M)
