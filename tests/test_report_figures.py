"""Charts as figures for print: three formats, one look, and nothing that overlaps."""

import itertools
import pathlib
import re
import xml.etree.ElementTree as ET

import inprocess
import matplotlib.axes
import matplotlib.colors
import matplotlib.figure
import matplotlib.text
import matplotlib.transforms
import numpy as np
import polars as pl
import pytest

from saev import errors
from saev.formats import results
from saev.protoeval import merge, report, stats
from saev.report import charts, figures, tables
from saev.training import runs

KS, NS = (128, 512, 2048), (16, 64, 256, 1024, 5994)
LONG = "Random similarity=cosine fit=0123abcd seed=1"
MAGIC = {".pdf": b"%PDF-", ".svg": b"<?xml", ".png": b"\x89PNG", ".PDF": b"%PDF-"}


def row(name: str, k: int, n: int, value: float, n_boot: int) -> results.Row:
    boot_RM = value + np.linspace(-0.02, 0.02, n_boot)[None]
    ap_RT = np.full((1, 3), value)
    return results.Row(name, k, n, np.zeros((1, 3), np.int64), ap_RT, ap_RT, boot_RM)


def grid_rows(scorers: dict[str, tuple[int, ...]], n_boot: int = 5) -> list[results.Row]:
    """Rows of scorers with these numbers of prototypes, and of both references."""
    values = {
        (k, n): 0.1 + 0.01 * i + 0.02 * j
        for (i, k), (j, n) in itertools.product(enumerate(KS), enumerate(NS))
    }
    return [
        row(results.CONSTANT, 1, NS[-1], 0.1, n_boot),
        *(row(name, 1, n, 0.15 + n / 1e5, n_boot) for name in results.PROBES[1:] for n in NS),
        *(row(name, k, n, values[k, n], n_boot) for name, ks in scorers.items() for k in ks for n in NS),
    ]


@pytest.fixture
def about() -> results.About:
    return results.About(
        *("hf-hub:imageomics/bioclip-2", 23, "256 tokens an image (image)", ["abc"], "f" * 64, 3, 0, 1, 5),
        *("2026-01-01T00:00:00+00:00", {}),
        chosen_on="5,994 train images",
        measured_on="5,794 test images",
        n_classes=200,
    )


def grid(
    scorers: dict[str, tuple[int, ...]], about: results.About, n_boot: int = 5
) -> matplotlib.figure.Figure:
    cells = stats.cells(stats.summary(grid_rows(scorers, n_boot)), about)
    return charts.grid(cells, report.caption(cells, [about]))


def fronts(n: int, seed: int = 0) -> pl.DataFrame:
    """Runs that crowd around a curve, as the runs of a sweep do."""
    rng = np.random.default_rng(seed)
    l0_N = np.array([4.0, 8.0, 16.0, 32.0, 64.0])[np.arange(n) % 5]
    columns = {
        "run": [f"{i:x}".rjust(8, "f") for i in range(n)],
        "kind": [f"Kind{i % 4}" for i in range(n)],
        "l0": l0_N,
        "normalized_mse": 0.6 * l0_N**-0.3 + rng.uniform(0, 0.04, n),
        "state": ["done"] * n,
        "source": ["held-out"] * n,
        "vit": ["hf-hub:imageomics/bioclip-2"] * n,
        "layers": [[23]] * n,
        "tokens": ["image"] * n,
        "n_trained": [10**8] * n,
        "n_measured": [1e6] * n,
    }
    return runs.front(pl.DataFrame(columns))


def front(n: int) -> matplotlib.figure.Figure:
    found = fronts(n)
    return charts.front(found, runs.caption(found))


