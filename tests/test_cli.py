"""The command line: numbers, the width of help, and errors of one line."""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
from unittest import mock

import pytest

from saev import cli, errors
from saev.data import config as data_config
from saev.training import config

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e6", 10**6),
        ("1E6", 10**6),
        ("2.5e5", 250_000),
        ("1_000_000", 10**6),
        ("-1", -1),
        ("9007199254740993", 2**53 + 1),  # floats would lose the last digit
        ("1.0", 1),
    ],
)
def test_whole_numbers_are_exact(text: str, number: int) -> None:
    assert cli.whole_number(text) == number


@pytest.mark.parametrize(
    "text", ["1.5", "1e400", "1e999999999999", "nan", "inf", "", "x", "1e-3", "9" * 5000, "0x10"]
)
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(errors.UserError, match="^Error parsing --n-patches: .* is not a whole"):
        cli.parse(config.Train, ["--n-patches", text])


def test_flags_take_them() -> None:
    args = ["--n-patches", "2.5e6", "--batch-size", "1e3", "--seed", "1_0", "--data.layer", "1e1"]
    cfg = cli.parse(config.Train, args)
    assert (cfg.n_patches, cfg.batch_size, cfg.seed, cfg.data.layer) == (2_500_000, 1000, 10, 10)
    sizes = cli.parse(data_config.Vit, ["--img-size", "2.24e2", "336"]).img_size
    assert sizes == (224, 336)


WRONG = {
    "--devize x": "Unrecognized options: --devize, x. Perhaps you meant --device. See --help.",
    "sae:relu --sae.top-k 3": "Unrecognized or misplaced options: --sae.top-k 3. It belongs to sae:batch-top-k or sae:top-k. See --help.",
    "--lr abc": "Error parsing --lr: 'abc' is not None or FLOAT. See --help.",
    "--decay-frac abc": "Error parsing --decay-frac: 'abc' is not a number. See --help.",
    "--data.shardroot x": ".* Perhaps you meant --data.shard-root or --val-data.shard-root. See --help.",
    "--lr": "Missing value for argument '--lr'.* See --help.",
    "sae:foo": "Unrecognized options: sae:foo. Available subcommands: sae:relu, .* See --help.",
    "--lr-decay foo": "invalid choice 'foo' .*'constant', 'linear', 'cosine'.* See --help.",
    "--ckpt-to $NO_SUCH_VARIABLE": "--ckpt-to .*: the environment variable .* is not set.*",
    "--n-hours nan": "--n-hours nan: must be more than 0.",
    "--x " + 200 * "long-": "Unrecognized options: --x, (long-){200}.*",
}


@pytest.mark.parametrize("args", WRONG)
def test_errors_are_one_line(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.UserError, match=f"^{WRONG[args]}$") as err:
        cli.parse(config.Train, args.split())
    assert "\n" not in str(err.value) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", ["0", "1", "7", "1000000000", "-5", "x", "9" * 5000])
def test_help_in_any_terminal(columns: str) -> None:
    command = [sys.executable, "train.py", "--help"]
    env = {**os.environ, "COLUMNS": columns}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=60)
    assert "--ckpt-to" in done.stdout and max(map(len, done.stdout.splitlines())) <= 160


def test_help_joins_the_lines_of_a_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    """tyro by itself would break the line where the source does. A base class's fields are joined too."""

    @dataclasses.dataclass(frozen=True)
    class Base:
        length: int = 3
        """A help text that the source breaks
        here (and that goes on)."""

    @dataclasses.dataclass(frozen=True)
    class Derived(Base):
        width: int = 4
        """Another one, broken before
        --a-flag."""

    with mock.patch.dict(os.environ, COLUMNS="160"), pytest.raises(SystemExit):
        cli.parse(Derived, ["--help"])
    out = capsys.readouterr().out
    assert "that the source breaks here (and that goes on). (default: 3)" in out
    assert "Another one, broken before --a-flag. (default: 4)" in out


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        (["-m", "saev", "verify"], "saev verify [-h] DIR [DIR ...]"),
        (["-m", "saev.data.verify"], "python -m saev.data.verify [-h] DIR [DIR ...]"),
        (["-m", "saev.data"], "python -m saev.data [-h] [OPTIONS]"),
        (["train.py"], "train.py [-h] [OPTIONS]"),
    ],
)
def test_usage_names_the_command_as_it_was_called(command: list[str], usage: str) -> None:
    command = [sys.executable, *command, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(f"usage: {usage}")


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("17", None):
        if columns is None:
            monkeypatch.delenv("COLUMNS")
        else:
            monkeypatch.setenv("COLUMNS", columns)
        with contextlib.suppress(errors.UserError):
            cli.parse(config.Train, ["--nope"])
        assert os.environ.get("COLUMNS") == columns


def test_a_signal_while_the_command_line_is_read_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM is a SystemExit, and so is tyro's answer to a wrong flag."""

    def terminated(*_: object, **__: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("saev.cli.tyro.cli", terminated)
    with pytest.raises(SystemExit) as ended:
        cli.parse(config.Train, [])
    assert ended.value.code == 143
