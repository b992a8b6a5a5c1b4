"""What configs' fields may hold. Every config of the package is walked, so that no new field is forgotten."""

import dataclasses
import importlib
import inspect
import math
import pathlib
import types
import typing as tp

import pytest

import saev
from saev import errors, fields, launch
from saev.nn import config as nn_config
from saev.scorers import config as scorers_config
from saev.training import report

ROOT = pathlib.Path(saev.__file__).parent
NOT_PATHS = {"device", "wandb_project", "slurm_acct", "slurm_partition", "slurm_qos", "slurm_constraint"}
NOT_PATHS |= {"slurm_gpu_type", "slurm_exclude", "slurm_setup", "slurm_extra", "after", "stage_to"}
NOT_PATHS |= {"suffix", "split_column", "split_names", "path_column", "binary", "categorical", "class_column"}
NOT_PATHS |= {"label_name", "parts", "exclude_patch_labels"}
"""Fields of type str that hold something else."""
MAY_BE_NEGATIVE = {"layer", "vit_layers", "n_train", "log_freq_range", "log_value_range"}


def configs() -> list[type]:
    found = {launch.SlurmConfig, report.Report}
    for fpath in ROOT.glob("**/config.py"):
        package = ".".join(fpath.parent.relative_to(ROOT).parts)
        module = importlib.import_module(f"saev.{package}.config")
        classes = [c for _, c in inspect.getmembers(module, dataclasses.is_dataclass)]
        found |= {c for c in classes if c.__module__ == module.__name__}
    internal = {"DumpJob", "Subset"}  # no user makes one
    return sorted((c for c in found if c.__name__ not in internal), key=lambda c: c.__qualname__)


def make(cls: type, **given: object) -> tp.Any:
    required: dict[str, object] = {"runs": ("x",)} if cls is report.Report else {}
    required |= {"split": "file"} if "split_file" in given else {}
    return cls(**required | given)


def members(hint: object) -> set[object]:
    """The plain types in a union or tuple."""
    if tp.get_origin(hint) in (tp.Union, types.UnionType, tuple):
        return set().union(*map(members, tp.get_args(hint)))
    return {hint}


def fields_of(*kinds: type) -> list[tuple[type, str]]:
    hints = {c: tp.get_type_hints(c) for c in configs()}
    names = {c: [f.name for f in dataclasses.fields(tp.cast(tp.Any, c))] for c in configs()}
    return [(c, n) for c in configs() for n in names[c] if members(hints[c][n]) & set(kinds)]


def shaped(cls: type, name: str, value: object) -> object:
    """The value, as often as the field's tuple wants it."""
    hint = tp.get_type_hints(cls)[name]
    if tp.get_origin(hint) is not tuple:
        return value
    args = tp.get_args(hint)
    return (value,) * (1 if args[-1] is ... else len(args))


def test_the_walk_sees_them() -> None:
    assert {"Train", "Dump", "Shards", "ProtoEval", "Visuals", "TopK", "KMeans", "Demo"} <= {
        c.__name__ for c in configs()
    }
    assert len(fields_of(int, float)) > 40 and len(fields_of(str)) > 20


