"""The sparse autoencoder against its formulas. B batch, D d_vit, S latents."""

import copy
import dataclasses
import math
import pathlib
import typing as tp

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from saev import errors, nn
from saev.formats import space
from saev.nn import activations, config, objectives

D, FACTOR, B = 6, 4, 20
CFGS = [
    config.Relu(d_vit=D, exp_factor=FACTOR, sparsity_coeff=0.03),
    config.TopK(d_vit=D, exp_factor=FACTOR, top_k=3),
    config.BatchTopK(d_vit=D, exp_factor=FACTOR, top_k=3, threshold_momentum=0.1),
    config.TopK(d_vit=D, exp_factor=FACTOR, top_k=3, normalize="per-dim"),
]
each_cfg = pytest.mark.parametrize("cfg", CFGS, ids=lambda c: type(c).__name__)


def batch(seed: int = 0, n: int = B) -> Tensor:
    """Like real activations: not centred, and of different variances."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linspace(4, 6, D) * torch.randn(n, D, generator=generator) + torch.arange(D) * 3.0


def make(cfg: config.Sae, seed: int = 1) -> nn.SparseAutoencoder:
    """Initialised from data, with perturbed biases and encoder; not trained."""
    sae = nn.SparseAutoencoder(cfg, seed)
    sae.initialize(batch())
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for p in (sae.b_enc, sae.b_dec, sae.W_enc):
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return sae


def pre_activations(sae: nn.SparseAutoencoder, x_BD: Tensor) -> np.ndarray:
    """(scale x - b_dec) W_enc + b_enc in float64, by loops over latents."""
    x_BD, W_enc = x_BD.double().numpy(), sae.W_enc.detach().double().numpy()
    b_dec, b_enc = sae.b_dec.detach().double().numpy(), sae.b_enc.detach().double().numpy()
    out_BS, scale = np.zeros((len(x_BD), sae.d_sae)), sae.scale.double().numpy()
    for b, x_D in enumerate(x_BD):
        for s in range(sae.d_sae):
            out_BS[b, s] = np.dot(x_D * scale - b_dec, W_enc[:, s]) + b_enc[s]
    return out_BS


def evaluated_code(sae: nn.SparseAutoencoder, pre_S: np.ndarray) -> np.ndarray:
    """One sample's code in evaluation mode."""
    match sae.cfg:
        case config.Relu():
            keep_S = np.ones(len(pre_S), bool)
        case config.TopK(top_k=k):
            keep_S = np.isin(np.arange(len(pre_S)), np.argsort(-pre_S)[:k])
        case config.BatchTopK():
            keep_S = pre_S > sae.threshold.item()
    return np.where(keep_S & (pre_S > 0), pre_S, 0)


@each_cfg
def test_evaluation_equals_the_formula(cfg: config.Sae) -> None:
    sae = make(cfg)
    sae(batch(3))  # sets BatchTopK's threshold
    sae.eval()
    x_BD = batch(1)
    want_BS = np.stack([evaluated_code(sae, pre_S) for pre_S in pre_activations(sae, x_BD)])
    f_BS = sae.encode(x_BD)
    assert 0 < (f_BS > 0).float().mean() < 1
    np.testing.assert_allclose(f_BS.detach(), want_BS, rtol=1e-4, atol=1e-4)

    W_dec, b_dec = sae.W_dec.detach().double().numpy(), sae.b_dec.detach().double().numpy()
    want_BD = [(f_S @ W_dec + b_dec) / sae.scale.double().numpy() for f_S in want_BS]
    np.testing.assert_allclose(sae.decode(f_BS).detach(), want_BD, rtol=1e-4, atol=1e-3)
    x_hat_BD, f_again_BS = sae(x_BD)
    assert torch.equal(f_again_BS, f_BS)
    assert torch.equal(x_hat_BD, sae.decode(f_BS))


