"""The numbers stay: the weights of a tiny training of each architecture and objective, a tiny protoeval table, defaults.

tests/data/golden.json holds them with the REVISIONs that they belong to. When a change is meant to give other
numbers, raise that REVISION and write the file again:

    SAEV_WRITE_GOLDEN=1 uv run pytest -n 0 tests/test_golden.py

CPUs round differently, so weights are kept as a few statistics of each tensor and compared with a tolerance. It lies
between what a relative change of 1e-6 of the activations does and what a small fault does; the tests show both.
"""

import collections.abc
import csv
import dataclasses
import json
import os
import pathlib
import typing as tp

import numpy as np
import PIL.Image
import pytest
import torch

from saev import fields, nn, scorers
from saev.data import config as data_config
from saev.demo import minicub
from saev.formats import shards
from saev.nn import config as nn_config
from saev.nn import optim
from saev.protoeval import config as protoeval_config
from saev.protoeval import experiment, run
from saev.scorers import config as scorers_config
from saev.training import config, identity, loop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

GOLDEN = pathlib.Path(__file__).parent / "data/golden.json"
TOLERANCE = 3e-4
"""Of a statistic, which is a mean (weighted by +-1 or not) in units of the tensor's root mean square."""

SAES = [
    nn_config.Relu(exp_factor=4, sparsity_coeff=1e-2, resample_every=8),
    nn_config.TopK(exp_factor=4, top_k=4, aux_k=8),
    nn_config.BatchTopK(exp_factor=4, top_k=4, aux_k=8),
    nn_config.JumpRelu(exp_factor=4, sparsity_coeff=1e-2),
]
OBJECTIVES = [nn_config.Vanilla(), nn_config.Matryoshka(n_prefixes=4)]

Statistics = dict[str, dict[str, list[float]]]
"""Run -> tensor -> its statistics."""


@pytest.fixture(params=[1, 2])
def n_threads(request: pytest.FixtureRequest) -> collections.abc.Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def write_shards(dpath: pathlib.Path, paths: list[str], noise: float = 0.0) -> data_config.Shards:
    """Four patches of width 16 for each image; each a sum of 2 of 24 atoms, an offset and a little noise."""
    rng = np.random.default_rng(0)
    n = len(paths) * 4
    atoms_AD = rng.standard_normal((24, 16))
    is_on_NA = rng.random((n, 24)).argsort(axis=1) < 2
    x_ND = (is_on_NA * rng.uniform(1, 2, (n, 24))) @ atoms_AD + rng.standard_normal(16)
    x_ND += 0.1 * rng.standard_normal((n, 16))
    x_ND *= 1 + noise * rng.standard_normal((n, 16))
    metadata = shards.Metadata(
        "timm", "golden", (3,), 4, False, 16, len(paths), 50 * 4, {"__class__": "ImageFolder"}
    )
    out = shards.ShardDir.create(dpath, metadata, [shards.Record(p, "") for p in paths], {})
    for shard_i in range(metadata.n_shards):
        with out.writing(shard_i) as writer:
            is_ = metadata.imgs_in(shard_i)
            acts = x_ND.reshape(len(paths), 1, 4, 16)[is_.start : is_.stop]
            writer.write(np.ascontiguousarray(acts, np.float32))
    return data_config.Shards(str(out.dpath), 3)


# ---- weights ----


def train(dpath: pathlib.Path, seed: int = 0, noise: float = 0.0) -> Statistics:
    data = write_shards(dpath / "shards", [f"a/{i:03}.jpg" for i in range(200)], noise)
    cfgs = [
        config.Train(
            sae=sae,
            objective=objective,
            data=data,
            n_patches=16 * 64,
            n_val_patches=64,
            batch_size=64,
            lr=3e-3,
            n_lr_warmup=2,
            n_sparsity_warmup=4 * hasattr(sae, "sparsity_coeff"),
            dead_window=128,
            log_every=1000,
            seed=seed,
            ckpt_to=str(dpath / "checkpoints"),
            wandb_project="",
            device="cpu",
        )
        for sae in SAES
        for objective in OBJECTIVES
    ]
    names = [f"{type(c.sae).__name__} {type(c.objective).__name__}" for c in cfgs]
    saes = map(nn.load, loop.main(cfgs))
    return {
        name: {key: statistics(value.double().numpy()) for key, value in sae.state_dict().items()}
        for name, sae in zip(names, saes, strict=True)
    }


def statistics(values: np.ndarray) -> list[float]:
    """Its root mean square; in units of it, the mean, the mean size, and four means with random signs."""
    flat = values.flatten()
    rms = float(np.sqrt((flat**2).mean()))
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (4, flat.size))
    means = [flat.mean(), np.abs(flat).mean(), *(signs @ flat / np.sqrt(flat.size))]
    return [round(value, 6) for value in [rms, *(float(m / (rms or 1)) for m in means)]]


def differences(got: Statistics, want: Statistics) -> dict[str, float]:
    """The largest difference of each run's statistics. Raises if the runs or their tensors are others."""
    assert {run: got[run].keys() for run in got} == {run: want[run].keys() for run in want}
    return {
        run: max(float(np.abs(np.subtract(got[run][k], want[run][k])).max()) for k in want[run])
        for run in want
    }