@pytest.mark.parametrize(("cls", "name"), fields_of(str))
def test_paths_are_expanded(
    cls: type, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """A field of type str is a path, or named above."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "scratch")
    if name == "name":  # part of a file's name
        with pytest.raises(errors.UserError, match="--name .*: use letters, digits and underscores"):
            make(cls, name="../x")
        return
    if name == "numeric":  # columns and thresholds
        for bad in ("~/x", "=1", "a=", "a=b"):
            with pytest.raises(errors.UserError, match=f"--labels.numeric {bad}: must be COLUMN=NUMBER"):
                make(cls, numeric=("a=1", bad))
        return
    got = getattr(make(cls, **{name: shaped(cls, name, "~/$SCRATCH/x${SCRATCH}")}), name)
    if name in NOT_PATHS:
        assert got == shaped(cls, name, "~/$SCRATCH/x${SCRATCH}")
    else:
        assert got == shaped(cls, name, f"{tmp_path}/scratch/xscratch")
        for bad in ("$NO_SUCH_VARIABLE/x", "~no-such-user/x", "a\0b"):
            with pytest.raises(errors.UserError, match=f"{name.replace('_', '-')}.*:"):
                make(cls, **{name: shaped(cls, name, bad)})


@pytest.mark.parametrize(("cls", "name"), fields_of(int, float))
def test_numbers_are_bounded(cls: type, name: str) -> None:
    is_float = float in members(tp.get_type_hints(cls)[name])
    bad: list[float] = [math.nan, math.inf, -math.inf, 1e30] if is_float else [10**30, -(10**30)]
    for value in bad if name in MAY_BE_NEGATIVE else [*bad, -1.0 if is_float else -1]:
        with pytest.raises(errors.UserError, match=f"{name.replace('_', '-')} .*: .* at |must be"):
            make(cls, **{name: shaped(cls, name, value)})
    try:
        make(cls, **{name: shaped(cls, name, 0.0 if is_float else 0)})
    except errors.UserError as err:
        assert "\n" not in str(err)


@pytest.mark.parametrize(
    ("interval", "value", "wanted"),
    [
        ("[0, 1)", 1.0, "must be below 1"),
        ("[0, 1]", 1.5, "must be at most 1"),
        ("(0, 1]", 0.0, "must be more than 0"),
        ("[1, 1e6]", 0, "must be at least 1"),
        ("[1, 1e6]", 2_000_000, "must be at most 1,000,000"),
        ("[0, 1e6]", math.nan, "must be at least 0"),
    ],
)
def test_intervals(interval: str, value: float, wanted: str) -> None:
    with pytest.raises(errors.UserError, match=rf"^--x {value}: {wanted}\.$"):
        fields._check(value, interval, "--x")
    for inside in (0.5, 1.0):
        assert fields._check(inside, "(0, 1]", "--x") is None


def test_expand(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("HOME", "/home/cost$5 $x")  # a variable in the home folder's name is none
    monkeypatch.setenv("x", "y")
    monkeypatch.chdir(tmp_path)
    same = ["", "a/~/b", "a~", "hub", "hf-hub:org/name", "price$5", "a$", "$$", "a/./b/", "/"]
    assert [fields.expand(path) for path in same] == same
    assert fields.expand("~") == "/home/cost$5 $x" and fields.expand("~/") == "/home/cost$5 $x/"
    assert fields.expand("~/$x/${x}z") == "/home/cost$5 $x/y/yz"
    assert fields.expand("~root/a") == f"{pathlib.Path('~root').expanduser()}/a"
    (tmp_path / "a$x").mkdir()
    assert fields.expand("a$x") == "a$x" and fields.expand("b$x") == "by"
    assert fields.path("./~/a") == fields.path(fields.path("./~/a")) == tmp_path / "~" / "a"
    for unset in ("", None):
        monkeypatch.setenv("x", "") if unset == "" else monkeypatch.delenv("x")
        with pytest.raises(errors.UserError, match=r"^--y \$x/a: the environment variable \$x is"):
            fields.expand("$x/a", "--y")
    monkeypatch.setenv("HOME", "")
    with pytest.raises(errors.UserError, match="^~/a: there is no such home folder"):
        fields.expand("~/a")


def test_fields_that_were_added_later_do_not_change_old_records() -> None:
    """Finished results, codes and galleries name scorers by these."""

    @dataclasses.dataclass(frozen=True)
    class KMeans(scorers_config.KMeans):
        tries: int = fields.later(1)

    @dataclasses.dataclass(frozen=True)
    class TopK(nn_config.TopK):
        depth: int = fields.later(1)

    before, after = scorers_config.KMeans(n_iters=3), KMeans(n_iters=3)
    assert fields.recorded(before) == dataclasses.asdict(before) == fields.recorded(after)
    assert fields.recorded(KMeans(tries=2)) == dataclasses.asdict(scorers_config.KMeans()) | {"tries": 2}
    assert str(nn_config.TopK(8)).rpartition(".")[2] == str(TopK(8)).rpartition(".")[2]
    assert fields.identity(before) == fields.identity(after) != fields.identity(KMeans(tries=2))
