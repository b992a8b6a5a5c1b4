"""Loaders under faults, across processes, over several directories, and on the field's other protocols. N images, D d_vit."""

import collections
import collections.abc
import errno
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import saev
from saev import errors
from saev.data import activations, config, extents, mixing, moves, ordered, shuffled
from saev.data.ahead import Task, ahead

GOLDEN = pathlib.Path(__file__).parent / "data" / "shards_1_0_0"
GOLDEN_NLTD = np.arange(5 * 2 * 5 * 8, dtype=np.float32).reshape(5, 2, 5, 8) / 8

Stream = collections.abc.Iterable[object]
NO_C = (0, 0, 0, 0, 0)
"""moves.C where there are no C functions: everything is read by `os.preadv`."""


@pytest.fixture
def many(make_shards) -> tuple[config.Shards, np.ndarray]:
    """60 images in 30 shards: more than any loader reads ahead."""
    dpath, acts_NLTD = make_shards(n_imgs=60, n_patches=4, d_vit=6, layers=(3, 7), per_shard=2)
    return config.Shards(str(dpath), 7), acts_NLTD


def streams(cfg: config.Shards) -> list[Stream]:
    small = {"batch_size": 8, "pool_bytes": 1}
    return [ordered.Ordered(cfg, n_imgs=2), shuffled.Shuffled(cfg, **small)]


def our_threads() -> list[str]:
    """Threads of loaders; those of the kernels live as long as the process."""
    names = [t.name for t in threading.enumerate()]
    return [n for n in names if n.startswith("saev") and not n.startswith("saev-kernel")]


def test_a_subset_is_a_stream_of_its_own(many) -> None:
    cfg, acts_NLTD = many
    image_is = (3, 4, 30, 31, 59)
    whole = activations.Activations(cfg)
    some = whole.only(image_is)
    read = list(ordered.Ordered(some, n_imgs=2))
    assert np.concatenate([b.image_i_N for b in read]).tolist() == list(image_is)
    got_NPD = np.concatenate([b.act_NXD for b in read])
    np.testing.assert_array_equal(got_NPD, acts_NLTD[list(image_is), 1, 1:])
    assert len(some) == 5 * 4
    positions = [list(r) for r in some.shard_positions() if r]
    assert positions == [[0], [1], [2, 3], [4]]  # images 3; 4; 30 and 31; 59
    others = [whole, whole.only(image_is[1:]), some.only(image_is[1:])]
    assert some.fingerprint not in [other.fingerprint for other in others]