@each_cfg
def test_a_code_does_not_depend_on_its_batch_mates(cfg: config.Sae) -> None:
    sae = make(cfg)
    for seed in range(5):
        sae(batch(seed))
    sae.eval()
    x_BD = batch(9)
    alone_BS = torch.cat([sae.encode(x_BD[i : i + 1]) for i in range(B)])
    assert torch.equal(alone_BS > 0, sae.encode(x_BD) > 0)
    torch.testing.assert_close(alone_BS, sae.encode(x_BD), rtol=1e-4, atol=1e-5)


def test_batch_top_k_uses_its_threshold_only_in_evaluation() -> None:
    sae = make(CFGS[2])
    sae(batch())
    x_BD = batch(1)
    pre_BS = pre_activations(sae, x_BD)
    sae.threshold.fill_(float(np.quantile(pre_BS, 0.99)))
    n_over = int((pre_BS > sae.threshold.item()).sum())
    assert 0 < n_over < 3 * B / 2

    assert int((sae.eval().encode(x_BD) > 0).sum()) == n_over
    assert int((sae.train().encode(x_BD) > 0).sum()) == 3 * B


def test_negative_threshold_lets_no_negative_code_through() -> None:
    sae = make(CFGS[2]).eval()
    sae.threshold.fill_(-1.0)
    assert sae.encode(batch()).min() == 0


def test_threshold_is_a_moving_average_of_the_least_code() -> None:
    sae = make(CFGS[2])
    want = None
    for seed in range(6):
        pre_BS = pre_activations(sae, batch(seed))
        kept = np.sort(pre_BS.flatten())[-3 * B :]
        least = kept[kept > 0].min()
        want = least if want is None else want + 0.1 * (least - want)
        sae(batch(seed))
        assert sae.threshold.item() == pytest.approx(want, rel=1e-4)


def test_threshold_outlives_a_batch_in_which_nothing_fires() -> None:
    sae = make(CFGS[2])
    sae(batch())
    before = sae.threshold.item()
    with torch.no_grad():
        sae.b_enc -= 1000
    sae(batch())
    assert sae.threshold.item() == before > 0


def test_evaluation_leaves_the_threshold_alone() -> None:
    sae = make(CFGS[2])
    sae(batch())
    before = sae.threshold.item()
    sae.eval()(batch(5))
    assert sae.threshold.item() == before


@each_cfg
def test_save_and_load_give_identical_outputs(cfg: config.Sae, tmp_path: pathlib.Path) -> None:
    sae = make(cfg)
    sae(batch(3))
    nn.save(sae, tmp_path / "new" / "sae.pt")
    loaded = nn.load(str(tmp_path / "new" / "sae.pt"))
    assert loaded.cfg == sae.cfg == cfg.sized()
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert sae.state_dict().keys() == loaded.state_dict().keys()
    for name, tensor in sae.eval().state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    for got, want in zip(loaded(batch(4)), sae(batch(4)), strict=True):
        assert torch.equal(got, want)


def plain_loss(cfg: config.Sae, p: dict[str, Tensor], scale: Tensor, x_BD: Tensor) -> Tensor:
    """The objective from its definition, with sorted values, one sample at a time."""
    z_BD = x_BD * scale
    pre_BS = (z_BD - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    match cfg:
        case config.Relu():
            least_B1 = torch.zeros(len(x_BD), 1)
        case config.TopK(top_k=k):
            least_B1 = pre_BS.sort(dim=1, descending=True).values[:, k - 1 : k]
        case config.BatchTopK(top_k=k):
            least_B1 = pre_BS.flatten().sort(descending=True).values[k * len(x_BD) - 1]
    f_BS = pre_BS * ((pre_BS >= least_B1) & (pre_BS > 0))
    loss = ((f_BS @ p["W_dec"] + p["b_dec"] - z_BD) ** 2).sum() / z_BD.numel()
    if isinstance(cfg, config.Relu):
        norm_S = (p["W_dec"] ** 2).sum(dim=1).sqrt()
        loss = loss + cfg.sparsity_coeff * (f_BS * norm_S).sum() / len(x_BD)
    return loss


@each_cfg
def test_loss_and_gradients_equal_the_plain_formula(cfg: config.Sae) -> None:
    sae, x_BD = make(cfg), batch(2)
    out = objectives.Objective(sae, config.Vanilla())(x_BD)
    out.loss.backward()
    params = {k: p.detach().double().requires_grad_() for k, p in sae.named_parameters()}
    want = plain_loss(cfg, params, sae.scale.double(), x_BD.double())
    want.backward()
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-4)
    for name, p in sae.named_parameters():
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad.double(), params[name].grad, rtol=1e-3, atol=1e-5)


