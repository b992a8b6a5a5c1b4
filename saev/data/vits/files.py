"""Reads weight files into a flat state dict. Runs no pickled code (`weights_only`, or our own reader)."""

import argparse
import collections.abc
import logging
import pathlib
import pickle
import re
import stat
import typing as tp

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from saev import errors
from saev.data.vits import torchscript

logger = logging.getLogger("saev")

CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model_state_dict", "model"),
    *("module", "net", "network", "encoder", "target_encoder", "student"),
)
"""Keys under which training code stores a model's state dict. The first one that is present is used."""
_scalar = np.float64(0).__reduce__()[0]
PLAIN_DATA: list[tp.Any] = [
    *(argparse.Namespace, pathlib.PosixPath, np.dtype, type(np.dtype("f4")), type(np.dtype("f8"))),
    *(type(np.dtype("i8")), _scalar, (_scalar, "numpy.core.multiarray.scalar")),
]
"""Types allowed besides tensors, numbers, strings and containers: arguments, paths, NumPy numbers."""


def read(fpath: pathlib.Path) -> dict[str, Tensor]:
    """Reads the named tensors of a .safetensors, .pt/.pth/.bin or TorchScript file.

    Raises:
        UserError: the file cannot be read, or holds something else (named).
    """
    try:
        if not stat.S_ISREG(fpath.stat().st_mode):
            raise errors.UserError(f"{fpath}: is not a regular file. Pass a file of weights.")
        with fpath.open("rb") as fd:
            head = fd.read(256)
        if what := _no_weights(head):
            raise errors.UserError(f"{fpath}: {what}.")
        if head[8:9] == b"{":
            return safetensors.torch.load_file(fpath)
        if torchscript.is_archive(fpath):
            return torchscript.read(fpath)
        with torch.serialization.safe_globals(PLAIN_DATA):
            obj = torch.load(fpath, map_location="cpu", weights_only=True)
    except torchscript.ForeignObject as err:
        raise _unreadable(fpath, str(err)) from err
    except pickle.UnpicklingError as err:
        raise _unsafe(fpath, err) from err
    except errors.UserError:
        raise
    except Exception as err:  # each reader has its own exception types
        reason = getattr(err, "strerror", None) or errors.first_line(err)[:200]
        if "central directory" in reason:
            reason = "it is truncated or damaged"
        raise _unreadable(fpath, reason) from err
    return _state_dict(obj, fpath)


def _no_weights(head: bytes) -> str:
    """Recognises, by its first bytes, a file without weights: returns what it is and what to do, else ""."""
    text = head.lstrip().lower()
    if not head:
        return "the file is empty. Download it again"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a git-lfs pointer, not the weights. Run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights: the download went wrong. Download it again"
    if text.startswith(b"{"):
        return "begins with JSON text, not weights. Pass a .safetensors or .pt file of the ViT"
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file (Keras or TensorFlow). Pass a .safetensors or .pt state dict"
    return ""


def _unsafe(fpath: pathlib.Path, err: Exception) -> errors.UserError:
    """Names the first pickled class or function, and the way around it."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(err)):
        return errors.UserError(
            f"{fpath}: holds pickled objects that could run code ({found[1]}), which are not loaded. "
            "If you trust the file, load it where its code is installed and save only `model.state_dict()`."
        )
    return _unreadable(fpath, "PyTorch does not recognise its contents")


def _unreadable(fpath: pathlib.Path, reason: str) -> errors.UserError:
    return errors.UserError(
        f"{fpath}: cannot be read as weights ({reason}). Pass a complete .safetensors or .pt state dict."
    )


def _state_dict(obj: object, fpath: pathlib.Path) -> dict[str, Tensor]:
    """Finds the state dict in what training code saved, which may be nested in several containers."""
    while isinstance(obj, collections.abc.Mapping):
        inside = [k for k in CONTAINERS if isinstance(obj.get(k), collections.abc.Mapping) and obj[k]]
        if not inside:
            break
        if len(inside) > 1:
            logger.info("%s: using the weights under %r, not %s", fpath, inside[0], inside[1:])
        obj = obj[inside[0]]
    tensors = obj if isinstance(obj, collections.abc.Mapping) else {}
    state = {k: v for k, v in tensors.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        keys = ", ".join(map(repr, list(tensors)[:5])) or type(obj).__name__
        raise errors.UserError(
            f"{fpath}: holds no state dict (found: {keys}). "
            "Save `model.state_dict()`, or put it under 'state_dict'."
        )
    return state