# ---- faults ----


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("fault", ["cut", "gone", "io"])
def test_a_failing_read_is_one_error_within_seconds(
    many, monkeypatch: pytest.MonkeyPatch, which: int, fault: str
) -> None:
    cfg, _ = many
    stream = iter(streams(cfg)[which])
    next(stream)
    if fault == "io":

        def fail(*_: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", fail)
        monkeypatch.setattr(moves, "C", NO_C)
    for fpath in pathlib.Path(cfg.shard_root).glob("acts*.bin"):
        os.truncate(fpath, 100) if fault == "cut" else fpath.unlink() if fault == "gone" else None
    start_s = time.monotonic()
    match = {"cut": "ends at byte", "gone": "No such file", "io": "Input/output error"}[fault]
    with pytest.raises(errors.UserError, match=rf"acts0000\d\d\.bin.*{match}"):
        for _ in range(1000):
            next(stream)
    assert time.monotonic() - start_s < 5
    while our_threads():  # they end by themselves
        assert time.monotonic() - start_s < 10, our_threads()
        time.sleep(0.01)


def test_threads_end_with_their_consumer(many) -> None:
    cfg, _ = many
    for stream in streams(cfg):
        for _ in stream:
            assert our_threads()
            break
        assert not our_threads(), "after a break"
        for stop in (ValueError, KeyboardInterrupt):
            with pytest.raises(stop):
                for _ in stream:
                    raise stop
            assert not our_threads(), stop
        iterator = iter(stream)
        assert not our_threads(), "nothing is started before it is needed"
        next(iterator)
        del iterator
        assert not our_threads(), "when the iterator is dropped"


def test_what_the_thread_raises_is_raised_and_in_its_turn() -> None:
    def items() -> collections.abc.Iterator[int]:
        yield from (1, 2)
        raise ValueError("third")

    stream = ahead(items(), 5)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(stream)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_items_leave_tasks_to_the_threads(n_threads: int) -> None:
    """Each task runs once, before the items that wait for it, and the items keep their order."""
    tasks: collections.deque[Task[int]] = collections.deque()
    ran: list[int] = []

    def items() -> collections.abc.Iterator[list[Task[int]]]:
        for i in range(0, 300, 3):
            made = [Task(lambda j: ran.append(j) or j * j, j) for j in range(i, i + 3)]
            tasks.extend(made)
            yield made
        raise ValueError("the end")

    stream = ahead(items(), 2, n_threads, tasks)
    got = [task.result() for _ in range(100) for task in next(stream)]
    assert got == [j * j for j in range(300)] and sorted(ran) == list(range(300))
    with pytest.raises(ValueError, match="the end"):
        next(stream)
    assert not our_threads()


def test_what_a_task_raises_is_its_result() -> None:
    task = Task(int, "x")
    assert not task.is_over()
    task.run()
    assert task.is_over()
    for _ in range(2):
        with pytest.raises(ValueError, match="x"):
            task.result()


def test_tasks_left_over_end_with_the_consumer() -> None:
    """A task may wait for those before it. None is left out between one that runs and those."""
    for _ in range(30):
        tasks: collections.deque[Task[None]] = collections.deque()

        def items(tasks: collections.deque[Task[None]] = tasks) -> collections.abc.Iterator[int]:
            for i in itertools.count():
                first = Task(time.sleep, 0.001)
                tasks.extend([first, Task(first.result), Task(time.sleep, 0.001)])
                yield i

        start_s = time.monotonic()
        for i in ahead(items(), 2, 3, tasks):
            if i == 5:
                break
        assert time.monotonic() - start_s < 3 and not our_threads()


def test_a_thread_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saev.data.ahead.PATIENCE_S", 0.2)
    release = threading.Event()

    def items() -> collections.abc.Iterator[int]:
        yield 1
        release.wait(30)

    start_s = time.monotonic()
    for _ in ahead(items(), 1):
        break
    assert time.monotonic() - start_s < 5
    release.set()


# ---- processes ----


def consume(streams: list[Stream], indexed: object) -> None:
    """In a child: two epochs of each, and the right sum."""
    loaded, mixed = streams
    total = sum(float(block.act_NXD.sum(dtype=np.float64)) for block in loaded)
    batches = itertools.islice(mixed, 60)
    twice = sum(float(batch.act_BD.double().sum()) for batch in batches)
    assert abs(2 * total - twice) < 1e-6 and len(indexed) == 240
    torch.ones(300, 300) @ torch.ones(300, 300)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loaders_work_in_a_child_after_openmp_in_the_parent(many, method: str) -> None:
    cfg, _ = many
    torch.ones(500, 500).matmul(torch.ones(500, 500)).sum()
    loaders = streams(cfg)
    for stream in loaders:
        next(iter(stream))  # the parent has files open, too
    acts = saev.data.Indexed(cfg.shard_root, 7)
    _ = acts[3]
    context = multiprocessing.get_context(method)
    child = context.Process(
        target=_consume_without_torch if method == "fork" else consume, args=(loaders, acts)
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _consume_without_torch(streams: list[Stream], indexed: object) -> None:
    """A forked child cannot use OpenMP (libgomp's limit, not ours); our loaders do not."""
    loaded, mixed = streams
    total = sum(float(block.act_NXD.sum(dtype=np.float64)) for block in loaded)
    batches = itertools.islice(mixed, 60)
    twice = sum(float(batch.act_BD.numpy().sum(dtype=np.float64)) for batch in batches)
    os._exit(0 if abs(2 * total - twice) < 1e-6 and len(indexed) == 240 else 1)


# ---- the plan ----


def index(batch: shuffled.Batch) -> list[tuple[int, int, int]]:
    return list(zip(batch.image_i_B, batch.layer_B, batch.patch_i_B, strict=True))


@pytest.mark.parametrize("pool_bytes", [1, 12_000, 1 << 20])
def test_the_sequence_does_not_depend_on_the_threads(many, pool_bytes: int) -> None:
    cfg, _ = many
    runs = []
    for n_threads in (1, 2, 7):
        stream = shuffled.Shuffled(cfg, batch_size=7, pool_bytes=pool_bytes, n_threads=n_threads)
        runs.append([(index(b), b.act_BD.tolist()) for b in itertools.islice(stream, 80)])
    assert runs[0] == runs[1] == runs[2]


@hypothesis.settings(
    deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_a_plan_delivers_each_activation_once_and_starts_anywhere(
    monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    n_imgs, per_shard = draw(1, 40), draw(1, 12)
    layout = mixing.Layout.of(
        [range(a, min(a + per_shard, n_imgs)) for a in range(0, n_imgs, per_shard)],
        n_layers=draw(1, 3),
        n_tokens=draw(1, 9),
        token_bytes=data.draw(st.sampled_from([32, 16_384, 65_536])),
        batch_size=draw(1, 80),
        n_fit=draw(0, 300),
    )
    monkeypatch.setattr(mixing, "GROUP_SHARDS", data.draw(st.sampled_from([1, 2, 512])))
    n_batches = 3 * layout.n_acts // layout.batch_size + 1

    def batches(start: int) -> list[list[int]]:
        plan = mixing.Plan(layout, 5, start)
        return [
            np.concatenate([part_n2[:, 0] for part_n2 in plan.draw(plan.without_slots)]).tolist()
            for _ in range(start, n_batches)
        ]

    whole = batches(0)
    assert {len(batch) for batch in whole} == {layout.batch_size}
    flat = list(itertools.chain(*whole))
    for epoch in range(len(flat) // layout.n_acts):
        part = flat[epoch * layout.n_acts : (epoch + 1) * layout.n_acts]
        assert sorted(part) == list(range(layout.n_acts))
    start = draw(0, n_batches)
    assert batches(start) == whole[start:]


def plain_plan(layout: mixing.Layout, seed: int) -> collections.abc.Iterator[int]:
    """The stream indices of a plan in the order of their draws, in plain Python, one activation at a time."""
    blocks = [
        (epoch, list(range(first, first + n)))
        for epoch in range(2)
        for part_G in layout.order(seed, epoch)
        for first, n in np.stack(layout.spans(part_G), axis=1).tolist()
    ]
    n_batched = 0
    for epoch in range(2):
        rng, ready = np.random.default_rng((seed, epoch, 1)), []
        todo = [block for e, block in blocks if e == epoch]
        n_drawn = 0
        while n_drawn < layout.n_acts:
            while todo and len(ready) + len(todo[0]) <= layout.n_ready:
                ready += todo.pop(0)
            n = min(layout.batch_size - n_batched % layout.batch_size, layout.n_acts - n_drawn)
            if 4 * n > len(ready):
                places = rng.permutation(len(ready))[:n].tolist()
            else:
                found: set[int] = set()
                while len(found) < n:
                    found |= set(rng.integers(len(ready), size=n - len(found)).tolist())
                shuffled_n = np.array(sorted(found))
                rng.shuffle(shuffled_n)
                places = shuffled_n.tolist()
            yield from (ready[i] for i in places)
            stay = [x for i, x in enumerate(ready) if i >= len(ready) - n and i not in set(places)]
            for i in places:
                if i < len(ready) - n:
                    ready[i] = stay.pop(0)
            del ready[len(ready) - n :]
            n_drawn += n
            n_batched += n


@pytest.mark.parametrize("n_fit", [20, 90, 2000])
@pytest.mark.parametrize("batch_size", [3, 16, 50])
def test_the_plan_is_that_of_a_plain_loop(batch_size: int, n_fit: int) -> None:
    """The sequence of a seed is the same in every version."""
    layout = mixing.Layout.of(
        [range(a, a + 10) for a in range(0, 40, 10)],
        n_layers=2,
        n_tokens=7,
        n_lead=1,
        token_bytes=32_768,
        batch_size=batch_size,
        n_fit=n_fit,
    )
    plan, n_batches = mixing.Plan(layout, 5), 2 * layout.n_acts // batch_size
    parts = [part_n2[:, 0] for _ in range(n_batches) for part_n2 in plan.draw(plan.without_slots)]
    want = itertools.islice(plain_plan(layout, 5), n_batches * batch_size)
    assert np.concatenate(parts).tolist() == list(want)


@pytest.mark.parametrize("start", [1, 11, 29, 30, 31, 75])
def test_a_stream_starts_at_any_batch(many, start: int) -> None:
    cfg, _ = many
    stream = shuffled.Shuffled(cfg, batch_size=8, pool_bytes=5000)
    assert stream.layout.n_pool < 100
    whole = [(index(b), b.act_BD.tolist()) for b in itertools.islice(stream, 90)]
    rest = [(index(b), b.act_BD.tolist()) for b in itertools.islice(stream.batches(start), 15)]
    assert rest == whole[start : start + 15]


def test_a_late_start_reads_a_few_pools(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    dpath, _ = make_shards(n_imgs=1600, n_patches=64, d_vit=64, layers=(0,), per_shard=800)
    stream = shuffled.Shuffled(config.Shards(str(dpath)), batch_size=64, pool_bytes=1 << 20)
    n_pool, lock, read = stream.layout.n_pool, threading.Lock(), [0]
    preadv = os.preadv

    def count(*args: object) -> int:
        n = preadv(*args)
        with lock:
            read[0] += n
        return n

    monkeypatch.setattr(os, "preadv", count)
    monkeypatch.setattr(moves, "C", NO_C)
    batches = stream.batches(1250)  # of 1600 in an epoch
    next(batches)
    batches.close()
    pool_bytes = n_pool * stream.acts.token_bytes
    assert pool_bytes < read[0] < 5 * pool_bytes < 0.2 * 1250 * 64 * 256


# ---- layers, directories, partial dumps ----


@pytest.mark.parametrize("gap_bytes", [0, 24, 1 << 17])
@pytest.mark.parametrize("iov_max", [1, 3, 1024])
@pytest.mark.parametrize("layer", [3, 5, 7, "all"])
def test_reads_in_pieces_give_the_same(
    make_shards, monkeypatch: pytest.MonkeyPatch, gap_bytes: int, iov_max: int, layer: int | str
) -> None:
    """Long gaps between layers are jumped over, many buffers take several calls, and a call may return early."""
    dpath, acts_NLTD = make_shards(n_imgs=9, d_vit=6, layers=(3, 5, 7), per_shard=4)
    preadv = os.preadv

    def early(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:37]], offset)

    monkeypatch.setattr(os, "preadv", early)
    monkeypatch.setattr(extents, "GAP_BYTES", gap_bytes)
    monkeypatch.setattr(extents, "IOV_MAX", iov_max)
    layer_is = [0, 1, 2] if layer == "all" else [(3, 5, 7).index(layer)]
    for patches, tokens in (("image", slice(1, 5)), ("cls", slice(0, 1)), ("all", slice(0, 5))):
        acts = activations.Activations(config.Shards(str(dpath), layer, patches))
        want_NXD = acts_NLTD[2:9, layer_is, tokens].reshape(7, -1, 6)
        np.testing.assert_array_equal(acts.read(2, 9), want_NXD)


def test_extents_in_any_order(make_shards) -> None:
    """Of all shards and layers, backwards too, and parts of checksummed pieces."""
    dpath, acts_NLTD = make_shards(n_imgs=9, d_vit=6, layers=(3, 5, 7), per_shard=4)
    acts = activations.Activations(config.Shards(str(dpath), "all"))
    index_G = np.random.default_rng(0).permutation(len(acts))
    out_GD = np.empty((len(acts), 6), np.float32)
    acts.read_extents(acts.extents(index_G, np.ones_like(index_G)), out_GD.data.cast("B"))
    np.testing.assert_array_equal(out_GD, acts_NLTD[:, :, 1:].reshape(-1, 6)[index_G])


def test_all_layers_are_one_stream(many) -> None:
    cfg, acts_NLTD = many
    cfg = config.Shards(cfg.shard_root, "all")
    blocks = np.concatenate([b.act_NXD for b in ordered.Ordered(cfg, n_imgs=7)])
    np.testing.assert_array_equal(blocks, acts_NLTD[:, :, 1:].reshape(60, 8, 6))
    layer_i = {3: 0, 7: 1}
    seen = set()
    for batch in itertools.islice(shuffled.Shuffled(cfg, batch_size=48), 10):
        for key, act_D in zip(index(batch), batch.act_BD, strict=True):
            image_i, layer, patch_i = key
            assert act_D.tolist() == acts_NLTD[image_i, layer_i[layer], 1 + patch_i].tolist()
            seen.add(key)
    assert len(seen) == 480
    acts = saev.data.Indexed(cfg.shard_root, "all")
    assert (acts[5]["layer"], acts[5]["patch_i"], acts[5]["image_i"]) == (7, 1, 0)
    assert acts[5]["act"].tolist() == acts_NLTD[0, 1, 2].tolist()


def test_several_directories_are_one_stream(make_shards) -> None:
    parts = [make_shards(n_imgs=n, seed=n, per_shard=2, skip=s) for n, s in ((5, (1,)), (3, ()), (4, (0,)))]
    (first, *more), arrays = zip(*parts, strict=True)
    cfg = config.Shards(str(first), 7, more_roots=tuple(map(str, more)))
    acts_ND = np.concatenate(arrays)[:, 1, 1:]
    kept = [i for i in range(12) if i not in (1, 8)]
    blocks = list(ordered.Ordered(cfg, n_imgs=4))
    assert np.concatenate([b.image_i_N for b in blocks]).tolist() == kept
    np.testing.assert_array_equal(np.concatenate([b.act_NXD for b in blocks]), acts_ND[kept])
    for batch in itertools.islice(shuffled.Shuffled(cfg, batch_size=40), 3):
        np.testing.assert_array_equal(batch.act_BD, acts_ND[batch.image_i_B, batch.patch_i_B])
        assert len(set(index(batch))) == 40
    assert len(activations.Activations(cfg).records) == 12


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"d_vit": 16}, "d_vit 16 instead of 8"),
        ({"name": "another"}, "ViT another instead of"),
        ({"dtype": "bfloat16"}, "differ in dtype"),
        ({"layers": (3, 8)}, "layer 7 was not recorded"),
        ({"n_imgs": 5}, "named twice"),
    ],
)
def test_directories_that_do_not_fit(make_shards, other: dict, match: str) -> None:
    (a, _), (b, _) = make_shards(n_imgs=5), make_shards(**{"n_imgs": 6} | other)
    with pytest.raises(errors.UserError, match=match):
        activations.Activations(config.Shards(str(a), 7, more_roots=(str(b),)))


