"""A command in this process: the same output and exit code, without the seconds that a new process imports for."""

import contextlib
import io
import logging
import pathlib
import runpy
import signal
import sys
import typing as tp

import pytest

from saev import early

ROOT = pathlib.Path(__file__).parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Done(tp.NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*args: object) -> Done:
    """Runs `python ARGS` ("train.py", ... or "-m", "saev.data", ...) in the repository's root. Leaves this process as it was."""
    words = [str(arg) for arg in args]
    out, err = io.StringIO(), io.StringIO()
    root, saev = logging.getLogger(), logging.getLogger("saev")
    handlers, level, signals = root.handlers[:], saev.level, [signal.getsignal(s) for s in SIGNALS]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(early, "_is_installed", False)
        patch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        root.handlers = []
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                if words[0] == "-m":
                    if not hasattr(sys.modules.get(words[1]), "__path__"):
                        patch.delitem(sys.modules, words[1], raising=False)  # runpy warns of it
                    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(words[0], run_name="__main__")
            code: object = 0
        except SystemExit as end:
            code = end.code
        finally:
            root.handlers = handlers
            saev.setLevel(level)
            for signum, handler in zip(SIGNALS, signals, strict=True):
                signal.signal(signum, handler)
    return Done(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())
