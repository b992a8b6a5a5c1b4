"""Activations of one space count as such for every stage, and those of another are refused by every stage alike."""

import collections.abc
import itertools
import pathlib

import pytest
import torch

from saev import errors, nn, scorers
from saev.data import activations
from saev.data import config as data_config
from saev.formats import space
from saev.nn import config as nn_config
from saev.protoeval import config as protoeval_config
from saev.protoeval import opening
from saev.scorers import config as scorers_config
from saev.training import config as training_config
from saev.training import loop
from saev.visuals import coders
from saev.visuals import config as visuals_config

Pair = collections.abc.Callable[[data_config.Shards, data_config.Shards, pathlib.Path], object]


def saved(data: data_config.Shards, dpath: pathlib.Path) -> str:
    """An SAE's checkpoint that says it was trained on these activations."""
    acts = activations.Activations(data)
    sae = nn.SparseAutoencoder(nn_config.Relu(d_vit=acts.d_vit, d_sae=4))
    nn.save(sae, dpath / "sae.pt", acts.space.describe())
    return str(dpath / "sae.pt")


def val_data(a: data_config.Shards, b: data_config.Shards, dpath: pathlib.Path) -> None:
    sae = nn_config.Relu(d_sae=4)
    cfg = training_config.Train(
        sae=sae,
        data=a,
        val_data=b,
        n_patches=8,
        batch_size=4,
        ckpt_to=str(dpath),
        wandb_project="",
        device="cpu",
    )
    loop.main([cfg])


def fit_data(a: data_config.Shards, b: data_config.Shards, dpath: pathlib.Path) -> None:
    opening.open_all([protoeval_config.ProtoEval(train_data=a, fit_data=b)])


def other_test_data(a: data_config.Shards, b: data_config.Shards, dpath: pathlib.Path) -> None:
    opening.open_all([protoeval_config.ProtoEval(train_data=a, test_data=b)])


def more_roots(a: data_config.Shards, b: data_config.Shards, dpath: pathlib.Path) -> None:
    activations.Activations(data_config.Shards(a.shard_root, 3, more_roots=(b.shard_root,)))


def scorer(a: data_config.Shards, b: data_config.Shards, dpath: pathlib.Path) -> None:
    scorers.fit(scorers_config.Sae(saved(a, dpath)), b, 2)


def gallery(a: data_config.Shards, b: data_config.Shards, dpath: pathlib.Path) -> None:
    cfg = visuals_config.Visuals(ckpt=saved(a, dpath), data=b)
    coders.load(cfg, activations.Activations(b), torch.device("cpu"))


PAIRS = [val_data, fit_data, other_test_data, more_roots, scorer, gallery]
FLAGS = ["--val-data", "--fit-data", "--test-data", "--data.more-roots", "--data", "--data"]


@pytest.mark.parametrize("pair", PAIRS)
def test_bfloat16_autocast_counts_as_the_same_vit(pair: Pair, make_shards, tmp_path: pathlib.Path) -> None:
    exact, rounded = (
        data_config.Shards(str(make_shards(name=name, n_imgs=n)[0]), 3)
        for name, n in (("vit", 4), ("vit@bf16", 5))
    )
    assert activations.Activations(rounded).space.autocast
    pair(exact, rounded, tmp_path)
    pair(rounded, exact, tmp_path)


@pytest.mark.parametrize(("pair", "flag"), [*zip(PAIRS, FLAGS, strict=True)])
@pytest.mark.parametrize(
    ("other", "what"),
    [({"name": "another"}, "ViT another instead of vit"), ({"d_vit": 6}, "d_vit 6 instead of 8")],
)
def test_another_space_is_refused_in_the_same_words(
    pair: Pair, flag: str, other: dict[str, object], what: str, make_shards, tmp_path: pathlib.Path
) -> None:
    a, b = (
        data_config.Shards(str(make_shards(n_imgs=n, **kwargs)[0]), 3)
        for n, kwargs in ((4, {"name": "vit"}), (5, {"name": "vit", **other}))
    )
    with pytest.raises(errors.UserError) as caught:
        pair(a, b, tmp_path)
    text = str(caught.value)
    assert text.startswith(flag) and b.shard_root in text
    assert ": not in the space of " in text and what in text


@pytest.mark.parametrize("pair", [val_data, fit_data, other_test_data, scorer, gallery])
def test_another_layer_is_refused(pair: Pair, make_shards, tmp_path: pathlib.Path) -> None:
    dpath, _ = make_shards(n_imgs=4)
    a, b = (data_config.Shards(str(dpath), layer) for layer in (3, 7))
    with pytest.raises(errors.UserError, match="layer 7 instead of 3"):
        pair(a, b, tmp_path)


def test_tokens_matter_where_scores_of_images_are_compared(make_shards, tmp_path: pathlib.Path) -> None:
    dpath, _ = make_shards(n_imgs=4)
    a, b = (data_config.Shards(str(dpath), 3, patches) for patches in ("image", "cls"))
    for pair in (val_data, other_test_data):
        with pytest.raises(errors.UserError, match=r"patches cls instead of image.*same patches"):
            pair(a, b, tmp_path)
    for pair in (fit_data, scorer):
        pair(a, b, tmp_path)


def test_an_unknown_part_of_a_space_is_not_compared() -> None:
    full = space.Space.of({"vit_family": "timm", "vit_ckpt": "vit@bf16"}, 8)
    no_family = space.Space.of({"vit_ckpt": "vit"}, 8)
    no_ckpt = space.Space.of({"vit_family": "timm"}, 8)
    for a, b in itertools.permutations((full, no_family, no_ckpt), 2):
        a.check_same(b, whose="a", flag="--data")
    for other in ({"vit_ckpt": "another"}, {"vit_family": "clip"}):
        with pytest.raises(errors.UserError, match="instead of"):
            full.check_same(space.Space.of(other, 8), whose="a", flag="--data")


def test_a_space_survives_its_description() -> None:
    for found in ({}, {"vit_family": "timm"}, {"vit_family": "timm", "vit_ckpt": "vit@bf16", "layers": [3]}):
        before = space.Space.of(found, 8)
        assert space.Space.of(before.describe(), 8) == before


@pytest.mark.parametrize("flag", ["--data", "--val-data", "--train-data"])
def test_messages_name_the_flag_of_the_command(flag: str, make_shards) -> None:
    dpath, _ = make_shards(n_imgs=4, cls_token=False)
    for change, words in (
        ({"layer": 5}, f"one of these as {flag}.layer"),
        ({"patches": "cls"}, f"Pass {flag}.patches image"),
    ):
        with pytest.raises(errors.UserError, match=words):
            activations.Activations(data_config.Shards(str(dpath), **change), flag)
    next(iter(sorted(dpath.glob("acts*.bin")))).unlink()
    (dpath / "complete.json").unlink()
    with pytest.raises(errors.UserError, match=f"{flag}.partial|missing"):
        activations.Activations(data_config.Shards(str(dpath)), flag)
