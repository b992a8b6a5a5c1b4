"""Turns a command line and a sweep file into a list of configs.

A sweep is a TOML file whose keys are the command's flags. Tables nest as the configs do:

    lr = [1e-4, 3e-4]               # a list is a grid axis
    [sae]
    exp_factor = [8, 16]            # crossed with lr: 4 configs

    [[sae]]                         # a list of tables is one axis: the keys of a table vary together
    type = "top-k"                  # the subcommand's name
    top_k = 32
    [[sae]]
    type = "relu"
    sparsity_coeff = 1e-3

    [[paired]]                      # the same for top-level parameters
    lr = 1e-4
    n_lr_warmup = 500

For a parameter that is itself a list (`n_train`), a list of lists is an axis. Flags on the command line
override the sweep.
"""

import collections.abc
import dataclasses
import difflib
import itertools
import math
import pathlib
import re
import sys
import types
import typing as tp

import beartype
import beartype.door

from saev import cli, errors, fields
from saev.formats import tomlfile

MAX_CONFIGS = 1000
"""Most configs in a sweep: Slurm's default limit for a job array. They are parsed within half a minute."""
EXACT = 2**53
"""Floats below this represent integers exactly."""
REMEDY = "Pass a TOML file such as those in configs/."

Cfg = tp.TypeVar("Cfg")
Override = dict[str, object]
"""Dotted key -> value, e.g. {"sae.top_k": 32}."""


def parse(cls: type[Cfg], description: str, args: collections.abc.Sequence[str] | None = None) -> list[Cfg]:
    """Parses the command line; with `--sweep`, once per configuration of the sweep.

    Raises:
        UserError: the sweep file is missing or is not TOML, or has an unknown key, a wrong type or an invalid
            combination.
    """
    args = list(sys.argv[1:] if args is None else args)
    cfg = cli.parse(cls, args, description)
    sweep = getattr(cfg, "sweep", None)
    if not sweep:
        return [cfg]
    fpath = pathlib.Path(sweep)
    configs = [
        _apply(cls, cfg, override, fpath, args)
        for override in expand(tomlfile.read(fpath, REMEDY), cls, fpath)
    ]
    _check_shared(configs, fpath)
    return list(dict.fromkeys(configs))  # a typed flag can make two configurations equal


