"""A thread that computes items ahead of their consumer and stops with it."""

import atexit
import collections.abc
import contextlib
import queue
import threading
import time
import typing as tp

T = tp.TypeVar("T")

PATIENCE_S = 5.0
"""Seconds to wait for a thread stuck in a read before abandoning it. As a daemon it does not block exit."""


def ahead(items: collections.abc.Iterator[T], n: int) -> collections.abc.Generator[T]:
    """Yields from `items`, which a separate thread computes up to `n` items ahead.

    Errors of `items` are raised here. When the consumer stops (break, an exception, Ctrl-C, or garbage
    collection of this iterator), the thread finishes its current item, and `items` is closed. The thread
    starts with the first `next`, so the iterator may be created before a fork.
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
    atexit.register(close)  # for an iterator that is never dropped
    try:
        while True:
            kind, got = done.get()
            if kind == "error":
                raise got
            if kind == "end":
                return
            yield got
            del got  # free the memory for the consumer
    finally:
        close()
        atexit.unregister(close)
