"""Evaluation after training, against plain formulas over all activations at once. B batch, D d_vit, S latents."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch

from saev import errors, nn
from saev.data import activations
from saev.data import config as data_config
from saev.nn import config as nn_config
from saev.nn import metrics
from saev.training import config, evaluate, loop, runs


def held_out(cfg: config.Train) -> activations.Activations:
    return activations.Activations(cfg.val_data, "--val-data")


@pytest.fixture
def trained(make_shards, tmp_path: pathlib.Path) -> tuple[config.Train, pathlib.Path, np.ndarray]:
    """(config, run directory, held-out activations): 100 training activations, 60 held out, far from zero."""
    rng = np.random.default_rng(0)
    acts = 50 + rng.standard_normal((25, 1, 4, 8), np.float32)
    held_out_acts = 50 + rng.standard_normal((15, 1, 4, 8), np.float32)
    more = {"n_patches": 4, "d_vit": 8, "layers": (0,), "cls_token": False, "per_shard": 4}
    shards, _ = make_shards(n_imgs=25, acts=acts, **more)
    val_shards, _ = make_shards(n_imgs=15, acts=held_out_acts, **more)
    cfg = config.Train(
        sae=nn_config.BatchTopK(exp_factor=4, top_k=3),
        data=data_config.Shards(str(shards)),
        val_data=data_config.Shards(str(val_shards)),
        n_patches=30 * 16,
        batch_size=16,
        ckpt_to=str(tmp_path / "ck"),
        wandb_project="",
        device="cpu",
    )
    (fpath,) = loop.main([cfg])
    return cfg, pathlib.Path(fpath).parent, held_out_acts.reshape(-1, 8)


def test_metrics_are_those_of_all_held_out_activations(trained) -> None:
    _, dpath, x_ND = trained
    found = json.loads((dpath / "metrics.json").read_text())
    x_BD = torch.from_numpy(x_ND)
    x_hat_BD, f_BS = nn.load(dpath / "sae.pt")(x_BD)
    assert (found["held_out"], found["n"], found["n_latents"]) == (True, 60, 32)
    recon = ("mse", "normalized_mse", "explained_variance", "explained_variance_per_dim")
    for name in recon:
        want = getattr(metrics, name)(x_BD.double().float(), x_hat_BD)
        assert found[name] == pytest.approx(want, rel=1e-3), name
    fires_BS = f_BS > 0
    assert found["l0_count"] == pytest.approx(fires_BS.sum(dim=1).double().mean().item())
    assert found["l0"] == pytest.approx(metrics.l0(f_BS))
    assert found["l1"] == pytest.approx(metrics.l1(f_BS), rel=1e-5)
    assert found["n_dead"] == (~fires_BS).all(dim=0).sum()
    assert found["dead_pct"] == pytest.approx(found["n_dead"] / 32)
    assert found["mean_abs_corr"] == pytest.approx(metrics.mean_abs_corr(f_BS), rel=1e-4)
    W_dec = nn.load(dpath / "sae.pt").W_dec
    assert found["coherence"] == pytest.approx(metrics.coherence(W_dec), rel=1e-6)
    assert found["avg_w_col_norm"] == pytest.approx(metrics.avg_w_col_norm(W_dec), rel=1e-6)
    last = json.loads((dpath / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["grad_norm"] == last["grad_norm"] > 0, "of the last step"
    assert found["n_dense"] == (fires_BS.float().mean(dim=0) > 0.1).sum()
    assert 0 < found["n_dense"] < 32

    latents = np.load(dpath / "latents.npz")
    np.testing.assert_array_equal(latents["n_fired"], fires_BS.sum(dim=0))
    np.testing.assert_allclose(latents["frequency"], fires_BS.double().mean(dim=0))
    np.testing.assert_allclose(latents["max_value"], f_BS.amax(dim=0), rtol=1e-6)
    total_S, n_S = f_BS.double().sum(dim=0).numpy(), fires_BS.sum(dim=0).numpy()
    want_S = np.divide(total_S, n_S, out=np.zeros(32), where=n_S > 0)
    np.testing.assert_allclose(latents["mean_value"], want_S, rtol=1e-6)


def test_batches_of_any_size_add_up_to_the_same(trained) -> None:
    _, dpath, x_ND = trained
    sae, x_BD = nn.load(dpath / "sae.pt"), torch.from_numpy(x_ND)
    results = []
    for size in (1, 7, 60):
        sums = evaluate.Sums(sae)
        for part_BD in x_BD.split(size):
            sums.add(part_BD)
        results.append(sums.metrics())
    assert results[0] == pytest.approx(results[2], rel=1e-4)
    assert results[1] == pytest.approx(results[2], rel=1e-4)


def test_without_held_out_activations_it_says_so(trained) -> None:
    cfg, _, _ = trained
    alone = config.Train(**{**vars(cfg), "val_data": data_config.Shards(), "seed": 1})
    (fpath,) = loop.main([alone])
    found = json.loads((pathlib.Path(fpath).parent / "metrics.json").read_text())
    assert (found["held_out"], found["n"]) == (False, 100)


def test_fewer_activations_on_request(trained) -> None:
    cfg, dpath, _ = trained
    (dpath / "metrics.json").unlink()
    fewer = config.Train(**{**vars(cfg), "n_val_patches": 50})
    evaluate.ensure(dpath, fewer, held_out(cfg))
    assert json.loads((dpath / "metrics.json").read_text())["n"] == 50


def test_a_run_killed_before_its_evaluation_is_evaluated_by_the_same_command(trained) -> None:
    cfg, dpath, _ = trained
    before = (dpath / "metrics.json").read_text()
    stamp = (dpath / "sae.pt").stat().st_mtime_ns
    (dpath / "metrics.json").unlink()
    loop.main([cfg])
    assert (dpath / "metrics.json").read_text() == before
    assert (dpath / "sae.pt").stat().st_mtime_ns == stamp


def test_other_held_out_activations_are_evaluated_anew(trained, make_shards) -> None:
    """The same command with another --val-data; without one, the held-out figures stay."""
    cfg, dpath, _ = trained
    before = (dpath / "metrics.json").read_text()
    loop.main([config.Train(**{**vars(cfg), "val_data": data_config.Shards()})])
    assert (dpath / "metrics.json").read_text() == before
    more = {"n_patches": 4, "d_vit": 8, "layers": (0,), "cls_token": False, "per_shard": 4}
    other, _ = make_shards(n_imgs=9, **more)
    loop.main([config.Train(**{**vars(cfg), "val_data": data_config.Shards(str(other))})])
    found = json.loads((dpath / "metrics.json").read_text())
    assert found["data"]["shard_root"] == str(other) and found["n"] == 36


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"d_vit": 16}, "--val-data.shard-root .*: d_vit 16 instead of 8"),
        ({"layers": (3,)}, "layer 3 instead of 0"),
    ],
)
def test_held_out_activations_of_another_kind_are_refused_before_training(
    trained, make_shards, more: dict[str, object], match: str
) -> None:
    cfg, dpath, _ = trained
    shape = {"n_imgs": 9, "n_patches": 4, "d_vit": 8, "layers": (0,), **more}
    other, _ = make_shards(cls_token=False, per_shard=4, **shape)
    val_data = data_config.Shards(str(other))
    for bad in (val_data, data_config.Shards("gone")):
        with pytest.raises(errors.UserError, match=match if bad is val_data else "gone"):
            loop.main([config.Train(**{**vars(cfg), "val_data": bad, "seed": 5})])
    assert [d.name for d in dpath.parent.iterdir()] == [dpath.name], "nothing was trained"


def test_constant_activations_have_no_normalised_error(trained) -> None:
    _, dpath, _ = trained
    sums = evaluate.Sums(nn.load(dpath / "sae.pt"))
    sums.add(torch.full((5, 8), 50.0))
    found = sums.metrics()
    assert found["normalized_mse"] is None and found["explained_variance"] is None
    assert math.isfinite(found["mse"])
    json.dumps(found, allow_nan=False)


def test_how_rare_and_how_common(trained) -> None:
    """A latent that fires once in 200,000 is almost dead, one that fires on a fifth is dense."""
    _, dpath, _ = trained
    sums = evaluate.Sums(nn.load(dpath / "sae.pt"))
    sums.n = 200_000
    sums.n_fired_S[:] = 1000
    sums.n_fired_S[:3] = torch.tensor([0.0, 1.0, 40_000.0])
    found = sums.metrics()
    assert (found["n_dead"], found["n_almost_dead"], found["n_dense"]) == (1, 1, 1)


def test_negative_codes_fire(trained) -> None:
    """Checkpoints of other tools may have them."""
    _, dpath, _ = trained
    sae = nn.load(dpath / "sae.pt")
    f_BS = torch.tensor([[-2.0, 0, 1, -3e-9], [0, 0, 3, 0]])
    sae.forward = lambda x_BD: (x_BD, torch.nn.functional.pad(f_BS, (0, 28)))
    sums = evaluate.Sums(sae)
    sums.add(torch.randn(2, 8))
    found = sums.metrics()
    assert (found["l0_count"], found["n_dead"]) == (1.5, 30)
    assert found["l1"] == pytest.approx(6 / 64)


def test_figures_of_an_older_version_are_computed_anew(trained) -> None:
    cfg, dpath, _ = trained
    before = json.loads((dpath / "metrics.json").read_text())
    old = {k: v for k, v in before.items() if k != "explained_variance_per_dim"}
    (dpath / "metrics.json").write_text(json.dumps({**old, "explained_variance": 0.5}))
    evaluate.ensure(dpath, cfg, held_out(cfg))
    assert json.loads((dpath / "metrics.json").read_text()) == before
    (dpath / "metrics.jsonl").unlink()
    (dpath / "metrics.json").unlink()
    evaluate.ensure(dpath, cfg, held_out(cfg))
    after = json.loads((dpath / "metrics.json").read_text())
    assert after.pop("xxh3_128") != before.pop("xxh3_128")
    assert after == {**before, "grad_norm": None}


def test_changed_figures_are_computed_anew_and_not_reported(trained) -> None:
    cfg, dpath, _ = trained
    for name in ("config.json", "metrics.json"):
        content = (dpath / name).read_bytes()
        for i in range(3, 8 * len(content), 1 + len(content) // 2):
            bad = bytearray(content)
            bad[i // 8] ^= 1 << i % 8
            (dpath / name).write_bytes(bad)
            with pytest.raises(errors.UserError, match=rf"^{dpath / name}: [^\n]*Leave that run out"):
                runs.read((str(dpath),))
            evaluate.ensure(dpath, cfg, held_out(cfg))
            assert name == "config.json" or (dpath / name).read_bytes() == content, i
        (dpath / name).write_bytes(content)
