"""The report of a sweep: its table, its front, its picture."""

import json
import os
import pathlib
import subprocess
import sys

import forked
import hypothesis
import hypothesis.strategies as st
import matplotlib.image
import polars as pl
import pytest

from saev import errors
from saev.report import charts, figures, tables
from saev.training import runs

ROOT = pathlib.Path(__file__).parent.parent


def write(
    dpath: pathlib.Path,
    *,
    lr: float = 1e-3,
    architecture: str = "TopK",
    objective: str = "Vanilla",
    metrics: object = None,
    lines: str = "",
    done: bool = True,
) -> None:
    dpath.mkdir(parents=True)
    cfg = {
        "sae": {"d_vit": 8, "exp_factor": 4, "top_k": 3},
        "architecture": architecture,
        "objective_name": objective,
        "lr": lr,
        "n_patches": 640,
        "batch_size": 32,
        "ckpt_to": str(dpath.parent),
        "data": {"shard_root": "x"},
    }
    (dpath / "config.json").write_text(json.dumps(cfg))
    (dpath / "metrics.jsonl").write_text(lines)
    if metrics is not None:
        (dpath / "metrics.json").write_text(json.dumps(metrics))
    if done:
        (dpath / "sae.pt").write_bytes(b"")


def evaluated(l0: float, nmse: float | None, n_dead: int = 8) -> dict[str, object]:
    return {
        "held_out": True,
        "l0_count": l0,
        "normalized_mse": nmse,
        "explained_variance": None if nmse is None else 1 - nmse,
        "explained_variance_per_dim": 0.1,
        "n_dead": n_dead,
        "n_latents": 32,
    }


def shown(dpath: pathlib.Path) -> tuple[list[str], list[list[str]]]:
    """(header, cells)."""
    table = runs.table(runs.read((str(dpath),)))
    return table.columns, [list(row) for row in table.iter_rows()]


def test_sizes_are_one_column_however_they_were_given(tmp_path: pathlib.Path) -> None:
    for name, size in [("a", {"exp_factor": 4}), ("b", {"exp_factor": None, "d_sae": 37})]:
        write(tmp_path / name)
        fpath = tmp_path / name / "config.json"
        cfg = json.loads(fpath.read_text())
        fpath.write_text(json.dumps({**cfg, "sae": {"d_vit": 8, "top_k": 3, **size}}))
    header, cells = shown(tmp_path)
    assert header[:4] == ["run", "architecture", "d_sae", "L0"]
    assert [row[2] for row in cells] == ["32", "37"]


def test_the_table(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "aa", lr=1e-3, metrics=evaluated(16.0, 0.3))
    write(tmp_path / "bb", lr=3e-3, metrics=evaluated(16.0, 0.25))
    write(tmp_path / "cc", architecture="Relu", objective="Matryoshka", metrics=evaluated(9.5, 0.5))
    line = json.dumps({"step": 5, "l0_count": 20.0, "normalized_mse": 0.2, "dead_frac_window": 0.125})
    write(tmp_path / "dd", lines=f'{line}\n{{"step": 6, "l0_c', done=False)
    write(tmp_path / "ee", metrics=evaluated(16.0, None), done=False)
    (tmp_path / "ee" / "failed.json").write_text('{"step": 7, "reason": "x"}')
    header, cells = shown(tmp_path)
    assert header == [
        *("run", "architecture", "d_sae", "lr", "L0", "norm. MSE", "expl. var.", "dead %"),
        *("of", "state"),
    ], "of the config only what differs, and no paths"
    assert cells == [
        ["cc *", "Relu Matryoshka", "32", "0.001", "9.5", "0.5000", "0.5000", "25.0", "held-out", "done"],
        ["aa", "TopK", "32", "0.001", "16.0", "0.3000", "0.7000", "25.0", "held-out", "done"],
        ["bb *", "TopK", "32", "0.003", "16.0", "0.2500", "0.7500", "25.0", "held-out", "done"],
        ["dd *", "TopK", "32", "0.001", "20.0", "0.2000", "-", "12.5", "last log line", "step 5 of 20"],
        ["ee", "TopK", "32", "0.001", "16.0", "-", "-", "25.0", "held-out", "failed at step 7"],
    ]
    table = pl.DataFrame(cells, header, orient="row")
    lines = tables.markdown(table, padded=True).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 7


def test_the_tables_figures_by_token(tmp_path: pathlib.Path) -> None:
    by_token = {"token_nmse_median": 0.1, "token_nmse_q95": 0.4, "extreme_variance_frac": 0.973}
    write(tmp_path / "aa", metrics=evaluated(16.0, 0.3) | by_token)
    write(tmp_path / "bb", metrics=evaluated(17.0, 0.2))
    header, cells = shown(tmp_path)
    at = header.index("token median")
    assert header[at : at + 4] == ["token median", "token 95%", "extreme var. %", "dead %"]
    assert [row[at : at + 4] for row in cells] == [
        ["0.1000", "0.4000", "97.3", "25.0"],
        ["-", "-", "-", "25.0"],
    ]


