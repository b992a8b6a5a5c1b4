"""Every loader against the array that was written. N images, L layers, T tokens, D d_vit, B batch."""

import collections
import itertools
import os
import pathlib
import re
import threading
import time
import tracemalloc
import typing as tp

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import saev
from saev import errors
from saev.data import activations, config, mixing, moves, ordered, readers, shuffled

settings = hypothesis.settings(
    deadline=None, max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
PATCHES: tuple[config.Patches, ...] = ("image", "cls", "all")


def wanted(
    acts_NLTD: np.ndarray, layer_i: int, patches: config.Patches, cls_token: bool
) -> dict[tuple[int, int], np.ndarray]:
    """{(image, patch): activation}, patch -1 for [CLS], by plain loops."""
    out = {}
    for image_i, acts_LTD in enumerate(acts_NLTD):
        for token_i, act_D in enumerate(acts_LTD[layer_i]):
            patch_i = token_i - 1 if cls_token else token_i
            if patches == "all" or (patches == "cls") == (patch_i == -1):
                out[image_i, patch_i] = act_D
    return out


def keys(batch: shuffled.Batch) -> list[tuple[int, int]]:
    return list(zip(batch.image_i_B.tolist(), batch.patch_i_B.tolist(), strict=True))


def take(cfg: config.Shards | activations.Activations, n: int, **kwargs: int) -> list[shuffled.Batch]:
    return list(itertools.islice(shuffled.Shuffled(cfg, **kwargs), n))


@pytest.fixture
def small(make_shards) -> tuple[config.Shards, np.ndarray]:
    """9 images of 4 patches, layer 7 of (3, 7)."""
    dpath, acts_NLTD = make_shards(n_imgs=9, n_patches=4, d_vit=6, layers=(3, 7), per_shard=4)
    return config.Shards(str(dpath), 7), acts_NLTD


# ---- reader, ordered, indexed ----


@pytest.mark.slow
@settings
@hypothesis.given(data=st.data())
def test_every_loader_of_any_shape(make_shards, data: st.DataObject) -> None:
    """Index maths: all loaders agree with a loop over the array, at any shape and split into shards."""
    n_imgs, n_patches, d_vit = (data.draw(st.integers(1, m)) for m in (11, 5, 3))
    layers = tuple(data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True)))
    cls_token = data.draw(st.booleans())
    patches = data.draw(st.sampled_from(PATCHES if cls_token else ("image", "all")))
    dpath, acts_NLTD = make_shards(
        n_imgs=n_imgs,
        n_patches=n_patches,
        d_vit=d_vit,
        layers=layers,
        cls_token=cls_token,
        per_shard=data.draw(st.integers(1, 12)),
    )
    layer = data.draw(st.sampled_from(layers))
    want = wanted(acts_NLTD, layers.index(layer), patches, cls_token)
    cfg = config.Shards(str(dpath), layer, patches)

    acts = saev.data.Indexed(dpath, layer, patches)
    assert len(acts) == len(want)
    for i, (key, act_D) in enumerate(want.items()):
        assert (acts[i]["image_i"], acts[i]["patch_i"]) == key
        assert acts[i]["act"].tolist() == act_D.tolist()

    want_NTD = np.stack(list(want.values())).reshape(n_imgs, -1, d_vit)
    blocks = ordered.Ordered(cfg, n_imgs=data.draw(st.integers(1, 12)))
    for (image_i_N, acts_NTD), start in zip(blocks, range(0, n_imgs, blocks.block), strict=True):
        assert image_i_N.tolist() == list(range(start, min(start + blocks.block, n_imgs)))
        np.testing.assert_array_equal(acts_NTD, want_NTD[start : start + blocks.block])

    start, stop = sorted(data.draw(st.integers(0, n_imgs)) for _ in range(2))
    np.testing.assert_array_equal(activations.Activations(cfg).read(start, stop), want_NTD[start:stop])

    batch_size = data.draw(st.integers(1, 2 * len(want)))
    batches = take(cfg, 3 * len(want) // batch_size + 1, batch_size=batch_size, pool_bytes=50)
    drawn = [key for batch in batches for key in keys(batch)]
    for at in range(0, 3 * len(want), len(want)):
        assert sorted(drawn[at : at + len(want)]) == sorted(want)


@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_ordered_gives_the_array_in_blocks(small, block: int) -> None:
    cfg, acts_NLTD = small
    stream = ordered.Ordered(cfg, n_imgs=block)
    blocks = list(stream)
    assert [image_i_N[0] for image_i_N, _ in blocks] == list(range(0, 9, block))
    assert len(stream) == len(blocks)
    np.testing.assert_array_equal(np.concatenate([a for _, a in blocks]), acts_NLTD[:, 1, 1:])
    assert len(list(stream)) == len(blocks), "a second pass starts again"


def test_what_is_read_is_a_copy(small) -> None:
    cfg, acts_NLTD = small
    acts = activations.Activations(cfg)
    acts.read(0, 9)[:] = 0
    np.testing.assert_array_equal(acts.read(0, 9), acts_NLTD[:, 1, 1:])


def test_indexed(make_shards) -> None:
    """The lines of DESIGN section 10."""
    dpath, acts_NLTD = make_shards(n_imgs=5, n_patches=4, d_vit=6, layers=(11, 23), per_shard=2)
    acts = saev.data.Indexed(str(dpath), layer=23)
    assert len(acts) == 20
    assert sorted(acts[6]) == ["act", "image_i", "layer", "patch_i"]
    assert (acts[6]["image_i"], acts[6]["patch_i"]) == (1, 2)
    assert acts[6]["act"].dtype == torch.float32
    np.testing.assert_array_equal(acts[6]["act"], acts_NLTD[1, 1, 3])
    path, label = acts.images[4]
    assert (path, label) == ("class1/0004.jpg", "class1")
    assert (acts.images[4].path, acts.images[4].label) == (path, label)


def test_indexed_takes_any_integer_and_ends(small) -> None:
    cfg, _ = small
    acts = saev.data.Indexed(cfg.shard_root, 7)
    for last in (-1, np.int64(35), torch.tensor(35)):
        assert torch.equal(acts[last]["act"], acts[35]["act"])
    assert [a["image_i"] for a in acts] == [i for i in range(9) for _ in range(4)]
    for i in (36, -37):
        with pytest.raises(IndexError, match=f"activation {i}: there are only 36"):
            _ = acts[i]


def test_cls_is_patch_minus_one(make_shards) -> None:
    dpath, acts_NLTD = make_shards(n_imgs=3, n_patches=2, d_vit=4, layers=(0,))
    acts = saev.data.Indexed(dpath, patches="all")
    assert [acts[i]["patch_i"] for i in range(6)] == [-1, 0, 1, -1, 0, 1]
    acts = saev.data.Indexed(dpath, patches="cls")
    assert [(a["image_i"], a["patch_i"]) for a in acts] == [(0, -1), (1, -1), (2, -1)]
    np.testing.assert_array_equal(acts[2]["act"], acts_NLTD[2, 0, 0])
    (batch,) = take(config.Shards(str(dpath), patches="cls"), 1, batch_size=3)
    assert sorted(keys(batch)) == [(0, -1), (1, -1), (2, -1)]


def test_cls_of_a_model_without(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=2, cls_token=False)
    with pytest.raises(errors.UserError, match=r"has no \[CLS\] token. Pass --data.patches image"):
        saev.data.Indexed(dpath, patches="cls")
    assert saev.data.Indexed(dpath)[0]["patch_i"] == 0


def test_shard_root_left_out() -> None:
    with pytest.raises(errors.UserError, match=r"--data\.shard-root is missing"):
        activations.Activations(config.Shards())


# ---- shuffled ----


@pytest.mark.parametrize("pool_bytes", [1, 500, 1 << 20])
@pytest.mark.parametrize("batch_size", [6, 7, 36])
def test_an_epoch_delivers_each_activation_once(small, pool_bytes: int, batch_size: int) -> None:
    cfg, acts_NLTD = small
    want = wanted(acts_NLTD, 1, "image", True)
    n_batches = -(-3 * 36 // batch_size)
    batches = take(cfg, n_batches, batch_size=batch_size, pool_bytes=pool_bytes)
    for batch in batches:
        assert batch.act_BD.shape == (batch_size, 6)
        for act_D, key in zip(batch.act_BD.numpy(), keys(batch), strict=True):
            np.testing.assert_array_equal(act_D, want[key])
    drawn = [key for batch in batches for key in keys(batch)]
    epochs = [drawn[at : at + 36] for at in (0, 36, 72)]
    assert all(sorted(epoch) == sorted(want) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_stay_as_they_were_handed_out(small) -> None:
    """Also when the pool has been filled again since."""
    cfg, acts_NLTD = small
    for batch in take(cfg, 40, batch_size=3, pool_bytes=1):
        want_BD = acts_NLTD[batch.image_i_B, 1, 1 + batch.patch_i_B]
        np.testing.assert_array_equal(batch.act_BD, want_BD)


def test_seed_decides_the_order(small) -> None:
    cfg, _ = small
    runs = [
        [key for batch in take(cfg, 12, batch_size=6, seed=seed, pool_bytes=400) for key in keys(batch)]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_stream_can_be_started_twice(small) -> None:
    cfg, _ = small
    stream = shuffled.Shuffled(cfg, batch_size=5)
    first, second = (keys(next(iter(stream))) for _ in range(2))
    assert first == second


def test_batch_larger_than_the_data(small) -> None:
    cfg, acts_NLTD = small
    (batch,) = take(cfg, 1, batch_size=90)
    counts = collections.Counter(keys(batch))
    assert counts.keys() == wanted(acts_NLTD, 1, "image", True).keys()
    assert set(counts.values()) == {2, 3}, "two whole epochs and half of the third"


@pytest.mark.slow
def test_a_full_pool_is_a_uniform_shuffle(make_shards) -> None:
    """Over many seeds each activation comes first equally often: chi-squared of 36 places, 35 degrees of freedom."""
    dpath, _ = make_shards(n_imgs=9, n_patches=4, d_vit=1, layers=(0,))
    cfg = activations.Activations(config.Shards(str(dpath)))
    n = 1000
    first = collections.Counter(keys(take(cfg, 1, batch_size=1, seed=s)[0])[0] for s in range(n))
    chi2 = sum((first[divmod(i, 4)] - n / 36) ** 2 / (n / 36) for i in range(36))
    assert chi2 < 73  # p = 0.0002, at fixed seeds


def test_a_bounded_pool_still_mixes_images(make_shards) -> None:
    """A pool of a quarter of the data: a batch has nearly as many different images as a uniform sample of all."""
    dpath, _ = make_shards(n_imgs=400, n_patches=16, d_vit=64, layers=(0,), per_shard=50)
    stream = shuffled.Shuffled(config.Shards(str(dpath)), batch_size=64, pool_bytes=600_000)
    assert 1500 < stream.layout.n_pool < 1600
    batches = list(itertools.islice(stream, 90))
    uniform = 400 * (1 - (1 - 1 / 400) ** 64)
    n_images = [len(set(batch.image_i_B.tolist())) for batch in batches]
    assert np.mean(n_images) > 0.8 * uniform
    assert len({i for batch in batches[:10] for i in batch.image_i_B.tolist()}) > 110


def test_the_default_pool_mixes_a_large_dump() -> None:
    """ViT-L, 200,000 images, batches of 4,096: at least 0.9 of the different images that uniform sampling gives."""
    n_imgs, batch_size, d_vit = 200_000, 4096, 1024
    layout = mixing.Layout.of(
        [range(a, min(a + 2334, n_imgs)) for a in range(0, n_imgs, 2334)],
        n_layers=1,
        n_tokens=256,
        token_bytes=4 * d_vit,
        batch_size=batch_size,
        n_fit=mixing.n_fit(2 * 10**9, batch_size, d_vit, 4 * d_vit),
    )
    assert layout.n_pool * (4 * d_vit + mixing.INDEX_BYTES) < 2e9
    plan = mixing.Plan(layout, 0, start=3 * layout.n_pool // batch_size)
    n_images = []
    for _ in range(50):
        (index_B2,) = plan.draw(plan.without_slots)
        n_images.append(len(np.unique(index_B2[:, 0] // 256)))
    uniform = n_imgs * (1 - (1 - 1 / n_imgs) ** batch_size)
    assert np.mean(n_images) > 0.9 * uniform


@pytest.mark.gpu
def test_pinned_batches_hold_the_same(small) -> None:
    cfg, _ = small
    plain, pinned = (next(iter(shuffled.Shuffled(cfg, batch_size=8, pin=pin))) for pin in (False, True))
    assert pinned.act_BD.is_pinned() and not plain.act_BD.is_pinned()
    assert torch.equal(pinned.act_BD.to("cuda", non_blocking=True).cpu(), plain.act_BD)


@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True])
def test_pool_bytes_bound_the_memory(make_shards, direct: bool) -> None:
    dpath, _ = make_shards(n_imgs=400, n_patches=16, d_vit=256, layers=(0,), per_shard=100)
    cfg = config.Shards(str(dpath))
    pool_bytes = 1 << 23  # far more than Python's own objects take
    take(cfg, 1, batch_size=16, direct=direct)  # compiled here
    tracemalloc.start()
    stream = shuffled.Shuffled(cfg, batch_size=64, pool_bytes=pool_bytes, direct=direct)
    for _ in itertools.islice(stream, 300):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.8 * pool_bytes < peak < 1.1 * pool_bytes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_activations_name_their_image(make_shards, bad: float) -> None:
    acts_NLTD = np.zeros((7, 1, 5, 6), np.float32)
    acts_NLTD[4, 0, 2, 3] = bad
    dpath, _ = make_shards(n_imgs=7, n_patches=4, d_vit=6, layers=(8,), acts=acts_NLTD)
    cfg = config.Shards(str(dpath))
    for stream in (ordered.Ordered(cfg, n_imgs=3), shuffled.Shuffled(cfg, batch_size=28)):
        with pytest.raises(errors.UserError, match=r"image 4 has NaN or infinite .* at layer 8"):
            for _ in itertools.islice(stream, 10):
                pass
    list(ordered.Ordered(config.Shards(str(dpath), patches="cls")))  # another token: fine


@pytest.mark.parametrize("keep_half", [False, True])
@pytest.mark.parametrize(("dtype", "bad"), [("bfloat16", 2e15), ("bfloat16", -np.nan), ("float16", np.inf)])
def test_bad_activations_in_half_precision_name_their_image(
    make_shards, dtype: str, bad: float, keep_half: bool
) -> None:
    acts_NLTD = np.full((7, 1, 5, 6), 65504 if dtype == "float16" else 9.9e14, np.float32)
    dpath, _ = make_shards(n_imgs=7, n_patches=4, d_vit=6, layers=(8,), acts=acts_NLTD, dtype=dtype)
    take(config.Shards(str(dpath)), 2, batch_size=28, keep_half=keep_half)  # just not too large
    acts_NLTD[4, 0, 2, 3] = bad
    dpath, _ = make_shards(n_imgs=7, n_patches=4, d_vit=6, layers=(8,), acts=acts_NLTD, dtype=dtype)
    match = "activations up to 2e" if bad == 2e15 else "NaN or infinite"
    with pytest.raises(errors.UserError, match=f"image 4 has {match}.* at layer 8"):
        take(config.Shards(str(dpath)), 2, batch_size=28, keep_half=keep_half)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("batch_size", [10, 100])
def test_half_precision_is_kept_if_asked(make_shards, dtype: str, batch_size: int) -> None:
    dpath, _ = make_shards(n_imgs=9, n_patches=4, d_vit=6, layers=(8,), dtype=dtype)
    cfg = config.Shards(str(dpath))
    converted, kept = (take(cfg, 20, batch_size=batch_size, keep_half=keep) for keep in (False, True))
    for a, b in zip(converted, kept, strict=True):
        assert a.act_BD.dtype == torch.float32 and b.act_BD.dtype == getattr(torch, dtype)
        assert torch.equal(a.act_BD, b.act_BD.float()) and keys(a) == keys(b)
    assert torch.equal(converted[0].act_BD, wanted_rows(cfg, converted[0]))


def wanted_rows(cfg: config.Shards, batch: shuffled.Batch) -> torch.Tensor:
    """A batch's activations by random access."""
    acts = saev.data.Indexed(cfg.shard_root, cfg.layer)
    n = acts.acts.n_per_img
    return torch.stack([acts[image_i * n + patch_i]["act"] for image_i, patch_i in keys(batch)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_value_is_converted(dtype: str) -> None:
    bits_PD = np.arange(2**16, dtype=np.uint16).reshape(64, 1024)
    slot_n = np.random.default_rng(0).permutation(64)
    out_nD = np.empty((64, 1024), np.uint32)
    is_good = moves.take(moves.CONVERTED[dtype], bits_PD, slot_n, moves.LARGEST[dtype], out_nD)
    want_nD = torch.from_numpy(bits_PD[slot_n].view(np.int16)).view(getattr(torch, dtype)).float()
    np.testing.assert_array_equal(out_nD.view(np.float32), want_nD)  # NaN equals NaN
    assert not is_good
    for p in range(64):  # each part of the values by itself
        row_nD = np.empty((1, 1024), np.uint32)
        is_good = moves.take(moves.CONVERTED[dtype], bits_PD, np.array([p]), moves.LARGEST[dtype], row_nD)
        assert is_good == bool((row_nD.view(np.float32).__abs__() <= activations.LARGEST).all())


def test_compiled_reads_equal_plain_ones(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled reader reads everything itself; where it cannot, the same comes from `os.preadv`."""
    dpath, _ = make_shards(n_imgs=40, n_patches=64, d_vit=96, layers=(0, 3), per_shard=7)
    changes = {
        "memory": [(os, "preadv", None)],  # would be a TypeError
        "never in memory": [(os, "preadv", None), (moves, "C", (*moves.C[:4], 0))],
        "no C functions": [(moves, "C", (0, 0, 0, 0, 0))],
    }
    first, *others = (taken_with(dpath, change, monkeypatch) for change in changes.values())
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert keys(a) == keys(b) and torch.equal(a.act_BD, b.act_BD)


def taken_with(
    dpath: pathlib.Path, change: list[tuple[object, str, object]], monkeypatch: pytest.MonkeyPatch
) -> list[shuffled.Batch]:
    with monkeypatch.context() as changed:
        for owner, name, value in change:
            changed.setattr(owner, name, value)
        cfgs = [config.Shards(str(dpath), "all", patches) for patches in PATCHES]
        return list(itertools.chain(*(take(cfg, 9, batch_size=500, pool_bytes=10**6) for cfg in cfgs)))


class Announced:
    """Counts announcements and reads of a stream's shares, and says what the kernel has in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_cold: bool):
        self.is_cold = is_cold
        self.lock = threading.Lock()
        self.n_announced = self.n_taken = self.n_unannounced = self.most = 0
        self.real_announce, self.real_read = moves.announce, moves.read
        monkeypatch.setattr(moves, "announce", self.announce)
        monkeypatch.setattr(moves, "read", self.read)

    def announce(self, *args: tp.Any) -> bool:
        with self.lock:
            self.n_announced += 1
            self.most = max(self.most, self.n_announced - self.n_taken)
        self.real_announce(*args)
        return self.is_cold

    def read(self, *args: tp.Any) -> bool:
        is_announced = args[8]
        time.sleep(0.002)  # a disk
        self.real_read(*args)
        with self.lock:
            self.n_taken += is_announced
            self.n_unannounced += not is_announced
        return self.is_cold or is_announced


def test_shares_that_are_not_in_memory_are_announced(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    dpath, _ = make_shards(n_imgs=60, n_patches=64, d_vit=96, layers=(0,), per_shard=20)
    stream = shuffled.Shuffled(config.Shards(str(dpath)), batch_size=300, pool_bytes=800_000, n_threads=2)
    want = [(keys(b), b.act_BD) for b in itertools.islice(stream, 60)]
    seen = Announced(monkeypatch, is_cold=True)
    batches = stream.batches()
    got = [(keys(b), b.act_BD) for b in itertools.islice(batches, 40)]
    assert seen.n_announced > 20 and seen.n_taken > seen.n_unannounced
    assert seen.n_taken <= seen.n_announced
    assert 2 < seen.most <= readers.ANNOUNCED * stream.n_threads, "memory for them is bounded"
    seen.is_cold = False
    got += [(keys(b), b.act_BD) for b in itertools.islice(batches, 10)]
    n_announced = seen.n_announced
    got += [(keys(b), b.act_BD) for b in itertools.islice(batches, 10)]
    assert seen.n_announced == n_announced, "everything is in memory"
    seen.is_cold = True
    list(itertools.islice(batches, 20))
    assert seen.n_announced > n_announced
    batches.close()
    for (keys_a, act_a), (keys_b, act_b) in zip(want, got, strict=True):
        assert keys_a == keys_b and torch.equal(act_a, act_b)


def test_files_in_memory_are_read_without_announcements(make_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiled code finds in the page cache, in a whole stream and after files have left it."""
    dpath, _ = make_shards(n_imgs=60, n_patches=64, d_vit=96, layers=(0,), per_shard=20)
    found: list[tuple[str, bool]] = []
    for name in ("announce", "read"):
        call = getattr(moves, name)
        monkeypatch.setattr(moves, name, lambda *args, f=call, n=name: found.append((n, r := f(*args))) or r)
    fds = [os.open(fpath, os.O_RDONLY) for fpath in sorted(dpath.glob("acts*.bin"))]
    try:
        for fd in fds:
            os.fsync(fd)
            os.pread(fd, os.fstat(fd).st_size, 0)
        try:
            os.preadv(fds[0], [bytearray(9)], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("this file system does not say what is in memory")
        stream = shuffled.Shuffled(config.Shards(str(dpath)), batch_size=300, pool_bytes=800_000)
        list(itertools.islice(stream, 30))
        assert {is_cold for _, is_cold in found[-10:]} == {False}
        found.clear()
        for fd in fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(fds[0], [bytearray(9)], 0, os.RWF_NOWAIT)
            pytest.skip("this file system keeps files in memory")
        except BlockingIOError:
            list(itertools.islice(stream, 1))
        assert ("announce", True) in found or ("read", True) in found
    finally:
        for fd in fds:
            os.close(fd)


def test_memory_is_used_again_only_after_its_last_reference(small) -> None:
    cfg, _ = small
    stream = shuffled.Shuffled(cfg, batch_size=6).batches()
    kept, seen = [], set()
    for i, batch in enumerate(itertools.islice(stream, 60)):
        seen.add(batch.act_BD.data_ptr())
        if i % 10 == 0:  # a view of a part of it is enough
            kept.append((batch.act_BD[2:4, 1:].numpy(), batch.act_BD[2:4, 1:].clone()))
    assert len(seen) < 6 + 2 * (mixing.AHEAD + 2)
    for view_nD, copy_nD in kept:
        np.testing.assert_array_equal(view_nD, copy_nD)


@pytest.mark.parametrize("size", [2e15, 1e25])
def test_activations_whose_squares_overflow_are_refused(make_shards, size: float) -> None:
    acts_NLTD = np.zeros((7, 1, 5, 6), np.float32)
    acts_NLTD[4, 0, 2, 3] = -size
    dpath, _ = make_shards(n_imgs=7, n_patches=4, d_vit=6, layers=(8,), acts=acts_NLTD)
    cfg = config.Shards(str(dpath))
    for stream in (ordered.Ordered(cfg, n_imgs=3), shuffled.Shuffled(cfg, batch_size=28)):
        match = re.escape(f"image 4 has activations up to {size:.2g} at layer 8")
        with pytest.raises(errors.UserError, match=match):
            for _ in itertools.islice(stream, 10):
                pass


def test_large_activations_are_read(make_shards) -> None:
    """Of many just below the bound the sum of squares is far above the square of the bound."""
    acts_NLTD = np.full((7, 1, 5, 6), activations.LARGEST, np.float32)
    dpath, _ = make_shards(n_imgs=7, n_patches=4, d_vit=6, layers=(8,), acts=acts_NLTD)
    list(ordered.Ordered(config.Shards(str(dpath)), n_imgs=3))


def test_a_shard_that_vanishes_while_reading(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=40, per_shard=2)
    stream = iter(ordered.Ordered(config.Shards(str(dpath)), n_imgs=2))
    next(stream)
    (pathlib.Path(dpath) / "acts000015.bin").unlink()
    with pytest.raises(errors.UserError, match=r"acts000015\.bin: cannot be read"):
        list(stream)