def test_partial_reads_what_is_complete_under_its_own_numbers(many) -> None:
    cfg, acts_NLTD = many
    dpath = pathlib.Path(cfg.shard_root)
    shards = json.loads((dpath / "shards.json").read_text())
    (dpath / "shards.json").write_text(json.dumps([shards[i] for i in (0, 4, 5)]))
    for i in (1, 2, 3):
        (dpath / f"acts{i:06}.bin").unlink()
    with pytest.raises(errors.UserError, match="incomplete dump: 6 of 60 images. Run the same"):
        activations.Activations(cfg)
    cfg = config.Shards(cfg.shard_root, 7, partial=True)
    (block,) = ordered.Ordered(cfg)
    assert block.image_i_N.tolist() == [0, 1, 8, 9, 10, 11]
    np.testing.assert_array_equal(block.act_NXD, acts_NLTD[block.image_i_N, 1, 1:])
    batch = next(iter(shuffled.Shuffled(cfg, batch_size=24)))
    np.testing.assert_array_equal(batch.act_BD, acts_NLTD[batch.image_i_B, 1, 1 + batch.patch_i_B])


def test_results_are_named_by_what_the_stream_holds(make_shards) -> None:
    """The same metadata, other activations; the same activations, other layers, tokens or skipped images."""
    (a, _), (b, _), (c, _) = make_shards(seed=0), make_shards(seed=1), make_shards(skip=(2,))
    cfgs = [config.Shards(str(d), 7) for d in (a, b, c)]
    cfgs += [config.Shards(str(a), 3), config.Shards(str(a), 7, "all"), config.Shards(str(a), "all")]
    assert len({activations.Activations(cfg).fingerprint for cfg in cfgs}) == len(cfgs)
    (again, _) = make_shards(seed=0)
    assert (
        activations.Activations(config.Shards(str(again), 7)).fingerprint
        == activations.Activations(cfgs[0]).fingerprint
    )


