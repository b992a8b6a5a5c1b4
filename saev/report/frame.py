"""Reads and writes frames as files."""

import csv
import io
import pathlib

import polars as pl

from saev import helpers


def write_csv(fpath: pathlib.Path, frame: pl.DataFrame) -> None:
    """Writes a CSV file atomically. Floats keep all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(frame.columns)
    writer.writerows(frame.iter_rows())
    helpers.write_text(fpath, text.getvalue())


def read_csv(data: bytes, schema: dict) -> pl.DataFrame:
    """Reads what `write_csv` wrote.

    Raises:
        ValueError, polars.exceptions.PolarsError: columns or types differ from `schema`, or a value is
        missing.
    """
    frame = pl.read_csv(data, schema=schema)
    if frame.null_count().sum_horizontal().sum():
        raise ValueError("values are missing")
    return frame


def write_parquet(fpath: pathlib.Path, frame: pl.DataFrame) -> None:
    """Writes a Parquet file atomically."""
    with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
        frame.write_parquet(fd)
