"""Prepares a process before slow imports: handles Ctrl-C, and opens closed standard streams.

Python needs about 20 ms to reach a program's first line. A Ctrl-C in that time is left to Python.
"""

import atexit
import codecs
import collections.abc
import contextlib
import gc
import os
import signal
import sys
import threading

INTERRUPTED = "interrupted; run the same command again to continue."
_is_installed = False


def install() -> None:
    """Call this in a command's first lines. It does not run on import, so notebooks keep their own Ctrl-C."""
    global _is_installed
    _is_installed = True
    limit_spinning()
    end_at_once()
    ctrl_c_ends()
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:  # else the next opened file, such as a shard, would get this number and the output
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", closefd=False))
    try:
        os.getcwd()  # noqa: PTH109 (pathlib takes time)
    except OSError:  # torch's libraries would end the process silently
        print("error: the working folder has been removed. Change to another one.", file=sys.stderr)
        sys.exit(2)
    codecs.register_error("saev", _bytes)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="saev")


def limit_spinning() -> None:
    """Makes OpenMP's threads sleep after about 0.1 ms without work. Call it before torch is imported.

    By default they spin for 10 ms and more, on cores that saev's own threads need.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def end_at_once() -> None:
    """Lets the process end without Python's last search for garbage, which takes up to a second after large
    imports."""
    atexit.register(_leave_garbage)


def _leave_garbage() -> None:
    if "triton" in sys.modules:  # it would list its objects as leaked
        gc.unfreeze()
    else:
        gc.freeze()


def ctrl_c_ends() -> None:
    """Lets Ctrl-C end the process at once, with one line. C code in imports could swallow KeyboardInterrupt.

    Keeps a handler that something else has set (nohup, a notebook).
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def ctrl_c_raises() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def without_gc() -> collections.abc.Generator[None]:
    """Inside, Python does not search for garbage, which takes up to a quarter of an import's time.

    Later searches leave out all objects that there are at the end.
    """
    is_on = gc.isenabled()
    gc.collect()  # what an earlier stage has left would stay for ever
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if is_on:
            gc.enable()


@contextlib.contextmanager
def importing() -> collections.abc.Generator[None]:
    """As `without_gc`, for slow modules such as torch. Inside, Ctrl-C ends a command at once."""
    is_ours = _is_installed and threading.current_thread() is threading.main_thread()
    if is_ours:
        ctrl_c_ends()
    try:
        with without_gc():
            yield
    finally:
        if is_ours:
            ctrl_c_raises()


def _end(signum: int, frame: object) -> None:
    try:
        os.write(2, f"{INTERRUPTED}\n".encode())
    finally:
        os._exit(130)


def _bytes(err: UnicodeError) -> tuple[bytes, int]:
    """Prints characters that the terminal's encoding lacks as UTF-8, and bytes of file names unchanged."""
    if not isinstance(err, UnicodeEncodeError):
        raise err
    return b"".join(map(_utf8, err.object[err.start : err.end])), err.end


def _utf8(char: str) -> bytes:
    is_half = "\ud800" <= char <= "\udfff" and not "\udc80" <= char <= "\udcff"
    return char.encode("utf-8", "backslashreplace" if is_half else "surrogateescape")
