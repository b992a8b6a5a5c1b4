"""The gallery's page in a real browser, on made-up data (gallery_data.py). Skipped where there is no chromium."""

import json
import pathlib
import shutil

import gallery_data
import gallery_files
import numpy as np
import PIL.Image
import pytest
import torch
import traits_data
from browsing import Open, hash_of, needed, shot
from playwright import sync_api

from saev import scorers
from saev.data import config as data_config
from saev.formats import scripts, shards
from saev.protoeval import run as protoeval_run
from saev.visuals import collect
from saev.visuals import config as visuals_config

pytest_plugins = ["browser_fixtures"]
pytestmark = [needed, pytest.mark.slow]
HUE = np.array([255, 0, 128])
GREY = 128
VIEWS = {
    "map": "#/map?q=trait:wing+ap>.4&x=-3,-1&at=21&sort=max",
    "latent": "#/latent/21?opacity=50&smooth=yes",
    "dead": "#/latent/15",
    "images": "#/image?find=finch",
    "image": "#/image/3?patch=20&latent=21",
    "traits": "#/traits?find=color&by=-ap1",
    "trait": "#/trait/has_size%3A%3Alarge",
    "compare": "#/compare?find=corr>.5&on=21",
    "pair": "#/compare/21",
}


# ---- every view ----


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_no_view_is_wider_than_the_window(show: Open, width: int, scheme: str) -> None:
    page = show(viewport={"width": width, "height": 800}, color_scheme=scheme)
    for name, hash_ in VIEWS.items():
        page.evaluate("hash => { location.hash = hash; }", hash_)
        page.wait_for_function("!document.querySelector('.wait')")
        page.wait_for_timeout(60)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.locator("main .problem").count() == 0, name
        text = page.inner_text("body")
        assert not any(word in text for word in ("NaN", "undefined", "false", "null")), name
        tops = page.locator(".heading .step").evaluate_all("steps => steps.map((s) => s.offsetTop)")
        assert len(set(tops)) <= 1, name  # previous and next are in one line
    r, g, b = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (r + g + b < 150) == (scheme == "dark")


@pytest.mark.parametrize("width", [390, 1440])
def test_decimal_points_of_a_column_are_below_each_other(show: Open, width: int) -> None:
    page = show(viewport={"width": width, "height": 800})
    for hash_ in (
        "#/map?sort=-max",
        "#/map?sort=freq",
        "#/traits",
        "#/compare",
        "#/image/3",
        "#/image/3?patch=20",
    ):
        page.evaluate("hash => { location.hash = hash; }", hash_)
        page.wait_for_function("!document.querySelector('.wait')")
        page.wait_for_selector(".firing li" if "image" in hash_ else ".body .row")
        points = page.evaluate(
            """() => {
              const out = [];
              for (const row of document.querySelectorAll('.body .row, .firing button'))
                [...row.querySelectorAll('.number')].forEach((cell, i) => {
                  const text = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT).nextNode();
                  const range = document.createRange();
                  const at = text?.data.indexOf('.') ?? -1;
                  if (at < 0 || !cell.offsetParent) return;
                  range.setStart(text, at);
                  range.setEnd(text, at + 1);
                  (out[i] ??= []).push(range.getBoundingClientRect().x - row.getBoundingClientRect().x);
                });
              return out.filter(Boolean);
            }"""
        )
        assert points and all(len(column) > 3 and np.ptp(column) < 1.2 for column in points), hash_


def test_names_of_traits_stay_when_a_phone_scrolls_the_scorers(show: Open) -> None:
    page = show("#/traits", viewport={"width": 390, "height": 844})
    name = page.locator(".body .row > :first-child").first
    before = name.bounding_box()
    page.evaluate("document.querySelector('.table').scrollLeft = 90")
    page.wait_for_timeout(60)
    after = name.bounding_box()
    assert before and after and abs(before["x"] - after["x"]) < 6
    assert page.locator(".table").evaluate("t => t.scrollLeft") == 90


def test_theme_has_a_switch_that_is_kept(show: Open) -> None:
    page = show()
    for expected in ("light", "dark"):
        page.click("text=Theme:")
        assert page.evaluate("document.documentElement.dataset.theme") == expected
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.slow
@pytest.mark.parametrize("name", VIEWS)
def test_hash_opens_the_same_view(show: Open, name: str) -> None:
    page = show(VIEWS[name])
    page.wait_for_timeout(150)  # pictures and their captions
    text, hash_ = page.inner_text("main"), hash_of(page)
    again = show(hash_)
    again.wait_for_timeout(150)
    assert again.inner_text("main") == text and hash_of(again) == hash_


