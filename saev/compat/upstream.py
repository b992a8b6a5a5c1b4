"""Upstream saev checkpoints: no schema, and schemas 1 to 5. D d_vit, S latents.

`UPGRADES` holds one function per schema that turns a header into one of the next schema. Only the last schema
is interpreted. Values are checked before use, because the file may come from anywhere.
"""

import collections.abc
import logging
import pathlib
import typing as tp

import torch
from torch import Tensor

from saev import errors
from saev.compat import checks
from saev.formats import checkpoint

logger = logging.getLogger("saev")

THRESHOLD = "activation.threshold"
Header = dict[str, tp.Any]

ACTIVATIONS = {"Relu": "relu", "TopK": "top-k", "BatchTopK": "batch-top-k"}
"""Maps a class to its name in params."""
KEYS = frozenset(["schema", "cls", "cfg", "commit", "lib"])
CFG_KEYS = frozenset(
    """
    ghost_grads l1_coeff n_reinit_samples normalize_w_dec reinit_blend reinit_enc_dec_tranpose
    remove_parallel_grads seed sparsity_coeff use_ghost_grads
    """.split()  # noqa: SIM905
)
"""Keys of cfg that matter only in training."""
PARAM_KEYS = frozenset(["aux", "key", "kind", "momentum", "sparsity"])
"""Keys of an activation's params that matter only in training or repeat its name."""


class UpstreamSae(tp.NamedTuple):
    """The SAE that a header describes. Its encoder does not subtract b_dec: f = act(x W_enc + b_enc)."""

    schema: int
    activation: str
    """Relu, TopK or BatchTopK."""
    d_vit: int
    d_sae: int
    top_k: int

    def header(self) -> Header:
        """Returns saev's own header. Upstream's TopK keeps negative values among the k largest."""
        cfg: Header = {"d_vit": self.d_vit, "d_sae": self.d_sae, "normalize": "none"}
        if self.activation != "Relu":
            cfg |= {"top_k": min(self.top_k, self.d_sae), "aux_coeff": 0.0}
        if self.activation == "TopK":
            cfg["keep_negative"] = True
        return {"cls": self.activation, "cfg": cfg, "activations": {}}


def _from_none(header: Header) -> Header:
    """Without a schema, the header was the config of a ReLU SAE."""
    return {"cls": "Relu", "cfg": header}


def _from_1(header: Header) -> Header:
    """In schema 1, the class was the activation's name, or the name of a config that holds it."""
    cfg = header["cfg"]
    if header["cls"] != "SparseAutoencoderConfig":
        params = {key: cfg[key] for key in ("top_k",) if key in cfg}
        rest = {key: value for key, value in cfg.items() if key != "top_k"}
        if rest.get("activation", {"cls": header["cls"]}).get("cls") != header["cls"]:
            raise ValueError(f"cls is {header['cls']!r}, but activation is {rest['activation']!r}")
        cfg = {**rest, "activation": {"cls": header["cls"], "params": params}}
    return {"cfg": cfg}


def _from_2(header: Header) -> Header:
    """Schema 3 renamed d_vit to d_model. For one day schema 2 already used d_model."""
    return {"cfg": _renamed(dict(header["cfg"]), "d_vit", "d_model", 1)}


def _from_4(header: Header) -> Header:
    """Schema 5 replaced the expansion factor by d_sae."""
    cfg = dict(header["cfg"])
    return {"cfg": _renamed(cfg, "exp_factor", "d_sae", cfg["d_model"])}


def _renamed(cfg: Header, old: str, new: str, factor: int) -> Header:
    """Moves the old key's value, times `factor`, to the new key. If both are present, they must agree."""
    if old not in cfg:
        return cfg
    value = factor * cfg.pop(old)
    if cfg.setdefault(new, value) != value:
        raise ValueError(f"{old} gives {new} {value!r}, but {new} is {cfg[new]!r}")
    return cfg


