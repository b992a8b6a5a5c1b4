"""Reads the tensors of a TorchScript archive (such as OpenAI's CLIP files) without running its code."""

import io
import pathlib
import pickle
import typing as tp
import zipfile

import torch
from torch import Tensor


class ForeignObject(pickle.UnpicklingError):
    """An object that is neither a module nor a tensor."""


def is_archive(fpath: pathlib.Path) -> bool:
    """Recognises TorchScript by its code folder, which plain state dicts lack."""
    if not zipfile.is_zipfile(fpath):
        return False
    with zipfile.ZipFile(fpath) as archive:
        return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())


def read(fpath: pathlib.Path) -> dict[str, Tensor]:
    """Reads parameters and buffers by their names in the module.

    Raises:
        ForeignObject: the archive holds something other than modules and tensors.
    """
    with zipfile.ZipFile(fpath) as archive:
        (name,) = (n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl"))
        root = _Reader(archive, name.partition("/")[0]).load()
    state: dict[str, Tensor] = {}
    _collect(root, "", state)
    return state


class _Module:
    """Replaces every scripted class: keeps its attributes, drops its code."""

    def __setstate__(self, state: object) -> None:
        self.attributes = state


class _Reader(pickle.Unpickler):
    """Unpickles tensors, containers and `_Module`; refuses every other class and function."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> tp.Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, _type: value
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise ForeignObject(f"a TorchScript archive that holds {module}.{name}")

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> Tensor:
        _, dtype, key, _, _ = pid
        data = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


_DTYPES = {
    **{"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16},
    **{"DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"BoolStorage": torch.bool, "ByteStorage": torch.uint8},
}


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    return torch.as_strided(storage, size, stride, offset).clone()


def _collect(module: object, prefix: str, state: dict[str, Tensor]) -> None:
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, Tensor):
            state[prefix + name] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", state)
