"""The fields of configs: what each decides, and what it may hold.

A field without a role decides the result (an SAE's weights, a table), so it is part of the run's id. Other roles are
declared where the field is defined, instead of its default: `log_every: int = fields.shared(50)`.
Paths are expanded and numbers checked by one call in each `__post_init__`.
"""

import dataclasses
import enum
import functools
import os
import pathlib
import re
import typing as tp

import beartype

from saev import errors

Path = tp.Annotated[str, "path"]
"""The type of a config's field that holds a path; `tuple[Path, ...]` holds several."""

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)
WIDEST = "(-9.2e18, 9.2e18)"
"""What fits into 64 bits: for fields without an interval of their own."""

T = tp.TypeVar("T")


class Role(enum.Enum):
    """What a field decides: (the result?, which runs share a stream of activations?)."""

    RESULT = (True, False)
    STREAM = (True, True)
    SHARED = (False, True)
    NEITHER = (False, False)


def stream(default: T | type[T]) -> T:
    """A field that decides the stream, and so the result."""
    return _field(default, Role.STREAM)


def shared(default: T | type[T]) -> T:
    """A field that runs on one stream share, and that changes no result."""
    return _field(default, Role.SHARED)


def neither(default: T | type[T]) -> T:
    """A field that decides neither the result nor the stream."""
    return _field(default, Role.NEITHER)


def _field(default: tp.Any, role: Role) -> tp.Any:
    """default: a value, or a class that is called for one."""
    name = "default_factory" if isinstance(default, type) else "default"
    return dataclasses.field(**{name: default}, metadata={"role": role})


def _roles(cls: tp.Any) -> dict[str, Role]:
    return {f.name: f.metadata.get("role", Role.RESULT) for f in dataclasses.fields(cls)}


@beartype.beartype
def result_names(cls: type) -> list[str]:
    """Names of the fields that decide the result."""
    return [name for name, role in _roles(cls).items() if role.value[0]]


@beartype.beartype
def stream_of(cfg: tp.Any) -> tuple[object, ...]:
    """Values of the fields that runs on one stream share."""
    return tuple(getattr(cfg, name) for name, role in _roles(type(cfg)).items() if role.value[1])


@beartype.beartype
def identity(cfg: tp.Any) -> dict[str, object]:
    """What decides the result, for a hash: the class, and the values that differ from their defaults.

    A field that is added later changes no identity while it has its default. A default that is changed gives other
    results for the same identity: raise the REVISION of what it decides.
    """
    out: dict[str, object] = {"type": type(cfg).__name__}
    for field in dataclasses.fields(cfg):
        made, value = field.default_factory, getattr(cfg, field.name)
        usual = field.default if made is dataclasses.MISSING else made()
        mine, theirs = (identity(v) if dataclasses.is_dataclass(v) else v for v in (value, usual))
        if _roles(type(cfg))[field.name].value[0] and mine != theirs:
            out[field.name] = mine
    return out


# ---- what they may hold ----


@beartype.beartype
def settle(cfg: tp.Any, prefix: str = "", **intervals: str) -> None:
    """Expands the paths of a config and checks its numbers; infinities and NaN are in no interval.

    Args:
        cfg: an instance of a frozen dataclass, in its `__post_init__`.
        prefix: what stands before the fields' names in flags: "sae." for --sae.top-k.
        intervals: field -> what it may hold, as mathematics writes it: "[0, 1)" holds 0 and not 1.

    Raises:
        UserError: a number lies outside its interval, or a path cannot be expanded.
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


@beartype.beartype
def flag(name: str) -> str:
    """sae.top_k -> --sae.top-k."""
    return f"--{name.replace('_', '-')}"


@functools.cache
def path_fields(cls: type) -> tuple[str, ...]:
    """Names of a config's fields whose type is `Path`, or a tuple of it."""
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


@beartype.beartype
def expand(typed: str, what: str = "") -> str:
    """`~`, `~user`, `$VAR` and `${VAR}` become what a shell makes of them. A path that exists as typed keeps its `$`.

    `./~` is a folder named ~; it is made absolute, because pathlib drops the `./`.

    Args:
        typed: a path.
        what: begins the error message: the flag.

    Raises:
        UserError: no such variable (or an empty one), or no such user.
    """
    what = f"{what} {typed}:".lstrip()
    if "\0" in typed:
        raise errors.UserError(f"{what.encode()!r} a path cannot hold the character NUL.")
    home, slash, rest = typed.partition("/") if typed.startswith("~") else ("", "", typed)
    if home:
        expanded = os.path.expanduser(home)  # noqa: PTH111 (for which pathlib raises RuntimeError)
        if expanded == home or not os.environ.get("HOME", "~"):
            raise errors.UserError(
                f"{what} no home folder of this name is known. Write the whole path, or ./{home} for a folder of that name."
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


@beartype.beartype
def path(typed: str | os.PathLike[str]) -> pathlib.Path:
    """`expand` for functions that notebooks call."""
    return pathlib.Path(expand(os.fspath(typed)))
