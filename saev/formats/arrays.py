"""Named arrays in .npz files: results, and the state of work that may be killed."""

import collections.abc
import logging
import pathlib
import typing as tp

import numpy as np

from saev import errors, helpers

logger = logging.getLogger("saev")

KEY = "key"
"""Array that says what a state depends on."""


def write(
    fpath: pathlib.Path, arrays: collections.abc.Mapping[str, np.ndarray], save: tp.Any = np.savez
) -> None:
    """Writes arrays atomically. save: np.savez or np.savez_compressed."""
    with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
        save(fd, allow_pickle=False, **arrays)


def write_state(fpath: pathlib.Path, key: str, arrays: collections.abc.Mapping[str, np.ndarray]) -> None:
    """Writes arrays for `read_state`. key: a hash of all that they depend on."""
    write(fpath, {KEY: np.array(key), **arrays})


def read_state(
    fpath: pathlib.Path, key: str, names: collections.abc.Iterable[str]
) -> dict[str, np.ndarray] | None:
    """What `write_state` wrote. None if there is no such file, it has another key, or (with a warning) it is
    damaged: zip files have checksums."""
    if not fpath.is_file():  # a FIFO would block
        return None
    try:
        with fpath.open("rb") as fd, np.load(fd, allow_pickle=False) as found:
            return {name: found[name] for name in names} if found[KEY].item() == key else None
    except Exception as err:  # zipfile and NumPy raise many types for changed bytes
        logger.warning("%s: cannot be read (%s); it is made again", fpath, errors.first_line(err))
        return None
