"""Codes of dictionaries in files (`saev.data.passes`), written in one pass over activations. A killed pass
resumes.

B images of a block, P patches of an image, D d_vit, S latents, R rows (patches or images), N images, n codes
other than 0.
"""

import collections.abc
import dataclasses
import functools
import itertools
import pathlib
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, jaxtyped
from torch import Tensor

from saev import scorers
from saev.data import activations, memory, ordered, passes
from saev.formats import codeshards
from saev.scorers import rows as scorer_rows


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Store:
    """All codes of one dictionary, in the order of its stream."""

    shards: codeshards.Shards
    kind: str
    """The dictionary's place in the pass, which names its codes in the shards."""
    n_latents: int
    per_image: int
    """Rows of an image."""
    n_rows: int
    """Of all images. Rows of padding have no codes and do not count."""

    @property
    def n_images(self) -> int:
        return self.shards.n_imgs

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The number of codes before each shard, and of all."""
        lengths = (self.shards.sidecar(i).arrays[f"{self.kind}_latents"] for i in range(len(self.shards)))
        return [0, *itertools.accumulate(found.length for found in lengths)]

    @property
    def n_codes(self) -> int:
        return self._ends[-1]

    @property
    def density(self) -> float:
        """Fraction of codes that are not 0."""
        return self.n_codes / max(1, self.n_rows * self.n_latents)

    def rows(self, image_N: Int64[np.ndarray, " N"]) -> codeshards.Csr:
        """The codes of images, given by their places, in that order. Copied to memory."""
        shard_N = image_N // self.shards.imgs_per_shard
        # consecutive images of a shard are read at once
        breaks = np.flatnonzero((np.diff(image_N) != 1) | (np.diff(shard_N) != 0)) + 1
        firsts, lasts = image_N[np.r_[0, breaks]].tolist(), image_N[np.r_[breaks - 1, -1]].tolist()
        parts = [codeshards.Csr(*np.empty((3, 0)))] * len(firsts)
        for i in np.argsort(firsts).tolist():  # each shard is opened once
            imgs = range(firsts[i], lasts[i] + 1)
            parts[i] = self.shards.rows(self.kind, f"{self.kind}_values", self.per_image, imgs)
        return codeshards.Csr.joined(parts, codeshards.VALUES)

    def blocks(self, n: int = 2**22) -> collections.abc.Iterator[tuple[np.ndarray, np.ndarray]]:
        """Latents and values of n codes at a time. (Sums in float64 depend on n, but on no shard.)"""
        for first in range(0, self.n_codes, n):
            cuts = [
                (i, slice(max(0, first - start), first + n - start))
                for i, (start, end) in enumerate(itertools.pairwise(self._ends))
                if start < first + n and first < end
            ]
            latent_n, value_n = (
                np.concatenate([self.shards.array(i, f"{self.kind}_{name}")[part] for i, part in cuts])
                for name in ("latents", "values")
            )
            yield latent_n, value_n


Values = collections.abc.Callable[[tp.Any, Tensor, Tensor | None], Tensor]
"""(scorer, activations of images (B, P, D), whether a patch is not padding (B, P); None: none is
padding) -> their values (R, S), image after image."""
IsShown = Bool[Tensor, "B P"] | None


def per_patch(
    scorer: scorers.Scorer, acts_BPD: Float[Tensor, "B P D"], is_shown_BP: IsShown
) -> Float[Tensor, "R S"]:
    """0 on padding."""
    values_RS = scorer(acts_BPD.flatten(0, 1))
    return values_RS if is_shown_BP is None else values_RS.masked_fill(~is_shown_BP.flatten()[:, None], 0)


def per_image_max(
    scorer: scorers.Scorer, acts_BPD: Float[Tensor, "B P D"], is_shown_BP: IsShown
) -> Float[Tensor, "B S"]:
    return scorer.of_images(acts_BPD if is_shown_BP is None else ordered.filled(acts_BPD, is_shown_BP))


def per_image_mean(
    scorer: scorers.Scorer, acts_BPD: Float[Tensor, "B P D"], is_shown_BP: IsShown
) -> Float[Tensor, "B S"]:
    values_BPS = per_patch(scorer, acts_BPD, is_shown_BP).unflatten(0, acts_BPD.shape[:2])
    if is_shown_BP is None:
        return values_BPS.mean(dim=1)
    return values_BPS.sum(dim=1) / is_shown_BP.sum(dim=1, keepdim=True)


@torch.inference_mode()
def encode(
    run: list[scorers.Scorer],
    acts: activations.Activations,
    values: Values,
    dpath: pathlib.Path,
    device: torch.device,
) -> list[Store]:
    """Encodes all images of a stream by each scorer, into files in `dpath`. Resumes a killed pass.

    Args:
        values: one of this module's functions.
        dpath: folder for only these scorers and activations.

    Raises:
        UserError: bad shards or activations, or a value that is not finite.
        OSError: the disk has no room.
    """
    name = tp.cast(tp.Any, values).__name__
    n_block = memory.n_block(acts.n_tokens, max(s.n_prototypes for s in run))
    dtypes = {}
    for i in range(len(run)):
        dtypes |= codeshards.csr(str(i)) | {f"{i}_values": codeshards.VALUES}
    key = [[s.digest() for s in run], name, device.type]
    shards = passes.scratch(dpath, key, acts, n_block, dtypes)
    run = [scorer.to(device) for scorer in run]

    def write(writer: codeshards.ShardWriter, blocks: collections.abc.Iterator[ordered.Block]) -> None:
        for block in blocks:
            acts_BPD = torch.from_numpy(block.act_NXD).to(device)
            kept_BP = acts.kept(block.image_i_N)
            is_shown_BP = None if kept_BP is None else torch.from_numpy(kept_BP).to(device)
            for i, scorer in enumerate(run):
                found = scorer_rows.of_dense(values(scorer, acts_BPD, is_shown_BP))
                passes.check(found, block.image_i_N, acts)
                writer.add_codes(str(i), found)

    passes.write(shards, acts, n_block, write, "encode")
    is_whole = values is not per_patch
    sizes = (1, acts.n_imgs) if is_whole else (acts.n_tokens, len(acts))
    return [Store(shards, str(i), scorer.n_prototypes, *sizes) for i, scorer in enumerate(run)]
