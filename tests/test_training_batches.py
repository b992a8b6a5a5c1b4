"""A stream's batches, some of them ahead of time. B batch, D d_vit."""

import itertools

import numpy as np
import torch

from saev.data import shuffled
from saev.training import batches


def test_activations_that_are_read_ahead_come_again() -> None:
    numbers_B = np.zeros(2, np.int64)
    endless = (shuffled.Batch(torch.full((2, 3), float(i)), *[numbers_B] * 3) for i in itertools.count())
    stream = batches.Batches(endless)
    assert [stream.peek(n)[:, 0].tolist() for n in (4, 3, 5)] == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 1, 1, 2, 2],
    ]
    assert [next(stream)[0, 0].item() for _ in range(2)] == [0, 1]
    assert stream.peek(1)[:, 0].tolist() == [2, 2]
    assert [act_BD[0, 0].item() for act_BD in itertools.islice(stream, 3)] == [2, 3, 4]


def test_rates_are_of_the_time_since_the_last_ones(monkeypatch) -> None:
    now_s = itertools.count()  # each look at the clock takes a second
    monkeypatch.setattr(batches.time, "monotonic", lambda: float(next(now_s)))
    numbers_B = np.zeros(2, np.int64)
    stream = batches.Batches(iter([shuffled.Batch(torch.zeros(2, 3), *[numbers_B] * 3)] * 3))
    for n in (2, 1):  # start, 2 n looks, end: 2 n + 1 seconds, half of them in `next`
        for _ in range(n):
            next(stream)
        found = stream.rates(2)
        elapsed_s = 2 * n + 1
        assert found == {"tokens_per_s": 2 * n / elapsed_s, "loader_wait": n / elapsed_s}
