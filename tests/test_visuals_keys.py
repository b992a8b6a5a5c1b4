"""Every view of the gallery's page by keyboard alone: these tests have no pointer."""

import json
import pathlib

import gallery_files
import numpy as np
import pytest
from browsing import Open, hash_of, needed
from playwright import sync_api

pytest_plugins = ["browser_fixtures"]
pytestmark = [needed, pytest.mark.slow]


def press(page: sync_api.Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def tab_to(page: sync_api.Page, selector: str, most: int = 30) -> None:
    """Presses Tab until the element has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("s => Boolean(document.activeElement?.matches(s))", selector):
            return
    raise AssertionError(f"Tab does not lead to {selector}")


def wait_for(page: sync_api.Page, start: str) -> None:
    """Waits until the hash begins with this, and the view is there: the page hears of its hash later."""
    page.wait_for_function("start => location.hash.startsWith(start)", arg=start)
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_function("!document.querySelector('.wait')")


def selected(page: sync_api.Page) -> str:
    """The text of the table's selected row."""
    return page.locator('[role=row][aria-selected="true"]').inner_text()


def in_sight(page: sync_api.Page) -> bool:
    """Whether the selected row is within the table, below its head."""
    return page.evaluate(
        """() => {
          const row = document.querySelector('[aria-selected="true"]').getBoundingClientRect();
          const table = document.querySelector('[role=grid]');
          const head = table.querySelector('.head').getBoundingClientRect();
          return row.top >= head.bottom - 1 && row.bottom <= table.getBoundingClientRect().bottom + 1;
        }"""
    )


# ---- map ----


def test_map(show: Open) -> None:
    page = show()
    press(page, "/")
    page.keyboard.type("id:21,23,25")
    press(page, "Escape")
    assert page.inner_text(".found").startswith("3 of 300")
    press(page, "j")
    first = page.evaluate("saev.state.params.get('at')")
    press(page, "j", "s")
    assert page.evaluate("saev.state.params.get('at')") != first
    press(page, "k", "Enter")
    wait_for(page, f"#/latent/{first}")
    press(page, "j")
    page.wait_for_function(f"!location.hash.startsWith('#/latent/{first}')")
    press(page, "Escape")
    wait_for(page, "#/map")
    assert page.locator('.body .star[aria-pressed="true"]').count() == 1
    press(page, "/")
    press(page, "Control+A", "Delete", "Enter")  # Enter leads to the table
    assert page.evaluate("document.activeElement.getAttribute('role')") == "grid"
    press(page, "End", "ArrowUp")
    assert page.locator('[role=row][aria-selected="true"]').get_attribute("aria-rowindex") == "300"
    assert in_sight(page)
    press(page, "Enter")
    wait_for(page, "#/latent/")
    press(page, "Escape")
    wait_for(page, "#/map")
    page.wait_for_function("document.querySelector('[aria-selected=\"true\"]')")
    press(page, "Home", "PageDown")
    assert in_sight(page) and int(page.get_attribute('[aria-selected="true"]', "aria-rowindex") or 0) > 5


def test_sort_of_a_table_keeps_the_focus(show: Open) -> None:
    page = show()
    press(page, "/", "Enter")
    tab_to(page, "[role=columnheader] button")
    tab_to(page, "[role=columnheader]:nth-child(5) button")
    for order, expected in (("-max", "descending"), ("max", "ascending"), ("-max", "descending")):
        press(page, "Enter")
        assert page.evaluate("saev.state.params.get('sort')") == order
        assert page.get_attribute("[role=columnheader]:nth-child(5)", "aria-sort") == expected
        assert page.evaluate("document.activeElement.textContent").startswith("Max")


def test_brush_of_the_map(show: Open, folder: pathlib.Path) -> None:
    """The cross begins in the middle of the plot. A region by keyboard keeps what a plain loop keeps."""
    columns = gallery_files.load(folder, "stats")["columns"]
    with np.errstate(divide="ignore"):
        x, y = np.log10(columns["freq"]), np.log10(columns["max"])
    page = show()
    tab_to(page, "canvas.scatter")
    press(page, "Space", *["Shift+ArrowRight"] * 4, "ArrowLeft", *["Shift+ArrowUp"] * 3, "ArrowDown")
    assert "at=" not in hash_of(page) and "x=" not in hash_of(page)
    press(page, "Space")
    (x0, x1), (y0, y1) = page.evaluate("['x', 'y'].map((k) => saev.range(saev.state.params.get(k)))")
    n = ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).sum()
    assert 0 < n < 300 and page.inner_text(".found").startswith(f"{n} of 300")
    # its sides are as many pixels as the keys moved the cross
    box = page.locator("canvas.scatter").bounding_box()
    span_x, span_y = (np.ptp(v[np.isfinite(v)]) * 1.08 for v in (x, y))
    assert box is not None and (x1 - x0) / span_x * (box["width"] - 68) == pytest.approx(152, abs=1)
    assert (y1 - y0) / span_y * (box["height"] - 48) == pytest.approx(112, abs=1)
    assert page.evaluate("document.activeElement.matches('canvas.scatter')")
    press(page, "Space", "ArrowRight", "ArrowDown", "Escape")  # a region that is not ended changes nothing
    assert page.inner_text(".found").startswith(f"{n} of 300")
    press(page, "Escape")
    assert page.inner_text(".found").startswith("300 of 300")


