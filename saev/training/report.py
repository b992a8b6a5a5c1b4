"""`python -m saev.training.report RUNS`: a sweep as a table, and the front of normalised MSE against L0.

RUNS are run directories (checkpoints/<run id>) or folders of them.
"""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import collections.abc
import csv
import dataclasses
import io
import math
import pathlib
import typing as tp

import beartype
import msgspec
import tyro

from saev import cli, errors, fields, helpers, launch
from saev.formats import jsonfile, metricslog

NOT_SHOWN = {
    *("data", "val_data", "ckpt_to", "wandb_project", "device", "sweep", "dry_run", "slurm"),
    *("activations", "architecture", "objective_name", "n_threads", "log_every", "costly_every"),
    *("save_every", "keep_last", "data_parallel", "pool_gb"),
}
"""Fields of a run's config that do not tell one SAE from another."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Report:
    """Prints trained SAEs as a table and draws normalised MSE against L0."""

    runs: tp.Annotated[tuple[fields.Path, ...], tyro.conf.Positional]
    """Run directories (checkpoints/RUN) or folders of them."""
    csv: fields.Path = ""
    """Also write the table to this CSV file."""
    plot: fields.Path = "front.png"
    """Where to draw. Empty: nowhere."""

    def __post_init__(self) -> None:
        fields.settle(self)


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Row:
    """One run."""

    name: str
    kind: str
    """Architecture, and objective when it is not the vanilla one."""
    cfg: dict[str, object]
    """Dotted name -> value."""
    state: str
    source: str
    """What its figures are of."""
    l0: float
    normalized_mse: float
    explained_variance: float
    dead_pct: float
    """Percentage of latents that fired on no held-out activation, or (last log line) not within --dead-window."""
    d_sae: int
    token_nmse_median: float = math.nan
    token_nmse_q95: float = math.nan
    extreme_variance_frac: float = math.nan

    @property
    def is_measured(self) -> bool:
        return math.isfinite(self.l0) and math.isfinite(self.normalized_mse) and self.l0 > 0


# ---- reading ----

Positive = tp.Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class _Sae(msgspec.Struct):
    d_vit: Positive
    exp_factor: Positive | None = None
    d_sae: Positive | None = None


class _Config(msgspec.Struct):
    """What the report reads of config.json."""

    architecture: str
    sae: _Sae
    n_patches: Positive
    batch_size: Positive
    objective_name: str = "Vanilla"


@beartype.beartype
def read(paths: tuple[str, ...]) -> list[Row]:
    """The runs in these folders, by architecture and L0.

    Raises:
        UserError: no such folder, or none of its folders is a run.
    """
    dpaths: dict[pathlib.Path, None] = {}
    for path in map(pathlib.Path, paths):
        if not path.is_dir():
            raise errors.UserError(
                f"{path}: no such folder. Pass run directories (checkpoints/RUN) or a folder of them."
            )
        found = [path] if (path / "config.json").exists() else sorted(_runs_in(path))
        if not found:
            raise errors.UserError(f"{path}: holds no run (no */config.json). Train one first.")
        dpaths |= dict.fromkeys(found)
    rows = [_row(dpath) for dpath in dpaths]
    return sorted(rows, key=lambda r: (r.kind, r.l0 if r.is_measured else math.inf, r.name))


def _runs_in(dpath: pathlib.Path) -> collections.abc.Iterator[pathlib.Path]:
    return (p.parent for p in dpath.glob("*/config.json"))


def _row(dpath: pathlib.Path) -> Row:
    cfg = _json(dpath / "config.json")
    try:
        known = msgspec.convert(cfg, _Config)
        d_sae = known.sae.d_sae or known.sae.d_vit * (known.sae.exp_factor or 1)
    except ValueError as err:
        raise errors.UserError(
            f"{dpath / 'config.json'}: not of a run of train.py ({errors.first_line(err)}). Leave it out."
        ) from err
    kind = known.architecture
    if known.objective_name != "Vanilla":
        kind += f" {known.objective_name}"
    n_steps = max(1, known.n_patches // known.batch_size)
    source, figures = _figures(dpath)
    l0, nmse, ev, dead = (
        _number(figures.get(name))
        for name in ("l0_count", "normalized_mse", "explained_variance", "dead_frac_window")
    )
    state = _state(dpath, figures, n_steps)
    names = ("token_nmse_median", "token_nmse_q95", "extreme_variance_frac")
    robust = {name: _number(figures.get(name)) for name in names}
    of = (dpath.name, kind, dict(_flat(cfg)), state, source)
    return Row(*of, l0, nmse, ev, 100 * dead, d_sae, **robust)


def _figures(dpath: pathlib.Path) -> tuple[str, dict[str, tp.Any]]:
    """(what they are of, by name): of the evaluation, else of the last whole log line."""
    if (dpath / "metrics.json").exists():
        found = _json(dpath / "metrics.json")
        n_dead, n = _number(found.get("n_dead")), _number(found.get("n_latents"))
        of = "held-out" if found.get("held_out") else "training sample"
        return of, {**_of_today(found), "dead_frac_window": n_dead / n if n > 0 else math.nan}
    fpath = dpath / "metrics.jsonl"
    whole, _, _ = (fpath.read_bytes() if fpath.exists() else b"").rpartition(b"\n")
    if not whole:  # of a killed run the last line may be cut
        return "-", {}
    if (figures := metricslog.parse(whole.rpartition(b"\n")[2])) is None:
        raise errors.UserError(
            f"{fpath}: its last line is damaged (checksum). Run the training again to its end, or leave that run out."
        )
    return "last log line", _of_today(figures)


def _of_today(figures: dict[str, tp.Any]) -> dict[str, tp.Any]:
    """Without what older versions called explained_variance (now explained_variance_per_dim)."""
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
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(tp.cast(float, value)) if is_number else math.nan
    except OverflowError:  # an integer beyond every float
        return math.nan


def _flat(cfg: dict[str, tp.Any], prefix: str = "") -> collections.abc.Iterator[tuple[str, object]]:
    for key, value in cfg.items():
        if prefix or key not in NOT_SHOWN:
            if isinstance(value, dict):
                yield from _flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, str(value) if isinstance(value, list) else value


# ---- table ----

SIZES = ("sae.d_sae", "sae.exp_factor")
"""Fields of the config that the column d_sae shows."""


@beartype.beartype
def front(rows: list[Row]) -> set[str]:
    """Names of the runs that no other beats: with at most their L0 and their error, and one of them lower. A failed run is none."""
    measured = [r for r in rows if r.is_measured and not r.state.startswith("failed")]
    return {
        r.name
        for r in measured
        if not any(
            o.l0 <= r.l0
            and o.normalized_mse <= r.normalized_mse
            and (o.l0 < r.l0 or o.normalized_mse < r.normalized_mse)
            for o in measured
        )
    }


@beartype.beartype
def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """(header, cells). Of the config, the fields that differ among the runs; a run on the front is marked with *."""
    keys = dict.fromkeys(key for row in rows for key in row.cfg if key not in SIZES)
    vary = [key for key in keys if len({repr(row.cfg.get(key)) for row in rows}) > 1]
    header = ["run", "architecture", "d_sae", *vary, "L0", "norm. MSE", "expl. var."]
    by_token = any(math.isfinite(row.token_nmse_median) for row in rows)  # older runs have none
    header += ["token median", "token 95%", "extreme var. %"] if by_token else []
    header += ["dead %", "of", "state"]
    best = front(rows)
    cells = []
    for row in rows:
        config = ["-" if row.cfg.get(key) is None else f"{row.cfg[key]}" for key in vary]
        name = row.name + (" *" if row.name in best else "")
        figures = [_shown(row.l0, 1), _shown(row.normalized_mse, 4)]
        figures += [_shown(row.explained_variance, 4)]
        if by_token:
            figures += [_shown(row.token_nmse_median, 4), _shown(row.token_nmse_q95, 4)]
            figures += [_shown(100 * row.extreme_variance_frac, 1)]
        figures += [_shown(row.dead_pct, 1)]
        cells.append([name, row.kind, str(row.d_sae), *config, *figures, row.source, row.state])
    return header, cells


def _shown(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


@beartype.beartype
def markdown(header: list[str], cells: list[list[str]]) -> str:
    """The table with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in (header, ["-" * w for w in widths], *cells)
    ]
    return "\n".join(lines)


