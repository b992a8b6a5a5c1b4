"""Package attributes that are imported when first used. Imports nothing that takes time, as every `__init__` begins with it."""

import collections.abc
import importlib


def attributes(package: str, table: dict[str, str]) -> collections.abc.Callable[[str], object]:
    """Returns a module `__getattr__` (PEP 562): `table` maps a public name to the submodule that defines it.

    An empty submodule name stands for the submodule of that very name. Importing the package then costs
    nothing (no torch) until a name is used.
    """

    def __getattr__(name: str) -> object:  # noqa: N807
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{table[name] or name}")
        return getattr(module, name) if table[name] else module

    return __getattr__
