"""Sparse codes against dense ones, and kernels against torch and plain loops. B batch, D d_vit, S latents, n codes."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch_adam
from torch import Tensor

from saev import nn
from saev.nn import activations, config, kernels, objectives, optim, sparse
from saev.nn.sae import geometric_median

D, S, B = 12, 48, 40
N_STEPS = 20

ARCHITECTURES = {
    "top-k": config.TopK(d_vit=D, exp_factor=4, top_k=5),
    "batch-top-k": config.BatchTopK(d_vit=D, exp_factor=4, top_k=5),
    "relu": config.Relu(d_vit=D, exp_factor=4, sparsity_coeff=0.02),
    "jump-relu": config.JumpRelu(d_vit=D, exp_factor=4, sparsity_coeff=0.02, bandwidth=0.3),
}
SIGNED = config.TopK(d_vit=D, d_sae=S, top_k=30, keep_negative=True)
"""k is so large that most rows have fewer than k positive pre-activations."""
OBJECTIVES = {
    "vanilla": config.Vanilla(),
    "fixed": config.Matryoshka(n_prefixes=4, prefixes="fixed"),
    "sampled": config.Matryoshka(n_prefixes=4),
}
each = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
each_way = pytest.mark.parametrize("way", ["dense", "sparse"])


@pytest.fixture(params=["screened", "float32", "torch"])
def screened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Kernels with and without bfloat16 screening, on any processor; and the torch operations that a GPU uses."""
    monkeypatch.setattr(sparse.search, "_multiplies_bfloat16", lambda: request.param == "screened")
    if request.param == "torch":
        monkeypatch.setattr(kernels, "available", lambda t: False)
    return request.param == "screened"


def batch(seed: int, n: int = B, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, D, generator=generator) + torch.arange(D) / 4).to(dtype)


def make(cfg: config.Sae, dtype: torch.dtype = torch.float32) -> nn.SparseAutoencoder:
    sae = nn.SparseAutoencoder(cfg, 1)
    sae.initialize(batch(0, 200))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in (sae.b_enc, sae.b_dec):
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return sae.to(dtype)


# ---- training equals plain dense autograd ----


