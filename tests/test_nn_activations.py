"""Sparse activations against plain loops. B batch, S latents."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from saev.nn import activations

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=7)
TIED = st.integers(-3, 3).map(float)
"""Only a few distinct values, so most are tied."""
PRE_BS = hnp.arrays(np.float64, SHAPES, elements=TIED)
settings = hypothesis.settings(max_examples=80, deadline=None)


@settings
@hypothesis.given(pre_BS=PRE_BS, k=st.integers(1, 9))
def test_top_k_keeps_the_k_largest_positives_of_each_row(pre_BS: np.ndarray, k: int) -> None:
    f_BS = activations.top_k(torch.tensor(pre_BS), k).numpy()
    for pre_S, f_S in zip(pre_BS, f_BS, strict=True):
        largest = sorted(pre_S, reverse=True)[:k]
        assert sorted(f_S[f_S != 0], reverse=True) == [v for v in largest if v > 0]
        assert all(f == pre for f, pre in zip(f_S, pre_S, strict=True) if f != 0)


@settings
@hypothesis.given(pre_BS=PRE_BS, k=st.integers(1, 9))
def test_batch_top_k_keeps_the_largest_of_the_batch_and_their_ties(pre_BS: np.ndarray, k: int) -> None:
    f_BS = activations.batch_top_k(torch.tensor(pre_BS), k).numpy()
    n_keep = min(k * len(pre_BS), pre_BS.size)
    least = sorted(pre_BS.flatten(), reverse=True)[n_keep - 1]
    for pre, f in zip(pre_BS.flatten(), f_BS.flatten(), strict=True):
        assert f == (pre if pre >= least and pre > 0 else 0)


@settings
@hypothesis.given(pre_BS=PRE_BS, threshold=TIED)
def test_above_is_strict(pre_BS: np.ndarray, threshold: float) -> None:
    threshold_ = torch.tensor(threshold, dtype=torch.float64)
    f_BS = activations.above(torch.tensor(pre_BS), threshold_).numpy()
    for pre, f in zip(pre_BS.flatten(), f_BS.flatten(), strict=True):
        assert f == (pre if pre > threshold else 0)


@pytest.mark.parametrize("act", [activations.top_k, activations.batch_top_k])
def test_negative_pre_activations_give_an_empty_code(act) -> None:
    pre_BS = -1 - torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    assert not act(pre_BS, 3).any()


@pytest.mark.parametrize("act", [activations.top_k, activations.batch_top_k])
@pytest.mark.parametrize("k", [6, 7, 1000])
def test_k_of_all_latents_or_more_is_relu(act, k: int) -> None:
    pre_BS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(act(pre_BS, k), pre_BS.relu(), rtol=0, atol=0)


def test_batch_top_k_shares_the_budget_between_rows() -> None:
    pre_BS = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    assert (activations.batch_top_k(pre_BS, 2) > 0).sum(dim=1).tolist() == [4, 0]
    assert (activations.top_k(pre_BS, 2) > 0).sum(dim=1).tolist() == [2, 2]


@pytest.mark.parametrize("act", [activations.top_k, activations.batch_top_k])
def test_gradient_passes_through_what_fires_and_nothing_else(act) -> None:
    pre_BS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    f_BS = act(pre_BS, 2)
    weight_BS = torch.arange(30.0).reshape(5, 6) + 1
    (f_BS * weight_BS).sum().backward()
    torch.testing.assert_close(pre_BS.grad, torch.where(f_BS > 0, weight_BS, 0.0), rtol=0, atol=0)
