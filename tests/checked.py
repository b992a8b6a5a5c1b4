"""An import hook that makes all functions of a package check the types and shapes of their arguments and results.

It checks what `jaxtyping.install_import_hook(package, "beartype.beartype")` does in a fraction of the time. jaxtyping's
wrapper, which takes 5 to 20 us a call, is only for functions whose annotations have shapes; beartype's own, of about 1 us, is
for the others. What checks itself already is left as it is. And the wrapper of a function inside another one is made
once, not at each call of the outer function, which takes 1 ms.
"""

import ast
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import pathlib
import sys
import types
import typing as tp
import unittest.mock

import beartype
import jaxtyping

DECORATORS = ("jaxtyped", "beartype")
"""Names of decorators that check a function or class themselves."""
NAME = "_checked_by_tests"
"""Under which a changed module finds this one."""


def install(package: str) -> None:
    """Changes the package's modules, if they are imported later. Those of an earlier call stay changed."""
    sys.modules[NAME] = sys.modules[__name__]
    sys.meta_path.insert(0, Finder(package))


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of a package as Python does, with a loader that changes them."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(
        self, fullname: str, path: tp.Any = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


class Loader(importlib.machinery.SourceFileLoader):
    """Adds `checked` to each function and class of a module. Its compiled files have names of their own."""

    def get_code(self, fullname: str) -> types.CodeType | None:
        stamp = pathlib.Path(__file__).stat().st_mtime_ns  # another version of this file compiles anew

        def cache_from_source(path: str, *_: object, **__: object) -> str:
            return importlib.util.cache_from_source(path, optimization=f"checked{stamp}")

        # imports of other modules come after this, when the module runs
        with unittest.mock.patch("importlib._bootstrap_external.cache_from_source", cache_from_source):
            return super().get_code(fullname)

    def source_to_code(self, data: tp.Any, path: tp.Any, *, _optimize: int = -1) -> types.CodeType:  # pyrefly: ignore[bad-override]  # called by Python alone
        tree = Adder().visit(ast.parse(importlib.util.decode_source(data), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)


class Adder(ast.NodeTransformer):
    """Decorates functions innermost (a decorator may drop annotations), and classes outermost (a dataclass is made by then)."""

    def __init__(self) -> None:
        self.is_inner = False

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        was_inner, self.is_inner = self.is_inner, False
        self.generic_visit(node)
        self.is_inner = was_inner
        if not checks_itself(node):
            node.decorator_list.insert(0, decorator(node, "checked_class"))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        was_inner, self.is_inner = self.is_inner, True
        self.generic_visit(node)
        self.is_inner = was_inner
        arguments = node.args
        every = [
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            arguments.vararg,
            arguments.kwarg,
        ]
        is_annotated = node.returns or any(arg.annotation for arg in every if arg)
        if is_annotated and not checks_itself(node):
            name = "checked_again" if self.is_inner else "checked"
            node.decorator_list.append(decorator(node, name))
        return node


def checks_itself(node: ast.ClassDef | ast.FunctionDef) -> bool:
    names = {name for used in node.decorator_list for name in ast.unparse(used).partition("(")[0].split(".")}
    return not names.isdisjoint(DECORATORS)


def decorator(node: ast.AST, name: str) -> ast.expr:
    """The expression of a function of this module, at the place of a node."""
    made = ast.parse(f"__import__({NAME!r}).{name}", mode="eval").body
    for part in ast.walk(made):
        ast.copy_location(part, node)
    return made


# ---- the decorators ----


def has_shapes(hint: object) -> bool:
    """Whether jaxtyping's annotations are anywhere in this one."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    if isinstance(hint, list | tuple):  # of a Callable
        return any(has_shapes(part) for part in hint)
    return has_shapes(tp.get_args(hint)) if tp.get_args(hint) else False


def hints_of(function: tp.Any) -> dict[str, object]:
    """A function's annotations. One with a name that is unknown when the function is defined counts as Any."""
    found: dict[str, object] = {}
    for name, hint in function.__annotations__.items():
        alone = types.SimpleNamespace(__annotations__={name: hint})
        try:
            found |= tp.get_type_hints(alone, function.__globals__, include_extras=True)
        except (NameError, AttributeError):
            found[name] = tp.Any
    return found


def checked(function: tp.Any) -> tp.Any:
    """The function, which checks its arguments and its result."""
    hints = hints_of(function)
    if inspect.isgeneratorfunction(function) or any(has_shapes(hint) for hint in hints.values()):
        return jaxtyping.jaxtyped(function, typechecker=beartype.beartype)
    function.__annotations__ = hints
    return beartype.beartype(function)


made: dict[object, types.FunctionType] = {}
"""Wrappers of functions inside others, by their code and annotations."""


def checked_again(function: tp.Any) -> tp.Any:
    """The same for a function that is defined anew in each call of another one."""
    try:
        key = (function.__code__, *function.__annotations__.items())
        wrapper = made.get(key)
    except TypeError:  # an annotation without a hash
        return checked(function)
    if wrapper is None:
        cells = tuple(
            types.CellType() for _ in function.__code__.co_freevars
        )  # what it refers to may be large
        empty = types.FunctionType(function.__code__, function.__globals__, closure=cells)
        empty.__module__, empty.__qualname__ = function.__module__, function.__qualname__
        empty.__annotations__ = dict(function.__annotations__)
        wrapper = checked(empty)
        if "__beartype_func" not in (wrapper.__kwdefaults__ or {}):
            return checked(function)
        made[key] = wrapper
    again = types.FunctionType(wrapper.__code__, wrapper.__globals__, function.__name__, wrapper.__defaults__)
    again.__kwdefaults__ = wrapper.__kwdefaults__ | {"__beartype_func": function}
    return functools.update_wrapper(again, function)


def checked_class(cls: type) -> type:
    """A dataclass that checks its fields when it is made. Another class as it is."""
    init = vars(cls).get("__init__")
    if dataclasses.is_dataclass(cls) and init and not hasattr(init, "__wrapped__"):
        cls.__init__ = checked(init)
    return cls