@each_cfg
def test_gradient_equals_finite_differences(cfg: config.Sae) -> None:
    """Derivative of the loss along a random direction, in float64."""
    sae, x_BD = make(cfg).double(), batch(2).double()
    objectives.Objective(sae, config.Vanilla())(x_BD).loss.backward()
    generator = torch.Generator().manual_seed(0)
    step = {k: torch.randn(p.shape, generator=generator).double() for k, p in sae.named_parameters()}
    slope = sum((p.grad * step[k]).sum().item() for k, p in sae.named_parameters())

    def loss(eps: float) -> float:
        moved = copy.deepcopy(sae)
        with torch.no_grad():
            for k, p in moved.named_parameters():
                p += eps * step[k]
        return objectives.Objective(moved, config.Vanilla())(x_BD).loss.item()

    eps = 1e-7
    assert (loss(eps) - loss(-eps)) / (2 * eps) == pytest.approx(slope, rel=1e-4)


def test_initialize_centres_and_scales() -> None:
    sae = nn.SparseAutoencoder(CFGS[1])
    x_BD = batch()
    sae.initialize(x_BD)
    z_BD = x_BD * sae.scale - sae.b_dec.detach()
    np.testing.assert_allclose(z_BD.mean(dim=0), 0, atol=1e-5)
    assert z_BD.square().sum(dim=1).mean().item() == pytest.approx(D, rel=1e-5)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    np.testing.assert_allclose(sae.W_dec.detach().norm(dim=1), 1, rtol=1e-6)


@each_cfg
@pytest.mark.parametrize("init", ["random", "data"])
def test_initialize_survives_constant_activations(cfg: config.Sae, init: str) -> None:
    sae = nn.SparseAutoencoder(dataclasses.replace(cfg, init=init, init_blend=1.0))
    sae.initialize(torch.full((4, D), 0.1))
    assert all(t.isfinite().all() for t in sae.state_dict().values())
    np.testing.assert_allclose(sae.W_dec.detach().norm(dim=1), 1, rtol=1e-6)


def test_per_dim_gives_every_dimension_variance_1() -> None:
    x_ND = batch(n=2000) * torch.tensor([1, 1e3, 1, 1e-3, 0, 1]) + 7
    sae = nn.SparseAutoencoder(CFGS[3])
    sae.initialize(x_ND)
    z_ND = x_ND * sae.scale - sae.b_dec.detach()
    np.testing.assert_allclose(z_ND.mean(dim=0), 0, atol=1e-4)
    np.testing.assert_allclose(z_ND.double().var(dim=0, correction=0), [1, 1, 1, 1, 0, 1], atol=1e-4)
    varying = [0, 1, 2, 3, 5]
    assert sae.scale[4] == sae.scale[varying].median(), "a constant dimension is scaled like the others"
    assert sae.decode(torch.zeros(sae.d_sae))[4].item() == pytest.approx(7, rel=1e-6)


def test_directions_are_what_a_code_adds_in_raw_units() -> None:
    for sae in (make(CFGS[1]), make(CFGS[3])):
        codes_SS = torch.eye(sae.d_sae)
        added_SD = sae.decode(codes_SS) - sae.decode(torch.zeros_like(codes_SS))
        torch.testing.assert_close(sae.directions(), added_SD, rtol=1e-4, atol=1e-4)


