"""States of killed work: read back exactly, or not at all."""

import pathlib

import numpy as np
import pytest

from saev.formats import arrays

STATE = {
    "n_done": np.array(7),
    "0.sums": np.random.default_rng(0).random((3, 4)),
    "names": np.array(["a", "bc"]),
}


def test_a_state_is_read_back(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    fpath = tmp_path / "new" / "state.npz"
    assert arrays.read_state(fpath, "k", STATE) is None
    arrays.write_state(fpath, "k", STATE)
    found = arrays.read_state(fpath, "k", ["0.sums", "n_done"])
    assert found is not None and list(found) == ["0.sums", "n_done"]
    for name, values in found.items():
        np.testing.assert_array_equal(values, STATE[name], strict=True)
    assert arrays.read_state(fpath, "other", STATE) is None and not caplog.records


def test_no_flipped_bit_gives_another_state(tmp_path: pathlib.Path) -> None:
    """In the first header and the last entries of the directory, where zipfile raises many types."""
    fpath = tmp_path / "state.npz"
    arrays.write_state(fpath, "k", STATE)
    content = fpath.read_bytes()
    places = [*range(0, 8 * 40, 3), *range(8 * (len(content) - 90), 8 * len(content), 3)]
    n_unread = 0
    for bit in places:
        bad = bytearray(content)
        bad[bit // 8] ^= 1 << bit % 8
        fpath.write_bytes(bad)
        found = arrays.read_state(fpath, "k", STATE)
        n_unread += found is None
        for name, values in (found or {}).items():
            np.testing.assert_array_equal(values, STATE[name], strict=True)
    assert 0.2 * len(places) < n_unread < len(places)
