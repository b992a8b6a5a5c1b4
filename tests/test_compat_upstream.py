"""Checkpoints of upstream saev and of all our schemas reproduce recorded outputs. B batch, D d_vit, S latents."""

import io
import json
import logging
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from saev import errors, nn
from saev.compat import upstream
from saev.formats import checkpoint
from saev.nn import config

DATA = pathlib.Path(__file__).parent / "data"
D, S = 8, 16

THRESHOLD = upstream.THRESHOLD
OLD = {"exp_factor": 2, "seed": 0, "n_reinit_samples": 9, "remove_parallel_grads": True}
V5 = {"d_model": D, "d_sae": S, "reinit_blend": 0.8}
TOP3 = {"key": "top-k", "top_k": 3, "sparsity": {"cls": "NoSparsity", "params": {}}}
BATCH3 = {**TOP3, "key": "batch-top-k"}
HEADERS = {
    "none": ({"d_vit": D, **OLD, "sparsity_coeff": 4e-4, "ghost_grads": False}, "Relu"),
    "1": ({"schema": 1, "cls": "TopK", "cfg": {"d_vit": D, **OLD, "top_k": 3}, "lib": "1"}, "TopK"),
    "1-relu": ({"schema": 1, "cls": "Relu", "cfg": {"d_vit": D, **OLD}}, "Relu"),
    "1-default": ({"schema": 1, "cls": "BatchTopK", "cfg": {"d_vit": D, **OLD}}, "Positive"),
    "1-nested": (
        {
            "schema": 1,
            "cls": "SparseAutoencoderConfig",
            "cfg": {"d_vit": D, **OLD, "activation": {"cls": "TopK", "params": {"top_k": 3}}},
        },
        "TopK",
    ),
    "2": ({"schema": 2, "cfg": {"d_vit": D, **OLD, "activation": {"cls": "TopK", "params": TOP3}}}, "TopK"),
    "2-d-model": (
        {"schema": 2, "cfg": {"d_model": D, **OLD, "activation": {"cls": "Relu", "params": {}}}},
        "Relu",
    ),
    "4-batch": (
        {"schema": 4, "cfg": {**V5, "activation": {"cls": "BatchTopK", "params": BATCH3}}},
        "Threshold",
    ),
    "3": ({"schema": 3, "cfg": {"d_model": D, **OLD, "activation": {"cls": "Relu", "params": {}}}}, "Relu"),
    "4": ({"schema": 4, "cfg": {"d_model": D, **OLD, "activation": {"cls": "TopK", "params": TOP3}}}, "TopK"),
    "5": ({"schema": 5, "cfg": {**V5, "activation": {"cls": "TopK", "params": TOP3}}}, "TopK"),
    "5-batch": (
        {"schema": 5, "cfg": {**V5, "activation": {"cls": "BatchTopK", "params": BATCH3}}},
        "Threshold",
    ),
}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, S), "b_enc": (S,), "W_dec": (S, D), "b_dec": (D,)}
    out = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**out, "activation.threshold": torch.tensor(1.5)}


def weights() -> dict[str, torch.Tensor]:
    """Without a threshold."""
    return {name: tensor for name, tensor in tensors().items() if name != THRESHOLD}


def write(fpath: pathlib.Path, header: object, state: object) -> pathlib.Path:
    payload = io.BytesIO()
    torch.save(state, payload)
    fpath.write_bytes(json.dumps(header).encode() + b"\n" + payload.getvalue())
    return fpath


