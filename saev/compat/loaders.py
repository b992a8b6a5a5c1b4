"""What the readers of other libraries' SAEs share. D d_vit, S latents."""

import collections.abc
import contextlib
import pathlib
import typing as tp

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from saev import errors
from saev.formats import jsonfile
from saev.nn import config, sae


@torch.no_grad()
def build(
    cfg: config.Sae,
    parts: dict[str, Tensor],
    where: str,
    *,
    subtracts_b_dec: bool = True,
    threshold: Tensor | None = None,
) -> sae.SparseAutoencoder:
    """Builds an SAE from W_enc (D, S), b_enc, W_dec (S, D) and b_dec, in evaluation mode.

    Args:
        where: the file, for error messages.
        subtracts_b_dec: whether its encoder sees x - b_dec, as in saev. If it sees x, b_enc becomes
            b_enc + b_dec W_enc, which gives the same codes.
        threshold: (S,) or (), in units of pre-activations. A threshold below 0 becomes 0.

    Raises:
        UserError: a weight is NaN or infinite in float32.
    """
    model = sae.SparseAutoencoder(cfg)
    if not subtracts_b_dec:
        parts = {**parts, "b_enc": parts["b_enc"] + parts["b_dec"] @ parts["W_enc"]}
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(model, name).copy_(parts[name])
    if threshold is not None:
        model.architecture.set_threshold(model, threshold)
    return sae.ready(model, where)


def read_json(fpath: pathlib.Path, library: str) -> dict[str, tp.Any]:
    """Reads a library's config.

    Raises:
        UserError: there is no such file, or it is not a JSON object.
    """
    with reading(fpath, library):
        return jsonfile.read(fpath, dict[str, tp.Any], f"Pass a folder that {library} saved.")


def read_tensors(fpath: pathlib.Path, library: str) -> dict[str, Tensor]:
    """Reads a library's safetensors file.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    with reading(fpath, library):
        return safetensors.torch.load_file(fpath)


@contextlib.contextmanager
def reading(fpath: pathlib.Path, library: str) -> collections.abc.Generator[None]:
    """Turns errors of a missing or damaged file into a UserError."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as err:
        why = getattr(err, "strerror", None) or errors.first_line(err)
        raise errors.UserError(
            f"{fpath}: cannot be read ({why}). Pass a folder that {library} saved."
        ) from err