# ---- a table ----


def tabulate(dpath: pathlib.Path, seed: int = 0) -> list[list[str | float]]:
    """The lines of a summary.csv: scorer, numbers of prototypes and train images, mAP and its 5% and 95% quantiles."""
    with pytest.MonkeyPatch.context() as patch:  # the labels matter here, not the photos
        patch.setattr(minicub, "picture", lambda bird, rng: (PIL.Image.new("RGB", (8, 8)),) * 2)
        minicub.draw(dpath / "CUB_200_2011", n_imgs=80)
    listed = (dpath / "CUB_200_2011/images.txt").read_text().splitlines()
    data = write_shards(dpath / "shards", [line.split()[1] for line in listed])
    cfgs = [
        protoeval_config.ProtoEval(
            scorer=scorer,
            cub_root=str(dpath / "CUB_200_2011"),
            train_data=data,
            n_prototypes=(4, 16),
            n_train=(16, -1),
            n_boot=20,
            n_seeds=2,
            seed=seed,
            force=True,  # the activations know nothing of the labels
            dump_to=str(dpath / "results"),
            scorers_to=str(dpath / "scorers"),
            device="cpu",
        )
        for scorer in (scorers_config.Random(), scorers_config.KMeans(), scorers_config.Pca())
    ]
    with (pathlib.Path(run.main(cfgs)) / "summary.csv").open() as fd:
        return [
            [line["scorer"], line["n_prototypes"], line["n_train"]]
            + [round(float(line[key]), 4) for key in ("map", "q05", "q95")]
            for line in csv.DictReader(fd)
        ]


def is_same(got: list[list[str | float]], want: list[list[str | float]]) -> bool:
    """Equal rows, up to one unit of the last digit that a table shows."""
    names = [line[:3] for line in got] == [line[:3] for line in want]
    return names and np.allclose([g[3:] for g in got], [w[3:] for w in want], rtol=0, atol=1e-3)


# ---- defaults ----


def defaults(*classes: type) -> dict[str, dict[str, str]]:
    """Class -> field that determines the result -> its default. Ids of runs leave out what is at its default."""
    return {
        cls.__name__: {
            field.name: repr(getattr(field.default_factory, "__name__", field.default))
            for field in dataclasses.fields(cls)
            if field.name in fields.result_names(cls)
        }
        for cls in classes
    }


# ---- what the file holds ----


def golden(part: str, revision: list[int], numbers: object) -> object:
    """The file's numbers of one part; written first, if that was asked for."""
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("SAEV_WRITE_GOLDEN"):
        kept[part] = {"revision": revision, "numbers": numbers}
        GOLDEN.write_text(json.dumps(kept, indent=1) + "\n")
    assert kept[part]["revision"] == revision, (
        f"{part}: the REVISION has been raised; write golden.json again"
    )
    return kept[part]["numbers"]


def test_weights(n_threads: int, tmp_path: pathlib.Path) -> None:
    got = train(tmp_path)
    found = differences(got, golden("training", [identity.REVISION], got))
    assert max(found.values()) < TOLERANCE, f"{found}: raise training's REVISION, or mend the fault"


def test_table(n_threads: int, tmp_path: pathlib.Path) -> None:
    got = tabulate(tmp_path)
    want = golden("protoeval", [experiment.REVISION, scorers.REVISION], got)
    assert is_same(got, want), "raise protoeval's or the scorers' REVISION, or mend the fault"


@pytest.mark.parametrize(
    ("part", "revision", "classes"),
    [
        ("training", [identity.REVISION], (config.Train, *map(type, SAES), *map(type, OBJECTIVES))),
        ("protoeval", [experiment.REVISION], (protoeval_config.ProtoEval, data_config.Shards)),
        ("scorers", [scorers.REVISION], tp.get_args(scorers_config.Scorer)),
    ],
)
def test_defaults(part: str, revision: list[int], classes: tuple[type, ...]) -> None:
    got = defaults(*classes)
    want = golden(f"{part} defaults", revision, got)
    assert got == want, "if a default has changed, raise the REVISION; then write golden.json again"


def test_a_changed_default_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = defaults(nn_config.TopK)
    monkeypatch.setattr(nn_config.TopK.__dataclass_fields__["top_k"], "default", 33)
    assert defaults(nn_config.TopK) != before


def test_a_change_of_the_weights_shows(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding does not, but another epsilon of Adam and another seed do."""
    want = json.loads(GOLDEN.read_text())["training"]["numbers"]
    noisy = differences(train(tmp_path / "noise", noise=1e-6), want)
    assert max(noisy.values()) < TOLERANCE / 2
    reseeded = differences(train(tmp_path / "seed", seed=1), want)
    assert min(reseeded.values()) > TOLERANCE  # in every run
    monkeypatch.setattr(optim, "EPS", 1e-6)
    assert max(differences(train(tmp_path / "eps"), want).values()) > TOLERANCE


def test_a_change_of_the_table_shows(tmp_path: pathlib.Path) -> None:
    want = json.loads(GOLDEN.read_text())["protoeval"]["numbers"]
    assert not is_same(tabulate(tmp_path, seed=1), want)
