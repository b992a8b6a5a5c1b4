"""Tensors in the bytes of a checkpoint. Reading runs no code and checks that they are complete and finite."""

import collections.abc
import io
import math
import typing as tp
import zipfile

import torch
from torch import Tensor

from saev import errors


def dump(tree: dict[str, tp.Any]) -> bytes:
    """Serialises tensors, numbers and strings in dicts and lists for `load`."""
    payload = io.BytesIO()
    torch.save(tree, payload)
    return payload.getvalue()


def load(payload: bytes, where: str, remedy: str) -> dict[str, tp.Any]:
    """Reads a dict that torch.save wrote, onto the CPU.

    torch writes a CRC of each tensor but never compares it; this function does.

    Args:
        where: the start of the error message (the file's path).
        remedy: the end of the error message.

    Raises:
        UserError: it is truncated, changed or not a dict, or holds objects other than tensors and plain
            values (which are never run), or a tensor with more elements than bytes.
    """
    try:
        if zipfile.is_zipfile(io.BytesIO(payload)):
            with zipfile.ZipFile(io.BytesIO(payload)) as archive:
                if bad := archive.testzip():
                    raise ValueError(f"the CRC of {bad} differs")
        tree = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        if not isinstance(tree, dict):
            raise TypeError(f"it holds a {type(tree).__name__} instead of a dict")
        for tensor in _tensors(tree):
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has fewer bytes")
        return tree
    except Exception as err:  # torch raises many types for a damaged or foreign file
        raise errors.UserError(
            f"{where}: its tensors cannot be read ({errors.first_line(err)}). {remedy}"
        ) from err


def _tensors(tree: object) -> collections.abc.Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)


def check_finite(tensors: dict[str, Tensor], where: str, remedy: str) -> None:
    """Refuses NaN and infinity. Every loader calls this.

    Raises:
        UserError: a tensor holds NaN or infinity (named).
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise errors.UserError(f"{where}: tensor {name} holds NaN or infinity. {remedy}")


def check_like(found: object, mine: object, name: str = "") -> None:
    """Checks that a tree has the keys, types, shapes and dtypes of `mine`, and only finite numbers.

    Raises:
        ValueError: it does not (the place is named).
    """
    if isinstance(mine, dict) and isinstance(found, dict):
        if differing := sorted(map(str, found.keys() ^ mine.keys())):
            raise ValueError(f"{name or 'it'} has missing or extra keys: {', '.join(differing)}")
        for key, value in mine.items():
            check_like(found[key], value, f"{name}.{key}".lstrip("."))
    elif isinstance(mine, Tensor) and isinstance(found, Tensor):
        have, want = ((tuple(t.shape), t.dtype) for t in (found, mine))
        if have != want:
            raise ValueError(f"{name} is {have[0]} {have[1]} instead of {want[0]} {want[1]}")
        if not found.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
    elif isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{name} is {found}")
    elif type(mine) is not type(found):
        raise ValueError(f"{name} is a {type(found).__name__} instead of a {type(mine).__name__}")