def test_a_point_of_the_map(show: Open, folder: pathlib.Path) -> None:
    columns = gallery_files.load(folder, "stats")["columns"]
    page = show("#/map?at=21")
    tab_to(page, "canvas.scatter")
    press(page, "ArrowLeft", "ArrowRight")  # the cross begins at the selected latent
    assert page.inner_text(".left > .hint").startswith("Latent 21: ")
    assert page.get_attribute(".left > .hint", "aria-live") == "polite"
    picked = ""
    for _ in range(40):
        press(page, "ArrowUp", "ArrowLeft")
        picked = page.inner_text(".left > .hint")
        if picked.startswith("Latent ") and not picked.startswith("Latent 21:"):
            break
    number = int(picked.split()[1].rstrip(":"))
    assert number in columns["id"]
    press(page, "Enter")
    assert f"at={number}" in hash_of(page) and selected(page).split()[1] == str(number)
    press(page, "Enter")
    wait_for(page, f"#/latent/{number}")
    press(page, "Escape")
    wait_for(page, "#/map")
    assert f"at={number}" in hash_of(page)


def test_ranges_and_show_all(show: Open) -> None:
    page = show()
    tab_to(page, "select")
    press(page, "ArrowDown")
    assert "value=mean" in hash_of(page)
    tab_to(page, "input[type=number]")
    page.keyboard.type("-2")
    press(page, "Enter")
    assert "x=-2," in hash_of(page) and not page.inner_text(".found").startswith("300 of")
    press(page, "Escape", "/")
    tab_to(page, "main button")
    press(page, "Enter")
    assert page.inner_text(".found").startswith("300 of 300")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "grid"


# ---- latent ----


def test_latent(show: Open) -> None:
    page = show("#/latent/21")
    tab_to(page, "main .star")
    press(page, "Enter")
    assert page.locator('main .star[aria-pressed="true"]').count() == 1
    tab_to(page, "textarea")
    page.keyboard.type("a beak")
    press(page, "Escape")
    assert page.evaluate("saev.stars.note(21)") == "a beak"
    tab_to(page, "input[type=range]")
    press(page, "ArrowLeft")
    assert "opacity=65" in hash_of(page)
    tab_to(page, "select")
    press(page, "ArrowDown")
    assert "scale=image" in hash_of(page)
    tab_to(page, "input[type=checkbox]")
    press(page, "Space")
    assert "smooth=yes" in hash_of(page)
    press(page, "Escape")  # leaves the field, not the view
    assert hash_of(page).startswith("#/latent/21")
    tab_to(page, "a.picture")
    press(page, "Enter")
    wait_for(page, "#/image/")
    assert "latent=21" in hash_of(page) and "opacity=65" in hash_of(page)
    page.go_back()
    wait_for(page, "#/latent/21")
    following = page.locator(".heading a.step").last.get_attribute("href")
    press(page, "ArrowRight")
    wait_for(page, following)
    press(page, "ArrowLeft")
    wait_for(page, "#/latent/21")
    tab_to(page, "aside a", 80)
    press(page, "Enter")
    wait_for(page, "#/trait/")


# ---- images ----


def test_keys_that_are_faster_than_the_page_are_not_lost(show: Open) -> None:
    page = show("#/image/3")
    page.wait_for_selector(".board")
    page.evaluate(
        """() => {  // in one task, so that the page hears of its new hash only after all of them
          for (const key of "jjjkj") document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        }"""
    )
    after = hash_of(page)
    page.goto(page.url.partition("#")[0] + "#/image/3")
    for _ in range(3):
        page.wait_for_selector(".board")
        was = hash_of(page)
        press(page, "j")
        page.wait_for_function("was => location.hash !== was", arg=was)
        wait_for(page, "#/image/")
    assert after == hash_of(page) != "#/image/3"


def test_images_and_patches(show: Open) -> None:
    page = show("#/image")
    page.wait_for_selector("figure a[href]")
    press(page, "j", "j", "k", "j", "Enter")
    wait_for(page, "#/image/45")
    press(page, "j")
    wait_for(page, "#/image/87")
    press(page, "k", "k", "k")
    wait_for(page, "#/image/3")
    page.wait_for_selector(".board")
    tab_to(page, ".board")
    press(page, "ArrowDown", "ArrowDown", "ArrowRight")
    assert "6 latents on row 2, column 2" in page.inner_text("main") and "patch=17" in hash_of(page)
    tab_to(page, ".firing button")
    press(page, "Enter")
    assert "latent=" in hash_of(page)
    page.wait_for_function("document.querySelector('.board img').alt.includes('strongest at')")
    assert page.evaluate("document.activeElement.matches('.firing button[aria-pressed=true]')")
    press(page, "Escape")
    assert "patch=" not in hash_of(page) and hash_of(page).startswith("#/image/3")
    press(page, "Escape")
    page.wait_for_function("location.hash.startsWith('#/image') && !location.hash.startsWith('#/image/')")
    wait_for(page, "#/image")
    press(page, "/")
    page.keyboard.type("finch")
    assert page.inner_text(".found") == "1 image"
    page.wait_for_selector("figure a[href]")
    press(page, "Enter")  # leads to the picture
    press(page, "Enter")
    wait_for(page, "#/image/3")
    assert "find=finch" in hash_of(page) and page.locator(".heading a.step").count() == 0


