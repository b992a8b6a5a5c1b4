"""--data.exclude-patch-labels, against plain loops. N images, T tokens, L layers, D d_vit."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch

from saev import errors, nn, scorers
from saev.codes import config as codes_config
from saev.codes import encode
from saev.data import activations, ordered, shuffled
from saev.data import config as data_config
from saev.formats import patchlabels, shards
from saev.nn import config as nn_config
from saev.scorers import config as scorers_config
from saev.training import config as training_config
from saev.training import loop

N, P, D = 10, 6, 8
CLASSES = {0: "background", 1: "wing", 2: "bill"}


@pytest.fixture
def dump(make_shards) -> tuple[pathlib.Path, np.ndarray, np.ndarray]:
    """(shards of 10 images with [CLS], of which image 4 is corrupt; activations (N, L, T, D); ids (N, P))."""
    id_NP = np.random.default_rng(3).choice([-1, 0, 0, 1, 2], (N, P))
    id_NP[7] = 0
    dpath, acts_NLTD = make_shards(n_imgs=N, n_patches=P, d_vit=D, skip=(4,))
    patchlabels.write(shards.ShardDir.open(dpath), "", id_NP, CLASSES, {})
    return dpath, acts_NLTD, id_NP


def expected(acts_NLTD: np.ndarray, id_NP: np.ndarray, patches: str, layer_is: list[int]) -> np.ndarray:
    """Kept activations, image after image, by a loop."""
    out = []
    for i in range(N):
        for layer_i in layer_is:
            for token in range(P + 1):
                is_cls = token == 0
                wanted = patches == "all" or is_cls == (patches == "cls")
                if i != 4 and wanted and (is_cls or id_NP[i, token - 1] != 0):
                    out.append(acts_NLTD[i, layer_i, token])
    return np.stack(out)


CASES = {"image": ("image", 7), "all tokens": ("all", 3), "all layers": ("image", "all")}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, dump) -> tuple[activations.Activations, np.ndarray]:
    (dpath, acts_NLTD, id_NP), (patches, layer) = dump, CASES[request.param]
    data = data_config.Shards(str(dpath), layer, patches, exclude_patch_labels=("background",))
    layer_is = [0, 1] if layer == "all" else [[3, 7].index(layer)]
    return activations.Activations(data), expected(acts_NLTD, id_NP, patches, layer_is)


def test_blocks_have_the_kept_tokens(case: tuple[activations.Activations, np.ndarray]) -> None:
    acts, want_RD = case
    assert len(acts) == len(want_RD)
    stream = ordered.Ordered(acts, 3)
    got_RD = np.concatenate([stream.rows(block) for block in stream])
    np.testing.assert_array_equal(got_RD, want_RD)
    only = acts.only([2, 7, 8] if acts.cfg.patches == "all" else [2, 8])
    stream = ordered.Ordered(only, 2)
    got_RD = np.concatenate([stream.rows(block) for block in stream])
    assert len(got_RD) == len(only) < len(acts)


@pytest.mark.parametrize("pool_bytes", [8_000, 10**7])
def test_an_epoch_of_batches_has_each_kept_token_once(
    case: tuple[activations.Activations, np.ndarray], pool_bytes: int
) -> None:
    """Two epochs, with a small pool and a large one; a stream that starts in the middle is the same."""
    acts, want_RD = case
    stream = shuffled.Shuffled(acts, batch_size=4, seed=1, pool_bytes=pool_bytes)
    n = len(want_RD)
    batches = [batch for batch, _ in zip(stream.batches(), range(2 * n // 4), strict=False)]
    got_RD = np.concatenate([batch.act_BD.numpy() for batch in batches])
    for epoch in (got_RD[:n], got_RD[n : 2 * n]):
        rows = sorted(map(tuple, epoch.tolist()))
        assert set(rows) <= set(map(tuple, want_RD.tolist())) and len(set(rows)) == len(rows)
    assert sorted(map(tuple, got_RD[:n].tolist())) == sorted(map(tuple, want_RD.tolist()))
    for batch in batches:  # the places are those of the activations
        for act_D, image_i, patch_i in zip(batch.act_BD, batch.image_i_B, batch.patch_i_B, strict=True):
            token = acts.tokens.start + patch_i - acts.first_patch
            position = int(np.searchsorted(acts.image_is_N, image_i))
            read_XD = acts.read(position, position + 1)[0]
            assert (read_XD[token - acts.tokens.start :: acts.n_tokens] == act_D.numpy()).all(axis=1).any()
    again = shuffled.Shuffled(acts, batch_size=4, seed=1, pool_bytes=pool_bytes).batches(start=5)
    np.testing.assert_array_equal(next(again).act_BD, batches[5].act_BD)


@pytest.mark.parametrize(
    "scorer", [scorers_config.Random(), scorers_config.KMeans(n_iters=3), scorers_config.Pca()]
)
def test_scorers_are_fitted_without_them(dump, make_shards, tmp_path: pathlib.Path, scorer) -> None:
    """As on shards that hold nothing else: one patch for each of the kept ones."""
    dpath, acts_NLTD, id_NP = dump
    want_RD = expected(acts_NLTD, id_NP, "image", [1])
    alone, _ = make_shards(
        n_imgs=len(want_RD), n_patches=1, d_vit=D, layers=(7,), cls_token=False, acts=want_RD[:, None, None]
    )
    data = data_config.Shards(str(dpath), 7, exclude_patch_labels=("background",))
    fits = [
        scorers.fit(scorer, d, 5, dpath=tmp_path / "s") for d in (data, data_config.Shards(str(alone), 7))
    ]
    a, b = (fit.vectors_KD.numpy() for fit in fits)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with_all = scorers.fit(
        scorer, dataclasses.replace(data, exclude_patch_labels=()), 5, dpath=tmp_path / "s"
    )
    assert not np.allclose(with_all.vectors_KD.numpy(), a)


def test_training_knows_what_was_left_out(dump, tmp_path: pathlib.Path) -> None:
    """The ids of runs differ by the classes and by the labels' content."""
    dpath, _, id_NP = dump
    cfg = training_config.Train(
        sae=nn_config.TopK(exp_factor=2, top_k=2),
        data=data_config.Shards(str(dpath), 7),
        n_patches=64,
        n_val_patches=16,
        batch_size=16,
        wandb_project="",
        device="cpu",
        ckpt_to=str(tmp_path / "checkpoints"),
    )
    names = []
    for excluded, ids in (
        ((), id_NP),
        (("background",), id_NP),
        (("bill",), id_NP),
        (("bill",), id_NP[::-1]),
    ):
        patchlabels.write(shards.ShardDir.open(dpath), "", ids, CLASSES, {})
        data = dataclasses.replace(cfg.data, exclude_patch_labels=excluded)
        (run,) = loop.main([dataclasses.replace(cfg, data=data)])
        names.append(run)
    assert len(set(names)) == 4
    found = json.loads(pathlib.Path(names[1]).with_name("config.json").read_text())
    assert found["data"]["exclude_patch_labels"] == ["background"]