# ---- data-point initialisation ----


@pytest.mark.parametrize("blend", [1.0, 0.8])
@pytest.mark.parametrize("cfg", [CFGS[1], CFGS[3]], ids=["scale", "per-dim"])
def test_decoder_rows_are_evenly_spaced_activations(cfg: config.Sae, blend: float) -> None:
    """By plain loops: unit vectors of (activation - mean), blended with the random ones of the same seed."""
    x_ND = batch(n=3 * D * FACTOR + 5)
    drawn_SD = nn.SparseAutoencoder(cfg, 3).W_dec.detach().double().numpy()
    sae = nn.SparseAutoencoder(dataclasses.replace(cfg, init="data", init_blend=blend), 3)
    sae.initialize(x_ND)
    assert torch.equal(sae.W_enc, sae.W_dec.T) and sae.W_enc.T.is_contiguous()
    scale, mean_D = sae.scale.double().numpy(), x_ND.double().mean(dim=0).numpy()
    rows_SD = sae.W_dec.detach().double().numpy()
    for s in range(sae.d_sae):
        away_D = (x_ND[s * len(x_ND) // sae.d_sae].double().numpy() - mean_D) * scale
        want_D = blend * away_D / np.linalg.norm(away_D) + (1 - blend) * drawn_SD[s]
        np.testing.assert_allclose(rows_SD[s], want_D / np.linalg.norm(want_D), atol=1e-5)


def test_latents_beyond_the_activations_stay_random() -> None:
    cfg = dataclasses.replace(CFGS[1], init="data", tied_init=False)
    sae, random = nn.SparseAutoencoder(cfg, 3), nn.SparseAutoencoder(cfg, 3)
    sae.initialize(batch(n=5))
    torch.testing.assert_close(sae.W_dec[5:], random.W_dec[5:])
    assert (sae.W_dec[:5] - random.W_dec[:5]).norm(dim=1).min() > 0.1
    assert torch.equal(sae.W_enc, random.W_enc), "an encoder of its own stays random"


def test_new_fields_leave_digests_of_finished_results_alone() -> None:
    """They hash the config's repr."""
    want = "d_vit=4, exp_factor=None, d_sae=8, normalize='scale', b_dec_init='mean', tied_init=True"
    assert repr(config.Relu(d_vit=4, d_sae=8)).startswith(f"Relu({want}, sparsity_coeff=0.0004")


@pytest.mark.parametrize("coeff", [0.0, 1e-3, 0.02, 1e6])
def test_jump_relus_thresholds_start_where_firing_pays(coeff: float) -> None:
    """Thresholds start at sqrt(coeff D), where f^2 / D equals the coefficient, or where one latent fires per sample."""
    sae = nn.SparseAutoencoder(config.JumpRelu(d_vit=D, exp_factor=FACTOR, sparsity_coeff=coeff))
    x_BD = batch()
    sae.initialize(x_BD)
    (threshold,) = sae.log_threshold.exp().unique().tolist()
    n_fired = (sae.encode(x_BD) > 0).sum().item()
    if coeff == 1e6:
        assert len(x_BD) - 1 <= n_fired <= len(x_BD)
    else:
        assert threshold == pytest.approx(max(0.01, (coeff * D) ** 0.5), rel=1e-5)
        assert n_fired > len(x_BD)
    given = config.JumpRelu(d_vit=D, exp_factor=FACTOR, init_threshold=0.3)
    sae = nn.SparseAutoencoder(given)
    sae.initialize(x_BD)
    torch.testing.assert_close(sae.log_threshold.exp(), torch.full((sae.d_sae,), 0.3))


def test_jump_relus_gradients_are_the_papers() -> None:
    """Rajamanoharan et al. 2024, eq. 11 and 12, by loops. Within half a width, the gradient is -theta / width; L0's is -1 / width."""
    rng = np.random.default_rng(0)
    pre_BS = torch.from_numpy(rng.normal(0.5, 0.4, (50, 6))).requires_grad_()
    threshold_S = torch.from_numpy(rng.uniform(0.3, 0.7, 6)).requires_grad_()
    g_BS, width, coeff = torch.from_numpy(rng.normal(size=(50, 6))), 0.3, 0.7
    f_BS = activations.jump(pre_BS, threshold_S, width)
    l0 = activations.fires(pre_BS, threshold_S, width).sum()
    ((f_BS * g_BS).sum() + coeff * l0).backward()
    want_S, want_BS = np.zeros(6), np.zeros((50, 6))
    for b, s in np.ndindex(50, 6):
        pre, theta, g = pre_BS[b, s].item(), threshold_S[s].item(), g_BS[b, s].item()
        if pre > theta:
            want_BS[b, s] = g
        if abs(pre - theta) < width / 2:
            want_S[s] += -theta / width * g - coeff / width
    np.testing.assert_allclose(threshold_S.grad, want_S)
    np.testing.assert_allclose(pre_BS.grad, want_BS)


def test_seed_decides_the_weights() -> None:
    a, b, c = (nn.SparseAutoencoder(CFGS[0], seed) for seed in (0, 0, 1))
    assert torch.equal(a.W_dec, b.W_dec)
    assert not torch.equal(a.W_dec, c.W_dec)


def test_normalize_decoder_gives_unit_rows_in_the_same_direction() -> None:
    sae = make(CFGS[0])
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.1, 30, sae.d_sae)[:, None]
        sae.W_dec[3] = 0
    before_SD = sae.W_dec.detach().clone()
    sae.normalize_decoder()
    for s, (w_D, old_D) in enumerate(zip(sae.W_dec.detach(), before_SD, strict=True)):
        want_D = old_D / math.sqrt(sum(v.item() ** 2 for v in old_D)) if s != 3 else old_D
        torch.testing.assert_close(w_D, want_D)


def test_remove_parallel_grad_leaves_the_orthogonal_part() -> None:
    sae = make(CFGS[0])
    objectives.Objective(sae, config.Vanilla())(batch()).loss.backward()
    before_SD = sae.W_dec.grad.clone()
    sae.remove_parallel_grad()
    for w_D, g_D, old_D in zip(sae.W_dec.detach(), sae.W_dec.grad, before_SD, strict=True):
        assert abs(torch.dot(w_D, g_D).item()) <= 1e-5 * (1 + old_D.norm().item())
        torch.testing.assert_close(g_D + torch.dot(w_D, old_D) * w_D, old_D, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(sae.W_dec.grad, before_SD)


def test_shapes_are_checked_at_run_time() -> None:
    """The shape checks work: a transposed array is refused by name."""
    sae = make(CFGS[1])
    with pytest.raises(jaxtyping.TypeCheckError):
        nn.metrics.mse(batch(), batch().T)
    with pytest.raises(errors.UserError, match=r"encode: got torch.int64 of shape \(.*last dimension is 6"):
        sae.encode(batch().long())


@pytest.mark.parametrize(
    ("cls", "fields", "match"),
    [
        (config.TopK, {"top_k": 0}, "--sae.top-k 0"),
        (config.BatchTopK, {"top_k": -1}, "--sae.top-k -1"),
        (config.BatchTopK, {"threshold_momentum": 0.0}, "--sae.threshold-momentum 0.0"),
        (config.BatchTopK, {"threshold_momentum": 1.5}, "--sae.threshold-momentum 1.5"),
        (config.Relu, {"exp_factor": 0}, "--sae.exp-factor 0"),
        (config.Relu, {"sparsity_coeff": -0.1}, "--sae.sparsity-coeff -0.1"),
    ],
)
def test_config_refuses(cls: type, fields: dict, match: str) -> None:
    with pytest.raises(errors.UserError, match=match):
        cls(**fields)


# ---- the number of latents ----


def test_size_is_given_by_either_field() -> None:
    by_factor, by_number = config.Relu(d_vit=D, exp_factor=4), config.Relu(d_vit=D, d_sae=24)
    assert by_factor.n_latents == by_number.n_latents == 24
    assert by_factor.sized() == by_number.sized() == config.Relu(exp_factor=4).sized(D)
    assert config.Relu(d_vit=D).n_latents == 16 * D
    with pytest.raises(errors.UserError, match="exp-factor 2 and --sae.d-sae 20: both give"):
        config.Relu(exp_factor=2, d_sae=20)
    with pytest.raises(errors.UserError, match="--sae.top-k 25: the dictionary has 24 latents"):
        config.TopK(d_sae=24, top_k=25)
    with pytest.raises(ValueError, match="d_vit must be set"):
        _ = config.Relu(exp_factor=2).n_latents


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"d_vit": D, "exp_factor": 10**9}, "6,000,000,000 latents of 6 dim.* take 288 GB"),
        ({"d_vit": 1024, "d_sae": 2**31}, "their weights take 17,592 GB"),
        ({"d_vit": 2**20, "d_sae": 2**30}, "take 9,007,199 GB, this job has"),
    ],
)
def test_a_dictionary_that_cannot_be_is_refused_before_it_is_made(fields: dict[str, int], match: str) -> None:
    with pytest.raises(errors.UserError, match=match):
        nn.SparseAutoencoder(config.Relu(**fields))


