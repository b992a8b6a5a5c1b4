"""Atomic files, progress, lazy attributes."""

import contextlib
import errno
import logging
import os
import pathlib
import pty
import subprocess
import sys
import termios
import types

import pytest

from saev import helpers, lazy

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


# ---- what killed processes leave ----

KINDS = {"atomic": "fpath.write_text('half')", "atomic_folder": "(fpath / 'x').write_text('half')"}


def hold(kind: str, fpath: pathlib.Path, signal_: str = "SIGKILL") -> subprocess.Popen:
    """A process in the middle of writing `fpath`; it says so, and sends itself the signal when told to go on."""
    code = f"""
import os, pathlib, signal, sys
from saev import helpers, launch
def main():
    with helpers.{kind}(pathlib.Path({str(fpath)!r})) as fpath:
        {KINDS[kind]}
        print("there", flush=True)
        sys.stdin.readline()
        os.kill(os.getpid(), signal.{signal_})
launch.entry(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"there\n"
    return process


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_writer_leaves_is_swept_and_what_a_living_one_holds_is_not(
    tmp_path: pathlib.Path, kind: str
) -> None:
    process = hold(kind, tmp_path / "x")
    (left,) = tmp_path.iterdir()
    helpers.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [left]
    process.communicate(b"\n")
    assert process.returncode == -9 and list(tmp_path.iterdir()) == [left]
    helpers.sweep(tmp_path, "y")  # another file's
    assert list(tmp_path.iterdir()) == [left]
    helpers.sweep(tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_writer_of_the_same_file_sweeps(tmp_path: pathlib.Path, kind: str) -> None:
    hold(kind, tmp_path / "x").communicate(b"\n")
    assert len(list(tmp_path.iterdir())) == 1
    with getattr(helpers, kind)(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_terminated_writer_leaves_nothing(tmp_path: pathlib.Path, kind: str) -> None:
    process = hold(kind, tmp_path / "x", "SIGTERM")
    process.communicate(b"\n")
    assert process.returncode == 143 and list(tmp_path.iterdir()) == []


def test_another_machines_temporaries_are_swept_after_a_day(tmp_path: pathlib.Path) -> None:
    new, old = (tmp_path / f".x.0123abcd-{c * 32}.tmp" for c in "ab")
    for fpath in (new, old):
        fpath.touch()
    os.utime(old, (0, 0))
    helpers.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


def test_locks_that_nobody_holds_are_swept_and_other_files_are_not(tmp_path: pathlib.Path) -> None:
    others = [tmp_path / name for name in (".hidden", ".mine.lock", ".x.tmp", "x.tmp", "y.lock")]
    for fpath in others:
        fpath.write_text("a user's")
    os.mkfifo(fifo := tmp_path / ".fifo.lock")
    (tmp_path / ".dead.lock").touch()
    with helpers.locked(held := tmp_path / ".held.lock", "it tests"):
        helpers.sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([*others, fifo, held])


def test_a_folder_is_replaced_whole(tmp_path: pathlib.Path) -> None:
    for text in ("old", "new"):
        with helpers.atomic_folder(tmp_path / "gallery") as dpath:
            (dpath / f"{text}.txt").write_text(text)
        assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")] == [f"gallery/{text}.txt"]
    with pytest.raises(ValueError), helpers.atomic_folder(tmp_path / "gallery"):
        raise ValueError
    assert [p.name for p in tmp_path.iterdir()] == ["gallery"]


def test_a_folder_put_aside_by_a_killed_process_comes_back(tmp_path: pathlib.Path) -> None:
    process = hold("atomic_folder", tmp_path / "gallery")
    (new,) = tmp_path.iterdir()
    new.with_suffix(".old").mkdir()  # as between the two renames
    (new.with_suffix(".old") / "page").touch()
    process.communicate(b"\n")
    helpers.sweep(tmp_path, "gallery")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["gallery", "gallery/page"]


def test_canonical_json_ignores_the_order_of_keys() -> None:
    assert helpers.canonical_json({"b": 1, "a": [1, 2]}) == '{"a":[1,2],"b":1}'


def test_progress_in_a_log_is_plain_lines(caplog: pytest.LogCaptureFixture, capfd) -> None:
    with caplog.at_level(logging.INFO, logger="saev"):
        items = helpers.progress(iter("abcd"), "dump", 4, "images", every_s=0.0)
        assert list(items) == list("abcd")
    assert [m.split(" images, ")[0] for m in caplog.messages] == [f"dump: {done}/4" for done in (1, 2, 3)]
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
    package.__getattr__, _ = lazy.attributes("made_up", {"answer": "deep", "deep": ""})
    assert package.answer == 42 and package.deep is module
    with pytest.raises(AttributeError, match="module 'made_up' has no attribute 'question'"):
        _ = package.question


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, saev, saev.nn, saev.data, saev.scorers, saev.protoeval; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize("writing", [helpers.atomic, helpers.atomic_folder])
def test_a_full_disk_is_named(writing, tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match="No space left") as err, writing(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert err.value.filename == str(tmp_path / "x") and list(tmp_path.iterdir()) == []