def plain_loss(sae: nn.SparseAutoencoder, x_BD: Tensor, ends: list[int], dead_C: Tensor | None) -> Tensor:
    """Written out with dense tensors."""
    cfg = sae.cfg
    z_BD = x_BD * sae.scale
    pre_BS = (z_BD - sae.b_dec) @ sae.W_enc + sae.b_enc
    f_BS = sae.encode(x_BD)
    loss = 0.0
    for end in ends:
        x_hat_BD = f_BS[:, :end] @ sae.W_dec[:end] + sae.b_dec
        loss = loss + ((x_hat_BD - z_BD) ** 2).sum() / z_BD.numel() / len(ends)
    if isinstance(cfg, config.Relu):
        norm_S = (sae.W_dec**2).sum(dim=1).sqrt()
        loss = loss + cfg.sparsity_coeff * (f_BS * norm_S).sum() / len(x_BD)
    if isinstance(cfg, config.JumpRelu):
        fires_BS = activations.fires(pre_BS, sae.log_threshold.exp(), cfg.bandwidth)
        loss = loss + cfg.sparsity_coeff * fires_BS.sum() / len(x_BD)
    if dead_C is not None and hasattr(cfg, "aux_coeff"):
        error_BD = (z_BD - x_hat_BD).detach()
        k = min(D // 2, len(dead_C))
        pre_BC = pre_BS[:, dead_C]
        values_BK, which_BK = pre_BC.topk(k, dim=1)
        f_BC = torch.zeros_like(pre_BC).scatter(1, which_BK, values_BK.relu())
        aux = ((f_BC @ sae.W_dec[dead_C] - error_BD) ** 2).mean() / (error_BD**2).mean()
        loss = loss + cfg.aux_coeff * k / (D // 2) * aux
    return loss


def clip(sae: nn.SparseAutoencoder, max_norm: float) -> float:
    """Returns the norm before clipping. (torch's function adds 1e-6 to it.)"""
    grads = [p.grad for p in sae.parameters() if p.grad is not None]
    norm = sum((g**2).sum() for g in grads) ** 0.5
    for g in grads:
        g *= min(1.0, max_norm / norm)
    return norm.item()


@functools.cache
def train_plainly(cfg: config.Sae, objective: config.Objective, dtype: torch.dtype) -> nn.SparseAutoencoder:
    sae = make(cfg, dtype)
    optimizer = torch_adam.Adam(sae.parameters())
    for step in range(N_STEPS):
        ends = objectives.prefixes(objective, S, 0, step) or [S]
        optimizer.zero_grad()
        plain_loss(sae, batch(step, dtype=dtype), ends, torch.arange(30, 38)).backward()
        sae.remove_parallel_grad()
        clip(sae, 0.3)
        optimizer.step(1e-4)
        sae.normalize_decoder()
    return sae


@pytest.mark.slow
@each
@each_objective
@each_way
@pytest.mark.parametrize(
    ("dtype", "atol", "screened"),
    [
        *((torch.float64, 1e-9, way) for way in ("float32", "torch")),  # only float32 is screened
        *((torch.float32, 1e-5, way) for way in ("screened", "float32", "torch")),
    ],
    indirect=["screened"],
)
def test_steps_equal_dense_autograd(
    architecture: str, objective: str, way: str, dtype: torch.dtype, atol: float, screened: bool
) -> None:
    """With clipping, AuxK and Adam. In float64 the match is so close that the same latents were chosen."""
    check_steps(ARCHITECTURES[architecture], OBJECTIVES[objective], way, dtype, atol)


@pytest.mark.slow
@each_way
def test_steps_with_negative_values(way: str, screened: bool) -> None:
    check_steps(SIGNED, OBJECTIVES["fixed"], way, torch.float64, 1e-9)


def check_steps(cfg: config.Sae, goal: config.Objective, way: str, dtype: torch.dtype, atol: float) -> None:
    sae = make(cfg, dtype)
    loss = objectives.Objective(sae, goal, way=way)
    adam = optim.Adam(sae, max_norm=0.3)
    for step in range(N_STEPS):
        lengths = objectives.prefixes(goal, S, 0, step)
        sae.zero_grad()
        out = loss(
            batch(step, dtype=dtype),
            end_P=None if lengths is None else torch.tensor(lengths),
            dead_C=torch.arange(30, 38),
        )
        out.loss.backward()
        adam.step(1e-4)
    want = train_plainly(cfg, goal, dtype)
    for name, tensor in sae.state_dict().items():
        torch.testing.assert_close(tensor, want.state_dict()[name], rtol=0, atol=atol)
    assert (sae.b_enc - make(cfg, dtype).b_enc).abs().max() > 1e-3, "it did train"


@each
@each_way
def test_outputs_equal_the_models_own(architecture: str, way: str, screened: bool) -> None:
    check_outputs(make(ARCHITECTURES[architecture]), way)


@each_way
def test_negative_values_equal_the_models_own(way: str, screened: bool) -> None:
    sae = make(SIGNED)
    f_BS = check_outputs(sae, way)
    assert (f_BS < 0).any() and ((f_BS != 0).sum(dim=1) == 30).all()
    with torch.no_grad():
        sae.b_enc[7] = -0.1  # fires only with negative values
        sae.W_enc[:, 7] = 0
    f_BS = check_outputs(sae, way)
    assert (f_BS[:, 7] < 0).any() and (f_BS[:, 7] <= 0).all()


def check_outputs(sae: nn.SparseAutoencoder, way: str) -> Tensor:
    """Compares the outputs of a training step; returns the codes."""
    x_BD = batch(3)
    out = objectives.Objective(sae, config.Vanilla(), way=way)(x_BD)
    x_hat_BD, f_BS = sae(x_BD)
    assert 0 < (f_BS > 0).float().mean() < 1
    torch.testing.assert_close(out.dense(), f_BS.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.x_hat_BD, x_hat_BD.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(out.fired_S, (f_BS != 0).any(dim=0))
    return f_BS.detach()


def test_relu_takes_the_sparse_way_once_few_latents_fire() -> None:
    sae, x_BD = make(ARCHITECTURES["relu"]), batch(3)
    loss = objectives.Objective(sae, config.Vanilla())
    assert isinstance(loss(x_BD).codes, Tensor), "half of them fire"
    with torch.no_grad():
        sae.b_enc -= 3.0
    assert isinstance(loss(x_BD).codes, Tensor), "it cannot know yet"
    assert isinstance(loss(x_BD).codes, sparse.Codes)
    with torch.no_grad():
        sae.b_enc += 3.0
    assert isinstance(loss(x_BD).codes, sparse.Codes)
    assert isinstance(loss(x_BD).codes, Tensor), "and back"


# ---- derivatives ----


def index_of(rows: list[list[int]], n_latents: int) -> sparse.Index:
    lengths = [len(row) for row in rows]
    start = np.concatenate([[0], np.cumsum(lengths)])
    flat = [s for row in rows for s in row]
    return sparse.Index(torch.tensor(flat).int(), torch.tensor(start).int(), n_latents)


ROWS = [[0, 3, 4], [], [1], [0, 1, 2, 3, 4], [4]]


def test_gradcheck_decode() -> None:
    index = index_of(ROWS, 6)
    generator = torch.Generator().manual_seed(0)
    f_n = torch.randn(10, generator=generator, dtype=torch.float64, requires_grad=True)
    W_SD = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f, W: sparse.decode(f, W, index), (f_n, W_SD))


def test_gradcheck_encode() -> None:
    index = index_of(ROWS, 6)
    generator = torch.Generator().manual_seed(0)
    W, b, c, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(3, 6), (6,), (3,), (5, 3)]
    )
    params = [t.requires_grad_() for t in (W, b, c)]

    def encode(*p: Tensor) -> Tensor:
        value_n = sparse.pre_activations(*p, x)[index.row_n, index.latent_n]
        return sparse.encode_at(*p, x, index, value_n.detach())

    assert torch.autograd.gradcheck(encode, params)
    assert torch.autograd.gradcheck(lambda *p: sparse.pre_activations(*p, x), params)


