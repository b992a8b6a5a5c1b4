"""Reads and writes SAELens' format: a folder with cfg.json and sae_weights.safetensors. D d_vit, S latents.

Codes and reconstructions of raw activations stay the same in both directions. The input scale is folded into
the weights.
"""

import pathlib
import re
import typing as tp

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from saev import errors, fields, helpers
from saev.compat import checks, known_keys, loaders
from saev.formats import jsonfile
from saev.nn import config, sae

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
FORMAT = "6.0.0"
"""The SAELens version that introduced the format written here."""


@torch.no_grad()
def export(model: sae.SparseAutoencoder, dpath: pathlib.Path | str) -> None:
    """Writes the folder atomically.

    A BatchTopK becomes a JumpReLU with one threshold, which is equal at inference. SAELens does the same.

    Raises:
        UserError: the folder exists, or SAELens has no SAE that computes the same.
    """
    dpath = fields.path(dpath)
    _check_new(dpath)
    if getattr(model.cfg, "keep_negative", False):
        raise errors.UserError(
            "This TopK keeps negative values (keep_negative), but SAELens' sets them to 0. "
            "It cannot be exported."
        )
    scale_D = model.scale.double().expand(model.d_vit)
    tensors = {
        "W_enc": model.W_enc.double() * scale_D[:, None],
        "b_enc": model.b_enc.double(),
        "W_dec": model.W_dec.double() / scale_D,
        "b_dec": model.b_dec.double() / scale_D,
    }
    cfg: dict[str, tp.Any] = {
        "d_in": model.d_vit,
        "d_sae": model.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": FORMAT,  # without it SAELens drops unknown keys
            "sae_lens_training_version": None,
            "trained_on": model.activations,
        },
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
            tensors["threshold"] = model.get_parameter("log_threshold").double().exp()
        case _:
            raise errors.UserError(f"SAELens has no {type(model.cfg).__name__}. It cannot be exported.")
    payload = safetensors.torch.save({k: v.float().cpu().contiguous() for k, v in tensors.items()})
    with helpers.atomic_folder(dpath) as tmp_dpath:
        helpers.write_text(tmp_dpath / CFG, jsonfile.dumps(cfg, indent=4))
        (tmp_dpath / WEIGHTS).write_bytes(payload)
        _check_new(dpath)  # another process may have created it since


def _check_new(dpath: pathlib.Path) -> None:
    if dpath.exists():
        raise errors.UserError(f"{dpath} exists already. Pass a new folder.")


