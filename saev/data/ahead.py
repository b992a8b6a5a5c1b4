"""One thread that works ahead of its consumer, and ends with it."""

import atexit
import collections.abc
import contextlib
import queue
import threading
import time
import typing as tp

T = tp.TypeVar("T")

PATIENCE_S = 5.0
"""So long is waited for a thread that hangs in a read; then it is left behind (it does not keep the process alive)."""


def ahead(items: collections.abc.Iterator[T], n: int) -> collections.abc.Iterator[T]:
    """Yields from `items`, which a thread of its own computes, up to `n` ahead.

    What `items` raises is raised here. When the consumer stops (break, an exception, Ctrl-C, or this iterator is
    dropped), the thread finishes the item that it is at and ends; then `items` is closed. Nothing is started
    before the first item is asked for, so the iterator may be made before a fork.
    """
    done: queue.Queue[tuple[str, tp.Any]] = queue.Queue(n)
    stopped = threading.Event()

    def work() -> None:
        try:
            for item in items:
                done.put(("item", item))
                if stopped.is_set():
                    break
            done.put(("end", None))
        except BaseException as err:
            done.put(("error", err))

    thread = threading.Thread(target=work, name="saev-ahead", daemon=True)

    def close() -> None:
        stopped.set()
        give_up_s = time.monotonic() + PATIENCE_S
        while thread.is_alive() and time.monotonic() < give_up_s:
            with contextlib.suppress(queue.Empty):
                done.get(timeout=0.02)  # it may be waiting for room in the queue
        if not thread.is_alive() and hasattr(items, "close"):
            items.close()

    thread.start()
    atexit.register(close)  # of an iterator that is never dropped
    try:
        while (got := done.get())[0] == "item":
            yield got[1]
            del got  # the consumer may need the memory
        if got[0] == "error":
            raise got[1]
    finally:
        close()
        atexit.unregister(close)
