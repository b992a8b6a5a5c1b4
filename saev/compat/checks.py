"""Checks of other tools' files. Each key and tensor is used, known to have no effect, or refused."""

import collections.abc
import typing as tp

import torch
from torch import Tensor

from saev import errors

WHY = "It may change what the SAE computes. If it does not, remove it from a copy of the file."


def take(
    found: dict[str, tp.Any], shapes: collections.abc.Mapping[str, tuple[int, ...]], where: str, source: str
) -> dict[str, Tensor]:
    """Returns the tensors of these names and shapes, in float64.

    Args:
        where: the file that holds the tensors, for error messages.
        source: what the shapes come from, for error messages.

    Raises:
        UserError: a tensor is missing, of another shape or not a float tensor, or there are others.
    """
    for name, shape in shapes.items():
        tensor = found.get(name)
        is_tensor = isinstance(tensor, Tensor)
        if not is_tensor or tuple(tensor.shape) != shape or not tensor.is_floating_point():
            seen = f"has shape {tuple(tensor.shape)}, {tensor.dtype}" if is_tensor else "is missing"
            raise errors.UserError(
                f"{where}: tensor {name} {seen}; {source} wants floats of shape {shape}. "
                "The file is truncated or edited."
            )
    refuse_unknown(found, shapes, where, "tensor")
    return {name: found[name].detach().to("cpu", torch.float64) for name in shapes}


def refuse_unknown(
    found: collections.abc.Iterable[object],
    known: collections.abc.Container[object],
    where: str,
    what: str = "key",
) -> None:
    """Raises a UserError that names the unknown ones."""
    if unknown := sorted(str(name) for name in found if name not in known):
        raise errors.UserError(f"{where}: unknown {what} {', '.join(unknown)}. {WHY}")


def refuse_other(
    cfg: dict[str, tp.Any], allowed: collections.abc.Mapping[str, tuple[object, ...]], where: str
) -> None:
    """Raises a UserError if a value is not allowed. A missing key has the first allowed value."""
    for key, values in allowed.items():
        value = cfg.get(key, values[0])
        if not any(value is v or (type(value) is type(v) and value == v) for v in values):
            words = ", ".join(str(v) for v in values if v is not None)
            raise errors.UserError(
                f"{where}: {key} is {value!r}; only {words} can be read. "
                "saev has no SAE that computes the same."
            )


def positive(cfg: dict[str, tp.Any], key: str, where: str) -> int:
    """Returns cfg[key], an integer of at least 1."""
    value = cfg.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise errors.UserError(f"{where}: {key} is {value!r}, not a positive integer.")
    return value
