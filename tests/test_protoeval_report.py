"""What protoeval reports of known rows. T traits, R draws, M resamples."""

import csv
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import typing as tp

import numpy as np
import polars as pl
import pytest

from saev import errors
from saev.formats import jsonfile, manifest, patchresults, results
from saev.protoeval import gallery, merge, merge_patches, report, stats
from saev.report import charts, figures, frame

pytestmark = pytest.mark.usefixtures("undrawn")
save_figure = figures.save

NAMES = ["has_wing_color::blue", "has_bill_length::long", "has_wing_color::red"]
GROUPS = {
    "shape": "has_bill_shape has_tail_shape has_wing_shape has_shape",
    "size": "has_size",
    "length": "has_bill_length",
    "pattern": "has_breast_pattern has_head_pattern has_back_pattern has_tail_pattern has_belly_pattern has_wing_pattern",
    "colour": "has_wing_color has_upperparts_color has_underparts_color has_back_color has_upper_tail_color has_breast_color "
    "has_throat_color has_eye_color has_forehead_color has_under_tail_color has_nape_color has_belly_color has_primary_color "
    "has_leg_color has_bill_color has_crown_color",
    "other": "has_whiskers has_beak",
}


def row(name: str, k: int, n: int, test: list[list[float]], boot: list[float] | None = None) -> results.Row:
    """Rows of `test`: draws."""
    test_RT = np.array(test, np.float64)
    best_RT = np.arange(test_RT.size).reshape(test_RT.shape)
    return results.Row(name, k, n, best_RT, test_RT + 0.1, test_RT, np.array([boot or []] * len(test), float))


@pytest.fixture
def rows() -> list[results.Row]:
    return [
        row("constant", 1, 1000, [[0.1, 0.2, 0.3]], [0.2] * 4),
        row("Random", 512, 1000, [[0.2, 0.4, 0.6], [0.4, 0.6, 0.8]], [0.4, 0.5, 0.6, 0.5]),
        row("Sae_1", 512, 1000, [[0.5, 0.5, np.nan]], [0.5, 0.6, 0.7, 0.6]),
    ]


@pytest.fixture
def about() -> results.About:
    return results.About(
        "clip x",
        23,
        "196 tokens an image (image)",
        ["abc"],
        "f" * 64,
        3,
        0,
        2,
        4,
        "2026-01-01T00:00:00+00:00",
        {},
    )


def cells(rows: list[results.Row], about: results.About) -> pl.DataFrame:
    return stats.cells(stats.summary(rows), about)


def differences(rows: list[results.Row], about: results.About) -> list[dict]:
    return stats.differences(cells(rows, about), [row.boot_RM for row in rows]).to_dicts()


def against(rows: list[results.Row], about: results.About) -> list[dict]:
    """The differences from random activations."""
    found = stats.differences(cells(rows, about), [row.boot_RM for row in rows])
    return found.filter(stats.IS_AGAINST_BASELINE).to_dicts()


def test_kinds_of_cubs_groups() -> None:
    for kind, groups in GROUPS.items():
        for group in groups.split():
            assert results.kind(f"{group}::value") == kind


def test_means_spread_and_interval(rows: list[results.Row]) -> None:
    _, random, sae = rows
    assert random.mean_ap == pytest.approx(0.5)
    assert random.spread == pytest.approx(np.std([0.4, 0.6], ddof=1))
    assert random.interval == pytest.approx(tuple(np.quantile([0.4, 0.5, 0.6, 0.5], [0.025, 0.975])))
    assert sae.mean_ap == 0.5 and np.isnan(sae.spread)
    assert np.isnan(sae._replace(boot_RM=np.empty((1, 0))).interval[0])


def test_an_interval_includes_its_value_also_if_few_resamples_differ() -> None:
    """One of 50 resamples is 0.1: the quantiles are 0, their mean is 0.002."""
    boot_M = np.array([0.1] + [0.0] * 49)
    assert results.interval(boot_M, 0.0) == pytest.approx((-0.002, 0.0))
    assert results.interval(-boot_M, 0.0) == pytest.approx((0.0, 0.002))
    assert results.share_interval(boot_M, 0.0) == (0.0, 0.0)  # a share is at least 0


def test_the_interval_of_a_map_is_within_0_and_1() -> None:
    """The shift of the resamples' mean to the mAP would give an interval up to 1.02."""
    boot_RM = np.array([[1.0, 1.0, 1.0, 0.88]])
    found = row("Sae_1", 8, 9, [[0.99]])._replace(boot_RM=boot_RM)
    assert results.interval(boot_RM[0], 0.99)[1] > 1
    assert found.interval == (pytest.approx(0.99 - 0.97 + np.quantile(boot_RM, 0.025)), 1.0)


def test_names_in_reports_sort_by_their_numbers() -> None:
    names = ["Random", "Random, 5 prototypes", "Random, 20 prototypes", "Random, key", "Sae 9", "Sae 13"]
    place = dict.fromkeys(stats.PLACE, "")
    lines = [{**place, "cls": "Random", "scorer": s, "n_prototypes": 8, "n_train": 9} for s in sorted(names)]
    assert sorted(names) != names
    assert stats.in_order(pl.DataFrame(lines))["scorer"].to_list() == names


