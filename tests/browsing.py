"""What several tests of the gallery's page need. Their fixtures are in browser_fixtures.py."""

import collections.abc
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest
from playwright import sync_api

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser")
"""The first one has no windows, so that its tests take a quarter less processor time."""
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium-headless-shell)")
Open = collections.abc.Callable[..., sync_api.Page]


def pixels(fpath: pathlib.Path) -> np.ndarray:
    with PIL.Image.open(fpath) as img:
        return np.asarray(img.convert("RGB"), np.int64)


def shot(page: sync_api.Page, selector: str, i: int, tmp_path: pathlib.Path) -> np.ndarray:
    """(H, W, 3) pixels of the i-th such element."""
    page.locator(selector).nth(i).screenshot(path=tmp_path / "shot.png")
    return pixels(tmp_path / "shot.png")


def hash_of(page: sync_api.Page) -> str:
    return page.evaluate("location.hash")