# ---- drawing ----


@beartype.beartype
def draw(rows: list[Row], fpath: pathlib.Path) -> None:
    """Normalised MSE against L0, a colour for each kind, the front as a line, each run with its name."""
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    measured = sorted((r for r in rows if r.is_measured), key=lambda r: (r.l0, r.normalized_mse))
    best = front(rows)
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    line = [r for r in measured if r.name in best]
    axes.plot(
        [r.l0 for r in line], [r.normalized_mse for r in line], color="0.8", zorder=1, label="front"
    )
    for i, kind in enumerate(sorted({r.kind for r in measured})):
        mine = [r for r in measured if r.kind == kind]
        axes.scatter(
            [r.l0 for r in mine],
            [r.normalized_mse for r in mine],
            color=f"C{i % 10}",
            marker="osD^vP*X"[i % 8],
            label=kind,
            zorder=2,
        )
    axes.set_xscale("log")
    size = max(4.0, 8.0 - len(measured) / 10)
    for i, row in enumerate(measured):  # neighbours' names go to different sides
        dx, dy, side = [(5, 4, "left"), (-5, -9, "right"), (5, -9, "left"), (-5, 4, "right")][i % 4]
        axes.annotate(
            row.name,
            (row.l0, row.normalized_mse),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=side,
            fontsize=size,
            color="0.35",
        )
    axes.set_xlabel("L0 (latents that fire per activation)")
    axes.set_ylabel("normalised MSE")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd:
        figure.savefig(fd, format="png", dpi=140)


def main() -> None:
    prog = "python -m saev.training.report"
    cfg = cli.parse(Report, description=tp.cast(str, Report.__doc__), prog=prog)
    if not cfg.runs:
        raise errors.UserError("name at least one run directory, or a folder of them.")
    rows = read(cfg.runs)
    header, cells = table(rows)
    print(markdown(header, cells))
    if cfg.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *cells])
        helpers.write_text(pathlib.Path(cfg.csv), text.getvalue())
    if cfg.plot and any(row.is_measured for row in rows):
        draw(rows, pathlib.Path(cfg.plot))
        print(f"\n{cfg.plot}: * marks the runs on the front")


if __name__ == "__main__":
    launch.entry(main)
