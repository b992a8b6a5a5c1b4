"""SAEs in SAELens' on-disk format (a folder with cfg.json and sae_weights.safetensors), both ways. D d_vit, S latents.

    python -m saev.nn.saelens export checkpoints/RUN/sae.pt FOLDER
    python -m saev.nn.saelens load FOLDER sae.pt

Both ways codes and reconstructions of raw activations stay the same: our input scale is folded into the weights.
"""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import json
import pathlib
import shutil
import typing as tp
import uuid

import beartype
import safetensors
import safetensors.torch
import torch
import tyro
from torch import Tensor

from saev import cli, errors, fields, launch
from saev.nn import config, sae

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"


@torch.no_grad()
@beartype.beartype
def export(model: sae.SparseAutoencoder, dpath: pathlib.Path | str) -> None:
    """Writes the folder; it appears whole or not at all.

    A BatchTopK becomes a JumpReLU with one threshold, which is what it is at inference (SAELens does the same).

    Raises:
        UserError: the folder exists.
    """
    dpath = fields.path(dpath)
    if dpath.exists():
        raise errors.UserError(f"{dpath} exists already. Pass a new folder.")
    scale = model.scale.double()
    tensors = {
        "W_enc": model.W_enc.double() * scale,
        "b_enc": model.b_enc.double(),
        "W_dec": model.W_dec.double() / scale,
        "b_dec": model.b_dec.double() / scale,
    }
    cfg: dict[str, tp.Any] = {
        "d_in": model.d_vit,
        "d_sae": model.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"trained_on": model.activations},
    }
    match model.cfg:
        case config.Relu():
            cfg["architecture"] = "standard"
        case config.TopK(top_k=k):
            cfg |= {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
        case config.BatchTopK():
            cfg["architecture"] = "jumprelu"
            tensors["threshold"] = model.threshold.double().expand(model.d_sae)
        case config.JumpRelu():
            cfg["architecture"] = "jumprelu"
            tensors["threshold"] = model.log_threshold.double().exp()
    _write(dpath, cfg, {k: v.float().cpu().contiguous() for k, v in tensors.items()})


def _write(dpath: pathlib.Path, cfg: dict[str, tp.Any], tensors: dict[str, Tensor]) -> None:
    tmp_dpath = dpath.with_name(f".{dpath.name}.{uuid.uuid4().hex}.tmp")
    tmp_dpath.mkdir(parents=True)
    try:
        (tmp_dpath / CFG).write_text(json.dumps(cfg, indent=4))
        safetensors.torch.save_file(tensors, tmp_dpath / WEIGHTS)
        tmp_dpath.rename(dpath)
    finally:
        shutil.rmtree(tmp_dpath, ignore_errors=True)


@torch.no_grad()
@beartype.beartype
def load(dpath: pathlib.Path | str) -> sae.SparseAutoencoder:
    """Reads SAELens' standard, topk and jumprelu SAEs, in evaluation mode.

    Raises:
        UserError: not such a folder, or an SAE that ours cannot express exactly.
    """
    dpath = fields.path(dpath)
    cfg, found = _cfg(dpath), _tensors(dpath)
    D, S = cfg["d_in"], cfg["d_sae"]
    shapes = {"W_enc": (D, S), "b_enc": (S,), "W_dec": (S, D), "b_dec": (D,)}
    architecture = cfg.get("architecture", "standard")
    if architecture == "jumprelu":
        shapes["threshold"] = (S,)
    for name, shape in shapes.items():
        if name not in found or tuple(found[name].shape) != shape:
            seen = f"has shape {tuple(found[name].shape)}" if name in found else "is missing"
            raise errors.UserError(f"{dpath / WEIGHTS}: tensor {name} {seen}; wanted is {shape}.")
        found[name] = found[name].double()
        if found[name].isnan().any():
            raise errors.UserError(f"{dpath / WEIGHTS}: tensor {name} holds NaN.")
    if not cfg.get("apply_b_dec_to_input", True):
        found["b_enc"] = found["b_enc"] + found["b_dec"] @ found["W_enc"]
    if cfg.get("rescale_acts_by_decoder_norm"):
        norm_S = found["W_dec"].norm(dim=1)
        found["W_enc"], found["b_enc"] = found["W_enc"] * norm_S, found["b_enc"] * norm_S
        found["W_dec"] = found["W_dec"] / norm_S[:, None]
    common = {"d_vit": D, "d_sae": S, "normalize": "none"}
    match architecture:
        case "standard":
            model = sae.SparseAutoencoder(config.Relu(**common))
        case "topk":
            model = sae.SparseAutoencoder(config.TopK(**common, top_k=cfg["k"], aux_coeff=0.0))
        case "jumprelu":
            model = sae.SparseAutoencoder(config.JumpRelu(**common))
            # a threshold of 0 or less is 0: only positive values fire
            model.log_threshold.copy_(found["threshold"].clamp(min=0).log())
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(model, name).copy_(found[name])
    metadata = cfg.get("metadata")
    trained_on = metadata.get("trained_on") if isinstance(metadata, dict) else None
    model.activations = trained_on if isinstance(trained_on, dict) else {}
    return sae.ready(model, str(dpath / WEIGHTS))


def _cfg(dpath: pathlib.Path) -> dict[str, tp.Any]:
    """cfg.json, checked.

    Raises:
        UserError: see `load`.
    """
    fpath = dpath / CFG
    try:
        cfg = json.loads(fpath.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise errors.UserError(
            f"{fpath} cannot be read ({errors.first_line(err)}). Pass a folder that SAELens saved."
        ) from err
    wanted = {
        "architecture": ("standard", "topk", "jumprelu"),
        "normalize_activations": ("none",),
        "reshape_activations": ("none",),
    }
    for key, values in wanted.items():
        seen = cfg.get(key, values[0]) if isinstance(cfg, dict) else None
        if seen not in values:
            raise errors.UserError(
                f"{fpath}: {key} is {seen!r}; saev has only {', '.join(values)}. Convert it with SAELens first."
            )
    names = ["d_in", "d_sae", *(["k"] if cfg.get("architecture") == "topk" else [])]
    for name in names:
        if type(cfg.get(name)) is not int or cfg[name] < 1:
            raise errors.UserError(f"{fpath}: {name} is {cfg.get(name)!r}, not a positive integer.")
    if cfg["d_sae"] % cfg["d_in"]:
        raise errors.UserError(
            f"{fpath}: d_sae {cfg['d_sae']} is not a multiple of d_in {cfg['d_in']}, as saev's dictionaries are."
        )
    return cfg


def _tensors(dpath: pathlib.Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(dpath / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as err:
        raise errors.UserError(
            f"{dpath / WEIGHTS} cannot be read ({errors.first_line(err)}). Pass a folder that SAELens saved."
        ) from err


def main() -> None:
    verb, source, target = cli.parse(
        tp.Annotated[
            tuple[tp.Literal["export", "load"], str, str],
            tyro.conf.arg(
                name="args",
                help="export CHECKPOINT FOLDER, or load FOLDER CHECKPOINT.",
                metavar="{export,load} FROM TO",
            ),
            tyro.conf.Positional,
        ],
        prog="python -m saev.nn.saelens",
        description="Converts SAEs to and from SAELens' on-disk format.",
    )
    target = fields.path(target)
    if verb == "export":
        export(sae.load(source), target)
    elif target.exists():
        raise errors.UserError(f"{target} exists already. Pass a new file.")
    else:
        sae.save(load(source), target)
    print(target)


if __name__ == "__main__":
    launch.entry(main)
