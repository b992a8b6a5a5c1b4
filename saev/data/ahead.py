"""A thread that computes items ahead of their consumer and stops with it."""

import atexit
import collections.abc
import queue
import threading
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
    done: queue.SimpleQueue[tuple[str, tp.Any]] = queue.SimpleQueue()  # compiled, but without a bound:
    room: queue.SimpleQueue[None] = queue.SimpleQueue()  # an entry for each item that may still be put
    stopped = threading.Event()
    for _ in range(n):
        room.put(None)

    def work() -> None:
        try:
            for item in items:
                room.get()
                done.put(("item", item))
                del item  # free the memory for the consumer
                if stopped.is_set():
                    break
            done.put(("end", None))
        except BaseException as err:
            done.put(("error", err))

    thread = threading.Thread(target=work, name="saev-ahead", daemon=True)

    def close() -> None:
        stopped.set()
        room.put(None)  # it may be waiting for room
        thread.join(PATIENCE_S)
        if not thread.is_alive() and hasattr(items, "close"):
            items.close()

    thread.start()
    atexit.register(close)  # for an iterator that is never dropped
    try:
        while True:
            kind, got = done.get()
            room.put(None)
            if kind == "error":
                raise got
            if kind == "end":
                return
            yield got
            del got  # free the memory for the consumer
    finally:
        close()
        atexit.unregister(close)
