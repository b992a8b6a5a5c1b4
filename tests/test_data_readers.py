"""Reads past the page cache against reads through it, and against the array that was written. N images, T tokens."""

import collections.abc
import errno
import itertools
import logging
import os
import pathlib
import threading
import typing as tp

import numpy as np
import pytest

from saev import errors, machine
from saev.data import activations, aio, config, moves, readers, shuffled
from saev.training import config as training_config
from saev.training import loop

Make = collections.abc.Callable[..., tuple[pathlib.Path, np.ndarray]]


@pytest.fixture
def made(make_shards: Make) -> Make:
    """Writes 23 images of 64 patches in shards whose length is no multiple of a page."""

    def make(**shape: tp.Any) -> tuple[pathlib.Path, np.ndarray]:
        usual = {"n_imgs": 23, "n_patches": 64, "d_vit": 99, "layers": (0, 3), "per_shard": 7}
        dpath, acts_NLTD = make_shards(**usual | shape)
        try:
            aio.check(activations.Activations(config.Shards(str(dpath))))
            aio.Buffer(aio.rows(1, moves.PAGE)).close()
        except OSError as err:
            pytest.skip(f"no direct reads here ({err})")
        return dpath, acts_NLTD

    return make


def stream(
    data: pathlib.Path | activations.Activations, direct: bool | None = True, **sizes: tp.Any
) -> shuffled.Shuffled:
    usual = {"batch_size": 300, "pool_bytes": 1_500_000}
    acts = config.Shards(str(data)) if isinstance(data, pathlib.Path) else data
    return shuffled.Shuffled(acts, direct=direct, **usual | sizes)


def taken(batches: collections.abc.Iterable[shuffled.Batch], n: int) -> list[list[object]]:
    """Activations and places of n batches."""
    return [[part.tolist() for part in batch] for batch in itertools.islice(batches, n)]


def in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, reads that are not direct fail."""

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(moves, "read", fail)
    monkeypatch.setattr(activations.Activations, "read_extents", fail)


def our_threads() -> list[str]:
    names = [t.name for t in threading.enumerate()]
    return [n for n in names if n.startswith("saev") and not n.startswith("saev-kernel")]


CASES: dict[str, tuple[dict[str, tp.Any], dict[str, tp.Any], config.Patches, int | tp.Literal["all"]]] = {
    "float32": ({}, {}, "image", 3),
    "layers and [CLS]": ({}, {}, "all", "all"),
    "[CLS] alone": ({}, {"batch_size": 7}, "cls", "all"),
    "float16": ({"dtype": "float16"}, {}, "image", 3),
    "bfloat16, kept": ({"dtype": "bfloat16"}, {"keep_half": True}, "image", 0),
    "short last blocks": ({"n_patches": 77, "d_vit": 1500}, {}, "image", 3),
    "tiny": ({"n_imgs": 2, "n_patches": 1, "d_vit": 1}, {"batch_size": 3, "pool_bytes": 1}, "image", 3),
    "one thread": ({}, {"n_threads": 1, "pool_bytes": 1}, "image", 3),
    "patches left out": ({}, {}, "all", "all"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_batches_are_the_same(made: Make, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """From the start and from the middle of an epoch, and as the array has them."""
    shape, sizes, patches, layer = CASES[case]
    dpath, acts_NLTD = made(**shape)
    acts = activations.Activations(config.Shards(str(dpath), layer, patches))
    if case == "patches left out":
        acts.is_kept_NT = np.random.default_rng(0).random((acts.n_imgs, acts.n_tokens)) < 0.4
    cached, direct = (stream(acts, is_direct, **sizes) for is_direct in (False, True))
    n = 2 * len(acts) // cached.batch_size + 1
    want = taken(cached, n)
    in_one_way(monkeypatch)
    assert taken(direct, n) == want
    assert taken(direct.batches(n // 3), n - n // 3) == want[n // 3 :]
    for batch in itertools.islice(direct, 2 if acts.dtype == "float32" else 0):
        layer_i_B = np.searchsorted((0, 3), batch.layer_B)
        want_BD = acts_NLTD[batch.image_i_B, layer_i_B, 1 + batch.patch_i_B]
        np.testing.assert_array_equal(batch.act_BD, want_BD)


# ---- faults ----


@pytest.mark.parametrize("fault", ["cut", "flipped", "gone"])
def test_the_error_is_the_same(made: Make, fault: str) -> None:
    said = []
    dpath, _ = made()
    fpath = dpath / "acts000001.bin"
    data = bytearray(fpath.read_bytes())
    data[-5000] ^= 4
    if fault == "gone":
        fpath.unlink()
    else:
        fpath.write_bytes(data if fault == "flipped" else data[:150_001])
    for direct in (False, True):
        with pytest.raises(errors.UserError, match=r"acts000001\.bin") as err:
            taken(stream(dpath, direct, n_threads=1), 30)
        said.append(str(err.value))
    assert said[0] == said[1] and "\n" not in said[0]


def test_blocks_without_an_answer_are_read_as_usual(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes only some of the requests, or reads less than asked."""
    dpath, _ = made()
    want = taken(stream(dpath, False), 9)
    submit, receive = moves.submit, moves.receive

    def half(aio_: object, context: int, file_G2: np.ndarray, *args: tp.Any) -> int:
        *others, where_G = args
        n = len(file_G2) // 2
        return submit(aio_, context, file_G2[:n], others[0][:n], *others[1:], where_G)

    with monkeypatch.context() as changed:
        changed.setattr(moves, "submit", half)
        assert taken(stream(dpath), 9) == want

    def short(aio_: object, context: int, *args: tp.Any) -> int:
        n = submit(aio_, context, *args)
        file_G2, request_G8 = args[0], args[5]
        assert n == len(file_G2) and (request_G8[:n, 4] % moves.PAGE == 0).all()
        return n

    def early(c: object, aio_: object, context: int, n: int, *args: tp.Any) -> int:
        return n - 1 + receive(c, aio_, context, 1, *args)  # as after a signal

    in_one_way(monkeypatch)
    monkeypatch.setattr(moves, "submit", short)
    monkeypatch.setattr(moves, "receive", early)
    assert taken(stream(dpath), 9) == want


