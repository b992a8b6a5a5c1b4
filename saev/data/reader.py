"""The only code that reads acts*.bin: blocks of consecutive images of one layer.

Shape letters: N images, T tokens of an image that were asked for, D d_vit.
"""

import beartype
import numpy as np
from jaxtyping import Float32, jaxtyped

from saev import errors
from saev.data import config
from saev.formats import shards


class Reader:
    """One layer and one choice of tokens of a complete shard directory.

    Raises:
        UserError: see `shards.ShardDir.open`; also a layer that was not recorded, or [CLS] asked of a model without.
    """

    @beartype.beartype
    def __init__(self, cfg: config.Shards):
        if not cfg.shard_root:
            raise errors.UserError(
                "--data.shard-root is missing: pass the directory that `python -m saev.data` printed."
            )
        self.dir = shards.ShardDir.open(cfg.shard_root)
        self.metadata = self.dir.metadata
        self.layer_i = self.dir.layer_i(cfg.layer)
        self.layer = self.metadata.layers[self.layer_i]
        self.tokens = _token_slice(self.metadata, cfg)
        self.n_imgs = self.metadata.n_imgs
        self.n_tokens = self.tokens.stop - self.tokens.start
        self.d_vit = self.metadata.d_vit
        self._open_i, self._open_acts = -1, None

    def __len__(self) -> int:
        """Activations in the stream."""
        return self.n_imgs * self.n_tokens

    @property
    def first_patch(self) -> int:
        """patch_i of token 0 of the choice: -1 stands for [CLS]."""
        return self.tokens.start - int(self.metadata.cls_token)

    @jaxtyped(typechecker=beartype.beartype)
    def read(self, start: int, stop: int) -> Float32[np.ndarray, "N T D"]:
        """Activations of images start ... stop - 1, as a copy in memory.

        Raises:
            UserError: a shard file vanished or was cut while reading.
        """
        out_NTD = np.empty((stop - start, self.n_tokens, self.d_vit), np.float32)
        per_shard = self.metadata.imgs_per_shard
        at = start
        while at < stop:
            shard_i, first = divmod(at, per_shard)
            n = min(stop - at, per_shard - first)
            acts_NLTD = self._acts(shard_i)
            out_NTD[at - start : at - start + n] = acts_NLTD[
                first : first + n, self.layer_i, self.tokens
            ]
            at += n
        return out_NTD

    def _acts(self, shard_i: int) -> np.memmap:
        """Keeps the last shard open: consecutive reads mostly stay in one."""
        if shard_i != self._open_i:
            try:
                self._open_i, self._open_acts = shard_i, self.dir.acts(shard_i)
            except (OSError, ValueError) as err:
                raise errors.UserError(
                    f"{self.dir.acts_fpath(shard_i)}: cannot be read ({err}). Run the same `python -m saev.data` command again."
                ) from err
        return self._open_acts


def _token_slice(metadata: shards.Metadata, cfg: config.Shards) -> slice:
    n_cls = int(metadata.cls_token)
    if cfg.patches == "cls" and not n_cls:
        raise errors.UserError(
            f"{cfg.shard_root}: {metadata.vit_ckpt} has no [CLS] token. Pass --data.patches image."
        )
    return {
        "image": slice(n_cls, metadata.n_tokens),
        "cls": slice(0, n_cls),
        "all": slice(0, metadata.n_tokens),
    }[cfg.patches]


@beartype.beartype
def check_finite(acts: np.ndarray, reader: Reader, first_img: int) -> None:
    """Raises UserError naming the first image (of images first_img ...) with a NaN or infinite activation."""
    if np.isfinite(acts.sum(dtype=np.float64)):
        return
    bad_i = np.flatnonzero(~np.isfinite(acts).reshape(len(acts), -1).all(axis=1))
    if len(bad_i):
        raise errors.UserError(
            f"{reader.dir.dpath}: image {first_img + int(bad_i[0])} has NaN or infinite activations at layer {reader.layer}. "
            "Delete its shard and run the same dump again."
        )
