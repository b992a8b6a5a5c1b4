"""What the benchmarks share: timing, a cold page cache, and the lines that they end with."""

import collections.abc
import json
import os
import pathlib
import statistics
import time

import torch

BUFFER = 2**24
"""Bytes of products that are kept at a time."""

Case = dict[str, object]


def seconds(call: collections.abc.Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def cpu_seconds(call: collections.abc.Callable[[], object]) -> float:
    """Processor time of one call, over all threads. Other programs change it little."""
    start_s = time.process_time()
    call()
    return time.process_time() - start_s


def interleaved(
    calls: dict[str, collections.abc.Callable[[], float]], n_repeats: int
) -> dict[str, list[float]]:
    """Each call's figures; the calls take turns, so that a slow spell of the machine hits all of them.

    Each round begins with another one: whoever comes first may pay for something that the others find done.
    """
    out: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(n_repeats):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            out[name].append(calls[name]())
    return out


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the repeats' own ratios: each pair was timed one after the other."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def products(x_BD: torch.Tensor, w_KD: torch.Tensor) -> None:
    """All products of rows of x with rows of w, float32: written over each other in a small buffer, which is the fastest way to them."""
    n_rows = max(256, BUFFER // (4 * len(w_KD)))
    out = torch.empty(n_rows, len(w_KD))
    for part_bD in x_BD.split(n_rows):
        torch.mm(part_bD, w_KD.T, out=out[: len(part_bD)])


def drop_page_cache(fpaths: list[pathlib.Path]) -> None:
    """Takes files out of the page cache; needs no privilege."""
    for fpath in fpaths:
        fd = os.open(fpath, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def report(cases: list[Case]) -> None:
    """A table, then one JSON object a line."""
    print(f"\n{'case':44}{'ratio':>8}  to")
    for case in cases:
        print(f"{case['name']:44}{case['ratio']:8.3f}  {case['reference']}")
    print()
    for case in cases:
        print(json.dumps(case))
