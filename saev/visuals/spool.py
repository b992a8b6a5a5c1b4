"""The one pass over the activations. It writes all codes to files (`saev.data.passes`), from which everything
else is computed. A killed pass resumes.

X patches of a block, S prototypes, K top images.
"""

import collections.abc
import dataclasses
import functools
import pathlib

import beartype
import numpy as np
import torch
from jaxtyping import Float64, jaxtyped

from saev import helpers
from saev.data import activations, ordered, passes
from saev.formats import codeshards
from saev.visuals import coders, kernels

REVISION = 2
"""Increment it when the codes change: then older passes are not resumed."""
DTYPES = codeshards.csr("patch") | {"patch_values": codeshards.VALUES}
RANKED = {"top_values": codeshards.VALUES, "top_positions": codeshards.LATENTS, "totals": np.dtype("<f8")}
"""Arrays of a shard if images are ranked by score: its own `Ranked`, with the totals of each block."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass
class Ranked:
    """Scores of all patches, for coders that rank by them."""

    value_SK: np.ndarray
    """float32: the largest scores (maxima over an image's patches), descending; -inf if there are fewer."""
    position_SK: np.ndarray
    """int32: their images' positions in the stream. Among equal scores the lower one is first."""
    total_S: Float64[np.ndarray, " S"]
    """Sum over all patches."""

    @staticmethod
    def empty(n: int, k: int) -> "Ranked":
        return Ranked(np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int32), np.zeros(n))


@dataclasses.dataclass(frozen=True)
class Spool:
    """The codes of a finished pass."""

    shards: codeshards.Shards
    n_patches: int
    """Per image."""
    block: int
    """Images that are read at a time."""
    ranked: Ranked | None
    n_shown_N: np.ndarray
    """int64: patches of each image that are not padding. The others have no codes."""

    @property
    def n_imgs(self) -> int:
        return self.shards.n_imgs

    @functools.cached_property
    def n_codes(self) -> int:
        return sum(self.shards.sidecar(i).arrays["patch_latents"].length for i in range(len(self.shards)))

    def blocks(self, desc: str) -> collections.abc.Iterator[tuple[int, codeshards.Csr]]:
        """Reads all codes: (position of the first image, codes of consecutive images)."""
        parts = self.shards.parts(range(self.n_imgs), self.block)
        for imgs in helpers.progress(parts, desc, len(parts), "blocks"):
            yield imgs.start, self.rows(imgs)

    def rows(self, imgs: range) -> codeshards.Csr:
        """Codes of consecutive images of one shard."""
        return self.shards.rows("patch", "patch_values", self.n_patches, imgs)


@torch.inference_mode()
def run(
    coder: coders.Coder, acts: activations.Activations, k: int, n_block: int, dpath: pathlib.Path
) -> Spool:
    """Encodes activations into files in `dpath`, and resumes a killed pass.

    Args:
        k: number of top images to rank by score, if the coder does.
        n_block: images that are encoded at a time.

    Raises:
        UserError: bad shards, or codes that are not finite.
    """
    is_ranked = coder.is_ranked_by_score
    key = [REVISION, coder.kind, coder.digest(), coder.device.type, *[k] * is_ranked]
    shards = passes.scratch(dpath, key, acts, n_block, DTYPES | (RANKED if is_ranked else {}))
    passes.write(shards, acts, n_block, functools.partial(_write, coder, acts, k), "encode")
    ranked = _ranked(shards, coder.n, k) if is_ranked else None
    return Spool(shards, acts.n_tokens, n_block, ranked, acts.n_kept_N)


def _write(
    coder: coders.Coder,
    acts: activations.Activations,
    k: int,
    writer: codeshards.ShardWriter,
    blocks: collections.abc.Iterator[ordered.Block],
) -> None:
    """Writes a shard."""
    ranked = Ranked.empty(coder.n if coder.is_ranked_by_score else 0, k)
    for block in blocks:
        x_XD = torch.from_numpy(block.act_NXD).flatten(0, 1).to(coder.device)
        is_shown_NP = acts.kept(block.image_i_N)
        if coder.is_ranked_by_score:
            scores_XS = coder.scores(x_XD)
            fired = coder.of(scores_XS)
            scores_NPS = scores_XS.unflatten(0, block.act_NXD.shape[:2])
            first = int(np.searchsorted(acts.image_is_N, block.image_i_N[0]))
            ranks_NPS = scores_NPS
            if is_shown_NP is not None:
                is_padding_NP1 = torch.from_numpy(~is_shown_NP).to(coder.device)[:, :, None]
                ranks_NPS = scores_NPS.masked_fill(is_padding_NP1, -torch.inf)
                scores_NPS = scores_NPS.masked_fill(is_padding_NP1, 0)
            kernels.rank(ranks_NPS.amax(dim=1).cpu().numpy(), first, ranked.value_SK, ranked.position_SK)
            writer.add("totals", scores_NPS.sum(dim=(0, 1), dtype=torch.float64).cpu().numpy())
        else:
            fired = coder(x_XD)
        fired = fired.of_rows(None if is_shown_NP is None else is_shown_NP.ravel())
        passes.check(fired, block.image_i_N, acts, coder.noun)
        writer.add_codes("patch", fired)
    if coder.is_ranked_by_score:
        writer.add("top_values", ranked.value_SK)
        writer.add("top_positions", ranked.position_SK)


def _ranked(shards: codeshards.Shards, n: int, k: int) -> Ranked:
    """Those of all shards."""
    out = Ranked.empty(n, k)
    for i in range(len(shards)):
        top, at, total = (shards.array(i, name) for name in RANKED)
        kernels.merge(top.reshape(n, k), at.reshape(n, k), out.value_SK, out.position_SK)
        for total_S in total.reshape(-1, n):
            out.total_S += total_S
    return out