@each
@each_objective
@each_way
def test_gradcheck_of_the_whole_loss(architecture: str, objective: str, way: str) -> None:
    """In float64, for every parameter except JumpReLU's threshold, whose straight-through gradient is not a derivative."""
    sae = make(ARCHITECTURES[architecture], torch.float64)
    lengths = objectives.prefixes(OBJECTIVES[objective], S, 0, 0)
    end_P = None if lengths is None else torch.tensor(lengths)
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    x_BD = batch(1, 6, torch.float64)

    def loss(*params: Tensor) -> Tensor:
        with torch.no_grad():
            for name, p in zip(names, params, strict=True):
                getattr(sae, name).copy_(p)
        return objectives.Objective(sae, OBJECTIVES[objective], way=way)(x_BD, end_P=end_P).loss

    out = loss(*[getattr(sae, name).detach().clone() for name in names])
    out.backward()
    start = [getattr(sae, name).detach().clone() for name in names]
    grads = [getattr(sae, name).grad.clone() for name in names]
    generator = torch.Generator().manual_seed(2)
    for i, name in enumerate(names):
        step = torch.randn(start[i].shape, generator=generator, dtype=torch.float64)
        moved = [
            loss(*[p + (eps * step if j == i else 0) for j, p in enumerate(start)]).item()
            for eps in (1e-6, -1e-6)
        ]
        slope = (moved[0] - moved[1]) / 2e-6
        assert slope == pytest.approx((grads[i] * step).sum().item(), rel=1e-5, abs=1e-9), name


# ---- which latents fire ----

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 200), st.integers(1, 40), st.integers(0, 9))


