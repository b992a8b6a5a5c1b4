"""Fixtures for tests of the gallery's page in a browser: `pytest_plugins = ["browser_fixtures"]`."""

import collections.abc
import pathlib

import gallery_data
import pytest
from browsing import CHROMIUM, Open
from playwright import sync_api


@pytest.fixture(scope="module")
def browser() -> collections.abc.Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A made-up gallery. Latent i of row i has number 2 i + 1; the image view has images 3, 45, 87 and 129."""
    dpath = tmp_path_factory.mktemp("gallery")
    gallery_data.write(dpath, gallery_data.MadeUp(n_latents=300, n_images=24, n_view=4))
    return dpath


@pytest.fixture
def show(browser: sync_api.Browser, folder: pathlib.Path) -> collections.abc.Iterator[Open]:
    """Opens a hash in a new window. When the test ends: no errors in the console, and no request but file:// and data:."""
    contexts, wrong = [], []

    def open_page(
        hash_: str = "#/map",
        dpath: pathlib.Path = folder,
        errors: bool = False,
        init: str = "",
        **settings: object,
    ) -> sync_api.Page:
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        if init:
            page.add_init_script(init)
        if not errors:
            page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on(
            "request",
            lambda r: None if r.url.startswith(("file://", "data:", "blob:")) else wrong.append(r.url),
        )
        page.goto((dpath / "index.html").as_uri() + hash_)
        page.wait_for_selector("nav a[aria-current], .problem")
        page.wait_for_function("!document.querySelector('.wait')")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
