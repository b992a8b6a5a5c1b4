"""Reads SAEs of the package dictionary_learning: a folder with ae.pt and config.json. D d_vit, S latents.

Codes and reconstructions are those of the saved module. (AutoEncoder.from_pretrained of that package divides
decoder vectors by their norms and multiplies the codes by them, which changes no reconstruction.)
"""

import logging
import pathlib
import typing as tp

import torch
from torch import Tensor

from saev import errors, fields
from saev.compat import checks, known_keys, loaders
from saev.formats import tensors
from saev.nn import config, sae

logger = logging.getLogger("saev")

CFG = "config.json"
WEIGHTS = "ae.pt"
LIBRARY = "dictionary_learning"

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
KINDS: dict[str, tuple[tp.Any, tuple[str, ...]]] = {
    "AutoEncoder": (config.Relu, ("encoder.weight", "encoder.bias", "decoder.weight", "bias")),
    "AutoEncoderNew": (config.Relu, ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")),
    "AutoEncoderTopK": (config.TopK, LINEAR),
    "BatchTopKSAE": (config.BatchTopK, LINEAR),
    "MatryoshkaBatchTopKSAE": (config.BatchTopK, PLAIN),
    "JumpReluAutoEncoder": (config.JumpRelu, PLAIN),
    "GatedAutoEncoder": (config.JumpRelu, ("encoder.weight", "mag_bias", "decoder.weight", "decoder_bias")),
}
"""Maps dict_class to our architecture and to its names of W_enc, b_enc, W_dec and b_dec. A torch.nn.Linear's
weight is transposed."""
NOT_SUBTRACTED = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Classes whose encoder does not subtract b_dec."""


@torch.no_grad()
def load(dpath: pathlib.Path | str) -> sae.SparseAutoencoder:
    """Reads the folder of one trainer, in evaluation mode.

    Raises:
        UserError: it is not such a folder, or saev has no SAE that computes exactly the same.
    """
    dpath = fields.path(dpath)
    where, cfg = str(dpath / WEIGHTS), _cfg(dpath / CFG)
    kind = cfg["dict_class"]
    architecture, names = KINDS[kind]
    with loaders.reading(dpath / WEIGHTS, LIBRARY):
        payload = (dpath / WEIGHTS).read_bytes()
    state = tensors.load(payload, where, f"Pass a folder that {LIBRARY} saved.")
    k = _k(cfg, state, dpath)
    D, S = _size(cfg, state, where)
    shapes: dict[str, tuple[int, ...]] = dict(zip(names, [(D, S), (S,), (S, D), (D,)], strict=True))
    shapes |= {name: shapes[name][::-1] for name in shapes if name.endswith(".weight")}
    if kind == "GatedAutoEncoder":
        shapes |= {"r_mag": (S,), "gate_bias": (S,)}
    if kind == "JumpReluAutoEncoder":
        shapes["threshold"] = (S,)
    elif k and "threshold" in state:  # older versions saved none
        shapes["threshold"] = ()
    if kind == "MatryoshkaBatchTopKSAE":  # all groups are active in a loaded module
        state.pop("group_sizes", None)
    t = checks.take(state, shapes, where, CFG)
    found = [t[name].T if name.endswith(".weight") else t[name] for name in names]
    parts = dict(zip(PLAIN, found, strict=True))
    threshold = t.get("threshold")
    if kind == "GatedAutoEncoder":  # as in saev.compat.saelens
        gain_S = t["r_mag"].exp()
        threshold = parts["b_enc"] - gain_S * t["gate_bias"]
        parts["W_enc"] = parts["W_enc"] * gain_S
    if kind.endswith("BatchTopKSAE") and (threshold is None or threshold < 0):
        logger.warning(
            "%s: its threshold was never set; every positive value fires. "
            "saev.nn.calibrate(sae, activations, k) sets one.",
            where,
        )
    subtracts = kind not in NOT_SUBTRACTED
    if architecture is config.TopK:
        threshold = None  # the package stores one but does not use it by default
    sparse = {"top_k": min(k, S), "aux_coeff": 0.0} if k else {}
    sae_cfg = architecture(d_vit=D, d_sae=S, normalize="none", **sparse)
    return loaders.build(sae_cfg, parts, where, subtracts_b_dec=subtracts, threshold=threshold)


def _cfg(fpath: pathlib.Path) -> dict[str, tp.Any]:
    """Reads config.json and returns its "trainer", checked."""
    whole = loaders.read_json(fpath, LIBRARY)
    checks.refuse_unknown(whole, {"trainer", "buffer"}, str(fpath))
    cfg = whole.get("trainer")
    if not isinstance(cfg, dict):
        raise errors.UserError(f"{fpath}: has no trainer. Pass a folder that {LIBRARY} saved.")
    if cfg.get("dict_class") not in [*KINDS]:
        raise errors.UserError(
            f"{fpath}: dict_class is {cfg.get('dict_class')!r}; saev can read {', '.join(KINDS)}."
        )
    known = {"dict_class", "activation_dim", "dict_size", "k"} | known_keys.DICTIONARY_LEARNING
    checks.refuse_unknown(cfg, known, str(fpath))
    return cfg


def _k(cfg: dict[str, tp.Any], state: dict[str, tp.Any], dpath: pathlib.Path) -> int:
    """Returns a TopK's k, or 0 for other classes. Removes the tensor k from `state`."""
    if "TopK" not in cfg["dict_class"]:
        if "k" in cfg:
            raise errors.UserError(f"{dpath / CFG}: k is {cfg['k']!r}, but a {cfg['dict_class']} has none.")
        return 0
    stored = state.pop("k", None)
    if stored is None:
        return checks.positive(cfg, "k", str(dpath / CFG))
    if not isinstance(stored, Tensor) or stored.ndim or stored.is_floating_point():
        raise errors.UserError(f"{dpath / WEIGHTS}: its k is not a whole number.")
    if cfg.get("k", stored.item()) != stored.item():
        raise errors.UserError(
            f"{dpath / WEIGHTS}: its k is {stored.item()}, but {CFG} says {cfg['k']!r}. "
            "The file is truncated or edited."
        )
    return checks.positive({"k": stored.item()}, "k", str(dpath / WEIGHTS))


def _size(cfg: dict[str, tp.Any], state: dict[str, tp.Any], where: str) -> tuple[int, int]:
    """Returns (D, S) as the config gives them, or else the encoder's shape."""
    name = KINDS[cfg["dict_class"]][1][0]
    encoder = state.get(name)
    if not isinstance(encoder, Tensor) or encoder.ndim != 2:
        raise errors.UserError(f"{where}: tensor {name} is missing. The file is truncated or edited.")
    D, S = encoder.shape[::-1] if name.endswith(".weight") else encoder.shape
    sizes = {"activation_dim": D, "dict_size": S, **cfg}
    return checks.positive(sizes, "activation_dim", where), checks.positive(sizes, "dict_size", where)