@torch.no_grad()
def load(dpath: pathlib.Path | str) -> sae.SparseAutoencoder:
    """Reads a standard, topk, jumprelu or gated SAE of SAELens 6 or older, in evaluation mode.

    Raises:
        UserError: it is not such a folder, or saev has no SAE that computes exactly the same.
    """
    dpath = fields.path(dpath)
    cfg, found = _cfg(dpath / CFG), loaders.read_tensors(dpath / WEIGHTS, "SAELens")
    scaling_S = _scaling(cfg, found, dpath)
    D, S = cfg["d_in"], cfg["d_sae"]
    architecture = cfg["architecture"]
    shapes = {"W_enc": (D, S), "W_dec": (S, D), "b_dec": (D,)}
    names = {"jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}
    shapes |= dict.fromkeys(names.get(architecture, ("b_enc",)), (S,))
    t = checks.take(found, shapes, str(dpath / WEIGHTS), CFG)
    if architecture == "gated":
        # With z = x W_enc the gate opens where z + b_gate > 0, and the value is e^r z + b_mag. So a latent
        # fires where its value is above b_mag - e^r b_gate.
        gain_S = t["r_mag"].exp()
        t["threshold"] = t["b_mag"] - gain_S * t["b_gate"]
        t |= {"W_enc": t["W_enc"] * gain_S, "b_enc": t["b_mag"]}
    if cfg.get("rescale_acts_by_decoder_norm"):
        norm_S = t["W_dec"].norm(dim=1)
        t |= {"W_enc": t["W_enc"] * norm_S, "b_enc": t["b_enc"] * norm_S}
        t["W_dec"] = t["W_dec"] / norm_S.clamp(min=1e-30)[:, None]
    t["W_dec"] = t["W_dec"] * scaling_S[:, None]
    sizes: dict[str, tp.Any] = {"d_vit": D, "d_sae": S}
    if architecture == "topk":
        sizes |= {"top_k": min(cfg["k"], S), "aux_coeff": 0.0}
    model = loaders.build(
        ARCHITECTURES[architecture](**sizes, normalize="none"),
        t,
        str(dpath / WEIGHTS),
        subtracts_b_dec=cfg.get("apply_b_dec_to_input", True),
        threshold=t.get("threshold"),
    )
    model.activations = _trained_on(cfg, dpath / CFG)
    return model


def _trained_on(cfg: dict[str, tp.Any], fpath: pathlib.Path) -> dict[str, tp.Any]:
    """Returns what `export` recorded in metadata.trained_on, or {}."""
    found = (cfg.get("metadata") or {}).get("trained_on") or {}
    try:
        msgspec.convert(found, sae.Activations)
    except ValueError as err:
        raise errors.UserError(
            f"{fpath}: metadata.trained_on is not as saev writes it ({errors.first_line(err)}). "
            "Remove it from a copy of the file."
        ) from err
    return found


def _scaling(cfg: dict[str, tp.Any], found: dict[str, Tensor], dpath: pathlib.Path) -> Tensor:
    """Removes the fine-tuned factors of codes from `found` and returns them (S,); 1 if there are none."""
    scaling_S = found.pop("scaling_factor", None)
    is_set = cfg.get("finetuning_scaling_factor", False)
    if scaling_S is None and not is_set:
        return torch.ones(cfg["d_sae"], dtype=torch.float64)
    shapes = {"scaling_factor": (cfg["d_sae"],)}
    given = {} if scaling_S is None else {"scaling_factor": scaling_S}
    scaling_S = checks.take(given, shapes, str(dpath / WEIGHTS), CFG)["scaling_factor"]
    if not is_set and not torch.allclose(scaling_S, torch.ones_like(scaling_S)):
        raise errors.UserError(
            f"{dpath / WEIGHTS}: holds a scaling_factor, but finetuning_scaling_factor is false in {CFG}. "
            "Correct one of them in a copy."
        )
    return scaling_S


# ---- cfg.json ----

ARCHITECTURES: dict[str, tp.Any] = {
    "standard": config.Relu,
    "topk": config.TopK,
    "jumprelu": config.JumpRelu,
    "gated": config.JumpRelu,
}
RENAMED = {"activation_fn_str": "activation_fn", "uses_scaling_factor": "finetuning_scaling_factor"}
"""Maps older key names to those of version 6."""
BOOLEANS = ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor")
USED = {
    "architecture",
    "d_in",
    "d_sae",
    "k",
    "normalize_activations",
    "reshape_activations",
    "dtype",
    "activation_fn",
    "activation_fn_kwargs",
    "sae_lens_version",
    "metadata",
    "use_error_term",
    *BOOLEANS,
}
ALLOWED = {
    "architecture": tuple(ARCHITECTURES),
    "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None),
    "use_error_term": (False, None),
    "dtype": tuple(
        prefix + name for prefix in ("", "torch.") for name in ("float32", "float64", "float16", "bfloat16")
    ),
    **dict.fromkeys(BOOLEANS, (False, True, None)),
    "apply_b_dec_to_input": (True, False),
}


def _cfg(fpath: pathlib.Path) -> dict[str, tp.Any]:
    """Reads and checks cfg.json; returns it with the names and values of version 6.

    Raises:
        UserError: see `load`.
    """
    cfg = loaders.read_json(fpath, "SAELens")
    if twice := [old for old, new in RENAMED.items() if old in cfg and new in cfg]:
        raise errors.UserError(f"{fpath}: {twice[0]} and {RENAMED[twice[0]]} are the same key. Remove one.")
    cfg = {RENAMED.get(key, key): value for key, value in cfg.items()}
    if not isinstance(cfg.get("metadata") or {}, dict):
        raise errors.UserError(f"{fpath}: metadata is not a JSON object. The file is edited.")
    cfg.setdefault("architecture", "standard")
    _take_activation(cfg, fpath)
    hook = cfg.get("hook_name", cfg.get("hook_point", ""))
    if _is_before_6(cfg) and "hook_z" in str(hook):
        cfg.setdefault("reshape_activations", "hook_z")
    checks.refuse_other(cfg, ALLOWED, str(fpath))
    checks.refuse_unknown(cfg, USED | known_keys.SAELENS, str(fpath))
    for name in ("d_in", "d_sae", *(["k"] if cfg["architecture"] == "topk" else [])):
        checks.positive(cfg, name, str(fpath))
    for name in ("k", "rescale_acts_by_decoder_norm"):
        if cfg["architecture"] != "topk" and cfg.get(name):
            raise errors.UserError(
                f"{fpath}: {name} is {cfg[name]!r}, but architecture is {cfg['architecture']!r}; only topk "
                "has it. Correct one of them in a copy."
            )
    return cfg


def _take_activation(cfg: dict[str, tp.Any], fpath: pathlib.Path) -> None:
    """Translates the activation function, which before version 6 decided whether an SAE is a TopK."""
    kwargs = cfg.get("activation_fn_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise errors.UserError(f"{fpath}: activation_fn_kwargs is not a JSON object.")
    allowed = ("relu", None)
    if _is_before_6(cfg) or cfg["architecture"] == "topk":
        allowed = ("relu", "topk", None)
    checks.refuse_other(cfg, {"activation_fn": allowed}, str(fpath))
    if cfg.get("activation_fn") == "topk":
        checks.refuse_unknown(kwargs, {"k"}, f"{fpath}: activation_fn_kwargs")
        checks.refuse_other(cfg, {"architecture": ("standard", "topk")}, str(fpath))
        cfg["architecture"] = "topk"
        if kwargs.get("k", cfg.get("k")) != cfg.setdefault("k", kwargs.get("k")):
            raise errors.UserError(
                f"{fpath}: k is {cfg['k']!r}, but {kwargs['k']!r} in activation_fn_kwargs. "
                "Correct one of them in a copy."
            )
    else:
        checks.refuse_unknown(kwargs, (), f"{fpath}: activation_fn_kwargs (not a TopK)")


def _is_before_6(cfg: dict[str, tp.Any]) -> bool:
    """Was it written before version 6? As in SAELens, a file without a version was."""
    version = cfg.get("sae_lens_version") or (cfg.get("metadata") or {}).get("sae_lens_version")
    major = re.match(r"\d+", version) if isinstance(version, str) else None
    return major is None or int(major[0]) < 6