def test_differences_are_paired(rows: list[results.Row], about: results.About) -> None:
    random, sae = rows[1]._replace(boot_RM=rows[1].boot_RM[:1]), rows[2]
    there, back = differences([rows[0], random, sae], about)
    assert (there["scorer"], there["baseline"], there["difference"]) == ("Random", "Sae_1", 0.0)
    assert (back["scorer"], back["baseline"]) == ("Sae_1", "Random")
    # each resample differs by 0.1, although both mAPs vary more: no width, and centred on the measured difference
    assert (back["low"], back["high"]) == pytest.approx((0.0, 0.0), abs=1e-12)
    wide = sae._replace(boot_RM=np.array([[0.6, 0.9, 0.5, 0.8]]))
    there, back = differences([random, wide], about)
    low, high = np.quantile([0.2, 0.4, -0.1, 0.3], [0.025, 0.975]) - 0.2
    assert (back["low"], back["high"]) == pytest.approx((low, high))
    assert (there["low"], there["high"]) == pytest.approx((-high, -low))
    assert not back["excludes_zero"]
    _, back = differences([random, sae._replace(test_ap_RT=np.full((1, 3), 0.7))], about)
    assert back["excludes_zero"]


def test_intervals_of_differences_are_over_the_draws_too(about: results.About) -> None:
    """Test images that say the same of both scorers, but draws that do not: the interval is the t interval's width or so."""
    rng = np.random.default_rng(0)
    draws_R = rng.normal(0.0, 0.1, 8)
    images_M = rng.normal(0.5, 0.2, 2000)
    random = row("Random", 8, 9, [[0.5]] * 8)._replace(boot_RM=np.tile(images_M, (8, 1)))
    sae = row("Sae_1", 8, 9, [[0.5]] * 8)._replace(boot_RM=images_M + draws_R[:, None])
    _, line = differences([random, sae], about)
    half = (line["high"] - line["low"]) / 2
    assert half == pytest.approx(1.96 * draws_R.std(ddof=1) / np.sqrt(8), rel=0.1)


def test_scorers_of_other_numbers_of_draws_are_not_paired(
    rows: list[results.Row], about: results.About
) -> None:
    assert differences(rows, about) == []


def test_any_random_activations_are_the_baseline_whatever_their_name(
    rows: list[results.Row], about: results.About
) -> None:
    """What a scorer is stands in its settings; its name decides nothing."""
    scorers = {
        "x": {"cls": "Random", "similarity": "dot"},
        "y": {"cls": "Random", "similarity": "cosine"},
        "Random Pca": {"cls": "Pca"},
        "constant y": {"cls": "Sae"},
    }
    about = dataclasses.replace(about, scorers=scorers)
    found = against([rows[2]._replace(scorer=name) for name in scorers], about)
    assert [(x["scorer"], x["baseline"]) for x in found] == [
        *(("Random Pca", "x"), ("Random Pca", "y"), ("constant y", "x"), ("constant y", "y"))
    ]


def test_a_scorers_id_is_made_of_what_decides_it(about: results.About) -> None:
    fields = {"cls": "KMeans", "n_iter": 3}
    about = dataclasses.replace(about, scorers={"a": fields, "b": {**fields}, "c": {"cls": "Pca"}})
    other = dataclasses.replace(about, seed=1)
    a, b, c = (about.scorer(name) for name in "abc")
    assert a.id == b.id != c.id and a.id != other.scorer("a").id
    assert a.seedless.id == other.scorer("a").seedless.id
    assert about.scorer("constant").id == other.scorer("constant").id


def test_a_scorer_of_another_size_is_held_against_the_largest_smaller_baseline(
    rows: list[results.Row], about: results.About
) -> None:
    few = row("Random", 128, 1000, [[0.1, 0.2, 0.3]], [0.2] * 4)
    other_n = row("Random", 640, 16, [[0.1, 0.2, 0.3]], [0.2] * 4)
    many = rows[1]._replace(boot_RM=rows[1].boot_RM[:1])
    for k, want in ((127, None), (500, 128), (512, 512), (700, 512)):
        sae = rows[2]._replace(n_prototypes=k)
        lines = against([few, many, other_n, sae], about)
        assert [line["baseline_prototypes"] for line in lines] == [want] * (want is not None)
    assert differences([few, rows[0], row(results.PROBES[1], 1, 1000, [[0.9]], [0.9] * 4)], about) == []


def test_the_written_tables(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "save", save_figure)
    rows = [*rows, rows[1]._replace(scorer="Sae_2")]
    report.write(tmp_path, report.Found(about, NAMES, rows), [])
    text = (tmp_path / "table.md").read_text()
    low, high = np.quantile([0.4, 0.5, 0.5, 0.6], [0.025, 0.975])
    for line in (
        "| Scorer | Prototypes | Train | mAP | Interval | Draws | 5% | 95% |\n|---|---|---|---|---|---|---|---|\n",
        "| constant | 1 | 1,000 | 0.200 | 0.200 to 0.200 |  | 0.110 | 0.290 |\n",
        f"| Random | 512 | 1,000 | 0.500 | {low:.3f} to {high:.3f} | ± 0.141 | 0.320 | 0.680 |\n",
        "clip x, layer 23, 196 tokens an image (image), shards abc; certainty from 3; seed 0.",
        "| Scorer | Prototypes | Train | colour (2) | length (1) |\n",
        "| Random | 512 | 1,000 | 0.500 | 0.500 |\n",
        f"\n{report.AGAINST}\n\n| Scorer |",
        "| Sae_2 | 512 | 1,000 | Random | 512 | +0.000 | +0.000 to +0.000 |  |\n",
    ):
        assert line in text
    tex = (tmp_path / "table.tex").read_text()
    assert r"Sae\_1 & 512 & 1,000 & 0.500" in tex and "& Interval &" in tex and r"$\pm$ 0.141" in tex
    said, _, tabular = tex.partition("\n")
    assert said.startswith("% clip x, layer 23")
    assert tabular.startswith("\\begin{tabular}{lrrrllrr}\n\\toprule\n")
    traits = pl.read_parquet(tmp_path / "traits.parquet").to_dicts()
    assert len(traits) == 3 * (1 + 2 + 1 + 2)
    assert traits[8] == {
        "scorer_id": about.scorer("Random").id,
        "scorer": "Random",
        "n_prototypes": 512,
        "n_train": 1000,
        "draw": 1,
        "trait": "has_wing_color::red",
        "group": "has_wing_color",
        "kind": "colour",
        "prototype": 5,
        "train_ap": 0.9,
        "test_ap": 0.8,
    }
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "about.json").read_text()) == dataclasses.asdict(about)
    read = frame.read_csv((tmp_path / "summary.csv").read_bytes(), results.SUMMARY)
    assert read.equals(stats.summary(rows)), "to the last digit"