def by_hand(activation: str, x_BD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f = act(x W_enc + b_enc), x_hat = f W_dec + b_dec, in float64."""
    t = {name: tensor.double().numpy() for name, tensor in tensors().items()}
    pre_BS = x_BD @ t["W_enc"] + t["b_enc"]
    least_BS = {
        "Relu": 0.0,
        "Positive": 0.0,
        "Threshold": 1.5,
        "TopK": np.sort(pre_BS, axis=1)[:, -4][:, None],
    }[activation]
    # TopK keeps the sign of its k largest
    f_BS = np.where((pre_BS > least_BS) & ((pre_BS > 0) | (activation == "TopK")), pre_BS, 0)
    return f_BS, f_BS @ t["W_dec"] + t["b_dec"]


@pytest.mark.parametrize("name", HEADERS)
def test_every_schema_reproduces_the_formula(name: str, tmp_path: pathlib.Path) -> None:
    header, activation = HEADERS[name]
    state = tensors() if activation == "Threshold" else weights()
    sae = nn.load(write(tmp_path / "sae.pt", header, state))
    x_BD = np.random.default_rng(0).standard_normal((30, D))
    want_f, want_x_hat = by_hand(activation, x_BD)
    x_hat_BD, f_BS = sae(torch.tensor(x_BD).float())
    assert 0 < (want_f > 0).mean() < 1
    np.testing.assert_allclose(f_BS, want_f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_hat_BD, want_x_hat, rtol=1e-5, atol=1e-5)
    assert not sae.training and sae.activations == {}


@pytest.mark.parametrize("fpath", sorted(DATA.glob("*/*.npz")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_recorded_outputs(fpath: pathlib.Path) -> None:
    """Upstream's files, and one of ours for each architecture and schema."""
    recorded = np.load(fpath)
    sae = nn.load(fpath.with_suffix(".pt"))
    x_hat_BD, f_BS = sae(torch.tensor(recorded["x"]))
    assert (recorded["f"] > 0).any()
    np.testing.assert_allclose(f_BS, recorded["f"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_hat_BD, recorded["x_hat"], rtol=1e-5, atol=1e-5)


def test_the_recorded_top_k_has_negative_values_and_any_number_of_latents() -> None:
    """schema5_topk: f keeps the 6 largest of pre, in float64. Many rows have fewer than 6 positive values."""
    recorded = np.load(DATA / "upstream" / "schema5_topk.npz")
    assert (recorded["f"] < 0).any() and ((recorded["f"] != 0).sum(axis=1) == 6).all()
    sae = nn.load(DATA / "upstream" / "schema5_topk.pt")
    assert sae.cfg == config.TopK(
        d_vit=8, d_sae=13, top_k=6, normalize="none", aux_coeff=0.0, keep_negative=True
    )


def test_there_is_a_golden_file_of_every_schema_of_ours() -> None:
    """A format change without a new schema number fails above; a new number without a file fails here."""
    for schema in [*checkpoint.UPGRADES, checkpoint.SCHEMA]:
        for fpath in DATA.glob(f"schema{schema}/*.pt"):
            assert json.loads(fpath.read_bytes().partition(b"\n")[0])["schema"] == schema
    newest = {p.stem for p in DATA.glob(f"schema{checkpoint.SCHEMA}/*.pt")}
    assert newest == {name.lower() for name in config.BY_NAME} | {"topk_perdim"}


def test_the_recorded_per_dim_sae_has_a_scale_per_dimension() -> None:
    sae = nn.load(DATA / "schema102" / "topk_perdim.pt")
    assert (sae.cfg.normalize, sae.cfg.init, sae.scale.shape) == ("per-dim", "data", (6,))
    assert sae.scale.max() > 1000 * sae.scale.min()


def test_a_checkpoint_of_schema_100_keeps_its_meaning() -> None:
    sae = nn.load(DATA / "schema100" / "topk.pt")
    assert sae.cfg == config.TopK(d_vit=6, d_sae=18, top_k=2, aux_coeff=0.0)


def test_no_threshold_is_said_and_can_be_calibrated(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    fpath = write(tmp_path / "sae.pt", HEADERS["1-default"][0], weights())
    with caplog.at_level(logging.WARNING, "saev"):
        sae = nn.load(fpath)
    assert "has no threshold" in caplog.text and "calibrate" in caplog.text
    x_BD = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    assert (sae.encode(x_BD) > 0).sum() > 50 * 4
    nn.calibrate(sae, x_BD, 4)
    assert (sae.encode(x_BD) > 0).sum() == 50 * 4
    with pytest.raises(errors.UserError, match="are positive, but 800 are wanted. Lower k"):
        nn.calibrate(sae, x_BD, S)
    with pytest.raises(errors.UserError, match="only a BatchTopK"):
        nn.calibrate(nn.SparseAutoencoder(config.Relu(d_vit=D)), x_BD, 4)


# ---- what is refused ----


def test_a_negative_threshold(tmp_path: pathlib.Path) -> None:
    """Upstream keeps every value above the threshold, including negative ones."""
    state = {**weights(), THRESHOLD: torch.tensor(-0.5)}
    fpath = write(tmp_path / "sae.pt", HEADERS["5-batch"][0], state)
    with pytest.raises(errors.UserError, match="threshold is -0.5, so negative values above it"):
        nn.load(fpath)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"W_enc": torch.zeros(D, S + 1)}, "tensor W_enc has shape .*; its header wants"),
        ({"b_dec": None}, "tensor b_dec is missing"),
        ({"b_enc": torch.full((S,), torch.nan)}, "tensor b_enc holds NaN"),
        (
            {"b_enc": torch.zeros(S, dtype=torch.int8)},
            r"b_enc has shape \(16,\), torch.int8; .* wants floats",
        ),
        ({"scale": torch.ones(D)}, "unknown tensor scale. It may change what the SAE computes"),
        ({THRESHOLD: torch.tensor(1.0)}, "unknown tensor activation.threshold"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, object], match: str, tmp_path: pathlib.Path) -> None:
    fpath = write(tmp_path / "sae.pt", HEADERS["2"][0], {**weights(), **change})
    with pytest.raises(errors.UserError, match=match):
        nn.load(fpath)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"schema": 5, "cfg": {**V5, "activation": {"cls": "Gated"}}}, "'Gated' is unknown"),
        ({"schema": 5, "cfg": V5}, "'activation' is missing"),
        ({"schema": 3, "cfg": {"d_vit": D}}, "'activation' is missing|'d_model' is missing"),
        ({"schema": 6, "cfg": {}}, "schema 6 .* is unknown"),
        (
            {"schema": 5, "cfg": {**V5, "normalize": True, "activation": {"cls": "Relu"}}},
            r"cfg has unknown keys \(normalize\), which may change what it computes",
        ),
        (
            {"schema": 5, "cfg": {**V5, "activation": {"cls": "TopK", "params": {"abs": True}}}},
            r"params of TopK has unknown keys \(abs\)",
        ),
        (
            {"schema": 5, "cfg": {**V5, "activation": {"cls": "Relu", "params": {"top_k": 3}}}},
            r"params of Relu has unknown keys \(top_k\)",
        ),
        (
            {"schema": 5, "mean": [0], "cfg": {**V5, "activation": {"cls": "Relu"}}},
            r"its header has unknown keys \(mean\)",
        ),
        (
            {"d_vit": D, **OLD, "activation": {"cls": "TopK", "params": {}}},
            "cls is 'Relu', but activation is",
        ),
        (
            {"schema": 5, "cfg": {**V5, "activation": {"cls": "BatchTopK", "params": TOP3}}},
            "cls is 'BatchTopK', but key is 'top-k'",
        ),
        ({"d_vit": D, **OLD, "scale_mean": True}, r"cfg has unknown keys \(scale_mean\)"),
        (
            {"schema": 4, "cfg": {**V5, "exp_factor": 3, "activation": {"cls": "Relu"}}},
            "exp_factor gives d_sae 24, but d_sae is 16",
        ),
        (
            {"schema": 2, "cfg": {"d_vit": 9, **V5, "activation": {"cls": "Relu"}}},
            "d_vit gives d_model 9, but d_model is 8",
        ),
        ({"schema": 5, "cfg": {**V5, "d_sae": "16", "activation": {"cls": "Relu"}}}, "d_sae is '16'"),
    ],
)
def test_headers_that_cannot_be_read(header: object, match: str, tmp_path: pathlib.Path) -> None:
    fpath = write(tmp_path / "sae.pt", header, tensors())
    with pytest.raises(errors.UserError, match=match):
        nn.load(fpath)