def no_open(fpath: object, flags: int, *args: object, real: tp.Any = os.open) -> int:
    if flags & aio.FLAG:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real(fpath, flags, *args)


@pytest.mark.parametrize(
    ("owner", "name", "value", "why"),
    [
        (os, "open", no_open, "Invalid argument"),
        (moves, "AIO", (moves.AIO[0], -1, -1, -1, -1), "Function not implemented"),
        (aio, "FLAG", 0, "not on this system"),
    ],
)
def test_without_direct_reads_it_is_as_usual(
    made: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: object,
    name: str,
    value: object,
    why: str,
) -> None:
    dpath, _ = made()
    want = taken(stream(dpath, False), 9)
    monkeypatch.setattr(owner, name, value)
    with caplog.at_level(logging.INFO, "saev"):
        for _ in range(2):
            assert taken(stream(dpath), 9) == want
    (line,) = caplog.messages
    assert line.startswith(f"{dpath}: read through the page cache") and why in line


def test_as_many_requests_as_no_system_allows() -> None:
    with pytest.raises(OSError):
        aio.Buffer(aio.rows(2**20, 1))


# ---- the end, and memory ----


def test_reads_in_flight_end_with_their_consumer(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dpath, _ = made(n_imgs=60)
    buffers: list[aio.Buffer] = []
    monkeypatch.setattr(aio.Buffer, "submit", noting(aio.Buffer.submit, buffers))
    for stop in (None, ValueError, KeyboardInterrupt):
        buffers.clear()
        with pytest.raises(stop or StopIteration):
            for _ in stream(dpath, pool_bytes=300_000):
                raise stop or StopIteration
        assert buffers and not any(buffer.close.alive for buffer in buffers)
        assert not our_threads()
        with pytest.raises(OSError, match="Invalid argument"):  # the kernel knows it no more
            aio._system(moves.AIO[2], buffers[0].context)


def noting(submit: tp.Any, buffers: list[aio.Buffer]) -> tp.Any:
    def submit_and_note(buffer: aio.Buffer, *args: tp.Any) -> None:
        buffers.append(buffer)
        submit(buffer, *args)

    return submit_and_note


def test_a_buffer_that_is_dropped_waits_for_the_kernel(made: Make) -> None:
    dpath, _ = made()
    acts = activations.Activations(config.Shards(str(dpath))).advised(0, aio.FLAG)
    at_G3 = acts.located(np.arange(5) * acts.n_per_img)
    _, file_G2 = acts.files(at_G3)
    buffer = aio.Buffer(aio.rows(5, aio.row_bytes(acts.n_per_img * acts.token_bytes)))
    run_G2 = np.stack([at_G3[:, 2], np.full(5, acts.n_per_img)], axis=1)
    buffer.submit(file_G2, run_G2, acts.pieces.start_n, acts.token_bytes)
    assert buffer.n_asked == 5
    close, context = buffer.close, buffer.context
    del buffer
    assert not close.alive
    with pytest.raises(OSError, match="Invalid argument"):
        aio._system(moves.AIO[2], context)


@pytest.mark.parametrize("n_threads", [1, 2, 4])
@pytest.mark.parametrize("pool_bytes", [4 * 10**6, 3 * 10**7, 10**9])
def test_buffers_fit_into_the_memory_for_reads(made: Make, pool_bytes: int, n_threads: int) -> None:
    dpath, _ = made()
    acts = activations.Activations(config.Shards(str(dpath)))
    reader = readers.Direct(acts, n_threads, pool_bytes // 8, 13_000)
    total = sum(buffer.staging_GR.nbytes for buffer in reader.buffers)
    most = (1 + readers.ANNOUNCED) * n_threads
    assert total <= pool_bytes // 8 and 2 * n_threads <= len(reader.buffers) <= most
    assert total > pool_bytes // 16 or len(reader.buffers) == most
    reader.close()


# ---- when ----


def test_what_memory_cannot_hold_is_read_directly(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dpath, acts_NLTD = made()
    n_bytes = acts_NLTD[:, :1, 1:].nbytes
    for spare, want in ((0, False), (-1, True)):
        monkeypatch.setattr(machine, "free_bytes", lambda spare=spare: n_bytes + 1_500_000 + spare)
        assert stream(dpath, None).direct == want
        assert stream(dpath, not want).direct != want
    for n, want in ((1, True), (2, False)):  # processes of a node share what they read
        cfg = training_config.Train(data_parallel=n, pool_gb=0.0015)
        acts = activations.Activations(config.Shards(str(dpath)))
        assert loop._stream(cfg, acts).direct == want
