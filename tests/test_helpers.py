"""Atomic files, progress, lazy attributes."""

import contextlib
import logging
import os
import pathlib
import pty
import subprocess
import sys
import termios
import types

import pytest

from saev import helpers

ROOT = pathlib.Path(__file__).parent.parent


def test_atomic_replaces_the_old_file(tmp_path: pathlib.Path) -> None:
    fpath = tmp_path / "new" / "folder" / "x.txt"
    for text in ("old", "new, and longer"):
        with helpers.atomic(fpath) as tmp_fpath:
            assert tmp_fpath.parent == fpath.parent  # one file system, so that rename is atomic
            tmp_fpath.write_text(text)
        assert [p.read_text() for p in fpath.parent.iterdir()] == [text]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_keeps_the_old_file_and_leaves_nothing(
    tmp_path: pathlib.Path, error: type[BaseException]
) -> None:
    fpath = tmp_path / "x.txt"
    helpers.write_text(fpath, "old")
    with pytest.raises(error), helpers.atomic(fpath) as tmp_fpath:
        tmp_fpath.write_text("half of the n")
        raise error
    assert list(tmp_path.iterdir()) == [fpath] and fpath.read_text() == "old"


def test_two_writers_of_one_file_do_not_meet(tmp_path: pathlib.Path) -> None:
    """Array tasks on two nodes can have one process id; one of them wins, with a whole file."""
    fpath = tmp_path / "x.txt"
    with helpers.atomic(fpath) as first, helpers.atomic(fpath) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert list(tmp_path.iterdir()) == [fpath] and fpath.read_text() == "first"


def test_canonical_json_ignores_the_order_of_keys() -> None:
    assert helpers.canonical_json({"b": 1, "a": [1, 2]}) == '{"a":[1,2],"b":1}'


def test_progress_in_a_log_is_plain_lines(caplog: pytest.LogCaptureFixture, capfd) -> None:
    with caplog.at_level(logging.INFO, logger="saev"):
        items = helpers.progress(iter("abcd"), "dump", 4, "images", every_s=0.0)
        assert list(items) == list("abcd")
    assert [m.split(" images, ")[0] for m in caplog.messages] == [
        f"dump: {done}/4" for done in (1, 2, 3)
    ]
    assert all("/s, " in m and m.endswith(" s left") for m in caplog.messages)
    assert "\r" not in capfd.readouterr().err


def test_progress_is_quiet_between_its_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="saev"):
        assert list(helpers.progress(range(1000), "train", 1000, "steps")) == list(range(1000))
    assert caplog.messages == []


def test_progress_on_a_terminal_is_a_bar() -> None:
    code = "from saev import helpers; print(sum(helpers.progress(range(5), 'train', 5, 'steps')))"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, timeout=60
    )
    os.close(theirs)
    bar = _read_all(ours).decode()
    assert done.stdout == b"10\n"
    assert "\r" in bar and "train: 100%" in bar and "5/5" in bar and "steps/s" in bar


def _read_all(fd: int) -> bytes:
    """What was written to the other end of a pseudo-terminal that is closed by now (Linux says so with EIO)."""
    out = b""
    with contextlib.suppress(OSError), os.fdopen(fd, "rb", buffering=0) as file:
        while chunk := file.read(1000):
            out += chunk
    return out


def test_lazy_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = types.ModuleType("made_up"), types.ModuleType("made_up.deep")
    module.answer = 42
    monkeypatch.setitem(sys.modules, "made_up", package)
    monkeypatch.setitem(sys.modules, "made_up.deep", module)
    package.__getattr__ = helpers.lazy_attributes("made_up", {"answer": "deep", "deep": ""})
    assert package.answer == 42 and package.deep is module
    with pytest.raises(AttributeError, match="module 'made_up' has no attribute 'question'"):
        _ = package.question


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, saev, saev.nn, saev.data, saev.scorers, saev.protoeval; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n"
