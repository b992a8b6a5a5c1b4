"""Every loader against the array that was written."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import saev
from saev import errors
from saev.data import config, ordered, shuffled


def epoch(stream: shuffled.Shuffled, n_batches: int) -> list[shuffled.Batch]:
    return list(itertools.islice(stream, n_batches))


def keys(batches: list[shuffled.Batch]) -> list[tuple[int, int]]:
    return [
        k for b in batches for k in zip(b.image_i_B.tolist(), b.patch_i_B.tolist(), strict=True)
    ]


@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_ordered_gives_the_array(make_shards, block: int) -> None:
    dpath, acts_NLTD = make_shards(n_imgs=11, n_patches=4, d_vit=6, layers=(2, 9), per_shard=4)
    stream = ordered.Ordered(config.Shards(str(dpath), 9, "all"), n_imgs=block)
    blocks = list(stream)
    assert len(blocks) == len(stream)
    assert [start for start, _ in blocks] == list(range(0, 11, block))
    np.testing.assert_array_equal(np.concatenate([a for _, a in blocks]), acts_NLTD[:, 1])


def test_indexed(make_shards) -> None:
    dpath, acts_NLTD = make_shards(n_imgs=5, n_patches=4, d_vit=6, layers=(23,), per_shard=2)
    acts = saev.data.Indexed(str(dpath), layer=23)
    assert len(acts) == 20
    for i in range(20):
        got = acts[i]
        assert (got["image_i"], got["patch_i"]) == divmod(i, 4)
        np.testing.assert_array_equal(got["act"].numpy(), acts_NLTD[i // 4, 0, 1 + i % 4])
    assert torch.equal(acts[-1]["act"], acts[19]["act"])
    assert acts.images[3] == ("a/3.png", "a") and acts.images[3].label == "a"
    with pytest.raises(IndexError):
        _ = acts[20]
    assert [saev.data.Indexed(dpath, patches="all")[i]["patch_i"] for i in range(6)] == [
        -1,
        0,
        1,
        2,
        3,
        -1,
    ]


def test_cls_of_a_model_without_one(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=2, n_patches=4, d_vit=6, layers=(0,), cls_token=False)
    with pytest.raises(errors.UserError, match=r"has no \[CLS\] token. Pass --data.patches image"):
        saev.data.Indexed(dpath, patches="cls")
    assert saev.data.Indexed(dpath)[0]["patch_i"] == 0


@pytest.mark.parametrize("pool_bytes", [1, 1000, 1 << 20])
def test_shuffled_delivers_each_activation_once_an_epoch(make_shards, pool_bytes: int) -> None:
    dpath, acts_NLTD = make_shards(n_imgs=9, n_patches=4, d_vit=6, layers=(0,), per_shard=4)
    stream = shuffled.Shuffled(config.Shards(str(dpath)), batch_size=6, pool_bytes=pool_bytes)
    batches = epoch(stream, 12)  # 72 activations: two epochs
    assert sorted(keys(batches)) == sorted(2 * list(itertools.product(range(9), range(4))))
    for batch in batches:
        assert batch.act_BD.shape == (6, 6)
        np.testing.assert_array_equal(
            batch.act_BD.numpy(), acts_NLTD[batch.image_i_B, 0, 1 + batch.patch_i_B]
        )


def test_shuffled_is_seeded(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=9, n_patches=4, d_vit=6, layers=(0,))
    cfg = config.Shards(str(dpath))
    first, again, other = (
        keys(epoch(shuffled.Shuffled(cfg, batch_size=6, seed=s), 6)) for s in (0, 0, 1)
    )
    assert first == again
    assert sorted(first) == sorted(other) and first != other


def test_shuffled_mixes_images(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=200, n_patches=16, d_vit=4, layers=(0,), per_shard=50)
    (batch,) = epoch(shuffled.Shuffled(config.Shards(str(dpath)), batch_size=64), 1)
    uniform = 200 * (1 - (1 - 1 / 200) ** 64)
    assert len(set(batch.image_i_B.tolist())) > 0.8 * uniform


def test_shuffled_pool_is_bounded(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=100, n_patches=4, d_vit=6, layers=(0,), per_shard=30)
    stream = shuffled.Shuffled(config.Shards(str(dpath)), batch_size=10, pool_bytes=100 * 24)
    pieces = [len(index_P) for _, index_P in stream._epoch(0)]
    assert sum(pieces) == 400
    assert max(pieces) <= 100 + shuffled.BLOCK_IMGS * 4


def test_epochs_differ(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=9, n_patches=4, d_vit=6, layers=(0,))
    batches = epoch(shuffled.Shuffled(config.Shards(str(dpath)), batch_size=6), 12)
    assert sorted(keys(batches[:6])) == sorted(keys(batches[6:])) and keys(batches[:6]) != keys(
        batches[6:]
    )


def test_a_batch_larger_than_the_data(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=2, n_patches=4, d_vit=6, layers=(0,))
    (batch,) = epoch(shuffled.Shuffled(config.Shards(str(dpath)), batch_size=24), 1)
    assert sorted(keys([batch])) == sorted(3 * list(itertools.product(range(2), range(4))))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_activations_name_their_image(make_shards, bad: float) -> None:
    acts_NLTD = np.zeros((7, 1, 5, 6), np.float32)
    acts_NLTD[4, 0, 2, 3] = bad
    dpath, _ = make_shards(n_imgs=7, n_patches=4, d_vit=6, layers=(8,), acts=acts_NLTD)
    cfg = config.Shards(str(dpath))
    for stream in (ordered.Ordered(cfg, n_imgs=3), shuffled.Shuffled(cfg, batch_size=4)):
        with pytest.raises(
            errors.UserError, match="image 4 has NaN or infinite activations at layer 8"
        ):
            for _ in itertools.islice(stream, 10):
                pass


def test_a_shard_that_vanishes_while_reading(make_shards) -> None:
    dpath, _ = make_shards(n_imgs=6, n_patches=4, d_vit=6, layers=(0,), per_shard=2)
    stream = iter(ordered.Ordered(config.Shards(str(dpath)), n_imgs=2))
    next(stream)
    (dpath / "acts000001.bin").unlink()
    with pytest.raises(errors.UserError, match=r"acts000001\.bin: cannot be read"):
        next(stream)


@hypothesis.settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_any_block_of_any_shape(make_shards, data: st.DataObject) -> None:
    n_imgs, n_patches, d_vit = (data.draw(st.integers(1, 9)) for _ in range(3))
    cls_token, per_shard = data.draw(st.booleans()), data.draw(st.integers(1, 5))
    dpath, acts_NLTD = make_shards(
        n_imgs=n_imgs,
        n_patches=n_patches,
        d_vit=d_vit,
        layers=(1, 4),
        cls_token=cls_token,
        per_shard=per_shard,
    )
    start = data.draw(st.integers(0, n_imgs - 1))
    stop = data.draw(st.integers(start + 1, n_imgs))
    got_NTD = ordered.Ordered(config.Shards(str(dpath), 4)).reader.read(start, stop)
    np.testing.assert_array_equal(got_NTD, acts_NLTD[start:stop, 1, int(cls_token) :])
