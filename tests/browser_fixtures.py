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


Profiles = dict[str, list[sync_api.Page]]
"""Empty pages, each of a browser profile that no test uses now, by the profile's settings. An open page keeps its process:
the next one of the profile opens in half the time, and that of a new profile takes twice as long."""


@pytest.fixture(scope="module")
def profiles(browser: sync_api.Browser) -> Profiles:
    return collections.defaultdict(list)


@pytest.fixture
def show(
    browser: sync_api.Browser, profiles: Profiles, folder: pathlib.Path, tmp_path: pathlib.Path
) -> collections.abc.Iterator[Open]:
    """Opens a hash in a new window of a profile in which nothing is stored. When the test ends: no errors in the console,
    and no request but file:// and data:."""
    used, wrong = [], []

    def empty_page(**settings: object) -> sync_api.Page:
        free = profiles[repr(sorted(settings.items()))]
        if not free:
            (tmp_path / "empty.html").write_text("")
            free.append(browser.new_context(**settings).new_page())
            free[0].goto((tmp_path / "empty.html").as_uri())
        used.append((free, free.pop()))
        return used[-1][1]

    def open_page(
        hash_: str = "#/map",
        dpath: pathlib.Path = folder,
        errors: bool = False,
        init: str = "",
        **settings: object,
    ) -> sync_api.Page:
        page = empty_page(**{"viewport": {"width": 1440, "height": 900}, **settings}).context.new_page()
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
    for free, empty in used:
        for page in empty.context.pages:
            if page != empty:
                page.close()
        empty.evaluate("localStorage.clear()")
        free.append(empty)
    assert wrong == []