def frame(*rows: tuple[str, float, float], state: str = "done") -> pl.DataFrame:
    columns = {"run": pl.String, "l0": pl.Float64, "normalized_mse": pl.Float64}
    frame = pl.DataFrame(rows, columns, orient="row")
    return frame.with_columns(state=pl.lit(state), kind=pl.lit("TopK"))


def best(rows: pl.DataFrame) -> set[str]:
    return set(runs.front(rows).filter("is_best")["run"])


POINTS = st.lists(st.tuples(st.sampled_from([1.0, 2.0, 4.0, 8.0]), st.sampled_from([0.1, 0.2, 0.4])))


@hypothesis.given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    rows = frame(*((str(i), *point) for i, point in enumerate(points)))
    want = set()
    for i, (l0, nmse) in enumerate(points):
        beaten = [p for p in points if p != (l0, nmse) and p[0] <= l0 and p[1] <= nmse]
        if not beaten:
            want.add(str(i))
    assert best(rows) == want


def test_a_failed_run_is_not_on_the_front() -> None:
    failed = frame(("a", 4.0, 0.1), state="failed at step 7")
    assert best(pl.concat([failed, frame(("b", 4.0, 0.2))])) == {"b"}


@pytest.mark.parametrize("n", [1, 12, 40])
def test_the_picture(n: int, tmp_path: pathlib.Path) -> None:
    points = [(4.0 * (1 + i % 7), 0.5 / (1 + i % 7) + i / 300) for i in range(n)]
    rows = runs.front(frame(*((f"run{i:05}", *point) for i, point in enumerate(points))))
    figures.save(charts.front(rows, ""), tmp_path / "front.png")
    pixels = matplotlib.image.imread(tmp_path / "front.png")
    assert pixels.shape[0] > 500 and pixels[..., :3].std() > 0.02


def test_the_picture_of_a_run_named_like_a_formula(tmp_path: pathlib.Path) -> None:
    rows = runs.front(frame(("$\\frac$", 4.0, 0.2), ("lr$HOME$", 8.0, 0.1)))
    figures.save(charts.front(rows, ""), tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_what_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match="no such folder"):
        runs.read((str(tmp_path / "nowhere"),))
    with pytest.raises(errors.UserError, match="holds no run"):
        runs.read((str(tmp_path),))
    (tmp_path / "a").mkdir()
    for text, match in [
        ("{", "cannot be read"),
        ("[]", "got `array`"),
        ("{}", "missing required field `architecture`"),
        (r'{"architecture": "\ud800", "sae": "\ud800"}', "not from train.py"),
    ]:
        (tmp_path / "a" / "config.json").write_text(text)
        with pytest.raises(errors.UserError, match=match):
            runs.read((str(tmp_path),))


def test_an_integer_beyond_every_float_is_no_figure(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a", metrics={"l0_count": 10**400, "n_latents": 2})
    assert runs.read((str(tmp_path / "a"),)).filter(runs.IS_MEASURED).is_empty()


def test_names_that_a_frame_could_not_hold(tmp_path: pathlib.Path) -> None:
    """A folder's name that is not UTF-8, and fields of a config that are named like columns of the table."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    for dpath, value in ((odd, "x"), (tmp_path / "b", "y")):
        write(dpath, metrics=evaluated(4.0, 0.5))
        cfg = json.loads((dpath / "config.json").read_text())
        names = dict.fromkeys(("run", "state", "L0", "of", "l0"), value)
        (dpath / "config.json").write_text(json.dumps(cfg | names))
    header, cells = shown(tmp_path)
    assert header[3:8] == ["cfg.run", "cfg.state", "cfg.L0", "cfg.of", "l0"]
    assert {row[0] for row in cells} == {r"caf\udce9 *", "b *"}


@pytest.mark.slow
def test_the_command(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "runs" / "aa", metrics=evaluated(16.0, 0.3))
    write(tmp_path / "runs" / "bb", lr=3e-3, metrics=evaluated(8.0, 0.4))

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "saev.training.report", *args]
        return forked.run(command, cwd=ROOT, capture_output=True, text=True)

    png, table = tmp_path / "front.png", tmp_path / "table.csv"
    done = run(str(tmp_path / "runs"), "--plot", str(png), "--csv", str(table))
    assert done.returncode == 0, done.stderr
    assert "| bb *" in done.stdout and png.read_bytes().startswith(b"\x89PNG")
    assert len(table.read_text().splitlines()) == 3
    wrong = run(str(tmp_path / "nowhere"))
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert run().returncode == 2


def test_explained_variance_of_an_older_version_is_not_shown_as_todays(tmp_path: pathlib.Path) -> None:
    figures = evaluated(16.0, 0.3)
    del figures["explained_variance_per_dim"]
    write(tmp_path / "old", metrics=figures)
    ((*_, nmse, ev, dead, _, _),) = shown(tmp_path)[1]
    assert (nmse, ev, dead) == ("0.3000", "-", "25.0")
