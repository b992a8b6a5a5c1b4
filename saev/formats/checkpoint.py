"""Checkpoint files of SAEs and scorers: one line of JSON (the header), then opaque bytes (the tensors).

The header describes the bytes, so `head -1` identifies a file, and a wrong file is refused before any tensor
is read. Nothing here unpickles; `saev.nn` and `saev.scorers` read the bytes with `weights_only=True`.

Headers carry {"lib": "saev", "schema": SCHEMA, "kind": "sae" | "scorer" | "state", "checksum": ..., ...}.
`checksum` is the XXH3-128 of the rest of the header and the bytes. Schema 102 requires it. Older schemas have
"xxh3" (of the bytes only) or nothing. Their headers are refused if they have keys that the schema did not
define. So a new file with a damaged "schema" or "checksum" key cannot pass as an older one.

Schema numbers start at 100 because upstream saev uses 1 to 5 (and no number) for other formats.
"""

import collections.abc
import pathlib
import typing as tp

import xxhash

from saev import errors, helpers
from saev.formats import jsonfile

SCHEMA = 102
"""The schema that this version writes. Increment it whenever the format changes."""

LAST_UPSTREAM = 5
"""Upstream's schemas are 1 to this, or missing."""


def _from_100(header: dict[str, tp.Any]) -> dict[str, tp.Any]:
    """Schema 101 added the activations that an SAE was trained on, and the auxiliary loss in configs."""
    cfg = header.get("cfg")
    if isinstance(cfg, dict) and "top_k" in cfg:
        cfg = {"aux_coeff": 0.0, **cfg}
    return {**header, "cfg": cfg, "activations": {}}


UPGRADES: dict[int, collections.abc.Callable[[dict[str, tp.Any]], dict[str, tp.Any]]] = {
    100: _from_100,
    101: dict,  # 102 added a checksum that covers the header
}
"""Maps schema n to a function that upgrades its header to schema n + 1."""

_KEYS_100 = {"lib", "schema", "kind", "cls", "cfg", "similarity", "run", "n_steps", "passes"}
OLD_KEYS = {100: _KEYS_100, 101: {*_KEYS_100, "activations", "xxh3"}}
"""Keys allowed in headers of older schemas."""
REMEDY = "Delete it and run the command that wrote it again."

Kind = tp.Literal["sae", "scorer", "state"]


def write(
    fpath: pathlib.Path, kind: Kind, header: collections.abc.Mapping[str, object], payload: bytes
) -> None:
    """Writes header and payload atomically."""
    text = jsonfile.dumps({"lib": "saev", "schema": SCHEMA, "kind": kind, **header})
    plain = jsonfile.parse(text, dict[str, tp.Any], str(fpath), "")
    line = jsonfile.dumps(plain | {"checksum": jsonfile.checksum(plain, payload)})
    with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
        fd.write(line.encode() + b"\n")
        fd.write(payload)


def read(fpath: pathlib.Path, wanted: Kind) -> tuple[dict[str, tp.Any], bytes]:
    """Reads (header, payload) and upgrades the headers of older schemas.

    If an SAE is wanted, the header of an upstream checkpoint (`is_upstream`) is returned unchanged.

    Raises:
        UserError: the file is missing, a directory, no checkpoint, damaged, or of another kind or schema.
    """
    if fpath.is_dir():
        found = sorted(str(p) for p in fpath.rglob("*.pt"))[:3]
        hint = f"Did you mean {found[0]}?" if found else "Pass the sae.pt that train.py printed."
        raise errors.UserError(f"{fpath} is a directory, not a checkpoint file. {hint}")
    if not fpath.is_file():
        raise errors.UserError(f"{fpath}: no such checkpoint. Pass the sae.pt that train.py printed.")
    with fpath.open("rb") as fd:
        header = _parse_header(fpath, fd.readline(1 << 20))
        payload = fd.read()
    if wanted == "sae" and is_upstream(header):
        return header, payload
    _check_header(fpath, header, wanted)
    if not _is_whole(header, payload):
        raise errors.UserError(f"{fpath}: its bytes changed since it was written (checksum). {REMEDY}")
    for schema in range(header["schema"], SCHEMA):
        header = UPGRADES[schema](header)
    return header, payload


def is_upstream(header: dict[str, tp.Any]) -> bool:
    """Whether this is the header of an upstream checkpoint (`saev.compat.upstream`)."""
    if header.get("lib") == "saev" or "kind" in header:
        return False
    if "schema" in header:
        return type(header["schema"]) is int and 1 <= header["schema"] <= LAST_UPSTREAM
    return "d_vit" in header and "exp_factor" in header


def _is_whole(header: dict[str, tp.Any], payload: bytes) -> bool:
    """Removes the checksum from the header and compares it."""
    if header["schema"] in OLD_KEYS:
        has_known_keys = header.keys() <= OLD_KEYS[header["schema"]]
        recorded = header.pop("xxh3", None)
        return has_known_keys and recorded in (None, xxhash.xxh3_128_hexdigest(payload))
    recorded = header.pop("checksum", None)
    return recorded == jsonfile.checksum(header, payload)


def kind(fpath: pathlib.Path) -> str | None:
    """Returns the kind in a checkpoint's header (upstream's have none: they are SAEs).

    None if there is no kind or no file; `read` then explains why.
    """
    if not fpath.is_file():
        return None
    with fpath.open("rb") as fd:
        header = _parse_header(fpath, fd.readline(1 << 20))
    name = header.get("kind")
    return "sae" if is_upstream(header) else name if isinstance(name, str) else None


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
            f"{fpath}: checkpoint schema {header.get('schema', 'missing')!r} (lib "
            f"{header.get('lib')!r}) is unknown to this version, which reads schemas {known[0]} to "
            f"{SCHEMA} of lib 'saev'. Use the version that wrote it, or retrain."
        )
    if header.get("kind") != wanted:
        raise errors.UserError(
            f"{fpath}: holds a {header.get('kind')!r}, but a {wanted!r} is needed here. "
            "Pass a file of that kind."
        )
