"""`Space`: the ViT, layers and tokens of activations. SAEs and prototypes are meaningful only there."""

import collections.abc
import dataclasses
import typing as tp

import beartype

from saev import errors

AUTOCAST = "@bf16"
"""Suffix of vit_ckpt if the ViT ran under bfloat16 autocast."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Space:
    """The ViT, layers and tokens of activations. None means unknown, as in checkpoints of other tools."""

    d_vit: int
    vit_family: str | None = None
    vit_ckpt: str | None = None
    """Without the suffix: bfloat16 autocast counts as the same ViT."""
    layers: tuple[int, ...] | None = None
    patches: str | None = None
    autocast: bool = False

    @staticmethod
    def of(found: collections.abc.Mapping[str, tp.Any], d_vit: int) -> "Space":
        """The space from (part of) what `describe` returned."""
        ckpt = found.get("vit_ckpt")
        return Space(
            d_vit,
            found.get("vit_family") or None,
            ckpt.removesuffix(AUTOCAST) if ckpt else None,
            tuple(found.get("layers") or ()) or None,
            found.get("patches") or None,
            bool(ckpt) and ckpt.endswith(AUTOCAST),
        )

    def describe(self) -> dict[str, object]:
        """The known parts of the space, for files."""
        return {
            "vit_family": self.vit_family,
            "vit_ckpt": self.vit_ckpt and f"{self.vit_ckpt}{AUTOCAST * self.autocast}",
            "layers": list(self.layers or ()),
            "patches": self.patches,
            "d_vit": self.d_vit,
        }

    def check_same(self, other: "Space", *, whose: str, flag: str, patches: bool = True) -> None:
        """Refuses activations of another space. Compares what both know.

        Args:
            whose: owner of this space, for the message.
            flag: source of the other activations, such as "--fit-data.shard-root shards/x".
            patches: compare [CLS] and patch tokens too.

        Raises:
            UserError: another width, ViT or layer, or (with `patches`) other tokens.
        """
        pairs = {
            "ViT family": (self.vit_family, other.vit_family),
            "ViT": (self.vit_ckpt, other.vit_ckpt),
            "d_vit": (self.d_vit, other.d_vit),
            "layer": (self._layer, other._layer),
            "patches": (self.patches, other.patches) if patches else ("", ""),
        }
        differ = [
            f"{name} {theirs} instead of {mine}"
            for name, (mine, theirs) in pairs.items()
            if mine and theirs and mine != theirs
        ]
        if differ:
            raise errors.UserError(
                f"{flag}: not in the space of {whose}: {', '.join(differ)}. "
                f"Pass activations of the same ViT and layer{' and the same patches' * patches}."
            )

    @property
    def _layer(self) -> str:
        return ", ".join(map(str, self.layers or ()))
