"""The command line: tyro, with whole numbers such as 1e6, help that fits any terminal, and wrong flags told in one line."""

import collections.abc
import contextlib
import decimal
import io
import os
import re
import shutil
import sys
import typing as tp

import beartype
import tyro

from saev import errors

CONFIG = (tyro.conf.CascadeSubcommandArgs,)
MOST_DIGITS = 30
"""Of a whole number; the configs' own bounds are far below."""
WIDTHS = (60, 160)
"""Columns of the help; tyro does not end in narrower terminals."""


@beartype.beartype
def whole_number(text: str) -> int:
    """'1_000', '1e6' or '2.5e5' -> the integer that it is exactly.

    Raises:
        ValueError: it is none, or has more than 30 digits.
    """
    try:
        number = decimal.Decimal(text)
    except decimal.InvalidOperation:
        raise ValueError(f"{text!r} is not a whole number") from None
    if not number.is_finite() or number.adjusted() >= MOST_DIGITS or number != int(number):
        raise ValueError(f"{text!r} is not a whole number of at most {MOST_DIGITS} digits")
    return int(number)


def _integers(info: tyro.constructors.PrimitiveTypeInfo) -> tp.Any:
    """tyro's rule for fields of type int."""
    if info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda args: whole_number(args[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


REGISTRY = tyro.constructors.ConstructorRegistry()
REGISTRY.primitive_rule(_integers)


@beartype.beartype
def parse(
    cls: tp.Any,
    args: collections.abc.Sequence[str] | None = None,
    description: str = "",
    **kwargs: tp.Any,
) -> tp.Any:
    """What tyro makes of the command line (by default sys.argv's).

    Raises:
        UserError: an unknown flag, or a value that its flag cannot hold.
        SystemExit: help was asked for and printed.
    """
    args = list(sys.argv[1:] if args is None else args)
    is_help = bool({"-h", "--help"} & set(args))
    complaint = io.StringIO()
    try:
        with _columns(is_help), contextlib.redirect_stderr(complaint):
            return tyro.cli(
                cls, args=args, description=description, config=CONFIG, registry=REGISTRY, **kwargs
            )
    except SystemExit as err:
        if err.code in (0, None):
            raise
    raise errors.UserError(_one_line(complaint.getvalue()))


@contextlib.contextmanager
def _columns(is_help: bool) -> collections.abc.Generator[None]:
    """Sets the width that tyro sees. An error is set in one wide line, so that no word of it is cut."""
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
    """The first section of the box that tyro draws, and what it thinks was meant."""
    lines = [" ".join(line.strip("│╭╮╰╯|+ ").split()) for line in box.splitlines()[1:]]
    rulers = (line and not line.strip("─-") for line in lines)
    joined = " ".join(
        "\n" if is_ruler else line for line, is_ruler in zip(lines, rulers, strict=True)
    )
    first, *others = filter(None, map(str.strip, joined.split("\n")))
    hint = ""
    for section in others:
        if section.startswith("Available subcommands") and "--" not in first:
            hint = f" {section}."
        elif section.startswith("Perhaps you meant"):
            flags = dict.fromkeys(re.findall(r"--[\w.-]+(?= )", section))
            owners = dict.fromkeys(re.findall(r"in \S+ (\S+:\S+) --help", section))
            hint = f" Perhaps you meant {' or '.join([*flags][:3])}."
            if any(flag in first.split() for flag in flags) and owners:
                hint = f" It belongs to {' or '.join(owners)}."
    return f"{first.rstrip('.')}.{hint} See --help."