def encoder_of(n_latents: int, d: int, seed: int, ties: bool) -> tuple[sparse.Encoder, Tensor]:
    """Random values, or small integers, which give many ties and exact products."""
    generator = torch.Generator().manual_seed(seed)
    draw = (
        (lambda *shape: torch.randint(-2, 3, shape, generator=generator).float())
        if ties
        else (lambda *shape: torch.randn(*shape, generator=generator))
    )
    return sparse.Encoder(draw(n_latents, d), draw(n_latents), False), draw(7, d)


@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(SHAPES, st.booleans())
def test_top_k_is_the_k_largest(screened: bool, shape: tuple[int, int, int, int], ties: bool) -> None:
    d, n_latents, k, seed = shape
    encoder, x_BD = encoder_of(n_latents, d, seed, ties)
    got_BS = sparse.top_k(encoder, x_BD, k).dense()
    pre_BS = (x_BD.double() @ encoder.W_SD.double().T + encoder.b_S).float()
    # of ties, the lowest latents
    order_BS = pre_BS.sort(dim=1, descending=True, stable=True).indices[:, :k]
    want_BS = torch.zeros_like(pre_BS).scatter(1, order_BS, pre_BS.gather(1, order_BS).relu())
    if not ties or kernels.available(x_BD):  # torch keeps any of tied values
        torch.testing.assert_close(got_BS, want_BS, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_BS.sort(dim=1).values, want_BS.sort(dim=1).values, rtol=1e-4, atol=1e-4)
    if ties and kernels.available(x_BD):
        assert torch.equal(got_BS, want_BS)


@pytest.mark.slow
@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(SHAPES, st.booleans(), st.sampled_from([None, 0.0, 0.01, 5.0, 1e9]))
def test_batch_search_is_exact_whatever_it_guesses(
    screened: bool, shape: tuple[int, int, int, int], ties: bool, guess: float | None
) -> None:
    d, n_latents, k, seed = shape
    encoder, x_BD = encoder_of(n_latents, d, seed, ties)
    search = sparse.BatchSearch()
    search.guess = guess
    pre_BS = (x_BD.double() @ encoder.W_SD.double().T + encoder.b_S).float()
    want_BS = activations.batch_top_k(pre_BS, k)
    for _ in range(3):  # also from its own guess
        got_BS = search(encoder, x_BD, k).dense()
        torch.testing.assert_close(got_BS, want_BS, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_expected", [1, 10**4])
def test_above_a_latents_own_least(screened: bool, n_expected: int) -> None:
    encoder, x_BD = encoder_of(150, 20, 0, ties=False)
    least_S = torch.linspace(0, 6, 150)
    got = sparse.above(encoder, x_BD, least_S, n_expected)
    pre_BS = x_BD @ encoder.W_SD.T + encoder.b_S
    want_BS = torch.where(pre_BS > least_S, pre_BS, 0.0)
    assert len(got.value_n) == (want_BS > 0).sum()
    torch.testing.assert_close(got.dense(), want_BS, rtol=1e-4, atol=1e-4)
    rows = np.split(got.index.latent_n.numpy(), got.index.start_O1.numpy()[1:-1])
    assert all((np.diff(row) > 0).all() for row in rows), "by latent within a row"


def test_screening_bounds_hold_on_hostile_numbers() -> None:
    """bfloat16's worst case: every product rounds the same way, and values differ by less than the error."""
    d = 64
    just_above = 1 + 2.0**-8 + 2.0**-20  # rounds up, by nearly half a unit
    just_below = 1 + 2.0**-8 - 2.0**-20  # rounds down
    W_SD = torch.full((40, d), just_above)
    W_SD[7] = just_below + 2.0**-7 / d  # the largest when exact, smaller in bfloat16
    x_BD = torch.full((3, d), just_below)
    encoder = sparse.Encoder(W_SD, torch.zeros(40), False)
    exact = (x_BD.double() @ W_SD.double().T)[0]
    rounded = (x_BD.bfloat16().double() @ W_SD.bfloat16().double().T)[0]
    W_SD[7] += (exact[0] - exact[7] + 1e-2) / x_BD[0].sum()
    exact = (x_BD.double() @ W_SD.double().T)[0]
    assert exact.argmax() == 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse.search, "_multiplies_bfloat16", lambda: True)
        got = sparse.top_k(encoder, x_BD, 1)
    assert got.index.latent_n.tolist() == [7, 7, 7], (rounded[7], rounded[0])