def test_without_resamples_and_draws_the_columns_are_left_out(about: results.About) -> None:
    lines = cells([row("constant", 1, 9, [[0.25]])], about)
    assert report.summary_table(lines).columns == ["Scorer", "Prototypes", "Train", "mAP", "5%", "95%"]


def test_traits_without_a_positive_are_reported_not_averaged(about: results.About) -> None:
    rows = [
        row("constant", 1, 9, [[0.5, np.nan]]),
        row("Pca", 4, 9, [[0.75, np.nan]])._replace(train_ap_RT=np.array([[np.nan, 0.9]])),
    ]
    assert rows[1].mean_ap == 0.75
    note = report._notes(cells(rows, about), 2, about)
    assert note.startswith("\nclip x, layer 23")
    assert "1 trait(s) without a positive test image are left out" in note
    assert "With 9 train images, 1 trait(s) have no positive train image" in note


def test_the_chart_shows_every_line_whole(about: results.About) -> None:
    rows = [
        row("constant", 1, 99, [[0.2]]),
        *(row(results.PROBES[1], 1, n, [[0.95]]) for n in (16, 99)),
        *(row("Low", 4, n, [[0.3]]) for n in (16, 99)),
        *(row("High", 4, n, [[0.9]]) for n in (16, 99)),
    ]
    low, high = charts.grid(cells(rows, about), "").axes
    assert [axes.get_title() for axes in (low, high)] == ["Low", "High"]
    for axes in (low, high):
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 0.95
    np.testing.assert_array_equal(high.get_lines()[0].get_xydata(), [[16, 0.9], [99, 0.9]])
    assert set(high.get_lines()[1].get_ydata()) == {0.95}
    assert set(high.get_lines()[2].get_ydata()) == {0.2}


