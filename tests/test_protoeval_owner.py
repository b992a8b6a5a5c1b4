"""The protocol of the first published tables, against a plain loop over files and activations. N images, P patches, D d_vit, K prototypes."""

import pathlib

import numpy as np
import polars as pl
import pytest
import sklearn.metrics

from saev import scorers, sweeps
from saev.data import config as data_config
from saev.formats import shards
from saev.protoeval import config, labels, run

pytestmark = pytest.mark.usefixtures("undrawn")
OWNER = pathlib.Path(__file__).parent.parent / "configs" / "protoeval" / "owner.toml"
N, P, D, T, K = 60, 4, 5, 6, 32
UNSEEN_TEST, UNSEEN_TRAIN = 4, 5
"""Traits without a positive test image, and without a positive train image."""


@pytest.fixture
def files(tmp_path: pathlib.Path) -> pathlib.Path:
    """A CUB folder in which a third of the pairs are annotated twice, the second time often otherwise."""
    rng = np.random.default_rng(0)
    root = tmp_path / "CUB_200_2011"
    (root / "attributes").mkdir(parents=True)
    lines = []
    for i in range(1, N + 1):
        for t in range(1, T + 1):
            allowed = i % 2 == 1 if t - 1 == UNSEEN_TEST else i % 2 == 0 or t - 1 != UNSEEN_TRAIN
            for _ in range(1 + (rng.random() < 0.33)):
                present = int(rng.random() < 0.5 and allowed)
                lines.append(f"{i} {t} {present} {rng.integers(1, 5)} 1.0")
    text = {
        "images.txt": [f"{i} {i % 4 + 1:03}.Bird/{i}.jpg" for i in range(1, N + 1)],
        "train_test_split.txt": [f"{i} {i % 2}" for i in range(1, N + 1)],
        "image_class_labels.txt": [f"{i} {i % 4 + 1}" for i in range(1, N + 1)],
        "attributes/attributes.txt": [f"{t} has_a::{t}" for t in range(1, T + 1)],
        "attributes/image_attribute_labels.txt": lines,
    }
    for name, content in text.items():
        (root / name).write_text("\n".join(content) + "\n")
    return root


@pytest.fixture
def acts_NPD() -> np.ndarray:
    """Around a mean that is not 0: plain and centred products rank otherwise."""
    return (np.random.default_rng(1).standard_normal((N, P, D)) + 2).astype(np.float32)


@pytest.fixture
def data(tmp_path: pathlib.Path, acts_NPD: np.ndarray) -> data_config.Shards:
    metadata = shards.Metadata("timm", "x", (3,), P, False, D, N, 7 * P, {"__class__": "Cub200"})
    records = [shards.Record(f"images/{i % 4 + 1:03}.Bird/{i}.jpg", "") for i in range(1, N + 1)]
    out = shards.ShardDir.create(tmp_path / "shards", metadata, records, {})
    for shard_i in range(metadata.n_shards):
        is_ = metadata.imgs_in(shard_i)
        with out.writing(shard_i) as writer:
            writer.write(np.ascontiguousarray(acts_NPD[is_.start : is_.stop, None]))
    return data_config.Shards(str(out.dpath), 3)


def parsed(tmp_path: pathlib.Path, data: data_config.Shards, *more: str) -> list[config.ProtoEval]:
    args = ["--sweep", str(OWNER), "--train-data.shard-root", data.shard_root, "--force"]
    args += ["--cub-root", str(tmp_path / "CUB_200_2011"), "--n-prototypes", "8", str(K)]
    args += ["--n-train", "10", "-1", "--n-boot", "0", "--dump-to", str(tmp_path / "results")]
    args += ["--scorers-to", str(tmp_path / "scorers"), "--device", "cpu", *more]
    return sweeps.parse(config.ProtoEval, "", args)


def reference(
    root: pathlib.Path, acts_NPD: np.ndarray, prototype_KD: np.ndarray, rows: list[int]
) -> tuple[list[int], list[float]]:
    """Chosen prototype and test AP of each trait: the owner's loops, with scikit-learn's AP. rows: train images, by image id."""
    label: dict[tuple[int, int], bool] = {}
    for line in (root / "attributes/image_attribute_labels.txt").read_text().splitlines():
        i, t, present, certainty, *_ = line.split()
        label[int(i), int(t)] = present == "1" and certainty in ("3", "4")
    score = {
        i: [max(float(patch @ p) for patch in acts_NPD[i - 1]) for p in prototype_KD] for i in range(1, N + 1)
    }

    def ap(images: list[int], t: int, k: int) -> float:
        truth = [label[i, t] for i in images]
        return (
            float(sklearn.metrics.average_precision_score(truth, [score[i][k] for i in images]))
            if any(truth)
            else 0.0
        )

    chosen, tested = [], []
    for t in range(1, T + 1):
        aps = [ap(rows, t, k) for k in range(len(prototype_KD))]
        chosen.append(aps.index(max(aps)))
        tested.append(ap([i for i in range(1, N + 1) if i % 2 == 0], t, chosen[-1]))
    return chosen, tested


