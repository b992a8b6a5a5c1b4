"""Columns of a table as traits. N images, T traits."""

import pathlib

import numpy as np
import polars as pl

from saev import errors
from saev.data.traits import base, config, dumped, split
from saev.formats import tablefile

YES = ("1", "1.0", "true", "t", "yes", "y")
NO = ("0", "0.0", "false", "f", "no", "n")


def load(cfg: config.Table, acts: dumped.Acts) -> base.Traits:
    """Reads the labels.

    Raises:
        UserError: the file is not a table, lacks a column, or has a value that its column cannot have; paths
            are missing or repeated; or a trait does not vary.
    """
    if not cfg.file:
        raise errors.UserError("--labels.file is missing: pass a CSV or Parquet file with a row per image.")
    fpath = pathlib.Path(cfg.file)
    columns = [*cfg.binary, *cfg.categorical, *(column for column, _ in cfg.thresholds())]
    if not columns:
        raise errors.UserError(
            f"{fpath}: name the columns that are traits with --labels.binary, --labels.categorical or "
            "--labels.numeric."
        )
    table = tablefile.read(fpath, [cfg.path_column, *columns, *filter(None, [cfg.class_column])])
    paths = table.paths(cfg.path_column)
    class_n = split.classes_of(paths, cfg)
    if cfg.class_column:
        class_n = np.unique(table.values(cfg.class_column).fill_null("").to_numpy(), return_inverse=True)[1]
    parts = split.of(cfg, paths, class_n.astype(np.int64), acts, cfg.file)
    traits = _traits(cfg, table, parts.rows_N)
    label_NT = np.stack(list(traits.values()), axis=1)[parts.rows_N]
    _refuse_dull(list(traits), label_NT, table)
    known_NT = label_NT >= 0
    return base.Traits(
        [paths[i] for i in parts.rows_N],
        parts.is_train_N,
        list(traits),
        label_NT > 0,
        class_n[parts.rows_N].astype(np.int64),
        None if known_NT.all() else known_NT,
        parts.left_out,
        base.Words(fpath.name, str(fpath), parts.said, "Add them there", split.REMEDY),
        f"{fpath.name}, {parts.said}",
        cfg.split == "drawn",
    )


def _traits(cfg: config.Table, table: tablefile.Table, rows_N: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> each row's label: 1, 0, or -1 if it is missing.

    Args:
        rows_N: rows of train and test images, whose values are traits.
    """
    out: dict[str, np.ndarray] = {}

    def add(name: str, label_N: np.ndarray) -> None:
        if name in out:
            raise errors.UserError(f"{table.fpath}: the trait {name!r} is given twice. Name its column once.")
        out[name] = label_N.astype(np.int8)

    for column in cfg.binary:
        text = table.values(column).str.to_lowercase()
        is_yes, is_no = text.is_in(YES), text.is_in(NO)
        _refuse(
            table,
            column,
            text.is_not_null() & ~(is_yes | is_no),
            "not 0 or 1 (or empty)",
            "Correct it, or pass the column as --labels.categorical.",
        )
        add(column, _numbers(is_yes))
    for column in cfg.categorical:
        text = table.values(column)
        names = sorted(text.gather(rows_N).drop_nulls().unique().to_list())
        base.refuse_size(
            len(text), len(out) + len(names), str(table.fpath), f"Is {column} a column of names?"
        )
        number_N = _numbers(text.cast(pl.Enum(names), strict=False).to_physical())
        for i, name in enumerate(names):
            add(f"{column}::{name}", np.where(number_N < 0, -1, number_N == i))
    for column, threshold in cfg.thresholds():
        text = table.values(column)
        number = text.cast(pl.Float64, strict=False)
        _refuse(
            table,
            column,
            text.is_not_null() & number.is_null(),
            "no number",
            "Correct it, or leave it empty.",
        )
        add(f"{column}::at least {threshold:g}", _numbers(number >= threshold))
    return out


def _numbers(values: pl.Series) -> np.ndarray:
    """Booleans or integers as numbers; -1 for missing ones."""
    return values.cast(pl.Int64).fill_null(-1).to_numpy()


def _refuse(table: tablefile.Table, column: str, is_bad: pl.Series, wanted: str, remedy: str) -> None:
    """Raises a UserError for the first bad value."""
    is_bad = is_bad.fill_null(value=False)
    if is_bad.any():
        row = is_bad.arg_max() or 0
        value = table.values(column)[row]
        more = f" ({is_bad.sum()} such rows)" if is_bad.sum() > 1 else ""
        raise errors.UserError(
            f"{table.fpath}: row {table.number(row)}: {column} is {value!r}, {wanted}{more}. {remedy}"
        )


def _refuse_dull(names: list[str], label_NT: np.ndarray, table: tablefile.Table) -> None:
    """Raises a UserError for the first trait with one value only."""
    for name, label_N in zip(names, label_NT.T, strict=True):
        values = set(np.unique(label_N).tolist()) - {-1}
        if len(values) < 2:
            why = "every labelled image has it" if 1 in values else "no labelled image has it"
            raise errors.UserError(f"{table.fpath}: the trait {name!r} does not vary: {why}. Leave it out.")