def caption_of(figure: matplotlib.figure.Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def boxes(texts: list[matplotlib.text.Text]) -> list[matplotlib.transforms.Bbox]:
    """Where texts are drawn, without the lines that join them to points."""
    return [matplotlib.text.Text.get_window_extent(text) for text in texts]


def overlapping(found: list[matplotlib.transforms.Bbox]) -> list[tuple[int, int]]:
    pairs = itertools.combinations(enumerate(found), 2)
    return [(i, j) for (i, a), (j, b) in pairs if a.overlaps(b)]


# ---- files ----


@pytest.fixture(scope="module")
def small() -> matplotlib.figure.Figure:
    return front(5)


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_extension_is_the_format(
    suffix: str, small: matplotlib.figure.Figure, tmp_path: pathlib.Path
) -> None:
    first, again = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for fpath in (first, again):
        figures.save(small, fpath)
    assert first.read_bytes().startswith(MAGIC[suffix])
    assert first.read_bytes() == again.read_bytes()
    assert [f.name for f in sorted(tmp_path.iterdir())] == [first.name, again.name]


def test_text_stays_text(small: matplotlib.figure.Figure, tmp_path: pathlib.Path) -> None:
    figures.save(small, tmp_path / "a.svg")
    texts = [
        "".join(e.itertext()) for e in ET.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"Kind0", "fffffff4", "normalised MSE"} <= set(texts)
    figures.save(small, tmp_path / "a.pdf")
    data = (tmp_path / "a.pdf").read_bytes()
    assert re.search(rb"/Subtype\s*/(CIDFontType2|TrueType)", data) and b"/Type3" not in data
    assert b"/Subtype /Image" not in data


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_names_of_any_script(suffix: str, tmp_path: pathlib.Path) -> None:
    """Without a warning for each character that the font lacks (pytest makes warnings errors)."""
    rows = fronts(2).with_columns(run=pl.Series(["鷺", "$\\frac$"]))
    figures.save(charts.front(rows, "鷺"), tmp_path / f"x{suffix}")
    if suffix == ".svg":
        assert (tmp_path / "x.svg").read_text().count("鷺") == 2


@pytest.mark.parametrize("name", ["x.jpg", "x", "pdf", "x.pdf.gz"])
def test_another_extension(name: str) -> None:
    with pytest.raises(errors.UserError, match=rf"^--plot {name}: .* must end in \.pdf, \.svg or \.png\.$"):
        figures.check(name, "--plot")


def test_both_reports_write_what_the_extension_says(about: results.About, tmp_path: pathlib.Path) -> None:
    report.write(
        tmp_path / "results" / "a", report.Found(about, ["a", "b", "c"], grid_rows({"Random": KS})), []
    )
    done = inprocess.run("protoeval.py", "--report", tmp_path / "results", "--plot", tmp_path / "p" / "x.pdf")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p" / "x.pdf").read_bytes().startswith(b"%PDF-")
    assert (tmp_path / "results" / "report" / "chart.png").read_bytes().startswith(b"\x89PNG")
    wrong = inprocess.run("protoeval.py", "--report", tmp_path / "results", "--plot", "x.gif")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "--plot x.gif: a figure's file must end in" in wrong.stderr
    alone = inprocess.run("protoeval.py", "--plot", "x.pdf")
    assert alone.returncode == 2 and "--plot x.pdf: only with --report" in alone.stderr
    wrong = inprocess.run("-m", "saev.training.report", tmp_path, "--plot", "x.gif")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "--plot x.gif: a figure's file must end in" in wrong.stderr


def test_several_charts_have_names_of_their_own(about: results.About, tmp_path: pathlib.Path) -> None:
    rows = grid_rows({"Random": KS[:1]})
    for certainty in (3, 4):
        said = results.About(**{**vars(about), "min_certainty": certainty})
        report.write(tmp_path / "results" / f"{certainty}", report.Found(said, ["a", "b", "c"], rows), [])
    merge.write(tmp_path / "results", str(tmp_path / "x.svg"))
    assert sorted(f.name for f in tmp_path.glob("*.svg")) == ["x-ffffffff-3.svg", "x-ffffffff-4.svg"]


# ---- mAP against train images ----


def test_a_number_of_prototypes_has_one_look_in_every_panel(about: results.About) -> None:
    figure = grid({"Low": KS[1:], "Mid": KS, "High": KS[:1]}, about)
    looks: dict[str, set[object]] = {}
    want = {"High": [128], "Low": [512, 2048], "Mid": [128, 512, 2048]}
    for axes in figure.axes:
        ks = want[axes.get_title()]
        for k, line, band in zip(ks, axes.get_lines(), axes.collections, strict=False):
            look = (matplotlib.colors.to_hex(line.get_color()), line.get_marker())
            looks.setdefault(f"K = {k:,}", set()).add(look)
            assert matplotlib.colors.to_hex(band.get_facecolor()[0]) == look[0]
    assert {k: len(found) for k, found in looks.items()} == {"K = 128": 1, "K = 512": 1, "K = 2,048": 1}
    (legend,) = figure.legends
    assert [axes.get_legend() for axes in figure.axes] == [None] * 3
    entries = dict(zip((t.get_text() for t in legend.get_texts()), legend.legend_handles, strict=True))
    assert [*entries] == [
        *sorted(looks, key=lambda k: int(k[4:].replace(",", ""))),
        "logistic probe (mean)",
        "logistic probe (max)",
        "constant score",
        "95% interval",
    ]
    for k, (look,) in ((k, tuple(found)) for k, found in looks.items()):
        assert (matplotlib.colors.to_hex(entries[k].get_color()), entries[k].get_marker()) == look


def test_the_looks_differ_in_greyscale() -> None:
    styles = [*charts._styles([2**k for k in range(4, 12)]).values()]
    grey = [float(np.dot(style["color"][:3], (0.2126, 0.7152, 0.0722))) for style in styles]
    assert grey == sorted(grey, reverse=True) and np.diff(grey).max() < -0.03
    assert grey[0] < 0.75, "light lines vanish on paper"
    assert len({style["marker"] for style in styles}) == 8


def test_the_caption_says_what_is_shown(about: results.About) -> None:
    assert caption_of(grid({"Random": KS}, about)) == (
        "hf-hub:imageomics/bioclip-2, layer 23; 256 tokens an image (image). mAP: mean over 3 traits of the average "
        "precision on 5,794 test images of the prototype that is best on n of 5,994 train images. Shaded: 95% "
        "bootstrap interval of the mAP over 5 resamples of the test images (quantiles 2.5% and 97.5%)."
    )
    none = grid({"Random": KS}, results.About(**{**vars(about), "n_boot": 0}), n_boot=0)
    assert "Shaded" not in caption_of(none)
    assert "95% interval" not in [t.get_text() for t in none.legends[0].get_texts()]


def test_a_caption_of_several_places(about: results.About) -> None:
    layers = [results.About(**{**vars(about), "layer": n, "seed": n, "n_seeds": 3}) for n in (11, 5)]
    cells = pl.concat([stats.cells(stats.summary(grid_rows({"A": KS})), a) for a in layers])
    text = report.caption(cells, layers)
    assert text.startswith("hf-hub:imageomics/bioclip-2, layers 5, 11; 256 tokens")
    assert "Means over 3 draws of the train images." in text and "several seeds" in text


def test_a_table_calls_one_thing_95_percent(about: results.About) -> None:
    cells = stats.cells(stats.summary(grid_rows({"Random": KS})), about)
    assert [h for h in report.summary_table(cells).columns if "95%" in h] == ["95%"]


@pytest.mark.parametrize("n_scorers", [1, 2, 4, 6])
def test_nothing_of_the_grid_overlaps(n_scorers: int, about: results.About) -> None:
    figure = grid({f"{LONG} {i}": KS for i in range(n_scorers)}, about)
    figure.draw_without_rendering()
    assert figure.get_size_inches()[0] == (figures.COLUMN if n_scorers == 1 else figures.PAGE)
    shown = [axes for axes in figure.axes if axes.axison]
    for axes in shown:
        labels = boxes([t for t in axes.get_xticklabels() if t.get_text()])
        assert len(labels) >= 2 and overlapping(labels) == []
    found = boxes([t for axes in shown for t in (axes.title, axes.xaxis.label)])
    found += [legend.get_window_extent() for legend in figure.legends] + boxes([figure._supxlabel])
    found += [axes.get_window_extent() for axes in shown]
    assert overlapping(found) == []
    width, height = figure.bbox.size
    assert all(b.x0 >= 0 and b.x1 <= width and b.y0 >= 0 and b.y1 <= height for b in found)


# ---- normalised MSE against L0 ----


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 12, 40])
def test_every_run_is_named_and_no_names_overlap(n: int, tmp_path: pathlib.Path) -> None:
    figure = front(n)
    figures.save(figure, tmp_path / "x.pdf")
    (axes,) = figure.axes
    assert sorted(t.get_text() for t in axes.texts) == sorted(fronts(n)["run"])
    figure.draw_without_rendering()
    found = boxes(list(axes.texts))
    assert overlapping(found) == []
    points = axes.transData.transform(fronts(n).select("l0", "normalized_mse").to_numpy())
    assert not any(box.contains(x, y) for box in found for x, y in points)
    inside = axes.get_window_extent()
    assert all(inside.x0 < b.x0 and b.x1 < inside.x1 and inside.y0 < b.y0 and b.y1 < inside.y1 for b in found)


