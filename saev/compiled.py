"""Compiled CPU kernels: how they are compiled (numba) and run in threads. They release Python's lock."""

import collections.abc
import concurrent.futures
import functools
import inspect
import os
import threading
import typing as tp

import numba
import torch

T = tp.TypeVar("T")


def jit(function, **options):
    """Compiles a function for each dtype that it is called with.

    It is unwrapped first, because numba cannot compile the wrappers of a test's import hook.
    """
    return numba.njit(nogil=True, cache=True, **options)(inspect.unwrap(function))


def jit_sums(function):
    """Compiles a function that sums in any order."""
    return jit(function, fastmath={"reassoc", "contract", "nsz"})


@functools.cache
def _pool(n_threads: int, pid: int) -> concurrent.futures.ThreadPoolExecutor:
    """A pool in whose threads each torch operation uses one thread."""
    pool = concurrent.futures.ThreadPoolExecutor(n_threads, "saev-kernel")
    started = threading.Barrier(n_threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    for _ in range(n_threads):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(n_threads)  # for this thread, and those that start later
    return pool


def each_in_threads(call: collections.abc.Callable[[tp.Any], T], items: list) -> list[T]:
    """Calls `call` on each item in as many threads as torch uses. Returns the results in order."""
    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(items) < 2:
        return [call(item) for item in items]
    pool = _pool(n_threads, os.getpid())  # a forked process needs its own
    return list(pool.map(call, items))


def in_threads(kernel: collections.abc.Callable[[int, int], T], n: int) -> list[T]:
    """Calls `kernel(start, end)` on one part of range(n) per thread. Returns the results in order."""
    n_threads = max(1, min(torch.get_num_threads(), n))
    ends = [n * i // n_threads for i in range(n_threads + 1)]
    return each_in_threads(lambda i: kernel(ends[i], ends[i + 1]), list(range(n_threads)))
