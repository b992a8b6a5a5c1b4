"""The roles and checks of config fields.

By default a field determines the result (an SAE's weights, a table), so it is part of the run's id. Other
roles are declared with the default: `log_every: int = fields.shared(50)`. Each `__post_init__` calls
`settle`, which expands paths and checks numbers.
"""

import collections.abc
import dataclasses
import functools
import os
import pathlib
import re
import typing as tp

from saev import errors

Path = tp.Annotated[str, "path"]
"""The type of a field that holds a path; `tuple[Path, ...]` holds several."""

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)
WIDEST = "(-9.2e18, 9.2e18)"
"""Interval of fields without their own: what fits into 64 bits."""

T = tp.TypeVar("T")


def stream(default: T | collections.abc.Callable[[], T]) -> T:
    """Declares a field that determines the stream, and so the result."""
    return _field(default, result=True, stream=True)


def shared(default: T | collections.abc.Callable[[], T]) -> T:
    """Declares a field that is equal for all runs on one stream, and does not change the result."""
    return _field(default, result=False, stream=True)


def neither(default: T | collections.abc.Callable[[], T]) -> T:
    """Declares a field that determines neither the result nor the stream."""
    return _field(default, result=False, stream=False)


def later(default: T) -> T:
    """Declares a field that determines the result, in a scorer or an architecture that older results record
    without it. The repr leaves it out, and so does `recorded` at its default."""
    return dataclasses.field(default=default, repr=False)


def recorded(cfg: tp.Any) -> dict[str, tp.Any]:
    """The values of a config for the record of a result: equal for old and new results of equal configs."""
    values = dataclasses.asdict(cfg)
    return {f.name: values[f.name] for f in dataclasses.fields(cfg) if f.repr or values[f.name] != f.default}


def _field(default: tp.Any, *, result: bool, stream: bool) -> tp.Any:
    """Declares whether a field determines the result, and whether runs on one stream must agree in it.

    default: a value, or a class or function that is called to make one.
    """
    name = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{name: default}, metadata={"result": result, "stream": stream})


def result_names(cls: tp.Any) -> list[str]:
    """Names of the fields that determine the result."""
    return [f.name for f in dataclasses.fields(cls) if f.metadata.get("result", True)]


def stream_of(cfg: tp.Any) -> tuple[object, ...]:
    """Values of the fields that are equal for all runs on one stream."""
    return tuple(getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.metadata.get("stream", False))


def identity(cfg: tp.Any) -> dict[str, object]:
    """What determines the result, for a hash: the class, and the values that differ from their defaults.

    So a new field does not change the identity of older runs. A new default does not either, although it
    changes the result: raise the REVISION of the code that uses it.
    """
    out: dict[str, object] = {"type": type(cfg).__name__}
    for field in dataclasses.fields(cfg):
        made, value = field.default_factory, getattr(cfg, field.name)
        usual = field.default if made is dataclasses.MISSING else made()
        mine, theirs = (identity(v) if dataclasses.is_dataclass(v) else v for v in (value, usual))
        if field.metadata.get("result", True) and mine != theirs:
            out[field.name] = mine
    return out


# ---- checks ----


def settle(cfg: tp.Any, prefix: str = "", **intervals: str) -> None:
    """Expands the paths of a config and checks its numbers. Infinities and NaN are refused.

    Args:
        cfg: an instance of a frozen dataclass, in its `__post_init__`.
        prefix: of the fields' flags: "sae." for --sae.top-k.
        intervals: allowed values of a field: "[0, 1)" includes 0 and excludes 1.

    Raises:
        UserError: a number is outside its interval, or a path cannot be expanded.
    """
    for name in path_fields(type(cfg)):
        value, what = getattr(cfg, name), flag(prefix + name)
        paths = value if isinstance(value, tuple) else (value,)
        paths = tuple(expand(path, what) for path in paths)
        object.__setattr__(cfg, name, paths if isinstance(value, tuple) else paths[0])
    for name in (field.name for field in dataclasses.fields(cfg)):
        value = getattr(cfg, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check(number, intervals.get(name, WIDEST), flag(prefix + name))


def flag(name: str) -> str:
    """sae.top_k -> --sae.top-k."""
    return f"--{name.replace('_', '-')}"


@functools.cache
def path_fields(cls: type) -> tuple[str, ...]:
    """Names of the fields whose type is `Path` or a tuple of it."""
    hints = tp.get_type_hints(cls, include_extras=True)
    return tuple(name for name, hint in hints.items() if _holds_path(hint))


def _holds_path(hint: object) -> bool:
    return hint == Path or any(map(_holds_path, tp.get_args(hint)))


def _check(number: int | float, interval: str, what: str) -> None:
    low, high = map(float, interval[1:-1].split(","))
    if not (low <= number if interval[0] == "[" else low < number):  # NaN too
        wanted = f"at least {_plain(low)}" if interval[0] == "[" else f"more than {_plain(low)}"
    elif not (number <= high if interval[-1] == "]" else number < high):
        wanted = f"at most {_plain(high)}" if interval[-1] == "]" else f"below {_plain(high)}"
    else:
        return
    raise errors.UserError(f"{what} {number}: must be {wanted}.")


def _plain(bound: float) -> str:
    return f"{int(bound):,}" if bound.is_integer() else f"{bound:g}"


# ---- paths ----


def expand(typed: str, what: str = "") -> str:
    """Expands `~`, `~user`, `$VAR` and `${VAR}` as a shell does. A path that exists as typed keeps its `$`.

    `./~`, a folder named ~, is made absolute, because pathlib drops the `./`.

    Args:
        typed: a path.
        what: the flag, which begins error messages.

    Raises:
        UserError: a variable is not set or empty, or there is no such user.
    """
    what = f"{what} {typed}:".lstrip()
    if "\0" in typed:
        raise errors.UserError(f"{what.encode()!r} a path cannot hold the character NUL.")
    home, slash, rest = typed.partition("/") if typed.startswith("~") else ("", "", typed)
    if home:
        expanded = os.path.expanduser(home)  # noqa: PTH111 (for which pathlib raises RuntimeError)
        if expanded == home or not os.environ.get("HOME", "~"):
            raise errors.UserError(
                f"{what} there is no such home folder. Write the whole path, or ./{home} for a folder of "
                "that name."
            )
        home = expanded

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1] or match[2])
        if not found:
            raise errors.UserError(
                f"{what} the environment variable {match[0]} is not set. Set it, or write the whole path."
            )
        return found

    path = home + slash + rest
    if not os.path.lexists(path):
        path = home + slash + VARIABLE.sub(value, rest)
    is_named_tilde = not home and str(pathlib.Path(path)).startswith("~")
    return os.path.abspath(path) if is_named_tilde else path  # noqa: PTH100 (as above)


def path(typed: str | os.PathLike[str]) -> pathlib.Path:
    """`expand`, for functions that notebooks call."""
    return pathlib.Path(expand(os.fspath(typed)))