def test_of_many_runs_those_on_the_front_are_named() -> None:
    found = fronts(90)
    (axes,) = front(90).axes
    assert {t.get_text() for t in axes.texts} <= set(found.filter("is_best")["run"])
    assert caption_of(front(90)).endswith("Named: runs on the front.")


def test_a_kind_has_one_look_of_its_own() -> None:
    (axes,) = front(40).axes
    looks = {c.get_label(): matplotlib.colors.to_hex(c.get_facecolor()[0]) for c in axes.collections}
    assert list(looks) == ["Kind0", "Kind1", "Kind2", "Kind3"] and len(set(looks.values())) == 4
    assert len({c.get_paths()[0].vertices.tobytes() for c in axes.collections}) == 4


def test_the_fronts_caption() -> None:
    assert caption_of(front(12)) == (
        "hf-hub:imageomics/bioclip-2, layer 23, image tokens. 12 SAEs trained on 100,000,000 activations. Measured "
        "on: 1,000,000 activations, held-out. Grey line: the runs that no other one beats in both."
    )
    unknown = fronts(2).with_columns(
        layers=pl.lit([], pl.List(pl.Int64)),
        vit=pl.lit(""),
        n_measured=pl.lit(float("nan")),
        source=pl.lit("last log line"),
    )
    assert runs.caption(unknown).startswith(
        "2 SAEs trained on 100,000,000 activations. Measured on: last log line."
    )


# ---- short numbers ----


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["0.00014142135623730951", "0.001"], ["0.000141", "0.001"]),
        (["0.00014142135623730951", "0.00014142"], ["0.000141421", "0.00014142"]),
        (["1.4142135623730951e-05", None], ["1.41e-05", None]),
        (["100000000", "300000000"], ["100000000", "300000000"]),
        (["0.1234567", "linear"], ["0.1234567", "linear"]),
        (["True", "False"], ["True", "False"]),
    ],
)
def test_short_numbers(given: list[str | None], want: list[str | None]) -> None:
    assert tables.short(given) == want


def test_a_learning_rate_is_shown_short(tmp_path: pathlib.Path) -> None:
    columns = {name: [float("nan")] * 2 for name in runs.COLUMNS}
    rows = (
        fronts(2)
        .drop("l0", "normalized_mse")
        .with_columns(
            pl.DataFrame(
                {**columns, "l0": [4.0, 8.0], "d_sae": [8, 8], "cfg.lr": ["0.00014142135623730951", "0.001"]}
            )
        )
    )
    assert runs.table(rows)["lr"].to_list() == ["0.000141", "0.001"]