def test_no_result_depends_on_the_number_of_threads(screened: bool) -> None:
    encoder, x_BD = encoder_of(150, 20, 0, ties=False)
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(sparse.top_k(encoder, x_BD, 9))
    finally:
        torch.set_num_threads(before)
    if screened:  # without screening the product itself is MKL's
        assert all(torch.equal(f.value_n, found[0].value_n) for f in found)
    assert all(torch.equal(f.index.latent_n, found[0].index.latent_n) for f in found)


# ---- order, sums ----


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.sets(st.integers(0, 9)), min_size=1, max_size=8))
def test_codes_by_latent_and_by_prefix(rows: list[set[int]]) -> None:
    index = index_of([sorted(row) for row in rows], 10)
    pairs = [(s, o) for o, row in enumerate(rows) for s in sorted(row)]
    order_n, row_n, start_S1 = index.by_latent
    by_latent = [pairs[i] for i in order_n.tolist()]
    assert by_latent == sorted(pairs)
    assert row_n.tolist() == [o for _, o in sorted(pairs)]
    assert start_S1.diff().tolist() == [sum(s in row for row in rows) for s in range(10)]
    split = index.split(torch.tensor([2, 5, 10]))
    parts = np.split(split.latent_n.numpy(), split.start_O1.numpy()[1:-1])
    want = [
        [s for s in sorted(row) if low <= s < high] for row in rows for low, high in [(0, 2), (2, 5), (5, 10)]
    ]
    assert [part.tolist() for part in parts] == want


@pytest.mark.parametrize("n", [1, 7, 40])
def test_kth_largest(n: int) -> None:
    rng = np.random.default_rng(n)
    for values in (rng.standard_normal(n), rng.integers(0, 3, n).astype(float), np.ones(n)):
        for k in range(1, n + 1):
            assert kernels._kth_largest(values.copy(), n, k) == np.sort(values)[-k]


# ---- the optimiser ----


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
def test_adam_equals_torchs(max_norm: float) -> None:
    """Against a plain version with projection, clipping and unit rows. Gradients have very different sizes."""
    mine, theirs = (make(ARCHITECTURES["jump-relu"], torch.float64) for _ in range(2))
    adam, reference = optim.Adam(mine, max_norm), torch_adam.Adam(theirs.parameters())
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            g = torch.randn(a.shape, generator=generator, dtype=torch.float64) * 10.0 ** -(step % 7)
            a.grad, b.grad = g.clone(memory_format=torch.preserve_format), g.clone()
            a.grad = torch.empty_like(a).copy_(g)
        norm = adam.step(0.01)
        theirs.remove_parallel_grad()
        want = clip(theirs, max_norm or 1e9)
        reference.step(0.01)
        theirs.normalize_decoder()
        assert norm.item() == pytest.approx(want, rel=1e-6)
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-9, atol=1e-11)


# ---- prefixes, averages, precision ----


def test_prefixes() -> None:
    assert objectives.prefixes(config.Vanilla(), 64, 0, 0) is None
    assert objectives.prefixes(OBJECTIVES["fixed"], 64, 0, 5) == [8, 16, 32, 64]
    sampled = config.Matryoshka(n_prefixes=5)
    draws = [objectives.prefixes(sampled, 1000, seed=3, step=step) for step in range(300)]
    assert all(len(set(d)) == 5 and d == sorted(d) and d[-1] == 1000 and d[0] >= 1 for d in draws)
    assert len({tuple(d) for d in draws}) > 250
    assert draws[7] == objectives.prefixes(sampled, 1000, seed=3, step=7)
    assert draws[7] != objectives.prefixes(sampled, 1000, seed=4, step=7)
    shares = np.mean([[length <= 100 for length in d[:-1]] for d in draws])
    assert 0.85 < shares < 0.95, "of a Pareto draw with exponent 1/2, 1 - 101^-0.5 (0.9) are at most 100"
    assert objectives.prefixes(config.Matryoshka(n_prefixes=9), 4, 0, 0) == [1, 2, 3, 4]


