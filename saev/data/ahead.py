"""Threads that compute items ahead of their consumer and stop with it."""

import atexit
import collections
import collections.abc
import functools
import queue
import threading
import time
import typing as tp

T = tp.TypeVar("T")

PATIENCE_S = 5.0
"""Seconds to wait for threads stuck in a read before abandoning them. As daemons they do not block exit."""


class Task(tp.Generic[T]):
    """A call that a thread makes later."""

    def __init__(self, call: collections.abc.Callable[..., T], *args: tp.Any):
        self.call = functools.partial(call, *args)
        self.ended = threading.Lock()
        self.ended.acquire()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self.call()
        except BaseException as err:
            self.error = err
        del self.call  # free what it refers to
        self.ended.release()

    def wait(self) -> None:
        with self.ended:
            pass

    def is_over(self) -> bool:
        return not self.ended.locked()

    def result(self) -> T:
        """Waits for the call. Returns what it returned, or raises its error."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self.value


Tasks = collections.deque[tp.Any]
"""Of `Task`. Not said to Python: a check of types would go through the items while threads change them."""


def run_first(tasks: Tasks) -> bool:
    """Runs the first task, if there is one. Returns whether there was."""
    try:
        task = tasks.popleft()
    except IndexError:  # another thread may just have taken it
        return False
    task.run()
    return True


def ahead(
    items: collections.abc.Iterator[T], n: int, n_threads: int = 1, tasks: Tasks | None = None
) -> collections.abc.Generator[T]:
    """Yields from `items`, which separate threads compute up to `n` items ahead.

    Errors of `items` are raised here. When the consumer stops (break, an exception, Ctrl-C, or garbage
    collection of this iterator), the threads finish what they are doing, and `items` is closed. The threads
    start with the first `next`, so the iterator may be created before a fork.

    Args:
        n_threads: they take turns at computing items.
        tasks: what computing an item leaves to the threads. They run tasks in this order, and compute the
            next item when there are few left.
    """
    tasks = collections.deque() if tasks is None else tasks
    done: queue.SimpleQueue[tuple[str, tp.Any]] = queue.SimpleQueue()  # compiled, but without a bound:
    room: queue.SimpleQueue[None] = queue.SimpleQueue()  # an entry for each item that may still be computed
    turn = threading.Lock()
    stopped = threading.Event()
    for _ in range(n + 1):
        room.put(None)

    def compute() -> None:
        """The next item, if there is room for it."""
        try:
            room.get(block=not tasks)
        except queue.Empty:
            return
        if stopped.is_set():
            return
        try:
            done.put(("item", next(items)))
        except BaseException as err:
            done.put(("end", None) if isinstance(err, StopIteration) else ("error", err))

    def work() -> None:
        while not stopped.is_set():
            if len(tasks) < n_threads and turn.acquire(blocking=not tasks):
                compute()
                turn.release()
            run_first(tasks)

    threads = [threading.Thread(target=work, name="saev-ahead", daemon=True) for _ in range(n_threads)]

    def close() -> None:
        if stopped.is_set():  # at exit
            return
        stopped.set()
        for _ in threads:
            room.put(None)  # one may be waiting for room
        end_s = time.monotonic() + PATIENCE_S
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        if not any(thread.is_alive() for thread in threads) and hasattr(items, "close"):
            items.close()

    for thread in threads:
        thread.start()
    atexit.register(close)  # for an iterator that is never dropped
    unregister = atexit.unregister  # when it is dropped after that, modules are empty
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
        unregister(close)
