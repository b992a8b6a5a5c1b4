"""Random access to single activations, for notebooks."""

import operator
import pathlib
import typing as tp

import beartype
import torch

from saev.data import config, reader
from saev.formats import shards


class Indexed:
    """acts[i] -> {"act": (D,) float32 tensor, "image_i": int, "patch_i": int}; acts.images[j] -> (path, label).

    patch_i counts the patches in raster order; [CLS] (patches "cls" or "all") has patch_i -1.

    Raises:
        UserError: see `reader.Reader`. IndexError past the end.
    """

    @beartype.beartype
    def __init__(
        self, shard_root: str | pathlib.Path, layer: int = -1, patches: config.Patches = "image"
    ):
        self.reader = reader.Reader(config.Shards(str(shard_root), layer, patches))

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def images(self) -> list[shards.Record]:
        """Path (relative to the dataset's root) and label of each image."""
        return self.reader.dir.records

    @beartype.beartype
    def __getitem__(self, i: tp.SupportsIndex) -> dict[str, tp.Any]:
        i = operator.index(i)  # numpy's integers and zero-dimensional tensors too
        if not -len(self) <= i < len(self):
            raise IndexError(f"activation {i} of {len(self)}")
        image_i, token_i = divmod(i % len(self), self.reader.n_tokens)
        act_D = torch.from_numpy(self.reader.read(image_i, image_i + 1)[0, token_i].copy())
        return {"act": act_D, "image_i": image_i, "patch_i": self.reader.first_patch + token_i}
