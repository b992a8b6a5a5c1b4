"""Headers of SAE checkpoints that other tools of the field wrote: schemas none and 1 to 5, brought to one form.

Each schema is turned into the next by one function of a table; only the last is looked at. Values are
checked when they are used, never trusted: the file may come from anywhere.
"""

import collections.abc
import pathlib
import typing as tp

import beartype

from saev import errors

LAST = 5
Header = dict[str, tp.Any]


class FieldSae(tp.NamedTuple):
    """What a header says of its SAE. The encoder does not subtract b_dec: f = act(x W_enc + b_enc)."""

    schema: int
    activation: str
    """Relu, TopK or BatchTopK."""
    d_vit: int
    d_sae: int
    top_k: int


def is_field(header: Header) -> bool:
    """Is this a header of the field's, not one of ours?"""
    if header.get("lib") == "saev" or "kind" in header:
        return False
    if "schema" in header:
        return header["schema"] in range(1, LAST + 1) and not isinstance(header["schema"], bool)
    return "d_vit" in header and "exp_factor" in header


def _from_none(header: Header) -> Header:
    """The header was the config of a ReLU SAE."""
    return {"cls": "Relu", "cfg": header}


def _from_1(header: Header) -> Header:
    """The class was the activation's name, or that of a config that holds it."""
    cfg = header["cfg"]
    if header["cls"] != "SparseAutoencoderConfig":
        cfg = {
            **cfg,
            "activation": {"cls": header["cls"], "params": {"top_k": cfg.get("top_k", 32)}},
        }
    return {"cfg": cfg}


def _from_2(header: Header) -> Header:
    """d_vit became d_model."""
    cfg = dict(header["cfg"])
    return {"cfg": {**cfg, "d_model": cfg["d_vit"]}}


def _from_4(header: Header) -> Header:
    """The expansion factor became d_sae."""
    cfg = header["cfg"]
    return {"cfg": {"d_sae": cfg["d_model"] * cfg.get("exp_factor", 1), **cfg}}


UPGRADES: dict[int, collections.abc.Callable[[Header], Header]] = {
    0: _from_none,
    1: _from_1,
    2: _from_2,
    3: dict,  # what 4 changed is not read
    4: _from_4,
}


@beartype.beartype
def upgrade(header: Header, fpath: pathlib.Path) -> FieldSae:
    """What a field header says.

    Raises:
        UserError: it lacks something, or says something that no such SAE has.
    """
    schema = header.get("schema", 0)
    try:
        for number in range(schema, LAST):
            header = UPGRADES[number](header)
        cfg = header["cfg"]
        activation = cfg["activation"]
        params = activation.get("params") or {}
        out = FieldSae(
            schema, activation["cls"], cfg["d_model"], cfg["d_sae"], params.get("top_k", 32)
        )
        _check(out)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as err:
        what = f"{err} is missing" if isinstance(err, KeyError) else errors.first_line(err)
        raise errors.UserError(
            f"{fpath}: its header (the field's schema {schema or 'none'}) cannot be read: {what}. Check where the file came from."
        ) from err
    return out


def _check(sae: FieldSae) -> None:
    if sae.activation not in ("Relu", "TopK", "BatchTopK"):
        raise ValueError(f"activation {sae.activation!r} is unknown")
    for name in ("d_vit", "d_sae", "top_k"):
        value = getattr(sae, name)
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"{name} is {value!r}")
    if sae.d_sae % sae.d_vit:
        raise ValueError(f"d_sae {sae.d_sae} is not a multiple of d_model {sae.d_vit}")
