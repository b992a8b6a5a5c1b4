"""Saved states of a run in training: state-<steps done>.pt beside its sae.pt, the newest few of them.

A state holds all that the rest of the run depends on, so the same command goes on from it to the same weights.
"""

import io
import pathlib
import typing as tp

import beartype
import torch

from saev import errors
from saev.formats import checkpoint

State = dict[str, tp.Any]


def _fpath(dpath: pathlib.Path, n_steps: int) -> pathlib.Path:
    return dpath / f"state-{n_steps:09}.pt"


@beartype.beartype
def saved(dpath: pathlib.Path) -> list[int]:
    """Steps done in each saved state of a run, rising."""
    numbers = [p.stem.removeprefix("state-") for p in dpath.glob("state-*.pt")]
    return sorted(int(n) for n in numbers if n.isdigit())


@beartype.beartype
def save(dpath: pathlib.Path, n_steps: int, state: State, keep_last: int) -> None:
    """Writes a state atomically, then removes all but the newest `keep_last`."""
    payload = io.BytesIO()
    torch.save(state, payload)
    header = {"run": dpath.name, "n_steps": n_steps}
    checkpoint.write(_fpath(dpath, n_steps), "state", header, payload.getvalue())
    for old in saved(dpath)[:-keep_last]:
        _fpath(dpath, old).unlink(missing_ok=True)


@beartype.beartype
def load(dpath: pathlib.Path, n_steps: int) -> State:
    """Reads a state.

    Raises:
        UserError: it is cut, edited, or another run's.
    """
    fpath = _fpath(dpath, n_steps)
    header, payload = checkpoint.read(fpath, "state")
    if header.get("run") != dpath.name or header.get("n_steps") != n_steps:
        raise errors.UserError(
            f"{fpath}: is step {header.get('n_steps')} of run {header.get('run')}. Delete it; the run goes on from an older state."
        )
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises many types for a cut or foreign file
        raise errors.UserError(
            f"{fpath}: cannot be read ({errors.first_line(err)}). Delete it; the run goes on from an older state."
        ) from err


@beartype.beartype
def remove(dpath: pathlib.Path) -> None:
    """Removes all states (the run is finished), and files that a kill left half written."""
    for n_steps in saved(dpath):
        _fpath(dpath, n_steps).unlink(missing_ok=True)
    for fpath in dpath.glob(".*.tmp"):
        fpath.unlink(missing_ok=True)


@beartype.beartype
def starts(dpaths: list[pathlib.Path]) -> list[tuple[int, list[pathlib.Path]]]:
    """Divides runs of one stream into those that can go on together: (steps done, runs), each run in one.

    A run goes on from its newest state, or from an older one that another run of the group has no newer than (killed
    between two saves, some runs have one state more).
    """
    left = {dpath: saved(dpath) for dpath in dpaths}
    out = []
    while left:
        start = min(states[-1] if states else 0 for states in left.values())
        mine = [d for d, states in left.items() if (start in states) or not (start or states)]
        out.append((start, mine))
        left = {d: states for d, states in left.items() if d not in mine}
    return out