# ---- the field's other protocols ----

RENAMES = {
    "1.1": {"n_patches_per_img": "patches_per_ex", "max_patches_per_shard": "patches_per_shard"},
    "2.1": {
        "n_patches_per_img": "content_tokens_per_example",
        "max_patches_per_shard": "max_tokens_per_shard",
    },
}
OTHERS = {"vit_family": "family", "vit_ckpt": "ckpt", "d_vit": "d_model", "n_imgs": "n_examples"}


@pytest.fixture(params=["1.1", "2.1", "2.1.0"])
def foreign(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """The golden directory as a newer tool writes it; its pickle would run code if it were read."""
    dpath = pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "1a2b3c4d"))
    fields = json.loads((dpath / "metadata.json").read_text())
    renames = OTHERS | RENAMES[request.param[:3]]
    fields = {renames.get(k, k): v for k, v in fields.items()} | {"protocol": request.param}
    fields |= {"data": "gASVIgAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAd0b3VjaCBwlIWUUpQu"}
    fields |= {"dataset": "/nowhere", "pixel_agg": "majority"}
    (dpath / "metadata.json").write_text(json.dumps(fields))
    index = [{"name": f"acts00000{i}.bin", "n_examples": n} for i, n in enumerate((2, 2, 1, 0))]
    (dpath / "shards.json").write_text(json.dumps(index))
    (dpath / "acts000003.bin").write_bytes(bytes(640))
    (dpath / "labels.bin").write_bytes(bytes(20))
    return dpath


