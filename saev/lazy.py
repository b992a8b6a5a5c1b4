"""Package attributes that are imported on first use. Every `__init__` imports this module, so it imports
nothing slow."""

import collections.abc
import importlib
import sys


def attributes(
    package: str, table: dict[str, str]
) -> tuple[collections.abc.Callable[[str], object], collections.abc.Callable[[], list[str]]]:
    """Returns a module's `__getattr__` and `__dir__` (PEP 562).

    `table` maps each public name to the submodule that defines it. An empty string means that the name is
    itself a submodule. Importing the package then imports no torch until a name is used. Editors and type
    checkers read the same names under `if TYPE_CHECKING`, and not the `else` after it: a module with a
    `__getattr__` would have every name.
    """

    def __getattr__(name: str) -> object:  # noqa: N807
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{table[name] or name}")
        return getattr(module, name) if table[name] else module

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*vars(sys.modules[package]), *table})

    return __getattr__, __dir__
