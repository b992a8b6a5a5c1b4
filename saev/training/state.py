"""Saved states of a run: the newest few state-<steps done>.pt in its folder.

A state holds everything that the rest of the run depends on, so a run that continues from it ends with the
same weights.
"""

import collections.abc
import logging
import pathlib
import re
import typing as tp

from saev import errors, helpers
from saev.formats import checkpoint, tensors

logger = logging.getLogger("saev")

State = dict[str, tp.Any]
REMEDY = "Delete it; the run continues from an older state."


def _fpath(dpath: pathlib.Path, n_steps: int) -> pathlib.Path:
    return dpath / f"state-{n_steps:09}.pt"


def saved(dpath: pathlib.Path) -> list[int]:
    """Steps done in each saved state of a run, ascending."""
    numbers = [p.stem.removeprefix("state-") for p in dpath.glob("state-*.pt")]
    return sorted(int(n) for n in numbers if re.fullmatch("[0-9]{9,13}", n))


def save(dpath: pathlib.Path, n_steps: int, state: State, keep_last: int) -> None:
    """Writes a state atomically, then removes later states and all but the newest `keep_last` others."""
    header = {"run": dpath.name, "n_steps": n_steps}
    checkpoint.write(_fpath(dpath, n_steps), "state", header, tensors.dump(state))
    mine = [n for n in saved(dpath) if n <= n_steps]
    for n in set(saved(dpath)) - set(mine[-keep_last:]):
        _fpath(dpath, n).unlink(missing_ok=True)


def load(dpath: pathlib.Path, n_steps: int) -> State:
    """Reads a state.

    Raises:
        UserError: it is truncated, edited, or from another run.
    """
    fpath = _fpath(dpath, n_steps)
    header, payload = checkpoint.read(fpath, "state")
    if header.get("run") != dpath.name or header.get("n_steps") != n_steps:
        raise errors.UserError(
            f"{fpath}: is step {header.get('n_steps')} of run {header.get('run')}. {REMEDY}"
        )
    return tensors.load(payload, str(fpath), REMEDY)


def usable(dpath: pathlib.Path, restore: collections.abc.Callable[[State], None]) -> list[int]:
    """As `saved`, but warns of and skips states that are damaged or for which `restore` raises ValueError."""
    out = []
    for n_steps in saved(dpath):
        try:
            restore(load(dpath, n_steps))
            out.append(n_steps)
        except (errors.UserError, ValueError) as err:
            where = "" if isinstance(err, errors.UserError) else f"{_fpath(dpath, n_steps)}: "
            logger.warning(
                "%s%s Ignored: the run continues from an older state, or starts again.",
                where,
                errors.first_line(err),
            )
    return out


def remove(dpath: pathlib.Path) -> None:
    """Removes all states of a finished run, and temporary files of killed processes."""
    for n_steps in saved(dpath):
        _fpath(dpath, n_steps).unlink(missing_ok=True)
    helpers.sweep(dpath)


def starts(states: dict[pathlib.Path, list[int]]) -> list[tuple[int, list[pathlib.Path]]]:
    """Divides runs of one stream into groups that can continue together: [(steps done, runs)].

    A group continues from the smallest of its runs' newest states: killed during a save, some runs have one
    state more than others.

    Args:
        states: run -> steps of its states.
    """
    left = {run: steps or [0] for run, steps in states.items()}
    out = []
    while left:
        start = min(steps[-1] for steps in left.values())
        out.append((start, [run for run, steps in left.items() if start in steps]))
        left = {run: steps for run, steps in left.items() if start not in steps}
    return out
