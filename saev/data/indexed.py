"""Random access to single activations, for notebooks."""

import operator
import pathlib
import typing as tp

import numpy as np
import torch

from saev.data import activations, config
from saev.formats import shards


class Indexed:
    """Activations by number: `acts[i]` is {"act": (D,) float32 tensor, "image_i", "patch_i", "layer": int}.

    patch_i counts patches in raster order, and is -1 for [CLS] (patches "cls" or "all").
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
            raise IndexError(f"activation {i} of {len(self)}")
        acts, i = self.acts, i % len(self)
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