def test_a_size_that_is_no_multiple_is_saved_and_loaded(tmp_path: pathlib.Path) -> None:
    sae = make(config.TopK(d_vit=D, d_sae=2 * D + 1, top_k=3)).eval()
    nn.save(sae, tmp_path / "sae.pt")
    again = nn.load(tmp_path / "sae.pt")
    assert again.cfg == sae.cfg == config.TopK(d_vit=D, d_sae=2 * D + 1, top_k=3)
    assert torch.equal(again.encode(batch()), sae.encode(batch()))
    assert again.encode(batch()).shape == (B, 2 * D + 1)


# ---- inputs as people have them ----

FLOATS = [torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cfg", [*CFGS, config.JumpRelu(d_vit=D, exp_factor=FACTOR)])
def test_any_leading_shape_and_float_type(cfg: config.Sae, training: bool) -> None:
    sae = make(cfg).train(training)
    sae(batch())  # sets BatchTopK's threshold
    x = batch()
    rows = copy.deepcopy(sae)(x)  # a copy, because training mode moves BatchTopK's threshold
    for lead in [(4, 5), (2, 5, 2), (1, B), (B, 1)]:
        out = copy.deepcopy(sae)(x.reshape(*lead, D))
        for got, want in zip(out, rows, strict=True):
            assert torch.equal(got, want.reshape(*lead, want.shape[1]))
    one_x_hat, one_f = sae.eval()(x[0])
    assert one_x_hat.shape == (D,) and torch.equal(one_f, sae.encode(x[:1])[0])
    for dtype in FLOATS:
        got = sae.encode(x.to(dtype))
        assert got.dtype == torch.float32
        assert torch.equal(got, sae.encode(x.to(dtype).float()))
    for array in (x.double().numpy(), x.numpy().astype(">f4"), x.numpy().astype(np.longdouble)):
        assert torch.equal(sae.encode(array), sae.encode(x))
    f = sae.encode(x).detach()
    assert torch.equal(sae.decode(f.double().numpy()), sae.decode(f))


@pytest.mark.parametrize("cfg", [*CFGS, config.JumpRelu(d_vit=D, exp_factor=FACTOR)])
@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 3)])
def test_an_empty_batch_has_empty_codes(cfg: config.Sae, lead: tuple[int, ...]) -> None:
    for training in (True, False):
        x_hat, f = make(cfg).train(training)(torch.zeros(*lead, D))
        assert x_hat.shape == (*lead, D) and f.shape == (*lead, D * FACTOR)


