"""Stages for tests of the launcher: importable, because submitit pickles by name."""

import os
import pathlib
import signal
import time

from saev import errors


def square(x: int) -> int:
    return x * x


def refuse(x: int) -> int:
    raise errors.UserError(f"{x} is too large. Pass a smaller one.")


def crash(x: int) -> int:
    raise RuntimeError(f"bug at {x}")


def killed(x: int) -> None:
    """As by the kernel's out-of-memory killer, of which Slurm knows nothing."""
    os.kill(os.getpid(), signal.SIGKILL)


def second_task(how: str) -> str:
    """The second task dies, or refuses; the first is fine."""
    if os.environ["SLURM_PROCID"] == "1":
        killed(0) if how == "killed" else refuse(0)
    time.sleep(1)
    return how


def take_memory(n_bytes: int) -> None:
    taken = bytearray(n_bytes)
    time.sleep(120)
    del taken


def touch_later(fpath: str) -> str:
    """Notes its start, works for some seconds, notes its end."""
    pathlib.Path(fpath + ".started").touch()
    time.sleep(6)
    pathlib.Path(fpath).touch()
    return fpath


def wait_for_ever(fpath: str) -> None:
    pathlib.Path(fpath + ".started").touch()
    time.sleep(600)


def process(_: int) -> int:
    return os.getpid()


def variable(name: str) -> str:
    return os.environ[name]


def second_time_lucky(fpath: str) -> int:
    """The first run waits for a signal that never comes by itself; a requeued one returns."""
    runs = pathlib.Path(fpath)
    with runs.open("a") as fd:
        fd.write(os.environ["SLURM_ARRAY_JOB_ID"] + "\n")
    n_runs = len(runs.read_text().splitlines())
    if n_runs == 1:
        time.sleep(120)
    return n_runs


def sixty_seconds(fpath: str) -> int:
    """Works for 60 s in all, a byte of the file each, and continues where it was stopped. Returns the number of its starts."""
    done, starts = pathlib.Path(fpath), pathlib.Path(fpath + ".starts")
    with starts.open("a") as fd:
        fd.write(".")
    while not done.exists() or done.stat().st_size < 60:
        time.sleep(1)
        with done.open("a") as fd:
            fd.write(".")
    return starts.stat().st_size


def second_time(fpath: str) -> int:
    """The first run waits to be killed; a later one returns its number."""
    with pathlib.Path(fpath).open("a") as fd:
        fd.write("x")
    n_runs = len(pathlib.Path(fpath).read_text())
    if n_runs == 1:
        time.sleep(120)
    return n_runs


def execute(source: str) -> None:
    exec(source)


def half(xs: list[int]) -> list[int]:
    """Does the first; the second fails."""
    raise errors.UserError(f"{xs[1]} is too large.", done=xs[:1])


def write(fpath: str) -> str:
    """Needs a file beside it, NAME.allowed, where there is a NAME.guarded."""
    path = pathlib.Path(fpath)
    if path.with_suffix(".guarded").exists() and not path.with_suffix(".allowed").exists():
        raise errors.UserError(f"{path.name} is not allowed.")
    with path.open("a") as fd:
        fd.write("x")
    return fpath


def package(_: int) -> str:
    """Where saev was imported from."""
    import saev

    return str(saev.__file__)


def first(folder: str) -> str:
    """A step that others need."""
    return write(f"{folder}/first")


def second(folder: str) -> str:
    assert pathlib.Path(folder, "first").exists()
    return write(f"{folder}/second")
