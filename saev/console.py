"""Prints results. A reader that stops early (`| head`) is not an error, a full disk is."""

import collections.abc
import contextlib
import dataclasses
import os
import select
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


def show(cfgs: collections.abc.Sequence[object]) -> None:
    """Prints configs, for --dry-run."""
    lines = [line for i, cfg in enumerate(cfgs, 1) for line in (f"# {i} of {len(cfgs)}", *_lines(cfg, ""))]
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