# ---- traits and comparison ----


def test_traits(show: Open, folder: pathlib.Path) -> None:
    traits = gallery_files.load(folder, "traits")["traits"]
    colours = sorted((t for t in traits if "wing_color" in t["name"]), key=lambda t: -t["best"][1]["test_ap"])
    page = show("#/traits")
    press(page, "/")
    page.keyboard.type("wing_color")
    press(page, "Enter")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "grid"
    tab_to(page, "[role=columnheader]:nth-child(4) button")
    press(page, "Enter")  # by the second scorer's AP
    assert "by=-ap1" in hash_of(page) and page.evaluate("document.activeElement.textContent").startswith("k-")
    press(page, "Shift+Tab", "Shift+Tab", "Shift+Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "grid"
    press(page, "ArrowDown", "ArrowDown", "ArrowUp", "j")
    assert selected(page).startswith(colours[1]["name"].removeprefix("has_")) and in_sight(page)
    press(page, "Enter")
    wait_for(page, "#/trait/")
    assert page.inner_text("h2") == colours[1]["name"]
    press(page, "j")  # the table's order
    page.wait_for_function("name => document.querySelector('h2').innerText === name", arg=colours[2]["name"])
    tab_to(page, "input[type=range]")
    press(page, "Home", "Escape")
    assert "opacity=0" in hash_of(page)
    tab_to(page, ".side a")
    assert page.evaluate("document.activeElement.textContent").startswith("latent ")
    press(page, "Escape")
    wait_for(page, "#/traits")
    assert selected(page).startswith(colours[2]["name"].removeprefix("has_")) and in_sight(page)
    assert page.inner_text(".found") == f"{len(colours)} of {len(traits)} traits"
    assert page.evaluate("document.activeElement.getAttribute('role')") == "grid"
    press(page, "Escape")
    assert page.locator('[aria-selected="true"]').count() == 0


def test_compare(show: Open, folder: pathlib.Path) -> None:
    columns = gallery_files.load(folder, "compare")["columns"]
    order = columns["id"][np.lexsort((columns["id"], -columns["corr"]))]
    page = show("#/compare")
    press(page, "j", "j")
    assert selected(page).split()[0] == str(order[1]) and in_sight(page)
    press(page, "Enter")
    wait_for(page, f"#/compare/{order[1]}")
    press(page, "ArrowRight")  # the table's order
    wait_for(page, f"#/compare/{order[2]}")
    press(page, "s")
    assert page.locator('main .star[aria-pressed="true"]').count() == 1
    tab_to(page, "input[type=checkbox]")
    press(page, "Space")
    assert "smooth=yes" in hash_of(page)
    tab_to(page, ".side a.picture")
    press(page, "Escape")
    wait_for(page, "#/compare?")
    assert selected(page).split()[0] == str(order[2]) and in_sight(page)
    press(page, "/")
    page.keyboard.type("mutual:yes corr>.5")
    n = (columns["mutual"].astype(bool) & (columns["corr"] > 0.5)).sum()
    assert page.inner_text(".found") == f"{n} of 300 pairs"
    press(page, "Enter", "Home", "Enter")
    page.wait_for_selector(".side")
    assert page.locator(".heading a.step").count() == 1  # none before the first


# ---- header and dialogs ----


def test_header_and_dialogs(show: Open, tmp_path: pathlib.Path) -> None:
    page = show()
    page.on("filechooser", lambda _: None)  # the browser needs a moment to know that we want to hear of it
    press(page, "Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    for view in ("images", "traits", "compare", "map"):
        tab_to(page, f"nav a[id='to-{ {'images': 'image'}.get(view, view) }']", 60)
        press(page, "Enter")
        page.wait_for_function("v => saev.state.view === v", arg={"images": "image"}.get(view, view))
    press(page, "?")
    assert "space bar begins a region" in page.inner_text("dialog")
    press(page, "Escape")
    page.wait_for_selector("dialog", state="detached")
    (tmp_path / "stars.json").write_text(
        json.dumps({**page.evaluate("saev.stars.toJSON()"), "stars": [21, 23], "notes": {}})
    )
    tab_to(page, ".tools button")
    press(page, "Enter")
    tab_to(page, "dialog input[type=file]")
    with page.expect_file_chooser() as chooser:
        press(page, "Space")
    chooser.value.set_files(tmp_path / "stars.json")
    page.wait_for_selector("text=Added 2 stars and 0 notes.")
    press(page, "Escape")
    tab_to(page, ".tools button:nth-child(2)", 60)
    press(page, "Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
