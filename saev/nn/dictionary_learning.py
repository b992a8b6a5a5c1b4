"""SAEs that the package dictionary_learning trained (a folder with ae.pt and config.json). D d_vit, S latents.

    python -m saev.nn.dictionary_learning load FOLDER sae.pt

Codes and reconstructions are those of the module that was saved. (Its AutoEncoder.from_pretrained divides decoder vectors by
their norms and multiplies the codes by them, which leaves reconstructions as they are.)
"""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import logging
import pathlib
import typing as tp

import beartype
import torch
from torch import Tensor

from saev import errors, fields, launch
from saev.formats import tensors
from saev.nn import config, foreign, foreign_keys, loaders, sae

logger = logging.getLogger("saev")

CFG = "config.json"
WEIGHTS = "ae.pt"
LIBRARY = "dictionary_learning"

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
NAMES = {
    "AutoEncoder": ("encoder.weight", "encoder.bias", "decoder.weight", "bias"),
    "AutoEncoderNew": ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"),
    "AutoEncoderTopK": LINEAR,
    "BatchTopKSAE": LINEAR,
    "MatryoshkaBatchTopKSAE": PLAIN,
    "JumpReluAutoEncoder": PLAIN,
    "GatedAutoEncoder": ("encoder.weight", "mag_bias", "decoder.weight", "decoder_bias"),
}
"""dict_class -> its names of W_enc, b_enc, W_dec and b_dec. A torch.nn.Linear's weight is the transpose of ours."""
NOT_SUBTRACTED = ("AutoEncoderNew", "JumpReluAutoEncoder")
"""Classes whose encoder sees x, not x - b_dec."""


@torch.no_grad()
@beartype.beartype
def load(dpath: pathlib.Path | str) -> sae.SparseAutoencoder:
    """Reads the folder of one trainer, in evaluation mode.

    Raises:
        UserError: not such a folder, or an SAE that ours cannot express exactly.
    """
    dpath = fields.path(dpath)
    where, cfg = str(dpath / WEIGHTS), _cfg(dpath / CFG)
    kind = cfg["dict_class"]
    state = _state(dpath / WEIGHTS)
    k = _k(cfg, state, dpath)
    D, S = _size(cfg, state, where)
    shapes = dict(zip(NAMES[kind], [(D, S), (S,), (S, D), (D,)], strict=True))
    shapes |= {name: shapes[name][::-1] for name in shapes if name.endswith(".weight")}
    if kind == "GatedAutoEncoder":
        shapes |= {"r_mag": (S,), "gate_bias": (S,)}
    if kind == "JumpReluAutoEncoder":
        shapes["threshold"] = (S,)
    elif k and "threshold" in state:  # older TopKs have none
        shapes["threshold"] = ()
    if kind == "MatryoshkaBatchTopKSAE":  # all groups are active in a module that is loaded
        state.pop("group_sizes", None)
    t = foreign.take(state, shapes, where, CFG)
    parts = {
        ours: t[name].T if name.endswith(".weight") else t[name]
        for ours, name in zip(PLAIN, NAMES[kind], strict=True)
    }
    threshold = t.get("threshold")
    if kind == "GatedAutoEncoder":  # as in saev.nn.saelens
        gain_S = t["r_mag"].exp()
        threshold = parts["b_enc"] - gain_S * t["gate_bias"]
        parts["W_enc"] = parts["W_enc"] * gain_S
    if kind.endswith("BatchTopKSAE") and (threshold is None or threshold < 0):
        logger.warning("%s: its threshold was never set; every positive value fires.", where)
    subtracts = kind not in NOT_SUBTRACTED
    ours = _ours(kind, D, S, k)
    is_top_k = isinstance(ours, config.TopK)  # whose threshold the library does not use by default
    threshold = None if is_top_k else threshold
    return loaders.build(ours, parts, where, subtracts_b_dec=subtracts, threshold=threshold)


def _ours(kind: str, d_vit: int, d_sae: int, k: int) -> config.Sae:
    common = {"d_vit": d_vit, "d_sae": d_sae, "normalize": "none"}
    sparse = {**common, "top_k": min(k, d_sae), "aux_coeff": 0.0}
    match kind:
        case "AutoEncoder" | "AutoEncoderNew":
            return config.Relu(**common)
        case "AutoEncoderTopK":
            return config.TopK(**sparse)
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            return config.BatchTopK(**sparse)
        case _:
            return config.JumpRelu(**common)


def _cfg(fpath: pathlib.Path) -> dict[str, tp.Any]:
    """ "trainer" of config.json, checked."""
    whole = loaders.read_json(fpath, LIBRARY)
    foreign.refuse_unknown(whole, {"trainer", "buffer"}, str(fpath))
    cfg = whole.get("trainer")
    if not isinstance(cfg, dict):
        raise errors.UserError(f"{fpath}: has no trainer. Pass a folder that {LIBRARY} saved.")
    if cfg.get("dict_class") not in [*NAMES]:
        raise errors.UserError(
            f"{fpath}: dict_class is {cfg.get('dict_class')!r}; saev can read {', '.join(NAMES)}."
        )
    known = {"dict_class", "activation_dim", "dict_size", "k"} | foreign_keys.DICTIONARY_LEARNING
    foreign.refuse_unknown(cfg, known, str(fpath))
    return cfg


def _state(fpath: pathlib.Path) -> dict[str, tp.Any]:
    try:
        payload = fpath.read_bytes()
    except OSError as err:
        raise loaders.unreadable(fpath, err, LIBRARY) from err
    return tensors.load(payload, str(fpath), f"Pass a folder that {LIBRARY} saved.")


def _k(cfg: dict[str, tp.Any], state: dict[str, tp.Any], dpath: pathlib.Path) -> int:
    """Latents of a TopK, from tensor and config; 0 where the class has none. Takes the tensor out."""
    if "TopK" not in cfg["dict_class"]:
        if "k" in cfg:
            raise errors.UserError(
                f"{dpath / CFG}: k is {cfg['k']!r}, but a {cfg['dict_class']} has none."
            )
        return 0
    stored = state.pop("k", None)
    if stored is None:
        return foreign.positive(cfg, "k", str(dpath / CFG))
    if not isinstance(stored, Tensor) or stored.ndim or stored.is_floating_point():
        raise errors.UserError(f"{dpath / WEIGHTS}: its k is not a whole number.")
    if cfg.get("k", stored.item()) != stored.item():
        raise errors.UserError(
            f"{dpath / WEIGHTS}: its k is {stored.item()}, but {CFG} says {cfg['k']!r}. The file is cut or edited."
        )
    return foreign.positive({"k": stored.item()}, "k", str(dpath / WEIGHTS))


def _size(cfg: dict[str, tp.Any], state: dict[str, tp.Any], where: str) -> tuple[int, int]:
    """(D, S) by the config, where it says them, else by the encoder's shape."""
    name = NAMES[cfg["dict_class"]][0]
    encoder = state.get(name)
    if not isinstance(encoder, Tensor) or encoder.ndim != 2:
        raise errors.UserError(f"{where}: tensor {name} is missing. The file is cut or edited.")
    D, S = encoder.shape[::-1] if name.endswith(".weight") else encoder.shape
    said = {"activation_dim": D, "dict_size": S, **cfg}
    return tuple(foreign.positive(said, key, where) for key in ("activation_dim", "dict_size"))


if __name__ == "__main__":
    launch.entry(lambda: loaders.command("saev.nn.dictionary_learning", LIBRARY, load))
