"""The command line: tyro, with integers such as 1e6, help that fits any terminal, and errors in one line."""

import ast
import collections.abc
import contextlib
import dataclasses
import decimal
import inspect
import io
import itertools
import os
import pathlib
import re
import shutil
import sys
import textwrap
import types
import typing as tp

import tyro

from saev import errors

CONFIG = (tyro.conf.CascadeSubcommandArgs,)
MOST_DIGITS = 30
"""Most digits of an integer. The bounds of all fields are far below."""
WIDTHS = (60, 160)
"""Least and most columns of the help. In narrower terminals tyro never returns."""
PLAINER = (
    (r" \(applied to [^)]*\)", ""),
    (r"\s*Arguments are applied to the directly preceding subcommand.*", ""),
    (r"no type matching (.+?) could be instantiated from \['?(.*?)'?\].*", r"'\2' is not \1"),
    (r"could not convert string to float: (.*)", r"\1 is not a number"),
    (r"Could not parse arguments (\[.*\]) into tuple type .*", r"cannot read \1"),
    (r"\{None\}\|", "None or "),
)
"""(pattern, replacement) for tyro's errors."""


def whole_number(text: str) -> int:
    """Parses an integer such as '1_000', '1e6' or '2.5e5'.

    Raises:
        ValueError: the text is not an integer, or has more than 30 digits.
    """
    try:
        number = decimal.Decimal(text)
    except decimal.InvalidOperation:
        raise ValueError(f"{text!r} is not a whole number") from None
    if not number.is_finite() or number.adjusted() >= MOST_DIGITS or number != int(number):
        raise ValueError(f"{text!r} is not a whole number of at most {MOST_DIGITS} digits")
    return int(number)


def _integers(info: tyro.constructors.PrimitiveTypeInfo) -> tp.Any:
    """tyro's rule for int."""
    if info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda args: whole_number(args[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _joined_help(info: tyro.constructors.StructTypeInfo) -> None:
    """Gives tyro each field's docstring as one line; it would keep the source's line breaks.

    As a rule of tyro's registry, it sees each config class before tyro reads its fields. It constructs
    nothing.
    """
    if not dataclasses.is_dataclass(info.type):
        return
    texts = {}
    for cls in filter(dataclasses.is_dataclass, reversed(info.type.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        for field, doc in itertools.pairwise(tp.cast(ast.ClassDef, definition).body):
            match field, doc:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    texts[name] = " ".join(text.split())
    for field in dataclasses.fields(info.type):
        if field.name in texts:
            field.metadata = types.MappingProxyType({**field.metadata, "help": texts[field.name]})


REGISTRY = tyro.constructors.ConstructorRegistry()
REGISTRY.primitive_rule(_integers)
HELP_REGISTRY = tyro.constructors.ConstructorRegistry()
HELP_REGISTRY.primitive_rule(_integers)
HELP_REGISTRY.struct_rule(_joined_help)


def parse(
    cls: tp.Any, args: collections.abc.Sequence[str] | None = None, description: str = "", **kwargs: tp.Any
) -> tp.Any:
    """Parses `args` (by default, the command line) into an instance of `cls`.

    Raises:
        UserError: an unknown flag, or an invalid value.
        SystemExit: the help was printed.
    """
    args = list(sys.argv[1:] if args is None else args)
    is_help = bool({"-h", "--help"} & set(args))
    complaint = io.StringIO()
    try:
        with _columns(is_help), contextlib.redirect_stderr(complaint):
            return tyro.cli(
                cls,
                prog=_prog(),
                args=args,
                description=description,
                config=CONFIG,
                registry=HELP_REGISTRY if is_help else REGISTRY,
                **kwargs,
            )
    except SystemExit as err:
        if err.code != 2:  # the help, or a signal
            raise
    raise errors.UserError(_one_line(complaint.getvalue()))


def _prog() -> str:
    """The command as it was called: train.py, saev train, or python -m saev.data."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or sys.argv[0].startswith("saev "):
        return pathlib.Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


@contextlib.contextmanager
def _columns(is_help: bool) -> collections.abc.Generator[None]:
    """Sets the width that tyro sees. Errors get one wide line, so that no word is hyphenated."""
    before = os.environ.get("COLUMNS")
    width = min(max(shutil.get_terminal_size().columns, WIDTHS[0]), WIDTHS[1])
    os.environ["COLUMNS"] = str(width if is_help else 10_000)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _one_line(box: str) -> str:
    """The error in the box that tyro draws, with its suggestion."""
    lines = [" ".join(line.strip("│╭╮╰╯|+ ").split()) for line in box.splitlines()[1:]]
    rulers = (line and not line.strip("─-") for line in lines)
    joined = " ".join("\n" if is_ruler else line for line, is_ruler in zip(lines, rulers, strict=True))
    first, *others = filter(None, map(str.strip, joined.split("\n")))
    for pattern, plain in PLAINER:
        first = re.sub(pattern, plain, first)
    hint = ""
    for section in others:
        if section.startswith("Available subcommands") and "--" not in first:
            hint = f" {section}."
        elif section.startswith("Perhaps you meant"):
            flags = dict.fromkeys(re.findall(r"--(?!help)[\w.-]+(?= )", section))
            owners = dict.fromkeys(re.findall(r"in \S+ (\S+:\S+) --help", section))
            hint = f" Perhaps you meant {' or '.join([*flags][:3])}." if flags else ""
            if any(flag in first.split() for flag in flags) and owners:
                hint = f" It belongs to {' or '.join(owners)}."
    return f"{first.rstrip('.')}.{hint} See --help."
