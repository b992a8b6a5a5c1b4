"""Random access to single activations, for notebooks."""

import functools
import operator
import pathlib
import typing as tp

import numpy as np
import torch
from jaxtyping import Int64

from saev.data import activations, config
from saev.formats import shards


class Indexed:
    """Activations by number: `acts[i]` is {"act": (D,) float32 tensor, "image_i", "patch_i", "layer": int}.

    patch_i counts patches in raster order, and is -1 for [CLS] (patches "cls" or "all"). Padding is left out.
    `acts.images[image_i]` is the image's path and label, also of unreadable images (without activations).

    Raises:
        UserError: see `Activations`.
        IndexError: i is past the end.
    """

    def __init__(
        self,
        shard_root: str | pathlib.Path,
        layer: int | tp.Literal["all"] = -1,
        patches: config.Patches = "image",
    ):
        cfg = config.Shards(str(shard_root), layer, patches)
        self.acts = activations.Activations(cfg).advised(activations.RANDOM)

    def __len__(self) -> int:
        return len(self.acts)

    @property
    def images(self) -> list[shards.Record]:
        """Path, relative to the dataset's root, and label of each image."""
        return self.acts.records

    def __getitem__(self, i: tp.SupportsIndex) -> dict[str, tp.Any]:
        i = operator.index(i)  # also accepts numpy integers and 0-d tensors
        if not -len(self) <= i < len(self):
            raise IndexError(f"activation {i}: there are only {len(self)}")
        acts, i = self.acts, self._in_dump(i % len(self))
        stored_D = np.empty(acts.d_vit, shards.STORED[acts.dtype])
        acts.read_extents(acts.extents(np.array([i]), np.array([1])), stored_D.data.cast("B"))
        position, x = divmod(i, acts.n_per_img)
        layer_i, token_i = divmod(x, acts.n_tokens)
        return {
            "act": torch.from_numpy(acts.decoded(stored_D)),
            "image_i": int(acts.image_is_N[position]),
            "patch_i": acts.first_patch + token_i,
            "layer": acts.layers[layer_i],
        }

    @functools.cached_property
    def _ends_N(self) -> Int64[np.ndarray, " N"]:
        """Activations of the first images, of two, ..., without padding."""
        return np.cumsum(self.acts.n_kept_N) * len(self.acts.layers)

    def _in_dump(self, i: int) -> int:
        """Activation i's number if padding is counted too."""
        acts = self.acts
        if acts.is_kept_NT is None:
            return i
        position = int(np.searchsorted(self._ends_N, i, "right"))
        n_kept = int(acts.n_kept_N[position])
        layer_i, k = divmod(i - int(self._ends_N[position]) + n_kept * len(acts.layers), n_kept)
        token_i = int(np.flatnonzero(acts.is_kept_NT[position])[k])
        return position * acts.n_per_img + layer_i * acts.n_tokens + token_i