def test_pictures_have_alternative_texts(show: Open) -> None:
    page = show("#/latent/21")
    page.wait_for_function("[...document.images].every((i) => i.src)")
    alts = page.eval_on_selector_all("img", "imgs => imgs.map((i) => i.alt)")
    assert len(alts) == 48 and all(".jpg" in alt and "latent 21 has value" in alt for alt in alts)


def test_dead_latent_says_so(show: Open) -> None:
    page = show("#/latent/15")
    text = page.inner_text("main")
    assert "no patch of these activations" in text and "nan" not in text.lower()
    assert page.locator("section[data-group]").count() == 1  # the random images


# ---- map ----


def test_search_sort_and_brush_of_a_plain_loop(show: Open, folder: pathlib.Path) -> None:
    columns = gallery_files.load(folder, "stats")["columns"]
    freq, top, ids = (columns[k] for k in ("freq", "max", "id"))
    page = show("#/map?sort=-max")
    page.fill("input[type=search]", "freq<.01 max>3")
    keep = (freq < 0.01) & (top > 3)
    assert page.inner_text(".found").startswith(f"{keep.sum()} of 300")
    shown = page.locator(".table .body .row").first.inner_text().split()
    assert int(shown[1]) == ids[keep][np.argmax(top[keep])]
    page.fill("input[type=search]", "")
    box = page.locator("canvas.scatter").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 400, box["y"] + 300, steps=4)
    page.mouse.up()
    asked = page.evaluate("['x', 'y'].map((k) => saev.state.params.get(k).split(',').map(Number))")
    (x0, x1), (y0, y1) = asked
    with np.errstate(divide="ignore"):
        x, y = np.log10(freq), np.log10(top)
    n = ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).sum()
    assert 0 < n < 300 and page.inner_text(".found").startswith(f"{n} of 300")


def test_trait_and_ap_speak_of_one_trait(show: Open, folder: pathlib.Path) -> None:
    value = gallery_files.load(folder, "traits")
    trait, ap = (value["columns"][k] for k in ("trait", "ap"))
    names = [t["name"] for t in value["traits"]]
    n = sum(
        any(t >= 0 and "wing" in names[t] and a > 0.4 for t, a in zip(*row, strict=True))
        for row in zip(trait, ap, strict=True)
    )
    page = show("#/map?q=trait:wing+ap>.4")
    assert page.inner_text(".found").startswith(f"{n} of 300") and 0 < n < 300
    rows = page.locator(".table .body .row").all_inner_texts()
    assert rows and all("wing" in row for row in rows)  # the table shows the trait that was searched


def test_search_that_cannot_be_read_is_explained(show: Open) -> None:
    page = show()
    page.fill("input[type=search]", "size>3")
    assert 'No field "size"' in page.inner_text(".found")
    page.fill("input[type=search]", "freq<many")
    assert "no number" in page.inner_text(".found")


def test_patch_and_latent_of_an_image(show: Open) -> None:
    page = show("#/image/3")
    page.wait_for_selector(".board")
    page.focus(".board")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert "6 latents on row 2, column 2" in page.inner_text("main")
    assert "patch=17" in hash_of(page)
    page.locator(".firing button").first.click()
    assert "latent=" in hash_of(page)
    page.wait_for_function("document.querySelector('.frame img').alt.includes('strongest at')")
    box = page.locator(".board .frame").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 15.5 / 16, box["y"] + box["height"] * 0.5 / 16)
    assert "row 1, column 16" in page.inner_text("main h3")


def test_a_list_says_that_it_is_cut_only_where_it_is(show: Open, tmp_path: pathlib.Path) -> None:
    """Latent i fires on patch i of 100."""
    gallery_data.write(tmp_path, gallery_data.MadeUp(n_latents=100, n_images=8, side=10, n_view=1))
    codes = {
        "start": scripts.packed(np.arange(101), "u4"),
        "row": scripts.packed(np.arange(100), "u4"),
        "value": scripts.packed(np.ones(100), "f4"),
        "rank": scripts.packed(np.ones(100), "u2"),
    }
    scripts.write(tmp_path, "codes/000", {"images": [{"image": 0, **codes}]})
    for hash_, n, is_cut in (("#/image/3", 60, True), ("#/image/3?patch=17", 1, False)):
        page = show(hash_, tmp_path)
        page.wait_for_selector(".firing li")
        assert page.locator(".firing li").count() == n
        assert ("the first 60" in page.inner_text(".right .hint")) == is_cut


