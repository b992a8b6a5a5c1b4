"""Passes over activations that save their state, and go on from it."""

import collections.abc
import pathlib
import types

import numpy as np
import pytest
import torch

from saev.data import activations, config, passes
from saev.formats import arrays
from saev.protoeval import score
from saev.scorers import base

Event = tuple[str, int]
"""What happened, and after how many images."""


@pytest.fixture
def acts(make_shards: collections.abc.Callable) -> activations.Activations:
    """Seven images."""
    return activations.Activations(config.Shards(str(make_shards(n_imgs=7)[0]), 3))


@pytest.mark.parametrize(
    ("n_done", "save_s", "saved"),
    [(0, 0.0, [2, 4, 6, 7]), (0, 2.0, [4, 7]), (0, 1e9, [7]), (4, 0.0, [6, 7]), (4, 2.0, [7]), (7, 0.0, [])],
)
def test_a_state_is_saved_once_its_images_are_used(
    acts: activations.Activations,
    monkeypatch: pytest.MonkeyPatch,
    n_done: int,
    save_s: float,
    saved: list[int],
) -> None:
    """A state that is saved before would leave images out of the pass that goes on. Each block takes a second."""
    now_s, events = 0.0, []
    monkeypatch.setattr(passes, "SAVE_S", save_s)
    monkeypatch.setattr(passes, "time", types.SimpleNamespace(monotonic=lambda: now_s))
    for imgs, block in passes.resumed(acts, 2, n_done, lambda n: events.append(("saved", n)), "score"):
        assert block.image_i_N.tolist() == list(imgs)
        events.append(("used", imgs.stop))
        now_s += 1
    used = [n for n in (2, 4, 6, 7) if n > n_done]
    assert events == [(what, n) for n in used for what in ("used", "saved") if what == "used" or n in saved]


@pytest.mark.parametrize("sums", [["0" * 32] * 9, "0" * 32, [["0" * 32] * 9], []])
def test_a_state_with_other_checksums_than_of_these_blocks(
    acts: activations.Activations, tmp_path: pathlib.Path, sums: list | str
) -> None:
    """More than there are blocks, one, a table of them, or none: all is scored again."""

    def scored() -> np.ndarray:
        bank = base.Prototypes.of(torch.eye(8)[:3], torch.zeros(8), "dot")
        found = score.score_images([bank], acts, [0, 5], tmp_path, torch.device("cpu"))
        return found.scores_KN.copy()

    want, fpath = scored(), tmp_path / "done.npz"
    with np.load(fpath) as found:
        key, good = found[arrays.KEY].item(), found[score.SUMS].tolist()
    arrays.write_state(fpath, key, {score.SUMS: np.array(sums, "U32")})
    np.testing.assert_array_equal(scored(), want)
    with np.load(fpath) as found:
        assert found[score.SUMS].tolist() == good