def test_references_are_explained_and_held_against_nothing(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    """Constant score, probes, and each scorer followed by its null: in one table and in the report of all."""
    about = dataclasses.replace(
        about,
        created="2026-01-01",
        scorers={"Random": {"cls": "Random"}, "Sae_1": {"cls": "Sae"}},
        nulls={"Random, permuted labels": "Random", "Sae_1, permuted labels": "Sae_1"},
    )
    of = dict(zip(("constant", "Random", "Sae_1"), rows, strict=True))
    of = {name: each._replace(boot_RM=each.boot_RM[:1]) for name, each in of.items()}
    of |= {name: of["constant"]._replace(scorer=name) for name in results.PROBES[1:]}
    of |= {name: of[whose]._replace(scorer=name) for name, whose in about.nulls.items()}
    order = ["constant", *results.PROBES[1:]]
    order += ["Random", "Random, permuted labels", "Sae_1", "Sae_1, permuted labels"]
    report.write(tmp_path / "all" / "one", report.Found(about, NAMES, [of[name] for name in order]), [])
    merge.write(tmp_path / "all")
    for fpath in (tmp_path / "all/one/summary.csv", tmp_path / "all/report/table.csv"):
        assert pl.read_csv(fpath)["scorer"].to_list() == order
        text = fpath.with_name("table.md").read_text()
        for name in (results.PROBES[1], results.NULL):
            assert report.REFERENCE_NOTES[name] in text
        assert report.REFERENCE_NOTES[results.PROBES[0]] not in text
    held = frame.read_csv((tmp_path / "all/one/differences.csv").read_bytes(), results.DIFFERENCES)
    assert {*held["scorer"], *held["baseline"]} == {"Random", "Sae_1"}
    nulls = [about.scorer(name) for name in about.nulls]
    assert len({s.id for s in (*nulls, *map(about.scorer, about.scorers))}) == 4
    assert nulls[1].settings["of"] == "Sae" and nulls[0].settings["cls"] == results.NULL


def test_ridge_probes_of_older_results_stay_rows_of_their_own(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    values = dict(zip(results.PROBES, (0.5, 0.75, 1.0), strict=True))
    probes = [row(name, 1, 1000, [[value] * 3]) for name, value in values.items()]
    for day, some in (("01", probes[:1]), ("02", probes[1:])):
        report.write(
            tmp_path / day,
            report.Found(dataclasses.replace(about, created=f"2026-01-{day}"), NAMES, [rows[0], *some]),
            [],
        )
    merge.write(tmp_path)
    lines = pl.read_csv(tmp_path / "report/table.csv").select("scorer", "map").rows()
    assert lines[1:] == [*values.items()] and lines[0][0] == "constant"
    text = (tmp_path / "report/table.md").read_text()
    assert all(report.REFERENCE_NOTES[name] in text for name in results.PROBES[:2])


# ---- joined ----


def test_differences_are_those_of_the_rows_that_are_left(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    """An SAE evaluated again, alone, is held against the random activations of the older result."""
    random, sae = rows[1]._replace(boot_RM=rows[1].boot_RM[:1]), rows[2]
    report.write(tmp_path / "a", report.Found(about, NAMES, [random, sae]), [])
    newer = dataclasses.replace(about, created="2026-02-01T00:00:00+00:00")
    low = sae._replace(test_ap_RT=sae.test_ap_RT - 0.3, boot_RM=sae.boot_RM - 0.3)
    report.write(tmp_path / "b", report.Found(newer, NAMES, [low]), [])
    out = merge.write(tmp_path)
    line = "| clip x | 23 | Sae_1 | 512 | 1,000 | Random | 512 | -0.300 | -0.300 to -0.300 | excludes 0 |"
    assert line in (out / "table.md").read_text()
    with (out / "differences.csv").open() as fd:
        found = [(x["scorer"], x["baseline"], float(x["difference"])) for x in csv.DictReader(fd)]
    assert found == [("Random", "Sae_1", pytest.approx(0.3)), ("Sae_1", "Random", pytest.approx(-0.3))]
    other_seed = dataclasses.replace(about, seed=1, created="2026-03-01T00:00:00+00:00")
    report.write(tmp_path / "c", report.Found(other_seed, NAMES, [low._replace(scorer="Pca")]), [])
    merge.write(tmp_path)
    with (out / "differences.csv").open() as fd:  # other resamples cannot be paired
        assert not any("Pca" in (x["scorer"], x["baseline"]) for x in csv.DictReader(fd))


def test_the_newest_of_a_cell_wins_and_nothing_else_changes(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    newer = dataclasses.replace(about, created="2026-02-01T00:00:00+00:00")
    other = dataclasses.replace(about, layer=11)
    report.write(tmp_path / "zzz", report.Found(about, NAMES, rows), [])
    report.write(
        tmp_path / "aaa", report.Found(newer, NAMES, [row("Random", 512, 1000, [[0.9, 0.9, 0.9]])]), []
    )
    report.write(tmp_path / "mmm", report.Found(other, NAMES, rows[:2]), [])
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    out = merge.write(tmp_path)
    assert {f: f.read_bytes() for f in before} == before
    text = (out / "table.md").read_text()
    assert "| clip x | 23 | Random | 512 | 1,000 | 0.900 |" in text
    assert "| clip x | 11 | Random | 512 | 1,000 | 0.500 |" in text
    assert "| clip x | 23 | Sae_1 | 512 |" in text
    assert "1 older cells were replaced by newer ones (of zzz)." in text
    with (out / "table.csv").open() as fd:
        assert [(x["layer"], x["scorer"]) for x in csv.DictReader(fd)] == [
            ("11", "constant"),
            ("11", "Random"),
            ("23", "constant"),
            ("23", "Random"),
            ("23", "Sae_1"),
        ]
    assert (out / "chart.png").exists() and (out / "table.tex").exists()
    assert merge.write(tmp_path) == out  # and the report is no result of its own


def test_scorers_of_one_name_are_told_apart(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    """An SAE trained again in a folder of the same name, and another seed, are other scorers: none replaces another."""

    def result(name: str, day: int, ckpt: str, seed: int = 0) -> None:
        scorers = {"Sae_1": {"cls": "Sae", "ckpt": ckpt * 64}}
        said = dataclasses.replace(about, scorers=scorers, seed=seed, created=f"2026-01-0{day}")
        report.write(tmp_path / name, report.Found(said, NAMES, rows), [])

    result("a", 1, "a")
    result("b", 2, "b")
    text = (merge.write(tmp_path) / "table.md").read_text()
    for name in ("Sae_1 ckpt=aaaaaaaa", "Sae_1 ckpt=bbbbbbbb"):
        assert text.count(f"| clip x | 23 | {name} |") == 2, "in both tables"
    assert "were replaced" in text and "(of a)" in text  # the rows of Random and the constant
    result("c", 3, "b", seed=1)
    text = (merge.write(tmp_path) / "table.md").read_text()
    assert "| Sae_1 ckpt=bbbbbbbb seed=0 | 512 |" in text
    assert "| Sae_1 ckpt=bbbbbbbb seed=1 | 512 |" in text
    assert "| Random seed=1 | 512 |" in text and "| constant | 1 |" in text


def test_results_on_other_labels_get_a_table_of_their_own(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    report.write(tmp_path / "a", report.Found(about, NAMES, rows), [])
    report.write(tmp_path / "b", report.Found(dataclasses.replace(about, labels="0" * 64), NAMES, rows), [])
    text = (merge.write(tmp_path) / "table.md").read_text()
    assert text.count("| ViT | Layer | Scorer | Prototypes | Train | mAP |") == 2
    assert "Labels 00000000" in text and "Labels ffffffff" in text


def read_one(root: pathlib.Path, caplog: pytest.LogCaptureFixture) -> tuple[list[merge.Result], list[str]]:
    """(what was read, what was said)."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "saev"):
        return merge.read_all(root), list(caplog.messages)


def test_broken_and_unfinished_results_are_named_and_left_out(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("good", "edited", "gone", "unfinished"):
        report.write(tmp_path / name, report.Found(about, NAMES, rows), [])
    edited = tmp_path / "edited" / "summary.csv"
    edited.write_text(edited.read_text().replace("0.5", "0.9"))
    (tmp_path / "gone" / "kinds.csv").unlink()
    (tmp_path / "unfinished" / "manifest.json").unlink()
    found, said = read_one(tmp_path, caplog)
    assert [result.dpath.name for result in found] == ["good"]
    for line, match in zip(
        said,
        (
            r"edited/summary\.csv: was changed after it was written .* evaluate again",
            r"gone/kinds\.csv: is missing",
            r"unfinished: has no manifest\.json; it is unfinished, or from an older version",
        ),
        strict=True,
    ):
        assert re.search(match, line) and "\n" not in line
    with pytest.raises(errors.UserError, match="holds no results"):
        merge.write(tmp_path / "good")


def test_flipped_bits_of_results_are_refused(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some of each file that is read back; a user may touch the others."""
    dpath = tmp_path / "a" / "x"
    report.write(dpath, report.Found(about, NAMES, rows), [])
    for name in (*results.FILES, "manifest.json"):
        content = (dpath / name).read_bytes()
        for i in range(3, 8 * len(content), 1 + len(content) // 3):
            bad = bytearray(content)
            bad[i // 8] ^= 1 << i % 8
            (dpath / name).write_bytes(bad)
            found, (line,) = read_one(tmp_path, caplog)
            assert found == [] and line.startswith(f"left out: {dpath / name}: "), (name, i)
            assert "\n" not in line
        (dpath / name).write_bytes(content)
    (dpath / "table.tex").write_text("mine")
    assert len(read_one(tmp_path, caplog)[0]) == 1


ABOUT = {
    "not utf-8": b'{"vit": "\xff"}',
    "deep": b"[" * 100_000,
    "list": b"[]",
    "nulls": b'{"vit": null}',
    "types": b'{"vit": 1, "layer": "x", "scorers": []}',
    "huge": b'{"layer": 1' + b"0" * 5000 + b"}",
}


@pytest.mark.parametrize("name", [*ABOUT, "fifo", "link loop", "folder"])
@pytest.mark.parametrize("is_listed", [True, False])
def test_crafted_results_are_named_and_left_out(
    rows: list[results.Row],
    about: results.About,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    is_listed: bool,
) -> None:
    """Also where the manifest says that they are as they were written."""
    dpath = tmp_path / "a" / "x"
    report.write(dpath, report.Found(about, NAMES, rows), [])
    fpath = dpath / "about.json"
    fpath.unlink()
    if name in ABOUT:
        fpath.write_bytes(ABOUT[name])
        if is_listed:
            manifest.write(dpath, results.FILES)
    elif name == "fifo":
        os.mkfifo(fpath)
    elif name == "link loop":
        fpath.symlink_to(fpath)
    else:
        fpath.mkdir()
    found, said = read_one(tmp_path, caplog)
    assert found == [] and len(said) == (0 if name == "link loop" else 1)
    assert all("about.json" in line and "\n" not in line for line in said)


def test_names_that_are_not_utf8_are_spelt_out(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    odd = os.fsdecode(b"caf\xe9")
    about = dataclasses.replace(about, scorers={"Random": {"cls": "Random", "fit": odd}})
    report.write(tmp_path / odd / "x", report.Found(about, [odd, *NAMES[1:]], rows), [])
    assert merge.read_all(tmp_path)[0].about == about
    merge.write(tmp_path)
    assert r"fit caf\udce9" in (tmp_path / "report" / "table.md").read_text("utf-8")
    traits = pl.read_parquet((tmp_path / odd / "x" / "traits.parquet").read_bytes())
    assert r"caf\udce9" in traits["trait"].to_list()
    shown = tmp_path / odd / "gallery"
    write_gallery(shown, latents=[1])
    gallery.link(tmp_path / odd / "x", gallery.Own("Sae_1"), shown)
    gallery.link(tmp_path / odd / "x", gallery.Own("Sae_1"), write_gallery(tmp_path / f"{odd}2", latents=[1]))
    assert "../../caf%E92/index.html" in (tmp_path / odd / "x" / "traits.md").read_text("utf-8")


def test_sorts_of_tokens_and_activations_are_told_apart(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    for day, (tokens, acts) in enumerate([("1 (cls)", "a"), ("196 (image)", "a"), ("1 (cls)", "b")]):
        said = dataclasses.replace(
            about, tokens=tokens, activations=[acts * 64] * 2, created=f"2026-01-0{day + 1}"
        )
        report.write(tmp_path / "nested" / f"{day}", report.Found(said, NAMES, rows), [])
    text = (merge.write(tmp_path) / "table.md").read_text()
    assert "| ViT | Layer | Tokens | Scorer |" in text
    assert "| clip x | 23 | 196 (image) | Random | 512 |" in text
    for name in ("Random", "Sae_1"):
        for acts in ("a", "b"):
            assert f"| clip x | 23 | 1 (cls) | {name} activations={acts * 8} | 512" in text
    of = [cells(rows[1:2], dataclasses.replace(about, tokens=t)) for t in ("x", "y")]
    axes = charts.grid(pl.concat(of), "").axes
    assert [a.get_title() for a in axes] == ["Random\nx", "Random\ny"]


def test_what_was_forced_stands_above_the_table(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    said = dataclasses.replace(about, problems=["3 images have no labels"])
    report.write(tmp_path / "a", report.Found(said, NAMES, rows), [])
    line = "**Forced: 3 images have no labels.**\n"
    assert (tmp_path / "a" / "table.md").read_text().startswith(line)
    assert line in (merge.write(tmp_path) / "table.md").read_text()


def test_tables_say_what_the_scorers_are(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    fields = {"cls": "KMeans", "normalize": True, "fit": "ab" * 32}
    said = dataclasses.replace(about, scorers={"KMeans": fields})
    report.write(tmp_path / "a", report.Found(said, NAMES, rows), [])
    for text in ((tmp_path / "a" / "table.md"), merge.write(tmp_path) / "table.md"):
        assert "- KMeans: KMeans, normalize True, fit abababab\n" in text.read_text()


def test_charts_of_an_older_report_go(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    report.write(tmp_path / "a", report.Found(about, NAMES, rows), [])
    out = merge.write(tmp_path)
    assert [f.name for f in out.glob("*.png")] == ["chart.png"]
    report.write(tmp_path / "b", report.Found(dataclasses.replace(about, min_certainty=4), NAMES, rows), [])
    merge.write(tmp_path)
    assert sorted(f.name for f in out.glob("*.png")) == ["chart-ffffffff-3.png", "chart-ffffffff-4.png"]


def test_kinds_are_those_of_most_prototypes(about: results.About, tmp_path: pathlib.Path) -> None:
    for day, k in enumerate((32, 16)):
        rows = [row("constant", 1, 9, [[0.1, 0.2, 0.3]]), row("Pca", k, 9, [[k / 100] * 3])]
        said = dataclasses.replace(about, created=f"2026-01-0{day + 1}")
        report.write(tmp_path / f"{k}", report.Found(said, NAMES, rows), [])
    text = (merge.write(tmp_path) / "table.md").read_text()
    _, _, text = text.partition("By kind of trait")
    assert "| clip x | 23 | Pca | 32 | 9 | 0.320 | 0.320 |" in text
    assert "| clip x | 23 | Pca | 16 |" not in text


def test_spread_over_seeds(rows: list[results.Row], about: results.About, tmp_path: pathlib.Path) -> None:
    for seed, (a, b) in enumerate([(0.2, 0.5), (0.3, 0.5), (0.4, 0.8)]):
        few = [row("Random", 8, 9, [[a]]), row("Pca", 8, 9, [[b]]), row("Pca", 8, 5, [[b]])]
        said = dataclasses.replace(about, seed=seed)
        report.write(tmp_path / f"{seed}", report.Found(said, NAMES[:1], few[: 3 if seed else 2]), [])
    text = (merge.write(tmp_path) / "table.md").read_text()
    spread, gap = np.std([0.2, 0.3, 0.4], ddof=1), np.std([0.3, 0.2, 0.4], ddof=1)
    assert f"| clip x | 23 | Random | 8 | 9 | 3 | 0.300 ± {spread:.3f} |  |  |" in text
    assert f"| clip x | 23 | Pca | 8 | 9 | 3 | 0.600 ± 0.173 | Random | +0.300 ± {gap:.3f} |" in text
    assert "| clip x | 23 | Pca | 8 | 5 | 2 | 0.650 ± 0.212 |  |  |" in text
    with (tmp_path / "report" / "seeds.csv").open() as fd:
        assert [int(x["n_seeds"]) for x in csv.DictReader(fd)] == [2, 3, 3]


# ---- patch labels ----


def patch_table(*scorers: tuple[str, float]) -> patchresults.PatchTable:
    """(name, AP of the class wing). One resample."""
    names, zero_C = ["bill", "wing"], np.zeros(2)

    def of(name: str, ap: float) -> patchresults.PatchRow:
        ap_CM = np.array([[np.nan] * 2, [ap, ap + 0.1]])
        return patchresults.PatchRow(
            name, 0, 8, np.array([0, 3]), zero_C, zero_C, zero_C, ap_CM / 2, ap_CM, ap_CM
        )

    return patchresults.PatchTable(
        names, np.array([0, 9]), np.array([0, 7]), [of(name, ap) for name, ap in scorers]
    )


def audit_table(budgets: list[int], *scorers: tuple[str, int]) -> patchresults.AuditTable:
    """(name, number of the first prototypes that localise). Permutations localise with none, and with all."""
    n = budgets[-1]

    def of(name: str, n_localise: int) -> patchresults.AuditRow:
        ap_B = np.where(np.arange(n) < n_localise, 0.9, 0.1)
        zero_B, i_B = np.zeros(n), np.arange(n)
        null_PB = np.repeat([[0.1], [0.9]], n, axis=1)
        ap_BM = np.stack([ap_B, ap_B], axis=1)
        ranking = patchresults.Ranking(i_B, zero_B, i_B * 0, zero_B)
        return patchresults.AuditRow(name, 8, ranking, i_B * 0, ap_B, ap_BM, zero_B, ap_B, null_PB)

    return patchresults.AuditTable(budgets, ["bill", "wing"], [1], NAMES, [of(*each) for each in scorers])


def test_patch_tables_and_audits_are_joined(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    """Two layers with the same patch labels, of which one has an audit; another without labels; another with
    other ones and other numbers of audited prototypes; a newer one of layer 11."""
    a, b, audit = "a" * 64, "b" * 64, audit_table([2, 4], ("constant", 0), ("Random", 1), ("Sae_1", 2))

    def result(name: str, layer: int, labels: str, day: int, *tables: tp.Any, **kwargs: tp.Any) -> None:
        scorers = {"Random": {"cls": "Random"}, "Sae_1": {"cls": "Sae"}}
        said = dataclasses.replace(
            about, layer=layer, patch_labels=labels, created=f"2026-01-0{day}", **kwargs
        )
        said = dataclasses.replace(said, nulls={}, scorers=scorers)
        report.write(tmp_path / name, report.Found(said, NAMES, rows, {}, {}, *tables), [])

    result("old", 11, a, 1, patch_table(("Random", 0.8), ("Sae_1", 0.9)))
    result("11", 11, a, 2, patch_table(("constant", 0.1), ("Random", 0.2)))
    result("23", 23, a, 3, patch_table(("Random", 0.5)), audit, audit=[4, 2])
    result("plain", 12, "", 4)
    result("other", 23, b, 5, patch_table(("Random", 0.6)), audit_table([3], ("Random", 3)), audit=[3])
    out = merge.write(tmp_path)
    schema = {"vit": pl.String, "layer": pl.Int64, "tokens": pl.String, "labels": pl.String}
    schema |= {"min_certainty": pl.Int64, "patch_labels": pl.String}
    found = frame.read_csv((out / "patches.csv").read_bytes(), schema | patchresults.PATCHES)
    assert found.select("layer", "patch_labels", "scorer", "map").rows() == [
        (11, a, "constant", pytest.approx(0.1)),
        (11, a, "Random", pytest.approx(0.2)),
        (11, a, "Sae_1", pytest.approx(0.9)),
        (23, a, "Random", pytest.approx(0.5)),
        (23, b, "Random", pytest.approx(0.6)),
    ]
    (own,) = frame.read_csv((tmp_path / "23" / "patches.csv").read_bytes(), patchresults.PATCHES).rows()
    assert found.row(3)[-len(own) :] == own
    classes = pl.read_csv(out / "patch-classes.csv")
    assert classes.filter(layer=23, patch_labels=b)["class"].to_list() == ["bill", "wing"]
    assert len(classes) == 2 * len(found)
    yields = frame.read_csv(
        (out / "audit-yields.csv").read_bytes(), schema | {"audit": pl.String} | patchresults.AUDIT_YIELDS
    )
    assert yields.select("audit", "scorer", "measure", "value", "null").rows() == [
        ("2 4", "constant", "2", 0, 0.5),
        ("2 4", "constant", "4", 0, 0.5),
        ("2 4", "constant", "area", 0, 0.5),
        ("2 4", "Random", "2", 0.5, 0.5),
        ("2 4", "Random", "4", 0.25, 0.5),
        ("2 4", "Random", "area", pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4), 0.5),
        ("2 4", "Sae_1", "2", 1, 0.5),
        ("2 4", "Sae_1", "4", 0.5, 0.5),
        ("2 4", "Sae_1", "area", pytest.approx((1 + 1 + 2 / 3 + 1 / 2) / 4), 0.5),
        ("3", "Random", "3", 1, 0.5),
        ("3", "Random", "area", 1, 0.5),
    ]
    against = {"patch_labels": a, "scorer": "Sae_1", "baseline": "Random", "baseline_prototypes": 8}
    gaps = pl.read_csv(out / "patch-differences.csv").filter(**against)
    assert gaps.select("layer", "measure").rows() == [
        (11, measure) for measure in patchresults.PATCH_MEASURES
    ]
    assert gaps["difference"].to_list() == pytest.approx([0.05, 0.1, 0.1, 0])
    gaps = pl.read_csv(out / "audit-differences.csv").filter(audit="2 4", scorer="Sae_1")
    assert gaps.select("measure", "difference").rows()[:2] == [("2", 0.5), ("4", 0.25)]
    text = (out / "table.md").read_text()
    assert (
        "| clip x | 11 | Sae_1 | 8 | Random | 8 | Patch mAP | +0.100 | +0.100 to +0.100 | excludes 0 |"
        in text
    )
    assert "| clip x | 23 | Sae_1 | 8 | Random | 8 | Yield(4) | +0.250 |" in text
    first, second = re.findall(r"Patch labels .*?(?=\n\n[^|])", text, re.DOTALL)
    assert first.startswith("Patch labels aaaaaaaa:\n\n| ViT | Layer | Scorer | Prototypes | Probe R |")
    assert "| clip x | 11 | Sae_1 | 8 | " in first and "| clip x | 23 | Random | 8 | " in first
    assert second.startswith("Patch labels bbbbbbbb:") and second.count("| clip x |") == 1
    assert "| ViT | Layer | Scorer | Prototypes | Yield(2) | Yield(4) | Area |" in text
    assert "| clip x | 23 | Random | 8 | 1.000 " in text.partition("| Yield(3) | Area |")[2]
    assert {f.name for f in out.glob("yields*.png")} == {"yields-aaaaaaaa.png", "yields-bbbbbbbb.png"}
    (_, figure), _ = merge_patches.charts_of(
        merge.merge(merge.read_all(tmp_path)).section("f" * 64, 3).patches
    )
    *_, random, null, _, _ = figure.axes[0].lines  # the last two are the SAE's
    assert np.array(random.get_xydata()).tolist() == [[2, 0.5], [4, 0.25]]
    assert np.array(null.get_xydata()).tolist() == [[2, 0.5], [4, 0.5]]
    for name in ("old", "11", "23", "other"):
        shutil.rmtree(tmp_path / name)
    text = (merge.write(tmp_path) / "table.md").read_text()
    assert "Patch labels" not in text
    assert not [f for name in ("patch", "audit", "yields") for f in out.glob(f"{name}*")]


def test_patch_tables_of_older_versions_or_changed_ones_are_named(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = patch_table(("Random", 0.5))
    report.write(tmp_path / "old", report.Found(about, NAMES, rows, patches=table), [])
    said = dataclasses.replace(about, patch_labels="a" * 64)
    report.write(tmp_path / "changed", report.Found(said, NAMES, rows, patches=table), [])
    fpath = tmp_path / "changed" / "patches.csv"
    fpath.write_text(fpath.read_text().replace("Random", "Pca"))
    found, lines = read_one(tmp_path, caplog)
    assert [result.dpath.name for result in found] == ["old"] and not found[0].patches
    assert len(lines) == 2 and re.search(r"changed/patches\.csv: was changed after it was written", lines[0])
    assert re.search(r"left out: \S*old/patches\.csv: an older version wrote it", lines[1])


# ---- galleries ----


def write_gallery(
    dpath: pathlib.Path, sha256: str = "0" * 64, latents: list[int] | None = None
) -> pathlib.Path:
    dpath.mkdir(exist_ok=True)
    (dpath / "gallery.json").write_text(jsonfile.seal({"sha256": sha256, "latents": latents or []}))
    return dpath


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b"[]",
        b"\xff",
        b"{}",
        b'{"sha256": "00", "latents": [1]}',
        jsonfile.seal({"sha256": None, "latents": [1]}).encode(),
        jsonfile.seal({"sha256": "00", "latents": {"a": 1}}).encode(),
        jsonfile.seal({"sha256": "00"}).encode(),
    ],
)
def test_a_gallery_that_does_not_say_what_it_shows(tmp_path: pathlib.Path, content: bytes) -> None:
    with pytest.raises(errors.UserError, match=r"has no gallery\.json"):
        gallery.read(tmp_path)
    (tmp_path / "gallery.json").write_bytes(content)
    with pytest.raises(errors.UserError, match=r"gallery\.json: [^\n]*Run visuals\.py again\.$"):
        gallery.read(tmp_path)


def test_latents_link_to_their_place_in_the_gallery(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    dpath, shown = tmp_path / "results" / "x", tmp_path / "gallery"
    write_gallery(shown, latents=[1, 7])
    report.write(dpath, report.Found(about, NAMES, rows), [])
    gallery.link(dpath, gallery.Own("Sae_1"), shown)
    text = (dpath / "traits.md").read_text()
    assert "| has_bill_length::long | [1](../../gallery/index.html#/latent/1) | 0.600 | 0.500 |" in text
    assert "| has_wing_color::blue | 0 |" in text
    assert "2 of them are not in the gallery; visuals.py shows all with --include-latents 0 1 2" in text


# ---- what docs/results.md promises ----

DOC = pathlib.Path(__file__).parent.parent / "docs" / "results.md"


def test_every_file_and_column_is_documented(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    dpath = tmp_path / "0123456789ab"
    schemas = (results.FAVOURITES, results.RETRIEVED)
    more = {
        name: pl.DataFrame(schema=schema) for name, schema in zip(results.FOR_GALLERIES, schemas, strict=True)
    }
    report.write(dpath, report.Found(about, NAMES, rows, more), [])
    text = DOC.read_text()
    for fpath in dpath.iterdir():
        assert f"| `{fpath.name}` |" in text, fpath.name
    sections = {section.split("\n")[0]: section for section in text.split("\n### ")}
    for name, columns in (
        ("traits.parquet", pl.read_parquet(dpath / "traits.parquet").columns),
        ("prototypes.parquet", list(results.FAVOURITES)),
        ("retrieved.parquet", list(results.RETRIEVED)),
        ("summary.csv", list(results.SUMMARY)),
        ("kinds.csv", list(results.KIND_COLUMNS)),
        ("differences.csv", list(results.DIFFERENCES)),
    ):
        assert all(f"`{column}`" in sections[name] for column in columns), name
    _, _, joined = text.partition("## The report over all results")
    assert all(f"`{name}`" in joined for name in (*merge.PLACE, *results.SEEDS, *merge_patches.GROUP))
    assert all(f"- `{name}`" in joined for name in merge_patches.FILES)
    for fpath in merge.write(tmp_path).iterdir():
        assert f"`{fpath.name}`" in text or fpath.suffix == ".png", fpath.name


def test_the_notebooks_two_lines(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write(tmp_path / "results" / "0123456789ab", report.Found(about, NAMES, rows), [])
    monkeypatch.chdir(tmp_path)
    lines = [line.strip() for line in DOC.read_text().splitlines() if line.startswith("    ")][:2]
    names: dict = {}
    exec("\n".join(lines), names)
    assert len(names["traits"]) == 3 * (1 + 2 + 1)


def test_the_joint_frame_has_every_row_that_is_left(
    rows: list[results.Row], about: results.About, tmp_path: pathlib.Path
) -> None:
    """The older result's traits.parquet is as earlier versions wrote it: without scorer_id."""
    report.write(tmp_path / "a", report.Found(about, NAMES, rows), [])
    old = tmp_path / "a" / "traits.parquet"
    frame.write_parquet(old, pl.read_parquet(old).drop("scorer_id"))
    manifest.write(tmp_path / "a", results.FILES)
    newer = dataclasses.replace(about, created="2026-02-01T00:00:00+00:00")
    report.write(tmp_path / "b", report.Found(newer, NAMES, [row("Random", 512, 1000, [[0.9] * 3])]), [])
    report.write(tmp_path / "c", report.Found(dataclasses.replace(newer, seed=1), NAMES, rows[1:2]), [])
    traits = pl.read_parquet(merge.write(tmp_path) / "traits.parquet")
    found = traits.group_by("scorer", "seed").agg(pl.len(), pl.col("test_ap").mean())
    assert sorted(found.rows()) == [
        ("Random seed=0", 0, 3, pytest.approx(0.9)),
        ("Random seed=1", 1, 6, pytest.approx(0.5)),
        ("Sae_1", 0, 3, pytest.approx(np.nan, nan_ok=True)),
        ("constant", 0, 3, pytest.approx(0.2)),
    ]
    ids = dict(traits.select("scorer", "scorer_id").unique().rows())
    assert ids["Random seed=0"] == about.scorer("Random").id != ids["Random seed=1"]


def test_a_cell_that_is_there_twice(about: results.About, tmp_path: pathlib.Path) -> None:
    """K-means that found fewer centroids than either K: the last one counts, and nothing is counted twice."""
    rows = [row("KMeans", 5, 9, [[ap] * 3]) for ap in (0.3, 0.4)]
    report.write(tmp_path / "a", report.Found(about, NAMES, rows), [])
    kinds = frame.read_csv((tmp_path / "a" / "kinds.csv").read_bytes(), results.KIND_COLUMNS)
    assert kinds.select("kind", "n_traits", "map").rows() == [
        ("colour", 2, pytest.approx(0.4)),
        ("length", 1, pytest.approx(0.4)),
    ]
    out = merge.write(tmp_path)
    assert pl.read_parquet(out / "traits.parquet")["test_ap"].to_list() == [0.4] * 3
    text = (out / "table.md").read_text()
    assert "| KMeans | 5 | 9 | 0.400 |" in text and "| KMeans | 5 | 9 | 0.300 |" not in text