def test_an_image_outside_the_image_view_keeps_its_latents_heat(show: Open) -> None:
    """The image view holds images 3, 45, 87 and 129."""
    page = show("#/latent/21")
    page.wait_for_function("[...document.querySelectorAll('figure a')].every((a) => a.href)")
    link = page.locator("figure a[href^='#/image/136']").first
    strongest = link.locator("img").get_attribute("alt").partition("strongest at")[2]
    link.click()
    page.wait_for_selector(".absent")
    alt = page.locator(".board img").get_attribute("alt")
    assert strongest and alt.endswith(f"latent 21, strongest at{strongest}")
    assert page.locator(".legend").count() == 1 and page.locator(".outline").is_visible()
    bare = show("#/image/136")
    bare.wait_for_selector(".absent")
    assert bare.locator(".legend").count() == 0 and "strongest" not in bare.locator("img").get_attribute(
        "alt"
    )


# ---- heat ----


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Latent 1 fires on patch 5 of image 0; on image 1, patch i of 16 has heat 17 i."""
    dpath = tmp_path_factory.mktemp("plain")
    made = gallery_data.MadeUp(
        n_latents=8, n_images=2, side=4, n_view=0, traits=False, compare=False, picture=(GREY,) * 3
    )
    gallery_data.write(dpath, made)
    latents = scripts.read(dpath, "latents/000", "")["latents"]
    heats = [{5: 255}, {i: 17 * i for i in range(16)}]
    latents[0]["groups"] = [gallery_data.group([0, 1], heats, [8.0, 8.0], name="top", words="")]
    scripts.write(dpath, "latents/000", {"latents": latents})
    return dpath


def heat_page(show: Open, plain: pathlib.Path, **more: str) -> sync_api.Page:
    query = "&".join(f"{k}={v}" for k, v in {"outline": "no", **more}.items())
    page = show(f"#/latent/1?{query}", plain)
    page.wait_for_function(
        "document.images.length == 2 && [...document.images].every((i) => i.complete && i.naturalWidth)"
    )
    page.add_style_tag(
        content=".pictures { position: fixed; margin: 0 !important; left: 0; top: 600px; grid-template-columns: 160px 160px !important; }"
        " .frame { border-radius: 0 !important; }"
    )
    return page


def test_one_patch_paints_exactly_its_own_pixels(
    show: Open, plain: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    page = heat_page(show, plain)
    picture = shot(page, ".frame", 0, tmp_path)
    assert picture.shape == (160, 160, 3)
    expected = np.full((160, 160, 3), GREY)
    expected[40:80, 40:80] = np.round(GREY + 0.7 * (HUE - GREY))
    assert np.abs(picture - expected).max() <= 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Image 0 has 3 x 5 patches, the others 4 x 4. Latent 1 fires on patch 7 of both: row 2, column 3 of image 0; row 2,
    column 4 of image 1. An entry after image 0's last patch is never shown."""
    dpath = tmp_path_factory.mktemp("wide")
    made = gallery_data.MadeUp(
        n_latents=8, n_images=2, side=4, n_view=2, traits=False, compare=False, picture=(GREY,) * 3
    )
    gallery_data.write(dpath, made)
    for name, key in (("latents", "latents"), ("images", "images")):
        entries = scripts.read(dpath, f"{name}/000", "")[key]
        if name == "latents":
            heats = [{7: 255, 15: 255}, {7: 255}]
            entries[0]["groups"] = [gallery_data.group([0, 1], heats, [8.0, 8.0], name="top", words="")]
        else:
            entries[0]["grid"] = [3, 5]
        scripts.write(dpath, f"{name}/000", {key: entries})
    return dpath