def test_bfloat16_precision_is_near_float32() -> None:
    for cfg in ARCHITECTURES.values():
        sae, x_BD = make(cfg), batch(3)
        for way in ("dense", "sparse"):
            exact = objectives.Objective(sae, config.Vanilla(), way=way)(x_BD).loss.item()
            rough = objectives.Objective(sae, config.Vanilla(), way=way, is_bfloat16=True)(x_BD)
            assert rough.loss.item() == pytest.approx(exact, rel=0.03)
            assert rough.loss.item() != exact


@each
def test_codes_do_not_depend_on_batch_mates(architecture: str) -> None:
    """In evaluation mode: one by one, and batched."""
    sae = make(ARCHITECTURES[architecture])
    sae(batch(0, 500))  # sets BatchTopK's threshold
    sae.eval()
    x_BD = batch(5)
    together = sae.encode(x_BD)
    alone = torch.cat([sae.encode(x_D[None]) for x_D in x_BD])
    assert torch.equal(together > 0, alone > 0) and (together > 0).any()
    torch.testing.assert_close(together, alone)


def test_geometric_median_is_where_unit_vectors_to_the_points_cancel() -> None:
    x_BD = batch(0, 101)
    x_BD[:20] += 100  # outliers move the mean, but hardly the median
    median_D = geometric_median(x_BD, n_iters=1000)
    pull_D = torch.nn.functional.normalize(x_BD - median_D, dim=1).mean(dim=0)
    assert pull_D.norm() < 1e-3
    assert (median_D - x_BD.mean(dim=0)).norm() > 30


def test_initialisation_options() -> None:
    cfg = ARCHITECTURES["top-k"]
    zero = nn.SparseAutoencoder(dataclasses.replace(cfg, b_dec_init="zero", normalize="none"), 1)
    zero.initialize(batch(0))
    assert zero.scale == 1 and not zero.b_dec.any()
    assert torch.equal(zero.W_enc, zero.W_dec.T)
    median = nn.SparseAutoencoder(dataclasses.replace(cfg, b_dec_init="geometric-median"), 1)
    median.initialize(batch(0))
    assert median.b_dec.any() and not torch.equal(median.b_dec, make(cfg).b_dec)
    untied = nn.SparseAutoencoder(dataclasses.replace(cfg, tied_init=False), 1)
    assert torch.equal(untied.W_dec, zero.W_dec) and not torch.equal(untied.W_enc, untied.W_dec.T)
    torch.testing.assert_close(untied.W_enc.norm(dim=0), torch.ones(S))


@pytest.mark.parametrize("shape", [(5,), (4, 5)])
def test_jump_relus_gradients(shape: tuple[int, ...]) -> None:
    """Eq. 11 and 12 of Rajamanoharan et al. 2024, by a loop."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(shape, generator=generator).requires_grad_()
    threshold = torch.tensor([0.1, 0.3, 0.5, 0.2, 0.05]).requires_grad_()
    g = torch.randn(shape, generator=generator)
    width = 0.8
    f = activations.jump(pre, threshold, width)
    (f * g).sum().backward()
    got_pre, got_threshold = pre.grad.clone(), threshold.grad.clone()
    want_pre, want_threshold, want_l0 = torch.zeros(shape), torch.zeros(5), torch.zeros(5)
    for at in np.ndindex(shape):
        s = at[-1]
        x, t = pre[at].item(), threshold[s].item()
        want_pre[at] = g[at] if x > t else 0
        if abs(x - t) < width / 2:
            want_threshold[s] -= t / width * g[at]
            want_l0[s] -= 1 / width
    torch.testing.assert_close(got_pre, want_pre)
    torch.testing.assert_close(got_threshold, want_threshold)
    assert want_threshold.any()
    threshold.grad = None
    l0 = activations.fires(pre, threshold, width).sum()
    assert l0.item() == (pre > threshold).sum()
    l0.backward()
    torch.testing.assert_close(threshold.grad, want_l0)
