"""Package attributes that are imported when first used. Imports nothing that takes time, as every `__init__` begins with it."""

import collections.abc
import importlib
import sys


def attributes(
    package: str, table: dict[str, str]
) -> tuple[collections.abc.Callable[[str], object], collections.abc.Callable[[], list[str]]]:
    """Returns a module's `__getattr__` and `__dir__` (PEP 562): `table` maps a public name to the submodule that defines it.

    An empty submodule name stands for the submodule of that very name. Importing the package then costs
    nothing (no torch) until a name is used. Editors and type checkers read the same names under `if TYPE_CHECKING`.
    """

    def __getattr__(name: str) -> object:  # noqa: N807
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{table[name] or name}")
        return getattr(module, name) if table[name] else module

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*vars(sys.modules[package]), *table})

    return __getattr__, __dir__
