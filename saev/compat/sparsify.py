"""Reads SAEs of sparsify (eai-sparsify): a folder with cfg.json and sae.safetensors. D d_vit, S latents."""

import pathlib
import typing as tp

import torch

from saev import fields
from saev.compat import checks, known_keys, loaders
from saev.nn import config, sae

CFG = "cfg.json"
WEIGHTS = "sae.safetensors"
LIBRARY = "sparsify"

ALLOWED = {
    "activation": ("topk",),
    "transcode": (False,),
    "skip_connection": (False,),
    "signed": (False,),  # older versions: the k largest absolute values
}
USED = {*ALLOWED, "d_in", "expansion_factor", "num_latents", "k"}


@torch.no_grad()
def load(dpath: pathlib.Path | str) -> sae.SparseAutoencoder:
    """Reads the folder of one hook point, in evaluation mode.

    Raises:
        UserError: it is not such a folder, or saev has no SAE that computes exactly the same.
    """
    dpath = fields.path(dpath)
    where, cfg = str(dpath / WEIGHTS), _cfg(dpath / CFG)
    D = cfg["d_in"]
    S = cfg["num_latents"] or D * cfg["expansion_factor"]
    shapes = {"encoder.weight": (S, D), "encoder.bias": (S,), "W_dec": (S, D), "b_dec": (D,)}
    found = loaders.read_tensors(dpath / WEIGHTS, LIBRARY)
    t = checks.take(found, shapes, where, CFG)
    parts = {**t, "W_enc": t["encoder.weight"].T, "b_enc": t["encoder.bias"]}
    sizes = {"d_vit": D, "d_sae": S, "top_k": min(cfg["k"], S)}
    return loaders.build(config.TopK(**sizes, normalize="none", aux_coeff=0.0), parts, where)


def _cfg(fpath: pathlib.Path) -> dict[str, tp.Any]:
    """Reads and checks cfg.json, and adds sparsify's defaults."""
    cfg = loaders.read_json(fpath, LIBRARY)
    checks.refuse_other(cfg, ALLOWED, str(fpath))
    checks.refuse_unknown(cfg, USED | known_keys.SPARSIFY, str(fpath))
    cfg = {"expansion_factor": 32, "num_latents": 0, "k": 32} | cfg
    size = "expansion_factor" if cfg["num_latents"] == 0 else "num_latents"
    for key in (size, "d_in", "k"):
        checks.positive(cfg, key, str(fpath))
    return cfg