def test_what_shows_whole_images_refuses_it(dump, tmp_path: pathlib.Path) -> None:
    dpath, _, _ = dump
    data = data_config.Shards(str(dpath), 7, exclude_patch_labels=("wing",))
    nn.save(nn.SparseAutoencoder(nn_config.Relu(d_vit=D, exp_factor=1)).eval(), tmp_path / "sae.pt")
    cfg = codes_config.Codes(str(tmp_path / "sae.pt"), data, dump_to=str(tmp_path / "codes"), device="cpu")
    with pytest.raises(errors.UserError, match=r"--data\.exclude-patch-labels: codes are of whole images"):
        encode.main(cfg)


def test_bad_labels_are_one_line(dump) -> None:
    dpath, _, _ = dump
    data = data_config.Shards(str(dpath), 7, exclude_patch_labels=("crown",))
    with pytest.raises(
        errors.UserError, match="--data.exclude-patch-labels crown: no such class.*background, wing, bill"
    ):
        activations.Activations(data)
    both = dataclasses.replace(data, exclude_patch_labels=("background", "wing", "bill"))
    patchlabels.write(shards.ShardDir.open(dpath), "", np.ones((N, P), int), CLASSES, {})
    with pytest.raises(errors.UserError, match="leaves no patch of these images"):
        activations.Activations(both)
    (dpath / "labels.bin").unlink()
    with pytest.raises(errors.UserError, match=r"labels\.bin: no such file.*python -m saev\.labels"):
        activations.Activations(both)


def test_an_images_score_is_the_maximum_over_its_kept_patches(dump) -> None:
    from saev.protoeval import score

    dpath, acts_NLTD, id_NP = dump
    data = data_config.Shards(str(dpath), 7, exclude_patch_labels=("background",))
    stream = ordered.Ordered(data, 20)
    (block,) = stream
    acts_BPD, pooled_2BD = score._images(block, stream.kept(block), np.ones(N - 1, bool), torch.device("cpu"))
    for row, i in enumerate(block.image_i_N.tolist()):
        is_kept_P = id_NP[i] != 0
        own_PD = acts_NLTD[i, 1, 1:][is_kept_P if is_kept_P.any() else slice(None)]
        np.testing.assert_array_equal(acts_BPD[row].amax(dim=0), own_PD.max(axis=0))
        np.testing.assert_allclose(pooled_2BD[0, row], own_PD.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(pooled_2BD[1, row], own_PD.max(axis=0))
