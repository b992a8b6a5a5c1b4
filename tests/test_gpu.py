"""What a GPU computes, against float64 on a CPU: training steps, scores, fits, a ViT. B batch, D d_vit, S latents, K prototypes.

On a CPU the same tests run with torch's operations instead of the CPU kernels, so that they are right before a GPU sees them.
"""

import copy
import dataclasses
import pathlib

import numpy as np
import pytest
import test_nn_sparse as sparse_cases
import torch

from saev import scorers
from saev.data import activations, ordered, vits
from saev.data import config as data_config
from saev.nn import config as nn_config
from saev.nn import kernels, objectives, optim
from saev.scorers import config as scorers_config
from saev.scorers import kmeans, pca
from saev.scorers import sae as sae_scorer
from saev.training import config as training_config
from saev.training import run


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(kernels, "available", lambda _: False)
    return torch.device(request.param)


# ---- training ----


@pytest.mark.parametrize(
    ("architecture", "objective"),
    [*((name, "vanilla") for name in sparse_cases.ARCHITECTURES), ("top-k", "sampled"), ("relu", "fixed")],
)
@pytest.mark.gpu
def test_steps(architecture: str, objective: str) -> None:
    """`test_nn_sparse` does the same on a CPU, with torch's operations too."""
    device = torch.device("cuda")
    cfg, goal = sparse_cases.ARCHITECTURES[architecture], sparse_cases.OBJECTIVES[objective]
    sae = sparse_cases.make(cfg).to(device)
    loss, adam = objectives.Objective(sae, goal), optim.Adam(sae, max_norm=0.3)
    for step in range(sparse_cases.N_STEPS):
        lengths = objectives.prefixes(goal, sparse_cases.S, 0, step)
        sae.zero_grad()
        end_P = None if lengths is None else torch.tensor(lengths, device=device)
        dead_C = torch.arange(30, 38, device=device)
        loss(sparse_cases.batch(step).to(device), end_P=end_P, dead_C=dead_C).loss.backward()
        adam.step(1e-4)
    want = sparse_cases.train_plainly(cfg, goal, torch.float64).state_dict()
    for name, tensor in sae.state_dict().items():
        torch.testing.assert_close(tensor.double().cpu(), want[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", sparse_cases.ARCHITECTURES)
def test_gradients_in_bfloat16(architecture: str, device: torch.device) -> None:
    """bfloat16 has 8 bits: gradients are those of float64 within a few percent."""
    cfg = sparse_cases.ARCHITECTURES[architecture]
    low, high = sparse_cases.make(cfg).to(device), sparse_cases.make(cfg, torch.float64)
    x_BD = sparse_cases.batch(3, 400)
    out = objectives.Objective(low, nn_config.Vanilla(), is_bfloat16=True)(x_BD.to(device))
    want = sparse_cases.plain_loss(high, x_BD.double(), [sparse_cases.S], None)
    out.loss.backward(), want.backward()
    assert out.loss.item() == pytest.approx(want.item(), rel=0.02)
    for (name, mine), theirs in zip(low.named_parameters(), high.parameters(), strict=True):
        difference = (mine.grad.double().cpu() - theirs.grad).norm() / theirs.grad.norm()
        assert difference < 0.1, name


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_saved_state_goes_on_to_the_same_weights(name: str, tmp_path: pathlib.Path) -> None:
    device = torch.device(name)
    cfg = training_config.Train(sae=sparse_cases.ARCHITECTURES["batch-top-k"], batch_size=40, n_patches=4000)
    whole, half = (run.Run(cfg, tmp_path, device) for _ in range(2))
    for one in (whole, half):
        one.start(sparse_cases.batch(0, 400).to(device))
        for step in range(20):
            one.step(step, sparse_cases.batch(step).to(device))
    again = run.Run(cfg, tmp_path, device)
    again.restore(copy.deepcopy(half.state()))
    for step in range(20, 30):
        for one in (whole, again):
            one.step(step, sparse_cases.batch(step).to(device))
    for key, tensor in whole.finished().state_dict().items():
        assert torch.equal(tensor, again.finished().state_dict()[key]), key


# ---- scores and fits ----


@pytest.mark.parametrize("kind", ["dot", "cosine", "distance", "top-k", "batch-top-k", "relu", "jump-relu"])
def test_scores_of_images(kind: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x_NPD = 3 * torch.randn(20, 9, sparse_cases.D, generator=generator)
    if kind in sparse_cases.ARCHITECTURES:
        sae = sparse_cases.make(sparse_cases.ARCHITECTURES[kind]).eval().requires_grad_(False)
        sae.threshold.fill_(0.5)
        scorer = sae_scorer.SaeLatents(sae, sae.d_sae)
        want_NPK = copy.deepcopy(sae).double().encode(x_NPD.double())
    else:
        p_KD = torch.randn(30, sparse_cases.D, generator=generator)
        mean_D = torch.randn(sparse_cases.D, generator=generator)
        scorer = scorers.Prototypes.of(p_KD - mean_D, mean_D, kind)
        p_KD, x = (scorer.direction_KD.double(), x_NPD.double() - mean_D.double())
        want_NPK = {
            "dot": lambda: x @ p_KD.T,
            "cosine": lambda: (x @ p_KD.T) / x.norm(dim=2, keepdim=True) / p_KD.norm(dim=1),
            "distance": lambda: -((x[:, :, None] - p_KD) ** 2).sum(dim=3),
        }[kind]()
    got_NK = scorer.to(device).of_images(x_NPD.to(device))
    torch.testing.assert_close(got_NK.double().cpu(), want_NPK.amax(dim=1), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_fits(make_shards, device: torch.device) -> None:
    """Lloyd's passes written out, and the eigenvectors of the covariance, in float64."""
    dpath, _ = make_shards(n_imgs=60, n_patches=16, d_vit=8, cls_token=False, per_shard=20)
    data = data_config.Shards(str(dpath), 3)
    x_BD = np.concatenate([b.act_NXD for b in ordered.Ordered(data)]).reshape(-1, 8).astype(np.float64)
    mean_D, start_KD = x_BD.mean(axis=0), x_BD[:: len(x_BD) // 6][:6]
    state = kmeans.State(*(torch.from_numpy(a).float().to(device) for a in (mean_D, start_KD - mean_D)))
    for _ in range(3):
        kmeans.one_pass([state], activations.Activations(data), scorers_config.KMeans())
    center_KD = start_KD
    for _ in range(3):
        nearest_B = ((x_BD[:, None] - center_KD) ** 2).sum(axis=2).argmin(axis=1)
        center_KD = np.stack([x_BD[nearest_B == k].mean(axis=0) for k in range(6)])
    np.testing.assert_allclose(state.center_KD.cpu().numpy() + mean_D, center_KD, atol=1e-4)

    values_D, vectors_DD = np.linalg.eigh(np.cov(x_BD.T))
    first_D = pca.fit(activations.Activations(data), device).prefix(1).direction_KD[0].double().cpu().numpy()
    assert abs(first_D @ vectors_DD[:, -1]) / np.linalg.norm(first_D) > 1 - 1e-5 and values_D[-1] > 0


# ---- a ViT ----


def test_a_vits_activations(device: torch.device) -> None:
    cfg = data_config.Vit("timm", "vit_tiny_patch16_224", "random", img_size=64)
    vit, wide = vits.load(cfg), vits.load(cfg)
    wide.load_state_dict(vit.state_dict())
    imgs_NCHW = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    layers = (0, vit.n_blocks - 1)
    with torch.inference_mode():
        want = wide.double()(imgs_NCHW.double(), layers)
        got = vit.to(device)(imgs_NCHW.to(device), layers)
    torch.testing.assert_close(got.double().cpu(), want.double(), rtol=1e-3, atol=1e-3)


def test_every_field_of_a_batch_is_on_the_device(device: torch.device, tmp_path: pathlib.Path) -> None:
    cfg = training_config.Train(sae=sparse_cases.ARCHITECTURES["relu"], batch_size=40, n_patches=4000)
    one = run.Run(dataclasses.replace(cfg, ema=0.9), tmp_path, device)
    one.start(sparse_cases.batch(0, 400).to(device))
    out = one.step(0, sparse_cases.batch(1).to(device))
    tensors = [out.loss, out.reconstruction, out.x_hat_BD, out.values, out.fired_S, *one.sae.parameters()]
    assert {t.device.type for t in tensors} == {device.type}