def test_gradients_flow_through_other_shapes_and_types() -> None:
    sae = make(CFGS[0])
    x = batch().double().reshape(4, 5, D).requires_grad_()
    sae(x)[0].square().sum().backward()
    shaped = x.grad, sae.W_enc.grad.clone()
    sae.zero_grad()
    flat_BD = batch().requires_grad_()
    sae(flat_BD)[0].square().sum().backward()
    torch.testing.assert_close(shaped[0].float().reshape(-1, D), flat_BD.grad)
    torch.testing.assert_close(shaped[1], sae.W_enc.grad)


@pytest.mark.parametrize(
    ("x", "seen"),
    [
        (torch.zeros(3, D + 1), r"torch.float32 of shape \(3, 7\)"),
        (torch.zeros(D, dtype=torch.complex64), "torch.complex64"),
        (torch.tensor(1.0), r"torch.float32 of shape \(\)"),
        (np.zeros((3, D), int), "int64"),
        (np.zeros((3, D), object), "object"),
        (torch.zeros(3, D).to_sparse(), "torch.float32"),
        (torch.zeros(3, D, device="meta"), "torch.float32"),
    ],
)
def test_other_inputs_are_refused_in_one_line(x: tp.Any, seen: str) -> None:
    sae = make(CFGS[0])
    for call in (sae.encode, sae):
        with pytest.raises(errors.UserError, match=f"encode: got {seen}.*last dimension is 6"):
            call(x)
    with pytest.raises(errors.UserError, match="decode: got .* last dimension is 24"):
        sae.decode(x)


