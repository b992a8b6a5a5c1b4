"""metadata.json of a shard directory, in our protocol and older and newer upstream ones, under our names."""

import dataclasses
import json
import pathlib
import typing as tp

import beartype
import msgspec

from saev import errors, helpers
from saev.formats import jsonfile

PROTOCOL = "1.0.0"
PROTOCOL_HALF = "1.0.1"
"""Protocol of dtypes other than float32. Readers that know only 1.0.0 refuse it, and misread no bytes."""
PROTOCOL_PADDED = "1.2.0"
"""Protocol of dumps with padding (--resize pad or flexible). Readers that do not know padding refuse it."""
READABLE = ("1.0", "1.1", "1.2", "2.0", "2.1")
"""Protocols (major.minor) whose acts files have the same layout."""
ALIASES = {
    "vit_family": ("family",),
    "vit_ckpt": ("ckpt",),
    "d_vit": ("d_model",),
    "n_imgs": ("n_examples",),
    "n_patches_per_img": ("patches_per_ex", "content_tokens_per_example"),
    "max_patches_per_shard": ("patches_per_shard", "max_tokens_per_shard"),
}
"""Maps our names of keys to those of protocols 1.1 and 2.x."""
AGAIN = "Dump the directory again."
Layer = tp.Annotated[int, msgspec.Meta(ge=0, le=10_000)]
Count = tp.Annotated[int, msgspec.Meta(ge=1, le=2**20)]
"""Patches or dimensions. Larger numbers mean a damaged file, and readers would allocate terabytes."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Metadata:
    """metadata.json of protocol 1.0.0, key for key."""

    vit_family: str
    vit_ckpt: str
    layers: tp.Annotated[tuple[Layer, ...], msgspec.Meta(min_length=1, max_length=1000)]
    n_patches_per_img: Count
    cls_token: bool
    d_vit: Count
    n_imgs: tp.Annotated[int, msgspec.Meta(ge=1, le=2**32)]
    max_patches_per_shard: tp.Annotated[int, msgspec.Meta(ge=1, le=2**48)]
    data: dict[str, object] | str
    """The dataset's config. In 2.x it is a pickle in base64, which is never decoded."""
    dtype: str = "float32"
    protocol: str = PROTOCOL

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise errors.UserError(
                f"dtype {self.dtype!r} is not supported (supported: {', '.join(ITEM_BYTES)})."
            )
        if len(set(self.layers)) < len(self.layers):
            raise errors.UserError(f"layers {self.layers} repeat a layer.")
        if self.imgs_per_shard < 1:
            raise errors.UserError(
                f"--max-patches-per-shard {self.max_patches_per_shard} is smaller than one image "
                f"({self.n_tokens} tokens x {len(self.layers)} layers). "
                f"Pass at least {self.n_tokens * len(self.layers)}."
            )

    @property
    def n_tokens(self) -> int:
        """Tokens per image, [CLS] included."""
        return self.n_patches_per_img + int(self.cls_token)

    @property
    def has_padding(self) -> bool:
        """Whether some patches may show nothing of their photo."""
        return self.protocol.startswith("1.2")

    @property
    def imgs_per_shard(self) -> int:
        return self.max_patches_per_shard // (self.n_tokens * len(self.layers))

    @property
    def n_shards(self) -> int:
        return -(-self.n_imgs // self.imgs_per_shard)

    @property
    def token_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * self.d_vit

    @property
    def img_bytes(self) -> int:
        return self.token_bytes * len(self.layers) * self.n_tokens

    @property
    def hash(self) -> str:
        """The full sha256 hex digest of the canonical JSON: the directory's name in protocol 1.0."""
        return helpers.hash_of(self._fields())

    def imgs_in(self, shard_i: int) -> range:
        """Returns the numbers of the images in shard `shard_i`."""
        n = self.imgs_per_shard
        return range(shard_i * n, min((shard_i + 1) * n, self.n_imgs))

    def _fields(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "layers": list(self.layers)}

    def dumps(self) -> str:
        return json.dumps(self._fields(), indent=4)

    @classmethod
    def loads(cls, data: bytes | str, fpath: pathlib.Path) -> "Metadata":
        """Parses metadata.json of any readable protocol.

        Raises:
            UserError: it is not JSON, its protocol or dtype is not supported, or keys are missing or have
                wrong values (named).
        """
        obj = jsonfile.parse(data, dict[str, object], str(fpath), AGAIN)
        if "protocol" not in obj:  # June 2025: float32 without saying so
            obj = {"protocol": PROTOCOL, "dtype": "float32"} | obj
        protocol = obj["protocol"]
        if not isinstance(protocol, str) or ".".join(protocol.split(".")[:2]) not in READABLE:
            raise errors.UserError(
                f"{fpath}: shard protocol {protocol!r} is not supported "
                f"(supported: {', '.join(READABLE)}). Dump the activations again."
            )
        our_name = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
        renamed = {our_name.get(key, key): value for key, value in obj.items()}
        if len(renamed) < len(obj):
            repeated = sorted(key for key in obj if our_name.get(key) in obj)
            raise errors.UserError(
                f"{fpath}: {', '.join(repeated) or 'a key'} appears under two names. {AGAIN}"
            )
        names = {f.name for f in dataclasses.fields(cls)}
        if missing := sorted(names - renamed.keys()):
            raise errors.UserError(f"{fpath}: keys missing: {', '.join(missing)}. {AGAIN}")
        try:
            return msgspec.convert({k: v for k, v in renamed.items() if k in names}, cls)
        except (errors.UserError, ValueError) as err:
            what = str(err) if isinstance(err, errors.UserError) else errors.first_line(err)
            raise errors.UserError(f"{fpath}: does not fit protocol {protocol} ({what}). {AGAIN}") from err


def stored_as(dtype: str, has_padding: bool = False) -> dict[str, tp.Any]:
    """Returns the fields `dtype` and `protocol` of a new dump."""
    protocol = PROTOCOL if dtype == "float32" else PROTOCOL_HALF
    return {"dtype": dtype, "protocol": PROTOCOL_PADDED if has_padding else protocol}