UPGRADES: dict[int, collections.abc.Callable[[Header], Header]] = {
    0: _from_none,
    1: _from_1,
    2: _from_2,
    3: dict,  # schema 4 changed nothing that is read
    4: _from_4,
}


def upgrade(header: Header, fpath: pathlib.Path) -> UpstreamSae:
    """Interprets an upstream header.

    Raises:
        UserError: a key is missing or unknown, or a value is wrong.
    """
    schema = header.get("schema", 0)
    try:
        if schema:
            _only(header, KEYS, "its header")
        for number in range(schema, checkpoint.LAST_UPSTREAM):
            header = UPGRADES[number](header)
        cfg = header["cfg"]
        activation = cfg["activation"]
        params = activation.get("params") or {}
        _only(cfg, {"d_model", "d_sae", "activation"} | CFG_KEYS, "cfg")
        _only(activation, {"cls", "params"}, "activation")
        sizes = set() if activation["cls"] == "Relu" else {"top_k"}
        _only(params, sizes | PARAM_KEYS, f"params of {activation['cls']}")
        for key in ("key", "kind"):
            name = ACTIVATIONS.get(activation["cls"])
            if params.get(key, name) != name:
                raise ValueError(f"cls is {activation['cls']!r}, but {key} is {params[key]!r}")
        out = UpstreamSae(schema, activation["cls"], cfg["d_model"], cfg["d_sae"], params.get("top_k", 32))
        if out.activation not in ACTIVATIONS:
            raise ValueError(f"activation {out.activation!r} is unknown")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as err:
        what = f"{err} is missing" if isinstance(err, KeyError) else errors.first_line(err)
        raise errors.UserError(
            f"{fpath}: its header (upstream schema {schema or 'none'}) cannot be read: {what}. "
            "Check where the file came from."
        ) from err
    for name in ("d_vit", "d_sae", "top_k"):
        checks.positive(out._asdict(), name, str(fpath))
    return out


def convert(sae: UpstreamSae, state: dict[str, tp.Any], fpath: pathlib.Path) -> dict[str, Tensor]:
    """Converts an upstream state dict to saev's.

    Upstream's encoder does not subtract b_dec, so b_enc becomes b_enc + b_dec W_enc (in float64). A BatchTopK
    of schemas 1 to 4 may have no threshold; then every positive value fires until `saev.nn.calibrate` sets
    one. (In schemas 1 and 2, top_k counted values of the whole batch, not of each sample.)

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or a BatchTopK's threshold is negative.
    """
    D, S = sae.d_vit, sae.d_sae
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, S), "b_enc": (S,), "W_dec": (S, D), "b_dec": (D,)}
    is_batch = sae.activation == "BatchTopK"
    if is_batch and (sae.schema >= 5 or THRESHOLD in state):
        shapes[THRESHOLD] = ()
    elif is_batch:
        logger.warning(
            "%s: a BatchTopK of schema %s has no threshold; every positive value fires. "
            "saev.nn.calibrate(sae, activations, k) sets one.",
            fpath,
            sae.schema,
        )
    found = checks.take(state, shapes, str(fpath), "its header")
    threshold = found.pop(THRESHOLD, torch.zeros(()))
    if threshold < 0:
        raise errors.UserError(
            f"{fpath}: its threshold is {threshold.item():g}, so negative values above it fire. "
            "saev has no SAE that computes the same."
        )
    found["b_enc"] = found["b_enc"] + found["b_dec"] @ found["W_enc"]
    tensors = {**found, "scale": torch.ones(()), "threshold": threshold}
    return {name: tensor.float() for name, tensor in tensors.items()}


def _only(found: Header, known: collections.abc.Set[str], where: str) -> None:
    if unknown := sorted(found.keys() - known):
        raise ValueError(
            f"{where} has unknown keys ({', '.join(unknown)}), which may change what it computes"
        )