def test_the_sweep_file_equals_the_owners_loops(
    tmp_path: pathlib.Path, files: pathlib.Path, data: data_config.Shards, acts_NPD: np.ndarray
) -> None:
    (cfg,) = parsed(tmp_path, data)
    dpath = pathlib.Path(run.main([cfg]))
    (fpath,) = (tmp_path / "scorers").glob("random-*.bin")
    prototype_KD = scorers.load(fpath).vectors_KD.numpy()
    trained_on = {patch.tobytes() for patch in acts_NPD[0::2].reshape(-1, D)}  # ids 1, 3, ...
    assert {p.tobytes() for p in prototype_KD} <= trained_on
    lines = pl.read_parquet(dpath / "traits.parquet").to_dicts()
    for k in (8, K):
        mine = [x for x in lines if (x["scorer"], x["n_prototypes"]) == ("Random", k)]
        mine = [x for x in mine if x["n_train"] == N // 2]
        chosen, tested = reference(files, acts_NPD, prototype_KD[:k], list(range(1, N + 1, 2)))
        assert [x["prototype"] for x in mine] == chosen
        assert [x["test_ap"] for x in mine] == pytest.approx(tested, abs=1e-12)
        assert tested[UNSEEN_TEST] == 0 and chosen[UNSEEN_TRAIN] == 0
        summary = (dpath / "summary.csv").read_text().splitlines()
        (line,) = [x.split(",") for x in summary if x.startswith(f"Random,{k},{N // 2},")]
        assert float(line[3]) == pytest.approx(np.mean(tested), abs=1e-12)
    table = (dpath / "table.md").read_text()
    for text in (
        "1 trait(s) without a positive test image count as AP 0",
        "the last annotation counts",
        "similarity plain x . p",
        "fitted on 30 train images",
        "chosen on 30 train images, measured on 30 test images",
    ):
        assert text in table
    constant = [x["test_ap"] for x in lines if x["scorer"] == "constant"]
    assert constant[UNSEEN_TEST] == 0


def test_swapped_splits_equal_an_exchanged_split_file(
    tmp_path: pathlib.Path, files: pathlib.Path, data: data_config.Shards
) -> None:
    swapped = pathlib.Path(run.main(parsed(tmp_path, data, "--swap-splits")))
    usual = pathlib.Path(run.main(parsed(tmp_path, data)))
    split = "".join(f"{i} {1 - i % 2}\n" for i in range(1, N + 1))
    (files / "train_test_split.txt").write_text(split)
    exchanged = pathlib.Path(run.main(parsed(tmp_path, data)))
    assert len({swapped, usual, exchanged}) == 3
    want, got = ((d / "summary.csv").read_text() for d in (exchanged, swapped))
    assert got == want != (usual / "summary.csv").read_text()
    table = (swapped / "table.md").read_text()
    assert (
        "chosen on 30 test images, measured on 30 train images (splits swapped: below, train images are CUB's test images"
        in table
    )
    assert "fitted on 30 test images" in table
    said: list[str] = []
    labels.describe(parsed(tmp_path, data, "--swap-splits"), said.append)
    assert "chosen on the test images and measured on the train images" in "\n".join(said)
    assert "30 train images (1 in train_test_split.txt), 30 test images (0)" in said[0]


def test_fit_data_that_holds_test_images_is_named(
    tmp_path: pathlib.Path, files: pathlib.Path, data: data_config.Shards
) -> None:
    fit = ("--fit-data.shard-root", data.shard_root)
    alone, beside = parsed(tmp_path, data), parsed(tmp_path, data, *fit)
    table = (pathlib.Path(run.main([*alone, *beside])) / "table.md").read_text()
    place = f"of {pathlib.Path(data.shard_root).name[:8]} layer"
    assert f"| Random fit on train images {place}" in table
    assert f"| Random fit on all images {place}" in table
    assert "fitted on all 60 images of --fit-data, 30 of them test images that are measured on" in table
    assert len(list((tmp_path / "scorers").glob("random-*.bin"))) == 2