def group(cfgs: list[Cfg], most: int | None = None) -> list[list[Cfg]]:
    """Splits a sweep into groups that share one stream of activations: one job each.

    most: largest group. Larger ones are divided evenly.
    """
    groups: dict[tuple[object, ...], list[Cfg]] = {}
    for cfg in cfgs:
        groups.setdefault(fields.stream_of(cfg), []).append(cfg)
    out = []
    for together in groups.values():
        n = -(-len(together) // (most or len(together)))
        ends = [len(together) * i // n for i in range(n + 1)]
        out += [together[start:end] for start, end in itertools.pairwise(ends)]
    return out


def title(stage: str, cfg: object, what: object) -> str:
    """The name of a command's Slurm jobs: the stage, then the sweep file's name or `what` it works on."""
    sweep = pathlib.Path(getattr(cfg, "sweep", "")).stem
    text = what if isinstance(what, str) else subcommand_name(type(what))
    return re.sub(r"[^\w.-]+", "-", f"saev-{stage}-{sweep or text}").strip("-")


# ---- TOML table -> list of overrides ----


def expand(table: dict[str, object], cls: type, fpath: pathlib.Path) -> list[Override]:
    """The cross product of all axes in file order. The last axis varies fastest."""
    return _crossed([_axis(key, value, cls, fpath) for key, value in table.items()], fpath)


def _crossed(axes: list[list[Override]], fpath: pathlib.Path) -> list[Override]:
    n_configs = math.prod(map(len, axes))
    if n_configs > MAX_CONFIGS:
        raise errors.UserError(
            f"{fpath}: is a sweep of {n_configs:,} configurations; the limit is {MAX_CONFIGS:,}. "
            "Shorten its lists, or use [[paired]] to vary parameters together."
        )
    return [_merged(combination, fpath) for combination in itertools.product(*axes)]


def _merged(combination: collections.abc.Iterable[Override], fpath: pathlib.Path) -> Override:
    """Merges overrides. A key can be in two of them only through [[paired]], which is an error."""
    merged: Override = {}
    for alternative in combination:
        if twice := sorted(merged.keys() & alternative.keys()):
            raise errors.UserError(
                f"{fpath}: {twice[0]} is given twice: inside and outside [[paired]]. Drop one of them."
            )
        merged |= alternative
    return merged


def _axis(key: str, value: object, cls: type, fpath: pathlib.Path) -> list[Override]:
    """The overrides of one axis: one key of a table."""
    if key != "paired":
        _owner(cls, key, fpath)  # an unknown key is reported before its value
    flat = [member for field in _fields(cls) for member in _flat_members(field)]
    alternatives = _alternatives(key, value, [cls, *flat], fpath)
    if key == "paired":
        return [o for v in alternatives for o in expand(_table(v, key, fpath), cls, fpath)]
    nested = [f for f in _fields(cls) if f.name == key and _members(f) and not _flat_members(f)]
    if nested:
        return [o for v in alternatives for o in _expand_nested(nested[0], _table(v, key, fpath), fpath)]
    return [{key: v} for v in alternatives]


def _expand_nested(field: dataclasses.Field, table: dict[str, object], fpath: pathlib.Path) -> list[Override]:
    """As `expand`, for the table of a nested config."""
    axes = []
    for key, value in table.items():
        name, members = f"{field.name}.{key}", _members(field).values()
        axes.append([{name: v} for v in _alternatives(name, value, members, fpath)])
    return _crossed(axes, fpath)


def _alternatives(
    name: str, value: object, classes: collections.abc.Iterable[type], fpath: pathlib.Path
) -> list[object]:
    """The values of a key. A list is one value of a tuple field, unless it holds lists."""
    types_ = [f.type for cls in classes for f in _fields(cls) if f.name == name.rpartition(".")[2]]
    if any(tp.get_origin(t) is tuple for t in types_) and not (
        isinstance(value, list) and any(isinstance(v, list) for v in value)
    ):
        return [value]
    if value == []:
        raise errors.UserError(f"{fpath}: {name} is an empty list. Give it at least one value.")
    return value if isinstance(value, list) else [value]


def _table(value: object, key: str, fpath: pathlib.Path) -> dict[str, object]:
    if not isinstance(value, dict):
        raise errors.UserError(f"{fpath}: {key} must be a table: write [{key}], or [[{key}]] for several.")
    return value


# ---- override -> config ----


def _apply(cls: type[Cfg], cfg: Cfg, override: Override, fpath: pathlib.Path, args: list[str]) -> Cfg:
    """The defaults with the override's values and, above these, the typed flags'.

    `type` or the command line picks the member of a union. cfg: what `args` give without the override.
    """
    typed = _typed(args)
    values: dict[str, dict[str, object]] = {}
    for key, value in override.items():
        head, _, rest = key.partition(".")
        owner = _owner(cls, head, fpath)
        values.setdefault(owner or head, {})[head if owner else rest] = value
    kwargs = {}
    for field in _fields(cls):
        given = values.get(field.name, {})
        if dataclasses.is_dataclass(getattr(cfg, field.name)):
            member = _member(field, getattr(cfg, field.name), given, fpath, args)
            _drop_replaced(field.name, member, given, args)
            prefix = "" if _flat_members(field) else f"{field.name}."
            given |= _values(
                getattr(cfg, field.name), {t.removeprefix(prefix) for t in typed if t.startswith(prefix)}
            )
            kwargs[field.name] = _build(field, member, given, fpath)
        elif field.name in typed:
            kwargs[field.name] = getattr(cfg, field.name)
        elif given:
            kwargs[field.name] = given[""]
    return _construct(cls, kwargs, "", fpath)


def _typed(args: list[str]) -> set[str]:
    """Dotted names of the fields whose flags are on the command line: sae.top_k for --sae.top-k=3.

    A switch (--no-slurm-wait) also gives the name that its flag without `no-` would have.
    """
    names = {
        arg.partition("=")[0].removeprefix("--").replace("-", "_") for arg in args if arg.startswith("--")
    }
    return names | {re.sub(r"(^|\.)no_", r"\1", name) for name in names}


def _values(cfg: tp.Any, names: set[str]) -> Override:
    """The values of a config's fields that have one of the names."""
    return {f.name: getattr(cfg, f.name) for f in _fields(cfg) if f.name in names}


def _check_shared(configs: list[Cfg], fpath: pathlib.Path) -> None:
    """Refuses sweeps over flattened configs (Slurm's), because a sweep is one job array."""
    fields = _fields(configs[0])
    for name in [f.name for f in fields if _flat_members(f)]:
        seen = [dataclasses.asdict(getattr(cfg, name)) for cfg in configs]
        if vary := [key for key in seen[0] if len({s[key] for s in seen}) > 1]:
            raise errors.UserError(
                f"{fpath}: {vary[0]} varies, but a sweep is one job array. Give it one value, or use one "
                "file per value."
            )


def _owner(cls: type, key: str, fpath: pathlib.Path) -> str:
    """The flattened config (`slurm`) that a top-level key belongs to, or "" for the class itself."""
    fields = _fields(cls)
    if key in {f.name for f in fields if not _flat_members(f)}:
        return ""
    owners = {
        g.name: f.name for f in fields if _flat_members(f) for g in dataclasses.fields(_flat_members(f)[0])
    }
    if key not in owners:
        own = [f.name for f in fields if not _flat_members(f)]
        raise _unknown_key(key, [*own, *owners, "paired"], fpath)
    return owners[key]


def _flat_members(field: dataclasses.Field) -> list[tp.Any]:
    """[dataclass] if the field is flattened into its parent's flags (tyro.conf.arg(name="")), else []."""
    if tp.get_origin(field.type) is tp.Annotated and dataclasses.is_dataclass(tp.get_args(field.type)[0]):
        return [tp.get_args(field.type)[0]]
    return []


def _members(field: dataclasses.Field) -> dict[str, tp.Any]:
    """Maps subcommand names to the classes of a union field (or its one class)."""
    typ = tp.get_args(field.type)[0] if tp.get_origin(field.type) is tp.Annotated else field.type
    union = tp.get_origin(typ) in (tp.Union, types.UnionType)
    classes = [c for c in (tp.get_args(typ) if union else (typ,)) if dataclasses.is_dataclass(c)]
    return {subcommand_name(tp.cast(type, c)): c for c in classes}


def subcommand_name(cls: type) -> str:
    """tyro's name for a class: ImageFolder -> image-folder."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()


def _member(
    field: dataclasses.Field, current: object, given: Override, fpath: pathlib.Path, args: list[str]
) -> type:
    """The class that this override uses for a (union) field."""
    name = given.pop("type", None)
    if name is None:
        return type(current)
    members = _members(field)
    if not isinstance(name, str) or name not in members:
        raise errors.UserError(f"{fpath}: {field.name}.type = {name!r}: must be one of {', '.join(members)}.")
    typed = [n for n in members if f"{field.name}:{n}" in args]
    if typed and typed != [name]:
        raise errors.UserError(
            f"{fpath}: {field.name}.type is {name!r}, but the command line has {field.name}:{typed[0]}. "
            "Drop one of them."
        )
    return members[name]


def _drop_replaced(prefix: str, member: type, given: Override, args: list[str]) -> None:
    """Drops the sweep's values of alternative fields (`EITHER`) if one of these was typed."""
    either = getattr(member, "EITHER", ())
    typed = {arg.partition("=")[0].replace("_", "-") for arg in args}
    if any(f"--{prefix}.{name}".replace("_", "-") in typed for name in either):
        for name in either:
            given.pop(name, None)


def _build(field: dataclasses.Field, member: type, given: Override, fpath: pathlib.Path) -> object:
    prefix = "" if _flat_members(field) else f"{field.name}."
    for key in given:
        if key not in _field_names(member):
            members = _members(field)
            types_ = ["type"] if len(members) > 1 else []
            valid = [f"{prefix}{n}" for n in [*_field_names(member), *types_]]
            others = [n for n, c in members.items() if key in _field_names(c)]
            hint = f" It belongs to type {' or '.join(others)}." if others else ""
            raise _unknown_key(f"{prefix}{key}", valid, fpath, hint)
    return _construct(member, given, prefix, fpath)


def _fields(cls: tp.Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)


def _field_names(cls: type) -> list[str]:
    return [f.name for f in _fields(cls)]


def _construct(cls: type[Cfg], kwargs: dict[str, object], prefix: str, fpath: pathlib.Path) -> Cfg:
    """Calls the class with TOML's values converted to its types.

    Raises:
        UserError: a value has the wrong type or is out of range (names the key).
    """
    hints = tp.get_type_hints(cls)
    for key, value in kwargs.items():
        kwargs[key] = widened = _widen(value, hints[key])
        if not _fits(widened, hints[key]):
            seen = "" if tp.get_args(hints[key]) else f", not {type(value).__name__}"
            raise errors.UserError(
                f"{fpath}: {prefix}{key} = {value!r}: must be {_wanted(hints[key])}{seen}."
            )
    try:
        return cls(**kwargs)
    except errors.UserError as err:
        raise errors.UserError(f"{fpath}: {err}") from err


def _fits(value: object, hint: tp.Any) -> bool:
    """As beartype's is_bearable, but checks all items of a list, and a bool is not an int."""
    if tp.get_origin(hint) is tuple and isinstance(value, tuple):
        items = tp.get_args(hint)
        items = items[:1] * len(value) if items[-1] is ... else items
        return len(items) == len(value) and all(map(_fits, value, items))
    return beartype.door.is_bearable(value, hint) and (hint is bool or not isinstance(value, bool))


def _wanted(hint: tp.Any) -> str:
    """Describes a type in TOML's terms."""
    args = [a for a in tp.get_args(hint) if a not in (types.NoneType, ...)]
    if tp.get_origin(hint) is tp.Literal:
        return f"one of {', '.join(map(repr, args))}"
    if tp.get_origin(hint) is tuple:
        return f"a list of {_wanted(args[0])}"
    return " or ".join(map(_wanted, args)) or hint.__name__


def _widen(value: object, hint: object) -> object:
    """Converts what TOML writes: 1 to a float field, 1e6 (a float) to an int field, lists to tuples."""
    hints = (hint, *tp.get_args(hint))
    if isinstance(value, list):
        inner = next((tp.get_args(h)[0] for h in hints if tp.get_origin(h) is tuple), None)
        return tuple(_widen(v, inner) for v in value)
    if type(value) is int and float in hints and int not in hints:
        return float(value) if abs(value) < EXACT else value
    if type(value) is float and int in hints and float not in hints:
        return int(value) if value.is_integer() and abs(value) < EXACT else value
    return value


def _unknown_key(key: str, valid: list[str], fpath: pathlib.Path, hint: str = "") -> errors.UserError:
    close = difflib.get_close_matches(key, valid, n=1)
    if close and not hint:
        hint = f" Perhaps you meant {close[0]!r}."
    return errors.UserError(f"{fpath}: unknown key {key!r}.{hint} Valid keys: {', '.join(valid)}.")
