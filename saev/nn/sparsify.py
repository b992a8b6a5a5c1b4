"""SAEs that the package sparsify (eai-sparsify) trained: a folder with cfg.json and sae.safetensors. D d_vit, S latents.

python -m saev.nn.sparsify load FOLDER sae.pt
"""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import pathlib
import typing as tp

import beartype
import safetensors
import safetensors.torch
import torch

from saev import fields, launch
from saev.nn import config, foreign, foreign_keys, loaders, sae

CFG = "cfg.json"
WEIGHTS = "sae.safetensors"
LIBRARY = "sparsify"

ALLOWED = {
    "activation": ("topk",),
    "transcode": (False,),
    "skip_connection": (False,),
    "signed": (False,),  # of old versions: the k largest by size
}
HONOURED = {*ALLOWED, "d_in", "expansion_factor", "num_latents", "k"}


@torch.no_grad()
@beartype.beartype
def load(dpath: pathlib.Path | str) -> sae.SparseAutoencoder:
    """Reads the folder of one hook point, in evaluation mode.

    Raises:
        UserError: not such a folder, or a coder that ours cannot express exactly.
    """
    dpath = fields.path(dpath)
    where, cfg = str(dpath / WEIGHTS), _cfg(dpath / CFG)
    D = cfg["d_in"]
    S = cfg["num_latents"] or D * cfg["expansion_factor"]
    shapes = {"encoder.weight": (S, D), "encoder.bias": (S,), "W_dec": (S, D), "b_dec": (D,)}
    try:
        found = safetensors.torch.load_file(dpath / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as err:
        raise loaders.unreadable(dpath / WEIGHTS, err, LIBRARY) from err
    t = foreign.take(found, shapes, where, CFG)
    parts = {**t, "W_enc": t["encoder.weight"].T, "b_enc": t["encoder.bias"]}
    sizes = {"d_vit": D, "d_sae": S, "top_k": min(cfg["k"], S)}
    return loaders.build(config.TopK(**sizes, normalize="none", aux_coeff=0.0), parts, where)


def _cfg(fpath: pathlib.Path) -> dict[str, tp.Any]:
    """cfg.json, checked, with sparsify's defaults."""
    cfg = loaders.read_json(fpath, LIBRARY)
    foreign.refuse_other(cfg, ALLOWED, str(fpath))
    foreign.refuse_unknown(cfg, HONOURED | foreign_keys.SPARSIFY, str(fpath))
    cfg = {"expansion_factor": 32, "num_latents": 0, "k": 32} | cfg
    if cfg["num_latents"] == 0:
        foreign.positive(cfg, "expansion_factor", str(fpath))
    else:
        foreign.positive(cfg, "num_latents", str(fpath))
    for key in ("d_in", "k"):
        foreign.positive(cfg, key, str(fpath))
    return cfg


if __name__ == "__main__":
    launch.entry(lambda: loaders.command("saev.nn.sparsify", LIBRARY, load))
