"""Reads users' tables: CSV (commas, semicolons or tabs) and Parquet files with a row per image.

All cells are read as text, so that each column's reader decides what its values mean.
"""

import contextlib
import csv
import dataclasses
import pathlib

import polars as pl

from saev import errors
from saev.formats import textfile

MAX_BYTES = 2**33
REMEDY = "Pass a CSV or Parquet file."
MISSING = ("", "na", "n/a", "nan", "null")
"""What stands for a missing value, in lower case."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Some columns of a file."""

    fpath: pathlib.Path
    frame: pl.DataFrame
    """As the file has them."""
    first: int
    """Number of its first row: in a CSV file, the header is row 1."""

    def number(self, row: int) -> int:
        """A row's number, for messages."""
        return self.first + row

    def values(self, column: str) -> pl.Series:
        """A column of values without needless spaces. null: missing."""
        text = pl.col(column).str.strip_chars().str.replace_all(r"\s+", " ")
        is_missing = text.str.to_lowercase().is_in(MISSING)
        return self.frame.select(pl.when(~is_missing).then(text)).to_series()

    def paths(self, column: str) -> list[str]:
        """A column of paths.

        Raises:
            UserError: a path is missing or repeated.
        """
        seen: dict[str, int] = {}
        for row, text in enumerate(self.frame[column].to_list()):
            if not (path := (text or "").strip()):
                raise errors.UserError(f"{self.fpath}: row {self.number(row)} has no {column!r}. Fill it in.")
            path = path.removeprefix("./")
            if path in seen:
                raise errors.UserError(
                    f"{self.fpath}: rows {self.number(seen[path])} and {self.number(row)} have the same path "
                    f"{path}. Keep one of them."
                )
            seen[path] = row
        return list(seen)


def read(fpath: pathlib.Path, columns: list[str]) -> Table:
    """Reads columns of a file.

    Raises:
        UserError: the file is missing, is not a table, has no rows, or lacks a column.
    """
    columns = list(dict.fromkeys(columns))
    try:
        with fpath.open("rb") if fpath.is_file() else contextlib.nullcontext() as fd:
            is_parquet = fd is not None and fd.read(4) == b"PAR1"
        frame = _parquet(fpath, columns) if is_parquet else _csv(fpath, columns)
    except OSError as err:
        raise errors.UserError(f"{fpath}: cannot be read ({err.strerror}). {REMEDY}") from err
    except pl.exceptions.PolarsError as err:
        raise errors.UserError(f"{fpath}: is not a table ({errors.first_line(err)}). {REMEDY}") from err
    while len(frame) and not any(frame.row(-1)):  # empty lines at the end
        frame = frame.head(-1)
    if not len(frame):
        raise errors.UserError(f"{fpath}: has no rows. {REMEDY}")
    return Table(fpath, frame, 1 if is_parquet else 2)


def _parquet(fpath: pathlib.Path, columns: list[str]) -> pl.DataFrame:
    _check(fpath, list(pl.read_parquet_schema(fpath)), columns)
    return pl.read_parquet(fpath, columns=columns).select(pl.all().cast(pl.String))


def _csv(fpath: pathlib.Path, columns: list[str]) -> pl.DataFrame:
    text = textfile.read(fpath, REMEDY, MAX_BYTES)
    head = text.partition("\n")[0]
    mark = max(",;\t", key=head.count)
    names = [name.strip() for name in next(csv.reader([head], delimiter=mark), [])]
    _check(fpath, names, columns)
    if twice := [name for name in columns if names.count(name) > 1]:
        raise errors.UserError(f"{fpath}: has two columns {twice[0]!r}. Rename one of them.")
    frame = pl.read_csv(text.encode(), separator=mark, infer_schema=False)
    found = {frame.columns[names.index(name)]: name for name in columns}
    return frame.select(list(found)).rename(found)


def _check(fpath: pathlib.Path, names: list[str], columns: list[str]) -> None:
    if absent := [name for name in columns if name not in names]:
        known = ", ".join(names[:30])
        raise errors.UserError(f"{fpath}: has no column {absent[0]!r}. Its columns are {known}.")