def test_an_upstream_checkpoint_is_no_scorer(tmp_path: pathlib.Path) -> None:
    fpath = write(tmp_path / "sae.pt", HEADERS["2"][0], tensors())
    with pytest.raises(errors.UserError, match="schema 2"):
        checkpoint.read(fpath, "scorer")


def test_a_cut_file(tmp_path: pathlib.Path) -> None:
    fpath = write(tmp_path / "sae.pt", HEADERS["2"][0], tensors())
    fpath.write_bytes(fpath.read_bytes()[:-300])
    with pytest.raises(errors.UserError, match="tensors cannot be read"):
        nn.load(fpath)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["d_vit", "d_model", "d_sae", "exp_factor", "activation", "cls", "params", "top_k", "cfg"]


@pytest.mark.slow
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    schema=st.sampled_from([None, 1, 2, 3, 4, 5]),
    header=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6),
    cfg=st.dictionaries(st.sampled_from(KEYS), VALUES | st.just(D), max_size=6) | VALUES,
)
def test_any_header_is_read_or_refused_in_words(
    schema: int | None, header: dict[str, object], cfg: object
) -> None:
    header = {**header, "cfg": cfg} | ({} if schema is None else {"schema": schema})
    try:
        found = upstream.upgrade(header, pathlib.Path("x.pt"))
    except errors.UserError:
        return
    assert found.d_sae > 0 and found.d_vit > 0