@pytest.mark.parametrize("layer", [3, 7])
def test_newer_protocols_read(foreign: pathlib.Path, layer: int) -> None:
    cfg, layer_i = config.Shards(str(foreign), layer), (3, 7).index(layer)
    (block,) = ordered.Ordered(cfg)
    np.testing.assert_array_equal(block.act_NXD, GOLDEN_NLTD[:, layer_i, 1:])
    batch = next(iter(shuffled.Shuffled(cfg, batch_size=20)))
    want_BD = GOLDEN_NLTD[batch.image_i_B, layer_i, 1 + batch.patch_i_B]
    np.testing.assert_array_equal(batch.act_BD, want_BD)
    assert saev.data.Indexed(foreign, layer)[6]["act"].tolist() == GOLDEN_NLTD[1, layer_i, 3].tolist()


@pytest.mark.parametrize("index", [None, [0, 1]])
def test_an_interrupted_foreign_dump(foreign: pathlib.Path, index: list[int] | None) -> None:
    """Without shards.json the last file may be half written; it is left out."""
    shards = json.loads((foreign / "shards.json").read_text())
    (foreign / "acts000003.bin").unlink()
    if index is None:
        (foreign / "shards.json").unlink()
    else:
        (foreign / "shards.json").write_text(json.dumps([shards[i] for i in index]))
    with pytest.raises(errors.UserError, match="incomplete dump: 4 of 5 images. Finish it with"):
        activations.Activations(config.Shards(str(foreign)))
    (block,) = ordered.Ordered(config.Shards(str(foreign), 3, partial=True))
    np.testing.assert_array_equal(block.act_NXD, GOLDEN_NLTD[:4, 0, 1:])


@pytest.mark.slow
@pytest.mark.parametrize("foreign", ["2.1"], indirect=True)
def test_a_script_that_ends_with_an_open_reader_says_nothing(
    foreign: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """At the interpreter's end modules go before objects: closing a file must not need them."""
    script = tmp_path / "script.py"
    script.write_text(
        "from saev import nn\n"
        "from saev.data import config, activations, shuffled\n"
        f"acts = activations.Activations(config.Shards({str(foreign)!r}))\n"
        "stream = shuffled.Shuffled(acts, batch_size=20).batches()\n"
        "next(stream)\n"
        "print(acts.read(0, 2).shape)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(2, 4, 8)\n", "")
