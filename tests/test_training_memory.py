"""The memory that a training is said to take, against processes that train."""

import dataclasses
import pathlib

import pytest
import test_memory

from saev.data import config as data_config
from saev.nn import config as nn_config
from saev.training import config, memory

pytestmark = pytest.mark.slow

CASES = {
    "nothing": (nn_config.TopK(d_vit=8, exp_factor=4, top_k=3), 64, 4, 0.1),
    "weights": (nn_config.TopK(d_vit=1024, d_sae=4096), 64, 4, 0.1),
    "codes": (nn_config.Relu(d_vit=16, d_sae=2048), 16_384, 512, 0.1),
    "pool": (nn_config.TopK(d_vit=64, exp_factor=2), 256, 6000, 0.2),
}
"""SAE, batch size, images of 64 patches, --pool-gb: what takes the memory."""


def train(make_shards, tmp_path: pathlib.Path, name: str) -> tuple[config.Train, int]:
    """A training, and the bytes that it is said to take."""
    sae, batch_size, n_imgs, pool_gb = CASES[name]
    shape = {"n_imgs": n_imgs, "n_patches": 64, "d_vit": sae.d_vit, "layers": (0,)}
    dpath, _ = make_shards(**shape, cls_token=False, per_shard=1000)
    cfg = config.Train(
        sae=sae,
        data=data_config.Shards(str(dpath)),
        n_patches=batch_size * (2 if name == "weights" else 1),  # a state is saved after the first
        n_val_patches=2000,
        batch_size=batch_size,
        pool_gb=pool_gb,
        save_every=1e-9,
        ckpt_to=str(tmp_path / name),
        wandb_project="",
        device="cpu",
    )
    return cfg, memory.peak([cfg], 64 * n_imgs, 4 * sae.d_vit)


def test_the_formula_is_right_within_a_quarter(make_shards, tmp_path: pathlib.Path) -> None:
    """Above what a tiny training takes, which is the program itself."""
    cases = {name: train(make_shards, tmp_path, name) for name in CASES}
    cfgs = {name: [cfg] for name, (cfg, _) in cases.items()}
    found, (_, alone) = test_memory.measured("saev.training.loop", cfgs, tmp_path / "nothing")
    said_0, measured_0 = cases["nothing"][1], found["nothing"][1]
    assert alone == pytest.approx(said_0, rel=0.25)
    for name, (_, said) in cases.items():
        logged, taken = found[name]
        assert logged == pytest.approx(said / 1e9, abs=0.00501)
        if name != "nothing":
            assert taken - measured_0 > 150e6, name
            assert taken - measured_0 == pytest.approx(said - said_0, rel=0.25), name


def test_runs_of_a_group_and_what_they_share() -> None:
    """Weights count for each run, the stream once."""
    sae = nn_config.TopK(d_vit=384, d_sae=16_512)
    cfg = config.Train(sae=sae, batch_size=4096)
    one, two = (memory.peak([cfg] * n, 10**9, 4 * 384) for n in (1, 2))
    assert two - one == 4 * 8 * 384 * 16_512
    scaled = config.Train(sae=dataclasses.replace(sae, normalize="per-dim"), batch_size=4096)
    assert memory.peak([scaled, cfg], 10**9, 4 * 384) - two == 4 * 384 * (2**16 + 4096)
    wide = dataclasses.replace(sae, d_sae=10**5)
    random, data = (config.Train(sae=dataclasses.replace(wide, init=init)) for init in ("random", "data"))
    more = memory.peak([data], 10**9, 4 * 384) - memory.peak([random], 10**9, 4 * 384)
    assert more == 8 * 384 * (10**5 - 2**16)
    assert memory.n_start(data, 70_000) == 70_000, "there are no more"
    assert memory.peak([config.Train(sae=sae, pool_gb=1.0)], 10**9, 4 * 384) == one - 10**9