def test_an_image_with_a_grid_of_its_own(show: Open, wide: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """--resize flexible: heat, words, and the image view's pointer and keys."""
    page = heat_page(show, wide)
    texts = [page.locator(".pictures img").nth(i).get_attribute("alt") for i in (0, 1)]
    assert "row 2, column 3" in texts[0] and "row 2, column 4" in texts[1]
    picture = shot(page, ".frame", 0, tmp_path)
    assert picture.shape == (96, 160, 3)
    hot = np.round(GREY + 0.7 * (HUE - GREY))
    expected = np.full((96, 160, 3), GREY)
    expected[32:64, 64:96] = hot
    assert np.abs(picture - expected).max() <= 1
    picture = shot(page, ".frame", 1, tmp_path)
    assert np.abs(picture[60, 140] - hot).max() <= 1 and np.abs(picture[60, 80] - GREY).max() <= 1
    for n, (rows, columns) in enumerate([(3, 5), (4, 4)]):
        page = show(f"#/image/{7 * n + 3}", wide)
        board = page.locator(".board")
        assert f"in {rows} rows and {columns} columns" in board.get_attribute("aria-label")
        box = board.locator(".frame").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(columns / rows, rel=0.02)
        page.mouse.click(box["x"] + box["width"] * 2.5 / columns, box["y"] + box["height"] * 1.5 / rows)
        page.wait_for_function(f"location.hash.includes('patch={columns + 2}')")
        cursor = board.locator(".cursor").bounding_box()
        assert cursor["width"] == pytest.approx(box["width"] / columns, rel=0.05)
        assert cursor["x"] - box["x"] == pytest.approx(box["width"] * 2 / columns, abs=3)
        board.focus()
        for _ in range(rows):  # the last step leaves the grid
            page.keyboard.press("ArrowDown")
        page.wait_for_function(f"location.hash.includes('patch={(rows - 1) * columns + 2}')")


def test_colour_is_linear_in_heat_and_equals_the_legend(
    show: Open, plain: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    page = heat_page(show, plain, opacity="60")
    picture = shot(page, ".frame", 1, tmp_path)
    legend = shot(page, ".legend .strip", 0, tmp_path)
    middle = legend[legend.shape[0] // 2]
    for i in range(16):
        color = picture[40 * (i // 4) + 20, 40 * (i % 4) + 20]
        assert np.abs(color - (GREY + 0.6 * i / 15 * (HUE - GREY))).max() <= 1.5
        place = min(round((17 * i + 0.5) / 256 * legend.shape[1]), legend.shape[1] - 4)
        if 0 < i < 15:  # its corners are round
            assert np.abs(middle[place] - color).max() <= 3


def test_opacity_smooth_outline_and_scale(show: Open, plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = heat_page(show, plain)
    page.get_by_label("Opacity").fill("0")
    assert np.abs(shot(page, ".frame", 0, tmp_path) - GREY).max() <= 1  # the picture itself
    page.get_by_label("Opacity").fill("100")
    page.get_by_label("Smooth").check()
    smooth = shot(page, ".frame", 0, tmp_path)
    assert len(np.unique(smooth.reshape(-1, 3), axis=0)) > 10
    page.get_by_label("Outline").check()
    assert page.locator(".outline").first.is_visible()
    box, frame = (page.locator(s).first.bounding_box() for s in (".outline", ".frame"))
    assert (box["x"] - frame["x"], box["y"] - frame["y"], box["width"]) == (40, 40, 40)
    page.get_by_label("Scale").select_option("image")
    assert "largest of each image" in page.inner_text(".legend") and "scale=image" in hash_of(page)


# ---- scores that are negative ----


@pytest.mark.slow
def test_prototypes_by_distance(show: Open, tmp_path: pathlib.Path, make_shards) -> None:
    """All scores are below 0. An image's list begins with the scores that are largest among the prototype's own, and
    heat goes from the mean score to the largest."""
    n, p, d, k = 30, 16, 6, 5
    dpath, acts_NLTD = make_shards(n_imgs=n, n_patches=p, d_vit=d, layers=(3,), cls_token=False)
    for i, record in enumerate(shards.ShardDir.open(dpath).records):
        fpath = tmp_path / "photos" / record.path
        fpath.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (32, 32), (8 * i, 100, 50)).save(fpath)
    vectors_KD = (
        torch.randn(k, d, generator=torch.Generator().manual_seed(0)) * torch.arange(1, k + 1)[:, None] / 3
    )
    scorer = scorers.Prototypes.of(vectors_KD, torch.zeros(d), "distance")
    scorers.save(scorer, tmp_path / "kmeans-5-abc.bin")
    cfg = visuals_config.Visuals(
        images=data_config.ImageFolder(str(tmp_path / "photos")),
        scorer=visuals_config.Fitted(str(tmp_path / "kmeans-5-abc.bin")),
        data=data_config.Shards(str(dpath), 3),
        dump_to=str(tmp_path / "gallery"),
        image_view=4,
        device="cpu",
    )
    collect.main(cfg)
    score_NPK = scorer(torch.from_numpy(acts_NLTD[:, 0]).flatten(0, 1)).numpy().reshape(n, p, k)
    best_NP = score_NPK.argmax(axis=2)
    assert score_NPK.max() < 0
    page = show("#/image/0", tmp_path / "gallery")
    page.wait_for_selector(".firing li")
    lines = [text.split() for text in page.locator(".firing button").all_inner_texts()]
    ranks = [float(rank.rstrip("%")) / 100 for *_, rank in lines]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) == len(ranks) == len(set(best_NP[0])) > 2
    for name, value, rank in lines:
        mine_n = score_NPK[..., int(name)][best_NP == int(name)]
        peak = score_NPK[0, best_NP[0] == int(name), int(name)].max()
        bin_ = np.histogram(mine_n, 64)[0].max() / len(mine_n)
        assert float(value) == pytest.approx(peak, rel=5e-3)
        assert float(rank.rstrip("%")) / 100 == pytest.approx((mine_n < peak).mean(), abs=bin_ + 1e-3)
    assert "share of the prototype's patches with a smaller one, by which they are sorted" in page.inner_text(
        ".right"
    )
    # the same heat as by hand, on the patches that it wins
    (chosen, *_), mean_K = lines[0], score_NPK.mean(axis=(0, 1))
    page.locator(".firing button").first.click()
    page.wait_for_function("document.querySelector('.board img').alt.includes('strongest at')")
    alpha_P = page.evaluate(
        """() => { const c = document.querySelector('.board canvas');
        return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3); }"""
    )
    score_P, at = score_NPK[0, :, int(chosen)], int(chosen)
    want_P = (score_P - mean_K[at]) / (score_NPK[..., at].max() - mean_K[at])
    want_P = np.where(best_NP[0] == at, want_P.clip(0), 0)
    assert want_P.max() > 0
    np.testing.assert_allclose(alpha_P, 255 * want_P, atol=1)
    text = show(f"#/latent/{chosen}", tmp_path / "gallery").inner_text("main")
    assert "Mean |value|" in text and "Fires together" not in text


# ---- traits that protoeval wrote ----


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A real gallery with real traits."""
    made = traits_data.make(tmp_path_factory.mktemp("evaluated"))
    protoeval_run.main(made.cfgs)
    return made.gallery


def test_search_by_traits_of_protoeval(show: Open, evaluated: pathlib.Path) -> None:
    value = gallery_files.load(evaluated, "traits")
    ids = gallery_files.load(evaluated, "stats")["columns"]["id"]
    names, columns = [trait["name"] for trait in value["traits"]], value["columns"]
    page = show("#/map?sort=-ap", evaluated)
    for word, limit in (("wing", 0.7), ("script", 0.5), ("size", 0.0)):
        page.fill("input[type=search]", f"trait:{word} ap>{limit}")
        is_hit_CF = (columns["trait"] >= 0) & (columns["ap"] > limit)
        is_hit_CF &= np.array([word in name for name in names])[columns["trait"]]
        want = set(ids[is_hit_CF.any(axis=1)].tolist())
        assert page.inner_text(".found").startswith(f"{len(want)} of {len(ids)}") and 0 < len(want) < len(ids)
        shown = page.locator(".table .body .row a").all_inner_texts()
        assert {int(text) for text in shown} == want
        texts = page.locator(".table .body .row").all_inner_texts()
        assert all(word in text for text in texts)


def test_a_trait_of_protoeval_with_right_and_wrong_images(show: Open, evaluated: pathlib.Path) -> None:
    value = gallery_files.load(evaluated, "traits")
    entries = gallery_files.load(evaluated, f"{value['files']['folder']}/000")["traits"]
    images = gallery_files.load(evaluated, f"{value['files']['folder']}/images/000")["images"]
    page = show("#/traits", evaluated)
    page.locator("main a", has_text="</script><script>").click()
    page.wait_for_selector(".side")
    assert page.inner_text("h2") == traits_data.NAMES[2] and page.title() != "hacked"
    page.wait_for_function("[...document.images].every((i) => i.complete && i.naturalWidth)")
    page.wait_for_timeout(60)
    sides = page.locator(".side")
    assert sides.count() == 3 and "first 12 of 16 latents" in page.inner_text("main")
    for i, entry in enumerate(entries[2]):
        best, side = value["traits"][2]["best"][i], sides.nth(i)
        text = side.inner_text()
        assert value["scorers"][i]["name"] in text and f"{best['prototype']} of 12" in text
        assert f"{entry['right'].sum()} of {len(entry['right'])} right" in text
        marks = side.locator("figure").evaluate_all("figures => figures.map((f) => f.className)")
        assert marks == ["right" if right else "wrong" for right in entry["right"]]
    # a picture opens the image view where the gallery has the image, and only there
    links = sides.nth(0).locator("figure a").evaluate_all("links => links.map((a) => a.getAttribute('href'))")
    for place, link in zip(entries[2][0]["image"], links, strict=True):
        if place < len(images):
            n = images[place]["n"]
            assert link is None if n < 0 else link.startswith(f"#/image/{n}?")
    sides.nth(0).locator("p a").click()
    page.wait_for_selector(".facts")
    assert traits_data.NAMES[2] in page.inner_text("aside")


def test_latents_that_did_not_take_part_say_so(show: Open, evaluated: pathlib.Path) -> None:
    """protoeval compared the first 12 of 16 latents."""
    words = "Only the first 12 latents took part (--n-prototypes)."
    ids = gallery_files.load(evaluated, "stats")["columns"]["id"]
    for latent in (ids.min(), ids.max()):
        page = show(f"#/latent/{latent}", evaluated)
        assert (words in page.inner_text("aside")) == (latent >= 12)
    assert words in show("#/map", evaluated).inner_html("[role=grid]")


def test_a_trait_that_no_train_image_has(show: Open, evaluated: pathlib.Path) -> None:
    page = show("#/trait/has_crown_color%3A%3Ain_no_train_image", evaluated)
    assert "No train image has it, so no prototype is chosen." in page.inner_text("main")
    assert page.locator(".side").count() == 0


# ---- names, stars, files ----


def test_names_are_text(show: Open, tmp_path: pathlib.Path) -> None:
    gallery_data.write(tmp_path, gallery_data.MadeUp(n_latents=20, n_images=8, n_view=2, nasty=True))
    page = show("#/map", tmp_path)
    for hash_ in ("#/map?at=3", "#/latent/3", "#/image", "#/image/3", "#/traits", "#/compare", "#/compare/3"):
        page.evaluate("hash => { location.hash = hash; }", hash_)
        page.wait_for_function("!document.querySelector('.wait')")
        page.wait_for_timeout(60)
        assert page.locator("main script, main img[onerror]").count() == 0
        assert "\u202e" not in page.inner_text("body") and "gull⟨U+202E⟩gnp.exe" in page.inner_text("header")
        assert page.title() != "hacked"
    page.evaluate("location.hash = '#/traits'")
    assert all(saev_name in page.inner_text("main") for saev_name in gallery_data.NASTY[:3])
    page.locator("main a", has_text="</script><img").first.click()
    page.wait_for_selector(".side")
    assert "</script><img src=x onerror=alert(1)>" in page.inner_text("h2")


def test_stars_and_notes_are_exported_and_imported(show: Open, tmp_path: pathlib.Path) -> None:
    page = show("#/latent/21")
    page.click("main .star")
    page.fill("textarea", "a beak")
    page.keyboard.press("Escape")
    page.click("text=★ Stars")
    with page.expect_download() as download:
        page.click("text=Export JSON")
    download.value.save_as(tmp_path / "stars.json")
    kept = json.loads((tmp_path / "stars.json").read_text())
    assert kept["stars"] == [21] and kept["notes"] == {"21": "a beak"}
    page.reload()
    assert page.locator('main .star[aria-pressed="true"]').count() == 1

    other = show("#/map?q=star:")
    assert other.inner_text(".found").startswith("0 of")
    other.click("text=★ Stars")
    other.set_input_files("input[type=file]", tmp_path / "stars.json")
    other.wait_for_selector("text=Added 1 star and 1 note.")
    assert other.inner_text(".found").startswith("1 of")
    broken = {
        "format": {"format": "x"},
        "another scorer": {"scorer": "ab"},
        '"stars"': {"stars": ["1"]},
        '"notes"': {"notes": {"9999": "x"}},
    }
    for words, change in broken.items():
        (tmp_path / "bad.json").write_text(json.dumps({**kept, **change}))
        other.set_input_files("input[type=file]", tmp_path / "bad.json")
        other.wait_for_function(
            "w => document.querySelector('dialog [role=status]').textContent.includes(w)", arg=words
        )
        assert "Nothing was imported." in other.inner_text("dialog")
    (tmp_path / "bad.json").write_text("{")
    other.set_input_files("input[type=file]", tmp_path / "bad.json")
    other.wait_for_selector("text=This file is not JSON.")


def test_stars_where_storage_is_refused(show: Open) -> None:
    refuse = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }});"
    page = show("#/latent/21", init=refuse)
    page.click("main .star")
    assert page.locator('main .star[aria-pressed="true"]').count() == 1
    page.click("text=★ Stars")
    assert "does not keep them" in page.inner_text("dialog")


@pytest.mark.parametrize("text", [None, "saev.put(", "var x = 1;"])
def test_missing_or_broken_file_is_explained(show: Open, tmp_path: pathlib.Path, text: str | None) -> None:
    made = gallery_data.MadeUp(n_latents=20, n_images=8, n_view=2)
    gallery_data.write(tmp_path, made)

    def damage(name: str) -> None:
        fpath = tmp_path / "data" / f"{name}.js"
        fpath.unlink() if text is None else fpath.write_text(text)

    damage("latents/000")
    page = show("#/latent/3", tmp_path, errors=True)
    assert "data/latents/000.js" in page.inner_text(".problem")
    damage("traits")
    assert "data/traits.js" in show("#/traits", tmp_path, errors=True).inner_text(".problem")
    damage("stats")
    assert "data/stats.js" in show("#/map", tmp_path, errors=True).inner_text(".problem")


@pytest.mark.parametrize(
    ("n_images", "n_view", "n_listed", "expected"), [(24, 4, 900, 500), (24, 4, 240, 240)]
)
def test_the_image_view_that_is_suggested_exists(
    show: Open, tmp_path: pathlib.Path, n_images: int, n_view: int, n_listed: int, expected: int
) -> None:
    made = gallery_data.MadeUp(
        n_latents=8, n_images=n_images, n_view=n_view, n_listed=n_listed, traits=False, compare=False
    )
    gallery_data.write(tmp_path, made)
    page = show("#/image/10", tmp_path)
    page.wait_for_selector(".absent")
    assert page.inner_text(".absent").endswith(f"--image-view {expected}")


@pytest.mark.parametrize("name", ["style.css", "data.js", "views/map.js"])
def test_a_missing_or_cut_file_of_the_page_is_named(show: Open, tmp_path: pathlib.Path, name: str) -> None:
    gallery_data.write(
        tmp_path, gallery_data.MadeUp(n_latents=8, n_images=8, n_view=0, traits=False, compare=False)
    )
    fpath = tmp_path / name
    text = fpath.read_text()
    for damaged in [None] + [text[: len(text) // 2]] * name.endswith("js"):
        fpath.unlink() if damaged is None else fpath.write_text(damaged)
        problems = show("#/map", tmp_path, errors=True).locator("[role=alert]").all_inner_texts()
        words = (
            f"{name} is missing or damaged. Copy the gallery's whole folder again, or run visuals.py again."
        )
        assert words in problems


def test_damaged_numbers_are_named(show: Open, tmp_path: pathlib.Path) -> None:
    """A script that runs, whose numbers are cut."""
    gallery_data.write(
        tmp_path, gallery_data.MadeUp(n_latents=8, n_images=8, n_view=0, traits=False, compare=False)
    )
    value = scripts.read(tmp_path, "latents/000", "")
    value["latents"][1]["groups"][0]["heat"]["b"] = "AAAA"
    scripts.write(tmp_path, "latents/000", value)
    text = show("#/latent/3", tmp_path).inner_text(".problem")
    assert text.startswith("data/latents/000.js is damaged: ") and "run again the command" in text
    scripts.write(tmp_path, "latents/000", {"latents": value["latents"][:1]})
    assert "data/latents/000.js is damaged: it lacks" in show("#/latent/3", tmp_path).inner_text(".problem")


def test_absent_data_name_their_command(show: Open, tmp_path: pathlib.Path) -> None:
    made = gallery_data.MadeUp(n_latents=20, n_images=8, n_view=0, traits=False, compare=False)
    gallery_data.write(tmp_path, made)
    for hash_, command in {
        "#/traits": "protoeval.py",
        "#/compare": "saev.compare",
        "#/image": "--image-view 8",  # all that there are
        "#/image/3": "--image-view 8",
    }.items():
        page = show(hash_, tmp_path)
        page.wait_for_selector(".absent")
        assert command in page.inner_text(".absent")


def test_pair_shows_as_many_pictures_of_both_sides(show: Open, tmp_path: pathlib.Path) -> None:
    made = gallery_data.MadeUp(n_latents=20, n_images=24, n_view=0)
    gallery_data.write(tmp_path, made)
    page = show("#/compare/21", tmp_path)
    sides = [page.locator(".side").nth(i) for i in (0, 1)]
    assert [side.locator("figure").count() for side in sides] == [8, 8]
    following = page.locator(".heading a.step").last.get_attribute("href")
    page.keyboard.press("j")
    page.wait_for_function("!location.hash.endsWith('/21')")
    assert following == hash_of(page)


def test_pair_without_pictures_says_where_they_come_from(show: Open, tmp_path: pathlib.Path) -> None:
    gallery_data.write(tmp_path, gallery_data.MadeUp(n_latents=20, n_images=8, n_view=0))
    empty = [{"id": i, "low": 0.0, "high": 0.0, "groups": []} for i in range(20)]
    scripts.write(tmp_path, "compare/000", {"latents": empty})
    for href, words in (
        ("../other/index.html", "The other gallery does not show this latent"),
        ("", "--other-gallery"),
    ):
        value = scripts.read(tmp_path, "compare", "")
        scripts.write(tmp_path, "compare", value | {"other": value["other"] | {"href": href}})
        assert words in show("#/compare/21", tmp_path).locator(".side").nth(1).inner_text()


def test_heat_of_a_pair_with_prototypes_does_not_begin_at_0(show: Open, tmp_path: pathlib.Path) -> None:
    gallery_data.write(tmp_path, gallery_data.MadeUp(n_latents=20, n_images=8, n_view=0))
    value = scripts.read(tmp_path, "compare", "")
    for noun, low in (("latent", "0"), ("prototype", "low")):
        scorer = value["other"]["scorer"] | {"noun": noun}
        scripts.write(tmp_path, "compare", value | {"other": value["other"] | {"scorer": scorer}})
        page = show("#/compare/21", tmp_path)
        assert page.inner_text(".legend").split() == [low, "maximum"]
        assert ("the mean score (prototypes)" in page.inner_text("main")) == (noun == "prototype")


def test_signed_values_have_a_linear_axis(show: Open, tmp_path: pathlib.Path) -> None:
    gallery_data.write(tmp_path, gallery_data.MadeUp(n_latents=40, n_images=8, n_view=0, signed=True))
    label = show("#/map?value=mean", tmp_path).get_attribute("canvas.scatter", "aria-label")
    assert label is not None and "against mean value" in label and "prototypes" in label


def test_a_search_that_cannot_be_read_hides_no_view(show: Open) -> None:
    for hash_ in (
        "#/latent/21?q=size>3",
        "#/trait/has_size%3A%3Alarge?find=size>3",
        "#/compare/21?find=size>3",
    ):
        page = show(hash_)
        assert page.locator("figure").count() > 3 and page.locator(".problem").count() == 0
        assert page.locator(".heading a.step").count() == 0
    page.keyboard.press("Escape")
    page.wait_for_selector(".table")
    assert 'No field "size"' in page.inner_text(".found")


def test_latents_and_views_that_do_not_exist(show: Open) -> None:
    assert "is not among" in show("#/latent/2").inner_text(".problem")
    assert 'no view "nothing"' in show("#/nothing").inner_text(".problem")


@pytest.mark.slow
def test_a_large_gallery_opens_with_few_files_and_elements(show: Open, tmp_path: pathlib.Path) -> None:
    """The map needs three files of data, and rows only for what is in sight. How long it takes: `benchmarks.page`."""
    made = gallery_data.MadeUp(n_latents=32768, n_stored=64, n_listed=100_000, n_images=32, n_view=4)
    gallery_data.write(tmp_path, made)
    needed = [tmp_path / "data" / f"{name}.js" for name in ("stats", "traits", "compare")]
    others = [fpath for fpath in (tmp_path / "data").rglob("*.js") if fpath not in needed]
    assert len(others) > 4
    (tmp_path / "data").rename(tmp_path / "all")
    for fpath in needed:
        fpath.parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "all" / fpath.name, fpath)
    page = show("#/map", tmp_path)  # another file that was asked for would be an error in the console
    assert page.inner_text(".found").startswith("32,768 of 32,768")
    assert 10 < page.locator(".table .body .row").count() < 80
    assert page.locator("*").count() < 800
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "all").rename(tmp_path / "data")
    page = show("#/image", tmp_path)
    page.wait_for_selector(".found:has-text('4 images')")  # those in the image view
    assert page.locator("*").count() < 800
    page.fill("input[type=search]", "more/09999")
    page.wait_for_selector(".found:has-text('0 images')")
