"""SAEs of the field's checkpoints as ours. B activations, D d_vit, S latents."""

import logging
import pathlib
import typing as tp

import beartype
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from saev import errors
from saev.formats import field
from saev.nn import config, foreign

logger = logging.getLogger("saev")

THRESHOLD = "activation.threshold"


@beartype.beartype
def convert(
    said: field.FieldSae, state: dict[str, tp.Any], fpath: pathlib.Path
) -> tuple[config.Sae, dict[str, Tensor]]:
    """(our config, our state dict) of a field SAE.

    Its encoder does not subtract b_dec, ours does: b_enc + b_dec W_enc, in float64, makes up for it. Its TopK keeps negative values
    among the k largest. A BatchTopK of schemas before 5 may have no threshold (and those of 1 and 2 kept top_k values of
    the whole batch, not of each sample): then every positive value is kept until `calibrate` sets one.

    Raises:
        UserError: tensors that are missing, of another shape, or unknown; a BatchTopK with a negative threshold.
    """
    D, S = said.d_vit, said.d_sae
    shapes = {"W_enc": (D, S), "b_enc": (S,), "W_dec": (S, D), "b_dec": (D,)}
    is_batch = said.activation == "BatchTopK"
    if is_batch and (said.schema >= 5 or THRESHOLD in state):
        shapes[THRESHOLD] = ()
    elif is_batch:
        logger.warning(
            "%s: a BatchTopK of schema %s has no threshold; every positive value fires. "
            "saev.nn.field.calibrate(sae, activations, k) sets one.",
            fpath,
            said.schema,
        )
    found = foreign.take(state, shapes, str(fpath), "its header")
    threshold = found.pop(THRESHOLD, torch.zeros(()))
    if threshold < 0:
        raise errors.UserError(
            f"{fpath}: its threshold is {threshold.item():g}, so negative values above it fire. No SAE of ours computes the same."
        )
    found["b_enc"] = found["b_enc"] + found["b_dec"] @ found["W_enc"]
    common = {"d_vit": D, "d_sae": S, "normalize": "none"}
    sparse = {**common, "top_k": min(said.top_k, S), "aux_coeff": 0.0}
    cfg = {
        "Relu": lambda: config.Relu(**common),
        "TopK": lambda: config.TopK(**sparse, keep_negative=True),
        "BatchTopK": lambda: config.BatchTopK(**sparse),
    }[said.activation]()
    ours = {**found, "scale": torch.ones(()), "threshold": threshold}
    return cfg, {name: tensor.float() for name, tensor in ours.items()}


@torch.no_grad()
@jaxtyped(typechecker=beartype.beartype)
def calibrate(sae: torch.nn.Module, x_BD: Float[Tensor, "B D"], k: int) -> None:
    """Sets a BatchTopK's threshold so that on these (raw) activations k latents fire on average.

    Raises:
        UserError: it is no BatchTopK, or fewer values than that are positive.
    """
    if not isinstance(getattr(sae, "cfg", None), config.BatchTopK):
        raise errors.UserError("calibrate: only a BatchTopK has a threshold.")
    pre_BS = (x_BD * sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc
    wanted = k * len(x_BD)
    values_n = pre_BS[pre_BS > 0]
    if len(values_n) <= wanted:
        raise errors.UserError(
            f"calibrate: only {len(values_n)} values of {len(x_BD)} activations are positive, {wanted} are wanted. Lower k."
        )
    # values above the threshold fire, so it is the first that does not
    sae.threshold.copy_(values_n.kthvalue(len(values_n) - wanted).values)
