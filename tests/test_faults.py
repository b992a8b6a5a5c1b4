"""The quick part of the campaign of faults (tests/faults): nothing is wrong in silence, nothing ends in a traceback or hangs."""

import pathlib
import sys

import forked
import pytest
from faults import damage, outcomes

from saev import errors

pytestmark = pytest.mark.slow


def test_damaged_files_and_kills_are_right_or_refused() -> None:
    command = [sys.executable, "-m", "faults.campaign"]
    done = forked.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line]
    header = table[0]
    lines = {(line[0], line[1]): dict(zip(header, line, strict=True)) for line in table[2:]}
    assert [lines["all", ""][bad] for bad in ("wrong", "traceback", "hang")] == ["0"] * 3
    for what in ("activations", "shard metadata", "SAE checkpoint", "fitted scorer", "results"):
        assert int(lines["bit flips", what]["refused"]) > 0
    assert (
        lines["bit flips", "codes of a gallery"]["right"]
        == lines["bit flips", "codes of a gallery"]["attempts"]
    )
    assert {what for campaign, what in lines if campaign == "kills"} == {"dump", "train", "look", "evaluate"}


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [
        (None, "wrong"),
        (errors.UserError("one line"), "refused"),
        (errors.UserError("two\nlines"), "traceback"),
        (OSError("no file is named"), "traceback"),
        (ValueError("x"), "traceback"),
    ],
)
def test_outcomes_are_told_apart(raised: Exception | None, outcome: str) -> None:
    def probe() -> str:
        if raised is not None:
            raise raised
        return "another result"

    tally = outcomes.Tally()
    assert tally.attempt("c", "w", probe, "a result", "story") == outcome
    assert tally.total(outcome) == 1 and (tally.stories == []) == (outcome == "refused")


def test_a_probe_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> str:
        while True:
            pass

    monkeypatch.setattr(outcomes, "LIMIT_S", 1)
    assert outcomes.Tally().attempt("c", "w", probe, "a result", "story") == "hang"


def test_a_damaged_file_is_restored_with_its_time(tmp_path: pathlib.Path) -> None:
    fpath = tmp_path / "x"
    fpath.write_bytes(b"abc")
    info = fpath.stat()
    with damage.kept(fpath) as data:
        damage.overwrite(fpath, damage.flipped(data, 9))
        assert fpath.read_bytes() == b"a`c" and fpath.stat().st_mtime_ns == info.st_mtime_ns
    with damage.kept(fpath):
        assert [fpath.exists() for _ in damage.no_files(fpath)] == [False, True, False, True]
    assert fpath.read_bytes() == b"abc" and fpath.stat().st_mtime_ns == info.st_mtime_ns
