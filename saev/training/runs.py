"""Finished and unfinished training runs as one frame, and as a table."""

import collections.abc
import dataclasses
import math
import pathlib
import typing as tp

import msgspec
import polars as pl

from saev import errors, fields, helpers
from saev.formats import jsonfile, metricslog
from saev.report import tables
from saev.training import config

NOT_SHOWN = {
    *{field.name for field in dataclasses.fields(config.Train)} - {*fields.result_names(config.Train)},
    *("activations", "architecture", "objective_name"),
}
"""Config fields that the table leaves out: they do not change the SAE, or have columns of their own."""


class Column(tp.NamedTuple):
    """A column of metrics."""

    header: str
    digits: int
    is_by_token: bool = False
    """Computed per token. Left out of the table if no run has it, as in older runs."""


COLUMNS = {
    "l0": Column("L0", 1),
    "normalized_mse": Column("norm. MSE", 4),
    "explained_variance": Column("expl. var.", 4),
    "token_nmse_median": Column("token median", 4, True),
    "token_nmse_q95": Column("token 95%", 4, True),
    "extreme_variance_pct": Column("extreme var. %", 1, True),
    "dead_pct": Column("dead %", 1),
}
"""dead_pct: percentage of latents that never fired in the evaluation (in the log: within --dead-window)."""
SIZES = ("sae.d_sae", "sae.exp_factor")
"""Config fields that the column d_sae replaces."""
IS_MEASURED = (pl.col("l0") > 0) & pl.col("l0").is_not_nan() & pl.col("normalized_mse").is_not_nan()


# ---- reading ----

Positive = tp.Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Size = tp.Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class _Sae(msgspec.Struct):
    d_vit: Size
    exp_factor: Size | None = None
    d_sae: Size | None = None


class _Activations(msgspec.Struct):
    vit_ckpt: str = ""
    layers: list[tp.Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]] = []
    patches: str = ""


class _Config(msgspec.Struct):
    """What the report reads of config.json. Older runs lack `activations`."""

    architecture: str
    sae: _Sae
    n_patches: Positive
    batch_size: Positive
    objective_name: str = "Vanilla"
    activations: _Activations = msgspec.field(default_factory=_Activations)


def read(paths: tuple[str, ...]) -> pl.DataFrame:
    """The runs in these folders as a frame, sorted by architecture and L0.

    Columns: run (name), kind, d_sae, cfg.<field> (a string, null if the config lacks it), COLUMNS, source (of
    COLUMNS: held-out, training sample, last log line or -), state, is_best (on the front), vit, layers and
    tokens of the activations (empty if unknown), n_trained and n_measured (numbers of activations; the latter
    is NaN for a last log line).

    Raises:
        UserError: a folder does not exist, or holds no run.
    """
    dpaths: dict[pathlib.Path, None] = {}
    for path in map(pathlib.Path, paths):
        if not path.is_dir():
            raise errors.UserError(
                f"{path}: no such folder. Pass run directories (checkpoints/RUN) or a folder of them."
            )
        is_run = (path / "config.json").exists()
        found = [path] if is_run else sorted(p.parent for p in path.glob("*/config.json"))
        if not found:
            raise errors.UserError(
                f"{path}: holds no run (no */config.json). Pass the --ckpt-to of train.py."
            )
        dpaths |= dict.fromkeys(found)
    rows = pl.from_dicts([_row(dpath) for dpath in dpaths], infer_schema_length=None)
    l0 = pl.when(IS_MEASURED).then("l0").otherwise(math.inf)
    return front(rows.sort("kind", l0, "run"))


