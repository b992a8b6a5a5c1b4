"""Runs a command or job: errors become one line, signals end it, and the exit code says what happened."""

import collections.abc
import contextlib
import logging
import signal
import sys
import threading
import typing as tp

from saev import console, early, errors


def entry(main: collections.abc.Callable[[], object]) -> tp.NoReturn:
    """Runs a command's main function.

    A UserError, or an OSError that the user can fix (no permission, a full disk), becomes one line and exit
    code 2. Ctrl-C becomes exit code 130.
    """
    early.install()
    configure_logging()
    code = 0
    try:
        early.ctrl_c_raises()
        with ended_by_signals(), errors.of_files(), console.flushed():
            main()
    except errors.UserError as err:
        code = 2
        console.tell(f"error: {err}")
    except KeyboardInterrupt:
        code = 130
        console.tell(early.INTERRUPTED)
    finally:
        early.ctrl_c_ends()  # from here on, Python only cleans up
    sys.exit(code)


def configure_logging() -> None:
    """Shows saev's messages from INFO, other libraries' from WARNING."""
    logging.basicConfig(level=logging.WARNING, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("saev").setLevel(logging.INFO)


@contextlib.contextmanager
def ended_by_signals() -> collections.abc.Generator[None]:
    """Turns SIGTERM and SIGUSR2 into SystemExit, so that children end and temporary files are removed."""

    def end(signum: int, frame: object) -> tp.NoReturn:
        raise SystemExit(128 + signum)

    is_main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGTERM, signal.SIGUSR2) if is_main else ()
    previous = {signum: signal.signal(signum, end) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