@each_cfg
def test_defaults_pass_their_own_checks(cfg: config.Sae) -> None:
    assert dataclasses.replace(type(cfg)()) == type(cfg)()


# ---- what it was trained on ----

TRAINED_ON = {
    "vit_family": "clip",
    "vit_ckpt": "ViT-L-14/openai",
    "layers": [13],
    "patches": "image",
    "d_vit": D,
}


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"d_vit": D + 1}, f"d_vit {D + 1} instead of {D}"),
        ({"vit_ckpt": "ViT-L-14/laion"}, "ViT ViT-L-14/laion instead of ViT-L-14/openai"),
        ({"vit_family": "siglip"}, "ViT family siglip instead of clip"),
        ({"layers": [23]}, "shards/x: not in the space of sae.pt: layer 23 instead of 13. Pass"),
    ],
)
def test_activations_of_another_vit_or_layer_are_refused(
    other: dict[str, object], match: str, tmp_path: pathlib.Path
) -> None:
    nn.save(make(CFGS[1]), tmp_path / "sae.pt", TRAINED_ON)
    sae = nn.load(tmp_path / "sae.pt")
    for same in ({}, {"vit_ckpt": "ViT-L-14/openai@bf16"}, {"patches": "cls"}):
        sae.check_fits(of(TRAINED_ON | same), "sae.pt", "shards/x")
    with pytest.raises(errors.UserError, match=match):
        sae.check_fits(of(TRAINED_ON | other), "sae.pt", "shards/x")


def of(described: dict[str, tp.Any]) -> space.Space:
    return space.Space.of(described, described["d_vit"])


def test_a_checkpoint_that_does_not_say_is_taken_at_the_users_word() -> None:
    make(CFGS[1]).check_fits(of(TRAINED_ON | {"layers": [23]}), "sae.pt", "shards/x")


def test_a_copy_keeps_what_it_was_trained_on(tmp_path: pathlib.Path) -> None:
    nn.save(make(CFGS[1]), tmp_path / "a.pt", TRAINED_ON)
    nn.save(nn.load(tmp_path / "a.pt"), tmp_path / "b.pt")
    assert nn.load(tmp_path / "b.pt").activations == TRAINED_ON
