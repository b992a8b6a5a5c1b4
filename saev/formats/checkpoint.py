"""Checkpoint files of SAEs and scorers: one line of JSON (the header), then opaque bytes (the tensors).

The header says what the bytes are, so a file can be identified with `head -1` and refused before any tensor
is read. Nothing here unpickles; `saev.nn` and `saev.scorers` read the bytes with `weights_only=True`.

Headers of this package carry {"lib": "saev", "schema": SCHEMA, "kind": "sae" | "scorer" | "state", "checksum": ..., ...}: the XXH3-128
of the header (without it) and the bytes. From schema 102 on it must be there. Older schemas have "xxh3", of the bytes alone, or none;
a header of theirs with a key that they had not is refused, so that no damaged "102" or "xxh3" makes a file pass as an older one.
Schema numbers start at 100 because files with 1 to 5 (and with none) exist in the field and mean something else (`field`).
"""

import collections.abc
import pathlib
import typing as tp

import beartype
import xxhash

from saev import errors, helpers
from saev.formats import field, jsonfile

SCHEMA = 102
"""Schema that this version writes. A change of the format takes the next number."""


def _from_100(header: dict[str, tp.Any]) -> dict[str, tp.Any]:
    """101 says what an SAE was trained on; its configs have an auxiliary loss, which 100's had not."""
    cfg = header.get("cfg")
    if header.get("cls") in ("TopK", "BatchTopK") and isinstance(cfg, dict):
        cfg = {"aux_coeff": 0.0, **cfg}
    return {**header, "cfg": cfg, "activations": {}}


UPGRADES: dict[int, collections.abc.Callable[[dict[str, tp.Any]], dict[str, tp.Any]]] = {
    100: _from_100,
    101: dict,  # 102 has a checksum of the header too
}
"""Schema n -> header of schema n + 1."""

_KEYS_100 = {"lib", "schema", "kind", "cls", "cfg", "similarity", "run", "n_steps", "passes"}
OLD_KEYS = {100: _KEYS_100, 101: {*_KEYS_100, "activations", "xxh3"}}
"""Keys that headers of older schemas may have."""
REMEDY = "Delete it and run the command that wrote it again."

Kind = tp.Literal["sae", "scorer", "state"]


@beartype.beartype
def write(fpath: pathlib.Path, kind: Kind, header: dict[str, object], payload: bytes) -> None:
    """Writes header and payload atomically."""
    text = jsonfile.dumps({"lib": "saev", "schema": SCHEMA, "kind": kind, **header})
    plain = jsonfile.parse(text, dict[str, tp.Any], str(fpath), "")
    line = jsonfile.dumps(plain | {"checksum": jsonfile.checksum(plain, payload)})
    with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
        fd.write(line.encode() + b"\n")
        fd.write(payload)


@beartype.beartype
def read(fpath: pathlib.Path, wanted: Kind) -> tuple[dict[str, tp.Any], bytes]:
    """Reads (header, payload). Headers of older schemas are brought to the present one.

    Where an SAE is wanted, one of the field's (`field.is_field`) is given as it stands.

    Raises:
        UserError: no such file, a directory, not a checkpoint, another kind, or a schema that this version does not know.
    """
    if fpath.is_dir():
        found = sorted(str(p) for p in fpath.rglob("*.pt"))[:3]
        hint = f"Did you mean {found[0]}?" if found else "Pass the file inside it (sae.pt)."
        raise errors.UserError(f"{fpath} is a directory, not a checkpoint file. {hint}")
    if not fpath.is_file():
        raise errors.UserError(
            f"{fpath}: no such checkpoint. Pass the sae.pt that train.py printed."
        )
    with fpath.open("rb") as fd:
        header = _parse_header(fpath, fd.readline(1 << 20))
        payload = fd.read()
    if wanted == "sae" and field.is_field(header):
        return header, payload
    _check_header(fpath, header, wanted)
    if not _is_whole(header, payload):
        raise errors.UserError(
            f"{fpath}: its bytes are not those that were written (checksum). {REMEDY}"
        )
    for schema in range(header["schema"], SCHEMA):
        header = UPGRADES[schema](header)
    return header, payload


def _is_whole(header: dict[str, tp.Any], payload: bytes) -> bool:
    """Compares the checksum, and takes it out of the header."""
    if header["schema"] in OLD_KEYS:
        has_known_keys = header.keys() <= OLD_KEYS[header["schema"]]
        said = header.pop("xxh3", None)
        return has_known_keys and said in (None, xxhash.xxh3_128_hexdigest(payload))
    said = header.pop("checksum", None)
    return said == jsonfile.checksum(header, payload)


@beartype.beartype
def kind(fpath: pathlib.Path) -> str | None:
    """The kind that a checkpoint's header names; None where there is no such header (`read` then says why).

    The field's headers name none: they are SAEs.
    """
    if not fpath.is_file():
        return None
    with fpath.open("rb") as fd:
        header = _parse_header(fpath, fd.readline(1 << 20))
    said = header.get("kind")
    return "sae" if field.is_field(header) else said if isinstance(said, str) else None


def _parse_header(fpath: pathlib.Path, line: bytes) -> dict[str, tp.Any]:
    try:
        return jsonfile.parse(line, dict[str, tp.Any], str(fpath), "")
    except errors.UserError as err:
        raise errors.UserError(
            f"{fpath}: not a saev checkpoint: its first line is not a JSON header. "
            "Pass a file that train.py or protoeval.py wrote."
        ) from err


def _check_header(fpath: pathlib.Path, header: dict[str, tp.Any], wanted: Kind) -> None:
    known = [*UPGRADES, SCHEMA]
    schema = header.get("schema")
    if header.get("lib") != "saev" or type(schema) is not int or schema not in known:
        raise errors.UserError(
            f"{fpath}: checkpoint schema {header.get('schema', 'missing')!r} (lib {header.get('lib')!r}) is unknown to "
            f"this version, which reads schemas {known[0]} to {SCHEMA} of lib 'saev'. Use the version that wrote it, or retrain."
        )
    if header.get("kind") != wanted:
        raise errors.UserError(
            f"{fpath}: holds a {header.get('kind')!r}, but a {wanted!r} is needed here. Pass a file of that kind."
        )
