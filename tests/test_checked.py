"""The import hook of full test runs refuses wrong types and shapes wherever a function or dataclass has annotations."""

import collections.abc
import gc
import importlib
import sys
import types
import weakref

import beartype
import checked
import jaxtyping
import numpy as np
import pytest

SOURCE = '''
"""A module of a package that is checked."""
import collections.abc
import contextlib
import dataclasses

import beartype
import numpy as np
from jaxtyping import Float, jaxtyped

def argument(x: int, *rest: int, flag: bool = False, **more: int) -> object:
    return x

def result(x) -> int:
    return x

def none(x):
    return x

def deep(xs: list[tuple[int, str]]) -> int:
    return len(xs)

def shapes(x_ND: Float[np.ndarray, "N D"], y_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " D"]:
    return y_N @ x_ND if y_N.sum() else y_N

def callback(f: collections.abc.Callable[[Float[np.ndarray, " N"]], int], n: int) -> int:
    return n

def outer(x: object, start: int, by: object = 1) -> object:
    def inner(y: int, by: object = by) -> int:
        return y if x is None else getattr(x, "value", x)
    def shaped(x_N: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return x_N
    inner.by = by
    return inner, shaped

def unknown(x: "not_there.Type", y: int) -> "Later":
    return Later(x)

@contextlib.contextmanager
def context(x: int) -> collections.abc.Generator[int]:
    yield x

@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y_N: Float[np.ndarray, " N"] | None = None

    @property
    def twice(self) -> int:
        return self.x if self.x < 10 else "many"

    @classmethod
    def of(cls, x: int) -> "Point":
        return cls(x)

    @staticmethod
    def add(x: int) -> int:
        return x + 1

class Later:
    def __init__(self, x: object):
        self.x = x

    def method(self, x: int) -> int:
        def inner(y: int) -> int:
            return y
        return inner(x)

@jaxtyped(typechecker=beartype.beartype)
def itself(x_N: Float[np.ndarray, " N"]) -> int:
    return len(x_N)

@beartype.beartype
@dataclasses.dataclass
class Itself:
    x: int
'''
WRONG = (beartype.roar.BeartypeCallHintViolation, jaxtyping.TypeCheckError)
X_ND, Y_N = np.ones((2, 3)), np.ones(2)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[types.ModuleType]:
    folder = tmp_path_factory.mktemp("package")
    (folder / "made_up").mkdir()
    (folder / "made_up" / "__init__.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(sys, "meta_path", list(sys.meta_path))
        patch.setitem(sys.modules, checked.NAME, checked)
        checked.install("made_up")
        yield importlib.import_module("made_up")
        del sys.modules["made_up"]


def test_right_values_pass(module: types.ModuleType) -> None:
    m = module
    assert m.argument(1, 2, flag=True, a=3) == 1 and m.result(2) == 2 and m.none("x") == "x"
    assert m.deep([(1, "a")]) == 1 and m.shapes(X_ND, Y_N).tolist() == [2, 2, 2]
    assert m.callback(len, 2) == 2 and m.unknown(1, 2).x == 1
    with m.context(3) as x:
        assert x == 3
    assert m.Point(2, Y_N).twice == 2 and m.Point.of(3).x == 3 and m.Point.add(1) == 2
    assert m.Later(1).method(2) == 2 and m.itself(Y_N) == 2 and m.Itself(1).x == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.argument("x"),
        lambda m: m.argument(1, "x"),
        lambda m: m.argument(1, flag=2),
        lambda m: m.argument(1, a="x"),
        lambda m: m.result("x"),
        lambda m: m.deep([("x", 1)]),
        lambda m: m.shapes(X_ND, np.ones(4)),
        lambda m: m.shapes(X_ND, np.zeros(2)),  # the result has N values, not D
        lambda m: m.callback(len, "x"),
        lambda m: m.outer(None, "x"),
        lambda m: m.outer(None, 1)[0]("x"),
        lambda m: m.outer("x", 1)[0](1),
        lambda m: m.outer(None, 1)[1](X_ND),
        lambda m: m.unknown(1, "x"),
        lambda m: m.context("x").__enter__(),
        lambda m: m.Point("x"),
        lambda m: m.Point(1, X_ND),
        lambda m: m.Point(11).twice,
        lambda m: m.Point.of("x"),
        lambda m: m.Point.add("x"),
        lambda m: m.Later(1).method("x"),
        lambda m: m.itself(X_ND),
        lambda m: m.Itself("x"),
    ],
)
def test_wrong_ones_are_refused(module: types.ModuleType, call: collections.abc.Callable) -> None:
    """Twice, because a wrapper that is used again must refuse them too."""
    for _ in range(2):
        with pytest.raises(WRONG):
            call(module)


def test_a_wrapper_that_is_used_again_calls_its_own_function(module: types.ModuleType) -> None:
    """With its own surroundings, defaults and attributes, and without keeping an earlier one alive."""

    class Value:
        value = 5

    first = Value()
    inner = [module.outer(first, 1)[0], module.outer(6, 2, by="b")[0], module.outer(None, 3)[0]]
    assert [f(7) for f in inner] == [5, 6, 7] and [f.by for f in inner] == [1, "b", 1]
    assert [f.__wrapped__.__defaults__ for f in inner] == [(1,), ("b",), (1,)]
    assert inner[1].__code__ is inner[2].__code__ and inner[0].__name__ == "inner"
    alive = weakref.ref(first)
    del first, inner
    gc.collect()
    assert alive() is None


def test_the_package_is_checked(request: pytest.FixtureRequest) -> None:
    """In a full run."""
    from saev import helpers

    if request.config.option.markexpr == "not slow":
        pytest.skip("the fast tests check only what the package checks for its users")
    with pytest.raises(WRONG):
        helpers.printable(1)
