"""A label for every patch, kept beside the shards (docs/patch-labels.md).

    labels.bin     (images, patches) of the dump, in its order: the ids of classes
    labels.json    names of the ids, the id of patches without a label, how they were made, checksums

A second source has a name: labels-NAME.bin and labels-NAME.json. Protocol 2.x has labels.bin alone: bytes
that are ids without names.

Shape letters: N images, P patches.
"""

import dataclasses
import pathlib
import typing as tp

import beartype
import msgspec
import numpy as np
import xxhash
from jaxtyping import Int32, Shaped, jaxtyped

from saev import errors, helpers
from saev.formats import jsonfile, shards, staging

AGAIN = "Run the same `python -m saev.labels` command again."
DTYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2")}
MAX_ID = 2**16 - 2
"""The largest id of a class."""
NONE = -1
"""The number of a patch without a label, and of [CLS]."""


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """labels.json."""

    classes: dict[int, str]
    """Names by id."""
    ignore: int
    """The id of patches without a label."""
    dtype: tp.Literal["uint8", "uint16"]
    metadata: str
    """Hash of the dump's metadata.json."""
    made: dict[str, tp.Any]
    """Where the labels come from, and the rule."""
    labels: str
    """XXH3 (128 bits, hex) of the labels' bytes."""


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class PatchLabels:
    """Labels of all patches of a dump."""

    id_NP: Shaped[np.ndarray, "N P"]
    """Each patch's class."""
    classes: dict[int, str]
    """Names by id, ascending. In a protocol 2.x dump the names are the ids."""
    ignore: int
    """The id of patches without a label. -1: every patch has one."""
    made: dict[str, tp.Any]
    """Where the labels come from. Empty in a protocol 2.x dump."""


def paths(dpath: pathlib.Path, name: str = "") -> tuple[pathlib.Path, pathlib.Path]:
    """The files (labels, header) of a source."""
    stem = f"labels-{name}" if name else "labels"
    return dpath / f"{stem}.bin", dpath / f"{stem}.json"


def dtype_for(largest: int) -> tuple[str, int]:
    """The narrowest dtype for ids up to `largest`, and the id that it leaves for patches without a label."""
    return ("uint8", 2**8 - 1) if largest < 2**8 - 1 else ("uint16", 2**16 - 1)


@jaxtyped(typechecker=beartype.beartype)
def write(
    shard_dir: shards.ShardDir,
    name: str,
    id_NP: Shaped[np.ndarray, "N P"],
    classes: dict[int, str],
    made: dict[str, tp.Any],
) -> pathlib.Path:
    """Writes labels beside the shards and returns the path of labels.bin.

    Args:
        id_NP: ids of `classes`; -1 for patches without a label.
    """
    dtype, ignore = dtype_for(max(classes, default=0))
    data = np.where(id_NP < 0, ignore, id_NP).astype(DTYPES[dtype]).tobytes()
    header = Header(
        dict(sorted(classes.items())),
        ignore,
        tp.cast(tp.Literal["uint8", "uint16"], dtype),
        shard_dir.metadata.hash,
        made,
        xxhash.xxh3_128_hexdigest(data),
    )
    bin_fpath, json_fpath = paths(shard_dir.dpath, name)
    json_fpath.unlink(missing_ok=True)  # labels without a header are refused, old ones with a new one too
    with helpers.atomic(bin_fpath) as tmp_fpath:
        tmp_fpath.write_bytes(data)
    helpers.write_text(json_fpath, jsonfile.seal(msgspec.to_builtins(header, str_keys=True)))
    return bin_fpath


def read(shard_dir: shards.ShardDir, name: str = "") -> PatchLabels:
    """Reads the labels beside the shards.

    Raises:
        UserError: there are none, they are damaged, or they were made for another dump.
    """
    bin_fpath, json_fpath = paths(shard_dir.dpath, name)
    metadata = shard_dir.metadata
    shape = (metadata.n_imgs, metadata.n_patches_per_img)
    try:
        data = jsonfile.read_bytes(bin_fpath, AGAIN, 2**40)
    except FileNotFoundError as err:
        others = sorted(
            p.stem.removeprefix("labels").lstrip("-") for p in shard_dir.dpath.glob("labels*.bin")
        )
        hint = f" It has: {', '.join(other or '(without a name)' for other in others)}." if others else ""
        raise errors.UserError(
            f"{bin_fpath}: no such file.{hint} Label the patches with `python -m saev.labels`."
        ) from err
    if not json_fpath.exists():
        if shard_dir.is_ours:
            raise errors.UserError(f"{json_fpath} is missing. {AGAIN}")
        return _of_protocol_2(bin_fpath, data, shape)
    header = jsonfile.read_sealed(json_fpath, Header, AGAIN)
    if header.metadata != metadata.hash:
        raise errors.UserError(f"{json_fpath}: was made for another dump. {AGAIN}")
    if xxhash.xxh3_128_hexdigest(data) != header.labels:
        raise errors.UserError(f"{bin_fpath}: differs from its checksum. {AGAIN}")
    id_NP = np.frombuffer(data, DTYPES[header.dtype]).reshape(shape)
    return PatchLabels(id_NP, header.classes, header.ignore, header.made)


def numbered(part: shards.ShardDir, name: str, number: dict[str, int]) -> Int32[np.ndarray, "N P"]:
    """Labels as numbers of the classes' names, or NONE. New names get the next numbers.

    Raises:
        UserError: as `read`, or a label has no name.
    """
    labels = read(staging.original(part), name)
    class_of = np.full(MAX_ID + 2, NONE, np.int32)
    known = np.zeros(len(class_of), bool)
    known[labels.ignore] = True
    for i, class_name in labels.classes.items():
        class_of[i] = number.setdefault(class_name, len(number))
        known[i] = True
    found = np.unique(labels.id_NP)
    if not known[found].all():
        raise errors.UserError(
            f"{part.dpath}: its patch labels have the id {found[~known[found]][0]}, which has no name. "
            f"{AGAIN}"
        )
    return class_of[labels.id_NP]


def _of_protocol_2(fpath: pathlib.Path, data: bytes, shape: tuple[int, int]) -> PatchLabels:
    if len(data) != shape[0] * shape[1]:
        raise errors.UserError(
            f"{fpath}: has {len(data):,} bytes; {shape[0]:,} images of {shape[1]} patches need "
            f"{shape[0] * shape[1]:,}. Restore it."
        )
    id_NP = np.frombuffer(data, np.uint8).reshape(shape)
    return PatchLabels(id_NP, {int(i): str(i) for i in np.unique(id_NP)}, -1, {})
