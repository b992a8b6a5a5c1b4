"""Prints results. A reader that stops early (`| head`) is not an error, a full disk is."""

import collections.abc
import contextlib
import dataclasses
import os
import select
import shutil
import sys
import typing as tp

from saev import errors


def say(text: str) -> None:
    """Prints a result.

    Raises:
        UserError: the disk is full.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard()
    except OSError as err:
        raise _not_written(err) from err


def tell(line: str) -> None:
    """Prints to stderr, and ignores errors: it may be closed."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def show(cfgs: collections.abc.Sequence[object], jobs: collections.abc.Sized = ()) -> None:
    """Prints configs, and how many Slurm jobs they would be, for --dry-run."""
    lines = [f"# {len(cfgs)} config(s) in {len(jobs)} Slurm job(s)"] if jobs else []
    lines += [line for i, cfg in enumerate(cfgs, 1) for line in (f"# {i} of {len(cfgs)}", *_lines(cfg, ""))]
    say("\n".join(lines))


def _lines(cfg: object, prefix: str) -> collections.abc.Iterator[str]:
    for field in dataclasses.fields(tp.cast(tp.Any, cfg)):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            yield f"{prefix}{field.name}: {type(value).__name__}"
            yield from _lines(value, prefix + "    ")
        else:
            yield f"{prefix}{field.name} = {value!r}"


@contextlib.contextmanager
def flushed() -> collections.abc.Generator[None]:
    """Flushes stdout at the end. Raises as `say`."""
    try:
        yield
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):  # another pipe broke
            raise
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _discard()
        except OSError as err:
            raise _not_written(err) from err


def _not_written(err: OSError) -> errors.UserError:
    _discard()
    return errors.UserError(
        f"standard output: {err.strerror}. Free some space, then run the same command again."
    )


def _discard() -> None:
    """Redirects stdout to nowhere. Python would otherwise retry at exit, and print an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Live:
    """Lines on a terminal's stderr that are replaced when shown again. Elsewhere it shows nothing."""

    def __init__(self) -> None:
        self.is_on = sys.stderr is not None and sys.stderr.isatty()
        self._n_lines = 0

    def show(self, lines: list[str]) -> None:
        """Replaces the lines."""
        if self.is_on:
            self.clear()
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be replaced
            for line in lines:
                tell(line[:width])
            self._n_lines = len(lines)

    def clear(self) -> None:
        """Removes the lines. Call it before other output."""
        if self._n_lines:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"\x1b[{self._n_lines}F\x1b[J")
                sys.stderr.flush()
            self._n_lines = 0