def _row(dpath: pathlib.Path) -> dict[str, str | int | float | list[int] | None]:
    cfg = _json(dpath / "config.json")
    try:
        known = msgspec.convert(cfg, _Config)
        d_sae = known.sae.d_sae or known.sae.d_vit * (known.sae.exp_factor or 1)
    except ValueError as err:
        raise errors.UserError(
            f"{dpath / 'config.json'}: not from train.py ({errors.first_line(err)}). Leave that run out."
        ) from err
    kind, acts = helpers.printable(known.architecture), known.activations
    if known.objective_name != "Vanilla":
        kind += f" {helpers.printable(known.objective_name)}"
    n_steps = max(1, known.n_patches // known.batch_size)
    source, figures = _figures(dpath)
    n_extreme, n_dead = (_number(figures.get(name)) for name in ("extreme_variance_frac", "dead_frac_window"))
    numbers = {name: _number(figures.get("l0_count" if name == "l0" else name)) for name in COLUMNS}
    numbers |= {"extreme_variance_pct": 100 * n_extreme, "dead_pct": 100 * n_dead}
    return (
        {"run": helpers.printable(dpath.name), "kind": kind, "d_sae": d_sae}
        | dict(_flat(cfg))
        | numbers
        | {"source": source, "state": _state(dpath, figures, n_steps)}
        | {"vit": helpers.printable(acts.vit_ckpt or ""), "layers": acts.layers}
        | {"tokens": helpers.printable(acts.patches or ""), "n_trained": known.n_patches}
        | {"n_measured": _number(figures.get("n"))}
    )


def _figures(dpath: pathlib.Path) -> tuple[str, dict[str, tp.Any]]:
    """(source, metrics by name), from the evaluation, else from the last complete log line."""
    if (dpath / "metrics.json").exists():
        found = _json(dpath / "metrics.json")
        n_dead, n = _number(found.get("n_dead")), _number(found.get("n_latents"))
        of = "held-out" if found.get("held_out") else "training sample"
        return of, {**_of_today(found), "dead_frac_window": n_dead / n if n > 0 else math.nan}
    fpath = dpath / "metrics.jsonl"
    whole, _, _ = (fpath.read_bytes() if fpath.exists() else b"").rpartition(b"\n")
    if not whole:  # a killed run's last line may be truncated
        return "-", {}
    if (figures := metricslog.parse(whole.rpartition(b"\n")[2])) is None:
        raise errors.UserError(
            f"{fpath}: its last line is damaged (checksum). Finish the training, or leave that run out."
        )
    return "last log line", _of_today(figures)


def _of_today(figures: dict[str, tp.Any]) -> dict[str, tp.Any]:
    """Drops explained_variance of older versions, which is explained_variance_per_dim today."""
    if "explained_variance_per_dim" in figures:
        return figures
    return {k: v for k, v in figures.items() if k != "explained_variance"}


def _state(dpath: pathlib.Path, figures: dict[str, tp.Any], n_steps: int) -> str:
    if (dpath / "failed.json").exists():
        return f"failed at step {_json(dpath / 'failed.json').get('step', '?')}"
    if (dpath / "sae.pt").exists():
        return "done"
    return f"step {figures.get('step', 0)} of {n_steps}"


def _json(fpath: pathlib.Path) -> dict[str, tp.Any]:
    try:
        return jsonfile.read_sealed(fpath, dict[str, tp.Any], "Leave that run out.", old=True)
    except OSError as err:
        raise errors.UserError(
            f"{fpath} cannot be read ({errors.first_line(err)}). Leave that run out."
        ) from err


def _number(value: object) -> float:
    """NaN if it is not a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # an integer larger than any float
        return math.nan


def _flat(cfg: dict[str, tp.Any], prefix: str = "cfg.") -> collections.abc.Iterator[tuple[str, str | None]]:
    """(cfg.<dotted name>, value as text)."""
    for key, value in cfg.items():
        if prefix == "cfg." and key in NOT_SHOWN:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, None if value is None else helpers.printable(str(value))


# ---- table ----


def front(rows: pl.DataFrame) -> pl.DataFrame:
    """Adds is_best: whether the run is on the Pareto front of L0 and normalised MSE. Failed runs are not."""
    counts = IS_MEASURED & ~pl.col("state").str.starts_with("failed")
    error = pl.when(counts).then("normalized_mse")
    by_l0 = rows.filter(counts).group_by("l0").agg(least=pl.col("normalized_mse").min()).sort("l0")
    by_l0 = by_l0.with_columns(below=pl.col("least").cum_min().shift(1).fill_null(math.inf))
    rows = rows.join(by_l0, on="l0", how="left", maintain_order="left")
    is_best = (error == pl.col("least")) & (error < pl.col("below"))
    return rows.with_columns(is_best=is_best.fill_null(False)).drop("least", "below")


def caption(rows: pl.DataFrame) -> str:
    """What a chart of these runs shows: ViT, layers, and numbers of activations."""
    known = rows.filter(pl.col("layers").list.len() > 0).explode("layers").rename({"layers": "layer"})
    tokens = " and ".join(filter(None, rows["tokens"].unique().sort()))
    text = f"{tables.where(known)}, {tokens} tokens. " if len(known) else ""
    text += f"{len(rows)} SAE{'s' * (len(rows) > 1)} trained on {_between(rows['n_trained'])} activations. "
    by_source = rows.group_by("source", maintain_order=True).agg("n_measured").iter_rows()
    sources = [f"{_between(pl.Series(n), '{} activations, ')}{source}" for source, n in by_source]
    return f"{text}Measured on: {'; '.join(sources)}. Grey line: the runs that no other one beats in both."


def _between(numbers: pl.Series, form: str = "{}") -> str:
    """100, or 100 to 200, in `form`. Empty without numbers."""
    known = sorted({*numbers.drop_nans()})
    return form.format(" to ".join(f"{n:,.0f}" for n in known[:: max(1, len(known) - 1)])) if known else ""


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """A frame of strings, with the config fields that differ among runs. * marks runs on the front."""
    names = {key: key.removeprefix("cfg.") for key in rows.columns if key.startswith("cfg.")}
    vary = [key for key, name in names.items() if name not in SIZES and rows[key].n_unique() > 1]
    by_token = rows["token_nmse_median"].is_not_nan().any()
    figures = {
        column.header: tables.texts(f"{{:.{column.digits}f}}", rows[name], missing="-")
        for name, column in COLUMNS.items()
        if by_token or not column.is_by_token
    }
    mark = pl.when("is_best").then(pl.lit(" *")).otherwise(pl.lit(""))
    first = rows.select(pl.col("run") + mark, architecture="kind", d_sae=pl.col("d_sae").cast(pl.String))
    last = rows.select("state", of="source").select("of", "state")
    taken = {*first.columns, *figures, *last.columns}
    shown = {key if names[key] in taken else names[key]: tables.short(rows[key].to_list()) for key in vary}
    frames = [first, pl.DataFrame(shown).fill_null("-"), pl.DataFrame(figures), last]
    return pl.concat(frames, how="horizontal")
