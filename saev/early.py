"""What a command does before it imports anything that takes time: it answers Ctrl-C, and opens streams that are closed.

Python itself needs some 20 ms to reach the first line of a program; a Ctrl-C in these is Python's to answer.
"""

import codecs
import collections.abc
import contextlib
import os
import signal
import sys
import threading

INTERRUPTED = "interrupted; run the same command again to go on."
_is_installed = False


def install() -> None:
    """To be called by a command's first lines, not on import: a notebook's Ctrl-C is its own."""
    global _is_installed
    _is_installed = True
    limit_spinning()
    ctrl_c_ends()
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:  # else the next file that is opened, such as a shard, gets this number and what is printed to it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", closefd=False))
    try:
        os.getcwd()  # noqa: PTH109 (pathlib takes time)
    except OSError:  # torch's libraries end the process without a word
        print("error: the working folder has been removed. Change to another one.", file=sys.stderr)
        sys.exit(2)
    codecs.register_error("saev", _bytes)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="saev")


def limit_spinning() -> None:
    """To be called before torch is imported, which is when OpenMP reads it.

    OpenMP's threads look for their next work for so many rounds (a tenth of a millisecond or so) before they sleep. By
    default they spin ten milliseconds and more, on cores that our own threads then lack.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def ctrl_c_ends() -> None:
    """Ctrl-C ends the process at once, in one line: while modules are imported, KeyboardInterrupt would be lost in C code.

    A handler that somebody else has set (nohup's, a notebook's) stays.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def ctrl_c_raises() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def importing() -> collections.abc.Generator[None]:
    """While a command imports what takes seconds (torch), Ctrl-C ends it at once; else KeyboardInterrupt."""
    is_ours = _is_installed and threading.current_thread() is threading.main_thread()
    if is_ours:
        ctrl_c_ends()
    try:
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
    """What the terminal's encoding lacks is printed as UTF-8, and a file's name that is not UTF-8 as it is: a script can use it."""
    if not isinstance(err, UnicodeEncodeError):
        raise err
    return b"".join(map(_utf8, err.object[err.start : err.end])), err.end


def _utf8(char: str) -> bytes:
    is_half = "\ud800" <= char <= "\udfff" and not "\udc80" <= char <= "\udcff"
    return char.encode("utf-8", "backslashreplace" if is_half else "surrogateescape")
