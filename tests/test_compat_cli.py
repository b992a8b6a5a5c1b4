"""The command that converts SAEs of other libraries. The libraries' own tests run it on real folders."""

import pathlib
import subprocess
import sys

import pytest

from saev import errors
from saev.compat import cli

HELP = """
import sys
from saev.compat import cli
sys.argv = ["saev convert", "--help"]
try:
    cli.main()
finally:
    assert not {"torch", "numpy"} & sys.modules.keys()
"""


def test_help_does_not_wait_for_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "usage: saev convert" in done.stdout
    assert all(name in done.stdout for name in ("saelens", "dictionary_learning", "sparsify"))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ("sparsify export sae.pt new", "only the format of saelens can be written, not sparsify's"),
        ("saelens load folder here", "here exists already. Pass a new file"),
        ("saelens export sae.pt here", "here exists already. Pass a new folder"),
        ("overcomplete load folder sae.pt", "'overcomplete'.* See --help"),
        ("saelens load folder", "See --help"),
    ],
)
def test_what_is_refused(
    args: str, match: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    monkeypatch.setattr(sys, "argv", ["saev convert", *args.split()])
    with pytest.raises(errors.UserError, match=match):
        cli.main()
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
